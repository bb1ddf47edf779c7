"""Section main: one identity of a run, scores belong to files, and what a person reads."""

import dataclasses
import re
import shutil
import signal

import pytest
import torch
from helpers import (
    AT_WRITE,
    ROOT,
    events,
    exact_scores,
    log_of,
    outcome,
    read_json,
    run_main,
)

import train_gpt

SCORES = ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]
FLOAT, ARTIFACT = train_gpt.FLOAT_NAME, train_gpt.ARTIFACT_NAME
CODE_BYTES = (ROOT / "train_gpt.py").stat().st_size


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A finished run: (folder, settings)."""
    folder = tmp_path_factory.mktemp("trained")
    settings = dict(tiny_data.settings, run_dir="run")
    done = run_main(cwd=folder, **settings)
    assert done.code == 0, done.err
    return folder, settings


@pytest.fixture
def again(trained, tmp_path):
    """again(**changes): the finished run's command once more, in a copy of its folder."""
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    return lambda **changes: run_main(cwd=tmp_path, **{**settings, **changes})


@pytest.fixture
def evaluate(trained, tmp_path):
    """evaluate(**changes): EVAL_ONLY of a copy of the artifact in a folder of its own."""
    folder, settings = trained
    shutil.copy(folder / "run" / ARTIFACT, tmp_path / "model.ptz")
    names = ("data_path", "tokenizer_path", "device", "dtype")
    given = dict({name: settings[name] for name in names}, eval_only="model.ptz")
    return lambda **changes: run_main(cwd=tmp_path, **{**given, **changes})


# ---- the evaluation of a given file ----


def test_a_given_file_is_audited_and_every_score_is_computed_anew(evaluate, tmp_path):
    first = evaluate()
    assert first.code == 0, first.err
    assert list(exact_scores(first.out)) == SCORES and "audit pass" in first.out
    scores = next(tmp_path.glob("runs/eval_*/scores.json"))
    forged = re.sub(r'"val_bpb": [0-9.]+', '"val_bpb": 1.0', scores.read_text())
    scores.write_text(forged)
    again = evaluate()
    assert exact_scores(again.out) == exact_scores(first.out)
    assert "audit pass" in again.out and "phase_done" not in again.out
    assert "1.0000" not in re.findall(r"^result .*", again.out, re.M)[-1]


def test_another_artifact_under_the_same_name_gets_its_own_scores(evaluate, tiny_data, tmp_path):
    before = evaluate(run_dir="out")
    settings = dict(tiny_data.settings, run_dir="other", seed=7, iterations=1)
    truth = exact_scores(run_main(cwd=tmp_path, **settings).out)
    shutil.copy(tmp_path / "other" / ARTIFACT, tmp_path / "model.ptz")
    after = exact_scores(evaluate(run_dir="out").out)
    assert after == {label: truth[label] for label in SCORES} != exact_scores(before.out)


def test_an_evaluation_never_overwrites_a_training_run(again, evaluate, tmp_path):
    refused = evaluate(run_dir="run")
    assert refused.code == 2 and 'file that is scored: "the run\'s own" -> ' in refused.err
    assert read_json(tmp_path / "run" / "scores.json")["finished"]


@pytest.mark.parametrize("change", [{}, dict(ttt_lr=0.003)])
def test_a_cut_off_evaluation_of_the_same_file_and_settings_goes_on(children, whole, change):
    run_dir, given = children.new("cut_off"), dict(eval_only=whole / ARTIFACT, audit=0)
    at = "eval_legal_ttt 3 named"
    assert children.start(run_dir, patch=AT_WRITE, at=at, **given).wait() == [-9]
    output = children.finish(run_dir, **given, **change).stdout()
    assert ("resumed_evaluation legal_ttt item:3/" in output) is (not change)
    assert ("belongs to another evaluation" in output) is bool(change)
    fresh = children.finish(children.new("fresh"), **given, **change).stdout()
    assert exact_scores(output) == exact_scores(fresh)
    assert change or exact_scores(output).items() <= exact_scores(log_of(whole)).items()


def test_a_file_over_the_budget_is_not_scored(evaluate, trained, tmp_path):
    """CODE_BYTES leaves room when packing, and is not believed when scoring."""
    weights = train_gpt.load_weights(trained[0] / "run" / FLOAT)
    config = dataclasses.replace(weights.config, compressor="lzma")  # the file's own, to be named
    blob = train_gpt.pack_artifact(config, weights.state_dict)
    (tmp_path / "model.ptz").write_bytes(blob)
    over = evaluate(budget_bytes=len(blob) + 5000, code_bytes=5000)
    assert over.code == 4 and not exact_scores(over.out)
    assert f"Total submission size int6+lzma: {len(blob) + CODE_BYTES} bytes" in over.out
    assert f"more than BUDGET_BYTES={len(blob) + 5000}" in over.err


def test_float_weights_can_be_scored_but_have_no_headline(evaluate, trained):
    run_dir = trained[0] / "run"
    done = evaluate(eval_only=run_dir / FLOAT, run_dir="out")
    assert done.code == 0, done.err
    scores = exact_scores(done.out)
    assert list(scores) == ["float_roundtrip", "float_sliding_window", "float_legal_ttt"]
    assert scores["float_roundtrip"] == exact_scores(log_of(run_dir))["pre_quant"]
    assert "summary: score" not in done.out


# ---- one identity of a run ----


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(matrix_lr=0.031, seed=7), ["MATRIX_LR: 0.025 -> 0.031", "SEED: 42 -> 7"]),
        (dict(eval_stride=32), ["EVAL_STRIDE: 16 -> 32"]),
        (dict(seed=7, block_bits=8), ["SEED: 42 -> 7", "BLOCK_BITS: 6 -> 8"]),
        (dict(block_bits=8, mode="audit"), ["BLOCK_BITS: 6 -> 8"]),
        (dict(dtype="bfloat16", block_bits=8), ["'float32' -> 'bfloat16'", "BITS: 6 -> 8"]),
    ],
)
def test_a_run_of_another_identity_is_refused_with_each_difference(again, tmp_path, change, named):
    """Packing alone may differ, where this command packs; settings of pace are not compared."""
    before = outcome(tmp_path / "run")
    refused = again(checkpoint_seconds=5, **change)
    assert refused.code == 2 and "set another RUN_ID" in refused.err
    assert all(text in refused.err for text in named), refused.err
    assert refused.err.count(" -> ") == len(named)
    assert ("set DTYPE=float32 to resume it" in refused.err) is ("dtype" in change)
    assert outcome(tmp_path / "run") == before


def test_an_edited_script_does_not_go_on_with_a_run(children, whole, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text((ROOT / "train_gpt.py").read_text() + "# edited\n")
    group = children.start(children.copy(whole), script=script)
    assert group.wait() == [2]
    assert "holds a run of other settings, data or code: train_gpt.py:" in group.stderr()


@pytest.mark.parametrize("name", ["config.json", "scores.json"])
def test_a_damaged_record_is_named_with_the_way_out(again, tmp_path, name):
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused = again()
    assert refused.code == 2 and f"{name} is damaged" in refused.err
    assert "set another RUN_ID" in refused.err


# ---- packing again ----


def test_a_second_size_is_packed_from_the_same_float_weights(again, tmp_path):
    """Under a new artifact, with its own scores and an audit of the new file."""
    folder, before = tmp_path / "run", outcome(tmp_path / "run")
    smaller = CODE_BYTES + len(before["artifact"]) - 500
    done = again(budget_bytes=smaller, audit=1)
    assert done.code == 0, done.err
    assert "phase_done:train " in done.out and "phase_done:pack " not in done.out
    changes = f"BUDGET_BYTES: 16000000 -> {smaller}"
    assert re.search(rf"^packing_changed .*{changes}.*made anew", done.out, re.M)
    after = outcome(folder)
    assert after["weights"] == before["weights"]
    assert len(after["artifact"]) <= smaller - CODE_BYTES
    assert "audit pass" in done.out and read_json(folder / "audit.json")["passed"]
    assert exact_scores(done.out).keys() == {"pre_quant", *SCORES}
    assert not list((folder / "checkpoint").glob("eval_*"))
    settings = read_json(folder / "config.json")["config"]
    places = {name: settings[name] for name in ("data_path", "tokenizer_path", "device", "dtype")}
    fresh = run_main(tmp_path / "fresh", **places, eval_only=folder / ARTIFACT, audit=0)
    found = exact_scores(done.out)
    assert exact_scores(fresh.out) == {label: found[label] for label in SCORES}
    assert "phase_done:pack " in again(budget_bytes=smaller, audit=1).out


def test_a_run_over_its_budget_can_be_packed_by_gptq(trained, tiny_data, tmp_path):
    """After exit 4 the same RUN_DIR keeps its training."""
    settings = dict(tiny_data.settings, budget_bytes=11_500, code_bytes=1000, run_dir="run")
    over = run_main(cwd=tmp_path, **settings)
    assert over.code == 4 and "BUDGET_BYTES=11500" in over.err
    weights = (tmp_path / "run" / FLOAT).read_bytes()
    settings.update(quantizer="gptq", calibration_tokens=2048)
    done = run_main(cwd=tmp_path, **settings)
    assert done.code == 0, done.err
    assert "packing_changed QUANTIZER: 'lite' -> 'gptq'" in done.out
    assert (tmp_path / "run" / FLOAT).read_bytes() == weights
    assert (tmp_path / "run" / ARTIFACT).stat().st_size <= 10_500


@pytest.mark.parametrize(
    "at", ["config.json 1 half", "config.json 1 named", "final_model.int6 1 half"]
)
def test_a_killed_repacking_leaves_no_score_of_the_old_artifact(children, whole, at):
    run_dir = children.copy(whole)
    change = dict(block_bits=8)
    assert children.start(run_dir, patch=AT_WRITE, at=at, **change).wait() == [-9]
    assert not (run_dir / "scores.json").exists() and not (run_dir / ARTIFACT).exists()
    assert (run_dir / FLOAT).exists()
    # Either command finishes what belongs to it.
    other = children.copy(run_dir)
    children.finish(run_dir, **change)
    assert outcome(run_dir)["artifact"] != outcome(whole)["artifact"]
    children.finish(other)
    assert outcome(other) == outcome(whole)


def test_with_late_qat_the_bits_belong_to_training(tiny_data, tmp_path):
    settings = dict(tiny_data.settings, run_dir="run", late_qat_threshold=0.5, iterations=1)
    assert run_main(cwd=tmp_path, **settings).code == 0
    refused = run_main(cwd=tmp_path, **settings, embed_bits=6)
    assert refused.code == 2 and "EMBED_BITS: 8 -> 6" in refused.err


def test_under_a_cap_the_quantizer_is_fixed_until_the_weights_are_there(children, stopped):
    """gptq takes its reserve from the cap; without a cap the choice may wait."""
    run_dir = children.copy(stopped[0])
    gptq = dict(quantizer="gptq", calibration_tokens=2048, budget_bytes=60_000, code_bytes=1000)
    output = children.finish(run_dir, **gptq).stdout()
    assert "packing_changed" in output and "resumed_from:" in output
    capped, cap = children.new("capped"), dict(max_wallclock_seconds=1000)
    at = f"step_ 2 {int(signal.SIGTERM)}"
    children.finish(capped, code=75, patch=AT_WRITE, at=at, **cap)
    refused = children.finish(capped, code=2, **cap, **gptq)
    assert "QUANTIZER: 'lite' -> 'gptq'" in refused.stderr()
    children.finish(capped, **cap)
    assert "packing_changed" in children.finish(capped, **cap, **gptq).stdout()


# ---- packing ----

# The signal comes while the first trial is compressed.
SIGNAL_IN_A_TRIAL = """
compressor = train_gpt.zstandard.ZstdCompressor
def signalled(*arguments, **options):
    train_gpt.zstandard.ZstdCompressor = compressor
    os.kill(os.getpid(), 15)
    return compressor(*arguments, **options)
train_gpt.zstandard.ZstdCompressor = signalled
"""


@pytest.mark.parametrize("ranks, quantizer", [(1, "lite"), (2, "gptq")])
def test_packing_stops_between_its_trials(children, whole, whole_two, quantizer, ranks):
    """All ranks end with 75 and no artifact, although only rank 0 packs."""
    run_dir = children.copy(whole if ranks == 1 else whole_two)
    change = dict(quantizer=quantizer, budget_bytes=9_000, code_bytes=1000, calibration_tokens=2048)
    group = children.start(run_dir, ranks, patch=SIGNAL_IN_A_TRIAL, **change)
    assert group.wait() == [75] * ranks, group.stderr()
    assert "stopped signal:SIGTERM phase:in packing" in group.stdout()
    assert not (run_dir / ARTIFACT).exists() and (run_dir / "STOPPED").exists()


def test_packing_is_not_begun_after_the_time_limit(children, whole):
    run_dir = children.copy(whole)
    (run_dir / ARTIFACT).unlink()
    group = children.finish(run_dir, code=75, time_limit_seconds=0.01)
    assert "stopped signal:TIME_LIMIT phase:before packing" in group.stdout()


def test_a_cap_that_packing_passes_is_warned_about(tiny_data, tmp_path):
    gptq = dict(quantizer="gptq", calibration_tokens=2048, budget_bytes=60_000, code_bytes=1000)
    settings = {**tiny_data.settings, **gptq, "iterations": 2, "run_dir": "run"}
    cap = dict(max_wallclock_seconds=0.02, gptq_reserve_seconds=0.01)
    done = run_main(cwd=tmp_path, **settings, **cap)
    assert done.code == 0, done.err
    assert re.search(
        r"^gptq_reserve: 0.01s .*12 s is the published value on 8xH100$", done.out, re.M
    )
    (packed,) = events(tmp_path / "run", "packed")
    took = f"{packed['with_training_seconds']:.1f} s, more than MAX_WALLCLOCK_SECONDS=0.02"
    assert f"warning: training and packing took {took}" in done.out


# ---- what a person reads ----


def test_the_headline_is_a_fixed_order_and_not_the_minimum(runtime):
    config = train_gpt.Config(device="cpu")
    run = train_gpt.Run(config, runtime(config))
    for label, bpb in [("pre_quant", 1.0), ("final_int6_sliding_window", 1.1), ("legal_ttt", 1.2)]:
        run.results["scores"][label] = dict(val_bpb=bpb, legal=True, audited=False)
    assert run.headline() == "legal_ttt"
    run.results["scores"]["legal_ttt"]["legal"] = False
    assert run.headline() == "final_int6_sliding_window"


# ---- MODE=sample ----


@pytest.fixture
def sampled(trained):
    """text(**changes): what is written without data; no score is touched."""
    folder, settings = trained
    scores = (folder / "run" / "scores.json").read_bytes()

    def text(**changes):
        fixed = dict(sample_tokens=12, mode="sample", data_path="nowhere")
        done = run_main(cwd=folder, **{**settings, **fixed, **changes})
        assert done.code == 0, done.err
        assert (folder / "run" / "scores.json").read_bytes() == scores
        return done.out

    return text


def test_sample_continues_the_prompt_the_same_way_for_the_same_seed(sampled):
    text = sampled(prompt="The value", seed=1)
    assert text.startswith("The value") and len(text.strip()) > len("The value")
    assert sampled(prompt="The value", seed=1) == text != sampled(prompt="The value", seed=2)


def test_sample_at_temperature_zero_takes_the_likeliest_token(sampled):
    greedy = sampled(prompt="The", temperature=0, seed=1)
    assert sampled(prompt="The", temperature=0, seed=2) == greedy
    assert sampled(prompt="The", temperature=1, top_k=1, seed=3) == greedy
    assert sampled(prompt="The", temperature=1e-4, seed=4) == greedy != sampled(seed=4)


def test_sample_ends_with_the_document(sampled, monkeypatch):
    ends = iter([5, 6, train_gpt.EOS, 7])
    monkeypatch.setattr(train_gpt.torch, "multinomial", lambda *_, **__: torch.tensor([next(ends)]))
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: (x, torch.arange(len(x))))
    sampled(prompt="The", sample_tokens=4)
    assert next(ends) == 7
