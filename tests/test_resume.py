"""A run that is killed, stopped or repeated ends with the weights and scores of a whole one.

Runs here are real processes, killed for real, but forked from a server that has imported PyTorch: a
start costs 0.1 s instead of 3.
"""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers import (
    AT_WRITE,
    ROOT,
    at_step,
    json_lines,
    kill_tree,
    launch,
    log_of,
    newest,
    outcome,
    read_json,
    steps_of,
    torchrun,
)

import train_gpt

LONGER = dict(iterations=36, warmdown_iters=12)
SCORES = ("pre_quant", "final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")


def kill(children, run_dir, at, **changes):
    """Kill a run at a durable write."""
    assert children.start(run_dir, patch=AT_WRITE, at=at, **changes).wait() == [-9]


@pytest.mark.parametrize(
    "at, resumed",
    [
        ("step_ 5 half", r"^resumed_from:\S+step_00000004.pt step:4$"),
        ("final_model.int6 1 whole", r"^phase_done:train "),
        ("eval_legal_ttt 8 named", r"^resumed_evaluation legal_ttt item:8/\d\d$"),
    ],
)
def test_a_run_killed_in_a_write_ends_like_an_uninterrupted_one(children, whole, at, resumed):
    run_dir = children.new("killed")
    kill(children, run_dir, at)
    assert re.search(resumed, children.finish(run_dir).stdout(), re.M)
    assert outcome(run_dir) == outcome(whole)
    assert not list(run_dir.rglob("*.tmp")), "a killed write left its temporary file behind"


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


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_ends_the_same(children, whole):
    """Each attempt gets four checkpoints further."""
    run_dir = children.new("chain")
    for _ in range(3):
        kill(children, run_dir, "step_ 4 named")
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


# ---- states ----


@pytest.mark.parametrize("readable", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(children, stopped, whole, readable):
    run_dir = children.copy(stopped[0])
    states = sorted((run_dir / "checkpoint").glob("step_*.pt"))
    assert len(states) == 2
    for path in states[readable:]:
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 1
        path.write_bytes(blob)
    output = children.finish(run_dir).stdout()
    assert re.search(rf"warning: .*{states[1].name}.*using the checkpoint before it", output)
    assert output.count(f"resumed_from:{states[0]}") == readable
    assert outcome(run_dir) == outcome(whole)


@pytest.mark.parametrize("damage", ["cut", "cut all", "foreign"])
def test_a_state_of_an_evaluation_that_is_unusable_is_not_used(children, whole, damage):
    run_dir = children.unscored(whole)
    kill(children, run_dir, "eval_legal_ttt 5 named")
    states = sorted((run_dir / "checkpoint").glob("eval_legal_ttt_*.pt"), reverse=True)
    for path in states if damage == "cut all" else states[:1]:
        state = train_gpt.load_tensors(path)
        if damage == "foreign":
            train_gpt.save_tensors(path, {**state, "identity": "another"})
        else:
            path.write_bytes(path.read_bytes()[:-100])
    output = children.finish(run_dir).stdout()
    assert f"warning: {states[0]}" in output
    assert ("resumed_evaluation legal_ttt item:4/" in output) is (damage == "cut")
    assert outcome(run_dir) == outcome(whole)
    assert not list((run_dir / "checkpoint").glob("eval_*")), "scored, and still there"


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


# ---- logs ----


@pytest.fixture(scope="module")
def resumed(children, stopped):
    """A run that was stopped, whose logs then lost the end of a line, then finished."""
    run_dir = children.copy(stopped[0])
    for name, text in (("train.log", "step:7/12 trai"), ("metrics.jsonl", '{"event": "step", "st')):
        with open(run_dir / name, "a") as file:
            file.write(text)
    return run_dir, children.finish(run_dir).stdout()


def test_logs_append_and_stay_parseable_after_a_cut_last_line(resumed, stopped):
    log = log_of(resumed[0])
    assert log.startswith(f"{log_of(stopped[0])}step:7/12 trai\n")
    found, bad = json_lines(resumed[0])
    assert bad == 1 and found[-1]["event"] == "done"
    assert {e["step"] for e in found if e["event"] == "step"} == set(range(1, 13))
    assert set(re.findall(r"^step:(\d+)/12 train_loss", log, re.M)) == set(map(str, range(1, 13)))
    starts = [e["resumed_step"] for e in found if e["event"] == "start"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= 6


# ---- signals and time limits ----


def check_stopped(run_dir, output, *names):
    """One line, one event as the last, and the file, all of a stop by one of `names`."""
    lines = re.findall(r"^stopped signal:(\w+)", output, re.M)
    last = json_lines(run_dir)[0][-1]
    assert len(lines) == 1 and lines[0] in names
    assert last["event"] == "stopped" and last["signal"] == lines[0]
    assert (run_dir / "STOPPED").exists()


def test_a_stopped_run_resumes_and_ends_like_an_uninterrupted_one(stopped, resumed, whole):
    run_dir, output = stopped
    check_stopped(run_dir, output, "SIGUSR1")
    step = int(re.search(r"phase:in training after step (\d+)/12", output).group(1))
    assert step == max(steps_of(run_dir)) and newest(run_dir).name == f"step_{step:08d}.pt"
    once = output.count(f"checkpoint_saved step:{step} ")
    assert once == 1, "saving twice wastes the time that is left"
    run_dir, output = resumed
    assert f"resumed_from:{run_dir}" in output and not (run_dir / "STOPPED").exists()
    assert outcome(run_dir) == outcome(whole)


def test_sigterm_stops_an_evaluation_and_a_rerun_finishes_it(children, whole):
    run_dir = children.unscored(whole)
    at = f"eval_legal_ttt 4 {int(signal.SIGTERM)}"
    group = children.finish(run_dir, code=75, patch=AT_WRITE, at=at)
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


def test_all_ranks_stop_at_the_same_step_when_one_gets_the_signal(children, whole_two):
    """Twice at once, as a cluster and torchrun may both pass on the same wish."""
    run_dir = children.new("signal_two")
    both = "os.kill(os.getpid(), 10), os.kill(os.getpid(), 15)"
    group = children.start(
        run_dir, ranks=2, patch=at_step(6, f"self.runtime.comm.rank and ({both})")
    )
    assert group.wait() == [75, 75], group.stderr()
    check_stopped(run_dir, group.stdout(), "another_rank")
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
    assert json_lines(run_dir)[0][-1]["event"] == "done" and (run_dir / "audit.json").exists()
    assert outcome(run_dir) == outcome(whole)


def test_a_finished_run_of_two_ranks_prints_its_results_again(children, whole_two):
    output = children.finish(children.copy(whole_two), ranks=2).stdout()
    assert output.count("result legal_ttt") == 1 and "run_finished" in output


# ---- other settings, other data ----


def test_other_training_data_is_refused(children, stopped, tmp_path):
    run_dir = children.copy(stopped[0])
    for shard in children.data.data_path.glob("*.bin"):
        if not shard.name.startswith("fineweb_train_000001"):
            shutil.copy(shard, tmp_path)
    group = children.finish(run_dir, code=2, data_path=tmp_path)
    assert "training tokens: " in group.stderr() and "Traceback" not in group.stderr()
    assert (run_dir / "STOPPED").exists(), "the run is still stopped: a launcher has to see that"


def test_settings_of_pace_may_change_at_a_resume(children, stopped, whole):
    run_dir = children.copy(stopped[0])
    pace = dict(checkpoint_every=5, checkpoint_seconds=0, val_loss_every=0, train_log_every=4)
    children.finish(run_dir, **pace)
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
