"""Tests that need a GPU, to be run first where one is: python -m pytest tests/gpu -n 0 -s

Skipped without CUDA; `-s` shows the figures for docs/gpu.md.
"""

import dataclasses
import pydoc_data.topics
import re
import shutil
import time

import numpy as np
import pytest
import torch
from helpers import exact_scores, launch, read_json, train_tokenizer

import train_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Settings of a sp1024 tokenizer and shards of English, long enough for 50 steps of nfm_7k."""
    folder = tmp_path_factory.mktemp("gpu_data")
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    processor = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=1024)
    tokens = np.concatenate([[train_gpt.BOS, *processor.encode(text)] for text in texts])
    train_gpt.write_shard(folder / "fineweb_val_000000.bin", tokens[:140_000])
    # The stream is a ring: 50 steps of 786,432 tokens go over this text many times.
    train_gpt.write_shard(folder / "fineweb_train_000000.bin", tokens[100_000:])
    return dict(data_path=folder, tokenizer_path=folder / "tokenizer.model")


# Small enough to train and score in seconds, compiled, with every part of the default model.
SMALL = dict(
    num_layers=4,
    model_dim=256,
    num_heads=4,
    num_kv_heads=2,
    iterations=12,
    warmdown_iters=4,
    train_batch_tokens=32768,
    train_seq_len=512,
    micro_batch_tokens=16384,
    warmup_steps=2,
    eval_seq_len=512,
    eval_batch_seqs=16,
    ttt_chunk_tokens=16384,
    ttt_epochs=2,
    ttt_batch_seqs=16,
    val_loss_every=6,
    train_log_every=1,
    device="cuda",
)


def finished(settings, cwd, code=0, **options):
    done = launch(settings, cwd, timeout=1500, **options)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """(folder, settings, output) of a small finished run, audited."""
    folder = tmp_path_factory.mktemp("gpu_run")
    settings = dict(SMALL, **shards, run_dir="run", audit=1)
    return folder, settings, finished(settings, folder)


@pytest.mark.parametrize("length", [64, 1024])
def test_the_chosen_attention_gives_the_values_and_gradients_of_float64(length):
    choice = train_gpt.pick_attention(torch.device("cuda"), torch.bfloat16)
    print(f"\nattention: {choice.reason}")
    results = []
    for attend, dtype in (
        (choice.function, torch.bfloat16),
        (train_gpt.sdpa_attention, torch.float64),
    ):
        torch.manual_seed(0)
        q = torch.randn(2, length, 8, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randn(2, length, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*(x.to(dtype) for x in leaves))
        grads = torch.autograd.grad((out.float() * out.float().detach().cos()).sum(), leaves)
        results.append([out, *grads])
    for found, expected in zip(*results):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03)


def test_the_losses_of_the_gpu_are_those_of_the_cpu(shards, tmp_path):
    losses = {}
    for device in ("cpu", "cuda"):
        settings = dict(SMALL, **shards, iterations=3, dtype="float32", val_loss_every=0)
        settings.update(
            device=device, run_dir=device, ttt_enabled=0, eval_stride=512, warmup_steps=0
        )
        output = finished(settings, tmp_path)
        losses[device] = [float(x) for x in re.findall(r"train_loss:(\S+)", output)]
    assert len(losses["cpu"]) >= 3
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=2e-3)


def test_the_audit_passes_and_the_manifest_names_the_device(trained):
    folder, _, output = trained
    assert re.search(r"^audit pass", output, re.M)
    manifest = read_json(folder / "run" / "manifest.json")
    assert manifest["device"].startswith("cuda") and manifest["device_name"]


def test_a_file_scored_twice_gives_the_same_digits(trained, shards, tmp_path):
    folder, _, output = trained
    shutil.copy(folder / "run" / train_gpt.ARTIFACT_NAME, tmp_path / "model.ptz")
    settings = dict(shards, eval_only="model.ptz", device="cuda", audit=0)
    first = exact_scores(finished(dict(settings, run_dir="a"), tmp_path))
    second = exact_scores(finished(dict(settings, run_dir="b"), tmp_path))
    assert first and first == second
    assert first.items() <= exact_scores(output).items()


def test_a_stopped_run_resumes_with_close_losses(trained, shards, tmp_path):
    """Training is not deterministic on a GPU; a resume must still be the same run to rounding."""
    settings = dict(SMALL, **shards, run_dir="stopped", checkpoint_every=6)
    whole = trained[2]
    finished(dict(settings, time_limit_seconds=0.001), tmp_path, code=75)
    output = finished(settings, tmp_path)
    assert "resumed_from:" in output
    wanted = dict(re.findall(r"step:(\d+)/12 train_loss:(\S+)", whole))
    found = dict(re.findall(r"step:(\d+)/12 train_loss:(\S+)", output))
    assert "12" in found
    assert float(found["12"]) == pytest.approx(float(wanted["12"]), rel=0.02)


def test_nothing_is_compiled_again_in_mid_run(shards, tmp_path):
    """Recurrence sets in on the way: its graph is one of those of the warm-up."""
    settings = dict(SMALL, **shards, run_dir="logged", torch_logs="recompiles")
    settings.update(num_loops=1, loop_start=1, loop_end=2, loop_at=0.5, skip_gates=1)
    done = launch(settings, tmp_path, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    # A recompilation names the guard that failed.
    assert "Recompiling function" not in done.stderr, done.stderr[-3000:]


def test_a_cuda_graph_of_the_ttt_step_gives_the_digits_of_the_step_itself(
    trained, shards, runtime, monkeypatch
):
    """One process captures no graph by itself, so the answer to "is it small?" is patched."""
    loaded = train_gpt.load_weights(trained[0] / "run" / train_gpt.ARTIFACT_NAME)
    paths = {name: str(path) for name, path in shards.items()}
    config = dataclasses.replace(loaded.config, device="cuda", compile="1", **paths)
    made = runtime(config)
    val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    model = train_gpt.build_model(config, made)
    scores = []
    for graph in (False, True):
        monkeypatch.setattr(made, "cuda_graphs", lambda *_, graph=graph: graph)
        model.load_state_dict(loaded.state_dict)
        begin = time.monotonic()
        scores.append(train_gpt.evaluate(model, val, config, made, ttt=True).val_loss)
        print(f"\nCUDA graph {graph}: test-time training in {time.monotonic() - begin:.0f} s")
    assert scores[0] == scores[1]


def test_the_score_of_two_stops_is_that_of_none(trained, shards, tmp_path):
    folder, _, output = trained
    shutil.copy(folder / "run" / train_gpt.ARTIFACT_NAME, tmp_path / "model.ptz")
    settings = dict(shards, eval_only="model.ptz", device="cuda", audit=0, run_dir="cut")
    for _ in range(2):
        done = launch(dict(settings, time_limit_seconds=25), tmp_path, timeout=600)
        assert done.returncode in (0, 75), done.stderr
    found = exact_scores(finished(settings, tmp_path))
    assert found and found.items() <= exact_scores(output).items()


@pytest.mark.parametrize("preset", ["nfm_7k"])
def test_fifty_steps_at_full_size(preset, shards, tmp_path):
    """Prints milliseconds per step, peak memory and the throughput summary."""
    settings = dict(shards, preset=preset, iterations=50, run_dir="full", val_loss_every=0)
    settings.update(ttt_enabled=0, eval_stride=1024, train_log_every=10, device="cuda")
    begin = time.monotonic()
    output = finished(settings, tmp_path)
    print(f"\n{torch.cuda.get_device_name()}: {time.monotonic() - begin:.0f} s in all")
    for line in output.splitlines():
        if line.startswith(("step:50/", "peak memory", "throughput", "attention:", "Total ")):
            print(line)
    losses = [float(x) for x in re.findall(r"train_loss:(\S+)", output)]
    assert losses[-1] < losses[0] - 1
    assert read_json(tmp_path / "full" / "scores.json")["total_bytes"] <= 16_000_000
