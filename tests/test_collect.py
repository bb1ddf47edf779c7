"""slurm/collect.py: fake run directories and logs in, tables, tests and submission.json out."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="pip install -r slurm/requirements.txt")
pytest.importorskip("matplotlib", reason="pip install -r slurm/requirements.txt")

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("collect", ROOT / "slurm" / "collect.py")
collect = importlib.util.module_from_spec(spec)
importlib.sys.modules["collect"] = collect
spec.loader.exec_module(collect)

TOKENS, BYTES = 100_000, 243_590  # 2.4359 bytes per token, as the canonical split
ROUNDTRIP, SLIDING = "final_int6_roundtrip", "final_int6_sliding_window"
DATA = {"val_tokens": TOKENS + 1, "val_targets": TOKENS, "val_bytes": BYTES, "val_documents": 9,
        "bytes_per_token": BYTES / TOKENS, "val_sha256": "d" * 64, "scope": "proxy"}
CONFIG = {"preset": "demo", "num_layers": 6, "nfm_enabled": True, "nfm_loss_weight": 0.1,
          "nfm_hidden_dim": 128, "ttt_enabled": True, "warmdown_iters": 40, "iterations": 100,
          "max_wallclock_seconds": 0.0, "train_log_every": 20, "run_id": "", "data_path": "./data"}


def loss_of(bpb):
    """The loss (nats per token) behind a bpb on the test's validation data."""
    return bpb * math.log(2) * BYTES / TOKENS


def bpbs_around(bpb):
    """Scores of one run by label, `bpb` being that of test-time training."""
    return {"pre_quant": bpb + 0.002, ROUNDTRIP: bpb + 0.03, SLIDING: bpb + 0.01, "legal_ttt": bpb}


def score_entry(label, bpb):
    return {"val_loss": loss_of(bpb), "val_bpb": bpb, "tokens": TOKENS, "bytes": BYTES, "eval_time_s": 30.25,
            "legal": not label.startswith("illegal")}


def events_of(bpb, last=100, total=100):
    """Events of a run up to step `last`, whose rate starts to fall after step 60."""
    yield {"event": "start", "resumed_step": 0}
    for step in range(20, last + 1, 20):
        scale = 1.0 if step <= 60 else (total - step) / 40
        yield {"event": "step", "step": step, "train_loss": 4 - step / 100, "train_time_ms": step * 10.0,
               "lr_scale": scale}
    if last == total:
        yield {"event": "val", "step": last, "val_loss": loss_of(bpb), "val_bpb": bpb}


def write_json(path, data):
    path.write_text(json.dumps(data))


def write_events(path, events):
    path.write_text("".join(json.dumps({**event, "time": 1.0}) + "\n" for event in events))


def make_run(parent, seed=42, bpb=1.12, name=None, config=(), bpbs=None, finished=True, scores=(),
             manifest=(), events=None, audit=None):
    """Write a run directory as train_gpt.py leaves it and return its path."""
    path = parent / (name or f"demo_seed{seed}")
    path.mkdir()
    values = {**CONFIG, "seed": seed, "run_dir": str(path), **dict(config)}
    write_json(path / "config.json", {"preset": values["preset"], "hash": f"{seed:016x}", "config": values,
                                      "differs": {}})
    write_json(path / "manifest.json", {"torch": "2.13.0", "device_name": "cpu", "world_size": 1,
                                        "code_bytes": 90_000, "code_sha256": "c" * 64, "data": DATA,
                                        **dict(manifest)})
    write_events(path / "metrics.jsonl", events_of(bpb) if events is None else events)
    if finished:
        bpbs = bpbs or bpbs_around(bpb)
        write_json(path / "scores.json", {
            "finished": True, "seed": seed, "preset": "demo", "scope": "proxy", "steps": 100,
            "iterations": 100, "step_avg_ms": 10.125, "train_time_s": 101.25, "code_bytes": 90_000,
            "artifact_bytes": 3_000_000 + seed, "total_bytes": 3_090_000 + seed, "hardware": "1x cpu",
            "pytorch_version": "2.13.0", "tokens": TOKENS, "bytes": BYTES,
            "scores": {label: score_entry(label, value) for label, value in bpbs.items()},
            **dict(scores)})
    if audit is not None:
        write_json(path / "audit.json", {"passed": audit, "checks": []})
    return path


def log_lines(seed=42, bpb=1.12, ours=False, bpbs=None):
    """The lines of a log in the field's format; `ours` adds what only train_gpt.py prints."""
    bpbs = bpbs or bpbs_around(bpb)
    lines = ["model_params:27137223", "world_size:1 grad_accum_steps:8",
             f"val_loader:shards pattern=data/fineweb_val_*.bin tokens:{TOKENS}", f"seed:{seed}"]
    if ours:
        lines += [f"config:{name}={value}" for name, value in {**CONFIG, "seed": seed}.items()]
        lines += [f"data_fingerprint tokens:{TOKENS + 1} targets:{TOKENS} bytes:{BYTES} "
                  f"bytes_per_token:2.4359 documents:9 sha256:{'d' * 64} score_scope:proxy"]
    for step in range(20, 101, 20):
        lines += [f"step:{step}/100 train_loss:{4 - step / 100:.4f} train_time:{step * 10}ms "
                  "step_avg:10.00ms"]
    lines += [f"step:100/100 val_loss:{loss_of(bpb):.4f} val_bpb:{bpb:.4f} train_time:1000ms "
              "step_avg:10.00ms",
              "Code size: 90000 bytes", "Serialized model int6+zstd: 3000042 bytes",
              "Total submission size int6+zstd: 3090042 bytes"]
    for label, value in bpbs.items():
        if label == "pre_quant" and not ours:
            continue
        stride = " stride:64" if label == SLIDING else ""
        lines += [f"{label} val_loss:{loss_of(value):.4f} val_bpb:{value:.4f}{stride} eval_time:30250ms"]
        lines += [f"{label}_exact val_loss:{loss_of(value):.8f} val_bpb:{value:.8f}"]
    return lines + (["run_finished steps:100"] if ours else [])


def make_log(parent, seed=42, bpb=1.12, before="", **options):
    path = parent / f"train_seed{seed}.log"
    path.write_text(before + "\n".join(log_lines(seed, bpb, **options)) + "\n")
    return path


def run_collect(capsys, *arguments):
    """Call main; returns (exit code, stdout, stderr)."""
    try:
        code = collect.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def three_runs(tmp_path, **options):
    """Runs of the scores 1.10, 1.11, 1.15: mean 1.12, sd sqrt((0.02² + 0.01² + 0.03²) / 2) = sqrt(0.0007)."""
    seeds = ((42, 1.10), (1337, 1.11), (2025, 1.15))
    return [make_run(tmp_path, seed, bpb, **options) for seed, bpb in seeds]


def submission_of(tmp_path, capsys, runs, *arguments):
    code, _, err = run_collect(capsys, *runs, "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    return json.loads((tmp_path / "out" / "submission.json").read_text())


def assert_refused(result, code, *words):
    """One message on stderr that names every word, the exit code, and no traceback."""
    found, out, err = result
    assert found == code, (out, err)
    assert out == "" and err.count("collect.py: error: ") == 1
    for word in words:
        assert str(word) in err, err


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes most of the time of a call, and only the tests of the picture need it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(collect, "draw_curves", lambda runs, title, ablation: b"picture")


# --- tables and files ---------------------------------------------------------------------------------------


def test_mean_and_standard_deviation_are_those_computed_by_hand(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, three_runs(tmp_path))
    assert submission["val_bpb"] == pytest.approx(1.12, abs=1e-8)
    assert submission["val_bpb_std"] == pytest.approx(math.sqrt(0.0007), abs=1e-8)
    assert submission["val_loss"] == pytest.approx(loss_of(1.12), abs=1e-8)
    assert submission["seeds"] == [42, 1337, 2025]


def test_submission_has_the_fields_of_the_field_and_one_result_per_seed(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, three_runs(tmp_path), "--author", "Ann",
                               "--date", "2026-01-02")
    for name in ("author github_id name blurb date track val_loss val_bpb val_bpb_std bytes_total bytes_code "
                 "seeds seed_results hardware pytorch_version compliance").split():
        assert submission[name] is not None, name
    assert submission["seed_results"]["1337"] == {
        "val_bpb": 1.11, "val_loss": round(loss_of(1.11), 8), "artifact_bytes": 3_001_337, "steps": 100,
        "step_avg_ms": 10.12, "train_time_s": 101.2, "eval_time_s": 30.2}
    assert submission["bytes_total"] == 3_092_025, "the largest seed has to fit, not the smallest"
    assert (submission["author"], submission["github_id"], submission["date"]) == ("Ann", "Ann", "2026-01-02")
    assert submission["score_scope"] == "proxy"


def test_table_of_seeds_shows_every_evaluation_and_the_means(tmp_path, capsys):
    code, out, _ = run_collect(capsys, *three_runs(tmp_path), "--out", tmp_path)
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("| seed"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "seed", "steps", "ms/step", "pre-quant", "roundtrip", "sliding", "legal TTT", "artifact bytes",
        "total bytes", "train s", "eval s"]
    row = next(line for line in out.splitlines() if line.startswith("| 1337"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "1337", "100", "10.12", "1.11200", "1.14000", "1.12000", "1.11000", "3,001,337", "3,091,337", "101.2",
        "30.2"]
    assert "1.12000 ± 0.02646" in out and "1.13000 ± 0.02646" in out
    assert (tmp_path / "results.md").read_text() == out


def test_curves_are_a_picture_with_both_panels_and_the_warmdown(tmp_path, capsys, monkeypatch):
    figures = []
    close = collect.plt.close
    monkeypatch.setattr(collect.plt, "close", lambda figure: (figures.append(figure), close(figure)))
    submission_of(tmp_path, capsys, three_runs(tmp_path))
    assert (tmp_path / "out" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = figures
    loss, bpb = figure.axes
    assert "nats per token" in loss.get_ylabel() and "bits per byte" in bpb.get_ylabel()
    assert [len(axis.get_lines()) for axis in (loss, bpb)] == [3, 3]
    assert list(loss.get_lines()[0].get_xdata()) == [20, 40, 60, 80, 100]
    shaded = loss.patches[0].get_bbox()
    assert (shaded.x0, shaded.x1) == (80, 100), "the first logged step at a lowered rate is 80"


def test_picture_of_an_ablation_has_one_legend_entry_per_configuration(tmp_path, capsys, monkeypatch):
    figures = []
    monkeypatch.setattr(collect.plt, "close", figures.append)
    runs = [make_run(tmp_path, seed, name=f"{weight}_{seed}", config={"nfm_loss_weight": weight})
            for weight in (0.05, 0.1) for seed in (1, 2)]
    assert run_collect(capsys, *runs, "--ablation", "--out", tmp_path / "out")[0] == 0
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["nfm_loss_weight=0.05", "nfm_loss_weight=0.1", "warmdown"]
    colours = [line.get_color() for line in figures[0].axes[0].get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_one_run_has_no_standard_deviation_and_says_so(tmp_path, capsys):
    code, out, err = run_collect(capsys, make_run(tmp_path), "--out", tmp_path / "out")
    assert code == 0 and "one finished run" in err and "no sd" in out
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["val_bpb_std"] is None


def test_nothing_is_written_or_replaced_when_the_runs_are_bad(tmp_path, capsys):
    good, bad = make_run(tmp_path, 1), make_run(tmp_path, 2, config={"num_layers": 7})
    out = tmp_path / "out"
    out.mkdir()
    (out / "submission.json").write_text("old")
    assert_refused(run_collect(capsys, good, bad, "--out", out), 2, "num_layers")
    assert [path.name for path in out.iterdir()] == ["submission.json"]
    assert (out / "submission.json").read_text() == "old"


def test_an_output_directory_that_cannot_be_made_is_one_message(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_refused(run_collect(capsys, make_run(tmp_path), "--out", blocked), 2, "--out", blocked)


# --- plain logs ---------------------------------------------------------------------------------------------


def test_a_log_and_its_run_directory_give_the_same_scores(tmp_path):
    from_log = collect.load_run(make_log(tmp_path, ours=True))
    from_directory = collect.load_run(make_run(tmp_path))
    assert from_log.status == from_directory.status == "finished"
    assert set(from_log.scores) == set(from_directory.scores)
    for label, score in from_log.scores.items():
        assert score.val_bpb == pytest.approx(from_directory.scores[label].val_bpb, abs=5.1e-9)
        assert score.eval_time_s == 30.25
    assert from_log.settings == from_directory.settings
    assert (from_log.seed, from_log.steps, from_log.total_bytes) == (42, 100, 3_090_042)
    assert (from_log.tokens, from_log.bytes, from_log.scope) == (TOKENS, BYTES, "proxy")
    assert from_log.train_curve == from_directory.train_curve


def test_a_run_directory_and_a_log_of_another_seed_can_be_averaged(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, [make_run(tmp_path, 1, 1.10),
                                                  make_log(tmp_path, 2, 1.12, ours=True)])
    assert submission["val_bpb"] == pytest.approx(1.11)


SOURCE = '''"""A script.

step:7/9 train_loss:9.9999 train_time:9ms step_avg:9.99ms
seed:99
final_int6_sliding_window_exact val_loss:9.99999999 val_bpb:9.99999999
"""
import sys


def main(step, log):
    log(f"step:{step}/{N} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}")
    log("seed:98")


if __name__ == "__main__":
    main(1, print)
'''


@pytest.mark.parametrize("between", ["", "=" * 100 + "\n", "Running Python 3.12.1\n", "\n\nseed:42\n"])
def test_source_embedded_in_a_log_is_not_data(tmp_path, between):
    plain = collect.load_run(make_log(tmp_path))
    with_source = collect.load_run(make_log(tmp_path, before="logs/run.txt\n" + SOURCE + between))
    assert with_source == plain


def test_the_real_script_embedded_in_a_log_is_not_data(tmp_path):
    script = ROOT / "train_gpt.py"
    if not script.exists():
        pytest.skip("train_gpt.py is not here")
    before = script.read_text() + "=" * 100 + "\n"
    plain = collect.load_run(make_log(tmp_path))
    assert collect.load_run(make_log(tmp_path, before=before)) == plain


def test_source_of_a_newer_python_does_not_hide_what_follows_it(tmp_path):
    newer = SOURCE.replace('log("seed:98")', 'log(f"seed:{"a" "b"!r:{"nested"}}" ?)')
    plain = collect.load_run(make_log(tmp_path))
    assert collect.load_run(make_log(tmp_path, before=newer + "=" * 100 + "\n")) == plain


def test_source_repeated_by_a_resumed_run_is_cut_out_each_time(tmp_path):
    lines = log_lines()
    path = tmp_path / "train.log"
    path.write_text(SOURCE + "\n".join(lines[:6]) + "\n" + SOURCE + "\n".join(lines[6:]) + "\n")
    run = collect.load_run(path)
    assert run.status == "finished" and run.seed == 42
    assert run.scores == collect.load_run(make_log(tmp_path)).scores


@pytest.mark.parametrize("ours", [False, True])
def test_a_log_cut_anywhere_never_reports_a_number_that_was_not_printed_in_full(tmp_path, ours):
    text = "\n".join(log_lines(bpb=1.12345678, ours=ours))
    path = tmp_path / "cut.log"
    path.write_text(text)
    whole = collect.load_run(path)
    for length in [*range(0, len(text) - 200, 13), *range(len(text) - 200, len(text) - 1)]:
        path.write_text(text[:length])
        try:
            run = collect.load_run(path)
        except collect.RunDataProblem as problem:
            assert "no line of the field's log format" in str(problem) or "'seed:N'" in str(problem)
            continue
        # What a foreign log was still going to score, nobody knows: its first score may finish it.
        may_have_ended = "run_finished" in text[:length] if ours else ROUNDTRIP in run.scores
        assert run.status == "unfinished" or may_have_ended
        for label, score in run.scores.items():
            expected = whole.scores[label]
            assert round(expected.val_bpb, score.decimals) == score.val_bpb


def test_steps_gone_through_twice_count_once_in_a_log_too(tmp_path):
    lines = log_lines(ours=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("step:80/"))
    path = tmp_path / "train.log"
    again = ["resumed_from:checkpoint/step_00000030.pt step:30", lines[at].replace("3.2000", "1.5000")]
    path.write_text("\n".join([*lines[:at + 1], *again, *lines[at + 1:]]) + "\n")
    assert collect.load_run(path).train_curve == [(20, 3.8), (80, 1.5), (100, 3.0)]


def test_the_last_validation_stands_for_the_float_weights_where_a_log_has_no_other(tmp_path):
    run = collect.load_run(make_log(tmp_path, bpb=1.12))
    assert (run.scores["pre_quant"].val_bpb, run.scores["pre_quant"].decimals) == (1.12, 4)
    ours = collect.load_run(make_log(tmp_path, bpb=1.12, ours=True))
    assert (ours.scores["pre_quant"].val_bpb, ours.scores["pre_quant"].decimals) == (1.122, 8)


def test_a_log_that_ends_before_the_others_is_unfinished_and_does_not_lower_the_headline(tmp_path, capsys):
    whole = [make_log(tmp_path, seed, 1.1 + seed / 1000) for seed in (1, 2)]
    cut = make_log(tmp_path, 3)
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-2]))
    code, out, err = run_collect(capsys, *whole, cut, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"train_seed3.log .*unfinished .*no legal_ttt line", out)
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["seeds"] == [1, 2]


def test_a_log_whose_time_limit_cut_test_time_training_says_so(tmp_path):
    path = make_log(tmp_path)
    path.write_text("\n".join([*path.read_text().splitlines()[:-2], "  ttt_chunk [1271/1893] bpb=1.12",
                               "slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***"]))
    run = collect.load_run(path)
    assert run.status == "failed"
    assert "no legal_ttt line" in run.note and "TIME LIMIT" in run.note and "100/100" in run.note


def test_two_runs_in_one_log_are_refused(tmp_path, capsys):
    path = tmp_path / "both.log"
    path.write_text("\n".join(log_lines(1) + log_lines(2)))
    assert_refused(run_collect(capsys, path), 3, path, "[1, 2]", "Split the log")


@pytest.mark.parametrize("content", ["", "hello\n", "\x00\x01\xff" * 50])
def test_a_file_that_is_no_log_is_refused(tmp_path, capsys, content):
    path = tmp_path / "other.txt"
    path.write_text(content)
    assert_refused(run_collect(capsys, path), 3, path, "no line of the field's log format")


def test_a_finished_log_without_a_seed_is_refused(tmp_path, capsys):
    path = make_log(tmp_path)
    path.write_text(path.read_text().replace("seed:42\n", ""))
    assert_refused(run_collect(capsys, path), 3, "seed:N")


# --- scores that imply their bytes --------------------------------------------------------------------------


def test_a_score_line_that_implies_other_bytes_is_refused(tmp_path, capsys):
    path = make_log(tmp_path)
    path.write_text(path.read_text().replace("val_bpb:1.12000000", "val_bpb:1.11990000"))
    assert_refused(run_collect(capsys, path), 3, path, "legal_ttt", "implies 243,611.7", "243,590")


def test_scores_that_agree_with_each_other_but_not_with_the_fingerprint_are_refused(tmp_path, capsys):
    path = make_log(tmp_path, ours=True)
    path.write_text(path.read_text().replace(f"bytes:{BYTES}", f"bytes:{BYTES + 1}"))
    assert_refused(run_collect(capsys, path), 3, "the data fingerprint 243,591")


def test_rounding_of_the_printed_decimals_is_no_contradiction(tmp_path):
    for bpb in (0.91234567, 1.00000001, 1.12349999, 2.71828183):
        assert collect.load_run(make_log(tmp_path, bpb=bpb)).status == "finished"


def test_a_run_directory_whose_score_counts_other_tokens_is_refused(tmp_path, capsys):
    path = make_run(tmp_path)
    scores = json.loads((path / "scores.json").read_text())
    scores["scores"]["legal_ttt"]["tokens"] -= 1
    write_json(path / "scores.json", scores)
    assert_refused(run_collect(capsys, path), 3, path, "legal_ttt scored 99999 tokens")


def test_scores_json_and_train_log_must_report_the_same(tmp_path, capsys):
    path = make_run(tmp_path)
    (path / "train.log").write_text("\n".join(log_lines(ours=True)) + "\n")
    assert collect.load_run(path).status == "finished"
    (path / "train.log").write_text("\n".join(log_lines(ours=True, bpb=1.1200001)) + "\n")
    assert_refused(run_collect(capsys, path), 3, "train.log", "pre_quant", "1.89442656", "1.89442673")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.1])
def test_a_score_that_is_no_positive_number_is_refused(tmp_path, capsys, value):
    path = make_run(tmp_path, bpbs={**bpbs_around(1.1), SLIDING: value})
    assert_refused(run_collect(capsys, path), 3, path, SLIDING, value)


def test_a_nan_score_in_a_log_is_refused(tmp_path, capsys):
    path = make_log(tmp_path, bpbs={SLIDING: math.nan})
    assert_refused(run_collect(capsys, path), 3, path, SLIDING, "nan")


# --- which runs go together ---------------------------------------------------------------------------------


def test_two_runs_of_one_seed_are_refused(tmp_path, capsys):
    first, second = make_run(tmp_path, 42, name="a"), make_run(tmp_path, 42, name="b")
    assert_refused(run_collect(capsys, first, second), 2, "two runs of seed 42", first, second)


def test_a_failed_run_and_its_repetition_are_not_two_runs_of_one_seed(tmp_path, capsys):
    failed = make_run(tmp_path, 42, name="a", finished=False, events=[
        *events_of(1.1, last=40), {"event": "error", "code": 5, "message": "loss is nan at step 41"}])
    code, out, err = run_collect(capsys, failed, make_run(tmp_path, 42, name="b"), "--out", tmp_path)
    assert code == 0, err
    assert re.search(r"\| a .*failed .*exit code 5: loss is nan at step 41 \(last logged step 40/100", out)


def test_mixed_presets_are_refused_and_the_differing_fields_named(tmp_path, capsys):
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config={"preset": "base_7k", "nfm_enabled": False})]
    assert_refused(run_collect(capsys, *runs), 2, "preset: demo (demo_seed1), base_7k (demo_seed2)",
                   "nfm_enabled: True (demo_seed1), False (demo_seed2)", "--ablation")


def test_unfinished_runs_of_another_configuration_are_refused_too(tmp_path, capsys):
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config={"num_layers": 7}, finished=False)]
    assert_refused(run_collect(capsys, *runs), 2, "num_layers: 6 (demo_seed1), 7 (demo_seed2)")


def test_operational_settings_may_differ(tmp_path, capsys):
    elsewhere = {"data_path": "/elsewhere", "train_log_every": 5}
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config=elsewhere)]
    assert submission_of(tmp_path, capsys, runs)["seeds"] == [1, 2]


def test_operational_settings_are_those_that_train_gpt_keeps_out_of_its_hash():
    script = ROOT / "train_gpt.py"
    if not script.exists():
        pytest.skip("train_gpt.py is not here")
    fields = re.findall(r"^    (\w+): \w+ = (arch|train|eval|run)_opt\(", script.read_text(), re.M)
    assert len(fields) > 50
    assert collect.OPERATIONAL == {name for name, kind in fields if kind == "run"} | {"seed"}


def test_runs_on_different_validation_data_are_refused(tmp_path, capsys):
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, manifest={"data": {**DATA, "val_sha256": "e" * 64}})]
    assert_refused(run_collect(capsys, *runs), 2, "sha256 of the validation data", "eeee")


def test_settings_are_compared_by_value_and_not_by_spelling():
    assert collect.as_text(True) == collect.as_text("True")
    assert collect.as_text([5, 6]) == collect.as_text("(5, 6)")
    assert collect.as_text((5,)) == collect.as_text("(5,)")
    assert collect.as_text(2.0) == collect.as_text("2.0") == collect.as_text(2)
    assert collect.as_text(1e-08) == collect.as_text("1e-08") != collect.as_text(0)
    assert collect.as_text(0.1) != collect.as_text(0.15)


# --- unfinished, failed and damaged -------------------------------------------------------------------------


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, capsys):
    stopped = [*events_of(9.9, last=60), {"event": "stopped", "signal": "SIGTERM", "phase": "train"}]
    runs = [make_run(tmp_path, 1, 1.1), make_run(tmp_path, 2, 1.2),
            make_run(tmp_path, 3, finished=False, events=stopped),
            make_run(tmp_path, 4, finished=False, events=events_of(9.9, last=40))]
    code, out, err = run_collect(capsys, *runs, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"demo_seed3 .*unfinished .*SIGTERM, phase: train.*last logged step 60/100", out)
    assert re.search(r"demo_seed4 .*unfinished .*running or killed \(last logged step 40/100", out)
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["val_bpb"] == pytest.approx(1.15)


def test_scores_of_a_run_that_has_not_finished_do_not_count(tmp_path, capsys):
    partial = make_run(tmp_path, 2, 0.5, scores={"finished": False})
    submission = submission_of(tmp_path, capsys, [make_run(tmp_path, 1, 1.1), partial])
    assert submission["seeds"] == [1]


def test_a_run_that_failed_before_it_began_is_listed(tmp_path, capsys):
    path = tmp_path / "demo_seed3"
    path.mkdir()
    (path / "train.log").write_text("config:preset=demo\nconfig:seed=3\nerror: no shards\n")
    write_events(path / "metrics.jsonl", [{"event": "error", "code": 3, "message": "no shards"}])
    run = collect.load_run(path)
    assert (run.status, run.seed, run.path) == ("failed", 3, path)
    assert "exit code 3: no shards" in run.note


def test_an_audit_without_a_score_is_listed_as_such(tmp_path):
    path = make_run(tmp_path, finished=False, events=[{"event": "audit", "passed": True}], audit=True)
    assert collect.load_run(path).note == "audited (passed: True), not scored"


def test_no_finished_run_at_all_is_an_error_that_lists_them(tmp_path, capsys):
    path = make_run(tmp_path, finished=False, events=[])
    assert_refused(run_collect(capsys, path, "--out", tmp_path / "out"), 3, "none of 1 run(s)", path,
                   "before the first logged step")
    assert not (tmp_path / "out").exists()


def test_steps_gone_through_twice_count_once_the_last_time(tmp_path):
    again = [{"event": "start", "resumed_step": 20},
             {"event": "step", "step": 40, "train_loss": 1.5, "lr_scale": 1.0}]
    run = collect.load_run(make_run(tmp_path, finished=False, events=[*events_of(1.1, last=80), *again]))
    assert run.train_curve == [(20, 3.8), (40, 1.5)]


def test_a_line_torn_by_a_kill_is_forgiven_at_the_end_and_before_a_resume(tmp_path):
    path = make_run(tmp_path, finished=False, events=events_of(1.1, last=40))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert collect.load_run(path).train_curve == [(20, 3.8), (40, 3.6)]
    with open(path / "metrics.jsonl", "a") as file:
        file.write('\n{"event": "start", "resumed_step": 20}\n')
    assert collect.load_run(path).train_curve == [(20, 3.8)]


def test_a_resumed_event_glued_to_a_torn_line_is_read(tmp_path):
    path = make_run(tmp_path, finished=False, events=events_of(1.1, last=40))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "ste{"event": "start", "resumed_step": 20}\n')
    assert collect.load_run(path).train_curve == [(20, 3.8)]


def test_a_damaged_line_in_the_middle_of_the_events_is_refused(tmp_path, capsys):
    path = make_run(tmp_path)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][20:], *lines[3:]]))
    assert_refused(run_collect(capsys, path), 3, "metrics.jsonl:3", "damaged line")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "scores.json"])
def test_a_json_file_cut_in_the_middle_is_refused(tmp_path, capsys, name):
    path = make_run(tmp_path)
    (path / name).write_text((path / name).read_text()[:50])
    assert_refused(run_collect(capsys, path), 3, path / name, "not readable as JSON")


def test_a_file_that_cannot_be_read_is_one_message(tmp_path, capsys):
    path = make_run(tmp_path)
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").mkdir()
    assert_refused(run_collect(capsys, path), 3, path / "metrics.jsonl", "expected a readable file")


def test_an_empty_directory_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_refused(run_collect(capsys, tmp_path / "empty"), 3, tmp_path / "empty", "no config.json")


def test_a_directory_of_runs_is_refused_with_the_hint_what_to_pass(tmp_path, capsys):
    make_run(tmp_path)
    assert_refused(run_collect(capsys, tmp_path), 3, "holds 1", f"pass {tmp_path}/*")


def test_a_path_that_does_not_exist_is_refused(tmp_path, capsys):
    assert_refused(run_collect(capsys, tmp_path / "nothing"), 2, tmp_path / "nothing", "no such file")


# --- evaluations of an artifact -----------------------------------------------------------------------------


def make_pair(tmp_path, seed, sliding, ttt, sha=None):
    """A training run that scored by sliding window, and the EVAL_ONLY run of its artifact that adds TTT."""
    artifact = {"artifact_sha256": sha or f"{seed:064x}"}
    trained = make_run(tmp_path, seed, config={"ttt_enabled": False}, manifest=artifact,
                       bpbs={ROUNDTRIP: sliding + 0.01, SLIDING: sliding})
    evaluated = make_run(tmp_path, 42, name=f"eval_{seed}", manifest=artifact, audit=True, events=[],
                         config={"eval_only": "model.int6.ptz", "iterations": 7000, "ttt_enabled": True},
                         bpbs={ROUNDTRIP: sliding + 0.01, SLIDING: sliding, "legal_ttt": ttt})
    return [trained, evaluated]


def test_evaluations_add_their_scores_to_the_runs_that_trained_the_artifacts(tmp_path, capsys):
    runs = make_pair(tmp_path, 1, 1.20, 1.10) + make_pair(tmp_path, 2, 1.22, 1.12)
    submission = submission_of(tmp_path, capsys, runs)
    assert submission["score_label"] == "legal_ttt" and submission["val_bpb"] == pytest.approx(1.11)
    assert submission["seeds"] == [1, 2] and submission["compliance"]["audit_passed"] is True
    assert submission["seed_results"]["2"]["steps"] == 100


def test_seeds_evaluated_in_different_ways_are_not_mixed(tmp_path, capsys):
    runs = make_pair(tmp_path, 1, 1.20, 1.10) + make_pair(tmp_path, 2, 1.22, 1.12)[:1]
    assert_refused(run_collect(capsys, *runs), 2, "ttt_enabled: True (demo_seed1), False (demo_seed2)")


def test_an_evaluation_without_its_training_run_is_refused_among_training_runs(tmp_path, capsys):
    runs = [make_pair(tmp_path, 1, 1.2, 1.1)[0], make_pair(tmp_path, 2, 1.2, 1.1)[1]]
    assert_refused(run_collect(capsys, *runs), 2, "eval_2", "expected its training run as well")


def test_an_evaluation_that_contradicts_the_training_run_is_refused(tmp_path, capsys):
    trained, evaluated = make_pair(tmp_path, 1, 1.2, 1.1)
    scores = json.loads((evaluated / "scores.json").read_text())
    scores["scores"][SLIDING] = score_entry(SLIDING, 1.2001)
    write_json(evaluated / "scores.json", scores)
    assert_refused(run_collect(capsys, trained, evaluated), 2, SLIDING, "1.20010000", "1.20000000")


def test_an_unfinished_evaluation_is_listed_beside_its_training_run(tmp_path, capsys):
    trained, evaluated = make_pair(tmp_path, 1, 1.2, 1.1)
    (evaluated / "scores.json").unlink()
    code, out, err = run_collect(capsys, trained, evaluated, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"eval_1 .*unfinished", out)
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["score_label"] == SLIDING


def test_an_evaluation_alone_claims_nothing_about_training(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, make_pair(tmp_path, 1, 1.2, 1.1)[1:])
    assert "train_under_600s" not in submission["compliance"]
    assert submission["seed_results"]["42"]["train_time_s"] is None


# --- headline and compliance --------------------------------------------------------------------------------


def test_an_illegal_score_is_shown_but_never_becomes_the_headline(tmp_path, capsys):
    bpbs = {**bpbs_around(1.1), "illegal_slot_published": 0.2, "illegal_ttt_slot_published": 0.1}
    code, out, _ = run_collect(capsys, make_run(tmp_path, bpbs=bpbs), "--out", tmp_path)
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert code == 0 and (submission["score_label"], submission["val_bpb"]) == ("legal_ttt", 1.1)
    assert "SLOT published (illegal)" in out and "0.20000" in out


def test_a_legal_name_with_an_illegal_mark_is_illegal(tmp_path):
    bpbs = {SLIDING: 1.2, "legal_ttt": 1.0}
    path = make_log(tmp_path, bpbs=bpbs)
    path.write_text(re.sub(r"(?m)^(legal_ttt.*)$", r"\1 legality:illegal", path.read_text()))
    run = collect.load_run(path)
    assert not run.scores["legal_ttt"].legal and run.scores[SLIDING].legal
    assert collect.choose_headline([run], None) == SLIDING


@pytest.mark.parametrize("label", ["illegal_slot_published", "pre_quant", "nonsense"])
def test_a_headline_that_is_no_legal_score_of_the_artifact_is_refused(tmp_path, capsys, label):
    path = make_run(tmp_path, bpbs={**bpbs_around(1.1), "illegal_slot_published": 0.2})
    assert_refused(run_collect(capsys, path, "--headline", label), 2, label, SLIDING)


def test_another_legal_headline_can_be_chosen(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, three_runs(tmp_path), "--headline", SLIDING)
    assert submission["score_label"] == SLIDING and submission["val_bpb"] == pytest.approx(1.13)


def test_runs_with_only_illegal_scores_have_no_headline(tmp_path, capsys):
    path = make_run(tmp_path, bpbs={"pre_quant": 1.2, "illegal_slot_published": 0.9})
    assert_refused(run_collect(capsys, path), 2, "no legal score")


def test_compliance_claims_only_what_was_measured(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, [make_log(tmp_path, seed) for seed in (1, 2)])
    assert submission["compliance"] == {"artifact_under_16mb": True, "train_under_600s": True,
                                        "eval_under_600s": True, "three_seeds": False}


def test_the_audit_lines_of_a_log_back_the_claim(tmp_path, capsys):
    path = make_log(tmp_path, ours=True)
    for result, passed in (("pass", True), ("FAIL", False)):
        path.write_text("\n".join([*log_lines(ours=True), f"audit {result} 10 checks in 9.5 s"]) + "\n")
        assert submission_of(tmp_path, capsys, [path])["compliance"]["audit_passed"] is passed


def test_compliance_follows_the_measurements(tmp_path, capsys):
    bad = make_run(tmp_path, 2, audit=False, manifest={"code_sha256": "f" * 64},
                   scores={"total_bytes": 16_000_001, "train_time_s": 600.1})
    assert submission_of(tmp_path, capsys, [make_run(tmp_path, 1, audit=True), bad])["compliance"] == {
        "artifact_under_16mb": False, "train_under_600s": False, "eval_under_600s": True,
        "audit_passed": False, "same_code_all_seeds": False, "canonical_validation": False,
        "three_seeds": False}


def test_an_audit_of_some_of_the_seeds_is_no_passed_audit(tmp_path, capsys):
    some = [make_run(tmp_path, 1, audit=True), make_run(tmp_path, 2)]
    assert "audit_passed" not in submission_of(tmp_path, capsys, some)["compliance"]
    both = [some[0], make_run(tmp_path, 3, audit=True)]
    assert submission_of(tmp_path, capsys, both)["compliance"]["audit_passed"] is True


# --- significance -------------------------------------------------------------------------------------------


def test_welch_equals_the_closed_form_for_two_degrees_of_freedom():
    # Two samples of two runs with the same sd have df = 2, where F(t) = 1/2 + t / (2 sqrt(2 + t²)).
    ours, base = collect.Sample(1.110, 0.002, 2), collect.Sample(1.120, 0.002, 2)
    t, df, p = collect.welch(ours, base, 0.003)
    expected_t = (1.113 - 1.120) / math.sqrt(2 * 0.002**2 / 2)
    assert (t, df) == (pytest.approx(expected_t), pytest.approx(2))
    assert p == pytest.approx(0.5 + expected_t / (2 * math.sqrt(2 + expected_t**2)), rel=1e-9)


def test_welch_does_not_pool_the_variances():
    # A baseline without spread adds nothing to the error: df = 3 - 1 = 2, pooling would give 3 + 10 - 2.
    t, df, p = collect.welch(collect.Sample(1.11, 0.003, 3), collect.Sample(1.12, 0.0, 10), 0.0)
    expected_t = -0.01 / (0.003 / math.sqrt(3))
    assert (t, df) == (pytest.approx(expected_t), pytest.approx(2))
    assert p == pytest.approx(0.5 + expected_t / (2 * math.sqrt(2 + expected_t**2)), rel=1e-9)


@pytest.mark.parametrize("critical, p", [(2.131847, 0.05), (2.776445, 0.025), (3.746947, 0.01),
                                         (4.604095, 0.005)])
def test_welch_equals_the_printed_t_table_at_four_degrees_of_freedom(critical, p):
    sd = 0.0015
    ours, base = collect.Sample(1.11, sd, 3), collect.Sample(1.11 + critical * sd * math.sqrt(2 / 3), sd, 3)
    assert collect.welch(ours, base, 0.0)[1:] == (pytest.approx(4), pytest.approx(p, rel=1e-5))


def test_welch_degrees_of_freedom_are_welchs_when_the_spreads_differ():
    # a = 0.003²/3 = 3e-6, b = 0.001²/5 = 2e-7: df = (3.2e-6)² / (9e-12/2 + 4e-14/4) = 1.024e-11 / 4.51e-12
    _, df, _ = collect.welch(collect.Sample(1.1, 0.003, 3), collect.Sample(1.2, 0.001, 5), 0.0)
    assert df == pytest.approx(1.024e-11 / 4.51e-12)


def test_a_worse_mean_is_never_significant():
    better, worse = collect.Sample(1.10, 0.001, 3), collect.Sample(1.12, 0.001, 3)
    assert collect.welch(better, worse, 0.0)[2] < 0.01 < 0.99 < collect.welch(worse, better, 0.0)[2]


def test_the_default_threshold_is_five_millinats_in_the_runs_own_bytes_per_token(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, 1.1 + seed / 10_000) for seed in (1, 2, 3)]
    code, out, err = run_collect(capsys, *runs, "--baseline", "1.1042,0.0001,3", "--out", tmp_path)
    assert code == 0, err
    # 0.005 / (ln 2 * 2.4359) = 0.0029613; (1.1002 + 0.0029613 - 1.1042) / sqrt(2e-8 / 3) = -12.721
    assert "0.00500 nats per token = 0.00296 bpb" in out and "t = -12.721" in out and "df = 4.000" in out
    assert json.loads((tmp_path / "submission.json").read_text())["compliance"]["beats_baseline_p_below_0_01"]
    _, out, _ = run_collect(capsys, *runs, "--baseline", "1.1042,0.0001,3", "--threshold-bpb", "0.004",
                            "--out", tmp_path)
    assert "0.00675 nats per token = 0.00400 bpb" in out and "NOT significant" in out


def test_baselines_as_numbers_submission_logs_and_directories_agree(tmp_path, capsys):
    ours = [make_run(tmp_path, seed, 1.10 + seed / 1000, name=f"ours{seed}") for seed in (1, 2, 3)]
    base_bpbs = {1: 1.20, 2: 1.21, 3: 1.22}  # sd 0.01
    logs = [make_log(tmp_path, seed, bpb, ours=True) for seed, bpb in base_bpbs.items()]
    directories = [make_run(tmp_path, seed, bpb, name=f"base{seed}") for seed, bpb in base_bpbs.items()]
    assert run_collect(capsys, *directories, "--out", tmp_path / "base")[0] == 0
    summary = tmp_path / "summary.json"
    write_json(summary, {"val_bpb": 1.21, "val_bpb_std": 0.01, "seeds": [1, 2, 3]})
    forms = [["1.21,0.01,3"], [tmp_path / "base" / "submission.json"], [summary], logs, directories]
    found = []
    for form in forms:
        options = [item for source in form for item in ("--baseline", source)]
        code, out, err = run_collect(capsys, *ours, *options, "--out", tmp_path / "out")
        assert code == 0, err
        found.append(re.search(r"t = .*", out)[0])
    assert len(set(found)) == 1, found


@pytest.mark.parametrize("text", ["missing.json", "1.1,0.001", "1.1,x,3", "nan,0.1,3", "1.1,-1,3",
                                  "1.1,0.1,3,4"])
def test_a_baseline_that_is_neither_file_nor_numbers_is_refused(tmp_path, capsys, text):
    runs = three_runs(tmp_path)
    assert_refused(run_collect(capsys, *runs, "--baseline", text, "--out", tmp_path / "out"), 2,
                   f"--baseline {text}", "MEAN,SD,N")
    assert not (tmp_path / "out").exists()


def test_the_standard_deviation_of_a_single_run_is_refused_for_the_test(tmp_path, capsys):
    one, three = make_run(tmp_path, 7), three_runs(tmp_path)
    assert_refused(run_collect(capsys, one, "--baseline", "1.2,0.01,3"), 2, "the runs have 1 ", "2 seeds")
    assert_refused(run_collect(capsys, *three, "--baseline", "1.2,0.01,1"), 2, "the baseline's have 1 ")
    assert_refused(run_collect(capsys, *three, "--baseline", one), 2, "the baseline's have 1 ")


def test_samples_without_any_spread_are_refused_for_the_test(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, 1.1) for seed in (1, 2)]
    assert_refused(run_collect(capsys, *runs, "--baseline", "1.2,0,3"), 2, "both standard deviations are 0")


def test_a_baseline_file_without_scores_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    write_json(path, {"author": "Ann"})
    result = run_collect(capsys, *three_runs(tmp_path), "--baseline", path)
    assert_refused(result, 3, path, "no usable scores")


def test_a_baseline_on_other_data_is_refused(tmp_path, capsys):
    base = [make_run(tmp_path, seed, 1.2 + seed / 100, manifest={"data": {**DATA, "val_sha256": "e" * 64}})
            for seed in (1, 2)]
    options = [item for path in base for item in ("--baseline", path)]
    assert_refused(run_collect(capsys, *three_runs(tmp_path), *options), 2, "validation data")


# --- ablation -----------------------------------------------------------------------------------------------


def test_ablation_has_one_row_per_configuration_and_one_column_per_evaluation(tmp_path, capsys):
    runs = [make_run(tmp_path, 1, 1.10, name="a1"), make_run(tmp_path, 2, 1.12, name="a2"),
            make_run(tmp_path, 1, 1.15, name="b1", config={"nfm_loss_weight": 0.05}),
            make_run(tmp_path, 1, 1.20, name="c1", config={"nfm_enabled": False}),
            make_run(tmp_path, 1, 1.30, name="d1", config={"ttt_enabled": False}, bpbs={SLIDING: 1.31})]
    code, out, err = run_collect(capsys, *runs, "--ablation", "--out", tmp_path / "out")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows == [
        ["preset", "nfm_enabled", "nfm_loss_weight", "ttt_enabled", "seeds", "sliding", "legal TTT"],
        ["demo", "True", "0.1", "True", "1, 2", "1.12000 ± 0.01414", "1.11000 ± 0.01414"],
        ["demo", "True", "0.05", "True", "1", "1.16000 (1 run, no sd)", "1.15000 (1 run, no sd)"],
        ["demo", "False", "0.1", "True", "1", "1.21000 (1 run, no sd)", "1.20000 (1 run, no sd)"],
        ["demo", "True", "0.1", "False", "1", "1.31000 (1 run, no sd)", "-"],
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "results.md"]


def test_two_runs_of_one_seed_are_refused_within_a_row_of_an_ablation(tmp_path, capsys):
    runs = [make_run(tmp_path, 1, name=name) for name in "ab"] + [make_run(tmp_path, 1, name="c",
                                                                          config={"nfm_enabled": False})]
    assert_refused(run_collect(capsys, *runs, "--ablation"), 2, "two runs of seed 1")


@pytest.mark.parametrize("option", [["--check", "x"], ["--baseline", "1,1,2"], ["--headline", SLIDING]])
def test_ablation_goes_with_no_option_for_one_configuration(tmp_path, capsys, option):
    assert_refused(run_collect(capsys, make_run(tmp_path), "--ablation", *option), 2, option[0])


# --- checking an existing submission.json -------------------------------------------------------------------


def numbers_in(data, path=()):
    """Every (path, number) in nested objects and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in items:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield (*path, name), value
        yield from numbers_in(value, (*path, name))


def with_change(data, path, value):
    copy = json.loads(json.dumps(data))
    target = copy
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    return copy


def check(tmp_path, capsys, runs, submission):
    path = tmp_path / "checked.json"
    write_json(path, submission)
    return run_collect(capsys, *runs, "--check", path)


def test_a_written_submission_passes_its_own_check(tmp_path, capsys):
    runs = three_runs(tmp_path, audit=True)
    code, out, err = check(tmp_path, capsys, runs, submission_of(tmp_path, capsys, runs))
    assert (code, err) == (0, "") and "agrees with 3 run(s)" in out


def test_every_number_of_a_submission_is_checked(tmp_path, capsys):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    numbers = list(numbers_in(submission))
    assert len(numbers) == 5 + 3 + 3 * 7
    for path, value in numbers:
        step = 1 if isinstance(value, int) else 1e-4 if "val_" in path[-1] else 0.2
        changed = value + step
        code, _, err = check(tmp_path, capsys, runs, with_change(submission, path, changed))
        assert code == 1, path
        assert str(path[0]) in err and len(err.splitlines()) == 1, err


def test_a_number_rounded_in_the_file_agrees_but_one_cut_to_nothing_does_not(tmp_path, capsys):
    runs = [make_run(tmp_path, 1, 1.1199066), make_run(tmp_path, 2, 1.1199068)]
    submission = submission_of(tmp_path, capsys, runs)
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1.11991})[0] == 0
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1.11990})[0] == 0  # in JSON 1.1199
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1.11992})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": "1.11991"})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": math.nan})[0] == 1


@pytest.mark.parametrize("change, word", [
    ({"compliance": {"audit_passed": True}}, "compliance.audit_passed: not backed by these runs"),
    ({"compliance": {"canonical_validation": True}}, "compliance.canonical_validation"),
    ({"score_scope": "canonical"}, "score_scope"),
    ({"seeds": [42, 1337]}, "seeds"),
    ({"hardware": "8xH100"}, "hardware"),
    ({"author": ""}, "author"),
    ({"seed_results": {}}, "seed_results.42: missing"),
])
def test_a_claim_the_runs_do_not_back_is_a_difference(tmp_path, capsys, change, word):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    code, _, err = check(tmp_path, capsys, runs, {**submission, **change})
    assert code == 1 and word in err


def test_a_claim_that_is_not_made_is_no_difference(tmp_path, capsys):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    del submission["score_label"], submission["compliance"]["three_seeds"]
    assert check(tmp_path, capsys, runs, submission)[0] == 0


def test_a_missing_field_and_an_additional_seed_are_differences(tmp_path, capsys):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    del submission["bytes_total"]
    submission["seed_results"]["7"] = submission["seed_results"]["42"]
    code, _, err = check(tmp_path, capsys, runs, submission)
    assert code == 1 and "bytes_total: missing" in err and "seed_results.7: not backed" in err


def test_check_of_a_missing_or_broken_file_is_one_message(tmp_path, capsys):
    runs = three_runs(tmp_path)
    assert_refused(run_collect(capsys, *runs, "--check", tmp_path / "none.json"), 2, tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"author": "An')
    assert_refused(run_collect(capsys, *runs, "--check", tmp_path / "cut.json"), 3, "cut.json", "not JSON")


def test_check_writes_nothing(tmp_path, capsys, monkeypatch):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check(tmp_path, capsys, runs, submission)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- command line -------------------------------------------------------------------------------------------


def test_help_explains_every_option_and_the_exit_codes(capsys):
    code, out, _ = run_collect(capsys, "--help")
    assert code == 0
    for word in ("--baseline", "--threshold-nats", "--threshold-bpb", "--ablation", "--check", "--out",
                 "Exit codes"):
        assert word in out


@pytest.mark.parametrize("arguments", [
    [], ["--nonsense"], ["x", "--date", "tomorrow"], ["x", "--threshold-nats", "-1"],
    ["x", "--threshold-nats", "1", "--threshold-bpb", "1"]])
def test_wrong_use_ends_with_exit_code_2(capsys, arguments):
    code, _, err = run_collect(capsys, *arguments)
    assert code == 2 and "usage:" in err
