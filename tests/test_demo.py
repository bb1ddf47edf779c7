"""PRESET=demo: the whole path on a laptop, with the scores of gzip and xz beside its own."""

import gzip
import lzma
import re

import numpy as np
import pytest
import sentencepiece
import torch
from helpers import TINY, launch, read_json, run_main

import train_gpt
from train_gpt import Config

DEMO = Config.from_env({"PRESET": "demo"})


def test_the_demo_takes_a_fixed_number_of_steps_and_validates_often_enough_for_a_curve():
    """The cap is a guard: at twice the pace of two free cores it must not touch the rate."""
    slow = 480 / DEMO.iterations / 2  # seconds a step
    for step in range(1, DEMO.iterations):
        assert train_gpt.lr_scale(DEMO, step, slow * step) == train_gpt.lr_scale(DEMO, step)
    assert DEMO.max_wallclock_seconds == 480
    assert -(-DEMO.iterations // DEMO.val_loss_every) >= 5


def scored_text(folder, tokenizer, seq_len):
    """The validation text that is scored: all whole windows, decoded."""
    tokens = train_gpt.read_shard(folder / "fineweb_val_000000.bin")
    targets = (len(tokens) - 1) // seq_len * seq_len
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return model.decode(tokens[: targets + 1].tolist()).encode()


def baselines(text):
    """The lines that a run must log about this text."""
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -6": len(lzma.compress(text, preset=6))}
    return [
        f"baseline {name} bpb:{8 * size / len(text):.4f} on the same {len(text)} bytes of text"
        for name, size in sizes.items()
    ]


@pytest.fixture(scope="module")
def demo(tiny_data, tmp_path_factory):
    """The demo on tiny data, started in an empty directory."""
    settings = {**tiny_data.settings, "preset": "demo", "dtype": "float32"}
    finished = run_main(tmp_path_factory.mktemp("demo") / "run", **settings)
    assert finished.code == 0, finished.err
    return finished


def test_the_baselines_are_compressed_sizes_of_the_text_that_is_scored(demo, tiny_data):
    text = scored_text(tiny_data.data_path, tiny_data.tokenizer_path, TINY["eval_seq_len"])
    assert [line for line in demo.lines if line.startswith("baseline ")] == baselines(text)
    data = read_json(demo.dir / "manifest.json")["data"]
    assert data["val_bytes"] == demo.scores()["legal_ttt"]["bytes"]
    assert abs(data["val_bytes"] - len(text)) <= data["val_documents"]


def test_the_demo_ends_with_scores_baselines_summary_and_what_to_try_next(demo):
    starts = """legal_ttt_exact |score_scope:proxy|result pre_quant |result final_int6_roundtrip |
        result final_int6_sliding_window |result legal_ttt |baseline gzip -9 |baseline xz -6 |
        summary: score |summary: scored |summary: size |summary: steps |summary: files |next: |
        official_form: legal_ttt|final_int8_zlib_roundtrip_exact |run_finished """
    starts = [start.lstrip() for start in starts.split("|")]
    tail = demo.lines[-len(starts) :]
    assert [s for line, s in zip(tail, starts) if not line.startswith(s)] == []
    size = next(line for line in demo.lines if line.startswith("summary: size"))
    assert f" {(demo.dir / 'final_model.int6.ptz').stat().st_size:,} + " in size
    # With data of one's own it builds none.
    assert "demo_data:" not in demo.out
    assert [path.name for path in demo.dir.parent.iterdir()] == ["run"]


def test_the_command_to_try_next_verifies_the_artifact(demo):
    advice = next(line for line in demo.lines if line.startswith("next: "))
    command = advice.removeprefix("next: ").partition("#")[0].split()
    assert command[-2:] == ["python", "train_gpt.py"]
    settings = dict(word.split("=", 1) for word in command[:-2])
    assert settings["EVAL_ONLY"] == str(demo.dir / "final_model.int6.ptz")
    assert run_main(demo.dir.parent / "again", **settings, AUDIT="0").code == 0


# ---- with the demo's own data ----

# A model that learns fast, few steps, and windows that hardly overlap: a minute instead of four.
SHORT = dict(
    preset="demo",
    num_layers=3,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    iterations=40,
    warmdown_iters=20,
    val_loss_every=0,
    train_batch_tokens=4096,
    micro_batch_tokens=4096,
    train_seq_len=256,
    eval_seq_len=256,
    eval_stride=128,
    ttt_chunk_tokens=65536,
    ttt_epochs=1,
    device="cpu",
    dtype="float32",
)


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """(folder, output) of a short demo that builds its data."""
    folder = tmp_path_factory.mktemp("short_demo")
    finished = launch({**SHORT, "run_id": "first"}, folder, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder, finished.stdout


@pytest.mark.slow
def test_the_demo_builds_enough_text_and_scores_all_of_it(short_demo):
    folder, out = short_demo
    sizes = dict(re.findall(r"^demo_data: (train|val) (\d+) bytes", out, re.M))
    train, val = int(sizes["train"]), int(sizes["val"])
    assert train >= 6_000_000 and val >= 250_000
    assert read_json(folder / "runs/first/scores.json")["finished"]
    # Normalisation makes one space of indentation and line ends; trimming takes less than a window.
    data = read_json(folder / "runs/first/manifest.json")["data"]
    assert 0.9 * val <= data["val_bytes"] <= val
    text = scored_text(folder / DEMO.data_path, folder / DEMO.tokenizer_path, 256)
    assert [line for line in out.splitlines() if line.startswith("baseline ")] == baselines(text)


@pytest.mark.slow
def test_hardly_any_passage_of_the_demos_text_is_in_both_parts(short_demo):
    """No paragraph is; some differ by a word only. Tokens keep no paragraphs to compare."""
    folder, _ = short_demo
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / DEMO.tokenizer_path))
    documents = {}
    for split in ("train", "val"):
        tokens = train_gpt.read_shard(folder / DEMO.data_path / f"fineweb_{split}_000000.bin")
        parts = np.split(tokens, np.flatnonzero(tokens == train_gpt.BOS))[1:]
        documents[split] = [model.decode(ids.tolist()) for ids in parts]
    seen, width = "\n".join(documents["train"]), 200
    passages = [
        text[i : i + width] for text in documents["val"] for i in range(0, len(text) - width, width)
    ]
    assert len(passages) > 1000
    assert sum(passage in seen for passage in passages) < 0.02 * len(passages)


@pytest.fixture(scope="module")
def whole_demo(short_demo):
    """(run directory, output) of the demo as it is."""
    folder, _ = short_demo
    settings = dict(preset="demo", max_wallclock_seconds=0, audit=False, device="cpu", run_id="2")
    finished = launch(settings, folder, timeout=1800)
    assert finished.returncode == 0, finished.stderr
    return folder / "runs/2", finished.stdout


@pytest.mark.slow
def test_the_whole_demo_beats_gzip_and_gains_visibly_by_test_time_training(whole_demo):
    run_dir, out = whole_demo
    gzip_bpb = float(re.search(r"^baseline gzip -9 bpb:([\d.]+)", out, re.M)[1])
    scores = read_json(run_dir / "scores.json")["scores"]
    sliding = scores["final_int6_sliding_window"]["val_bpb"]
    assert sliding < gzip_bpb
    assert scores["legal_ttt"]["val_bpb"] < sliding - 0.005


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nfm_7k", "base_7k", "base_20k", "flow_20k"])
def test_lite_fits_at_full_shape_with_values_drawn_from_trained_weights(whole_demo, preset):
    run_dir, _ = whole_demo
    trained = train_gpt.load_weights(run_dir / train_gpt.FLOAT_NAME).state_dict
    pools = {}  # values by a tensor's name without its layer
    for name, tensor in trained.items():
        pools.setdefault(re.sub(r"blocks\.\d+", "blocks", name), []).append(tensor.flatten())
    pools = {name: torch.cat(parts) for name, parts in pools.items()}
    config = Config.from_env({"PRESET": preset})
    with torch.device("meta"):
        shapes = train_gpt.GPT(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in shapes.items():
        # The demo has no FlowRefiner: its matrices get the values of another refiner.
        stand_in = "nfm.inp.weight" if tensor.dim() > 1 else "nfm.inp.bias"
        pool = pools.get(re.sub(r"blocks\.\d+", "blocks", name), pools[stand_in])
        state[name] = pool[torch.randint(len(pool), tensor.shape, generator=generator)]
    blob, layers = train_gpt.fit_lite(config, state, code_bytes=72_000)
    assert len(blob) + 72_000 <= 16_000_000 and len(layers) < config.num_layers
