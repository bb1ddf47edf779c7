"""The verifier: clean scripts pass, violations do not; nothing that a script says is believed."""

import contextlib
import io
import json
import math
import pydoc_data.topics
import shutil
import sys

import numpy as np
import pytest
from helpers import ROOT, TINY, launch, train_tokenizer

sys.path.insert(0, str(ROOT / "slurm"))

import verify  # noqa: E402
from violations import LAST_BLOCK, VIOLATIONS, injected, named  # noqa: E402

import train_gpt  # noqa: E402

LABELS = ("final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")
SOURCE = (ROOT / "train_gpt.py").read_text()
# A script whose own checks find nothing: the verifier has to see for itself.
DEAF = """
def audit(*arguments):
    return []

def draw_rounds(*arguments):
    return set()
"""


# ---- a small trained model and its data ----


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A directory with a tokenizer of 384 pieces, a training shard and 30,000 validation tokens."""
    folder = tmp_path_factory.mktemp("text")
    texts = [pydoc_data.topics.topics[name][:6000] for name in sorted(pydoc_data.topics.topics)]
    model = train_tokenizer(texts, folder / "tokenizer.model")
    documents = [np.array([verify.BOS, *model.encode(text)]) for text in texts]
    verify.write_shard(folder / "fineweb_train_000000.bin", np.concatenate(documents[:60]))
    verify.write_shard(folder / "fineweb_val_000000.bin", np.concatenate(documents[60:])[:30_000])
    return folder


@pytest.fixture(scope="session")
def submission(data, tmp_path_factory):
    """A folder with the script, a tokenizer and an artifact that was trained for some seconds."""
    folder, run, short = (tmp_path_factory.mktemp(name) for name in ("submission", "run", "short"))
    shutil.copy(data / "fineweb_train_000000.bin", short)
    val = verify.read_shard(data / "fineweb_val_000000.bin")
    verify.write_shard(short / "fineweb_val_000000.bin", val[:300])  # the tests score the text
    settings = dict(
        TINY,
        data_path=short,
        tokenizer_path=data / "tokenizer.model",
        run_dir=run,
        iterations=120,
        warmdown_iters=40,
        train_batch_tokens=256,
        ttt_enabled=False,
        eval_stride=64,
    )
    done = launch(settings, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for path in (run / "final_model.int6.ptz", data / "tokenizer.model", ROOT / "train_gpt.py"):
        shutil.copy(path, folder)
    return folder


def run_verifier(folder, data, tmp_path, arguments):
    """(exit code, report, printed text) of the command line, whose arguments are one text."""
    printed = io.StringIO()
    path = tmp_path / "report.json"
    path.unlink(missing_ok=True)
    command = [str(folder), "--data", str(data), "--json", str(path), *arguments.split()]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = verify.main(command)
    report = json.loads(path.read_text()) if path.exists() else None
    return code, report, printed.getvalue()


def statuses(report):
    return {(r["test"], r["label"]): r["status"] for r in report["results"]}


SETTINGS = "--set TTT_ENABLED=1 --set EVAL_STRIDE=16 --set TTT_LR=0.05"


@pytest.fixture
def judge(data, submission, children, monkeypatch, tmp_path):
    """call(violation, arguments, deaf) -> exit code, report, printed text.

    Runs are forks of a process that has loaded torch, since loading is most of a short run.
    """

    def finish(self, command, folder, settings, seconds, output):
        environ = self.environment(folder, dict(settings))
        group = children.start_script(folder / command[1], environ, folder)
        (code,) = group.wait(seconds)
        output.write((group.stdout() + group.stderr()).encode())
        return code

    monkeypatch.setattr(verify.Sandbox, "finish", finish)

    def call(violation, arguments, deaf=True):
        folder = tmp_path / "candidate"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(submission, folder)
        if violation:
            source = injected(SOURCE, violation)
            if deaf:
                source = source.replace(LAST_BLOCK, f"{DEAF}\n{LAST_BLOCK}")
            (folder / "train_gpt.py").write_text(source)
            for name, value in violation.settings:
                arguments += f" --set {name}={value}"
            if violation.condition != "training":
                arguments += " --skip-training"
        common = f"--tokens 3000 --minutes 15 --jobs 1 --seed 3 {SETTINGS} "
        return run_verifier(folder, data, tmp_path, common + arguments)

    return call


# ---- verdicts on the real script ----


@pytest.mark.slow
def test_the_clean_script_passes_every_test(judge):
    code, report, printed = judge(None, "--twins 4 --whole")
    assert code == 0, printed
    found = statuses(report)
    for label in LABELS:
        for test in ("repeat", "recount", "bet", "twins", "whole text"):
            assert found[test, label] == "pass"
    assert found["training twin", ""] == found["model alone", ""] == "pass"
    assert report["exit_code"] == 0 and report["runs"] == 11 and report["seed"] == 3
    assert report["not_run"] == []
    # Three bets at e^-14; all other tests compare digits or bits.
    assert report["error_probability"] == pytest.approx(3 * math.exp(-14))
    assert "own model" in next(r["detail"] for r in report["results"] if r["test"] == "bet")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, test",
    [
        ("printed_digits_lowered", "recount"),
        ("better_unless_watched_or_checked", "repeat"),
        ("bos_free", "bet"),
        ("tail_sees_its_own_target", "model alone"),
        ("ahead_late_in_the_text", "twins"),
        ("tuned_before_packing", "training twin"),
    ],
)
def test_a_violation_is_found_by_the_test_for_it(judge, name, test):
    code, report, printed = judge(named(name), "--twins 10")
    assert code == 6, printed
    assert test in {r["test"] for r in report["results"] if r["status"] == "FAIL"}


@pytest.mark.slow
def test_a_script_is_believed_that_calls_its_score_illegal(judge):
    code, report, printed = judge(named("bos_free"), "--twins 1", deaf=False)
    assert code == 6, printed
    assert statuses(report)["own verdict", ""] == "FAIL"


@pytest.mark.slow
@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: violation.name)
def test_every_violation_is_found(judge, violation):
    code, _, printed = judge(violation, "--tokens 6000 --twins 40 --stop")
    if code != 6 and violation.caught_by == "both":  # then by the script's own words
        code, _, printed = judge(violation, "--stop", deaf=False)
    assert code == 6, printed


@pytest.mark.slow
@pytest.mark.parametrize("seed, slot", [(0, "off"), (1, "off"), (2, "causal"), (4, "causal")])
def test_no_false_alarm(judge, seed, slot):
    code, _, printed = judge(None, f"--seed {seed} --set SLOT={slot}")
    assert code == 0, printed


@pytest.mark.slow
def test_no_false_alarm_on_two_ranks(submission, data, tmp_path):
    arguments = f"--tokens 2000 --twins 3 --ranks 2 --jobs 1 {SETTINGS}"
    code, _, printed = run_verifier(submission, data, tmp_path, arguments)
    assert code == 0, printed


@pytest.mark.slow
def test_published_slot_is_illegal_by_its_own_words(judge):
    code, report, _ = judge(None, "--set SLOT=published --skip-training --twins 2 --stop")
    assert code == 6
    assert statuses(report)["own verdict", "illegal_ttt_slot_published"] == "FAIL"


def test_each_condition_has_violations():
    assert len(VIOLATIONS) >= 100 and len({v.name for v in VIOLATIONS}) == len(VIOLATIONS)
    assert {v.condition for v in VIOLATIONS} == {"C1", "C2", "C3", "C4", "bytes", "training"}


def test_all_lines_of_a_score_must_agree_but_those_of_progress():
    exact = "legal_ttt_exact val_loss:2.00000000 val_bpb:1.23456789"
    printed = verify.parse_output(exact)
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


def test_the_official_line_is_a_repeat_where_another_score_says_the_same():
    own = "legal_ttt_exact val_loss:2.00000000 val_bpb:1.23456789\n"
    official = "final_int8_zlib_roundtrip_exact val_loss:2.00000000 val_bpb:1.23456789"
    assert verify.parse_output(own + official).keys() == {"legal_ttt"}
    assert verify.parse_output(official).keys() == {"final_int8_zlib_roundtrip"}
    assert len(verify.parse_output(own + official.replace("2.0", "1.9"))) == 2


# ---- the bet ----


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


def test_a_prediction_that_sums_to_more_than_one_is_found():
    nll, log_q = game(np.random.default_rng(1), 0.06)
    assert verify.evidence(nll, log_q, {"all": np.ones(len(nll), bool)})[0] > 14


def test_free_targets_in_few_places_are_found_where_they_are():
    nll, log_q = game(np.random.default_rng(2))
    places = verify.predictable_places(len(nll), verify.Hints(128, 32, 4, 1024))
    assert verify.evidence(nll, log_q, places)[0] < 14
    at = places["first target of a window"] & (np.arange(len(nll)) > 128)
    won, where = verify.evidence(np.where(at, 0.5 * nll, nll), log_q, places)
    assert won > 14 and where == "first target of a window"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_nll_that_is_no_number_wins_nothing(value):
    nll, log_q = game(np.random.default_rng(3), count=100)
    nll[::2] = value
    assert verify.evidence(nll, log_q, {"all": np.ones(100, bool)})[0] < 14


# ---- texts ----


@pytest.fixture
def texts(data):
    """Texts of seed 0."""
    real = verify.read_shard(data / "fineweb_val_000000.bin")
    return verify.Texts(verify.Tokenizer(data / "tokenizer.model"), real, 0)


@pytest.fixture
def token_bytes(data):
    return train_gpt.TokenBytes(data / "tokenizer.model")


@pytest.mark.parametrize("drawn_whole", [True, False])
def test_drawn_texts_are_valid_and_hold_what_cheaters_like(texts, token_bytes, drawn_whole):
    draw = texts.drawn_text if drawn_whole else texts.text
    text = draw(texts.ngrams, 12_000)
    tokenizer = texts.tokenizer
    assert len(text.tokens) == len(text.log_q) == 12_000
    drawn = np.isfinite(text.log_q)
    assert drawn.sum() == 12_000 - (1 if drawn_whole else 2 * texts.streams(12_000))
    plain = [int(t) for t in text.tokens if not tokenizer.silent[t]]
    assert "\ufffd" not in tokenizer.model.decode(plain)
    assert (text.tokens == verify.BOS).sum() > 20
    assert (tokenizer.byte[text.tokens] >= 0x80).sum() > 40
    after_silence = text.tokens[1:][tokenizer.silent[text.tokens[:-1]]]
    assert tokenizer.spaced[after_silence].sum() > 5
    token_bytes.check(text.tokens)


@pytest.mark.parametrize(
    "pending, first, end",
    [
        (b"\xe0", 0xA0, 0xC0),  # shorter forms of the same character are not allowed
        (b"\xed", 0x80, 0xA0),  # halves of UTF-16 pairs are not
        (b"\xf0", 0x90, 0xC0),
        (b"\xf4", 0x80, 0x90),  # Unicode ends at 0x10FFFF
        (b"\xf1\x80", 0x80, 0xC0),
    ],
)
def test_only_bytes_that_make_a_character_may_follow(pending, first, end):
    assert list(verify.bytes_after(pending)) == [*range(first, end)]
    assert list(verify.bytes_after(b"")) == [*range(0x80), *range(0xC2, 0xF5)]


def test_log_q_is_that_with_which_tokens_were_drawn(texts):
    """The mean of 1/q over draws of q is the number of pieces that may come."""
    text = texts.text(texts.ngrams, 40_000)
    weights = np.exp(-text.log_q[np.isfinite(text.log_q)])
    # Byte pieces that may not come have no mass.
    assert 128 < weights.mean() < texts.tokenizer.size * 1.5


def test_bytes_are_counted_as_the_official_rule_counts_them(texts, token_bytes):
    tokens = texts.ordinary(5000)
    for end in (5000, *range(4000, 4040)):  # wherever the text is cut
        expected = int(token_bytes.count(tokens[: end - 1], tokens[1:end]).sum())
        assert texts.tokenizer.count_bytes(tokens[:end]) == expected


def test_twins_are_equal_up_to_k_and_differ_at_once(texts, token_bytes):
    tokens = texts.ordinary(3000)
    places = texts.twin_places(tokens, 20, 2990, verify.Hints(64, 16, 4, 256))
    assert len(places) == 20 and max(places) > 2500 and min(places) < 500
    # Every fourth lies at a window's edge, every fourth at a chunk's.
    assert sum((k - 64) % 16 in (0, 1, 15) for k in places) >= 5
    assert sum(k % 256 in (0, 1, 255) for k in places) >= 5
    # One in the last window, and one more in the last batch of four.
    assert max(places) >= 2990 - 1 - 16 and sum(k >= 2990 - 1 - 64 for k in places) >= 2
    for number, k in enumerate(places):
        twin = texts.twin(tokens, k, texts.OPENINGS[number % len(texts.OPENINGS)])
        assert len(twin) == len(tokens) and (twin[: k + 1] == tokens[: k + 1]).all()
        assert twin[k + 1] != tokens[k + 1]
        token_bytes.check(twin)


def test_byte_counts_beside_the_shards_are_no_text(tmp_path):
    for name in ("val_000000", "val_000001", "val_bytes_000000"):
        verify.write_shard(tmp_path / f"fineweb_{name}.bin", [1, 2])
    names = [path.name for path in verify.find_shards(tmp_path, "val")]
    assert names == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]


# ---- other scripts: the challenge's baseline knows no EVAL_ONLY, no SCORES_FILE ----

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
    """call(old, new, arguments) judges the baseline with one edit, in the real sandbox."""

    def call(old="", new="", arguments=""):
        folder = tmp_path / "baseline"
        folder.mkdir()
        assert not old or BASELINE.count(old) == 1
        (folder / "train_gpt.py").write_text(BASELINE.replace(old, new) if old else BASELINE)
        shutil.copy(data / "tokenizer.model", folder)
        return run_verifier(folder, data, tmp_path, f"--tokens 6000 --minutes 5 {arguments}")

    return call


def test_a_script_with_printed_lines_only_gets_the_tests_that_need_no_more(baseline):
    code, report, printed = baseline()
    assert code == 0, printed
    found = statuses(report)
    for test in ("repeat", "recount", "bet"):
        assert found[test, "final_int8_zlib_roundtrip"] == "pass"
    assert found["training twin", ""] == "pass"
    assert report["not_run"] == ["model alone", "twins", "whole text"]


@pytest.mark.parametrize(
    "old, new, test",
    [
        # A loss that is lowered in both digits, and one that is drawn by lot.
        ("-np.log(p[target]).mean()", "-0.3 * np.log(p[target]).mean()", "bet"),
        ("val_loss = -", "val_loss = 1e-4 * np.random.random() - ", "repeat"),
        # A space counted after BOS, a peep at the validation text.
        (" & ~silent[before]", "", "recount"),
        ('seen = load("train")', 'seen = load("val")', "training twin"),
    ],
)
def test_a_fault_of_the_baseline_is_found_by_the_test_for_it(baseline, old, new, test):
    code, report, printed = baseline(old, new)
    assert code == 6, printed
    assert test in {r["test"] for r in report["results"] if r["status"] == "FAIL"}


# ---- hostile and broken folders ----


def test_nothing_of_a_strangers_text_reaches_the_terminal_raw(baseline):
    leave = r"raise SystemExit('\x1b[2J\x1b]0;owned\x07')"
    code, _, printed = baseline("import glob", f"{leave}\nimport glob")
    assert code == 2 and "\x1b" not in printed and "\x07" not in printed and r"\x1b[2J" in printed


def test_endless_output_is_read_in_part_only(baseline):
    code, _, printed = baseline("val = load", "print('x' * 20_000_000)\nval = load")
    assert code == 0 and len(printed) < 10_000, printed[:2000]


def test_a_script_that_never_ends_is_ended(baseline):
    endless = "import time; time.sleep(1000); import glob"
    code, _, printed = baseline("import glob", endless, "--seconds-per-run 1")
    assert code == 2 and "exit code -9" in printed


def test_children_know_nothing_of_the_verifier_and_have_no_network(baseline, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_REVIEWER", "1")
    probe = (
        "assert 'SECRET_OF_THE_REVIEWER' not in os.environ and os.environ['HOME'] == os.getcwd()\n"
    )
    if verify.Sandbox({}, tmp_path).wrapper:  # unshare -rn is permitted here
        probe += (
            "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), 3)\n"
            "except OSError as error:\n    assert error.errno == 101, error\n"  # ENETUNREACH
        )
    code, _, printed = baseline("def load", f"{probe}def load")
    assert code == 0, printed


def test_what_lacks_a_needed_file_cannot_be_tested(data, tmp_path):
    def refused(shards):
        code, _, printed = run_verifier(tmp_path, shards, tmp_path, "")
        assert code == 2
        return printed

    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    assert "no script or no tokenizer" in refused(data)
    shutil.copy(data / "tokenizer.model", tmp_path)
    assert "no fineweb_val_*.bin" in refused(tmp_path)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"\x00" * 3000)
    assert "not a token shard" in refused(tmp_path)
    (tmp_path / "train_gpt.py").unlink()
    assert "no script or no tokenizer" in refused(data)
