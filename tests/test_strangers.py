"""Files and text of strangers: nothing raw reaches a terminal, no size or setting eats memory or time."""

import dataclasses
import hashlib
import io
import math
import os
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch
from conftest import ROOT, environment, tiny_config

import train_gpt
from train_gpt import ArtifactError, Config, ConfigError, printable

CARRIED = [f for f in dataclasses.fields(Config) if f.metadata["kind"] in ("arch", "eval")]
ESCAPES = "\x1b[31mred\x1b]0;owned\x07\x1b[2J\r\x00\x7f\x9b\u202e\u2066\ud800\n"


# What a terminal may show


def test_text_without_controls_is_shown_as_it_is():
    assert printable("val_bpb:1.1199 ▁naïve 日本 …") == "val_bpb:1.1199 ▁naïve 日本 …"


def test_controls_are_escaped_and_nothing_else():
    shown = printable(f"a{ESCAPES}b")
    assert shown.isprintable() and shown.isascii()
    assert shown.encode().decode("unicode_escape") == f"a{ESCAPES}b"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_long_text_is_cut():
    assert printable("x" * 10**6, 20) == "x" * 20 + "…"
    assert printable("x" * 20, 20) == "x" * 20
    assert printable(ValueError("why"), 9) == "why"


def test_nothing_raw_is_logged(runtime, tmp_path, capsys):
    made = runtime(tiny_config(run_dir=str(tmp_path / "run")))
    made.log(f"file says {ESCAPES}")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out[:-1].isprintable()
    assert (tmp_path / "run/train.log").read_text() == out


def run_script(settings, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")], cwd=folder, env=environment(**settings),
        capture_output=True, timeout=240,
    )  # fmt: skip


def only_printable(output):
    return all(line.isprintable() for line in output.decode().splitlines())


def test_an_error_at_the_start_shows_no_escape(tmp_path):
    path = tmp_path / "w.pt"
    train_gpt.save_tensors(path, {"config": {ESCAPES: 1}, "state_dict": {}, "info": {}})
    done = run_script(dict(eval_only=path), tmp_path)
    assert done.returncode == 4 and only_printable(done.stderr + done.stdout)
    assert done.stderr.count(b"\n") == 1 and b"not the final weights" in done.stderr


def test_an_error_of_the_run_shows_no_escape(tmp_path):
    """A path is foreign text as well: it may come out of an archive."""
    settings = dict(data_path="no\x1b[31m\nsuch", run_dir=tmp_path / "run", device="cpu")
    done = run_script(settings, tmp_path)
    assert done.returncode == 3 and only_printable(done.stderr + done.stdout)
    assert b"no\\x1b[31m\\nsuch" in done.stderr
    log = (tmp_path / "run/train.log").read_bytes()
    assert only_printable(log) and log.splitlines()[-1].startswith(b"error: no shard matches")


# Settings that an artifact may carry


@pytest.mark.parametrize("field", CARRIED, ids=lambda field: field.name)
def test_every_number_that_an_artifact_carries_has_an_upper_bound(field):
    if field.type in (int, float):
        assert math.isfinite(field.metadata["low"]) and math.isfinite(field.metadata["high"])
    else:
        assert field.type is bool or field.metadata["choices"]


@pytest.mark.parametrize("changes", [
    dict(ttt_epochs=10**9), dict(slot_steps=10**9), dict(eval_batch_seqs=10**18), dict(ttt_batch_seqs=10**6),
    dict(eval_seq_len=1 << 18, ttt_chunk_tokens=1 << 18), dict(ttt_chunk_tokens=1 << 30),
    dict(eval_batch_seqs=4096), dict(ttt_batch_seqs=2048), dict(eval_batch_seqs=1024, model_dim=1024),
    dict(eval_seq_len=1 << 17, eval_batch_seqs=64, ttt_chunk_tokens=1 << 17, eval_stride=1024),
    dict(eval_seq_len=2048, eval_stride=1), dict(rope_base=1e308), dict(ttt_lr=1e9), dict(slot_lr=1e9)],
    ids=str)  # fmt: skip
def test_a_setting_that_would_eat_memory_or_time_is_refused(changes):
    with pytest.raises(ConfigError, match="at most"):
        Config(**changes)


@pytest.mark.parametrize("changes", [
    dict(eval_batch_seqs=128, eval_seq_len=2048), dict(eval_batch_seqs=512), dict(eval_stride=1),
    dict(eval_seq_len=8192, ttt_chunk_tokens=1 << 16), dict(ttt_epochs=30), dict(slot_steps=24),
    dict(ttt_chunk_tokens=1 << 20)], ids=str)  # fmt: skip
def test_what_the_field_uses_is_allowed(changes):
    Config(**changes)


# Checkpoints of tensors


def seal(path, archive):
    """The file that save_tensors would have written around this archive."""
    path.write_bytes(archive + hashlib.sha256(archive).digest())
    return path


def archive_of(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deflated(archive):
    """The same entries, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def overlapping(archive):
    """A directory whose entries all point at the same bytes."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        start, largest = old.start_dir, max(old.infolist(), key=lambda entry: entry.file_size)
    buffer = io.BytesIO(archive[:start])
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        entries = old.infolist() + [largest] * 3
        old.fp, old.filelist, old.mode, old._didModify = buffer, entries, "a", True
        buffer.seek(start)
        old.start_dir = start
        old._write_end_record()
        old._didModify = False
        old.fp = None
    return buffer.getvalue()


def test_a_checkpoint_with_compressed_entries_is_refused(tmp_path):
    """2 MB of them could hold 2 GB of zeros."""
    archive = archive_of(dict(x=torch.zeros(1 << 20)))
    packed = deflated(archive)
    assert len(packed) < len(archive) / 100
    with pytest.raises(ArtifactError, match="w.pt: not a checkpoint of tensors .its entries are compressed"):
        train_gpt.load_tensors(seal(tmp_path / "w.pt", packed))


def test_a_checkpoint_with_overlapping_entries_is_refused(tmp_path):
    archive = archive_of(dict(x=torch.zeros(1 << 12)))
    with pytest.raises(ArtifactError, match="not a checkpoint of tensors .its entries are larger than the"):
        train_gpt.load_tensors(seal(tmp_path / "w.pt", overlapping(archive)))


def test_what_was_saved_is_read_back(tmp_path):
    state = dict(x=torch.arange(5.0), y=[torch.zeros(2, 3, dtype=torch.bfloat16)], step=7, name="…")
    size = train_gpt.save_tensors(tmp_path / "w.pt", state)
    assert size == (tmp_path / "w.pt").stat().st_size
    found = train_gpt.load_tensors(tmp_path / "w.pt", size)
    assert torch.equal(found["x"], state["x"]) and found["step"] == 7 and found["name"] == "…"
    assert found["y"][0].dtype == torch.bfloat16
    with pytest.raises(ArtifactError, match=f"{size} bytes are more than the {size - 1}"):
        train_gpt.load_tensors(tmp_path / "w.pt", size - 1)


BOUNDED = textwrap.dedent("""
    import resource, sys, train_gpt
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    for path in sys.argv[1:]:
        try:
            train_gpt.load_weights(path)
        except train_gpt.ArtifactError as error:
            print(error)
""")
HOSTILE = dict(
    huge=dict(config=dict(num_layers=64, model_dim=4096, mlp_mult=16.0), state_dict={}, info={}),
    expanded=dict(config={}, state_dict=dict(x=torch.zeros(1).expand(1 << 40)), info={}),
    sparse=dict(config={}, state_dict=dict(x=torch.zeros(2, 2).to_sparse()), info={}),
    list=dict(config={}, state_dict=[torch.zeros(2)], info={}),
    escapes=dict(config={"\x1b[2J": 1}, state_dict={}, info={}),
    info=dict(config={}, state_dict={}, info=7),
    tensor=torch.zeros(3), empty=[], none=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """{name: line} of what a process with 6 GB says to hostile files, and what it prints besides."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, content in HOSTILE.items():
        train_gpt.save_tensors(folder / f"{name}.pt", content)
    for name, head in (("float.pt", b""), ("int6.ptz", train_gpt.ARTIFACT_MAGIC)):
        (folder / name).write_bytes(head)
        os.truncate(folder / name, 40 << 30)  # sparse: takes no room
    paths = sorted(map(str, folder.iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *paths], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    return {os.path.basename(path): (path, line) for path, line in zip(paths, lines, strict=True)}


@pytest.mark.parametrize("name", ["float.pt", "int6.ptz"])
def test_a_sparse_file_is_refused_by_its_size(refusals, name):
    assert f"{40 << 30} bytes are more than" in refusals[name][1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_are_one_clear_error_in_bounded_memory(refusals, name):
    path, line = refusals[f"{name}.pt"]
    assert line.isprintable() and line.startswith(f"{path}: not")


def test_damaged_archives_never_end_in_another_error(tmp_path):
    """Bytes changed one at a time all over a small archive, with the right checksum around it."""
    archive = archive_of(dict(config={}, state_dict=dict(x=torch.arange(4.0)), info={}))
    for at in range(0, len(archive), 7):
        for value in (0, 0x2E, 0xFF):
            damaged = archive[:at] + bytes([value]) + archive[at + 1 :]
            try:
                train_gpt.load_weights(seal(tmp_path / "w.pt", damaged))
            except ArtifactError as error:
                assert printable(error) == str(error)
