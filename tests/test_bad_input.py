"""Whatever a user gets wrong: one clear line, the right exit code, no traceback, and nothing lost.

Most attempts run main() in this process, which saves the seconds of importing PyTorch; a few run
the script as a user does.
"""

import concurrent.futures
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    VOCAB,
    contents,
    events,
    launch,
    run_main,
    tiny_config,
    train_tokenizer,
)

import train_gpt
from train_gpt import write_shard

CONFIGURATION, DATA, ARTIFACT = 2, 3, 4
ADVICE = re.compile(
    r"\b(set|unset|use|change|raise|lower|restore|download|get|see|name|rename|run|train|wait|check"
    r"|copy) "
)


def assert_nothing_lost(before, after):
    for name, content in before.items():
        grows = Path(name).name in ("train.log", "metrics.jsonl")
        assert after[name].startswith(content) if grows else after[name] == content, name


def assert_one_clear_line(stderr, named, advice=True):
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), (
        stderr
    )
    assert [text for text in map(str, named) if text not in stderr] == [], stderr
    assert not advice or ADVICE.search(stderr), f"says not what to do: {stderr}"


class Place:
    """A working directory with data, an earlier file in RUN_DIR, and settings that would train."""

    def __init__(self, folder, tiny_data):
        self.folder = folder
        self.data, self.run_dir = folder / "data", folder / "run"
        shutil.copytree(tiny_data.data_path, self.data)
        self.run_dir.mkdir()
        (self.run_dir / "notes.txt").write_text("do not lose me")
        self.tokenizer = self.data / "tokenizer.model"
        self.where = dict(
            data_path=self.data, tokenizer_path=self.tokenizer, run_dir=self.run_dir, device="cpu"
        )
        self.settings = {**tiny_data.settings, **self.where}

    def shard(self, split, number=0):
        return self.data / f"fineweb_{split}_{number:06d}.bin"

    def refused(self, code, *named, settings=None, arguments=(), advice=True, **changes):
        """An attempt must end with this code and one line that names these texts; returns the
        line."""
        settings = {**(self.settings if settings is None else settings), **changes}
        settings = {name: value for name, value in settings.items() if value is not None}
        before = contents(self.folder)
        shown = run_main(cwd=self.folder, arguments=arguments, **settings)
        assert shown.code == code, shown.err
        assert_one_clear_line(shown.err, named, advice)
        assert "Traceback" not in shown.out
        assert_nothing_lost(before, contents(self.folder))
        return shown.err


@pytest.fixture
def place(tmp_path, tiny_data):
    return Place(tmp_path, tiny_data)


# Settings


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(preset="nfm_8k"), ["PRESET='nfm_8k'", "expected one of nfm_7k"]),
        (dict(iteratons=5), ["ITERATONS='5'", "ITERATIONS"]),
        (dict(matrix_lr="fast"), ["MATRIX_LR='fast'", "float"]),
        (dict(num_layers=0), ["NUM_LAYERS=0", "at least 1"]),
        (dict(num_heads=3), ["MODEL_DIM=32", "NUM_HEADS=3", "change one"]),
        (dict(rope_dims=16), ["ROPE_DIMS=16", "MODEL_DIM/NUM_HEADS = 8"]),
    ],
)
def test_a_variable_that_cannot_be_used_is_named_with_what_is_expected(place, changes, named):
    place.refused(CONFIGURATION, *named, advice=False, **changes)


@pytest.mark.parametrize(
    "arguments", [["--iterations=5"], ["train"], ["--print-config", "--verbose"]]
)
def test_an_unknown_argument_is_answered_with_how_settings_are_given(place, arguments):
    place.refused(
        CONFIGURATION, arguments[-1], "environment variables", "--help", arguments=arguments
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(place):
    place.refused(CONFIGURATION, "DEVICE=cuda", "DEVICE=cpu", device="cuda")


# Directories


def test_an_error_after_the_start_is_in_the_runs_own_log_too(place):
    line = place.refused(DATA, place.folder / "nowhere", data_path=place.folder / "nowhere")
    assert (place.run_dir / "train.log").read_text().endswith(line)
    (event,) = events(place.run_dir, "error")
    assert event["code"] == DATA and f"error: {event['message']}\n" == line


@pytest.mark.parametrize(
    "run_dir",
    ["data/tokenizer.model", "data/tokenizer.model/deeper/run", "/proc/golf", "/dev/null/run"],
)
def test_an_output_directory_that_cannot_be_written_is_named(place, run_dir):
    path = run_dir if run_dir.startswith("/") else place.folder / run_dir
    place.refused(CONFIGURATION, f"RUN_DIR={path}", "writable", run_dir=path)


def test_a_demo_whose_data_cannot_be_built_says_where(place):
    (place.folder / "elsewhere").mkdir()
    place.folder /= "elsewhere"
    (place.folder / "data").write_text("a file where the demo's data would go")
    place.refused(
        DATA,
        "data/datasets/demo_sp1024",
        "writable",
        settings=dict(preset="demo", device="cpu", run_dir=place.run_dir),
    )


# Shards


def test_a_missing_data_directory_is_answered_with_how_to_get_the_data_and_with_the_demo(place):
    place.refused(
        DATA,
        f"{place.folder}/nowhere/fineweb_train_",
        "no such directory",
        "DATA_PATH",
        "TOKENIZER_PATH",
        "PRESET=demo python train_gpt.py",
        data_path=place.folder / "nowhere",
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_directory_without_shards_is_answered_likewise(place, split):
    for path in place.data.glob(f"fineweb_{split}_*.bin"):
        path.rename(path.with_suffix(".zip"))
    place.refused(
        DATA, f"{place.data}/fineweb_{split}_*.bin", "DATA_PATH", "PRESET=demo python train_gpt.py"
    )


def damage(path, how):
    """Damage a shard; returns what the error must tell of it."""
    blob, header = path.read_bytes(), np.fromfile(path, "<i4", 256)
    promised = f"the {header[2]} tokens of its header"
    if how in ("magic", "version"):
        header[1 if how == "version" else 0] += 1
        path.write_bytes(header.tobytes() + blob[1024:])
        return f"expected [{train_gpt.SHARD_MAGIC}, 1]"
    changed = {
        "truncated": blob[:-200],
        "over-long": blob + bytes(2),
        "header only": blob[:1024],
        "empty": b"",
    }[how]
    path.write_bytes(changed)
    return promised if len(changed) >= 1024 else "not a token shard"


@pytest.mark.parametrize(
    "how, split",
    [
        ("magic", "train"),
        ("version", "val"),
        ("truncated", "train"),
        ("truncated", "val"),
        ("over-long", "val"),
        ("header only", "train"),
        ("empty", "val"),
    ],
)
def test_a_damaged_shard_is_named_with_what_is_wrong(place, split, how):
    path = place.shard(split, number=int(split == "train"))
    found = damage(path, how)
    place.refused(DATA, f"{path}: ", found)


@pytest.mark.parametrize(
    "split,number,where",
    [("val", 0, "fineweb_val_*.bin"), ("train", 0, "fineweb_train_000000.bin")],
)
def test_a_token_outside_the_vocabulary_is_named_with_its_shard(place, split, number, where):
    path = place.shard(split, number)
    tokens = np.array(train_gpt.read_shard(path))
    tokens[100] = VOCAB
    write_shard(path, tokens)
    place.refused(DATA, f"{place.data}/{where}", f"token id {VOCAB}", f"VOCAB_SIZE={VOCAB}")


def test_validation_data_shorter_than_one_window_are_an_error(place):
    write_shard(place.shard("val"), np.array(train_gpt.read_shard(place.shard("val"))[:64]))
    place.refused(DATA, place.data, "64 validation tokens", "EVAL_SEQ_LEN=64")


# The tokenizer


@pytest.mark.parametrize(
    "content", [None, b"", b"no model at all", "half of one", "a directory", "a shard"]
)
def test_a_missing_or_wrong_tokenizer_file_is_named(place, content):
    blob, path = place.tokenizer.read_bytes(), place.folder / "other.model"
    if content == "a directory":
        path.mkdir()
    elif content is not None:
        parts = {"half of one": blob[: len(blob) // 2], "a shard": place.shard("val").read_bytes()}
        path.write_bytes(parts.get(content, content))
    place.refused(DATA, f"TOKENIZER_PATH={path}", "SentencePiece", "README", tokenizer_path=path)


def other_tokenizer(place, vocab_size):
    path = place.folder / "other.model"
    train_tokenizer(
        [f"word {chr(97 + i % 26)}{chr(97 + i // 26)} other" for i in range(500)], path, vocab_size
    )
    return path


def test_a_tokenizer_of_another_vocabulary_is_named_with_both_sizes(place):
    path = other_tokenizer(place, 300)
    place.refused(
        DATA, f"TOKENIZER_PATH={path}", "300 pieces", "VOCAB_SIZE", f"{VOCAB}", tokenizer_path=path
    )
    place.refused(
        DATA,
        f"TOKENIZER_PATH={place.tokenizer}",
        f"{VOCAB} pieces",
        "VOCAB_SIZE",
        "1024",
        vocab_size=1024,
    )


# Artifacts


@pytest.fixture(scope="module")
def artifact(tiny_data):
    """Bytes of an artifact of tiny_data's tokenizer."""
    torch.manual_seed(0)
    config = tiny_config()
    digest = train_gpt.sha256_file(tiny_data.tokenizer_path)
    return train_gpt.pack_artifact(
        config, train_gpt.GPT(config).state_dict(), tokenizer_sha256=digest
    )


@pytest.fixture
def evaluation(place, artifact):
    """place with an artifact in it, as `evaluation.artifact`, and settings that would score it."""
    place.artifact = place.folder / "final_model.int6.ptz"
    place.artifact.write_bytes(artifact)
    place.settings = dict(place.where, eval_only=place.artifact)
    return place


def flipped(blob, at):
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda blob: blob[:-1],
        lambda blob: blob[:40],
        lambda blob: blob[:4],
        lambda blob: b"",
        lambda blob: blob + b"\0",
        lambda blob: flipped(blob, len(blob) // 2),
        lambda blob: flipped(blob, 8),
        lambda blob: flipped(blob, 3),
        lambda blob: b"\x28\xb5\x2f\xfd" + blob[60:],
    ],
    ids=[
        "a byte short",
        "head cut",
        "magic cut",
        "empty",
        "over-long",
        "payload changed",
        "version changed",
        "magic changed",
        "foreign",
    ],
)
def test_a_truncated_damaged_or_foreign_artifact_is_named(evaluation, artifact, change):
    evaluation.artifact.write_bytes(change(artifact))
    evaluation.refused(ARTIFACT, evaluation.artifact)


@pytest.mark.parametrize("run_id", [None, "mine"])
def test_a_missing_artifact_is_named(evaluation, run_id):
    path = evaluation.folder / "no" / "artifact.ptz"
    evaluation.refused(ARTIFACT, path, "No such file", eval_only=path, run_id=run_id)


def test_a_directory_is_no_artifact(evaluation):
    evaluation.refused(ARTIFACT, evaluation.data, eval_only=evaluation.data)


@pytest.mark.parametrize("saved", [dict(state_dict={}), dict(model={}, step=3)])
def test_a_foreign_checkpoint_is_not_taken_for_the_final_weights(evaluation, saved):
    path = evaluation.folder / "model.pt"
    torch.save(saved, path)
    evaluation.refused(ARTIFACT, path, "final_model.pt", eval_only=path)


def test_an_artifact_of_another_vocabulary_than_the_tokenizers_is_an_error(evaluation):
    path = other_tokenizer(evaluation, 300)
    evaluation.refused(
        DATA, f"TOKENIZER_PATH={path}", "300 pieces", str(VOCAB), tokenizer_path=path
    )


def test_an_artifact_of_another_tokenizer_of_the_same_size_is_an_error(evaluation):
    path = other_tokenizer(evaluation, VOCAB)
    digest = train_gpt.sha256_file(evaluation.tokenizer)
    evaluation.refused(DATA, f"TOKENIZER_PATH={path}", digest[:16], tokenizer_path=path)


def test_an_architecture_variable_must_not_contradict_the_artifact(evaluation):
    evaluation.refused(CONFIGURATION, "NUM_LAYERS=4", "3", num_layers=4)


def test_an_evaluation_needs_validation_shards_only(evaluation):
    for path in evaluation.data.glob("fineweb_*.bin"):
        path.unlink()
    evaluation.refused(DATA, f"{evaluation.data}/fineweb_val_*.bin")


# Runs


def test_an_audit_without_an_artifact_is_told_what_to_name(place):
    place.refused(
        CONFIGURATION,
        "MODE=audit",
        place.run_dir / "final_model.int6.ptz",
        "EVAL_ONLY",
        mode="audit",
    )


def test_resuming_on_other_validation_text_is_an_error(place):
    place.refused(CONFIGURATION, mode="audit")  # RUN_DIR now belongs to this configuration
    (place.run_dir / "checkpoint" / "step_00000003.pt").write_bytes(b"hours of work")
    tokens = np.array(train_gpt.read_shard(place.shard("val")))
    tokens[50:] = np.roll(tokens[50:], 5)
    write_shard(place.shard("val"), tokens)
    place.refused(CONFIGURATION, place.run_dir, "validation text: ", "RUN_ID", mode="audit")


# As a user does


def test_the_process_ends_with_the_same_line_and_code(place, artifact):
    damaged = place.folder / "damaged.ptz"
    damaged.write_bytes(artifact[:-7])
    cases = [
        ({"preset": "nfm_8k"}, CONFIGURATION, "PRESET='nfm_8k'"),
        ({"data_path": place.folder / "nowhere"}, DATA, "nowhere/fineweb_train_"),
        ({"eval_only": damaged, "run_dir": place.folder / "scored"}, ARTIFACT, "damaged.ptz"),
    ]
    before = contents(place.folder)
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        ended = list(
            pool.map(lambda case: launch({**place.settings, **case[0]}, place.folder), cases)
        )
    for done, (_, code, named) in zip(ended, cases):
        assert done.returncode == code
        assert_one_clear_line(done.stderr, [named], advice=code != CONFIGURATION)
    assert_nothing_lost(before, contents(place.folder))
