"""Shared shapes, data and launchers of the tests: everything is small, hermetic and on the CPU."""
import contextlib
import dataclasses
import io
import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

VOCAB = 384
# A model with every feature of the trunk that trains a step in milliseconds.
TINY = dict(vocab_size=VOCAB, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, rope_dims=4,
            xsa_last_n=2, bigram_vocab_size=64, bigram_dim=16, nfm_hidden_dim=16, iterations=6,
            train_batch_tokens=512, train_seq_len=64, micro_batch_tokens=256, warmdown_iters=3, warmup_steps=0,
            train_log_every=1, val_loss_every=0, checkpoint_every=0, checkpoint_seconds=0.0,
            eval_checkpoint_seconds=0.0, eval_seq_len=64, eval_stride=16, eval_batch_seqs=4,
            ttt_chunk_tokens=256, ttt_epochs=1, ttt_batch_seqs=2, ttt_freeze_blocks=1, device="cpu")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def tiny_config(**changes):
    """A Config of TINY with `changes`, for tests that stay in this process."""
    return train_gpt.Config(**{**TINY, "dtype": "float32", **changes})


def environment(**settings):
    """Environment for a child process: what it needs to start, and `settings` as variables in capitals."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    text = {name.upper(): str(int(value)) if isinstance(value, bool) else str(value)
            for name, value in settings.items()}
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **text}


@dataclasses.dataclass(frozen=True)
class TinyData:
    """Two training shards, one validation shard and their tokenizer (384 pieces, byte fallback)."""
    data_path: Path
    tokenizer_path: Path

    @property
    def settings(self):
        return dict(TINY, data_path=self.data_path, tokenizer_path=self.tokenizer_path)


def train_tokenizer(texts, path, vocab_size=VOCAB, **options):
    model = io.BytesIO()
    settings = dict(model_type="bpe", byte_fallback=True, split_digits=True,
                    normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, character_coverage=0.999,
                    pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model, vocab_size=vocab_size, **{**settings, **options})
    Path(path).write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    topics = sorted(pydoc_data.topics.topics)
    texts = [pydoc_data.topics.topics[name][:6000] for name in topics]
    model = train_tokenizer(texts, folder / "tokenizer.model")
    ids = [np.array([train_gpt.BOS, *model.encode(text)]) for text in texts]
    train, val = np.concatenate(ids[:40]), np.concatenate(ids[40:])[:1500]
    half = len(train) // 2
    for name, tokens in (("train_000000", train[:half]), ("train_000001", train[half:]), ("val_000000", val)):
        train_gpt.write_shard(folder / f"fineweb_{name}.bin", tokens)
    return TinyData(folder, folder / "tokenizer.model")


@pytest.fixture
def runtime(tmp_path):
    """make(config, **environ) -> Runtime in a fresh directory, closed after the test."""
    with contextlib.ExitStack() as stack:
        def make(config, **environ):
            run_dir = config.run_dir or str(tmp_path / "run")
            made = train_gpt.Runtime(dataclasses.replace(config, run_dir=run_dir), environ)
            stack.callback(made.close)
            return made
        yield make


def launch(settings, cwd, ranks=1, script=ROOT / "train_gpt.py", timeout=240, arguments=()):
    """Run the script as a user would; returns the CompletedProcess with stdout and stderr as text."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(torchrun if ranks > 1 else [sys.executable]), str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**settings), capture_output=True, text=True,
                          timeout=timeout)


def read_json(path):
    return json.loads(Path(path).read_text())


def events(run_dir, kind=None):
    """Events of metrics.jsonl, those of one kind if given."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, filter(None, lines)) if kind in (None, e["event"])]


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    yield
