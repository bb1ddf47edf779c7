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
from helpers import (
    VOCAB,
    contents,
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

    def refused(self, code, *named, settings=None, arguments=(), **changes):
        """An attempt must end with this code and one line that names these texts."""
        settings = {**(self.settings if settings is None else settings), **changes}
        before = contents(self.folder)
        shown = run_main(cwd=self.folder, arguments=arguments, **settings)
        assert shown.code == code, shown.err
        assert_one_clear_line(shown.err, named)
        assert "Traceback" not in shown.out
        assert_nothing_lost(before, contents(self.folder))


@pytest.fixture
def place(tmp_path, tiny_data):
    return Place(tmp_path, tiny_data)


# Texts in braces are attributes of the place.
@pytest.mark.parametrize(
    "code, changes, named",
    [
        (
            DATA,
            dict(data_path="{folder}/nowhere"),
            "{folder}/nowhere/fineweb_train_|no such directory|DATA_PATH|TOKENIZER_PATH|"
            "PRESET=demo python train_gpt.py",
        ),
        (CONFIGURATION, dict(run_dir="{tokenizer}"), "RUN_DIR={tokenizer}|writable"),
        (CONFIGURATION, dict(run_dir="{tokenizer}/a/run"), "RUN_DIR={tokenizer}/a/run|writable"),
        (CONFIGURATION, dict(run_dir="/proc/golf"), "RUN_DIR=/proc/golf|writable"),
        (
            CONFIGURATION,
            dict(mode="audit"),
            "MODE=audit|{run_dir}/final_model.int6.ptz|EVAL_ONLY",
        ),
        (DATA, dict(vocab_size=1024), "TOKENIZER_PATH={tokenizer}|384 pieces|VOCAB_SIZE|1024"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_what_to_do(place, code, changes, named):
    changes = {name: str(value).format(**vars(place)) for name, value in changes.items()}
    place.refused(code, *named.format(**vars(place)).split("|"), **changes)


@pytest.mark.parametrize(
    "arguments", [["--iterations=5"], ["train"], ["--print-config", "--verbose"]]
)
def test_an_unknown_argument_is_answered_with_how_settings_are_given(place, arguments):
    place.refused(
        CONFIGURATION, arguments[-1], "environment variables", "--help", arguments=arguments
    )


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_directory_without_shards_is_answered_with_how_to_get_them(place, split):
    for path in place.data.glob(f"fineweb_{split}_*.bin"):
        path.rename(path.with_suffix(".zip"))
    place.refused(
        DATA, f"{place.data}/fineweb_{split}_*.bin", "DATA_PATH", "PRESET=demo python train_gpt.py"
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_is_named(place, split):
    path = place.shard(split, number=int(split == "train"))
    promised = np.fromfile(path, "<i4", 3)[2]
    path.write_bytes(path.read_bytes()[:-200])
    place.refused(DATA, f"{path}: ", f"the {promised} tokens of its header")


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


def test_resuming_on_other_validation_text_is_an_error(place):
    place.refused(CONFIGURATION, mode="audit")  # RUN_DIR now belongs to this configuration
    (place.run_dir / "checkpoint" / "step_00000003.pt").write_bytes(b"hours of work")
    tokens = np.array(train_gpt.read_shard(place.shard("val")))
    tokens[50:] = np.roll(tokens[50:], 5)
    write_shard(place.shard("val"), tokens)
    place.refused(CONFIGURATION, place.run_dir, "validation text: ", "RUN_ID", mode="audit")


# ---- with an artifact ----


@pytest.fixture(scope="module")
def artifact(tiny_data):
    """Bytes of an artifact of tiny_data's tokenizer."""
    config = tiny_config()
    digest = train_gpt.sha256_file(tiny_data.tokenizer_path)
    return train_gpt.pack_artifact(
        config, train_gpt.GPT(config).state_dict(), tokenizer_sha256=digest
    )


@pytest.fixture
def evaluation(place, artifact):
    """The place with an artifact in it and settings that would score it."""
    path = place.folder / "final_model.int6.ptz"
    path.write_bytes(artifact)
    place.settings = dict(place.where, eval_only=path)
    return place


@pytest.mark.parametrize("vocab_size", [300, VOCAB])
def test_an_artifact_of_another_tokenizer_is_an_error(evaluation, vocab_size):
    path = evaluation.folder / "other.model"
    train_tokenizer(
        [f"word {chr(97 + i % 26)}{chr(97 + i // 26)} other" for i in range(500)], path, vocab_size
    )
    digest = train_gpt.sha256_file(evaluation.tokenizer)[:16]
    named = [digest] if vocab_size == VOCAB else ["300 pieces", str(VOCAB)]
    evaluation.refused(DATA, f"TOKENIZER_PATH={path}", *named, tokenizer_path=path)


def test_an_architecture_variable_must_not_contradict_the_artifact(evaluation):
    evaluation.refused(CONFIGURATION, "NUM_LAYERS=4", "3", num_layers=4)


def test_an_evaluation_needs_validation_shards_only(evaluation):
    for path in evaluation.data.glob("fineweb_*.bin"):
        path.unlink()
    evaluation.refused(DATA, f"{evaluation.data}/fineweb_val_*.bin")


# ---- as a user does ----


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
