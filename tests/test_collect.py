"""slurm/collect.py: fake runs in; tables, curves, tests and submission.json out."""

import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
from runs_helpers import (
    ROOT,
    SLIDING,
    assert_refused,
    bpbs_around,
    collect,
    events_of,
    load_run,
    loss_of,
    make_log,
    make_run,
    no_picture,  # noqa: F401
    run_collect,
    run_records,
    submission_of,
    three_runs,
    write_json,
)

pytestmark = pytest.mark.usefixtures("no_picture")
draw_curves = collect.draw_curves  # as it is before the fixture


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- tables and files ----------------------------------------------------------------------------


def test_submission_has_the_fields_of_the_field_and_the_numbers_computed_by_hand(tmp_path, capsys):
    author = ["--author", "Ann", "--date", "2026-01-02"]
    submission = submission_of(tmp_path, capsys, three_runs(tmp_path), *author)
    assert submission["val_bpb"] == pytest.approx(1.12, abs=1e-8)
    assert submission["val_bpb_std"] == pytest.approx(math.sqrt(0.0007), abs=1e-8)
    assert submission["val_loss"] == pytest.approx(loss_of(1.12), abs=1e-8)
    assert submission["seeds"] == [42, 1337, 2025]
    fields = (
        "author github_id name blurb date track val_loss val_bpb val_bpb_std bytes_total "
        "bytes_code seeds seed_results hardware pytorch_version compliance"
    )
    assert not [name for name in fields.split() if submission[name] is None]
    assert submission["seed_results"]["1337"] == {
        "val_bpb": 1.11,
        "val_loss": round(loss_of(1.11), 8),
        "artifact_bytes": 3_001_337,
        "steps": 100,
        "step_avg_ms": 10.12,
        "train_time_s": 101.2,
        "eval_time_s": 30.2,
    }
    assert submission["bytes_total"] == 3_092_025, "the largest seed has to fit, not the smallest"
    assert (submission["github_id"], submission["date"]) == ("Ann", "2026-01-02")
    assert (submission["score_scope"], submission["hardware"]) == ("proxy", "1x cpu")


def test_table_of_seeds_shows_every_evaluation_and_the_means(tmp_path, capsys):
    code, out, _ = run_collect(capsys, *three_runs(tmp_path), "--out", tmp_path)
    header = next(line for line in out.splitlines() if line.startswith("| seed"))
    row = next(line for line in out.splitlines() if line.startswith("| 1337"))
    assert code == 0 and dict(zip(cells(header), cells(row))) == {
        "seed": "1337",
        "steps": "100",
        "ms/step": "10.12",
        "float weights": "1.11200",
        "roundtrip": "1.14000",
        "sliding": "1.12000",
        "TTT": "1.11000",
        "artifact bytes": "3\u202f001\u202f337",
        "total bytes": "3\u202f091\u202f337",
        "train s": "101.2",
        "eval s": "30.2",
    }
    assert "1.12000 ± 0.02646" in out and "1.13000 ± 0.02646" in out
    assert (tmp_path / "results.md").read_text() == out


def test_the_page_marks_proxy_data_and_a_score_without_a_passed_audit(tmp_path, capsys):
    first, second = make_run(tmp_path, 1, audit=True), make_run(tmp_path, 2)
    assert "unaudited" not in run_collect(capsys, first, "--out", tmp_path)[1]
    out = run_collect(capsys, first, second, "--out", tmp_path)[1]
    assert "**unaudited**" in out and "**proxy** data" in out


def test_the_picture_has_both_curves_of_every_run_and_the_warmdown(tmp_path):
    runs = [load_run(path) for path in three_runs(tmp_path)]
    figure = draw_curves(runs, "title", ablation=False)
    loss, bpb = figure.axes
    assert "nats per token" in loss.get_ylabel() and "bits per byte" in bpb.get_ylabel()
    assert [len(axis.get_lines()) for axis in (loss, bpb)] == [3, 3]
    assert list(loss.get_lines()[0].get_xdata()) == [20, 40, 60, 80, 100]
    behind = list(map(tuple, loss.collections[0].get_offsets()))
    assert behind == [(20, 3.8), (40, 3.6), (60, 3.4), (80, 3.2), (100, 3.0)], "the raw points"
    shaded = loss.patches[0].get_bbox()
    assert (shaded.x0, shaded.x1) == (80, 100), "the first logged step at a lowered rate is 80"
    run = runs[0]
    run.train_curve = {step: float(step % 2) for step in range(1, 101)}
    line = draw_curves([run], "title", ablation=False).axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(range(1, 101))
    # The mean of a twentieth of the steps, none of them later
    smooth = line.get_ydata()
    assert smooth[0] == 1.0 and smooth[2] == pytest.approx(2 / 3)
    assert all(0.39 < value < 0.61 for value in smooth[4:])


def test_picture_of_an_ablation_has_one_legend_entry_per_configuration(tmp_path):
    runs = [
        load_run(make_run(tmp_path, seed, name=f"{rate}_{seed}", config={"nfm_loss_weight": rate}))
        for rate in (0.05, 0.1)
        for seed in (1, 2)
    ]
    figure = draw_curves(runs, "title", ablation=True)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["nfm_loss_weight=0.05", "nfm_loss_weight=0.1", "warmdown"]
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_a_closed_output_and_a_terminal_that_lacks_characters_cost_no_file(tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "slurm" / "collect.py")])
    command += " " + shlex.join(map(str, three_runs(tmp_path)))
    for closed in (" >&-", ""):
        done = subprocess.run(
            command + closed,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert "1.12000 ± 0.02646" in (tmp_path / "results.md").read_text(encoding="utf-8")
        assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        (tmp_path / "results.md").unlink()
    assert rb"1.12000 \xb1 0.02646" in done.stdout


def test_one_run_has_no_standard_deviation_and_says_so_once(tmp_path, capsys):
    code, out, err = run_collect(capsys, make_run(tmp_path), "--out", tmp_path / "out")
    assert code == 0 and "one finished run" in err and "±" not in out
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


# --- headline and compliance ---------------------------------------------------------------------


def test_an_illegal_score_is_shown_but_never_becomes_the_headline(tmp_path, capsys):
    bpbs = {**bpbs_around(1.1), "illegal_slot_published": 0.2, "illegal_ttt_slot_published": 0.1}
    code, out, _ = run_collect(capsys, make_run(tmp_path, bpbs=bpbs), "--out", tmp_path)
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert code == 0 and (submission["score_label"], submission["val_bpb"]) == ("legal_ttt", 1.1)
    assert "TTT + SLOT (illegal)" in out and " SLOT (illegal)" in out and "0.20000" in out


def test_a_legal_name_with_an_illegal_mark_is_illegal(tmp_path):
    path = make_log(tmp_path, bpbs={SLIDING: 1.2, "legal_ttt": 1.0})
    path.write_text(re.sub(r"(?m)^(legal_ttt.*)$", r"\1 legality:illegal", path.read_text()))
    run = load_run(path)
    assert run.scores.keys() == {"sliding", "TTT (illegal)"}
    assert collect.choose_headline([run]) == "sliding"


@pytest.mark.parametrize(
    "label, stage",
    [
        ("pre_quant", "float weights"),
        ("float_legal_ttt", "float weights"),
        ("final_int6_roundtrip", "roundtrip"),
        ("final_int6_sliding_window", "sliding"),
        ("slot_causal", "SLOT"),
        ("legal_ttt", "TTT"),
        ("legal_ttt_slot_causal", "TTT + SLOT"),
    ],
)
def test_the_labels_of_train_gpt_have_their_stage(label, stage):
    assert run_records.stage_of(label) == stage


def test_any_legal_score_of_the_artifact_can_be_the_headline_and_no_other(tmp_path, capsys):
    path = make_run(tmp_path, bpbs={**bpbs_around(1.1), "illegal_slot_published": 0.2})
    submission = submission_of(tmp_path, capsys, [path], "--headline", SLIDING)
    assert submission["score_label"] == SLIDING and submission["val_bpb"] == pytest.approx(1.11)
    for label in ("illegal_slot_published", "pre_quant", "nonsense"):
        assert_refused(run_collect(capsys, path, "--headline", label), 2, label, SLIDING)
    none = make_run(tmp_path, name="x", bpbs={"pre_quant": 1.2, "illegal_slot_published": 0.9})
    assert_refused(run_collect(capsys, none), 2, "no legal score")


def test_the_time_of_a_quantiser_that_calibrates_counts_as_training_the_last_time(tmp_path, capsys):
    slow, other = dict(event="packed", with_training_seconds=601.0), dict(event="packed")
    log = make_log(tmp_path)
    quantised = "quantised packings:4 seconds:11.0 with_training:601.0s\nSerialized"
    log.write_text(log.read_text().replace("Serialized", quantised))
    once = make_run(tmp_path, events=[*events_of(1.12), slow])
    again = make_run(tmp_path, events=[*events_of(1.12), slow, other], name="again")
    for path, seconds in ((once, 601.0), (log, 601.0), (again, 101.2)):
        submission = submission_of(tmp_path, capsys, [path])
        assert submission["compliance"]["train_under_600s"] is (seconds < 600)
        assert submission["seed_results"]["42"]["train_time_s"] == seconds


def test_the_audit_lines_of_a_log_back_the_claim(tmp_path, capsys):
    path = make_log(tmp_path)
    text = path.read_text()
    for result, passed in (("pass", True), ("FAIL", False)):
        path.write_text(f"audit {result} 10 checks in 9.5 s\n{text}")
        assert submission_of(tmp_path, capsys, [path])["compliance"]["audit_passed"] is passed


def test_compliance_follows_the_measurements(tmp_path, capsys):
    bad = make_run(
        tmp_path,
        2,
        audit=False,
        manifest={"code_sha256": "f" * 64},
        results={"total_bytes": 16_000_001, "train_time_s": 600.1},
    )
    submission = submission_of(tmp_path, capsys, [make_run(tmp_path, 1, audit=True), bad])
    assert submission["compliance"] == {
        "artifact_under_16mb": False,
        "train_under_600s": False,
        "eval_under_600s": True,
        "audit_passed": False,
        "same_code_all_seeds": False,
        "canonical_validation": False,
        "three_seeds": False,
    }


def test_compliance_claims_only_measured_facts(tmp_path, capsys):
    unknown = dict(results=dict(train_time_s=None), manifest=dict(code_sha256=None))
    runs = [make_run(tmp_path, 1, audit=True), make_run(tmp_path, 2, **unknown)]
    claims = submission_of(tmp_path, capsys, runs)["compliance"]
    assert not {"train_under_600s", "audit_passed", "same_code_all_seeds"} & claims.keys()


# --- significance --------------------------------------------------------------------------------


def test_welch_equals_the_closed_form_and_does_not_pool_the_variances():
    # df = 2 in all, where F(t) = 1/2 + t / (2 sqrt(2 + t²)): two samples of two runs, the better
    # and the worse first, and a baseline without spread, which adds nothing to the error (pooling
    # would give 3 + 10 - 2)
    cases = [
        ((1.110, 0.002, 2), (1.120, 0.002, 2), 0.003, -0.007 / 0.002),
        ((1.120, 0.002, 2), (1.110, 0.002, 2), 0.003, 0.013 / 0.002),
        ((1.11, 0.003, 3), (1.12, 0.0, 10), 0.0, -0.01 / (0.003 / math.sqrt(3))),
    ]
    for ours, base, threshold, expected in cases:
        t, df, p = collect.welch(collect.Sample(*ours), collect.Sample(*base), threshold)
        assert (t, df) == (pytest.approx(expected), pytest.approx(2))
        closed = 0.5 + expected / (2 * math.sqrt(2 + expected**2))
        assert p == pytest.approx(closed, rel=1e-9)


def test_the_default_threshold_is_five_millinats_in_the_runs_own_bytes_per_token(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, 1.1 + seed / 10_000) for seed in (1, 2, 3)]
    test = [*runs, "--baseline", "1.1042,0.0001,3", "--out", tmp_path]
    code, out, err = run_collect(capsys, *test)
    # 0.005 / (ln 2 * 2.4359) = 0.0029613; (1.1002 + 0.0029613 - 1.1042) / sqrt(2e-8 / 3) = -12.721
    assert code == 0 and "0.00500 nats per token = 0.00296 bpb" in out, err
    assert "t = -12.721" in out and "df = 4.000" in out
    claims = json.loads((tmp_path / "submission.json").read_text())["compliance"]
    assert claims["beats_baseline_p_below_0_01"] is True
    _, out, _ = run_collect(capsys, *test, "--threshold-nats", "0.00675")
    assert "0.00675 nats per token = 0.00400 bpb" in out and "NOT significant" in out


def test_baselines_as_numbers_and_submissions_agree(tmp_path, capsys):
    ours = [make_run(tmp_path, seed, 1.10 + seed / 1000, name=f"ours{seed}") for seed in (1, 2, 3)]
    base = [make_run(tmp_path, seed, 1.19 + seed / 100, name=f"base{seed}") for seed in (1, 2, 3)]
    folder = tmp_path / "base"
    assert run_collect(capsys, *base, "--out", folder)[0] == 0
    summary = tmp_path / "summary.json"
    write_json(summary, {"val_bpb": 1.21, "val_bpb_std": 0.01, "seeds": [1, 2, 3]})
    found = set()
    for source in ("1.21,0.01,3", folder / "submission.json", folder, summary):
        code, out, err = run_collect(capsys, *ours, "--baseline", source, "--out", tmp_path)
        assert code == 0, err
        found.add(re.search(r"t = .*", out)[0])
    assert len(found) == 1


@pytest.mark.parametrize(
    "text, code, message",
    [
        ("1.1,0.001", 2, "MEAN,SD,N"),
        ("nan,0.1,3", 2, "MEAN,SD,N"),
        ("1.1,-1,3", 2, "MEAN,SD,N"),
        ("author.json", 3, "no usable scores"),
    ],
)
def test_a_baseline_that_is_neither_scores_nor_numbers_is_refused(
    tmp_path, capsys, text, code, message
):
    runs, out = three_runs(tmp_path), tmp_path / "out"
    write_json(tmp_path / "author.json", {"author": "Ann"})
    refused = run_collect(capsys, *runs, "--baseline", text, "--out", out)
    assert_refused(refused, code, f"--baseline {text}", message)
    assert not out.exists()


def test_a_test_without_two_spreads_is_refused(tmp_path, capsys):
    three, one = three_runs(tmp_path), make_run(tmp_path, 7)
    same = [make_run(tmp_path, seed, 1.1) for seed in (1, 2)]
    for runs, baseline, message in (
        ([one], "1.2,0.01,3", "the runs have 1 "),
        (three, "1.2,0.01,1", "the baseline's have 1 "),
        (same, "1.2,0,3", "both standard deviations are 0"),
    ):
        assert_refused(run_collect(capsys, *runs, "--baseline", baseline), 2, message)


# --- ablation ------------------------------------------------------------------------------------


def test_ablation_has_one_row_per_configuration_and_one_column_per_evaluation(tmp_path, capsys):
    runs = [
        make_run(tmp_path, 1, 1.10, name="a1"),
        make_run(tmp_path, 2, 1.12, name="a2"),
        make_run(tmp_path, 1, 1.15, name="b1", config={"nfm_loss_weight": 0.05}),
        make_run(tmp_path, 1, 1.20, name="c1", config={"nfm_enabled": False}),
        make_run(tmp_path, 1, 1.30, name="d1", config={"ttt_enabled": False}, bpbs={SLIDING: 1.31}),
    ]
    code, out, err = run_collect(capsys, *runs, "--ablation", "--out", tmp_path / "out")
    assert code == 0, err
    assert [cells(line) for line in out.splitlines() if line.startswith("| ")] == [
        ["preset", "nfm_enabled", "nfm_loss_weight", "ttt_enabled", "seeds", "sliding", "TTT"],
        ["demo", "True", "0.1", "True", "1, 2", "1.12000 ± 0.01414", "1.11000 ± 0.01414"],
        ["demo", "True", "0.05", "True", "1", "1.16000", "1.15000"],
        ["demo", "False", "0.1", "True", "1", "1.21000", "1.20000"],
        ["demo", "True", "0.1", "False", "1", "1.31000", "-"],
    ]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["curves.png", "results.md"]
    again = make_run(tmp_path, 1, name="c2", config={"nfm_enabled": False})
    assert_refused(run_collect(capsys, *runs, again, "--ablation"), 2, "two runs of seed 1")


def test_ablation_goes_with_no_option_for_one_configuration(tmp_path, capsys):
    run = make_run(tmp_path)
    for option in (["--check", "x"], ["--baseline", "1,1,2"], ["--headline", SLIDING]):
        assert_refused(run_collect(capsys, run, "--ablation", *option), 2, option[0])


# --- checking an existing submission.json --------------------------------------------------------


def check(tmp_path, capsys, runs, submission):
    write_json(tmp_path / "checked.json", submission)
    return run_collect(capsys, *runs, "--check", tmp_path / "checked.json")


@pytest.fixture
def checked(tmp_path, capsys):
    """(runs, their submission, change(place, value) -> what --check says of the changed file)."""
    runs = three_runs(tmp_path, audit=True)
    submission = submission_of(tmp_path, capsys, runs)

    def change(place, value):
        copy = json.loads(json.dumps(submission))
        *inside, last = place.split(".")
        target = copy
        for name in inside:
            target = target[name]
        target[last] = value
        return check(tmp_path, capsys, runs, copy)

    return runs, submission, change


def test_a_written_submission_passes_its_own_check_and_nothing_is_written(
    tmp_path, capsys, checked
):
    runs, submission, _ = checked
    before = sorted(tmp_path.iterdir())
    code, out, err = check(tmp_path, capsys, runs, submission)
    assert (code, err) == (0, "") and "agrees with 3 run(s)" in out
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "checked.json"])


def test_every_number_of_a_submission_is_checked(checked):
    _, submission, change = checked
    numbers = {
        place: value
        for place, value in collect.flat(submission).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert len(numbers) == 5 + 3 * 7
    for place, value in numbers.items():
        step = 1 if isinstance(value, int) else 1e-4 if "val_" in place else 0.2
        code, _, err = change(place, value + step)
        assert code == 1 and place in err and len(err.splitlines()) == 1, (place, err)


@pytest.mark.parametrize(
    "value, code", [(1.11991, 0), (1.1199, 0), (1.11992, 1), (1, 1), ("1.11991", 1), (math.nan, 1)]
)
def test_a_number_rounded_in_the_file_agrees_but_one_cut_to_nothing_does_not(
    tmp_path, capsys, value, code
):
    runs = [make_run(tmp_path, 1, 1.1199066), make_run(tmp_path, 2, 1.1199068)]
    submission = submission_of(tmp_path, capsys, runs)
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": value})[0] == code


@pytest.mark.parametrize(
    "place, value, word",
    [
        ("compliance.fast", True, "compliance.fast: not backed by these runs"),
        ("compliance.canonical_validation", True, "compliance.canonical_validation"),
        ("score_scope", "canonical", "score_scope"),
        ("seeds", [42, 1337], "seeds"),
        ("hardware", "8xH100", "hardware"),
        ("author", "", "author"),
        ("seed_results", {}, "seed_results.42.val_bpb: missing"),
        ("seed_results.7", {"val_bpb": 1.1}, "seed_results.7.val_bpb: not backed"),
    ],
)
def test_a_claim_the_runs_do_not_back_is_a_difference(checked, place, value, word):
    code, _, err = checked[2](place, value)
    assert code == 1 and word in err


def test_a_claim_that_is_not_made_is_no_difference_but_a_missing_field_is(
    tmp_path, capsys, checked
):
    runs, submission, _ = checked
    del submission["score_label"], submission["compliance"]["three_seeds"]
    submission["seeds"].reverse()
    assert check(tmp_path, capsys, runs, submission)[0] == 0
    del submission["bytes_total"]
    code, _, err = check(tmp_path, capsys, runs, submission)
    assert code == 1 and "bytes_total: missing" in err


def test_check_of_a_missing_or_broken_file_is_one_message(tmp_path, capsys):
    runs = three_runs(tmp_path)
    (tmp_path / "cut.json").write_text('{"author": "An')
    assert_refused(run_collect(capsys, *runs, "--check", "none.json"), 2, "none.json")
    assert_refused(run_collect(capsys, *runs, "--check", "cut.json"), 3, "cut.json", "not JSON")


# --- command line --------------------------------------------------------------------------------


def test_help_explains_every_option_and_the_exit_codes(capsys):
    code, out, _ = run_collect(capsys, "--help")
    words = "--baseline --threshold-nats --ablation --check --out --script"
    assert code == 0 and "Exit codes" in out
    assert not [word for word in words.split() if word not in out]


@pytest.mark.parametrize("option", [["--date", "tomorrow"], ["--threshold-nats", "-1"]])
def test_wrong_use_ends_with_exit_code_2(capsys, option):
    code, _, err = run_collect(capsys, "x", *option)
    assert code == 2 and "usage:" in err
