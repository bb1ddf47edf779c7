"""Faults: nothing that was saved is lost, the message says what to do, the exit code which kind."""
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import train_gpt
from conftest import events, launch, read_json, tiny_config
from test_resume import (at_step, children, copy_run, json_lines, kill_tree, log_of, outcome,  # noqa: F401
                         steps_of, stopped, torchrun, whole)

def newest(run_dir):
    return sorted((run_dir / "checkpoint").glob("step_*.pt"))[-1]


def check_message(group, *parts):
    """One clear message with all parts, no traceback."""
    text = group.stderr()
    assert "Traceback" not in text and len(re.findall("error: ", text)) == 1
    assert all(part in text for part in parts), text


def check_last_error(run_dir, code):
    last = json_lines(run_dir)[0][-1]
    assert last["event"] == "error" and last["code"] == code and last["message"]


# A file system that is full ---------------------------------------------------------------------------------
LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""


def test_a_run_goes_on_when_checkpoints_cannot_be_written(children, stopped, whole):
    """Half a checkpoint fits: every save fails, all smaller files can be written."""
    run_dir = copy_run(children, stopped[0])
    old = {path.name: path.read_bytes() for path in (run_dir / "checkpoint").glob("step_*.pt")}
    group = children.finish(run_dir, patch=LIMIT.format(limit=len(old[newest(run_dir).name]) // 2))
    assert re.search(r"warning: checkpoint not saved: .*step_\d+\.pt.*free space", group.stdout())
    assert "Traceback" not in group.stdout() + group.stderr()
    assert {path.name: path.read_bytes() for path in (run_dir / "checkpoint").glob("step_*.pt")} == old
    assert not list(run_dir.rglob("*.tmp"))
    assert outcome(run_dir) == outcome(whole)


def test_a_stop_that_cannot_be_saved_is_an_error_and_the_old_checkpoint_is_intact(children, stopped):
    run_dir = copy_run(children, stopped[0])
    old = newest(run_dir).read_bytes()
    stop = at_step(9, "os.kill(os.getpid(), 15)")
    patch = LIMIT.format(limit=len(old) // 2) + stop
    group = children.finish(run_dir, code=7, patch=patch)
    check_message(group, str(run_dir), "free space")
    check_last_error(run_dir, 7)
    assert not (run_dir / "STOPPED").exists()
    assert newest(run_dir).read_bytes() == old


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


def test_a_log_that_cannot_be_appended_is_a_clear_error(children, whole, small_disk):
    """Another program takes the last byte of the disk in mid-run, just when the logs' last pages are full."""
    resize, folder = small_disk
    fill = """
        for name in ("train.log", "metrics.jsonl"):
            with open(os.path.join(os.environ["RUN_DIR"], name), "ab", 0) as file:
                file.write(b"\\n" * (-os.path.getsize(file.name) % 4096))
        try:
            with open(os.environ["RUN_DIR"] + ".filler", "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass"""
    run_dir = folder / "run"
    group = children.finish(run_dir, code=7, patch=at_step(7, fill.strip()))
    assert "Traceback" not in group.stdout() + group.stderr()
    assert "error: " in group.stderr() and "space" in group.stderr()
    train_gpt.load_tensors(newest(run_dir))
    (folder / "run.filler").unlink()
    children.finish(run_dir)
    assert outcome(run_dir) == outcome(whole)


def test_a_save_that_failed_once_is_forgotten_after_the_next_good_one(runtime):
    made, written = runtime(tiny_config()), []
    checkpoints = train_gpt.Checkpointer(made, "step", 0)
    taken = checkpoints.path(1)
    taken.mkdir()  # cannot be replaced by a file
    (taken / "x").touch()
    checkpoints.save(1, dict(step=1), lambda seconds, size: written.append(1))
    assert isinstance(checkpoints.wait(), train_gpt.ResourceError)
    shutil.rmtree(taken)
    checkpoints.save(2, dict(step=2), lambda seconds, size: written.append(2))
    assert checkpoints.wait() is None
    assert checkpoints.newest() == (2, dict(step=2)) and written == [2]
    assert log_of(made.dir).count("warning: checkpoint not saved") == 1


# Data -------------------------------------------------------------------------------------------------------
def test_a_shard_that_vanishes_in_mid_run_ends_it_with_the_last_checkpoint_named(children, whole, tmp_path):
    folder, run_dir = tmp_path / "data", children.new("vanishing")
    shutil.copytree(children.data.data_path, folder)
    shard, aside = folder / "fineweb_train_000000.bin", tmp_path / "aside.bin"
    rename = f"os.rename({str(shard)!r}, {str(aside)!r})"
    group = children.finish(run_dir, code=3, data_path=folder, patch=at_step(7, rename))
    check_message(group, str(shard), "No such file", f"last checkpoint: {newest(run_dir)}")
    check_last_error(run_dir, 3)
    aside.rename(shard)
    children.finish(run_dir, data_path=folder)
    assert outcome(run_dir) == outcome(whole)


@pytest.mark.slow
def test_a_shard_that_shrinks_in_mid_run_is_an_error_and_not_a_crash(children, tmp_path):
    """Reading a map beyond its file's end would be SIGBUS."""
    folder, run_dir = tmp_path / "data", children.new("shrinking")
    shutil.copytree(children.data.data_path, folder)
    shard = folder / "fineweb_train_000000.bin"
    group = children.finish(run_dir, code=3, data_path=folder,
                            patch=at_step(7, f"os.truncate({str(shard)!r}, 1024)"))
    check_message(group, str(shard), "1024 bytes", "last checkpoint")


# Ranks ------------------------------------------------------------------------------------------------------
def test_a_rank_that_dies_ends_the_job_within_a_minute(children, tmp_path):
    run_dir = children.new("dead_rank")
    script = children.script(at_step(7, "self.runtime.comm.rank and os._exit(9)"))
    done = launch(children.settings(run_dir), tmp_path, ranks=2, script=script)
    last_step = [e["time"] for e in json_lines(run_dir)[0] if e["event"] == "step"][-1]
    assert done.returncode not in (0, 75) and time.time() - last_step < 60
    assert "[rank 0]" in done.stderr
    assert max(steps_of(run_dir)) == 7
    train_gpt.load_tensors(newest(run_dir))


def test_every_rank_shows_its_own_exception_with_its_rank(children):
    run_dir = children.new("both_fail")
    fault = "raise RuntimeError(f'boom of {self.runtime.comm.rank}')"
    group = children.start(run_dir, ranks=2, patch=at_step(7, fault))
    assert group.wait() == [1, 1]
    for rank in (0, 1):
        lines = group.stderr(rank).splitlines()
        assert f"[rank {rank}] RuntimeError: boom of {rank}" in lines
        assert all(line.startswith(f"[rank {rank}] ") for line in lines if "File" in line)
    check_last_error(run_dir, 1)


def test_an_error_of_one_rank_ends_the_others_too(children):
    """The exit code of the rank that knows what is wrong is the right one."""
    run_dir = children.new("one_fails")
    fault = "if self.runtime.comm.rank == 1: raise train_gpt.DataError('this shard is bad')"
    group = children.start(run_dir, ranks=2, patch=at_step(7, fault))
    codes = group.wait()
    assert codes and codes[1] == 3 and codes[0] not in (0, 75)
    assert "[rank 1] error: this shard is bad" in group.stderr(1)
    assert "[rank 0]" in group.stderr(0)


@pytest.mark.parametrize("cause", ["time_limit", pytest.param("signal", marks=pytest.mark.slow)])
def test_torchrun_does_not_break_off_a_slow_save_at_a_stop(children, cause, tmp_path):
    """Ranks that have nothing to write must not leave before rank 0: torchrun would end it in mid-write."""
    stop = dict(time_limit="self.runtime.stop.time_limit = 1e-9", signal="os.kill(os.getpid(), 10)")[cause]
    slow = """
save_tensors = train_gpt.save_tensors
def slow(path, state):
    time.sleep(2)
    return save_tensors(path, state)
train_gpt.save_tensors = slow
"""
    run_dir = children.new("slow_save")
    script = children.script(at_step(7, stop) + slow)
    done = launch(children.settings(run_dir, checkpoint_every=0), tmp_path, ranks=2, script=script)
    assert done.returncode != 0
    assert (run_dir / "STOPPED").exists(), done.stderr[-2000:]
    assert json_lines(run_dir)[0][-1]["event"] == "stopped"
    assert newest(run_dir).name == "step_00000008.pt"


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_a_checkpoint(children):
    """What a cluster does: the signal goes to torchrun, which passes it on."""
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


# Memory -----------------------------------------------------------------------------------------------------
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
    train = children.finish(run_dir, code=75, patch=patch + at_step(0, "os.kill(os.getpid(), 15)"),
                            micro_batch_tokens=128)
    assert "step:1/12" in train.stdout()


def evaluation_parts(runtime, tiny_data):
    """(model, stream, config, runtime) of a tiny model with random weights."""
    config = tiny_config(data_path=str(tiny_data.data_path), tokenizer_path=str(tiny_data.tokenizer_path))
    made = runtime(config)
    model = train_gpt.build_model(config, made)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    stream = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    return model, stream, config, made


def greedy(function, most, argument=0):
    """`function`, out of memory for more than `most` sequences."""
    def limited(*arguments):
        if len(arguments[argument]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(*arguments)
    return limited


def test_out_of_memory_in_evaluation_halves_the_batch_and_scores_the_same(runtime, tiny_data, monkeypatch):
    parts = evaluation_parts(runtime, tiny_data)
    expected = train_gpt.evaluate(*parts)
    monkeypatch.setattr(parts[0], "hidden", greedy(parts[0].hidden, 1))
    found = train_gpt.evaluate(*parts)
    assert found.tokens == expected.tokens and found.bytes == expected.bytes
    assert found.val_loss == pytest.approx(expected.val_loss, rel=1e-6)
    log = log_of(parts[3].dir)
    assert "halved to 2 windows" in log and "halved to 1 windows" in log and log.count("out_of_memory") == 2


def test_out_of_memory_in_test_time_training_takes_the_same_steps(runtime, tiny_data, monkeypatch):
    parts = evaluation_parts(runtime, tiny_data)
    expected = train_gpt.evaluate(*parts, ttt=True)
    monkeypatch.setattr(parts[0], "forward", greedy(parts[0].forward, 1))
    found = train_gpt.evaluate(*parts, ttt=True)
    assert found.val_loss == pytest.approx(expected.val_loss, rel=1e-6)


def test_out_of_memory_with_one_window_is_a_clear_error(runtime, tiny_data, monkeypatch):
    parts = evaluation_parts(runtime, tiny_data)
    monkeypatch.setattr(parts[0], "hidden", greedy(parts[0].hidden, 0))
    with pytest.raises(train_gpt.ResourceError, match="EVAL_SEQ_LEN"):
        train_gpt.evaluate(*parts)


# Numbers ----------------------------------------------------------------------------------------------------
def check_diverged(group, run_dir):
    check_message(group, "loss is nan", "learning rate")
    check_last_error(run_dir, 5)
    named = re.search(r"(\S+step_\d+\.pt)", group.stderr()).group(1)
    state = train_gpt.load_tensors(named)
    assert all(torch.isfinite(t).all() for t in state["model"].values())
    return state


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(children):
    run_dir = children.new("nan_loss")
    group = children.finish(run_dir, code=5, patch=at_step(7, "loss = float('nan')"))
    assert check_diverged(group, run_dir)["step"] == 7
    assert not (run_dir / "final_model.pt").exists()


def test_weights_that_are_not_finite_are_never_called_good(children):
    """The loss is one step late: a checkpoint of every step would hold the damage already."""
    run_dir = children.new("nan_weights")
    fault = "next(iter(self.model.blocks)).attn.c_q.weight.grad.fill_(float('nan'))"
    group = children.finish(run_dir, code=5, checkpoint_every=1, patch=at_step(7, fault))
    assert check_diverged(group, run_dir)["step"] == 7


def test_both_ranks_end_when_the_loss_of_one_is_not_finite(children):
    run_dir = children.new("nan_two")
    fault = "loss = float('nan') if self.runtime.comm.rank else loss"
    group = children.start(run_dir, ranks=2, patch=at_step(7, fault))
    assert group.wait() == [5, 5]
    assert check_diverged(group, run_dir)["step"] == 7


# One directory, one run -------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_second_run_in_the_same_directory_refuses_and_the_first_goes_on(children, whole, ranks):
    run_dir = children.new("shared")
    wait = "exec('while not os.path.exists(os.environ[\"RUN_DIR\"] + \".go\"): time.sleep(0.01)')"
    first = children.start(run_dir, patch=at_step(7, wait))
    assert first.until(lambda: max(steps_of(run_dir), default=0) == 7)
    second = children.start(run_dir, ranks=ranks)
    codes = second.wait()
    assert codes and codes[0] == 2 and all(codes)
    assert f"RUN_DIR={run_dir} is in use" in second.stderr() and "Traceback" not in second.stderr()
    open(f"{run_dir}.go", "w").close()
    assert first.wait() == [0], first.stderr()
    assert outcome(run_dir) == outcome(whole)


def test_a_directory_that_cannot_be_written_is_refused(children, tmp_path):
    (tmp_path / "file").touch()
    group = children.finish(tmp_path / "file" / "run", code=2)
    check_message(group, "RUN_DIR=", "writable")


# Time and threads -------------------------------------------------------------------------------------------
def test_a_clock_that_goes_backwards_changes_nothing(children, whole):
    patch = """
from itertools import count
ticks = count()
time.time = lambda: 2e9 - 3600 * next(ticks)"""
    run_dir = children.new("clock")
    children.finish(run_dir, patch=patch, checkpoint_every=0, checkpoint_seconds=0.01, time_limit_seconds=600)
    assert outcome(run_dir) == outcome(whole)
    assert any(e["event"] == "checkpoint" for e in json_lines(run_dir)[0])
    times = [e["train_time_ms"] for e in json_lines(run_dir)[0] if e["event"] == "step"]
    assert times == sorted(times) and times[0] > 0
    assert all(s["eval_time_s"] > 0 for s in read_json(run_dir / "scores.json")["scores"].values())


def test_lines_written_from_two_threads_never_mix(runtime):
    """Checkpoints are logged from the thread that writes them."""
    made, interval = runtime(tiny_config()), sys.getswitchinterval()

    def write(name):
        for i in range(4000):
            made.event("test", name=name, number=i)
    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(events(made.dir, "test")) == 12000
