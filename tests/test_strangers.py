"""Files and text of strangers: nothing raw reaches a terminal, no size or setting eats memory or
time.
"""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
from helpers import ROOT, environment

import train_gpt
from train_gpt import ArtifactError, Config, ConfigError, printable

ESCAPES = "\x1b[31mred\x1b]0;owned\x07\x1b[2J\r\x00\x7f\x9b\u202e\u2066\ud800\n"


# --- Text on a terminal --------------------------------------------------------------------------


def test_controls_are_escaped_and_nothing_else():
    assert printable("val_bpb:1.1199 ▁naïve 日本 …") == "val_bpb:1.1199 ▁naïve 日本 …"
    shown = printable(f"a{ESCAPES}b")
    assert shown.isprintable() and shown.isascii()
    assert shown.encode().decode("unicode_escape") == f"a{ESCAPES}b"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    assert printable("x" * 10**6, 20) == "x" * 20 + "…"


@pytest.mark.parametrize("place", ["data_path", "eval_only"])
def test_an_error_shows_no_escape(tmp_path, place):
    """A path and a file's content are foreign text: both may come out of an archive."""
    path = tmp_path / "w.pt"
    train_gpt.save_tensors(path, {"config": {ESCAPES: 1}, "state_dict": {}, "info": {}})
    settings = dict(data_path="no\x1b[31m\nsuch", run_dir=tmp_path / "run", device="cpu")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")],
        cwd=tmp_path,
        env=environment(**settings if place == "data_path" else dict(eval_only=path)),
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == {"data_path": 3, "eval_only": 4}[place]
    lines = (done.stderr + done.stdout).decode().splitlines()
    assert lines and all(line.isprintable() for line in lines)


# --- Settings that an artifact may carry ---------------------------------------------------------


def test_every_number_that_an_artifact_carries_has_an_upper_bound():
    for field in dataclasses.fields(Config):
        if field.metadata["kind"] not in ("arch", "eval"):
            continue
        if field.type in (int, float):
            assert math.isfinite(field.metadata["low"]) and math.isfinite(field.metadata["high"])
        else:
            assert field.type is bool or field.metadata["choices"], field.name


@pytest.mark.parametrize(
    "changes",
    [
        dict(ttt_epochs=10**9),
        dict(eval_batch_seqs=4096),
        dict(ttt_batch_seqs=2048),
        dict(eval_batch_seqs=1024, model_dim=1024),
        dict(eval_seq_len=1 << 17, eval_batch_seqs=64, ttt_chunk_tokens=1 << 17, eval_stride=1024),
        dict(eval_seq_len=2048, eval_stride=1),
    ],
    ids=str,
)
def test_a_setting_that_would_eat_memory_or_time_is_refused(changes):
    with pytest.raises(ConfigError, match="at most"):
        Config(**changes)


def test_settings_of_the_field_are_allowed():
    Config(eval_batch_seqs=128, eval_seq_len=2048)
    Config(eval_batch_seqs=512, ttt_epochs=30, slot_steps=24)
    Config(eval_stride=1)
    Config(eval_seq_len=8192, ttt_chunk_tokens=1 << 16)
    Config(ttt_chunk_tokens=1 << 20)


# --- Files of weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, head", [("w.pt", b""), ("m.ptz", train_gpt.ARTIFACT_MAGIC)])
def test_a_file_of_40_gigabytes_is_refused_before_it_is_read(name, head, tmp_path):
    path = tmp_path / name
    path.write_bytes(head)
    os.truncate(path, 40 << 30)  # sparse: takes no room
    with pytest.raises(ArtifactError):
        train_gpt.load_weights(path)
