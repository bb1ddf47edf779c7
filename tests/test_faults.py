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
    events,
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


def check_message(group, *parts):
    """One clear message with all parts, no traceback."""
    text = group.stderr()
    assert "Traceback" not in text and len(re.findall("error: ", text)) == 1
    assert all(part in text for part in parts), text


def check_last_error(run_dir, code):
    last = json_lines(run_dir)[0][-1]
    assert last["event"] == "error" and last["code"] == code and last["message"]


# ---- a file system that is full ----

LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("at_a_stop", [False, True])
def test_checkpoints_that_cannot_be_written_cost_no_run_but_a_stop_is_an_error(
    children, stopped, whole, at_a_stop
):
    """Half a checkpoint fits: every save fails, all smaller files can be written."""
    run_dir = children.copy(stopped[0])
    old = {path.name: path.read_bytes() for path in (run_dir / "checkpoint").iterdir()}
    patch = LIMIT.format(limit=len(old[newest(run_dir).name]) // 2)
    stop = at_step(9, "os.kill(os.getpid(), 15)") if at_a_stop else ""
    group = children.finish(run_dir, code=7 if at_a_stop else 0, patch=patch + stop)
    assert re.search(r"warning: checkpoint not saved: .*step_\d+\.pt.*free space", group.stdout())
    assert {path.name: path.read_bytes() for path in (run_dir / "checkpoint").iterdir()} == old
    if at_a_stop:
        check_message(group, str(run_dir), "free space")
        check_last_error(run_dir, 7)
        assert not (run_dir / "STOPPED").exists()
    else:
        assert "Traceback" not in group.stdout() + group.stderr()
        assert outcome(run_dir) == outcome(whole)


@pytest.fixture
def small_disk(tmp_path):
    """resize(bytes) of a file system of its own, its directory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    yield resize, folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_nothing(children, whole, small_disk):
    """Two checkpoints fit, the final weights do not; with more room the same command finishes."""
    resize, folder = small_disk
    resize("1100k")
    run_dir = folder / "run"
    group = children.finish(run_dir, code=7)
    check_message(group, str(run_dir), "free space")
    assert "warning: checkpoint not saved" in group.stdout()
    train_gpt.load_tensors(newest(run_dir))
    resize("8m")
    output = children.finish(run_dir).stdout()
    assert "resumed_from:" in output
    assert outcome(run_dir) == outcome(whole)


# ---- the clock ----


def test_a_save_is_no_training_time(children):
    run_dir = children.new("slow_saves")
    slow = """
save = train_gpt.save_tensors
def slow(path, state):
    time.sleep(0.5)
    return save(path, state)
train_gpt.save_tensors = slow
"""
    children.finish(run_dir, patch=slow, checkpoint_seconds=0, checkpoint_every=2)
    saves = events(run_dir, "checkpoint")
    assert len(saves) == 6 and all(0.5 <= save["seconds"] < 2 for save in saves)
    assert read_json(run_dir / "scores.json")["train_time_s"] < 3


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


@pytest.mark.parametrize("fault", ["vanishes", "shrinks"])
def test_a_shard_that_changes_in_mid_run_ends_it_with_the_last_checkpoint_named(
    children, whole, tmp_path, fault
):
    """Reading a map beyond its file's end would be SIGBUS."""
    folder, run_dir = tmp_path / "data", children.new(fault)
    shutil.copytree(children.data.data_path, folder)
    shard, aside = folder / "fineweb_train_000000.bin", tmp_path / "aside.bin"
    shutil.copy(shard, aside)
    action, said = {
        "vanishes": (f"os.unlink({str(shard)!r})", "No such file"),
        "shrinks": (f"os.truncate({str(shard)!r}, 1024)", "1024 bytes"),
    }[fault]
    group = children.finish(run_dir, code=3, data_path=folder, patch=at_step(7, action))
    check_message(group, str(shard), said, f"last checkpoint: {newest(run_dir)}")
    check_last_error(run_dir, 3)
    aside.rename(shard)
    children.finish(run_dir, data_path=folder)
    assert outcome(run_dir) == outcome(whole)


# ---- ranks ----


def test_a_rank_that_dies_ends_the_job_within_a_minute(children, tmp_path):
    run_dir = children.new("dead_rank")
    script = children.script(at_step(7, "self.runtime.comm.rank and os._exit(9)"))
    done = launch(children.settings(run_dir), tmp_path, ranks=2, script=script)
    last_step = [e["time"] for e in json_lines(run_dir)[0] if e["event"] == "step"][-1]
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


@pytest.mark.parametrize("cause", ["time_limit", pytest.param("signal", marks=pytest.mark.slow)])
def test_torchrun_does_not_break_off_a_slow_save_at_a_stop(children, cause, tmp_path):
    """Ranks that have nothing to write must not leave before rank 0: torchrun would end it in
    mid-write."""
    stop = dict(
        time_limit="self.runtime.stop.time_limit = 1e-9", signal="os.kill(os.getpid(), 10)"
    )[cause]
    slow = """
save_tensors = train_gpt.save_tensors
def slow(path, state):
    time.sleep(2)
    return save_tensors(path, state)
train_gpt.save_tensors = slow
"""
    run_dir = children.new("slow_save")
    script = children.script(at_step(7, stop) + slow)
    settings = children.settings(run_dir, checkpoint_seconds=0)
    done = launch(settings, tmp_path, ranks=2, script=script)
    assert done.returncode != 0
    assert (run_dir / "STOPPED").exists(), done.stderr[-2000:]
    assert json_lines(run_dir)[0][-1]["event"] == "stopped"
    assert newest(run_dir).name == "step_00000008.pt"


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_a_checkpoint(children):
    """A cluster signals torchrun, which passes it on."""
    run_dir = children.new("torchrun_term")
    slow = at_step("max(7, step)", "time.sleep(1)")
    process = torchrun(children.settings(run_dir), children.script(slow), stderr=subprocess.PIPE)
    try:
        while max(steps_of(run_dir), default=0) < 8:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=120)[1]
    finally:
        kill_tree(process)
    assert (run_dir / "STOPPED").exists(), error[-2000:]
    assert json_lines(run_dir)[0][-1]["event"] == "stopped"
    assert len(re.findall("^stopped ", log_of(run_dir), re.M)) == 1


# ---- memory ----


def test_out_of_memory_in_training_names_the_micro_batch_to_try(children):
    run_dir = children.new("oom")
    patch = """
forward = train_gpt.GPT.forward
def greedy(self, ids, targets, noise=None):
    if self.training and len(ids) > 2:
        raise train_gpt.torch.OutOfMemoryError("CUDA out of memory")
    return forward(self, ids, targets, noise)
train_gpt.GPT.forward = greedy"""
    group = children.finish(run_dir, code=7, patch=patch, micro_batch_tokens=256)
    check_message(group, "MICRO_BATCH_TOKENS=256", "MICRO_BATCH_TOKENS=128")
    check_last_error(run_dir, 7)
    patch += at_step(0, "os.kill(os.getpid(), 15)")
    again = children.finish(run_dir, code=75, patch=patch, micro_batch_tokens=128)
    assert "step:1/12" in again.stdout()


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


# ---- one directory, one run ----


def test_a_second_run_in_the_same_directory_refuses_and_the_first_goes_on(children, whole):
    run_dir = children.new("shared")
    wait = 'exec(\'while not os.path.exists(os.environ["RUN_DIR"] + ".go"): time.sleep(0.01)\')'
    first = children.start(run_dir, patch=at_step(7, wait))
    assert first.until(lambda: max(steps_of(run_dir), default=0) == 7)
    second = children.start(run_dir, ranks=2)
    codes = second.wait()
    assert codes and codes[0] == 2 and all(codes)
    assert f"RUN_DIR={run_dir} is in use" in second.stderr() and "Traceback" not in second.stderr()
    open(f"{run_dir}.go", "w").close()
    assert first.wait() == [0], first.stderr()
    assert outcome(run_dir) == outcome(whole)
