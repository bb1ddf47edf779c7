"""Data sets as bug reports describe them: each gets its own message, and no wrong score."""

import shutil

import numpy as np
import pytest
from helpers import VOCAB, run_main, tiny_config, train_tokenizer

import train_gpt
from train_gpt import BOS, read_shard, write_shard

DATA = 3


class Odd:
    """A copy of the tiny data set to be changed, and runs of one step on it."""

    def __init__(self, folder, tiny_data):
        self.folder = folder
        self.data = folder / "data"
        shutil.copytree(tiny_data.data_path, self.data)
        self.tokenizer = self.data / "tokenizer.model"
        where = dict(data_path=self.data, tokenizer_path=self.tokenizer)
        self.settings = {**tiny_data.settings, **where, "iterations": 1, "ttt_enabled": False}

    def change(self, split, change):
        """Replace the tokens of the split's first shard by change(tokens)."""
        path = self.data / f"fineweb_{split}_000000.bin"
        write_shard(path, change(np.array(read_shard(path))))

    def validation(self):
        config = tiny_config(data_path=str(self.data), tokenizer_path=str(self.tokenizer))
        return train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))

    def run(self, **changes):
        return run_main(self.folder / "run", cwd=self.folder, **{**self.settings, **changes})

    def warnings(self, **changes):
        done = self.run(**changes)
        assert done.code == 0, done.err
        return [line for line in done.out.splitlines() if line.startswith("warning: ")]


@pytest.fixture
def odd(tmp_path, tiny_data):
    return Odd(tmp_path, tiny_data)


def test_the_plain_data_set_is_not_warned_about(odd):
    assert odd.warnings() == []


def test_files_beside_the_shards_are_named_and_not_read(odd):
    # The byte files of case-token data sets have the format of shards and the prefix of the split.
    for name in ("fineweb_val_bytes_000000.bin", "fineweb_train_000000.bin.part"):
        write_shard(odd.data / name, np.full(5000, 7))
    (warning,) = odd.warnings()
    names = "fineweb_train_000000.bin.part, fineweb_val_bytes_000000.bin"
    assert f"not shards, not read: {names} in" in warning
    plain = read_shard(odd.data / "fineweb_val_000000.bin")
    assert np.array_equal(odd.validation().tokens, plain[: odd.validation().num_targets + 1])


def test_a_tokenizer_of_case_operators_is_refused(odd):
    texts = ["\ue001the cat sat on the mat and \ue002so on"] * 50
    options = dict(user_defined_symbols="\ue001", hard_vocab_limit=False)
    train_tokenizer(texts, odd.tokenizer, VOCAB, **options)
    done = odd.run()
    assert done.code == DATA and "case tokens" in done.err and r"'\ue001'" in done.err


def test_each_oddity_of_the_text_is_told_by_a_warning_of_its_own(odd, monkeypatch):
    (odd.data / "fineweb_train_000001.bin").unlink()
    odd.change("train", lambda tokens: tokens[:700])
    odd.change("val", lambda tokens: tokens[tokens != BOS])
    monkeypatch.setitem(train_gpt.CANONICAL_TARGETS, VOCAB, 4321)
    starts, targets, passes = odd.warnings(iterations=3)
    assert "no document starts" in starts and f"token {BOS}" in starts
    assert "1472 validation targets" in targets and "4321" in targets
    assert "ITERATIONS=3 read the 700 training tokens 2.2 times" in passes


def test_a_text_of_no_bytes_is_refused(odd):
    odd.change("val", lambda tokens: np.full_like(tokens, BOS))
    done = odd.run()
    assert done.code == DATA and "stand for no text (0 bytes)" in done.err


def test_a_document_cut_inside_a_character_is_told_apart_from_wrong_counts(odd):
    processor = train_gpt.TokenBytes(odd.tokenizer).model
    part = processor.encode("€")
    assert len(part) > 1, "a character of several byte pieces"
    before, after = processor.encode(["a price in ", "another text"])
    cut = [BOS, *before, *part[:-1], BOS, *after]
    odd.change("val", lambda tokens: np.concatenate([cut, tokens]))
    done = odd.run()
    assert done.code == DATA and "is cut inside a character" in done.err


def test_a_shard_that_is_there_twice_is_refused_with_both_names(odd):
    shutil.copy(odd.data / "fineweb_train_000000.bin", odd.data / "fineweb_train_000007.bin")
    done = odd.run()
    assert done.code == DATA
    assert "fineweb_train_000007.bin holds the same tokens as" in done.err
    assert "fineweb_train_000000.bin" in done.err


def test_a_folder_that_may_not_be_read_is_an_error(monkeypatch, odd):
    def listdir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train_gpt.os, "listdir", listdir)  # root may read all: no chmod shows it
    done = odd.run()
    assert done.code == DATA and "cannot be read (Permission denied)" in done.err


def test_the_next_command_is_quoted_for_a_shell(odd):
    spaced = odd.folder / "my data"
    odd.data.rename(spaced)
    done = odd.run(data_path=spaced, tokenizer_path=spaced / "tokenizer.model")
    (line,) = [line for line in done.out.splitlines() if line.startswith("next: ")]
    assert f"'DATA_PATH={spaced}'" in line


def test_the_bytes_of_a_long_text_are_summed_without_wrapping(odd):
    odd.change("val", lambda tokens: np.tile(tokens, 40))
    val = odd.validation()
    total = sum(val.bytes.tolist())
    assert val.fingerprint["val_bytes"] == total > 2**16


# ---- the machine and the length of the run ----


@pytest.mark.parametrize("device, named", [("auto", "no GPU found"), ("cpu", "DEVICE=cpu")])
def test_a_cpu_that_would_train_for_days_is_told(odd, monkeypatch, device, named):
    # One step that claims the work of days: the warning is of the preset's own length.
    monkeypatch.setattr(train_gpt, "flops_per_token", lambda model: 1e15)
    (warning,) = odd.warnings(device=device)
    assert named in warning and "days; PRESET=demo runs here" in warning


def test_a_warmdown_longer_than_the_cap_is_told_with_what_would_mend_it(odd, monkeypatch):
    settings = dict(iterations=1000, warmdown_iters=600, max_wallclock_seconds=0.5)
    (warning,) = [w for w in odd.warnings(**settings) if "WARMDOWN" in w]
    assert "stays below 0." in warning and "WARMDOWN_FRAC=0.60" in warning
