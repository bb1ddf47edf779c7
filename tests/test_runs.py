"""slurm/runs.py: folders and logs of train_gpt.py, and which runs go together."""

import json
import math
import re

import pytest
from runs_helpers import (
    BYTES,
    DATA,
    MANIFEST,
    ROUNDTRIP,
    SLIDING,
    TOKENS,
    assert_refused,
    bpbs_around,
    edit_json,
    events_of,
    load_run,
    log_lines,
    make_log,
    make_run,
    no_picture,  # noqa: F401
    run_collect,
    run_records,
    submission_of,
    write_events,
    write_json,
)

pytestmark = pytest.mark.usefixtures("no_picture")


# --- logs ----------------------------------------------------------------------------------------


def test_a_log_and_its_run_directory_tell_the_same(tmp_path):
    log = load_run(make_log(tmp_path, bpbs={**bpbs_around(1.12), "illegal_slot_published": 0.5}))
    folder = load_run(make_run(tmp_path, bpbs={**bpbs_around(1.12), "illegal_slot_published": 0.5}))
    assert log.status == folder.status == "finished"
    assert log.scores.keys() == folder.scores.keys() >= {"TTT", "SLOT (illegal)"}
    for stage, score in log.scores.items():
        assert score.val_bpb == pytest.approx(folder.scores[stage].val_bpb, abs=5.1e-9)
        assert score.eval_time_s == 30.25 and score.label == folder.scores[stage].label
    assert list(run_records.differing_settings([log, folder])) == []
    assert (log.seed, log.data) == (42, DATA)
    assert (log.results["steps"], log.results["total_bytes"]) == (100, 3_090_042)
    assert (log.training_s, log.results["step_avg_ms"]) == (1.0, 10.0)
    assert log.train_curve == folder.train_curve and log.val_curve == {100: 1.12}


def test_a_log_cut_anywhere_never_reports_a_number_that_was_not_printed_in_full(tmp_path):
    text = "\n".join(log_lines(bpb=1.12345678)) + "\n"
    path = tmp_path / "cut.log"
    path.write_text(text)
    whole = load_run(path)
    for length in range(text.index("seed:42"), len(text) - 30, 3):
        path.write_text(text[:length])
        run = load_run(path)
        assert run.status == "unfinished"
        assert run.scores.items() <= whole.scores.items()
        assert run.train_curve.items() <= whole.train_curve.items()


def test_steps_gone_through_twice_count_once_the_last_time(tmp_path):
    again = [
        {"event": "start", "resumed_step": 20},
        {"event": "step", "step": 40, "train_loss": 1.5, "lr_scale": 1.0},
    ]
    events = [*events_of(1.1, last=80), *again]
    run = load_run(make_run(tmp_path, finished=False, events=events))
    assert run.train_curve == {20: 3.8, 40: 1.5}
    text = "\n".join(log_lines()) + "\n"
    again = "resumed_from:checkpoint/step_30.pt step:30\nstep:80/100 train_loss:1.5 train_time:9ms "
    path = tmp_path / "train.log"
    path.write_text(text.replace("step:100/", f"{again}step_avg:1.00ms\nstep:100/", 1))
    assert load_run(path).train_curve == {20: 3.8, 80: 1.5, 100: 3.0}


def test_the_headline_under_the_name_of_the_challenges_parser_is_no_score_of_its_own(tmp_path):
    path = make_log(tmp_path)
    lines = path.read_text().splitlines()
    copy = lines[-2].replace("legal_ttt", "final_int8_zlib_roundtrip")
    path.write_text("\n".join([*lines[:-1], copy, lines[-1]]) + "\n")
    assert load_run(path).scores["roundtrip"].label == ROUNDTRIP


@pytest.mark.parametrize(
    "line, status, note",
    [
        ("", "unfinished", "still running or killed (last logged step 100/100, scored float"),
        ("error: loss is nan at step 7", "failed", "loss is nan at step 7 (last logged step"),
        ("stopped signal:SIGTERM phase:train; run it again", "unfinished", "SIGTERM, phase: train"),
    ],
)
def test_a_log_that_has_not_finished_says_why(tmp_path, line, status, note):
    path = make_log(tmp_path)
    path.write_text("\n".join([*path.read_text().splitlines()[:-3], line]) + "\n")
    run = load_run(path)
    assert run.status == status and note in run.note


def test_two_runs_in_one_log_are_refused(tmp_path, capsys):
    path = tmp_path / "both.log"
    path.write_text("\n".join(log_lines(1) + log_lines(2)))
    assert_refused(run_collect(capsys, path), 3, path, "[1, 2]", "Split the log")


@pytest.mark.parametrize("content", ["", "\x00\x01\xff" * 50])
def test_a_file_that_is_no_log_of_train_gpt_is_refused(tmp_path, capsys, content):
    path = tmp_path / "other.txt"
    path.write_text(content)
    assert_refused(run_collect(capsys, path), 3, path, "a log of train_gpt.py", "--baseline")


# --- the code and the text behind a score --------------------------------------------------------


def test_a_script_beside_a_run_is_its_code_and_a_given_script_comes_first(tmp_path, capsys):
    folder = make_run(tmp_path)
    (folder / "train_gpt.py").write_text("#" * 70_000)
    submission = submission_of(tmp_path, capsys, [folder])
    assert (submission["bytes_code"], submission["bytes_total"]) == (70_000, 3_070_042)
    other = tmp_path / "other.py"
    other.write_text("#" * 13_000_000)
    submission = submission_of(tmp_path, capsys, [folder], "--script", other)
    assert submission["bytes_total"] == 16_000_042
    assert submission["compliance"]["artifact_under_16mb"] is False
    assert_refused(run_collect(capsys, folder, "--script", tmp_path / "none.py"), 2, "none.py")


def test_a_submission_folder_is_read_by_its_logs_and_its_script(tmp_path, capsys):
    folder = tmp_path / "submission"
    folder.mkdir()
    logs = [make_log(folder, seed, 1.1 + seed / 100) for seed in (1, 2)]
    (folder / "train.log").write_text(logs[0].read_text())
    (folder / "train_gpt.py").write_text("#" * 70_000)
    submission = submission_of(tmp_path, capsys, [folder])
    assert submission["seeds"] == [1, 2] and submission["bytes_total"] == 3_070_042
    for log in logs:
        log.unlink()
    assert submission_of(tmp_path, capsys, [folder])["seeds"] == [1]


def test_a_score_that_implies_other_bytes_than_the_data_is_refused(tmp_path, capsys):
    path = make_log(tmp_path)
    path.write_text(path.read_text().replace("val_bpb:1.12000000", "val_bpb:1.11999900"))
    assert_refused(run_collect(capsys, path), 3, path, "legal_ttt", "implies 243,590.2", "243,590")
    folder = make_run(tmp_path, manifest=dict(data=dict(DATA, val_bytes=BYTES + 1)))
    assert_refused(run_collect(capsys, folder), 3, folder, "the validation data has 243,591")
    edit_json(folder / "manifest.json", data=DATA)
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    scores["legal_ttt"]["tokens"] = TOKENS - 1
    edit_json(folder / "scores.json", scores=scores)
    assert_refused(run_collect(capsys, folder), 3, "legal_ttt implies", "a part of the text")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_score_that_is_no_positive_number_is_refused(tmp_path, capsys, value):
    path = make_run(tmp_path, bpbs={**bpbs_around(1.1), SLIDING: value})
    assert_refused(run_collect(capsys, path), 3, path, SLIDING, value)
    log = make_log(tmp_path, bpbs={SLIDING: value})
    assert_refused(run_collect(capsys, log), 3, log, SLIDING)


# --- which runs go together ----------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_mixed_configurations_are_refused_and_the_differing_fields_named(
    tmp_path, capsys, finished
):
    other = {"preset": "base_7k", "nfm_enabled": False}
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config=other, finished=finished)]
    preset = "preset: demo (demo_seed1), base_7k (demo_seed2)"
    setting = "nfm_enabled: True (demo_seed1), False (demo_seed2)"
    assert_refused(run_collect(capsys, *runs), 2, preset, setting, "--ablation")


def test_operational_settings_may_differ_and_a_folder_tells_them_for_logs(tmp_path, capsys):
    first, second = make_log(tmp_path, 1), make_log(tmp_path, 2)
    second.write_text(second.read_text().replace("train_log_every=20", "train_log_every=10"))
    assert_refused(run_collect(capsys, first, second), 2, "train_log_every: 20 (train_seed1.log)")
    folder = make_run(tmp_path, 3, 1.15, config={"data_path": "/elsewhere", "train_log_every": 5})
    submission = submission_of(tmp_path, capsys, [first, second, folder])
    assert submission["seeds"] == [1, 2, 3] and submission["val_bpb"] == pytest.approx(1.13)


def test_runs_on_different_validation_data_are_refused(tmp_path, capsys):
    other = {"data": {**DATA, "val_sha256": "e" * 64}}
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, manifest=other)]
    assert_refused(run_collect(capsys, *runs), 2, "val_sha256 of the validation data", "eeee")


# --- unfinished, failed and damaged --------------------------------------------------------------


def test_unfinished_and_failed_runs_are_listed_and_not_averaged(tmp_path, capsys):
    stopped = {"event": "stopped", "signal": "SIGTERM", "phase": "train"}
    error = {"event": "error", "code": 5, "message": "loss is nan at step 41"}
    failed = [*events_of(1.1, last=40), error]
    runs = [
        make_run(tmp_path, 1, name="failed", finished=False, events=failed),
        make_run(tmp_path, 1, 1.1),
        make_run(tmp_path, 2, 1.2),
        make_run(tmp_path, 3, finished=False, events=[*events_of(9.9, last=60), stopped]),
        make_run(tmp_path, 4, finished=False, events=events_of(9.9, last=40)),
        make_run(tmp_path, 5, 0.5, results={"finished": False}),
    ]
    code, out, err = run_collect(capsys, *runs, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"\| failed .*failed .*exit code 5: loss is nan .*logged step 40/100", out)
    assert re.search(r"seed3 .*unfinished .*SIGTERM, phase: train.*last logged step 60/100", out)
    assert re.search(r"seed4 .*unfinished .*running or killed \(last logged step 40/100", out)
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submission["seeds"] == [1, 2] and submission["val_bpb"] == pytest.approx(1.15)


def test_a_run_that_failed_before_it_began_is_listed(tmp_path, capsys):
    path = tmp_path / "failed"
    path.mkdir()
    write_events(path / "metrics.jsonl", [{"event": "error", "code": 3, "message": "no shards"}])
    run = load_run(path)
    assert run.status == "failed" and "exit code 3: no shards" in run.note
    assert submission_of(tmp_path, capsys, [path, make_run(tmp_path, 1)])["seeds"] == [1]


def test_an_audit_without_a_score_is_listed_as_such(tmp_path):
    events = [{"event": "audit", "passed": True}]
    path = make_run(tmp_path, finished=False, events=events, audit=True)
    assert load_run(path).note == "audited (passed: True), not scored"


def test_no_finished_run_at_all_is_an_error_that_lists_them(tmp_path, capsys):
    path = make_run(tmp_path, finished=False, events=[])
    refused = run_collect(capsys, path, "--out", tmp_path / "out")
    assert_refused(refused, 3, "none of 1 run(s)", path, "before the first logged step")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "torn, curve",
    [
        ('{"event": "step", "st', {20: 3.8, 40: 3.6}),
        ('{"event": "step", "st\n{"event": "start", "resumed_step": 20}\n', {20: 3.8}),
        ('{"event": "step", "st{"event": "start", "resumed_step": 20}\n', {20: 3.8}),
    ],
    ids=["at the end", "before a resume", "with the next event glued to it"],
)
def test_a_line_torn_by_a_kill_is_forgiven(tmp_path, torn, curve):
    path = make_run(tmp_path, finished=False, events=events_of(1.1, last=40))
    with open(path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert load_run(path).train_curve == curve


def test_a_damaged_file_of_a_run_is_refused_by_name(tmp_path, capsys):
    path = make_run(tmp_path)
    for name in ("config.json", "manifest.json", "scores.json"):
        whole = (path / name).read_text()
        (path / name).write_text(whole[:50])
        assert_refused(run_collect(capsys, path), 3, path / name, "not readable as JSON")
        (path / name).write_text(whole)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([*lines[:2], lines[2][20:], *lines[3:]]))
    assert_refused(run_collect(capsys, path), 3, "metrics.jsonl:3", "damaged line")
    (path / "metrics.jsonl").unlink()
    write_json(path / "config.json", {"config": {}})
    assert_refused(run_collect(capsys, path), 3, path, "kinds")


def test_a_path_without_a_run_is_refused_with_the_hint_what_to_pass(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_refused(run_collect(capsys, tmp_path / "empty"), 3, "empty: no config.json")
    make_run(tmp_path)
    assert_refused(run_collect(capsys, tmp_path), 3, "holds 1", f"pass {tmp_path}/*")
    assert_refused(run_collect(capsys, tmp_path / "nothing"), 2, "nothing: no such file")
    (tmp_path / "demo_seed42" / "scores.json").unlink()
    (tmp_path / "demo_seed42" / "scores.json").mkdir()
    assert_refused(run_collect(capsys, tmp_path / "demo_seed42"), 3, "expected a readable file")


# --- evaluations of an artifact ------------------------------------------------------------------


def make_pair(tmp_path, seed, sliding, ttt):
    """A training run scored by sliding window, and the EVAL_ONLY run of its artifact with TTT."""
    artifact = {**MANIFEST, "artifact_sha256": f"{seed:064x}"}
    plain = {ROUNDTRIP: sliding + 0.01, SLIDING: sliding}
    off = {"ttt_enabled": False}
    trained = make_run(tmp_path, seed, config=off, manifest=artifact, bpbs=plain)
    evaluated = make_run(
        tmp_path,
        name=f"eval_{seed}",
        manifest=artifact,
        audit=True,
        events=[],
        config={"eval_only": "model.int6.ptz", "iterations": 7000},
        bpbs={**plain, "legal_ttt": ttt},
        results=dict(steps=None, step_avg_ms=None, train_time_s=None),
    )
    return [trained, evaluated]


def test_evaluations_add_their_scores_to_the_runs_that_trained_the_artifacts(tmp_path, capsys):
    runs = make_pair(tmp_path, 1, 1.20, 1.10) + make_pair(tmp_path, 2, 1.22, 1.12)
    submission = submission_of(tmp_path, capsys, runs)
    assert submission["score_label"] == "legal_ttt" and submission["val_bpb"] == pytest.approx(1.11)
    assert submission["seeds"] == [1, 2] and submission["compliance"]["audit_passed"] is True
    assert submission["seed_results"]["2"]["steps"] == 100
    # Seeds that were evaluated in different ways
    difference = "ttt_enabled: True (demo_seed1), False (demo_seed2)"
    assert_refused(run_collect(capsys, *runs[:3]), 2, difference)


def test_an_evaluation_that_does_not_fit_the_training_runs_is_refused(tmp_path, capsys):
    (trained, evaluated), stranger = (make_pair(tmp_path, n, 1.2, 1.1) for n in (1, 2))
    alone = run_collect(capsys, trained, stranger[1])
    assert_refused(alone, 2, "eval_2", "expected its training run as well")
    scores = json.loads((evaluated / "scores.json").read_text())["scores"]
    for name in ("val_loss", "val_bpb"):
        scores[SLIDING][name] *= 1.0001
    edit_json(evaluated / "scores.json", scores=scores)
    assert_refused(run_collect(capsys, trained, evaluated), 2, SLIDING, "1.20012000", "1.20000000")


def test_an_unfinished_evaluation_is_listed_beside_its_training_run(tmp_path, capsys):
    trained, evaluated = make_pair(tmp_path, 1, 1.2, 1.1)
    (evaluated / "scores.json").unlink()
    code, out, err = run_collect(capsys, trained, evaluated, "--out", tmp_path / "out")
    assert code == 0 and re.search(r"eval_1 .*unfinished", out), err
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["score_label"] == SLIDING


def test_an_evaluation_alone_claims_nothing_about_training(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, make_pair(tmp_path, 1, 1.2, 1.1)[1:])
    assert "train_under_600s" not in submission["compliance"]
    assert submission["seed_results"]["42"]["train_time_s"] is None


# --- the validation text ---


@pytest.mark.parametrize(
    "targets, size, scope, canonical",
    [
        (62_021_632, 151_050_000, "canonical-by-counts", True),
        (40_540_160, 151_030_000, "canonical-by-counts", True),
        (62_021_632, 157_000_000, "proxy", False),
        (40_540_160, 160_000_000, "canonical-by-counts", False),
        (40_540_161, 151_050_000, "canonical-by-counts", False),
    ],
)
def test_the_canonical_text_is_claimed_where_its_counts_agree_and_else_remarked(
    tmp_path, capsys, targets, size, scope, canonical
):
    data = dict(DATA, val_targets=targets, val_bytes=size, scope=scope)
    loss = 1.1 * math.log(2) * size / targets
    entry = dict(val_loss=loss, val_bpb=1.1, tokens=targets, bytes=size, eval_time_s=1.0)
    path = make_run(tmp_path, manifest=dict(data=data), results=dict(scores={SLIDING: entry}))
    code, out, _ = run_collect(capsys, path, "--out", tmp_path)
    remark = f"imply {size:,} bytes behind {targets:,} targets"
    assert code == 0 and (remark in out) is not canonical
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert submission["score_scope"] == (scope if canonical else "proxy")
    assert submission["compliance"]["canonical_validation"] is canonical
