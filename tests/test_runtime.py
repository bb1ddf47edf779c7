"""Atomic files, tensors on disk, the run directory and its lock, the log, signals, limits, exit
codes."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import contents, events, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ArtifactError,
    Comm,
    ConfigError,
    ResourceError,
    Runtime,
    load_tensors,
    save_tensors,
    write_atomic,
)


@contextlib.contextmanager
def files_at_most(size):
    """A disk that is full after `size` bytes of each file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Atomic files


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    return path


def assert_old_file_alone(path):
    assert path.read_bytes() == b"old" and [item.name for item in path.parent.iterdir()] == [
        "state"
    ]


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(old_file):
    write_atomic(old_file, [b"new"])
    assert old_file.read_bytes() == b"new" and [
        item.name for item in old_file.parent.iterdir()
    ] == ["state"]


def test_a_write_that_fails_half_way_leaves_the_old_file(old_file):
    def fail():
        yield b"half of the new"
        raise OSError(28, "No space left on device")

    with pytest.raises(
        ResourceError, match=f"cannot write {old_file}: No space left on device: free space"
    ):
        write_atomic(old_file, fail())
    assert_old_file_alone(old_file)


def test_a_full_disk_leaves_the_old_file(old_file):
    with files_at_most(1000), pytest.raises(ResourceError, match=str(old_file)):
        write_atomic(old_file, [bytes(5000)])
    assert_old_file_alone(old_file)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_to_flush_or_rename_leaves_the_old_file(old_file, monkeypatch, call):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError, match="Input/output error"):
        write_atomic(old_file, [b"new"])
    assert_old_file_alone(old_file)


def test_the_old_file_is_replaced_only_when_the_new_one_is_on_the_disk(old_file, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]
        )
    write_atomic(old_file, [b"new"])
    assert calls[:2] == ["fsync", "replace"]


def test_an_interrupted_write_leaves_the_old_file_and_the_next_one_works(old_file):
    def interrupt():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(old_file, interrupt())
    assert old_file.read_bytes() == b"old"
    write_atomic(old_file, [b"new"])
    assert old_file.read_bytes() == b"new"


def test_writing_into_a_missing_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ResourceError, match="cannot write .*gone/state: No such file or directory"):
        write_atomic(tmp_path / "gone" / "state", [b"new"])


def test_json_is_written_whole(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"ü": True}}
    train_gpt.write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == value


# Tensors on disk

STATE = dict(
    step=7,
    seconds=1.5,
    name="run",
    none=None,
    flags=[True, False],
    model={
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    },
    counts=torch.tensor(2**40),
    empty=torch.zeros(0, 4),
    infinite=torch.tensor([float("inf"), float("nan"), -0.0]),
)


def equal(a, b):
    """Equality of trees, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_a_saved_tree_comes_back_bit_for_bit(tmp_path):
    size = save_tensors(tmp_path / "step.pt", STATE)
    assert size == (tmp_path / "step.pt").stat().st_size
    assert equal(load_tensors(tmp_path / "step.pt"), STATE)


def test_a_tree_is_read_to_the_cpu_as_tensors_of_its_own(tmp_path):
    save_tensors(tmp_path / "step.pt", STATE)
    first, second = load_tensors(tmp_path / "step.pt"), load_tensors(tmp_path / "step.pt")
    first["model"]["a.weight"].zero_()
    assert equal(second, STATE) and first["model"]["a.weight"].device.type == "cpu"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "step.pt"
    save_tensors(path, STATE)
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_damage_to_a_saved_tree_is_noticed(saved, data):
    path, blob = saved
    kind = data.draw(st.sampled_from(["change", "cut", "grow"]))
    at = data.draw(st.integers(0, len(blob) - 1))
    if kind == "change":
        damaged = blob[:at] + bytes([blob[at] ^ data.draw(st.integers(1, 255))]) + blob[at + 1 :]
    else:
        damaged = (
            blob[:at] if kind == "cut" else blob + data.draw(st.binary(min_size=1, max_size=40))
        )
    hurt = path.with_name("damaged.pt")
    hurt.write_bytes(damaged)
    with pytest.raises(ArtifactError, match=f"^{hurt}: "):
        load_tensors(hurt)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ArtifactError, match=f"^{tmp_path}/no.pt: No such file or directory"):
        load_tensors(tmp_path / "no.pt")


class Hostile:
    """What a pickle may do to who opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_reading_tensors_runs_no_code_of_the_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state_dict": Hostile(str(tmp_path / "executed"))}, buffer)
    blob = buffer.getvalue()
    (tmp_path / "hostile.pt").write_bytes(blob + hashlib.sha256(blob).digest())
    with pytest.raises(ArtifactError, match="hostile.pt: not a checkpoint of tensors"):
        load_tensors(tmp_path / "hostile.pt")
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    path = tmp_path / "step.pt"
    save_tensors(path, STATE)
    with files_at_most(10_000), pytest.raises(ResourceError, match=f"cannot write {path}"):
        save_tensors(path, dict(STATE, large=torch.zeros(100_000)))
    assert equal(load_tensors(path), STATE) and [item.name for item in tmp_path.iterdir()] == [
        "step.pt"
    ]


# The run directory


@pytest.fixture
def config(tmp_path):
    return tiny_config(run_dir=str(tmp_path / "deep" / "run"))


@pytest.fixture
def earlier_run(tmp_path, config):
    """Files of a run that was stopped; returns its folder."""
    folder = tmp_path / "deep" / "run"
    (folder / "checkpoint").mkdir(parents=True)
    for name in (
        "config.json",
        "train.log",
        "metrics.jsonl",
        "final_model.pt",
        "checkpoint/step_00000003.pt",
    ):
        (folder / name).write_text(f"earlier {name}\n")
    return folder


def moved_away(folder, number):
    """What old_<number> must hold after `folder` was begun again."""
    return {
        f"old_{number}/{name}": value
        for name, value in contents(folder).items()
        if name != "lock" and not name.startswith("old_")
    }


def test_a_run_directory_is_made_with_its_parents(config, runtime, tmp_path):
    runtime(config)
    names = {item.name for item in (tmp_path / "deep" / "run").iterdir()}
    assert names == {"lock", "train.log", "metrics.jsonl", "checkpoint"}


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_an_earlier_run_is_kept_in_place(config, runtime, earlier_run, resume):
    before = contents(earlier_run)
    runtime(tiny_config(run_dir=config.run_dir, resume=resume))
    assert {
        name: value for name, value in contents(earlier_run).items() if name != "lock"
    } == before


def test_resume_never_keeps_the_earlier_run_aside(config, earlier_run):
    fresh = tiny_config(run_dir=config.run_dir, resume="never")
    for number in (1, 2, 3):
        kept = {
            name: value for name, value in contents(earlier_run).items() if name.startswith("old_")
        }
        expected = {**kept, **moved_away(earlier_run, number)}
        Runtime(fresh, {}).close()
        after = contents(earlier_run)
        assert {name: value for name, value in after.items() if name.startswith("old_")} == expected
        assert after["train.log"] == after["metrics.jsonl"] == b"" and "config.json" not in after
        (earlier_run / "config.json").write_text(f"config of run {number}")


def test_resume_never_works_after_an_older_run_was_deleted(config, earlier_run):
    for name in ("old_2", "old_11", "old_notes"):
        (earlier_run / name).mkdir()
        (earlier_run / name / "config.json").write_text(name)
    expected = {
        **{f"{name}/config.json": name.encode() for name in ("old_2", "old_11", "old_notes")},
        **moved_away(earlier_run, 1),
    }
    Runtime(tiny_config(run_dir=config.run_dir, resume="never"), {}).close()
    assert {k: v for k, v in contents(earlier_run).items() if k.startswith("old_")} == expected


def test_only_rank_0_touches_the_run_directory(config, runtime, tmp_path, capsys):
    other = runtime(config, RANK="1")
    other.log("a line")
    other.event("step", step=1)
    assert not (tmp_path / "deep").exists() and capsys.readouterr().out == ""


# The lock

FORK = multiprocessing.get_context("fork")


def hold(config, pipe):
    made = Runtime(config, {})
    pipe.send("holding")
    pipe.recv()
    made.close()


@pytest.fixture
def holder(config):
    """Another process that holds the run directory."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(config, theirs))
    process.start()
    assert ours.recv() == "holding"
    process.pipe = ours
    yield process
    process.kill()
    process.join()


def test_a_second_run_in_one_directory_is_refused_and_touches_nothing(config, earlier_run, holder):
    before = contents(earlier_run)
    for resume in ("auto", "never"):
        with pytest.raises(ConfigError) as error:
            Runtime(tiny_config(run_dir=config.run_dir, resume=resume), {})
        assert f"RUN_DIR={config.run_dir} is in use by another process: wait for it" in str(
            error.value
        )
    assert contents(earlier_run) == before


def test_a_crash_does_not_leave_the_lock_behind(config, holder):
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    Runtime(config, {}).close()


def test_a_finished_run_gives_the_lock_back(config, holder):
    holder.pipe.send("finish")
    holder.join()
    first = Runtime(config, {})
    first.close()
    Runtime(config, {}).close()


# The log


@pytest.mark.parametrize(
    "before,after",
    [
        (None, b"new\n"),
        (b"", b"new\n"),
        (b"whole\n", b"whole\nnew\n"),
        (b"whole\nbrok", b"whole\nbrok\nnew\n"),
        (b"brok", b"brok\nnew\n"),
        (b"\n", b"\nnew\n"),
    ],
)
def test_a_line_that_a_killed_process_left_unfinished_is_ended(tmp_path, before, after):
    path = tmp_path / "lines"
    if before is not None:
        path.write_bytes(before)
    with train_gpt.open_lines(path) as file:
        file.write(b"new\n")
        assert path.read_bytes() == after  # at once: a killed process loses no line


def test_the_log_shows_on_the_terminal_what_the_file_keeps(config, runtime, tmp_path, capsys):
    made = runtime(config)
    made.log("step:1/2 train_loss:5.9513")
    made.log("ünïcode")
    made.progress("step:1/2 eta:3s")
    assert capsys.readouterr().out == "step:1/2 train_loss:5.9513\nünïcode\n"
    assert (tmp_path / "deep/run/train.log").read_text() == "step:1/2 train_loss:5.9513\nünïcode\n"


def test_a_progress_line_is_rewritten_and_never_kept(
    config, runtime, tmp_path, capsys, monkeypatch
):
    made = runtime(config)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for text in ("eta:3s", "eta:2s"):
        made.progress(text)
    made.log("done")
    made.log("next")
    assert capsys.readouterr().out == "\r\x1b[Keta:3s\r\x1b[Keta:2s\r\x1b[Kdone\nnext\n"
    assert (tmp_path / "deep/run/train.log").read_text() == "done\nnext\n"


def test_events_are_json_lines_with_a_time_that_later_runs_append_to(config, tmp_path):
    folder = tmp_path / "deep" / "run"
    for step in (1, 2):
        made, begin = Runtime(config, {}), time.time()
        made.event("step", step=step, train_loss=1.5)
        made.close()
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"event": "ste')  # killed here
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [lines[1], lines[3]] == ['{"event": "ste'] * 2 and len(lines) == 4
    for step, line in ((1, lines[0]), (2, lines[2])):
        event = json.loads(line)
        assert list(event) == ["event", "time", "step", "train_loss"] and event["step"] == step
    assert abs(event["time"] - begin) < 60


def test_a_log_on_a_full_disk_costs_the_line_and_not_the_run(config, runtime, tmp_path, capsys):
    made = runtime(config)
    made.log("first")
    with files_at_most(0):
        made.log("second")
        made.event("step", step=1)
    made.log("third")
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\nthird\n" and "train.log cannot be written" in shown.err
    assert (tmp_path / "deep/run/train.log").read_text() == "first\nthird\n"


# Signals and time limits


def signalled(config, sequence, pipe):
    """Send ourselves signals at given times and tell what came of it."""
    made = Runtime(config, {})
    made.stop.watch_signals()
    real, begin, clock = time.monotonic, time.monotonic(), [0.0]
    time.monotonic = lambda: begin + clock[0]
    told = [(made.stop.wanted(), made.stop.reason)]
    for seconds, name in sequence:
        clock[0] = seconds
        os.kill(os.getpid(), getattr(signal, name))
        told.append((made.stop.wanted(), made.stop.reason))
        pipe.send(told)
    time.monotonic = real


@pytest.mark.parametrize(
    "sequence,exit_code,known_as",
    [
        ([(0, "SIGTERM")], 0, "SIGTERM"),
        ([(0, "SIGUSR1")], 0, "SIGUSR1"),
        ([(0, "SIGUSR1"), (0.1, "SIGTERM"), (0.4, "SIGTERM")], 0, "SIGUSR1"),
        # one wish, delivered by several messengers
        ([(0, "SIGTERM"), (0.6, "SIGTERM")], 128 + signal.SIGTERM, "SIGTERM"),
        ([(0, "SIGTERM"), (60, "SIGUSR1")], 128 + signal.SIGUSR1, "SIGTERM"),
        ([(0, "SIGUSR1"), (0.3, "SIGUSR1"), (0.6, "SIGTERM")], 128 + signal.SIGTERM, "SIGUSR1"),
    ],
)
def test_one_signal_asks_to_stop_and_a_later_one_exits_at_once(
    config, sequence, exit_code, known_as
):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=signalled, args=(config, sequence, theirs))
    process.start()
    process.join(60)
    told = None
    while ours.poll():
        told = ours.recv()
    answered = len(sequence) - (exit_code != 0)
    assert told == [(False, ""), *[(True, known_as)] * answered] and process.exitcode == exit_code


def test_signals_are_left_alone_until_they_are_watched(config, runtime):
    before = signal.getsignal(signal.SIGTERM)
    runtime(config)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "limit,slurm_seconds,left",
    [
        (0, None, None),
        (100, None, 90),
        (0, 100, 90),
        (100, 1000, 90),
        (1000, 100, 90),
        (10_000, None, 9940),
    ],
)
def test_the_time_left_is_the_nearest_limit_less_a_margin(
    config, runtime, limit, slurm_seconds, left
):
    """The margin is a tenth of the limit, at most a minute."""
    environ = (
        {} if slurm_seconds is None else {"SLURM_JOB_END_TIME": str(time.time() + slurm_seconds)}
    )
    made = runtime(tiny_config(run_dir=config.run_dir, time_limit_seconds=float(limit)), **environ)
    if left is None:
        assert made.stop.remaining() == float("inf") and not made.stop.wanted(1e9)
    else:
        assert left - 30 < made.stop.remaining() <= left
        assert not made.stop.wanted(left - 30) and made.stop.reason == ""
        assert made.stop.wanted(left + 1) and made.stop.reason == "TIME_LIMIT"
        assert made.stop.wanted(0)  # a wish to stop stays


def test_what_saving_takes_is_kept_free(config, runtime):
    made = runtime(tiny_config(run_dir=config.run_dir, time_limit_seconds=1000.0))
    before = made.stop.remaining()
    made.stop.save_seconds = 200.0
    assert before - 230 < made.stop.remaining() <= before - 200


def test_a_phase_that_cannot_finish_in_time_is_not_begun(config, runtime):
    made = runtime(tiny_config(run_dir=config.run_dir, time_limit_seconds=1000.0))
    made.stop_if_wanted("packing", 100)
    with pytest.raises(train_gpt.Stopped, match="^before packing$"):
        made.stop_if_wanted("packing", 2000)


# Devices and ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error(config):
    with pytest.raises(
        ConfigError, match="DEVICE=cuda: no CUDA device here: unset DEVICE or use DEVICE=cpu"
    ):
        Runtime(tiny_config(run_dir=config.run_dir, device="cuda"), {})


def test_one_rank_agrees_with_itself():
    comm = Comm()
    assert comm.all_reduce_scalars(3, True, 0.5) == [3.0, 1.0, 0.5]
    assert comm.gather_rows([1, 2.5]).tolist() == [[1.0, 2.5]]
    comm.barrier()


def test_a_user_has_one_key_and_one_without_a_home_has_none(config, runtime, monkeypatch, tmp_path):
    made = runtime(config)
    monkeypatch.setenv("HOME", str(tmp_path))
    key = made.user_key()
    assert re.fullmatch("[0-9a-f]{64}", key) and made.user_key() == key

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(train_gpt.Path, "expanduser", no_home)
    assert made.user_key() == ""


# How a run ends


def ending(runtime, error):
    """The exit code with which `error` ends a run."""
    with pytest.raises(SystemExit) as ended, train_gpt.reported_errors(runtime):
        raise error
    return ended.value.code


@pytest.mark.parametrize(
    "kind,code",
    [
        ("ConfigError", 2),
        ("DataError", 3),
        ("ArtifactError", 4),
        ("DivergedError", 5),
        ("LegalityError", 6),
        ("ResourceError", 7),
    ],
)
def test_an_error_a_user_can_act_on_is_told_once_in_each_place(
    config, runtime, tmp_path, capsys, kind, code
):
    made = runtime(config)
    assert ending(made, getattr(train_gpt, kind)("what is wrong: what to do")) == code
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "error: what is wrong: what to do\n")
    assert (tmp_path / "deep/run/train.log").read_text() == "error: what is wrong: what to do\n"
    (event,) = events(tmp_path / "deep/run")
    assert (event["event"], event["code"], event["message"]) == (
        "error",
        code,
        "what is wrong: what to do",
    )


def test_a_stopped_run_says_so_where_launchers_look(config, runtime, tmp_path, capsys):
    made = runtime(config)
    made.stop.reason = "SIGUSR1"
    assert ending(made, train_gpt.Stopped("in training after step 3/6")) == 75
    line = (
        "stopped signal:SIGUSR1 phase:in training after step 3/6; "
        "run the same command again to go on\n"
    )
    assert capsys.readouterr() == (line, "")
    assert (tmp_path / "deep/run/train.log").read_text() == line
    (event,) = events(tmp_path / "deep/run")
    assert (event["event"], event["signal"]) == ("stopped", "SIGUSR1")
    assert (tmp_path / "deep/run/STOPPED").exists()


def test_a_stop_that_another_rank_heard_says_so(config, runtime, capsys):
    assert ending(runtime(config), train_gpt.Stopped("in training after step 3/6")) == 75
    assert capsys.readouterr().out.startswith("stopped signal:another_rank phase:in training")


def test_an_unexpected_error_keeps_its_traceback(config, runtime, tmp_path, capsys):
    assert ending(runtime(config), ZeroDivisionError("by our own mistake")) == 1
    assert re.search(
        r"Traceback.*\n(.*\n)*.*ZeroDivisionError: by our own mistake", capsys.readouterr().err
    )
    (event,) = events(tmp_path / "deep/run")
    assert (event["code"], event["message"]) == (1, "ZeroDivisionError: by our own mistake")


def test_the_end_waits_for_a_checkpoint_and_for_no_other_thread(config, runtime, monkeypatch):
    made = runtime(config)
    written = []

    def slow_save(path, state):
        time.sleep(0.5)
        written.append(path)
        return 0

    monkeypatch.setattr(train_gpt, "save_tensors", slow_save)
    checkpoints = train_gpt.Checkpointer(made, "step", 0)
    # The thread of a pool, as a compiler leaves behind, is idle until the interpreter ends.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        checkpoints.save(1, {}, lambda seconds, size: None)
        codes = []
        end = threading.Thread(
            target=lambda: codes.append(ending(made, train_gpt.DataError("no"))), daemon=True
        )
        end.start()
        end.join(20)
        assert codes == [3] and len(written) == 1
