"""A run that is killed, stopped or repeated ends with the weights and scores of a whole one.

Runs here are real processes, killed for real, but forked from a server that has imported PyTorch: a
start costs 0.1 s instead of 3.
"""

import random
import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import AT_WRITE, at_step, events, log_of, newest, outcome, read_json, steps_of

import train_gpt

LONGER = dict(iterations=36, warmdown_iters=12)
SCORES = ("pre_quant", "final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")


def kill(children, run_dir, at, **changes):
    """Kill a run at a durable write."""
    assert children.start(run_dir, patch=AT_WRITE, at=at, **changes).wait() == [-9]


def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(children, whole):
    """In training, between two phases and in an evaluation."""
    run_dir = children.new("killed")
    for at in (
        "step_ 5 half",
        "step_ 4 named",
        "final_model.int6 1 whole",
        "eval_legal_ttt 8 named",
    ):
        kill(children, run_dir, at)
    children.finish(run_dir)
    log = log_of(run_dir)
    assert re.findall(r"^resumed_from:.* step:(\d+)$", log, re.M) == ["4", "8"]
    assert re.search(r"^phase_done:train ", log, re.M)
    assert re.search(r"^resumed_evaluation legal_ttt item:8/\d\d$", log, re.M)
    assert outcome(run_dir) == outcome(whole)
    assert not list(run_dir.rglob("*.tmp")), "a killed write left its temporary file behind"
    assert not list((run_dir / "checkpoint").glob("eval_*")), "scored, and states still there"


def test_two_ranks_killed_together_end_like_uninterrupted_ones(children, whole_two):
    run_dir = children.new("killed_two")
    group = children.start(run_dir, ranks=2, patch=AT_WRITE, at="step_ 4 hold")
    assert group.until(Path(f"{run_dir}.held").exists)
    group.kill()
    assert group.wait() == [-9, -9]
    assert "resumed_from:" in children.finish(run_dir, ranks=2).stdout()
    assert outcome(run_dir) == outcome(whole_two)


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_state_of_an_evaluation_is_not_used(children, whole, damaged):
    run_dir = children.unscored(whole)
    kill(children, run_dir, "eval_legal_ttt 5 named")
    states = sorted((run_dir / "checkpoint").glob("eval_legal_ttt_*.pt"), reverse=True)
    for path in states[:damaged]:
        path.write_bytes(path.read_bytes()[:-100])
    output = children.finish(run_dir).stdout()
    assert f"warning: {states[0]}" in output
    assert ("resumed_evaluation legal_ttt item:4/" in output) is (damaged == 1)
    assert outcome(run_dir) == outcome(whole)
    assert not list((run_dir / "checkpoint").glob("eval_*")), "scored, and still there"


@pytest.mark.slow
@pytest.mark.parametrize("ranks, kills", [(1, 20), (2, 8)])
def test_random_kills_change_nothing(children, ranks, kills):
    seed, begin = random.randrange(1 << 30), time.monotonic()
    draw, reference = random.Random(seed), children.new("reference")
    output = children.finish(reference, ranks, **LONGER).stdout()
    duration, writes = time.monotonic() - begin, len(re.findall("_saved ", output))
    for i in range(kills):
        run_dir = children.new("killed")
        if ranks == 1 and i % 2:
            what = draw.choice(["half", "whole", "named"])
            kill(children, run_dir, f"* {draw.randint(1, writes)} {what}", **LONGER)
        else:
            group = children.start(run_dir, ranks, **LONGER)
            if group.wait(draw.uniform(0.2, duration)) is None:
                group.kill()
                group.wait()
        children.finish(run_dir, ranks, **LONGER)
        assert outcome(run_dir) == outcome(reference), f"kill {i}, random.Random({seed})"


# ---- signals and time limits ----


def check_stopped(run_dir, output, name):
    """One line, one event as the last, and the file, all of a stop by `name`."""
    assert re.findall(r"^stopped signal:(\w+)", output, re.M) == [name]
    last = events(run_dir)[-1]
    assert last["event"] == "stopped" and last["signal"] == name
    assert (run_dir / "STOPPED").exists()


def test_a_stopped_run_resumes_and_ends_like_an_uninterrupted_one(children, stopped, whole):
    run_dir, output = stopped
    check_stopped(run_dir, output, "SIGUSR1")
    step = int(re.search(r"phase:in training after step (\d+)/12", output).group(1))
    assert step == max(steps_of(run_dir)) and newest(run_dir).name == f"step_{step:08d}.pt"
    once = output.count(f"checkpoint_saved step:{step} ")
    assert once == 1, "saving twice wastes the time that is left"
    run_dir = children.copy(run_dir)
    # Settings of pace may change.
    pace = dict(checkpoint_every=5, checkpoint_seconds=0, val_loss_every=0, train_log_every=4)
    output = children.finish(run_dir, **pace).stdout()
    assert f"resumed_from:{run_dir}" in output and not (run_dir / "STOPPED").exists()
    assert outcome(run_dir) == outcome(whole)
    found = events(run_dir)
    assert [e["step"] for e in found if e["event"] == "step"] == list(range(1, 13))
    assert [e["resumed_step"] for e in found if e["event"] == "start"] == [0, step]
    assert log_of(run_dir).startswith(log_of(stopped[0])), "the log of the first part is lost"


def test_a_time_limit_stops_in_time_and_a_rerun_finishes(children, whole):
    run_dir = children.new("limited")
    slow_steps = at_step("step", "time.sleep(0.4)")
    group = children.finish(run_dir, code=75, patch=slow_steps, time_limit_seconds=2.0)
    check_stopped(run_dir, group.stdout(), "TIME_LIMIT")
    found = events(run_dir)
    assert found[-1]["time"] < found[0]["time"] + 2.0
    assert 0 < max(steps_of(run_dir)) < 12
    children.finish(run_dir)
    assert outcome(run_dir) == outcome(whole)


def test_time_already_spent_counts_towards_the_wallclock_cap(children):
    run_dir, cap = children.new("capped"), dict(max_wallclock_seconds=1000)
    stop = at_step(4, "os.kill(os.getpid(), 15)")
    children.finish(run_dir, code=75, patch=stop, **cap)
    state = train_gpt.load_tensors(newest(run_dir))
    train_gpt.save_tensors(newest(run_dir), {**state, "seconds": 999.9})
    output = children.finish(run_dir, **cap).stdout()
    assert f"stopping_early: wallclock_cap train_time:999900ms step:{state['step']}/12" in output
    results = read_json(run_dir / "scores.json")
    assert results["stopped_early"] and results["train_time_s"] == 999.9
    assert results["steps"] == state["step"]


# ---- phases ----


@pytest.fixture(scope="module")
def audited(children, whole):
    """Directory of a finished run with its audit."""
    run_dir = children.copy(whole)
    children.finish(run_dir, audit=1)
    return run_dir


@pytest.mark.parametrize(
    "missing, done",
    [
        ("scores.json", ("train", "pack", "audit")),
        ("final_model.int6.ptz", ("train", "audit", *SCORES)),
        ("audit.json", ("train", "pack", *SCORES)),
        (None, ("train", "pack", "audit", *SCORES)),
    ],
)
def test_a_rerun_does_only_what_is_missing_and_says_so(children, audited, whole, missing, done):
    run_dir = children.copy(audited)
    if missing:
        (run_dir / missing).unlink()
    output = children.finish(run_dir, audit=1).stdout()
    assert sorted(re.findall(r"^phase_done:(\w+)", output, re.M)) == sorted(done)
    assert not re.search(r"^(step:|checkpoint_saved)", output, re.M)
    for label, score in read_json(run_dir / "scores.json")["scores"].items():
        assert f"result {label} val_bpb:{score['val_bpb']:.8f}" in output
    # An audit that comes later covers the scores that are there.
    assert re.search(r"^result legal_ttt .* legal:1 ", output, re.M)
    assert events(run_dir)[-1]["event"] == "done" and (run_dir / "audit.json").exists()
    assert outcome(run_dir) == outcome(whole)


def test_an_audit_of_another_file_does_not_count(children, audited):
    run_dir = children.copy(audited)
    path = run_dir / "audit.json"
    path.write_text(path.read_text().replace('"key": "', '"key": "0'))
    output = children.finish(run_dir, audit=1).stdout()
    assert "phase_done:audit" not in output and "audit pass" in output


# ---- other settings, other data ----


def test_other_training_data_is_refused(children, stopped, tmp_path):
    run_dir = children.copy(stopped[0])
    for shard in children.data.data_path.glob("*.bin"):
        if not shard.name.startswith("fineweb_train_000001"):
            shutil.copy(shard, tmp_path)
    group = children.finish(run_dir, code=2, data_path=tmp_path)
    assert "training tokens: " in group.stderr() and "Traceback" not in group.stderr()
    assert (run_dir / "STOPPED").exists(), "the run is still stopped: a launcher has to see that"


def test_the_micro_batch_may_change_at_a_resume(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    stop = at_step(9, "os.kill(os.getpid(), 15)")
    output = children.finish(run_dir, code=75, patch=stop, micro_batch_tokens=128).stdout()
    assert "grad_accum_steps:4" in output and "resumed_from:" in output
    losses = [
        {e["step"]: e["train_loss"] for e in events(folder) if e["event"] == "step"}
        for folder in (run_dir, whole)
    ]
    assert max(losses[0]) == 10
    assert all(abs(loss - losses[1][step]) < 1e-3 for step, loss in losses[0].items())
