"""The verifier: clean scripts pass, violations do not; nothing that a script says is believed."""

import contextlib
import io
import json
import math
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, launch, train_tokenizer

sys.path.insert(0, str(ROOT / "slurm"))

import verify  # noqa: E402
import warm  # noqa: E402
from violations import VIOLATIONS, Violation, injected  # noqa: E402

import train_gpt  # noqa: E402

LABELS = ("final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")
SOURCE = (ROOT / "train_gpt.py").read_text()


# --------------------------------------------------------------------------------------------------
# A small trained model and its data
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A directory with a tokenizer of 384 pieces, a training shard and 30,000 validation tokens."""
    folder = tmp_path_factory.mktemp("text")
    texts = [pydoc_data.topics.topics[name][:6000] for name in sorted(pydoc_data.topics.topics)]
    model = train_tokenizer(texts, folder / "tokenizer.model")
    documents = [np.array([train_gpt.BOS, *model.encode(text)]) for text in texts]
    train_gpt.write_shard(folder / "fineweb_train_000000.bin", np.concatenate(documents[:60]))
    train_gpt.write_shard(
        folder / "fineweb_val_000000.bin", np.concatenate(documents[60:])[:30_000]
    )
    return folder


@pytest.fixture(scope="session")
def submission(data, tmp_path_factory):
    """A folder with the script, a tokenizer and an artifact that was trained for some seconds."""
    folder, run = tmp_path_factory.mktemp("submission"), tmp_path_factory.mktemp("run")
    settings = dict(
        TINY,
        data_path=data,
        tokenizer_path=data / "tokenizer.model",
        run_dir=run,
        iterations=120,
        warmdown_iters=40,
        ttt_enabled=False,
        eval_stride=64,
    )
    settings |= dict(train_batch_tokens=256, train_log_every=40)
    # The validation text is scored by the tests themselves; here a short one will do.
    short = tmp_path_factory.mktemp("short")
    shutil.copy(data / "fineweb_train_000000.bin", short)
    train_gpt.write_shard(
        short / "fineweb_val_000000.bin", verify.read_shard(data / "fineweb_val_000000.bin")[:300]
    )
    done = launch({**settings, "data_path": short}, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    shutil.copy(run / "final_model.int6.ptz", folder)
    shutil.copy(data / "tokenizer.model", folder)
    shutil.copy(ROOT / "train_gpt.py", folder)
    return folder


TEST_SETTINGS = ("--set", "TTT_ENABLED=1", "--set", "EVAL_STRIDE=16", "--set", "TTT_LR=0.05")


@pytest.fixture
def judge(data, submission, monkeypatch, tmp_path):
    """call(violation, *arguments) -> exit code, report, what was printed; runs are forks."""
    monkeypatch.setattr(verify, "Sandbox", warm.WarmSandbox)

    def call(violation=None, *arguments):
        folder = tmp_path / "candidate"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(submission, folder)
        if violation:
            (folder / "train_gpt.py").write_text(injected(SOURCE, violation))
            for name, value in violation.settings:
                arguments += ("--set", f"{name}={value}")
        return run_verifier(
            folder,
            data,
            tmp_path,
            "--tokens",
            "3000",
            "--minutes",
            "15",
            "--jobs",
            "2",
            "--seed",
            "3",
            *TEST_SETTINGS,
            *arguments,
        )

    return call


def run_verifier(folder, data, tmp_path, *arguments):
    """(exit code, report, printed text) of the command line."""
    printed, path = io.StringIO(), tmp_path / "report.json"
    path.unlink(missing_ok=True)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = verify.main([str(folder), "--data", str(data), "--json", str(path), *arguments])
    report = json.loads(path.read_text()) if path.exists() else None
    return code, report, printed.getvalue()


def statuses(report):
    return {(r["test"], r["label"]): r["status"] for r in report["results"]}


# --------------------------------------------------------------------------------------------------
# Verdicts on the real script
# --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_clean_script_passes_every_test(judge):
    code, report, printed = judge(None, "--twins", "4")
    assert code == 0, printed
    found = statuses(report)
    for label in LABELS:
        for test in ("repeat", "recount", "bet", "twins"):
            assert found[test, label] == "pass"
    assert found["training twin", ""] == found["model alone", ""] == "pass"
    assert report["exit_code"] == 0 and report["runs"] == 9 and report["seed"] == 3
    assert report["not_run"] == ["overlap", "whole text"]
    # Three bets at e^-14; all other tests compare digits or bits.
    assert report["error_probability"] == pytest.approx(3 * math.exp(-14))
    assert "own model" in next(r["detail"] for r in report["results"] if r["test"] == "bet")


# One of each kind; all of them under --slow.
QUICK = (
    "every_space_counts",
    "better_unless_watched",
    "bos_free",
    "smear_leaks_a_little",
    "ahead_with_ttt",
    "tuned_before_packing",
)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_a_violation_is_found(judge, name):
    violation = next(v for v in VIOLATIONS if v.name == name)
    training = () if violation.condition == "training" else ("--skip-training",)
    code, report, printed = judge(violation, "--twins", "4", "--stop", *training)
    assert code == 6, printed


@pytest.mark.slow
def test_at_least_95_percent_of_the_violations_are_found(judge):
    missed = []
    for violation in VIOLATIONS:
        training = () if violation.condition == "training" else ("--skip-training",)
        code, _, printed = judge(
            violation, "--tokens", "6000", "--twins", "10", "--stop", *training
        )
        if code != 6:
            missed.append(violation.name)
    assert len(missed) <= 0.05 * len(VIOLATIONS), missed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("slot", ["off", "causal"])
def test_no_false_alarm(judge, seed, slot):
    code, _, printed = judge(None, "--seed", str(seed), "--set", f"SLOT={slot}")
    assert code == 0, printed


@pytest.mark.slow
def test_no_false_alarm_on_two_ranks(submission, data, tmp_path):
    code, _, printed = run_verifier(
        submission,
        data,
        tmp_path,
        "--tokens",
        "2000",
        "--twins",
        "3",
        "--ranks",
        "2",
        "--jobs",
        "1",
        *TEST_SETTINGS,
    )
    assert code == 0, printed


@pytest.mark.slow
def test_published_slot_is_illegal_by_its_own_words(judge):
    code, report, _ = judge(
        None, "--set", "SLOT=published", "--skip-training", "--twins", "2", "--stop"
    )
    assert code == 6
    assert statuses(report)["own verdict", "illegal_ttt_slot_published"] == "FAIL"


# --------------------------------------------------------------------------------------------------
# The list of violations
# --------------------------------------------------------------------------------------------------
def test_there_are_at_least_forty_violations_of_every_condition():
    assert len(VIOLATIONS) >= 40 and len({v.name for v in VIOLATIONS}) == len(VIOLATIONS)
    assert {v.condition for v in VIOLATIONS} == {"C1", "C2", "C3", "C4", "bytes", "training"}
    assert {v.caught_by for v in VIOLATIONS} == {"verify", "both"}


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: v.name)
def test_every_violation_still_applies(violation):
    assert injected(SOURCE, violation) != SOURCE


@pytest.mark.slow
@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: v.name)
def test_every_violation_is_a_script(violation):
    compile(injected(SOURCE, violation), violation.name, "exec")


def test_a_violation_that_does_not_apply_is_an_error():
    with pytest.raises(AssertionError, match="no_such_line"):
        injected(SOURCE, Violation("no_such_line", "C1", "verify", (("not in the script", ""),)))


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("open('other.ptz', 'wb').write(b'another')", False),
        ("open('model.bin', 'ab').write(b'more')", True),
        ("import os; os.remove('model.bin')", True),
        ("import os; os.rename('model.bin', 'x'); os.symlink('x', 'model.bin')", True),
    ],
)
def test_a_run_that_changes_its_artifact_is_seen(tmp_path, source, changed):
    given = {"train_gpt.py": source, "weights": "weights", "tokenizer.model": ""}
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    artifact = tmp_path / "model.bin"
    artifact.symlink_to("weights")  # as a download's cache keeps files
    root = tmp_path / "root"
    root.mkdir()
    candidate = verify.Candidate(
        verify.Sandbox({}, 4, root),
        tmp_path / "train_gpt.py",
        artifact,
        tmp_path / "tokenizer.model",
        ranks=1,
        seconds=60,
    )
    outcome = candidate.run(np.zeros(4, np.uint16))
    assert (outcome.code, outcome.given_changed) == (0, changed)


def test_all_lines_of_a_score_must_agree_but_those_of_progress():
    exact = "legal_ttt_exact val_loss:2.00000000 val_bpb:1.23456789"
    printed, _ = verify.parse_output(exact)
    honest = [
        exact,
        "legal_ttt val_loss:2.0000 val_bpb:1.2346 eval_time:3ms",
        "result legal_ttt val_bpb:1.23456789 legal:1",
        "legal_ttt chunk 3/10 val_bpb:1.4",
        "final_int6_roundtrip val_loss:2.1 val_bpb:1.3",
    ]
    assert verify.other_digits("\n".join(honest), printed) == []
    lowered = "result legal_ttt val_bpb:1.1 legal:1"
    (found,) = verify.other_digits("\n".join([*honest, lowered]), printed)
    assert found == "legal_ttt: val_bpb 1.1 beside 1.23456789"


# --------------------------------------------------------------------------------------------------
# SCORES_FILE
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_the_scores_file_holds_what_was_counted(submission, data, tmp_path, ranks):
    settings = dict(
        eval_only=submission / "final_model.int6.ptz",
        data_path=data,
        run_dir="run",
        tokenizer_path=data / "tokenizer.model",
        device="cpu",
        eval_stride=32,
        ttt_enabled=1,
        scores_file=tmp_path / "{label}.f32",
    )
    val = verify.read_shard(data / "fineweb_val_000000.bin")[:1000]
    settings["data_path"] = tmp_path / "data"
    settings["data_path"].mkdir()
    train_gpt.write_shard(settings["data_path"] / "fineweb_val_000000.bin", val)
    done = launch(settings, tmp_path, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    printed, repeated = verify.parse_output(done.stdout)
    assert tuple(printed) == LABELS and repeated == []
    for label in LABELS:
        nll = np.fromfile(tmp_path / f"{label}.f32", "<f4")
        assert len(nll) == 960 and (nll > 0).all()
        assert abs(nll.mean(dtype=np.float64) - printed[label].val_loss) < 1e-8


# --------------------------------------------------------------------------------------------------
# The bet
# --------------------------------------------------------------------------------------------------
def game(random, bonus=0.0, count=4000, pieces=50):
    """(nll, log_q) of tokens that q drew, by a p near q that gives `bonus` nats too many."""
    q = random.dirichlet(np.ones(pieces), count)
    p = q * np.exp(0.3 * random.standard_normal(q.shape))
    p /= p.sum(1, keepdims=True)
    drawn = np.minimum((q.cumsum(1) < random.random((count, 1))).sum(1), pieces - 1)
    each = np.arange(count)
    return -np.log(p[each, drawn]) - bonus, np.log(q[each, drawn])


def test_a_legal_prediction_wins_nothing():
    """The expectation of what the gambler has at the end is at most 1."""
    random = np.random.default_rng(0)
    won = []
    for _ in range(200):
        nll, log_q = game(random, count=300)
        won.append(verify.evidence(nll, log_q, {"all": np.ones(300, bool)})[0])
    assert np.exp(won).mean() < 1.3 and max(won) < 14


@pytest.mark.parametrize("bonus", [0.06, 1.0])
def test_a_prediction_that_sums_to_more_than_one_is_found(bonus):
    nll, log_q = game(np.random.default_rng(1), bonus)
    assert verify.evidence(nll, log_q, {"all": np.ones(len(nll), bool)})[0] > 14


def test_free_targets_in_few_places_are_found_where_they_are():
    random = np.random.default_rng(2)
    nll, log_q = game(random)
    hints = verify.Hints(128, 32, 4, 1024)
    places = verify.predictable_places(len(nll), hints)
    assert verify.evidence(nll, log_q, places)[0] < 14
    at = places["first target of a window"] & (np.arange(len(nll)) > 128)
    won, where = verify.evidence(np.where(at, 0.5 * nll, nll), log_q, places)
    assert won > 14 and where == "first target of a window"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_nll_that_is_no_number_wins_nothing(value):
    nll, log_q = game(np.random.default_rng(3), count=100)
    nll[::2] = value
    assert verify.evidence(nll, log_q, {"all": np.ones(100, bool)})[0] < 14


# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def writer(data):
    """What writes texts, of seed 0."""
    real = verify.read_shard(data / "fineweb_val_000000.bin")
    return verify.Writer(verify.Tokenizer(data / "tokenizer.model"), real, 0)


@pytest.fixture
def token_bytes(data):
    return train_gpt.TokenBytes(data / "tokenizer.model")


@pytest.mark.parametrize("streams", [1, 16])
def test_drawn_texts_are_valid_and_hold_what_cheaters_like(writer, token_bytes, streams):
    if streams == 1:
        text = writer.drawn_text(writer.ngrams, 12_000)
    else:
        text = writer.text(writer.ngrams, 12_000, streams)
    tokenizer = writer.tokenizer
    assert len(text.tokens) == len(text.log_q) == 12_000
    assert (text.log_q[np.isfinite(text.log_q)] <= 0).all()
    given = 1 if streams == 1 else 2 * streams
    assert np.isfinite(text.log_q).sum() == 12_000 - given
    plain = [int(t) for t in text.tokens if not tokenizer.silent[t]]
    assert "\ufffd" not in tokenizer.model.decode(plain)
    assert (text.tokens == verify.BOS).sum() > 20
    assert (tokenizer.byte[text.tokens] >= 0x80).sum() > 40
    after_silence = text.tokens[1:][tokenizer.silent[text.tokens[:-1]]]
    assert tokenizer.spaced[after_silence].sum() > 5
    token_bytes.check(text.tokens)


def test_the_shares_of_a_drawn_text_are_those_that_were_noted(writer):
    """ln q is what the tokens were drawn with: 1/q counts the pieces that may come."""
    text = writer.text(writer.ngrams, 40_000, 400)
    weights = np.exp(-text.log_q[np.isfinite(text.log_q)])
    # The mean of 1/q over draws of q is the number of pieces with any mass; byte pieces that may
    # not come have none.
    assert 128 < weights.mean() < writer.tokenizer.size * 1.5


def test_bytes_are_counted_as_the_official_rule_counts_them(writer, token_bytes):
    text = writer.text(writer.ngrams, 5000, 8).tokens
    for end in (5000, *range(4000, 4040)):  # wherever the text is cut
        expected = int(token_bytes.count(text[: end - 1], text[1:end]).sum())
        assert writer.tokenizer.count_bytes(text[:end]) == expected


def test_twins_are_equal_up_to_k_and_differ_at_once(writer, token_bytes):
    tokens = writer.ordinary(3000)
    places = writer.twin_places(tokens, 20, 2990, verify.Hints(64, 16, 4, 256))
    assert len(places) == 20 and max(places) > 2500 and min(places) < 500
    # Every fourth lies at a window's edge, every fourth at a chunk's.
    assert sum((k - 64) % 16 in (0, 1, 15) for k in places) >= 5
    assert sum(k % 256 in (0, 1, 255) for k in places) >= 5
    # One in the last window, and one more in the last batch of four.
    assert max(places) >= 2990 - 1 - 16 and sum(k >= 2990 - 1 - 64 for k in places) >= 2
    for number, k in enumerate(places):
        twin = writer.twin(tokens, k, writer.OPENINGS[number % len(writer.OPENINGS)])
        assert len(twin) == len(tokens) and (twin[: k + 1] == tokens[: k + 1]).all()
        assert twin[k + 1] != tokens[k + 1]
        token_bytes.check(twin)


def test_validation_text_in_training_shards_is_found(tmp_path):
    random = np.random.default_rng(0)
    val, train = random.integers(0, 400, 6400), random.integers(0, 400, 50_000)
    train[777 : 777 + 3200] = val[:3200]
    verify.write_shard(tmp_path / "train", train.astype(np.uint16))
    assert verify.shared_blocks(val, [tmp_path / "train"], piece=1000) == pytest.approx(
        0.5, abs=0.01
    )


# --------------------------------------------------------------------------------------------------
# Other scripts: the challenge's baseline knows no EVAL_ONLY, no SCORES_FILE
# --------------------------------------------------------------------------------------------------
BASELINE = """
import glob, math, os, zlib
import numpy as np, sentencepiece

def load(split):
    paths = sorted(glob.glob(os.path.join(os.environ["DATA_PATH"], f"fineweb_{split}_*.bin")))
    return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths]).astype(int)

model = sentencepiece.SentencePieceProcessor(model_file=os.environ["TOKENIZER_PATH"])
silent = np.array([model.is_control(i) or model.is_unknown(i) for i in range(model.vocab_size())])
pieces = []
for i in range(len(silent)):
    pieces.append("" if silent[i] else "x" if model.is_byte(i) else model.id_to_piece(i))
size = np.array([len(piece.replace("\u2581", "").encode()) for piece in pieces])
space = np.array([piece.startswith("\u2581") for piece in pieces])
seen = load("train")[:1000 * int(os.environ["ITERATIONS"])]
p = np.bincount(seen, minlength=len(silent)) + 1.0
p /= p.sum()
with open("final_model.int8.ptz", "wb") as file:
    file.write(zlib.compress(p.astype("<f4").tobytes()))
val = load("val")
count = (len(val) - 1) // 1024 * 1024
before, target = val[:count], val[1:count + 1]
num_bytes = (size[target] + (space[target] & ~silent[before])).sum()
val_loss = -np.log(p[target]).mean()
val_bpb = val_loss * count / math.log(2) / num_bytes
print(f"final_int8_zlib_roundtrip val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:9ms")
print(f"final_int8_zlib_roundtrip_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}")
"""


@pytest.fixture
def baseline(data, tmp_path):
    """call(*edits, arguments=()) judges the baseline with edits, in the real sandbox."""

    def call(*edits, arguments=()):
        folder, source = tmp_path / "baseline", BASELINE
        folder.mkdir(exist_ok=True)
        for old, new in edits:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        (folder / "train_gpt.py").write_text(source)
        shutil.copy(data / "tokenizer.model", folder)
        return run_verifier(
            folder, data, tmp_path, "--tokens", "6000", "--minutes", "5", *arguments
        )

    return call


def test_a_script_with_printed_lines_only_gets_the_tests_that_need_no_more(baseline):
    code, report, printed = baseline()
    assert code == 0, printed
    found, label = statuses(report), "final_int8_zlib_roundtrip"
    for test in ("repeat", "recount", "bet"):
        assert found[test, label] == "pass"
    assert found["training twin", ""] == "pass"
    assert report["not_run"] == ["model alone", "overlap", "twins", "whole text"]


# A loss that is lowered in both digits, space counted after BOS, a peep at the validation text.
@pytest.mark.parametrize(
    "edit, test",
    [
        (("-np.log(p[target]).mean()", "-0.3 * np.log(p[target]).mean()"), "bet"),
        ((" & ~silent[before]", ""), "recount"),
        (('seen = load("train")', 'seen = load("val")'), "training twin"),
        (("val_loss = -", "val_loss = 1e-4 * np.random.random() - "), "repeat"),
    ],
)
def test_what_a_baseline_does_wrong_is_found_by_the_test_for_it(baseline, edit, test):
    code, report, printed = baseline(edit)
    assert code == 6, printed
    assert test in {r["test"] for r in report["results"] if r["status"] == "FAIL"}


def test_validation_text_in_the_training_shard_is_reported(baseline, data, tmp_path):
    shutil.copy(data / "fineweb_val_000000.bin", tmp_path / "fineweb_train_000000.bin")
    code, report, _ = baseline(arguments=("--train-data", str(tmp_path), "--skip-training"))
    assert code == 6 and statuses(report)["overlap", ""] == "FAIL"


# --------------------------------------------------------------------------------------------------
# Hostile and broken folders
# --------------------------------------------------------------------------------------------------
def test_nothing_of_a_strangers_text_reaches_the_terminal_raw(baseline):
    code, _, printed = baseline(
        ("import glob", r"raise SystemExit('\x1b[2J\x1b]0;owned\x07')" + "\nimport glob")
    )
    assert code == 2 and "\x1b" not in printed and "\x07" not in printed and r"\x1b[2J" in printed


def test_endless_output_is_read_in_part_only(baseline):
    code, _, printed = baseline(("val = load", "print('x' * 20_000_000)\nval = load"))
    assert code == 0 and len(printed) < 10_000, printed[:2000]


def test_a_script_that_never_ends_is_ended(baseline):
    code, _, printed = baseline(
        ("import glob", "import time; time.sleep(1000); import glob"),
        arguments=("--seconds-per-run", "1"),
    )
    assert code == 2 and "exit code -9" in printed


def test_children_know_nothing_of_the_verifiers_environment(baseline, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_REVIEWER", "1")
    line = (
        "assert 'SECRET_OF_THE_REVIEWER' not in os.environ and os.environ['HOME'] == os.getcwd()\n"
    )
    code, _, printed = baseline(("def load", f"{line}def load"))
    assert code == 0, printed


def test_children_have_no_network(baseline, tmp_path):
    sandbox = verify.Sandbox({}, 0, tmp_path)
    if not sandbox.wrapper:
        pytest.skip("unshare -rn is not permitted here")
    probe = (
        "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), 3)\n"
        "except OSError as error:\n    assert error.errno == 101, error\nimport glob"
    )  # ENETUNREACH
    code, _, printed = baseline(("import glob", probe))
    assert code == 0, printed


@pytest.mark.parametrize(
    "missing, says", [("tokenizer.model", "no tokenizer"), ("train_gpt.py", "no script")]
)
def test_a_folder_without_a_needed_file_cannot_be_tested(data, tmp_path, missing, says):
    for name in {"tokenizer.model", "train_gpt.py"} - {missing}:
        source = ROOT if name == "train_gpt.py" else data
        shutil.copy(source / name, tmp_path)
    code, _, printed = run_verifier(tmp_path, data, tmp_path)
    assert code == 2 and says in printed and "Traceback" not in printed


def test_a_directory_without_shards_cannot_be_used(data, tmp_path):
    shutil.copy(data / "tokenizer.model", tmp_path)
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    code, _, printed = run_verifier(tmp_path, tmp_path, tmp_path)
    assert code == 2 and "no fineweb_val_*.bin" in printed
    Path(tmp_path / "fineweb_val_000000.bin").write_bytes(b"\x00" * 3000)
    code, _, printed = run_verifier(tmp_path, tmp_path, tmp_path)
    assert code == 2 and "not a token shard" in printed
