"""slurm/runs.py, logs.py and groups.py: what is read from folders and logs, and which runs go
together.
"""

import json
import math
import re

import pytest
from runs_helpers import (
    BYTES,
    DATA,
    ROOT,
    ROUNDTRIP,
    SLIDING,
    TOKENS,
    assert_refused,
    bpbs_around,
    by_label,
    collect,
    events_of,
    load_run,
    log_lines,
    make_log,
    make_run,
    run_collect,
    run_records,
    score_entry,
    submission_of,
    write_events,
    write_json,
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch, tmp_path):
    """Drawing takes most of the time of a call, and no test here looks at the picture."""
    monkeypatch.setattr(collect, "draw_curves", lambda runs, title, ablation: b"picture")
    monkeypatch.chdir(tmp_path)  # where a call without --out would write


# --- plain logs ----------------------------------------------------------------------------------


def test_a_log_and_its_run_directory_give_the_same_scores(tmp_path):
    from_log = load_run(make_log(tmp_path, ours=True))
    from_directory = load_run(make_run(tmp_path))
    assert from_log.status == from_directory.status == "finished"
    assert set(by_label(from_log)) == set(by_label(from_directory)) == set(bpbs_around(1))
    for label, score in by_label(from_log).items():
        assert score.val_bpb == pytest.approx(by_label(from_directory)[label].val_bpb, abs=5.1e-9)
        assert score.eval_time_s == 30.25
    del from_directory.settings["run_dir"]
    assert from_log.settings == from_directory.settings
    assert (from_log.seed, from_log.steps, from_log.total_bytes) == (42, 100, 3_090_042)
    assert (from_log.tokens, from_log.bytes, from_log.scope) == (TOKENS, BYTES, "proxy")
    assert from_log.train_curve == from_directory.train_curve


def test_a_run_directory_and_a_log_of_another_seed_can_be_averaged(tmp_path, capsys):
    submission = submission_of(
        tmp_path, capsys, [make_run(tmp_path, 1, 1.10), make_log(tmp_path, 2, 1.12, ours=True)]
    )
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


@pytest.mark.parametrize(
    "between", ["", "=" * 100 + "\n", "Running Python 3.12.1\n", "\n\nseed:42\n"]
)
def test_source_embedded_in_a_log_is_not_data(tmp_path, between):
    plain = load_run(make_log(tmp_path))
    with_source = load_run(make_log(tmp_path, before="logs/run.txt\n" + SOURCE + between))
    assert with_source == plain


def test_the_real_script_embedded_in_a_log_is_not_data(tmp_path):
    script = ROOT / "train_gpt.py"
    if not script.exists():
        pytest.skip("train_gpt.py is not here")
    before = script.read_text() + "=" * 100 + "\n"
    plain = load_run(make_log(tmp_path))
    assert load_run(make_log(tmp_path, before=before)) == plain


def test_source_of_a_newer_python_does_not_hide_what_follows_it(tmp_path):
    newer = SOURCE.replace('log("seed:98")', 'log(f"seed:{"a" "b"!r:{"nested"}}" ?)')
    plain = load_run(make_log(tmp_path))
    assert load_run(make_log(tmp_path, before=newer + "=" * 100 + "\n")) == plain


def test_source_repeated_by_a_resumed_run_is_cut_out_each_time(tmp_path):
    lines = log_lines()
    path = tmp_path / "train.log"
    path.write_text(SOURCE + "\n".join(lines[:6]) + "\n" + SOURCE + "\n".join(lines[6:]) + "\n")
    run = load_run(path)
    assert run.status == "finished" and run.seed == 42
    assert run.scores == load_run(make_log(tmp_path)).scores


@pytest.mark.parametrize("ours", [False, True])
def test_a_log_cut_anywhere_never_reports_a_number_that_was_not_printed_in_full(tmp_path, ours):
    text = "\n".join(log_lines(bpb=1.12345678, ours=ours))
    path = tmp_path / "cut.log"
    path.write_text(text)
    whole = load_run(path)
    for length in [*range(0, len(text) - 200, 13), *range(len(text) - 200, len(text) - 1)]:
        path.write_text(text[:length])
        try:
            run = load_run(path)
        except run_records.RunDataProblem as problem:
            assert "no line of the field's log format" in str(problem)
            continue
        # What a foreign log was still going to score, nobody knows: its first score may finish it.
        may_have_ended = "run_finished" in text[:length] if ours else ROUNDTRIP in by_label(run)
        assert run.status == "unfinished" or may_have_ended
        for stage, score in run.scores.items():
            expected = whole.scores[stage]
            assert round(expected.val_bpb, score.decimals) == score.val_bpb


def test_steps_gone_through_twice_count_once_in_a_log_too(tmp_path):
    lines = log_lines(ours=True)
    at = next(number for number, line in enumerate(lines) if line.startswith("step:80/"))
    path = tmp_path / "train.log"
    again = [
        "resumed_from:checkpoint/step_00000030.pt step:30",
        lines[at].replace("3.2000", "1.5000"),
    ]
    path.write_text("\n".join([*lines[: at + 1], *again, *lines[at + 1 :]]) + "\n")
    assert load_run(path).train_curve == [(20, 3.8), (80, 1.5), (100, 3.0)]


def test_the_last_validation_stands_for_the_float_weights_where_a_log_has_no_other(tmp_path):
    run = load_run(make_log(tmp_path, bpb=1.12))
    assert (run.scores["float weights"].val_bpb, run.scores["float weights"].decimals) == (1.12, 4)
    ours = load_run(make_log(tmp_path, bpb=1.12, ours=True))
    assert (ours.scores["float weights"].val_bpb, ours.scores["float weights"].decimals) == (
        1.122,
        8,
    )


def test_a_log_that_ends_before_the_others_is_unfinished_and_does_not_lower_the_headline(
    tmp_path, capsys
):
    whole = [make_log(tmp_path, seed, 1.1 + seed / 1000) for seed in (1, 2)]
    cut = make_log(tmp_path, 3)
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:-2]))
    code, out, err = run_collect(capsys, *whole, cut, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"train_seed3.log .*unfinished .*no TTT score, which the other logs have", out)
    assert json.loads((tmp_path / "out" / "submission.json").read_text())["seeds"] == [1, 2]


def test_a_log_whose_time_limit_cut_test_time_training_says_so(tmp_path):
    path = make_log(tmp_path)
    path.write_text(
        "\n".join(
            [
                *path.read_text().splitlines()[:-2],
                "  ttt_chunk [1271/1893] bpb=1.12",
                "slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***",
            ]
        )
    )
    run = load_run(path)
    assert run.status == "failed"
    assert (
        "no line tells its score" in run.note and "TIME LIMIT" in run.note and "100/100" in run.note
    )


def test_two_runs_in_one_log_are_refused(tmp_path, capsys):
    path = tmp_path / "both.log"
    path.write_text("\n".join(log_lines(1) + log_lines(2)))
    assert_refused(run_collect(capsys, path), 3, path, "[1, 2]", "Split the log")


@pytest.mark.parametrize("content", ["", "hello\n", "\x00\x01\xff" * 50])
def test_a_file_that_is_no_log_is_refused(tmp_path, capsys, content):
    path = tmp_path / "other.txt"
    path.write_text(content)
    assert_refused(run_collect(capsys, path), 3, path, "no line of the field's log format")


def test_a_log_without_a_seed_is_read_and_said_to_have_none(tmp_path, capsys):
    path = tmp_path / "train.log"
    path.write_text(make_log(tmp_path).read_text().replace("seed:42\n", ""))
    code, out, err = run_collect(capsys, path, "--out", tmp_path / "out")
    assert code == 0, err
    assert "neither the log nor its name tells the seed" in out
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submission["seeds"] == [] and list(submission["seed_results"]) == ["train"]


# --- scores that imply their bytes ---------------------------------------------------------------


def test_a_score_line_that_implies_other_bytes_is_refused(tmp_path, capsys):
    path = make_log(tmp_path)
    path.write_text(path.read_text().replace("val_bpb:1.12000000", "val_bpb:1.11800000"))
    assert_refused(run_collect(capsys, path), 3, path, "legal_ttt", "implies 244,025", "243,590")


def test_scores_that_agree_with_each_other_but_not_with_the_fingerprint_are_refused(
    tmp_path, capsys
):
    path = make_log(tmp_path, ours=True)
    path.write_text(path.read_text().replace(f"bytes:{BYTES}", f"bytes:{BYTES + 1}"))
    assert_refused(run_collect(capsys, path), 3, "the data fingerprint 243,591")


def test_rounding_of_the_printed_decimals_is_no_contradiction(tmp_path):
    for bpb in (0.91234567, 1.00000001, 1.12349999, 2.71828183):
        assert load_run(make_log(tmp_path, bpb=bpb)).status == "finished"


def test_a_run_directory_whose_score_counts_other_tokens_is_refused(tmp_path, capsys):
    path = make_run(tmp_path)
    scores = json.loads((path / "scores.json").read_text())
    scores["scores"]["legal_ttt"]["tokens"] -= 1
    write_json(path / "scores.json", scores)
    assert_refused(run_collect(capsys, path), 3, path, "legal_ttt scored 99999 tokens")


def test_scores_json_and_train_log_must_report_the_same(tmp_path, capsys):
    path = make_run(tmp_path)
    (path / "train.log").write_text("\n".join(log_lines(ours=True)) + "\n")
    assert load_run(path).status == "finished"
    (path / "train.log").write_text("\n".join(log_lines(ours=True, bpb=1.1200001)) + "\n")
    assert_refused(
        run_collect(capsys, path), 3, "train.log", "pre_quant", "1.89442656", "1.89442673"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.1])
def test_a_score_that_is_no_positive_number_is_refused(tmp_path, capsys, value):
    path = make_run(tmp_path, bpbs={**bpbs_around(1.1), SLIDING: value})
    assert_refused(run_collect(capsys, path), 3, path, SLIDING, value)


def test_a_nan_score_in_a_log_is_refused(tmp_path, capsys):
    path = make_log(tmp_path, bpbs={SLIDING: math.nan})
    assert_refused(run_collect(capsys, path), 3, path, SLIDING, "nan")


# --- which runs go together ----------------------------------------------------------------------


def test_two_runs_of_one_seed_are_refused(tmp_path, capsys):
    first, second = make_run(tmp_path, 42, name="a"), make_run(tmp_path, 42, name="b")
    assert_refused(run_collect(capsys, first, second), 2, "two runs of seed 42", first, second)


def test_a_failed_run_and_its_repetition_are_not_two_runs_of_one_seed(tmp_path, capsys):
    failed = make_run(
        tmp_path,
        42,
        name="a",
        finished=False,
        events=[
            *events_of(1.1, last=40),
            {"event": "error", "code": 5, "message": "loss is nan at step 41"},
        ],
    )
    code, out, err = run_collect(
        capsys, failed, make_run(tmp_path, 42, name="b"), "--out", tmp_path
    )
    assert code == 0, err
    assert re.search(
        r"\| a .*failed .*exit code 5: loss is nan at step 41 \(last logged step 40/100", out
    )


def test_mixed_presets_are_refused_and_the_differing_fields_named(tmp_path, capsys):
    runs = [
        make_run(tmp_path, 1),
        make_run(tmp_path, 2, config={"preset": "base_7k", "nfm_enabled": False}),
    ]
    assert_refused(
        run_collect(capsys, *runs),
        2,
        "preset: demo (demo_seed1), base_7k (demo_seed2)",
        "nfm_enabled: True (demo_seed1), False (demo_seed2)",
        "--ablation",
    )


def test_unfinished_runs_of_another_configuration_are_refused_too(tmp_path, capsys):
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config={"num_layers": 7}, finished=False)]
    assert_refused(run_collect(capsys, *runs), 2, "num_layers: 6 (demo_seed1), 7 (demo_seed2)")


def test_operational_settings_may_differ(tmp_path, capsys):
    elsewhere = {"data_path": "/elsewhere", "train_log_every": 5}
    runs = [make_run(tmp_path, 1), make_run(tmp_path, 2, config=elsewhere)]
    assert submission_of(tmp_path, capsys, runs)["seeds"] == [1, 2]


def test_logs_alone_do_not_tell_which_settings_are_operational_so_all_count(tmp_path, capsys):
    first, second = make_log(tmp_path, 1, ours=True), make_log(tmp_path, 2, ours=True)
    assert submission_of(tmp_path, capsys, [first, second])["seeds"] == [1, 2]
    second.write_text(second.read_text().replace("train_log_every=20", "train_log_every=10"))
    assert_refused(run_collect(capsys, first, second), 2, "train_log_every: 20 (train_seed1.log)")
    directory = make_run(tmp_path, 3)  # it tells the kinds for all of them
    assert submission_of(tmp_path, capsys, [first, second, directory])["seeds"] == [1, 2, 3]


def test_kinds_may_be_told_per_setting_or_per_kind(tmp_path):
    path = make_run(tmp_path)
    kinds = load_run(path).kinds
    written = json.loads((path / "config.json").read_text())
    written["kinds"] = {name: kind for kind, names in kinds.items() for name in names}
    write_json(path / "config.json", written)
    assert load_run(path).kinds == kinds and "run_dir" in kinds["run"]


def test_a_run_folder_without_the_kinds_of_its_settings_is_refused(tmp_path, capsys):
    path = make_run(tmp_path)
    written = json.loads((path / "config.json").read_text())
    del written["kinds"]
    write_json(path / "config.json", written)
    assert_refused(
        run_collect(capsys, path), 3, path / "config.json", "no 'kinds'", "Run its command again"
    )


def test_runs_on_different_validation_data_are_refused(tmp_path, capsys):
    runs = [
        make_run(tmp_path, 1),
        make_run(tmp_path, 2, manifest={"data": {**DATA, "val_sha256": "e" * 64}}),
    ]
    assert_refused(run_collect(capsys, *runs), 2, "sha256 of the validation data", "eeee")


def test_settings_are_compared_by_value_and_not_by_spelling():
    assert run_records.as_text(True) == run_records.as_text("True")
    assert run_records.as_text([5, 6]) == run_records.as_text("(5, 6)")
    assert run_records.as_text((5,)) == run_records.as_text("(5,)")
    assert run_records.as_text(2.0) == run_records.as_text("2.0") == run_records.as_text(2)
    assert run_records.as_text(1e-08) == run_records.as_text("1e-08") != run_records.as_text(0)
    assert run_records.as_text(0.1) != run_records.as_text(0.15)


# --- unfinished, failed and damaged --------------------------------------------------------------


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, capsys):
    stopped = [
        *events_of(9.9, last=60),
        {"event": "stopped", "signal": "SIGTERM", "phase": "train"},
    ]
    runs = [
        make_run(tmp_path, 1, 1.1),
        make_run(tmp_path, 2, 1.2),
        make_run(tmp_path, 3, finished=False, events=stopped),
        make_run(tmp_path, 4, finished=False, events=events_of(9.9, last=40)),
    ]
    code, out, err = run_collect(capsys, *runs, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(
        r"demo_seed3 .*unfinished .*SIGTERM, phase: train.*last logged step 60/100", out
    )
    assert re.search(r"demo_seed4 .*unfinished .*running or killed \(last logged step 40/100", out)
    assert json.loads((tmp_path / "out" / "submission.json").read_text())[
        "val_bpb"
    ] == pytest.approx(1.15)


def test_scores_of_a_run_that_has_not_finished_do_not_count(tmp_path, capsys):
    partial = make_run(tmp_path, 2, 0.5, scores={"finished": False})
    submission = submission_of(tmp_path, capsys, [make_run(tmp_path, 1, 1.1), partial])
    assert submission["seeds"] == [1]


def test_a_run_that_failed_before_it_began_is_listed(tmp_path, capsys):
    path = tmp_path / "demo_seed3"
    path.mkdir()
    (path / "train.log").write_text("config:preset=demo\nconfig:seed=3\nerror: no shards\n")
    write_events(path / "metrics.jsonl", [{"event": "error", "code": 3, "message": "no shards"}])
    run = load_run(path)
    assert (run.status, run.seed, run.path) == ("failed", 3, path)
    assert "exit code 3: no shards" in run.note


def test_an_audit_without_a_score_is_listed_as_such(tmp_path):
    path = make_run(
        tmp_path, finished=False, events=[{"event": "audit", "passed": True}], audit=True
    )
    assert load_run(path).note == "audited (passed: True), not scored"


def test_no_finished_run_at_all_is_an_error_that_lists_them(tmp_path, capsys):
    path = make_run(tmp_path, finished=False, events=[])
    assert_refused(
        run_collect(capsys, path, "--out", tmp_path / "out"),
        3,
        "none of 1 run(s)",
        path,
        "before the first logged step",
    )
    assert not (tmp_path / "out").exists()


def test_steps_gone_through_twice_count_once_the_last_time(tmp_path):
    again = [
        {"event": "start", "resumed_step": 20},
        {"event": "step", "step": 40, "train_loss": 1.5, "lr_scale": 1.0},
    ]
    run = load_run(make_run(tmp_path, finished=False, events=[*events_of(1.1, last=80), *again]))
    assert run.train_curve == [(20, 3.8), (40, 1.5)]


def test_a_line_torn_by_a_kill_is_forgiven_at_the_end_and_before_a_resume(tmp_path):
    path = make_run(tmp_path, finished=False, events=events_of(1.1, last=40))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert load_run(path).train_curve == [(20, 3.8), (40, 3.6)]
    with open(path / "metrics.jsonl", "a") as file:
        file.write('\n{"event": "start", "resumed_step": 20}\n')
    assert load_run(path).train_curve == [(20, 3.8)]


def test_a_resumed_event_glued_to_a_torn_line_is_read(tmp_path):
    path = make_run(tmp_path, finished=False, events=events_of(1.1, last=40))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"event": "step", "ste{"event": "start", "resumed_step": 20}\n')
    assert load_run(path).train_curve == [(20, 3.8)]


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
    assert_refused(
        run_collect(capsys, tmp_path / "nothing"), 2, tmp_path / "nothing", "no such file"
    )


# --- evaluations of an artifact ------------------------------------------------------------------


def make_pair(tmp_path, seed, sliding, ttt, sha=None):
    """A training run that scored by sliding window, and the EVAL_ONLY run of its artifact that
    adds TTT.
    """
    artifact = {"artifact_sha256": sha or f"{seed:064x}"}
    trained = make_run(
        tmp_path,
        seed,
        config={"ttt_enabled": False},
        manifest=artifact,
        bpbs={ROUNDTRIP: sliding + 0.01, SLIDING: sliding},
    )
    evaluated = make_run(
        tmp_path,
        42,
        name=f"eval_{seed}",
        manifest=artifact,
        audit=True,
        events=[],
        config={"eval_only": "model.int6.ptz", "iterations": 7000, "ttt_enabled": True},
        bpbs={ROUNDTRIP: sliding + 0.01, SLIDING: sliding, "legal_ttt": ttt},
    )
    return [trained, evaluated]


def test_evaluations_add_their_scores_to_the_runs_that_trained_the_artifacts(tmp_path, capsys):
    runs = make_pair(tmp_path, 1, 1.20, 1.10) + make_pair(tmp_path, 2, 1.22, 1.12)
    submission = submission_of(tmp_path, capsys, runs)
    assert submission["score_label"] == "legal_ttt" and submission["val_bpb"] == pytest.approx(1.11)
    assert submission["seeds"] == [1, 2] and submission["compliance"]["audit_passed"] is True
    assert submission["seed_results"]["2"]["steps"] == 100


def test_seeds_evaluated_in_different_ways_are_not_mixed(tmp_path, capsys):
    runs = make_pair(tmp_path, 1, 1.20, 1.10) + make_pair(tmp_path, 2, 1.22, 1.12)[:1]
    assert_refused(
        run_collect(capsys, *runs), 2, "ttt_enabled: True (demo_seed1), False (demo_seed2)"
    )


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
