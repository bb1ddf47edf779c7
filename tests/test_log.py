"""The log is an interface: tools parse its lines byte by byte (docs/REFERENCE.md §9);
metrics.jsonl agrees."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    at_step,
    count,
    events,
    read_json,
    run_main,
    tiny_config,
    train_tokenizer,
)

import train_gpt
from train_gpt import Config

INTEGER, MS, AVERAGE = r"\d+", r"\d+ms", r"\d+\.\d\dms"
LOSS, EXACT, SHA = r"\d+\.\d{4}", r"\d+\.\d{8}", "[0-9a-f]{64}"
CLOCK = f"train_time:{MS} step_avg:{AVERAGE}"
STEPS = 8


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A run with validations, checkpoints, every default score and an audit."""
    changes = dict(
        dtype="float32",
        iterations=STEPS,
        train_log_every=4,
        val_loss_every=3,
        checkpoint_every=5,
        audit=True,
        seed=7,
        eval_batch_seqs=16,
        ttt_chunk_tokens=512,
    )
    finished = run_main(tmp_path_factory.mktemp("log") / "run", **{**tiny_data.settings, **changes})
    assert finished.code == 0, finished.err
    return finished


def only(lines, pattern):
    """The one line that is wholly of `pattern`, as a match."""
    found = [match for match in map(re.compile(pattern).fullmatch, lines) if match]
    assert len(found) == 1, (pattern, [match.string for match in found])
    return found[0]


def starting(lines, start):
    return [line for line in lines if line.startswith(start)]


# --------------------------------------------------------------------------------------------------
# Lines of docs/REFERENCE.md §9
# --------------------------------------------------------------------------------------------------
def test_the_run_introduces_itself(run, tiny_data):
    data, tokenizer = map(re.escape, map(str, (tiny_data.data_path, tiny_data.tokenizer_path)))
    config = Config(**read_json(run.dir / "config.json")["config"])
    assert int(only(run.lines, f"model_params:({INTEGER})")[1]) == count(train_gpt.GPT(config))
    only(run.lines, "world_size:1 grad_accum_steps:2")
    only(run.lines, f"train_loader:dataset:{re.escape(tiny_data.data_path.name)} train_shards:2")
    only(run.lines, rf"val_loader:shards pattern={data}/fineweb_val_\*\.bin tokens:1472")
    only(run.lines, f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={tokenizer}")
    only(run.lines, "seed:7")


def test_a_validation_line_has_the_reference_s_format(run):
    found = [
        re.fullmatch(rf"step:({INTEGER})/{STEPS} val_loss:{LOSS} val_bpb:{LOSS} {CLOCK}", line)
        for line in run.lines
        if re.match(r"step:.* val_loss:", line)
    ]
    assert [int(match[1]) for match in found] == [3, 6, 8]


def test_training_time_only_grows_and_the_average_is_the_time_over_the_steps(run):
    found = re.findall(r"^step:(\d+)/.* train_time:(\d+)ms step_avg:([\d.]+)ms", run.out, re.M)
    clock = [(int(step), int(total)) for step, total, _ in found]
    assert clock == sorted(clock) and len(dict(clock)) == len(set(clock))
    for step, total, average in found:
        assert abs(float(average) * int(step) - int(total)) <= 0.5 + 0.005 * int(step)


def test_the_sizes_are_those_of_the_files_and_of_memory(run):
    code, model, total, room = (
        int(only(run.lines, pattern)[1])
        for pattern in (
            f"Code size: ({INTEGER}) bytes",
            rf"Serialized model int6\+zstd: ({INTEGER}) bytes",
            rf"Total submission size int6\+zstd: ({INTEGER}) bytes",
            f"headroom: ({INTEGER}) bytes",
        )
    )
    assert model == (run.dir / "final_model.int6.ptz").stat().st_size
    assert code == read_json(run.dir / "manifest.json")["code_bytes"]
    assert total == code + model and room == 16_000_000 - total
    scores = read_json(run.dir / "scores.json")
    sizes = [scores[f"{part}_bytes"] for part in ("code", "artifact", "total")]
    assert sizes == [code, model, total]
    saved = only(run.lines, rf"checkpoint_saved step:5 seconds:\d+\.\d\d bytes:({INTEGER})")
    assert int(saved[1]) == (run.dir / "checkpoint" / "step_00000005.pt").stat().st_size
    peak = only(run.lines, f"peak memory allocated: ({INTEGER}) MiB reserved: ({INTEGER}) MiB")
    assert 0 < int(peak[1]) <= int(peak[2])


@pytest.mark.parametrize(
    "label, stride",
    [
        ("pre_quant", ""),
        ("final_int6_roundtrip", ""),
        ("final_int6_sliding_window", "stride:16 "),
        ("legal_ttt", ""),
    ],
)
def test_a_score_has_two_lines_and_its_scope(label, stride, run):
    short = only(run.lines, rf"{label} val_loss:({LOSS}) val_bpb:({LOSS}) {stride}eval_time:{MS}")
    exact = only(run.lines, rf"{label}_exact val_loss:({EXACT}) val_bpb:({EXACT})")
    at = run.lines.index(short.string)
    assert run.lines[at : at + 3] == [short.string, exact.string, "score_scope:proxy"]
    score = run.scores()[label]
    assert exact.groups() == (f"{score['val_loss']:.8f}", f"{score['val_bpb']:.8f}")
    assert short.groups() == (f"{score['val_loss']:.4f}", f"{score['val_bpb']:.4f}")
    bits = score["val_loss"] * score["tokens"] / math.log(2)
    assert score["val_bpb"] == pytest.approx(bits / score["bytes"], rel=1e-12)


def test_an_illegal_score_is_marked_in_every_line_that_reports_it(run, tiny_data):
    """The same artifact scored once more with SLOT=published."""
    done = run_main(
        run.dir.parent / "illegal",
        eval_only=run.dir / "final_model.int6.ptz",
        slot="published",
        device="cpu",
        audit=0,
        **tiny_data.paths,
    )
    assert done.code == 0, done.err
    label, number = "illegal_ttt_slot_published", rf"val_loss:{EXACT} val_bpb:({EXACT})"
    only(done.lines, rf"{label} val_loss:{LOSS} val_bpb:{LOSS} eval_time:{MS} legality:illegal")
    exact = only(done.lines, rf"{label}_exact {number} legality:illegal")[1]
    reporting = [line for line in done.lines if exact in line or f"{float(exact):.4f}" in line]
    assert len(reporting) >= 3 and all("illegal" in line for line in reporting)
    assert not [line for line in run.lines if "illegal" in line]
    # An illegal score is never called the best.
    best = "final_int6_sliding_window"
    assert read_json(done.dir / "scores.json")["headline"] == best
    said = rf"\({best}, legal:unaudited, score_scope:proxy\)"
    bpb = done.scores()[best]["val_bpb"]
    only(done.lines, rf"summary: score  {bpb:.4f} bits per byte {said}")
    assert [event["legal"] for event in events(done.dir, "score")] == [True, True, False]
    assert verdicts(done) == {
        "final_int6_roundtrip": "no_submission",
        "final_int6_sliding_window": "unaudited",
        "illegal_ttt_slot_published": "0",
    }


def verdicts(finished):
    """{label: legality} of the result lines."""
    return {
        line.split()[1]: re.search(r" legal:(\w+) score_scope:proxy dtype:float32$", line)[1]
        for line in starting(finished.lines, "result ")
    }


def test_a_result_line_says_whether_a_score_is_legal_and_why(run):
    assert verdicts(run) == {
        "pre_quant": "no_submission",
        "final_int6_roundtrip": "no_submission",
        "final_int6_sliding_window": "1",
        "legal_ttt": "1",
    }


# --------------------------------------------------------------------------------------------------
# Lines that the reference leaves to us
# --------------------------------------------------------------------------------------------------
def test_every_setting_is_logged_and_what_differs_from_the_preset_is_marked(run):
    stored = read_json(run.dir / "config.json")
    differs, settings = stored["differs"], Config(**stored["config"]).as_dict()
    assert starting(run.lines, "config:") == [
        f"config:{name}={value}{' *' if name in differs else ''}"
        for name, value in settings.items()
    ]
    assert {"seed": 7, "model_dim": 32, "audit": True}.items() <= differs.items()
    assert not {"beta1", "preset", "run_id", "run_dir", "ttt_enabled"} & set(differs)
    only(run.lines, f"config_hash:{stored['hash']}")


def test_the_validation_split_is_fingerprinted(run):
    match = only(
        run.lines,
        rf"data_fingerprint tokens:1473 targets:1472 bytes:({INTEGER}) bytes_per_token:"
        rf"({LOSS}) documents:{INTEGER} sha256:({SHA}) score_scope:proxy",
    )
    data = read_json(run.dir / "manifest.json")["data"]
    assert match.groups() == (
        str(data["val_bytes"]),
        f"{data['val_bytes'] / 1472:.4f}",
        data["val_sha256"],
    )


def test_the_manifest_is_logged_before_training_and_again_with_the_artifact(run, tiny_data):
    before, after = (
        json.loads(line.partition(":")[2]) for line in starting(run.lines, "manifest:")
    )
    assert before == {**after, "artifact_sha256": None, "artifact_bytes": None} != after
    assert after == read_json(run.dir / "manifest.json")
    files = dict(
        artifact=run.dir / "final_model.int6.ptz",
        code=ROOT / "train_gpt.py",
        tokenizer=tiny_data.tokenizer_path,
    )
    for name, path in files.items():
        assert after[f"{name}_sha256"] == train_gpt.sha256_file(path)
    for name in ("artifact", "code"):
        assert after[f"{name}_bytes"] == files[name].stat().st_size
    versions = dict(torch=torch.__version__, numpy=np.__version__, device="cpu", world_size=1)
    assert after.items() >= versions.items() and len(after["config_hash"]) == 16
    token_bytes = train_gpt.TokenBytes(tiny_data.tokenizer_path)
    val = train_gpt.ValidationSet.load(tiny_config(**tiny_data.paths), token_bytes)
    assert after["data"] == dict(train_shards=2, **val.fingerprint)


def test_the_audit_s_checks_are_logged(run):
    checks = read_json(run.dir / "audit.json")["checks"]
    seed, *lines = starting(run.lines, "legality ")
    assert re.fullmatch(rf"legality audit_seed:{INTEGER}\b.*", seed)
    assert [line.split(" ")[1:4] for line in lines] == [
        [*check["name"].split(" "), "pass"] for check in checks
    ]
    assert {check["name"].split()[0] for check in checks} == {"C1", "C2", "C3", "C4", "rule"}


def test_the_phases_come_in_order_and_the_end_names_the_run(run):
    starts = [
        "manifest:",
        "config:preset=",
        "config_hash:",
        "data_fingerprint ",
        "model_params:",
        "step:1/",
        f"step:{STEPS}/",
        "export:",
        "Code size:",
        "legality ",
        "pre_quant ",
        "final_int6_roundtrip ",
        "final_int6_sliding_window ",
        "legal_ttt ",
        "summary:",
        "next:",
        "run_finished ",
    ]
    places = [run.lines.index(starting(run.lines, start)[0]) for start in starts]
    assert places == sorted(places)
    assert run.lines[-1] == f"run_finished {run.dir}" and run.err == ""
    assert (run.dir / "train.log").read_text() == run.out
    assert "\r" not in run.out and "\x1b" not in run.out  # rewriting in place is for terminals
    assert run.lines.count("score_scope:proxy") == 4  # after each score's lines, nowhere else


def test_the_summary_tells_steps_sizes_and_the_best_score(run):
    result = read_json(run.dir / "scores.json")
    model, code, total = (result[f"{part}_bytes"] for part in ("artifact", "code", "total"))
    bpb = result["scores"]["legal_ttt"]["val_bpb"]
    assert (
        result["headline"] == "legal_ttt"
    )  # the strongest evaluation, whether or not it is the lowest
    said = r"\(legal_ttt, legal:1, score_scope:proxy\)"
    only(run.lines, rf"summary: score  {bpb:.4f} bits per byte {said}")
    only(run.lines, rf"summary: scored 1,472 targets in {INTEGER} s")
    only(
        run.lines, rf"summary: size   {model:,} \+ {code:,} of code = {total:,} of 16,000,000 bytes"
    )
    only(run.lines, rf"summary: steps  {STEPS} in {INTEGER} s")
    only(run.lines, f"summary: files  {run.dir}")


# --------------------------------------------------------------------------------------------------
# metrics.jsonl
# --------------------------------------------------------------------------------------------------
FIELDS = {
    "start": {"resumed_step"},
    "step": {"step", "train_loss", "train_time_ms", "lr_scale"},
    "val": {"step", "val_loss", "val_bpb", "train_time_ms"},
    "checkpoint": {"step", "seconds", "bytes"},
    "trained": {"steps", "train_time_s", "step_avg_ms", "peak_mib", "stopped_early"},
    "packed": {"artifact_bytes", "code_bytes", "int5_layers"},
    "score": {"label", "val_loss", "val_bpb", "eval_time_s", "scope", "legal", "audited"},
    "audit": {"passed"},
    "throughput": {"tokens_per_s", "step_median_ms", "step_p95_ms", "peak_share", "flops"},
    "done": set(),
}


def test_the_events_are_the_documented_ones_with_their_fields_in_the_order_of_time(run):
    found = events(run.dir)
    assert {event["event"] for event in found} == set(FIELDS)
    assert all(FIELDS[event["event"]] | {"event", "time"} <= event.keys() for event in found)
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    assert found[0]["event"] == "start" and found[-1]["event"] == "done"


def test_the_events_are_the_lines_of_the_log(run):
    steps, validations = events(run.dir, "step"), events(run.dir, "val")
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))  # every step is an event
    texts = [
        *(f"step:{e['step']}/{STEPS} train_loss:{e['train_loss']:.4f}" for e in steps),
        *(
            f"step:{e['step']}/{STEPS} val_loss:{e['val_loss']:.4f} val_bpb:{e['val_bpb']:.4f}"
            for e in validations
        ),
    ]
    logged = [line.partition(" train_time")[0] for line in starting(run.lines, "step:")]
    assert len(logged) == 9 and set(logged) <= set(texts)
    # Warmdown over the last 3 of 8 steps: 6, 7, 8 run at 3/3, 2/3, 1/3.
    expected = [1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]
    assert [e["lr_scale"] for e in steps] == pytest.approx(expected)
    for event in events(run.dir, "score"):
        assert event.items() >= run.scores()[event["label"]].items()


# --------------------------------------------------------------------------------------------------
# The clock
# --------------------------------------------------------------------------------------------------
def test_training_stops_before_the_step_that_would_pass_the_cap(children):
    """Steps of 0.1 s at least under a cap of 1.5 s."""
    run_dir, cap = children.new("capped"), 1.5
    changes = dict(iterations=40, warmdown_iters=10, val_loss_every=2, checkpoint_seconds=0)
    patch = at_step("step", "time.sleep(0.1)")
    group = children.finish(run_dir, patch=patch, max_wallclock_seconds=cap, **changes)
    lines = group.stdout().splitlines()
    pattern = f"stopping_early: wallclock_cap train_time:({INTEGER})ms step:({INTEGER})/40"
    match = only(lines, pattern)
    seconds, steps = int(match[1]) / 1000, int(match[2])
    clock = np.array([event["train_time_ms"] / 1000 for event in events(run_dir, "step")])
    # A last step that a busy machine made longer than the others may pass the cap.
    *others, last = np.diff(clock[:steps], prepend=0)
    assert 4 <= steps <= 14 and 0.1 * steps <= seconds <= cap + max(0, last - np.mean(others))
    assert seconds * (1 + 3 / steps) > cap, "the next step would have fitted"
    (trained,) = events(run_dir, "trained")
    assert trained["stopped_early"] and trained["steps"] == steps
    only(lines, f"step:{steps}/40 val_loss:{LOSS} val_bpb:{LOSS} {CLOCK}")
    scales = [event["lr_scale"] for event in events(run_dir, "step")]
    assert scales[0] == 1 and scales == sorted(scales, reverse=True) and 0 < scales[-1] < 0.5


def test_a_long_evaluation_logs_its_rate_and_what_is_left(children, whole):
    group = children.finish(children.unscored(whole), patch="train_gpt.LOG_SECONDS = 0")
    lines = starting(group.stdout().splitlines(), "final_int6_sliding_window_progress ")
    pattern = (
        rf"final_int6_sliding_window_progress (\d+)/(\d+) tokens:(\d+) running_bpb:{LOSS} eta:\d+s"
    )
    found = [[int(n) for n in re.fullmatch(pattern, line).groups()] for line in lines]
    assert len(found) > 3 and found == sorted(found)
    assert all(done <= total for done, total, _ in found)


@pytest.mark.parametrize("quantizer", ["lite", "gptq"])
def test_rounding_in_training_to_another_grid_than_the_file_s_is_said(trainer, quantizer, capsys):
    made = trainer(late_qat_threshold=0.5, quantizer=quantizer)
    made.announce()
    said = "training rounds to the steps of QUANTIZER=lite" in capsys.readouterr().out
    assert said is (quantizer == "gptq")


def test_a_tokenizer_that_did_not_make_the_shards_is_warned_about(tiny_data, tmp_path):
    path = tmp_path / "other.model"
    train_tokenizer([(ROOT / "train_gpt.py").read_text()], path)
    config = tiny_config(data_path=str(tiny_data.data_path), tokenizer_path=str(path))
    val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    (warning,) = val.warnings(config)
    assert warning.startswith(f"warning: TOKENIZER_PATH={path} does not seem to have made ")
