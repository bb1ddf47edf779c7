"""Files, tensors and states on disk, the run directory, its lock, the log, signals, exit codes."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import time

import pytest
import torch
from helpers import contents, events, log_of, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ArtifactError,
    Checkpointer,
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


# ---- atomic files ----


def test_a_write_leaves_the_new_file_or_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state"

    def half(error):
        yield b"half of the new"
        raise error

    def full(*arguments):
        raise OSError(28, "No space left on device")

    write_atomic(path, [b"o", b"ld"])
    wanted = f"cannot write {path}: No space left on device: free space"
    with pytest.raises(ResourceError, match=wanted):
        write_atomic(path, half(OSError(28, "No space left on device")))
    assert contents(tmp_path) == {"state": b"old"}
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(ResourceError, match=wanted):
            patch.setattr(os, call, full)
            write_atomic(path, [b"new"])
        assert contents(tmp_path) == {"state": b"old"}, call
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half(KeyboardInterrupt()))
    assert path.read_bytes() == b"old"
    write_atomic(path, [b"new"])
    assert contents(tmp_path) == {"state": b"new"}
    with pytest.raises(ResourceError, match="cannot write .*gone/state: No such file or directory"):
        write_atomic(tmp_path / "gone" / "state", [b"new"])


# ---- tensors on disk ----

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


def test_a_saved_tree_comes_back_bit_for_bit_as_tensors_of_its_own(tmp_path):
    path = tmp_path / "step.pt"
    assert save_tensors(path, STATE) == path.stat().st_size
    first = load_tensors(path)
    assert equal(first, STATE) and first["model"]["a.weight"].device.type == "cpu"
    first["model"]["a.weight"].zero_()  # the file is mapped, but a change stays in memory
    assert equal(load_tensors(path), STATE)


def test_a_file_with_the_trailing_digest_of_older_versions_is_read(tmp_path):
    path = tmp_path / "step.pt"
    save_tensors(path, STATE)
    blob = path.read_bytes()
    path.write_bytes(blob + hashlib.sha256(blob).digest())
    assert equal(load_tensors(path), STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "step.pt"
    save_tensors(path, STATE)
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damage_to_a_saved_tree_changes_nothing_that_is_read(saved, data):
    """Some bytes of a zip file, as the time of an entry, have no meaning here."""
    path, blob = saved
    at = data.draw(st.integers(0, len(blob) - 1))
    hurt = path.with_name("damaged.pt")
    if data.draw(st.booleans()):
        changed = bytes([blob[at] ^ data.draw(st.integers(1, 255))])
        hurt.write_bytes(blob[:at] + changed + blob[at + 1 :])
        with contextlib.suppress(ArtifactError):
            assert equal(load_tensors(hurt), STATE)
    else:
        hurt.write_bytes(blob[:at])
        with pytest.raises(ArtifactError, match=f"^{hurt}: "):
            load_tensors(hurt)


class Hostile:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_reading_tensors_runs_no_code_of_the_file(tmp_path):
    torch.save({"state_dict": Hostile(str(tmp_path / "executed"))}, tmp_path / "hostile.pt")
    with pytest.raises(ArtifactError, match="hostile.pt: .*not a checkpoint of tensors"):
        load_tensors(tmp_path / "hostile.pt")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ArtifactError, match=f"^{tmp_path}/no.pt: No such file or directory"):
        load_tensors(tmp_path / "no.pt")


@pytest.mark.parametrize("missing", [1, 5, 100, 3000, 390_000])
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, missing):
    """Also one that lacks only the last bytes, where PyTorch's own file writer says nothing."""
    path = tmp_path / "step.pt"
    large = dict(STATE, large=torch.zeros(100_000))
    size = save_tensors(path, large)
    save_tensors(path, STATE)
    wanted = f"cannot write {path}: File too large: free space"
    with files_at_most(size - missing), pytest.raises(ResourceError, match=wanted):
        save_tensors(path, large)
    assert equal(load_tensors(path), STATE)
    assert [item.name for item in tmp_path.iterdir()] == ["step.pt"]


# ---- the run directory and its lock ----


@pytest.fixture
def config(tmp_path):
    return tiny_config(run_dir=str(tmp_path / "deep" / "run"))


@pytest.fixture
def folder(config, tmp_path):
    return tmp_path / "deep" / "run"


@pytest.fixture
def earlier_run(folder):
    """Files of a run that was stopped; returns its folder."""
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("config.json", "train.log", "metrics.jsonl", "checkpoint/step_00000003.pt"):
        (folder / name).write_text(f"earlier {name}\n")
    return folder


def test_a_run_directory_is_made_with_its_parents(config, runtime, folder):
    runtime(config)
    names = {item.name for item in folder.iterdir()}
    assert names == {"lock", "train.log", "metrics.jsonl", "checkpoint"}


def test_an_earlier_run_is_kept_but_for_its_unfinished_files(config, runtime, earlier_run):
    before = contents(earlier_run)
    (earlier_run / "checkpoint" / "step_00000004.pt.tmp").write_text("half")
    runtime(config)
    assert contents(earlier_run) == {**before, "lock": b""}


def test_only_rank_0_touches_the_run_directory(config, runtime, tmp_path, capsys, monkeypatch):
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(train_gpt.dist, name, lambda *_, **__: None)
    monkeypatch.setattr(Runtime, "check_dir_is_shared", lambda self: None)
    other = runtime(config, RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost")
    other.log("a line")
    other.event("step", step=1)
    assert not (tmp_path / "deep").exists() and capsys.readouterr().out == ""
    other.comm.world = 1  # no process group to leave


FORK = multiprocessing.get_context("fork")


def test_a_second_run_in_one_directory_is_refused_and_touches_nothing(config, earlier_run):
    crashing = FORK.Process(target=lambda: Runtime(config, {}) and os._exit(9))
    crashing.start()
    crashing.join()
    assert crashing.exitcode == 9
    holder = Runtime(config, {})  # neither a crash nor an end leaves the lock behind
    before = contents(earlier_run)
    wanted = f"RUN_DIR={config.run_dir} is in use by another process: wait for it"
    with pytest.raises(ConfigError, match=wanted):
        Runtime(config, {})
    assert contents(earlier_run) == before
    holder.close()
    Runtime(config, {}).close()


# ---- states ----


def test_a_save_says_what_it_took_and_the_time_limit_leaves_room_for_the_next(runtime):
    made = runtime(tiny_config(time_limit_seconds=1000.0))
    checkpoints = Checkpointer(made, "step", 0)
    left = made.stop.remaining()
    seconds, size = checkpoints.save(7, STATE)
    assert size == checkpoints.path(7).stat().st_size and 0 < seconds < 5
    made.stop.save_seconds = 200.0
    assert left - 230 < made.stop.remaining() <= left - 200
    checkpoints.save(8, STATE)
    assert left - 30 < made.stop.remaining() < left


def test_the_two_newest_states_of_a_name_are_kept_and_the_newest_is_loaded(runtime):
    made = runtime(tiny_config())
    checkpoints = Checkpointer(made, "step", 0)
    other = Checkpointer(made, "step_2", 0)
    other.save(9, dict(step=9))
    assert checkpoints.load() == (0, None) and checkpoints.last() == "none"
    for step in (3, 12, 100):
        checkpoints.save(step, dict(step=step))
    assert checkpoints.numbers() == [12, 100] and checkpoints.load() == (100, dict(step=100))
    with files_at_most(1000):  # a full disk costs one state
        assert checkpoints.save(101, STATE) is None
    assert checkpoints.last() == str(checkpoints.path(100))
    assert len(re.findall("warning: checkpoint not saved: .*free space", log_of(made.dir))) == 1
    checkpoints.path(100).write_bytes(b"damaged")
    assert checkpoints.load() == (12, dict(step=12))
    assert re.search(
        r"warning: .*step_00000100.pt: .*using the checkpoint before it", log_of(made.dir)
    )
    checkpoints.clear()
    assert checkpoints.load() == (0, None) and other.load() == (9, dict(step=9))


def test_a_state_is_due_by_the_clock_or_never(runtime):
    made = runtime(tiny_config())
    assert not Checkpointer(made, "step", 0).due()
    often, seldom = Checkpointer(made, "step", 1e-9), Checkpointer(made, "step", 60.0)
    time.sleep(0.001)
    assert often.due() and not seldom.due()


# ---- the log ----


@pytest.mark.parametrize("before", [b"", b"whole\n", b"whole\nbrok", b"\n"])
def test_a_line_that_a_killed_process_left_unfinished_is_ended(tmp_path, before):
    path = tmp_path / "lines"
    path.write_bytes(before)
    end = b"" if before.endswith(b"\n") or not before else b"\n"
    with train_gpt.open_lines(path) as file:
        file.write(b"new\n")
        assert path.read_bytes() == before + end + b"new\n"  # at once: a kill loses no line


def test_the_log_shows_on_the_terminal_what_the_file_keeps(
    config, runtime, folder, capsys, monkeypatch
):
    made = runtime(config)
    made.log("step:1/2 ünïcode\x1b[2J")
    made.progress("eta:3s")  # nothing where the output is a file
    text = "step:1/2 ünïcode\\x1b[2J\n"
    assert capsys.readouterr().out == text == log_of(folder)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for eta in ("eta:3s", "eta:2s"):
        made.progress(eta)
    made.log("done")
    made.log("next")
    assert capsys.readouterr().out == "\r\x1b[Keta:3s\r\x1b[Keta:2s\r\x1b[Kdone\nnext\n"
    assert log_of(folder) == f"{text}done\nnext\n"


def test_events_are_json_lines_with_a_time_that_later_runs_append_to(config, folder):
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


def test_a_log_on_a_full_disk_costs_the_line_and_not_the_run(config, runtime, folder, capsys):
    made = runtime(config)
    made.log("first")
    with files_at_most(0):
        made.log("second")
        made.event("step", step=1)
    made.log("third")
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\nthird\n" and "train.log cannot be written" in shown.err
    assert log_of(folder) == "first\nthird\n"


# ---- signals and time limits ----


def signalled(config, sequence, pipe):
    """Send ourselves signals at given times and tell how each was answered."""
    made = Runtime(config, {})
    made.stop.watch_signals()
    begin, clock = time.monotonic(), [0.0]
    time.monotonic = lambda: begin + clock[0]
    for seconds, name in sequence:
        clock[0] = seconds
        os.kill(os.getpid(), getattr(signal, name))
        pipe.send((made.stop.wanted(), made.stop.reason))


@pytest.mark.parametrize(
    "sequence, exit_code, known_as",
    [
        ([(0, "SIGUSR1")], 0, "SIGUSR1"),
        # one wish, delivered by several messengers
        ([(0, "SIGUSR1"), (0.1, "SIGTERM"), (0.4, "SIGTERM")], 0, "SIGUSR1"),
        ([(0, "SIGTERM"), (0.6, "SIGTERM")], 128 + signal.SIGTERM, "SIGTERM"),
        ([(0, "SIGUSR1"), (0.3, "SIGUSR1"), (60, "SIGTERM")], 128 + signal.SIGTERM, "SIGUSR1"),
    ],
)
def test_one_signal_asks_to_stop_and_a_later_one_exits_at_once(
    config, sequence, exit_code, known_as
):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=signalled, args=(config, sequence, theirs))
    process.start()
    process.join(60)
    told = []
    while ours.poll():
        told.append(ours.recv())
    answered = len(sequence) - (exit_code != 0)
    assert told == [(True, known_as)] * answered and process.exitcode == exit_code


def test_the_first_real_signal_after_a_time_limit_does_not_break_off_the_saving(runtime):
    """SLURM's warning and torchrun's SIGTERM come while a time limit's save is under way."""
    made = runtime(tiny_config(time_limit_seconds=1e-9))
    assert made.stop.wanted()
    made.stop.on_signal(signal.SIGTERM, None)  # would end this process
    assert made.stop.reason == "TIME_LIMIT"


@pytest.mark.parametrize(
    "limit, slurm_seconds, left",
    [(100, None, 90), (100, 1000, 90), (1000, 100, 90), (10_000, None, 9940), (0, None, None)],
)
def test_the_time_left_is_the_nearest_limit_less_a_margin(
    config, runtime, limit, slurm_seconds, left
):
    """The margin is a tenth of the limit, at most a minute."""
    environ = {}
    if slurm_seconds is not None:
        environ["SLURM_JOB_END_TIME"] = str(time.time() + slurm_seconds)
    made = runtime(tiny_config(run_dir=config.run_dir, time_limit_seconds=float(limit)), **environ)
    if left is None:
        assert not made.stop.wanted(1e9)
        return
    assert not made.stop.wanted(left - 30) and made.stop.reason == ""
    made.stop_if_wanted("packing", left - 30)
    with pytest.raises(train_gpt.Stopped, match="^before packing$"):
        made.stop_if_wanted("packing", left + 1)
    assert made.stop.reason == "TIME_LIMIT" and made.stop.wanted(0)  # a wish to stop stays


# ---- devices and ranks ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error(config):
    wanted = "DEVICE=cuda: no CUDA device here: unset DEVICE or use DEVICE=cpu"
    with pytest.raises(ConfigError, match=wanted):
        Runtime(tiny_config(run_dir=config.run_dir, device="cuda"), {})


# ---- how a run ends ----


def ending(runtime, error):
    """The exit code with which `error` ends a run."""
    with pytest.raises(SystemExit) as ended, train_gpt.reported_errors(runtime):
        raise error
    return ended.value.code


@pytest.mark.parametrize(
    "kind, code",
    [
        (ConfigError, 2),
        (train_gpt.DataError, 3),
        (ArtifactError, 4),
        (train_gpt.DivergedError, 5),
        (train_gpt.LegalityError, 6),
        (ResourceError, 7),
        (ZeroDivisionError, 1),  # our own mistake keeps its traceback
    ],
)
def test_an_error_is_told_once_in_each_place(config, runtime, folder, capsys, kind, code):
    text = "what is wrong: what to do"
    assert ending(runtime(config), kind(text)) == code
    message = f"ZeroDivisionError: {text}" if code == 1 else text
    out, err = capsys.readouterr()
    if code == 1:
        assert re.search(rf"Traceback.*\n(.*\n)*.*{message}", err)
    else:
        assert err == f"error: {message}\n"
    assert out == "" and log_of(folder) == f"error: {message}\n"
    (event,) = events(folder)
    assert (event["event"], event["code"], event["message"]) == ("error", code, message)


@pytest.mark.parametrize("reason, said", [("SIGUSR1", "SIGUSR1"), ("", "another_rank")])
def test_a_stopped_run_says_so_where_launchers_look(config, runtime, folder, capsys, reason, said):
    made = runtime(config)
    made.stop.reason = reason
    assert ending(made, train_gpt.Stopped("in training after step 3/6")) == 75
    line = (
        f"stopped signal:{said} phase:in training after step 3/6; "
        "run the same command again to go on\n"
    )
    assert capsys.readouterr() == (line, "") and log_of(folder) == line
    (event,) = events(folder)
    assert (event["event"], event["signal"]) == ("stopped", said)
    assert (folder / "STOPPED").exists()


# ---- any machine ----


@pytest.mark.parametrize(
    "amx, isa, dtype",
    [
        (True, None, torch.bfloat16),
        (True, "AVX512_CORE_AMX", torch.bfloat16),
        (True, "AVX512_CORE", torch.float32),
        (False, None, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_a_cpu_with_amx_alone(monkeypatch, amx, isa, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    found, reason = train_gpt.pick_dtype("auto", torch.device("cpu"))
    assert found == dtype and ("no AMX" in reason) is (dtype == torch.float32)
    assert train_gpt.pick_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16


@pytest.mark.parametrize(
    "environ, named",
    [
        (dict(RANK="many"), "RANK='many': expected a number"),
        (dict(LOCAL_RANK="many"), "LOCAL_RANK='many': expected a number"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE='0': expected a number of at least 1"),
        (dict(RANK="-1"), "RANK='-1': expected a number of at least 0"),
        (dict(SLURM_JOB_END_TIME="nan"), "SLURM_JOB_END_TIME='nan'"),
        (dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost"), "RANK=2 and WORLD_SIZE=2"),
        (dict(RANK="0", WORLD_SIZE="4"), "MASTER_ADDR beside several"),
    ],
)
def test_rank_variables_that_no_launcher_sets_are_an_error(tmp_path, environ, named):
    with pytest.raises(ConfigError, match=named):
        Runtime(tiny_config(run_dir=str(tmp_path)), environ)


@pytest.mark.parametrize("lacks", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_a_warning(runtime, monkeypatch, lacks):
    def flock(file, flags):
        raise OSError(getattr(errno, lacks), lacks)

    monkeypatch.setattr(train_gpt.fcntl, "flock", flock)
    made = runtime(tiny_config())
    assert "warning: no locks on the file system of" in log_of(made.dir)


def test_a_closed_pipe_costs_text_and_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        for _ in range(3):
            train_gpt.say("line\n", stream)


def test_ctrl_c_and_hangup_stop_a_run_but_an_ignored_signal_stays_ignored(runtime):
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        made = runtime(tiny_config())
        made.stop.watch_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        assert made.stop.wanted() and made.stop.reason == "SIGINT"
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_ranks_that_do_not_share_the_run_directory_are_an_error(runtime, monkeypatch):
    made = runtime(tiny_config())
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(train_gpt.Path, "exists", lambda path: False)
    with pytest.raises(ConfigError, match="not the same directory on all nodes"):
        made.check_dir_is_shared()
