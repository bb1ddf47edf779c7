"""slurm/collect.py: fake run directories and logs in, tables, tests and submission.json out."""

import json
import math
import re

import pytest
from runs_helpers import (
    DATA,
    SLIDING,
    assert_refused,
    bpbs_around,
    collect,
    curves,
    events_of,
    load_run,
    log_lines,
    loss_of,
    make_log,
    make_run,
    run_collect,
    significance,
    submission_of,
    three_runs,
    write_json,
)


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch, tmp_path):
    """Drawing takes most of the time of a call, and only the tests of the picture need it."""
    monkeypatch.chdir(tmp_path)  # where a call without --out would write
    if "picture" not in request.node.name:
        monkeypatch.setattr(collect, "draw_curves", lambda runs, title, ablation: b"picture")


# --- tables and files ----------------------------------------------------------------------------


def test_mean_and_standard_deviation_are_those_computed_by_hand(tmp_path, capsys):
    submission = submission_of(tmp_path, capsys, three_runs(tmp_path))
    assert submission["val_bpb"] == pytest.approx(1.12, abs=1e-8)
    assert submission["val_bpb_std"] == pytest.approx(math.sqrt(0.0007), abs=1e-8)
    assert submission["val_loss"] == pytest.approx(loss_of(1.12), abs=1e-8)
    assert submission["seeds"] == [42, 1337, 2025]


def test_submission_has_the_fields_of_the_field_and_one_result_per_seed(tmp_path, capsys):
    submission = submission_of(
        tmp_path, capsys, three_runs(tmp_path), "--author", "Ann", "--date", "2026-01-02"
    )
    for name in [
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "val_loss",
        "val_bpb",
        "val_bpb_std",
        "bytes_total",
        "bytes_code",
        "seeds",
        "seed_results",
        "hardware",
        "pytorch_version",
        "compliance",
    ]:
        assert submission[name] is not None, name
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
    assert (submission["author"], submission["github_id"], submission["date"]) == (
        "Ann",
        "Ann",
        "2026-01-02",
    )
    assert submission["score_scope"] == "proxy"


def test_table_of_seeds_shows_every_evaluation_and_the_means(tmp_path, capsys):
    code, out, _ = run_collect(capsys, *three_runs(tmp_path), "--out", tmp_path)
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("| seed"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "seed",
        "steps",
        "ms/step",
        "float weights",
        "roundtrip",
        "sliding",
        "TTT",
        "artifact bytes",
        "total bytes",
        "train s",
        "eval s",
    ]
    row = next(line for line in out.splitlines() if line.startswith("| 1337"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "1337",
        "100",
        "10.12",
        "1.11200",
        "1.14000",
        "1.12000",
        "1.11000",
        "3\u202f001\u202f337",
        "3\u202f091\u202f337",
        "101.2",
        "30.2",
    ]
    assert "1.12000 ± 0.02646" in out and "1.13000 ± 0.02646" in out
    assert (tmp_path / "results.md").read_text() == out


def test_curves_are_a_picture_with_both_panels_and_the_warmdown(tmp_path, capsys, monkeypatch):
    figures = []
    close = curves.plt.close
    monkeypatch.setattr(curves.plt, "close", lambda figure: (figures.append(figure), close(figure)))
    submission_of(tmp_path, capsys, three_runs(tmp_path))
    assert (tmp_path / "out" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = figures
    loss, bpb = figure.axes
    assert "nats per token" in loss.get_ylabel() and "bits per byte" in bpb.get_ylabel()
    assert [len(axis.get_lines()) for axis in (loss, bpb)] == [3, 3]
    assert list(loss.get_lines()[0].get_xdata()) == [20, 40, 60, 80, 100]
    behind = [list(map(tuple, points.get_offsets())) for points in loss.collections]
    assert behind[0] == [(20, 3.8), (40, 3.6), (60, 3.4), (80, 3.2), (100, 3.0)], "the raw points"
    shaded = loss.patches[0].get_bbox()
    assert (shaded.x0, shaded.x1) == (80, 100), "the first logged step at a lowered rate is 80"


def test_the_running_mean_smooths_a_twentieth_of_the_steps_and_knows_no_later_one():
    curve = [(step, float(step % 2)) for step in range(1, 101)]
    smooth = curves.running_mean(curve)
    assert (
        list(smooth.index) == list(range(1, 101))
        and smooth[1] == 1.0
        and smooth[3] == pytest.approx(2 / 3)
    )
    assert smooth[5:].between(0.4, 0.6).all()


def test_picture_of_an_ablation_has_one_legend_entry_per_configuration(
    tmp_path, capsys, monkeypatch
):
    figures = []
    monkeypatch.setattr(curves.plt, "close", figures.append)
    runs = [
        make_run(tmp_path, seed, name=f"{weight}_{seed}", config={"nfm_loss_weight": weight})
        for weight in (0.05, 0.1)
        for seed in (1, 2)
    ]
    assert run_collect(capsys, *runs, "--ablation", "--out", tmp_path / "out")[0] == 0
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["nfm_loss_weight=0.05", "nfm_loss_weight=0.1", "warmdown"]
    colours = [line.get_color() for line in figures[0].axes[0].get_lines()]
    assert colours[0] == colours[1] != colours[2] == colours[3]


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
    bpbs = {SLIDING: 1.2, "legal_ttt": 1.0}
    path = make_log(tmp_path, bpbs=bpbs)
    path.write_text(re.sub(r"(?m)^(legal_ttt.*)$", r"\1 legality:illegal", path.read_text()))
    run = load_run(path)
    assert not run.scores["TTT (illegal)"].legal and run.scores["sliding"].legal
    assert significance.choose_headline([run], None) == "sliding"


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
    assert submission["compliance"] == {
        "artifact_under_16mb": True,
        "train_under_600s": True,
        "eval_under_600s": True,
        "three_seeds": False,
    }


def test_the_time_of_a_quantiser_that_calibrates_counts_as_training(tmp_path, capsys):
    packed = dict(event="packed", quantiser_seconds=11.0, with_training_seconds=601.0)
    times = dict(scores={"train_time_s": 590.0}, events=[*events_of(1.12), packed])
    folder = make_run(tmp_path, **times)
    log = make_log(tmp_path, ours=True)
    log.write_text(log.read_text() + "quantised packings:4 seconds:11.0 with_training:601.0s\n")
    for path in (folder, log):
        submission = submission_of(tmp_path, capsys, [path])
        assert submission["compliance"]["train_under_600s"] is False
        assert submission["seed_results"]["42"]["train_time_s"] == 601.0


def test_the_audit_lines_of_a_log_back_the_claim(tmp_path, capsys):
    path = make_log(tmp_path, ours=True)
    for result, passed in (("pass", True), ("FAIL", False)):
        path.write_text(
            "\n".join([*log_lines(ours=True), f"audit {result} 10 checks in 9.5 s"]) + "\n"
        )
        assert submission_of(tmp_path, capsys, [path])["compliance"]["audit_passed"] is passed


def test_compliance_follows_the_measurements(tmp_path, capsys):
    bad = make_run(
        tmp_path,
        2,
        audit=False,
        manifest={"code_sha256": "f" * 64},
        scores={"total_bytes": 16_000_001, "train_time_s": 600.1},
    )
    assert submission_of(tmp_path, capsys, [make_run(tmp_path, 1, audit=True), bad])[
        "compliance"
    ] == {
        "artifact_under_16mb": False,
        "train_under_600s": False,
        "eval_under_600s": True,
        "audit_passed": False,
        "same_code_all_seeds": False,
        "canonical_validation": False,
        "three_seeds": False,
    }


def test_an_audit_of_some_of_the_seeds_is_no_passed_audit(tmp_path, capsys):
    some = [make_run(tmp_path, 1, audit=True), make_run(tmp_path, 2)]
    assert "audit_passed" not in submission_of(tmp_path, capsys, some)["compliance"]
    both = [some[0], make_run(tmp_path, 3, audit=True)]
    assert submission_of(tmp_path, capsys, both)["compliance"]["audit_passed"] is True


# --- significance --------------------------------------------------------------------------------


def test_welch_equals_the_closed_form_for_two_degrees_of_freedom():
    # Two samples of two runs with the same sd have df = 2, where F(t) = 1/2 + t / (2 sqrt(2 + t²)).
    ours, base = significance.Sample(1.110, 0.002, 2), significance.Sample(1.120, 0.002, 2)
    t, df, p = significance.welch(ours, base, 0.003)
    expected_t = (1.113 - 1.120) / math.sqrt(2 * 0.002**2 / 2)
    assert (t, df) == (pytest.approx(expected_t), pytest.approx(2))
    assert p == pytest.approx(0.5 + expected_t / (2 * math.sqrt(2 + expected_t**2)), rel=1e-9)


def test_welch_does_not_pool_the_variances():
    # A baseline without spread adds nothing to the error: df = 3 - 1 = 2, pooling would give 3 +
    # 10 - 2.
    t, df, p = significance.welch(
        significance.Sample(1.11, 0.003, 3), significance.Sample(1.12, 0.0, 10), 0.0
    )
    expected_t = -0.01 / (0.003 / math.sqrt(3))
    assert (t, df) == (pytest.approx(expected_t), pytest.approx(2))
    assert p == pytest.approx(0.5 + expected_t / (2 * math.sqrt(2 + expected_t**2)), rel=1e-9)


@pytest.mark.parametrize(
    "critical, p", [(2.131847, 0.05), (2.776445, 0.025), (3.746947, 0.01), (4.604095, 0.005)]
)
def test_welch_equals_the_printed_t_table_at_four_degrees_of_freedom(critical, p):
    sd = 0.0015
    ours, base = (
        significance.Sample(1.11, sd, 3),
        significance.Sample(1.11 + critical * sd * math.sqrt(2 / 3), sd, 3),
    )
    assert significance.welch(ours, base, 0.0)[1:] == (pytest.approx(4), pytest.approx(p, rel=1e-5))


def test_welch_degrees_of_freedom_are_welchs_when_the_spreads_differ():
    # a = 0.003²/3 = 3e-6, b = 0.001²/5 = 2e-7: df = (3.2e-6)² / (9e-12/2 + 4e-14/4) = 1.024e-11 /
    # 4.51e-12
    _, df, _ = significance.welch(
        significance.Sample(1.1, 0.003, 3), significance.Sample(1.2, 0.001, 5), 0.0
    )
    assert df == pytest.approx(1.024e-11 / 4.51e-12)


def test_a_worse_mean_is_never_significant():
    better, worse = significance.Sample(1.10, 0.001, 3), significance.Sample(1.12, 0.001, 3)
    assert (
        significance.welch(better, worse, 0.0)[2]
        < 0.01
        < 0.99
        < significance.welch(worse, better, 0.0)[2]
    )


def test_the_default_threshold_is_five_millinats_in_the_runs_own_bytes_per_token(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, 1.1 + seed / 10_000) for seed in (1, 2, 3)]
    code, out, err = run_collect(capsys, *runs, "--baseline", "1.1042,0.0001,3", "--out", tmp_path)
    assert code == 0, err
    # 0.005 / (ln 2 * 2.4359) = 0.0029613; (1.1002 + 0.0029613 - 1.1042) / sqrt(2e-8 / 3) = -12.721
    assert (
        "0.00500 nats per token = 0.00296 bpb" in out
        and "t = -12.721" in out
        and "df = 4.000" in out
    )
    assert json.loads((tmp_path / "submission.json").read_text())["compliance"][
        "beats_baseline_p_below_0_01"
    ]
    _, out, _ = run_collect(
        capsys,
        *runs,
        "--baseline",
        "1.1042,0.0001,3",
        "--threshold-bpb",
        "0.004",
        "--out",
        tmp_path,
    )
    assert "0.00675 nats per token = 0.00400 bpb" in out and "NOT significant" in out


def test_baselines_as_numbers_submission_logs_and_directories_agree(tmp_path, capsys):
    ours = [make_run(tmp_path, seed, 1.10 + seed / 1000, name=f"ours{seed}") for seed in (1, 2, 3)]
    base_bpbs = {1: 1.20, 2: 1.21, 3: 1.22}  # sd 0.01
    logs = [make_log(tmp_path, seed, bpb, ours=True) for seed, bpb in base_bpbs.items()]
    directories = [
        make_run(tmp_path, seed, bpb, name=f"base{seed}") for seed, bpb in base_bpbs.items()
    ]
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


@pytest.mark.parametrize(
    "text", ["missing.json", "1.1,0.001", "1.1,x,3", "nan,0.1,3", "1.1,-1,3", "1.1,0.1,3,4"]
)
def test_a_baseline_that_is_neither_file_nor_numbers_is_refused(tmp_path, capsys, text):
    runs = three_runs(tmp_path)
    assert_refused(
        run_collect(capsys, *runs, "--baseline", text, "--out", tmp_path / "out"),
        2,
        f"--baseline {text}",
        "MEAN,SD,N",
    )
    assert not (tmp_path / "out").exists()


def test_the_standard_deviation_of_a_single_run_is_refused_for_the_test(tmp_path, capsys):
    one, three = make_run(tmp_path, 7), three_runs(tmp_path)
    assert_refused(
        run_collect(capsys, one, "--baseline", "1.2,0.01,3"), 2, "the runs have 1 ", "2 seeds"
    )
    assert_refused(
        run_collect(capsys, *three, "--baseline", "1.2,0.01,1"), 2, "the baseline's have 1 "
    )
    assert_refused(run_collect(capsys, *three, "--baseline", one), 2, "the baseline's have 1 ")


def test_samples_without_any_spread_are_refused_for_the_test(tmp_path, capsys):
    runs = [make_run(tmp_path, seed, 1.1) for seed in (1, 2)]
    assert_refused(
        run_collect(capsys, *runs, "--baseline", "1.2,0,3"), 2, "both standard deviations are 0"
    )


def test_a_baseline_file_without_scores_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    write_json(path, {"author": "Ann"})
    result = run_collect(capsys, *three_runs(tmp_path), "--baseline", path)
    assert_refused(result, 3, path, "no usable scores")


def test_a_baseline_on_other_data_is_refused(tmp_path, capsys):
    base = [
        make_run(
            tmp_path, seed, 1.2 + seed / 100, manifest={"data": {**DATA, "val_sha256": "e" * 64}}
        )
        for seed in (1, 2)
    ]
    options = [item for path in base for item in ("--baseline", path)]
    assert_refused(run_collect(capsys, *three_runs(tmp_path), *options), 2, "validation data")


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
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows == [
        ["preset", "nfm_enabled", "nfm_loss_weight", "ttt_enabled", "seeds", "sliding", "TTT"],
        ["demo", "True", "0.1", "True", "1, 2", "1.12000 ± 0.01414", "1.11000 ± 0.01414"],
        ["demo", "True", "0.05", "True", "1", "1.16000", "1.15000"],
        ["demo", "False", "0.1", "True", "1", "1.21000", "1.20000"],
        ["demo", "True", "0.1", "False", "1", "1.31000", "-"],
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.png",
        "results.md",
    ]


def test_two_runs_of_one_seed_are_refused_within_a_row_of_an_ablation(tmp_path, capsys):
    runs = [make_run(tmp_path, 1, name=name) for name in "ab"] + [
        make_run(tmp_path, 1, name="c", config={"nfm_enabled": False})
    ]
    assert_refused(run_collect(capsys, *runs, "--ablation"), 2, "two runs of seed 1")


@pytest.mark.parametrize(
    "option", [["--check", "x"], ["--baseline", "1,1,2"], ["--headline", SLIDING]]
)
def test_ablation_goes_with_no_option_for_one_configuration(tmp_path, capsys, option):
    assert_refused(run_collect(capsys, make_run(tmp_path), "--ablation", *option), 2, option[0])


# --- checking an existing submission.json --------------------------------------------------------


def numbers_in(data, path=()):
    """Every (path, number) in nested objects and lists."""
    items = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
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
    assert (
        check(tmp_path, capsys, runs, {**submission, "val_bpb": 1.11990})[0] == 0
    )  # in JSON 1.1199
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1.11992})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": 1})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": "1.11991"})[0] == 1
    assert check(tmp_path, capsys, runs, {**submission, "val_bpb": math.nan})[0] == 1


@pytest.mark.parametrize(
    "change, word",
    [
        (
            {"compliance": {"audit_passed": True}},
            "compliance.audit_passed: not backed by these runs",
        ),
        ({"compliance": {"canonical_validation": True}}, "compliance.canonical_validation"),
        ({"score_scope": "canonical"}, "score_scope"),
        ({"seeds": [42, 1337]}, "seeds"),
        ({"hardware": "8xH100"}, "hardware"),
        ({"author": ""}, "author"),
        ({"seed_results": {}}, "seed_results.42: missing"),
    ],
)
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
    assert_refused(
        run_collect(capsys, *runs, "--check", tmp_path / "none.json"), 2, tmp_path / "none.json"
    )
    (tmp_path / "cut.json").write_text('{"author": "An')
    assert_refused(
        run_collect(capsys, *runs, "--check", tmp_path / "cut.json"), 3, "cut.json", "not JSON"
    )


def test_check_writes_nothing(tmp_path, capsys, monkeypatch):
    runs = three_runs(tmp_path)
    submission = submission_of(tmp_path, capsys, runs)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check(tmp_path, capsys, runs, submission)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- command line --------------------------------------------------------------------------------


def test_help_explains_every_option_and_the_exit_codes(capsys):
    code, out, _ = run_collect(capsys, "--help")
    assert code == 0
    for word in (
        "--baseline",
        "--threshold-nats",
        "--threshold-bpb",
        "--ablation",
        "--check",
        "--out",
        "Exit codes",
    ):
        assert word in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--nonsense"],
        ["x", "--date", "tomorrow"],
        ["x", "--threshold-nats", "-1"],
        ["x", "--threshold-nats", "1", "--threshold-bpb", "1"],
    ],
)
def test_wrong_use_ends_with_exit_code_2(capsys, arguments):
    code, _, err = run_collect(capsys, *arguments)
    assert code == 2 and "usage:" in err
