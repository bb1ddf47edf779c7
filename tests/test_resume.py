"""A run that is killed, stopped or repeated ends with the weights and scores of a whole one.

Runs here are real processes, killed for real, but forked from a server that has imported PyTorch: a
start costs 0.1 s instead of 3.
"""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    AT_WRITE,
    ROOT,
    at_step,
    json_lines,
    kill_tree,
    launch,
    log_of,
    outcome,
    read_json,
    steps_of,
    tiny_config,
    torchrun,
)

import train_gpt

LONGER = dict(iterations=36, warmdown_iters=12, checkpoint_every=3)


def killed_and_resumed(children, run_dir, at, **changes):
    """Kill a run at a durable write; returns the output of the same command run again."""
    assert children.start(run_dir, patch=AT_WRITE, at=at, **changes).wait() == [-9]
    return children.finish(run_dir, **changes).stdout()


def killed_after(children, run_dir, seconds, ranks=1, **changes):
    """Kill a run (all ranks) `seconds` after its start; returns the output of the same command run
    again."""
    group = children.start(run_dir, ranks, **changes)
    if group.wait(seconds) is None:
        group.kill()
        group.wait()
    return children.finish(run_dir, ranks, **changes).stdout()


@pytest.mark.parametrize(
    "at, resumed",
    [
        ("step_ 5 half", r"^resumed_from:\S+step_00000008.pt step:8$"),
        ("final_model.int6 1 whole", r"^phase_done:train "),
        ("eval_legal_ttt 8 named", r"^resumed_evaluation legal_ttt item:8/\d\d$"),
    ],
)
def test_a_run_killed_in_a_write_ends_like_an_uninterrupted_one(children, whole, at, resumed):
    run_dir = children.new("killed")
    assert re.search(resumed, killed_and_resumed(children, run_dir, at), re.M)
    assert outcome(run_dir) == outcome(whole)
    assert not list(run_dir.rglob("*.tmp")), "a killed write left its temporary file behind"


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(children):
    seed, begin = random.randrange(1 << 30), time.monotonic()
    draw, reference = random.Random(seed), children.new("reference")
    children.finish(reference, **LONGER)
    duration, writes = (
        time.monotonic() - begin,
        12 + len(log_of(reference).split("evaluation_saved")),
    )
    for i in range(20):
        run_dir = children.new("killed")
        if i % 2:
            killed_after(children, run_dir, draw.uniform(0.2, duration), **LONGER)
        else:
            at = f"* {draw.randint(1, writes)} {draw.choice(['half', 'whole', 'named'])}"
            killed_and_resumed(children, run_dir, at, **LONGER)
        assert outcome(run_dir) == outcome(reference), f"kill {i}, random.Random({seed})"


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_ends_the_same(children, whole):
    """Each attempt gets two checkpoints further."""
    run_dir = children.new("chain")
    for _ in range(3):
        assert children.start(run_dir, patch=AT_WRITE, at="step_ 2 named").wait() == [-9]
    children.finish(run_dir)
    assert outcome(run_dir) == outcome(whole)
    assert re.findall(r"^resumed_from:.* step:(\d+)$", log_of(run_dir), re.M) == ["4", "8", "12"]


@pytest.mark.parametrize(
    "at, resumed",
    [
        ("step_ 4 hold", "resumed_from:"),
        ("eval_legal_ttt 5 hold", "resumed_evaluation legal_ttt item:5/"),
    ],
)
def test_two_ranks_killed_together_end_like_uninterrupted_ones(children, whole_two, at, resumed):
    run_dir = children.unscored(whole_two) if at.startswith("eval") else children.new("killed_two")
    group = children.start(run_dir, ranks=2, patch=AT_WRITE, at=at)
    assert group.until(Path(f"{run_dir}.held").exists)
    group.kill()
    assert group.wait() == [-9, -9]
    assert resumed in children.finish(run_dir, ranks=2).stdout()
    assert outcome(run_dir) == outcome(whole_two)


@pytest.mark.slow
def test_random_kills_of_two_ranks_change_nothing(children):
    seed, begin = random.randrange(1 << 30), time.monotonic()
    draw, reference = random.Random(seed), children.new("reference_two")
    children.finish(reference, ranks=2, **LONGER)
    duration = time.monotonic() - begin
    for i in range(8):
        run_dir = children.new("killed_two")
        killed_after(children, run_dir, draw.uniform(0.3, duration), ranks=2, **LONGER)
        assert outcome(run_dir) == outcome(reference), f"kill {i}, random.Random({seed})"


@pytest.mark.slow
def test_a_killed_torchrun_group_ends_like_an_uninterrupted_one(children):
    run_dir, reference = children.new("torchrun"), children.new("reference_two")
    children.finish(reference, ranks=2, **LONGER)
    settings = children.settings(run_dir, **LONGER)
    for step in (5, 14):
        process = torchrun(settings, ROOT / "train_gpt.py")
        while max(steps_of(run_dir), default=0) < step:
            assert process.poll() is None
            time.sleep(0.002)
        kill_tree(process)
    done = launch(settings, children.folder, ranks=2)
    assert done.returncode == 0, done.stderr
    assert outcome(run_dir) == outcome(reference)


# Checkpoints
# ------------------------------------------------------------------------------------------------
def test_the_last_two_checkpoints_are_kept(whole):
    kept = sorted(path.name for path in (whole / "checkpoint").glob("step_*"))
    assert kept == ["step_00000010.pt", "step_00000012.pt"]


def test_a_checkpoint_loads_without_running_code_and_says_what_it_is(whole):
    state = torch.load(whole / "checkpoint" / "step_00000012.pt", weights_only=True)
    assert state["step"] == 12 and state["seconds"] > 0
    assert state["identity"]["iterations"] == 12 and "eval_stride" not in state["identity"]


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    older, newest = sorted((run_dir / "checkpoint").glob("step_*.pt"))
    blob = bytearray(newest.read_bytes())
    blob[len(blob) // 2] ^= 1
    newest.write_bytes(blob)
    output = children.finish(run_dir).stdout()
    assert re.search(rf"warning: .*{newest.name}", output)
    assert f"resumed_from:{older}" in output
    assert outcome(run_dir) == outcome(whole)


@pytest.mark.slow
def test_a_run_without_any_readable_checkpoint_starts_again(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    for path in (run_dir / "checkpoint").glob("step_*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    output = children.finish(run_dir).stdout()
    assert output.count("warning:") == 2 and "resumed_from:" not in output
    assert outcome(run_dir) == outcome(whole)


def test_a_damaged_state_of_an_evaluation_gives_way_to_the_one_before_it(children, whole):
    run_dir = children.copy(whole)
    (run_dir / "scores.json").unlink()
    before, last = sorted((run_dir / "checkpoint").glob("eval_legal_ttt_*.pt"))
    last.write_bytes(last.read_bytes()[:-100])
    output = children.finish(run_dir).stdout()
    assert f"warning: {last}" in output
    assert f"resumed_evaluation legal_ttt item:{int(before.stem[-8:])}/" in output
    assert outcome(run_dir) == outcome(whole)


@pytest.mark.parametrize("damage", ["cut", pytest.param("foreign", marks=pytest.mark.slow)])
def test_an_unusable_state_of_an_evaluation_is_not_used(children, whole, damage):
    run_dir = children.copy(whole)
    (run_dir / "scores.json").unlink()
    states = sorted((run_dir / "checkpoint").glob("eval_legal_ttt_*.pt"))
    assert len(states) == 2
    for state in states:
        if damage == "cut":
            state.write_bytes(state.read_bytes()[:-100])
        else:
            foreign = sorted((run_dir / "checkpoint").glob("eval_final_int6_sliding_window_*.pt"))[
                -1
            ]
            shutil.copy(foreign, state)
    output = children.finish(run_dir).stdout()
    assert re.search(r"warning: .*eval_legal_ttt_\d+\.pt", output)
    assert "resumed_evaluation legal_ttt" not in output
    assert outcome(run_dir) == outcome(whole)


def test_time_already_spent_counts_towards_the_wallclock_cap(children):
    run_dir = children.new("capped")
    stop = at_step(4, "os.kill(os.getpid(), 15)")
    children.finish(run_dir, code=75, patch=stop, max_wallclock_seconds=1000)
    newest = sorted((run_dir / "checkpoint").glob("step_*.pt"))[-1]
    state = train_gpt.load_tensors(newest)
    train_gpt.save_tensors(newest, {**state, "seconds": 999.9})
    output = children.finish(run_dir, max_wallclock_seconds=1000).stdout()
    assert f"stopping_early: wallclock_cap train_time:999900ms step:{state['step']}/12" in output
    results = read_json(run_dir / "scores.json")
    assert (
        results["stopped_early"]
        and results["steps"] == state["step"]
        and results["train_time_s"] == 999.9
    )


# Logs ---------------------------------------------------------------------------------------------
# ----------
CUT = {"train.log": "step:7/12 train_lo", "metrics.jsonl": '{"event": "step", "st'}


@pytest.fixture(scope="module")
def resumed(children, stopped):
    """A run that was stopped, whose logs then lost the end of a line, then finished."""
    run_dir = children.copy(stopped[0])
    for name, text in CUT.items():
        with open(run_dir / name, "a") as file:
            file.write(text)
    return run_dir, children.finish(run_dir, resume="must").stdout()


def test_logs_append_and_stay_parseable_after_a_cut_last_line(resumed, stopped):
    run_dir, log = resumed[0], log_of(resumed[0])
    assert log.startswith(log_of(stopped[0]) + CUT["train.log"] + "\n")
    found, bad = json_lines(run_dir)
    assert bad == 1 and found[-1]["event"] == "done"
    last = {e["step"]: e["train_loss"] for e in found if e["event"] == "step"}
    assert sorted(last) == list(range(1, 13))
    clock = r"train_time:\d+ms step_avg:\d+\.\d\dms tokens_per_s:\d+"
    line = rf"^step:(\d+)/12 train_loss:\d+\.\d{{4}} {clock}$"
    assert set(map(int, re.findall(line, log, re.M))) == set(last)


def test_the_start_event_tells_the_step_it_resumed_from(resumed):
    starts = [e["resumed_step"] for e in json_lines(resumed[0])[0] if e["event"] == "start"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 6


# Signals and time limits
# ------------------------------------------------------------------------------------
def check_stopped(run_dir, output, *names):
    """One line, one event as the last, and the file, all of a stop by one of `names`."""
    lines = re.findall(r"^stopped signal:(\w+)", output, re.M)
    last = json_lines(run_dir)[0][-1]
    assert len(lines) == 1 and lines[0] in names
    assert last["event"] == "stopped" and last["signal"] == lines[0]
    assert (run_dir / "STOPPED").exists()


def test_a_signal_stops_with_one_line_and_one_save(stopped):
    run_dir, output = stopped
    check_stopped(run_dir, output, "SIGUSR1")
    step = int(re.search(r"phase:in training after step (\d+)/12", output).group(1))
    assert (
        step == max(steps_of(run_dir)) and (run_dir / "checkpoint" / f"step_{step:08d}.pt").exists()
    )
    assert output.count(f"checkpoint_saved step:{step} ") == 1, (
        "saving twice wastes the time that is left"
    )


def test_a_stopped_run_resumes_and_ends_like_an_uninterrupted_one(resumed, whole):
    run_dir, output = resumed
    assert f"resumed_from:{run_dir}" in output
    assert not (run_dir / "STOPPED").exists()
    assert outcome(run_dir) == outcome(whole)


def test_sigterm_stops_an_evaluation_and_a_rerun_finishes_it(children, whole):
    run_dir = children.unscored(whole)
    group = children.finish(
        run_dir, code=75, patch=AT_WRITE, at=f"eval_legal_ttt 4 {int(signal.SIGTERM)}"
    )
    check_stopped(run_dir, group.stdout(), "SIGTERM")
    assert "resumed_evaluation legal_ttt" in children.finish(run_dir).stdout()
    assert outcome(run_dir) == outcome(whole)


def test_a_second_signal_exits_at_once(children):
    """The step in which the first signal arrives never ends here."""
    run_dir = children.new("second")
    group = children.start(run_dir, patch=at_step(2, "while True: time.sleep(0.02)"))
    assert group.until(lambda: 2 in steps_of(run_dir))
    group.kill(signal.SIGTERM)
    time.sleep(0.7)
    assert group.wait(0) is None
    group.kill(signal.SIGTERM)
    assert group.wait(5) == [128 + signal.SIGTERM]


def test_signals_that_arrive_together_count_as_one(children):
    """A cluster and torchrun may both pass on the same wish."""
    run_dir = children.new("together")
    both = "os.kill(os.getpid(), 15), os.kill(os.getpid(), 10)"
    group = children.finish(run_dir, code=75, patch=at_step(3, both))
    check_stopped(run_dir, group.stdout(), "SIGTERM", "SIGUSR1")


def test_all_ranks_stop_at_the_same_step_when_one_gets_the_signal(children, whole_two):
    run_dir = children.new("signal_two")
    signal_one = at_step(6, "self.runtime.comm.rank and os.kill(os.getpid(), 10)")
    group = children.start(run_dir, ranks=2, patch=signal_one)
    assert group.wait() == [75, 75], group.stderr()
    assert (
        len(re.findall("^stopped ", group.stdout(), re.M)) == 1 and (run_dir / "STOPPED").exists()
    )
    children.finish(run_dir, ranks=2)
    assert outcome(run_dir) == outcome(whole_two)


@pytest.mark.parametrize(
    "variable", ["time_limit_seconds", pytest.param("slurm_job_end_time", marks=pytest.mark.slow)]
)
def test_a_time_limit_stops_in_time_and_a_rerun_finishes(children, whole, variable):
    run_dir, end = children.new("limited"), time.time() + 3.0
    limit = 2.0 if variable == "time_limit_seconds" else end
    slow_steps = at_step("step", "time.sleep(0.4)")
    group = children.finish(run_dir, code=75, patch=slow_steps, **{variable: limit})
    check_stopped(run_dir, group.stdout(), "TIME_LIMIT")
    found = json_lines(run_dir)[0]
    assert found[-1]["time"] < (found[0]["time"] + 2.0 if variable == "time_limit_seconds" else end)
    assert 0 < max(steps_of(run_dir)) < 12
    children.finish(run_dir)
    assert outcome(run_dir) == outcome(whole)


def test_packing_is_not_begun_when_it_could_not_end(children, whole):
    """Packing cannot be resumed, so it must not be started without the time for it."""
    run_dir = children.copy(whole)
    for name in ("final_model.int6.ptz", "scores.json"):
        (run_dir / name).unlink()
    group = children.finish(run_dir, code=75, time_limit_seconds=1.0)
    check_stopped(run_dir, group.stdout(), "TIME_LIMIT")
    assert not (run_dir / "final_model.int6.ptz").exists()


def test_the_first_real_signal_after_a_time_limit_does_not_break_off_the_saving(
    runtime, monkeypatch
):
    """SLURM's warning and torchrun's SIGTERM come while a time limit's save is under way."""
    made = runtime(tiny_config(time_limit_seconds=1e-9))
    assert made.stop.wanted()
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    made.stop.on_signal(signal.SIGTERM, None)
    assert not exits


# Phases -------------------------------------------------------------------------------------------
# ----------
@pytest.fixture(scope="module")
def audited(children, whole):
    """A finished run with its audit, and the output of that rerun."""
    run_dir = children.copy(whole)
    output = children.finish(run_dir, audit=1).stdout()
    return run_dir, output


SCORES = ("pre_quant", "final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")


@pytest.mark.parametrize(
    "missing, done",
    [
        ("scores.json", ("train", "pack", "audit")),
        ("final_model.int6.ptz", ("train", "audit", *SCORES)),
        ("audit.json", ("train", "pack", *SCORES)),
    ],
)
def test_a_rerun_does_only_what_is_missing_and_says_so(children, audited, whole, missing, done):
    run_dir = children.copy(audited[0])
    (run_dir / missing).unlink()
    output = children.finish(run_dir, audit=1).stdout()
    assert (run_dir / missing).exists()
    assert sorted(re.findall(r"^phase_done:(\w+)", output, re.M)) == sorted(done)
    assert not re.search(r"^step:", output, re.M)
    assert outcome(run_dir) == outcome(whole)


def test_a_finished_run_prints_its_results_again_without_training(children, audited):
    run_dir = children.copy(audited[0])
    output = children.finish(run_dir, audit=1).stdout()
    for label, score in read_json(run_dir / "scores.json")["scores"].items():
        assert f"result {label} val_bpb:{score['val_bpb']:.8f}" in output
    assert not re.search(r"^(step:|legality |checkpoint_saved|budget:)", output, re.M)
    assert "run_finished" in output and json_lines(run_dir)[0][-1]["event"] == "done"


def test_a_finished_run_of_two_ranks_prints_its_results_again(children, whole_two):
    run_dir = children.copy(whole_two)
    output = children.finish(run_dir, ranks=2).stdout()
    assert output.count("result legal_ttt") == 1 and "run_finished" in output


def test_an_artifact_is_scored_the_same_by_a_killed_and_resumed_verification(children, whole):
    run_dir, source = children.new("verify"), whole / "final_model.int6.ptz"
    output = killed_and_resumed(children, run_dir, "eval_legal_ttt 3 named", eval_only=source)
    assert "resumed_evaluation legal_ttt" in output
    found, expected = (read_json(d / "scores.json")["scores"] for d in (run_dir, whole))
    assert {k: v["val_bpb"] for k, v in found.items()} == {
        k: expected[k]["val_bpb"] for k in SCORES[1:]
    }


# Whether and how to resume
# ----------------------------------------------------------------------------------
def test_resume_never_keeps_the_old_run_aside_and_starts_again(children, stopped):
    run_dir = children.copy(stopped[0])
    old = log_of(run_dir)
    stop = at_step(0, "os.kill(os.getpid(), 15)")
    output = children.finish(run_dir, code=75, resume="never", patch=stop).stdout()
    assert "resumed_from:" not in output and "step:1/12" in output
    assert log_of(run_dir / "old_1") == old and list(
        (run_dir / "old_1" / "checkpoint").glob("step_*")
    )
    assert [path.name for path in (run_dir / "checkpoint").glob("step_*")] == ["step_00000001.pt"]


def test_a_changed_configuration_is_refused_with_the_fields_that_differ(children, stopped):
    run_dir = children.copy(stopped[0])
    group = children.finish(run_dir, code=2, matrix_lr=0.031, seed=7, checkpoint_every=5)
    error = group.stderr()
    assert "MATRIX_LR: 0.025 -> 0.031" in error and "SEED: 42 -> 7" in error
    assert "CHECKPOINT_EVERY" not in error and "Traceback" not in error
    assert (run_dir / "STOPPED").exists(), "the run is still stopped: a launcher has to see that"
    kept, before = (sorted((d / "checkpoint").glob("step_*")) for d in (run_dir, stopped[0]))
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in before]


def test_other_training_data_is_refused(children, stopped, tmp_path):
    run_dir = children.copy(stopped[0])
    shards = sorted(children.data.data_path.glob("*.bin"))
    for shard in shards:
        if not shard.name.startswith("fineweb_train_000001"):
            shutil.copy(shard, tmp_path)
    group = children.finish(run_dir, code=2, data_path=tmp_path)
    assert "other settings or data" in group.stderr()


def test_settings_of_pace_may_change_at_a_resume(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    children.finish(
        run_dir, checkpoint_every=5, val_loss_every=0, train_log_every=4, eval_checkpoint_seconds=0
    )
    assert outcome(run_dir) == outcome(whole)


def test_the_micro_batch_may_change_at_a_resume(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    stop = at_step(9, "os.kill(os.getpid(), 15)")
    output = children.finish(run_dir, code=75, patch=stop, micro_batch_tokens=128).stdout()
    assert "grad_accum_steps:4" in output and "resumed_from:" in output
    losses = [
        {e["step"]: e["train_loss"] for e in json_lines(folder)[0] if e["event"] == "step"}
        for folder in (run_dir, whole)
    ]
    assert max(losses[0]) == 10
    assert all(abs(loss - losses[1][step]) < 1e-3 for step, loss in losses[0].items())
