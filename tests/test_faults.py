"""Faults: nothing that was saved is lost, the message says what to do, the exit code which kind."""

import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers import (
    at_step,
    contents,
    environment,
    events,
    launch,
    log_of,
    newest,
    outcome,
    python_command,
    read_json,
    steps_of,
)

import train_gpt


def check_message(group, *parts):
    """One clear message with all parts, no traceback."""
    text = group.stderr()
    assert "Traceback" not in text and len(re.findall("error: ", text)) == 1
    assert all(part in text for part in parts), text


def check_last_error(run_dir, code):
    last = events(run_dir)[-1]
    assert last["event"] == "error" and last["code"] == code and last["message"]


# ---- a file system that is full ----

LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""
# Share of a checkpoint that fits into a file, exit code, patch.
FULL_DISKS = {
    "a save fails": (1 / 2, 0, ""),
    "a save fails at a stop": (1 / 2, 7, at_step(9, "os.kill(os.getpid(), 15)")),
    "the final weights do not fit": (1 / 12, 7, ""),
}


@pytest.mark.parametrize("share, code, patch", FULL_DISKS.values(), ids=FULL_DISKS)
def test_a_full_disk_costs_checkpoints_and_is_an_error_where_a_file_is_needed(
    children, stopped, whole, share, code, patch
):
    run_dir = children.copy(stopped[0])
    old = contents(run_dir / "checkpoint")
    patch += LIMIT.format(limit=int(newest(run_dir).stat().st_size * share))
    group = children.finish(run_dir, code=code, patch=patch)
    assert re.search(r"warning: checkpoint not saved: .*step_\d+\.pt.*free space", group.stdout())
    assert contents(run_dir / "checkpoint") == old
    if code == 0:
        assert "Traceback" not in group.stdout() + group.stderr()
    else:
        check_message(group, str(run_dir), "free space")
        check_last_error(run_dir, 7)
        assert not (run_dir / "STOPPED").exists()
        children.finish(run_dir)  # with more room the same command finishes
    assert outcome(run_dir) == outcome(whole)


# ---- the clock ----


def test_a_clock_that_goes_backwards_changes_nothing(children, whole):
    patch = """
from itertools import count
ticks = count()
time.time = lambda: 2e9 - 3600 * next(ticks)"""
    run_dir = children.new("clock")
    children.finish(run_dir, patch=patch, checkpoint_seconds=0.01, time_limit_seconds=600)
    assert outcome(run_dir) == outcome(whole)
    assert events(run_dir, "checkpoint")
    times = [event["train_time_ms"] for event in events(run_dir, "step")]
    assert times == sorted(times) and times[0] > 0
    assert all(s["eval_time_s"] > 0 for s in read_json(run_dir / "scores.json")["scores"].values())


# ---- data ----


def test_a_shard_that_shrinks_in_mid_run_ends_it_with_the_last_checkpoint_named(
    children, whole, tmp_path
):
    """Reading a map beyond its file's end would be SIGBUS."""
    folder, run_dir = tmp_path / "data", children.new("shrinks")
    shutil.copytree(children.data.data_path, folder)
    shard, aside = folder / "fineweb_train_000000.bin", tmp_path / "aside.bin"
    shutil.copy(shard, aside)
    shrink = at_step(7, f"os.truncate({str(shard)!r}, 1024)")
    group = children.finish(run_dir, code=3, data_path=folder, patch=shrink)
    check_message(group, str(shard), "1024 bytes", f"last checkpoint: {newest(run_dir)}")
    check_last_error(run_dir, 3)
    aside.rename(shard)
    children.finish(run_dir, data_path=folder)
    assert outcome(run_dir) == outcome(whole)


# ---- ranks ----


def test_a_rank_that_dies_ends_the_job_within_a_minute(children, tmp_path):
    run_dir = children.new("dead_rank")
    script = children.script(at_step(7, "self.runtime.comm.rank and os._exit(9)"))
    done = launch(children.settings(run_dir), tmp_path, ranks=2, script=script)
    last_step = [e["time"] for e in events(run_dir) if e["event"] == "step"][-1]
    assert done.returncode not in (0, 75) and time.time() - last_step < 60
    assert "[rank 0]" in done.stderr and max(steps_of(run_dir)) == 7
    train_gpt.load_tensors(newest(run_dir))


def test_every_rank_shows_its_own_exception_with_its_rank(children):
    """The exit code of the rank that knows what is wrong is the right one; the others end too."""
    run_dir = children.new("one_fails")
    fault = """
        if self.runtime.comm.rank == 1:
            def sequences(first, count):
                raise train_gpt.DataError('this shard is bad')
            self.stream.sequences = sequences"""
    group = children.start(run_dir, ranks=2, patch=at_step(7, fault.strip()))
    codes = group.wait()
    assert codes and codes[1] == 3 and codes[0] == 1
    assert group.stderr(1).startswith("[rank 1] error: this shard is bad")
    lines = group.stderr(0).splitlines()
    assert "[rank 0] Traceback (most recent call last):" in lines
    assert all(line.startswith("[rank 0] ") for line in lines if "File" in line)
    check_last_error(run_dir, 1)


def test_torchrun_does_not_break_off_a_slow_save_at_a_stop(children, tmp_path):
    """A rank that has nothing to write must not leave before rank 0, or torchrun would end both."""
    slow = """
save_tensors = train_gpt.save_tensors
def slow(path, state):
    time.sleep(2)
    return save_tensors(path, state)
train_gpt.save_tensors = slow
"""
    run_dir = children.new("slow_save")
    script = children.script(at_step(7, "self.runtime.stop.time_limit = 1e-9") + slow)
    settings = children.settings(run_dir, checkpoint_seconds=0)
    done = launch(settings, tmp_path, ranks=2, script=script)
    assert done.returncode != 0
    assert (run_dir / "STOPPED").exists(), done.stderr[-2000:]
    assert events(run_dir)[-1]["event"] == "stopped"
    assert newest(run_dir).name == "step_00000008.pt"


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_a_checkpoint(children):
    """A cluster signals torchrun, which passes it on."""
    run_dir = children.new("torchrun_term")
    script = children.script(at_step("max(7, step)", "time.sleep(1)"))
    process = subprocess.Popen(
        [*python_command(2), str(script)],
        env=environment(**children.settings(run_dir)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while max(steps_of(run_dir), default=0) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert (run_dir / "STOPPED").exists(), error[-2000:]
    assert events(run_dir)[-1]["event"] == "stopped"
    assert len(re.findall("^stopped ", log_of(run_dir), re.M)) == 1


# ---- numbers ----


@pytest.mark.parametrize(
    "ranks, fault",
    [
        (1, "loss = float('nan')"),
        (2, "loss = float('nan') if self.runtime.comm.rank else loss"),
        # The loss is one step late: a checkpoint of every step would hold the damage already.
        (1, "next(iter(self.model.blocks)).attn.c_q.weight.grad.fill_(float('nan'))"),
    ],
)
def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_last_good_checkpoint(
    children, ranks, fault
):
    run_dir = children.new("diverged")
    group = children.start(run_dir, ranks, patch=at_step(7, fault))
    assert group.wait() == [5] * ranks
    check_message(group, "loss is nan", "learning rate")
    check_last_error(run_dir, 5)
    state = train_gpt.load_tensors(re.search(r"(\S+step_\d+\.pt)", group.stderr()).group(1))
    assert state["step"] == 7
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert not (run_dir / "final_model.pt").exists()
