"""Judge a submission folder from outside: run its own scoring on texts that this program wrote.

    python slurm/verify.py FOLDER --data DIR          # DIR holds fineweb_val_*.bin
    python slurm/verify.py FOLDER --data DIR --seed 7 --minutes 30 --ranks 2 --json report.json
    python slurm/verify.py FOLDER --data DIR --q ngram --set DEVICE=cpu

Nothing that the script says is believed unless it can be computed again. Four conditions are judged, those
of the challenge's issue #1017: C1 no token's score depends on later tokens, C2 scores come from one normalised
distribution, C3 nothing learns from a token before its score is final, C4 every token is scored once.

 * Betting test (C1 to C4 together). Tokens are drawn from a distribution q that only this program knows. If
   the script's p is a legal prediction, the expectation of p(x)/q(x) is at most 1 at each token, whatever came
   before; so a gambler who stakes a share of his money on p/q multiplies it by e^c with probability e^-c at
   most (Ville's inequality). The share, and the places where he plays, may depend on the past alone.
 * Twins on disk (C1, C3). Two shards are equal up to k and different after. All scores up to k must be equal,
   bit for bit.
 * Recount (C4). Targets, nats and UTF-8 bytes, counted here, must give the printed digits.
 * Training twin. Ten steps beside two different validation shards must give the same artifact.

SCORES_FILE=path/{label}.f32 asks the script for every target's nll. A script that does not know this variable
gets the tests that need printed lines alone, and the report names the others. Exit code: 0 nothing illegal
was found, 6 illegal, 2 could not be tested.

What no test from outside can show: a script that knows the official shard by its size or hash, or that
behaves well for the first N tokens of a text longer than --tokens, may do otherwise there.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

BOS = 1
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # little-endian int32
THRESHOLD = 14.0  # nats of evidence; a legal script reaches it with probability e^-14 = 8e-7
READ_LIMIT = 4 << 20  # bytes of a child's output that are looked at, from its end
LEGAL, ILLEGAL, UNTESTED = 0, 6, 2
PASS, FAIL, SKIPPED = "pass", "FAIL", "not run"


class UntestableError(Exception):
    """What keeps the folder from being tested; the message says what to change."""


def printable(text, limit=300):
    """Text of a stranger, safe for a terminal: one line, no escape sequences, bounded."""
    cut = text[:limit]
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in cut)


# ----------------------------------------------------------------------------------------------------
# Shards and bytes
# ----------------------------------------------------------------------------------------------------
def read_shard(path):
    """Memory-mapped uint16 tokens (n,) of one shard. Raises UntestableError for anything else."""
    header = np.fromfile(path, "<i4", SHARD_HEADER)
    right_head = len(header) == SHARD_HEADER and list(header[:2]) == [SHARD_MAGIC, SHARD_VERSION]
    if not right_head or os.path.getsize(path) != 4 * SHARD_HEADER + 2 * int(header[2]):
        raise UntestableError(f"{path}: not a token shard, or cut off: download it again")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (int(header[2]),))


def write_shard(path, tokens):
    header = np.zeros(SHARD_HEADER, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())


def find_shards(folder, split):
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UntestableError(f"{folder}: no fineweb_{split}_*.bin in it: name the directory of the shards")
    return paths


class Tokenizer:
    """Kinds of pieces, and the bytes that a piece of text really has."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UntestableError(f"{path}: not a SentencePiece model: {printable(str(error))}") from None
        self.size = self.model.vocab_size()
        ids = range(self.size)
        self.silent = np.array([self.model.is_control(i) or self.model.is_unknown(i)
                                or self.model.is_unused(i) for i in ids])
        is_byte = [self.model.is_byte(i) for i in ids]
        pieces = [self.model.id_to_piece(i) for i in ids]
        # The byte that a byte piece such as <0xE2> stands for, -1 for every other piece.
        self.byte = np.array([int(p[3:5], 16) if b else -1 for p, b in zip(pieces, is_byte)])
        self.spaced = np.array([piece.startswith("▁") for piece in pieces])
        self.digit = np.array([piece.strip("▁").isdigit() for piece in pieces])
        self.plain = np.flatnonzero(~self.silent & ~self.spaced & (self.byte < 0))

    def count_bytes(self, tokens):
        """UTF-8 bytes of the targets tokens[1:], by decoding them, run by run between silent pieces.

        By the challenge's rule a space right after a silent piece (BOS) is not counted.
        """
        tokens = np.asarray(tokens, np.int64)
        edges = [0, *(1 + np.flatnonzero(self.silent[tokens[1:]])).tolist(), len(tokens)]
        # SentencePiece drops a space at the start of a text, so each run is decoded behind an anchor.
        anchor = [int(self.plain[0])]
        anchor_bytes = len(self.model.decode(anchor).encode())
        total = 0
        for left, right in zip(edges, edges[1:]):
            run = tokens[left + 1:right].tolist()
            # The end of the text may cut a character in two: each byte piece is one byte.
            while run and right == len(tokens) and self.byte[run[-1]] >= 0:
                run.pop()
                total += 1
            if run:
                total += len(self.model.decode(anchor + run).encode()) - anchor_bytes
                total -= int(self.spaced[run[0]] and self.silent[tokens[left]])
        return total


# ----------------------------------------------------------------------------------------------------
# Known distributions
# Text is drawn in parallel streams. Its source may be anything that turns the past into probabilities: the
# closer to the script's own prediction, the sharper the bet, but the test is valid for every source.
# ----------------------------------------------------------------------------------------------------
class Utf8Rule:
    """Which byte pieces may follow, since a loader refuses texts that are not valid UTF-8."""

    # State -> (first byte, last byte, next state) of what may come next; RFC 3629, section 4.
    FOLLOW = {
        0: [(0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5),
            (0xEE, 0xEF, 2), (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)],
        1: [(0x80, 0xBF, 0)], 2: [(0x80, 0xBF, 1)], 3: [(0x80, 0xBF, 2)],
        4: [(0xA0, 0xBF, 1)], 5: [(0x80, 0x9F, 1)], 6: [(0x90, 0xBF, 2)], 7: [(0x80, 0x8F, 2)],
    }

    def __init__(self, tokenizer):
        byte = tokenizer.byte
        self.allowed = np.zeros((8, len(byte)), bool)
        self.next = np.zeros((8, len(byte)), np.int8)
        self.allowed[0] = byte < 0
        for state, ranges in self.FOLLOW.items():
            for first, last, after in ranges:
                inside = (byte >= first) & (byte <= last)
                self.allowed[state] |= inside
                self.next[state, inside] = after
        # Near the end of a stream no sequence may begin, or it would stay unfinished.
        self.last = self.allowed[0] & (self.next[0] == 0)

    def states(self, tokens):
        """The state after each token (n,)."""
        out = np.zeros(len(tokens), np.int8)
        state = 0
        for place, token in enumerate(tokens):
            state = self.next[state, token]
            out[place] = state
        return out


class NgramSource:
    """An n-gram model of the given text, each order smoothed with the shorter one (Witten & Bell 1991)."""

    def __init__(self, tokens, vocab, order=3, spread=2.0):
        self.vocab, self.order, self.spread, self.context = vocab, order, spread, order - 1
        tokens = [int(t) for t in tokens]
        self.unigram = (np.bincount(tokens, minlength=vocab) + 0.5) / (len(tokens) + 0.5 * vocab)
        self.tables = [{} for _ in range(order)]
        for length in range(1, order):
            table = self.tables[length]
            for place in range(length, len(tokens)):
                after = table.setdefault(tuple(tokens[place - length:place]), {})
                after[tokens[place]] = after.get(tokens[place], 0) + 1
        for table in self.tables:
            for past, after in table.items():
                table[past] = np.fromiter(after, int), np.fromiter(after.values(), float)

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        return np.stack([self.row([int(t) for t in past]) for past in contexts])

    def row(self, past):
        p = self.unigram
        for length in range(1, self.order):
            found = self.tables[length].get(tuple(past[len(past) - length:]))
            if found is None:
                break
            ids, counts = found
            weight = self.spread * len(ids)
            p = p * (weight / (counts.sum() + weight))
            p[ids] += counts / (counts.sum() + weight)
        return p


ORACLE = """
import importlib.util, os, struct, sys
reply = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import numpy as np, torch
spec = importlib.util.spec_from_file_location("candidate", sys.argv[1])
candidate = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(candidate)
unpacked = candidate.unpack_artifact(open(sys.argv[2], "rb").read())
config, state = unpacked[0], unpacked[1]
model = candidate.GPT(config).eval()
model.load_state_dict(state)
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)
while head := sys.stdin.buffer.read(8):
    rows, length = struct.unpack("<ii", head)
    ids = np.frombuffer(sys.stdin.buffer.read(4 * rows * length), "<i4").reshape(rows, length)
    ids = torch.from_numpy(ids.astype(np.int64)).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logits = model.logits(model.hidden(ids)[:, -1]).float().cpu().numpy()
    reply.write(logits.astype("<f4").tobytes())
    reply.flush()
"""


class ModelSource:
    """The artifact's own model, fed only the past, in a process of its own.

    That process may be hostile: it answers with logits and never learns what is drawn from them, so the worst
    it can do is to make the bets less sharp.
    """

    def __init__(self, sandbox, script, artifact, vocab, context):
        self.vocab, self.context, self.sandbox = vocab, context, sandbox
        self.child = sandbox.start([sys.executable, "-c", ORACLE, str(script), str(artifact)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        contexts = np.ascontiguousarray(contexts[:, -self.context:], "<i4")
        try:
            head = np.array(contexts.shape, "<i4").tobytes()
            self.child.stdin.write(head + contexts.tobytes())
            self.child.stdin.flush()
            logits = np.frombuffer(self.read(4 * len(contexts) * self.vocab), "<f4")
        except OSError:
            raise UntestableError("the script's model could not be run by import") from None
        logits = np.clip(np.nan_to_num(logits.astype(float)), -100, 100).reshape(len(contexts), -1)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def read(self, size, patience=120.0):
        """`size` bytes of the child's answer. Raises OSError if it ends or stays silent."""
        parts, descriptor = [], self.child.stdout.fileno()
        while size:
            ready, _, _ = select.select([descriptor], [], [], patience)
            part = os.read(descriptor, min(size, 1 << 20)) if ready else b""
            if not part:
                raise OSError("no answer")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self):
        self.sandbox.end(self.child)


class Text(NamedTuple):
    """Tokens (n,) and the ln q (n,) with which each was drawn; NaN where it was not drawn but given."""
    tokens: np.ndarray
    log_q: np.ndarray


class Sampler:
    """Draws texts in which what is rare in ordinary text, and dear to cheaters, occurs often enough."""

    # Share of the draws that go to each kind, whatever the source says.
    SHARES = {"bos": 0.004, "bytes": 0.004, "silent": 0.0015, "digits": 0.003, "any": 0.006}

    def __init__(self, tokenizer):
        self.utf8 = Utf8Rule(tokenizer)
        kinds = {"bos": np.arange(tokenizer.size) == BOS, "bytes": tokenizer.byte >= 0x80,
                 "silent": tokenizer.silent, "digits": tokenizer.digit,
                 "any": np.ones(tokenizer.size, bool)}
        self.special = np.zeros(tokenizer.size)
        for kind, share in self.SHARES.items():
            self.special += share * kinds[kind] / max(1, kinds[kind].sum())

    def probabilities(self, source, contexts, states, room):
        """q (B, V): the source and the specials, restricted to what UTF-8 and the room left allow."""
        q = (1 - self.special.sum()) * source.predict(contexts) + self.special
        allowed = self.utf8.allowed[states]
        if room <= 4:
            allowed = np.where(states[:, None] == 0, self.utf8.last, allowed)
        q = q * allowed
        # A model that saw no such byte sequence may give it no mass at all.
        q = q + 1e-9 * allowed
        return q / q.sum(1, keepdims=True)

    def draw(self, source, given, steps, random):
        """Texts (B, steps) that continue `given` (B, T), and their ln q (B, steps)."""
        rows, start = given.shape
        tokens = np.concatenate([given, np.zeros((rows, steps), int)], 1)
        log_q = np.zeros((rows, steps))
        states = np.zeros(rows, int)
        for step in range(steps):
            at = start + step
            contexts = tokens[:, max(0, at - source.context):at]
            q = self.probabilities(source, contexts, states, steps - step)
            point = random.random(rows) * q.sum(1)
            chosen = (q.cumsum(1) <= point[:, None]).sum(1)
            tokens[:, at] = np.minimum(chosen, q.shape[1] - 1)
            log_q[:, step] = np.log(q[np.arange(rows), tokens[:, at]])
            states = self.utf8.next[states, tokens[:, at]]
        return tokens[:, start:], log_q


def real_pieces(real, sampler, rows, length, random):
    """(rows, length) pieces of the real text, none of which begins or ends inside a character."""
    states = sampler.utf8.states(real)
    whole = np.flatnonzero(states == 0)
    starts = whole[whole < len(real) - length - 1]
    starts = starts[states[starts + length] == 0] + 1
    if not len(starts):
        raise UntestableError(f"the validation text of {len(real)} tokens is too short for this test")
    return np.stack([real[at:at + length] for at in random.choice(starts, rows)]).astype(int)


def draw_text(source, sampler, real, size, random, streams, steps=None):
    """A Text of `size` tokens: pieces of real text, each continued by a stream that `source` draws.

    Each stream has `steps` drawn tokens, at most as many as its share of the text leaves beside the context.
    One stream means a text that is drawn from its second token on, as the bet on a printed sum needs.
    """
    share = -(-size // streams)
    lead = 1 if streams == 1 else min(source.context, share // 2)
    steps = min(steps or share, share - lead)
    lead = share - steps
    given = np.full((1, 1), BOS) if streams == 1 else real_pieces(real, sampler, streams, lead, random)
    tokens, log_q = sampler.draw(source, given, steps, random)
    tokens = np.concatenate([given, tokens], 1).reshape(-1)
    log_q = np.concatenate([np.full(given.shape, np.nan), log_q], 1).reshape(-1)
    return Text(tokens[:size], log_q[:size])


# ----------------------------------------------------------------------------------------------------
# Child processes
# Each has a directory, a time limit and a memory limit of its own, an environment made from nothing, and no
# network where the system lets an ordinary user take it away.
# ----------------------------------------------------------------------------------------------------
# A new network namespace has even its loopback switched off, which several ranks need to meet.
NO_NETWORK = """
import fcntl, os, socket, struct, sys
with socket.socket() as probe:
    fcntl.ioctl(probe, 0x8914, struct.pack("16sh14s", b"lo", 0x41, b""))  # SIOCSIFFLAGS: up, running
os.execvp(sys.argv[1], sys.argv[1:])
"""
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


class Sandbox:
    """Starts and ends child processes."""

    def __init__(self, settings, memory_gb, root):
        self.settings, self.memory_gb, self.root = settings, memory_gb, root
        self.wrapper = ["unshare", "-rn", sys.executable, "-I", "-c", NO_NETWORK]
        with contextlib.suppress(OSError):
            self.wrapper *= subprocess.run([*self.wrapper, "true"], capture_output=True).returncode == 0
        if not shutil.which("unshare"):
            self.wrapper = []

    def limit(self):
        """Runs in the child, before the program."""
        if self.memory_gb:
            size = int(self.memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 30, 8 << 30))

    def folder(self):
        return Path(tempfile.mkdtemp(dir=self.root))

    def start(self, command, folder=None, settings=(), **options):
        folder = folder or self.folder()
        environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environ.update(HOME=str(folder), TMPDIR=str(folder), LANG="C.UTF-8", OMP_NUM_THREADS="1",
                       PYTHONDONTWRITEBYTECODE="1", **{**dict(settings), **self.settings})
        return subprocess.Popen([*self.wrapper, *command], cwd=folder, env=environ, preexec_fn=self.limit,
                                start_new_session=True, **{"stderr": subprocess.DEVNULL, **options})

    def end(self, child):
        """End a child and all that it started in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()


class Printed(NamedTuple):
    """One score as printed: its digits, and whether the line itself says that it is illegal."""
    val_loss: float
    val_bpb: float
    declared_illegal: bool


class Outcome(NamedTuple):
    """What one run of the script left: printed scores, nll by target (n,) of each, files, hints."""
    code: int
    seconds: float
    output: str
    printed: dict
    repeated: list
    nll: dict
    artifacts: dict


EXACT = re.compile(r"^([\w.+-]{1,80})_exact val_loss:([\d.]{1,40}) val_bpb:([\d.]{1,40})(.{0,200})$", re.M)
HINT = re.compile(r"^config:([a-z0-9_]{1,40})=(\S{0,200})", re.M)


def read_end(path):
    """The last READ_LIMIT bytes of a file, as text."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - READ_LIMIT))
        return file.read(READ_LIMIT).decode("utf-8", "replace").replace("\r", "\n")


def read_scores(folder, size):
    """{label: nll float32 (n,)} of the files in `folder`, none longer than `size` targets."""
    found = {}
    for path in sorted(folder.glob("*.f32"))[:100]:
        if path.is_file() and not path.is_symlink():
            found[path.stem] = np.fromfile(path, "<f4", size + 1)
    return found


def read_artifacts(folder):
    """{relative name: SHA-256} of the packed models that a run left, or of other weights if none is packed."""
    for pattern in ("*.ptz", "*.pt", "*.npz", "*.bin"):
        paths = [p for p in sorted(folder.rglob(pattern))[:100] if p.is_file() and "data" not in p.parts]
        if paths:
            return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    return {}


class Candidate:
    """The folder under test: runs its script in a fresh copy, on shards that are given."""

    def __init__(self, sandbox, script, artifact, tokenizer, arguments):
        self.sandbox, self.script, self.artifact, self.tokenizer = sandbox, script, artifact, tokenizer
        self.ranks, self.seconds, self.runs = arguments.ranks, arguments.seconds_per_run, 0

    def copy(self):
        """A new directory with the script, the artifact, the tokenizer and an empty data directory."""
        folder = self.sandbox.folder()
        for path in filter(None, (self.script, self.artifact, self.tokenizer)):
            shutil.copy(path, folder / path.name)
        (folder / "data").mkdir()
        (folder / "scores").mkdir()
        return folder

    def command(self):
        if self.ranks == 1:
            return [sys.executable, self.script.name]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={self.ranks}", self.script.name]

    def run(self, val, train=None, scores_file=True, settings=()):
        """Score (or, with training tokens, train and score) on a validation shard; returns an Outcome."""
        folder = self.copy()
        write_shard(folder / "data" / "fineweb_val_000000.bin", val)
        environ = {"DATA_PATH": "data", "TOKENIZER_PATH": self.tokenizer.name, "RUN_DIR": "run"}
        if train is None:
            environ["EVAL_ONLY"] = self.artifact.name
        else:
            write_shard(folder / "data" / "fineweb_train_000000.bin", train)
        if scores_file:
            environ["SCORES_FILE"] = "scores/{label}.f32"
        environ.update(settings)
        begin = time.monotonic()
        with open(folder / "output", "wb") as output:
            child = self.sandbox.start(self.command(), folder, environ, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT)
            try:
                code = child.wait(self.seconds)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                self.sandbox.end(child)
        self.runs += 1
        outcome = self.outcome(folder, code, time.monotonic() - begin, len(val), train)
        shutil.rmtree(folder, ignore_errors=True)
        return outcome

    def outcome(self, folder, code, seconds, size, train):
        output = read_end(folder / "output")
        printed, repeated = {}, []
        for label, val_loss, val_bpb, rest in EXACT.findall(output):
            repeated += [label] * (label in printed)
            with contextlib.suppress(ValueError):
                printed[label] = Printed(float(val_loss), float(val_bpb), "illegal" in rest)
        if self.artifact:
            (folder / self.artifact.name).unlink(missing_ok=True)
        artifacts = read_artifacts(folder) if train is not None else {}
        return Outcome(code, seconds, output, printed, repeated, read_scores(folder / "scores", size),
                       artifacts)


# ----------------------------------------------------------------------------------------------------
# The bet
# ----------------------------------------------------------------------------------------------------
STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])


def evidence(nll, log_q, places):
    """ln of what a gambler has made of 1 by staking on p/q at the targets of each set in `places`.

    He divides his money evenly over all pairs (set, stake), so that one winner carries the rest. For a legal p
    the result exceeds c with probability e^-c at most, if q drew the tokens and the sets depend on the past.
    nll, log_q (n,); places {name: bool (n,)}. Returns (evidence in nats, name of the set that won).
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = np.exp(np.minimum(-nll.astype(float) - log_q, 600.0))
    wealth, names = [], []
    for name, chosen in places.items():
        chosen = chosen & np.isfinite(log_q)
        for stake in STAKES:
            with np.errstate(divide="ignore"):
                wealth.append(np.log1p(stake * (ratio[chosen] - 1)).sum())
            names.append(name)
    best = max(wealth)
    return best + math.log(np.exp(np.array(wealth) - best).mean()), names[int(np.argmax(wealth))]


def predictable_places(count, hints):
    """{name: bool (count,)} sets of targets to play at, given by their place alone.

    A violation that shows at few places (the first target of a window, the last batch, every 40th round) is
    diluted in the whole text and stands out in one of these.
    """
    index = np.arange(count)
    places = {"all": np.ones(count, bool)}
    for part in range(8):
        places[f"part {part + 1} of 8"] = index * 8 // count == part
    stride, chunk = hints["eval_stride"], hints["ttt_chunk_tokens"]
    phase = (index - hints["eval_seq_len"]) % stride
    places["first target of a window"] = phase == 0
    places["last target of a window"] = phase == stride - 1
    places["first quarter of a window"] = phase < stride / 4
    places["first window of a chunk"] = index % chunk < stride
    places["last quarter of a chunk"] = index % chunk >= 0.75 * chunk
    rounds = (index - hints["eval_seq_len"]) // (stride * hints["eval_batch_seqs"])
    for number in range(8):
        places[f"rounds {number} mod 8"] = rounds % 8 == number
    return places


# ----------------------------------------------------------------------------------------------------
# The tests
# ----------------------------------------------------------------------------------------------------
class Result(NamedTuple):
    """One line of the report. error_probability: that of a legal script to fail this test."""
    test: str
    label: str
    status: str
    detail: str
    error_probability: float
    seconds: float


# What a script's own configuration lines may say about its windows. Wrong hints only make tests less sharp.
DEFAULT_HINTS = {"eval_seq_len": 1024, "eval_stride": 64, "eval_batch_seqs": 32, "ttt_chunk_tokens": 32768}
PLACES_AND_PACE = {"preset", "data_path", "tokenizer_path", "run_id", "run_dir", "resume", "eval_only", "mode",
                   "audit", "scores_file", "time_limit_seconds"}
TRAINING_STEPS = 10
TRAINING_SEQS = 8
PROBE_TOKENS = 4113
STREAM_TOKENS = 320
TWIN_KINDS = ("anywhere", "window edge", "anywhere", "chunk edge")
OPENINGS = ("plain", "BOS", "byte pieces", "digit", "rare piece")


class Verifier:
    """Runs the tests on one folder; `results` is what they found."""

    def __init__(self, candidate, tokenizer, real, arguments):
        self.candidate, self.tokenizer, self.real, self.arguments = candidate, tokenizer, real, arguments
        self.random = np.random.default_rng(arguments.seed)
        self.sampler = Sampler(tokenizer)
        self.ngrams = NgramSource(real[:200_000], tokenizer.size)
        self.started = time.monotonic()
        self.hints, self.results, self.base, self.text = dict(DEFAULT_HINTS), [], None, None
        self.trains, self.scores_file, self.probe = candidate.artifact is None, False, None
        self.tolerance = {}

    def left(self):
        """Seconds left of the time that the user gave."""
        return 60 * self.arguments.minutes - (time.monotonic() - self.started)

    def add(self, test, label, passed, detail, error_probability=0.0, since=None):
        status = passed if isinstance(passed, str) else PASS if passed else FAIL
        seconds = time.monotonic() - since if since else 0.0
        self.results.append(Result(test, label, status, printable(detail), error_probability, seconds))
        shown = self.results[-1]
        print(f"{shown.status:7} {shown.test}: {printable(shown.label)} {shown.detail}".rstrip(), flush=True)

    # -- running -------------------------------------------------------------------------------------
    def run(self, tokens, scores_file=True, train=None, settings=()):
        """One run of the script; a script that cannot be asked to score only trains for ten steps."""
        if self.trains and train is None:
            train = self.training_text()
        if train is not None:
            settings = {**self.training_settings(), **dict(settings)}
        return self.candidate.run(tokens, train, scores_file, {"AUDIT": "0", **dict(settings)})

    def run_all(self, jobs):
        """Outcomes of several runs, a few at a time."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            return list(pool.map(lambda job: self.run(**job), jobs))

    def first_run(self):
        """Find out how the script is run, what it can be asked, how fast it is. Raises UntestableError."""
        tokens = self.real[:PROBE_TOKENS].astype(int)
        outcome = self.run(tokens)
        if not outcome.printed and not self.trains:
            scoring = outcome
            self.trains = True
            outcome = self.run(tokens)
            self.trains = bool(outcome.printed)
            outcome = outcome if self.trains else scoring
        if not outcome.printed:
            tail = printable(" ".join(outcome.output.split()[-60:]), 500)
            raise UntestableError(f"the script printed no score (exit code {outcome.code}): {tail}")
        self.probe, self.scores_file = outcome, bool(outcome.nll)
        self.read_hints(outcome.output)

    def read_hints(self, output):
        found = dict(HINT.findall(output))
        self.settings = {k: v for k, v in found.items() if k not in PLACES_AND_PACE and v}
        for name in self.hints:
            with contextlib.suppress(ValueError, KeyError):
                self.hints[name] = min(1 << 24, max(1, int(found[name])))

    def run_seconds(self, size):
        """Estimated seconds of a run on `size` tokens, from the first run."""
        scoring = sum(int(ms) for ms in re.findall(r" eval_time:(\d{1,9})ms", self.probe.output)) / 1000
        scoring = scoring or self.probe.seconds / 2
        start = max(0.0, self.probe.seconds - scoring)
        # Test-time training does not show in the first run, whose only chunk is the last one.
        return start + 1.5 * scoring * size / PROBE_TOKENS

    def choose_size(self):
        """Targets of the exam: whole windows, some chunks and a part of one, as many as the time allows."""
        window, chunk = self.hints["eval_seq_len"], self.hints["ttt_chunk_tokens"]
        wanted = self.arguments.tokens or max(20_480, int(2.5 * chunk))
        if not self.arguments.tokens:
            longest = max(20.0, self.left() / 7)
            while wanted > 4 * window and self.run_seconds(wanted) > longest:
                wanted = int(0.8 * wanted)
        return (wanted // window + 3) * window

    # -- texts ---------------------------------------------------------------------------------------
    def open_source(self):
        """The model's own predictions if the script can be imported, else the n-gram model."""
        wish = self.arguments.q
        if wish == "ngram" or self.trains or not self.scores_file:
            return self.ngrams
        context = min(self.hints["eval_seq_len"], 64)
        source = ModelSource(self.candidate.sandbox, self.candidate.script, self.candidate.artifact,
                             self.tokenizer.size, context)
        try:
            source.predict(np.full((2, 2), BOS))
            return source
        except UntestableError:
            source.close()
            if wish == "model":
                raise
            return self.ngrams

    def draw_exam(self, size):
        """The text that all runs share, with ln q of what was drawn, and some tokens that get trimmed."""
        source = self.open_source()
        extra = int(self.random.integers(1, self.hints["eval_seq_len"]))
        streams = max(8, size // STREAM_TOKENS) if self.scores_file else 1
        steps = None
        if isinstance(source, ModelSource):
            # The first call has compiled and loaded what it needs: the second tells the pace.
            contexts = np.resize(self.real, (streams, source.context))
            source.predict(contexts)
            begin = time.monotonic()
            source.predict(contexts)
            steps = max(8, int(0.15 * self.left() / (time.monotonic() - begin)))
        self.text = draw_text(source, self.sampler, self.real, size + 1 + extra, self.random, streams, steps)
        if isinstance(source, ModelSource):
            source.close()
        name = "the artifact's own model" if isinstance(source, ModelSource) else "an n-gram model"
        drawn = int(np.isfinite(self.text.log_q).sum())
        self.source_name = f"{name} drew {drawn} tokens"

    def training_text(self):
        """Training tokens: the user's, or text from the n-gram model."""
        if self.arguments.train_data:
            paths = find_shards(self.arguments.train_data, "train")
            return np.array(read_shard(paths[0])[:4_000_000])
        text = draw_text(self.ngrams, self.sampler, self.real, 32_768, np.random.default_rng(0), 32)
        return text.tokens

    def training_settings(self):
        """The script's own settings, at a size that ten steps can be made of."""
        window = self.hints["eval_seq_len"]
        batch = TRAINING_SEQS * window
        sizes = dict(ITERATIONS=TRAINING_STEPS, TRAIN_SEQ_LEN=window, TRAIN_BATCH_TOKENS=batch,
                     MICRO_BATCH_TOKENS=batch, WARMUP_STEPS=0, WARMDOWN_ITERS=5, VAL_LOSS_EVERY=5,
                     VAL_BATCH_SIZE=batch, MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=1)
        own = {name.upper(): value for name, value in self.settings.items()}
        return {**own, **{name: str(value) for name, value in sizes.items()}}

    def tail(self, place, kind, random):
        """Tokens from `place` on that differ at once from the exam's, begun by a token of some kind."""
        exam, size = self.text.tokens, len(self.text.tokens)
        other = draw_text(self.ngrams, self.sampler, self.real, size, random, 64).tokens
        states = self.sampler.utf8.states(other)
        choices = {"BOS": [BOS], "digit": np.flatnonzero(self.tokenizer.digit),
                   "rare piece": np.argsort(self.ngrams.unigram)[:20]}
        plain = self.tokenizer.plain[self.tokenizer.plain != exam[place]]
        opening = [int(random.choice(plain))]
        byte_ids = [np.flatnonzero(self.tokenizer.byte == byte) for byte in "é".encode()]
        if kind == "byte pieces" and all(map(len, byte_ids)):
            opening = [int(ids[0]) for ids in byte_ids]
        elif kind in choices and len(choices[kind]):
            opening = [int(random.choice(choices[kind]))]
        if opening[0] == exam[place] or (kind == "rare piece" and self.tokenizer.byte[opening[0]] >= 0):
            opening = [int(random.choice(plain))]
        # The other text may be entered only between two characters.
        entry = place + len(opening)
        while entry < size and states[entry - 1]:
            opening.append(int(random.choice(plain)))
            entry += 1
        return np.concatenate([opening, other[entry:]])[:size - place]

    def twin_places(self, count, size):
        """Numbers k of targets that base and twin share: spread over the whole text, and at its edges."""
        window, stride = self.hints["eval_seq_len"], self.hints["eval_stride"]
        chunk = self.hints["ttt_chunk_tokens"]
        states, places = self.sampler.utf8.states(self.text.tokens), []
        for number in range(count):
            kind = TWIN_KINDS[number % len(TWIN_KINDS)]
            k = int(self.random.uniform(number, number + 1) / count * size)
            if kind == "window edge":
                k = window + (k - window) // stride * stride + int(self.random.integers(-1, 2))
            elif kind == "chunk edge" and size > chunk:
                k = max(1, round(k / chunk)) * chunk + int(self.random.integers(-1, 2))
            k = min(max(k, 1), size - 1)
            while k > 1 and states[k]:  # not inside a character
                k -= 1
            places.append(k)
        return places

    # -- tests ---------------------------------------------------------------------------------------
    def take_exam(self):
        """Run the script on the exam, watched and not; the scores must be the same."""
        begin = time.monotonic()
        tokens = self.text.tokens
        watched, alone = self.run_all([dict(tokens=tokens), dict(tokens=tokens, scores_file=False)])
        for outcome in (watched, alone):
            if not outcome.printed:
                tail = printable(" ".join(outcome.output.split()[-40:]))
                raise UntestableError(f"no score on the verifier's text (exit code {outcome.code}): {tail}")
        self.base = watched
        for label in sorted({**watched.printed, **alone.printed}):
            self.compare_repeat(label, watched, alone, begin)

    def compare_repeat(self, label, watched, alone, begin):
        first, second = watched.printed.get(label), alone.printed.get(label)
        same = first is not None and first == second
        if not same and first and second and self.scores_file:
            same = self.measure_noise(label, second)
        detail = "with and without SCORES_FILE" if self.scores_file else "twice"
        noise = self.tolerance.get(label)
        noisy = f"; two runs differ by up to {noise:.1e} nats per target" if noise else ""
        self.add("repeat", label, same, f"the same digits {detail}{noisy}", since=begin)

    def measure_noise(self, label, alone):
        """Where two equal runs differ, as with atomics on a GPU: how much, and does it explain `alone`?"""
        again = self.run(self.text.tokens)
        before, after = self.base.nll.get(label), again.nll.get(label)
        if before is None or after is None or len(before) != len(after):
            return False
        noise = float(np.abs(before - after).max())
        self.tolerance[label] = 8 * noise
        spread = abs(self.base.printed[label].val_loss - again.printed[label].val_loss)
        return abs(self.base.printed[label].val_loss - alone.val_loss) <= 8 * spread + 1e-6 * (noise > 0)

    def count_targets(self, label):
        """Targets that were scored: by the file, else the number that explains the printed digits."""
        nll = self.base.nll.get(label)
        if nll is not None:
            return len(nll)
        printed, tokens = self.base.printed[label], self.text.tokens
        for window in (self.hints["eval_seq_len"], 1024, 2048, 1):
            count = (len(tokens) - 1) // window * window
            num_bytes = self.tokenizer.count_bytes(tokens[:count + 1])
            expected = printed.val_loss * count / math.log(2) / num_bytes
            if count and abs(expected - printed.val_bpb) < 2e-8:
                return count
        return None

    def recount(self):
        """C4 and bytes: what is printed follows from targets, nats and bytes that are counted here."""
        begin, printed = time.monotonic(), self.base.printed
        self.add("recount", "", not self.base.repeated and (not self.scores_file
                 or set(printed) == set(self.base.nll)),
                 f"{len(printed)} printed scores, {len(self.base.nll)} evaluations shown, "
                 f"{len(self.base.repeated)} labels printed twice", since=begin)
        for label in printed:
            self.recount_score(label, self.base.nll.get(label), begin)

    def recount_score(self, label, nll, begin):
        printed, tokens = self.base.printed[label], self.text.tokens
        window = self.hints["eval_seq_len"]
        expected = (len(tokens) - 1) // window * window
        count = self.count_targets(label)
        if count is None:
            self.add("recount", label, False, "no number of targets explains val_loss and val_bpb", since=begin)
            return
        num_bytes = self.tokenizer.count_bytes(tokens[:count + 1])
        nats = printed.val_loss * count
        passed, detail = True, f"{count} targets, {num_bytes} bytes"
        if nll is not None:
            nats = float(nll.astype(np.float64).sum())
            whole = bool(np.isfinite(nll).all() and (nll >= 0).all())
            mean = nats / max(1, count)
            passed = count == expected and whole and abs(mean - printed.val_loss) < 1.1e-8
            detail += f", {nats:.4f} nats, val_loss {mean:.8f} against {printed.val_loss:.8f}"
        bpb = nats / math.log(2) / num_bytes
        passed = passed and abs(bpb - printed.val_bpb) < 2e-8
        self.add("recount", label, passed, f"{detail}, val_bpb {bpb:.8f} against {printed.val_bpb:.8f}",
                 since=begin)

    def bet(self):
        """C1 to C4: no score may be better than the distribution that drew the text allows."""
        for label, printed in self.base.printed.items():
            begin = time.monotonic()
            count = min(self.count_targets(label) or 0, len(self.text.tokens) - 1)
            log_q = self.text.log_q[1:count + 1]
            nll = self.base.nll.get(label)
            if count and nll is not None:
                won, where = evidence(nll[:count], log_q, predictable_places(count, self.hints))
            elif count and np.isfinite(log_q).all():
                # The sum alone: q's nats less the script's, which are known to half a unit of the last digit.
                won, where = float(-log_q.sum()) - (printed.val_loss + 5e-9) * count, "the whole sum"
            else:
                self.add("bet", label, SKIPPED, "the number of targets is unknown", since=begin)
                continue
            self.add("bet", label, won < THRESHOLD,
                     f"{won:+.1f} nats, {THRESHOLD:.0f} allowed, best at: {where}; {self.source_name}",
                     math.exp(-THRESHOLD), begin)

    def twins(self):
        """C1, C3: what comes after k changes no score up to k."""
        if not self.base.nll:
            self.add("twins", "", SKIPPED, "the script writes no SCORES_FILE")
            return
        begin, pace = time.monotonic(), self.base.seconds / self.arguments.jobs
        count = int(np.clip((self.left() - 3) / (1.1 * pace), 4, self.arguments.twins))
        size = min(len(nll) for nll in self.base.nll.values())
        places = self.twin_places(count, size)
        jobs = []
        for number, k in enumerate(places):
            random = np.random.default_rng([self.arguments.seed, number])
            tail = self.tail(k + 1, OPENINGS[number % len(OPENINGS)], random)
            jobs.append(dict(tokens=np.concatenate([self.text.tokens[:k + 1], tail])))
        outcomes = self.run_all(jobs)
        for label in self.base.nll:
            self.compare_twins(label, places, outcomes, begin)

    def compare_twins(self, label, places, outcomes, begin):
        base, differ, tolerance = self.base.nll[label], [], self.tolerance.get(label, 0.0)
        for k, outcome in zip(places, outcomes):
            twin = outcome.nll.get(label)
            if twin is None or len(twin) != len(base):
                differ.append(f"k={k}: no such score (exit code {outcome.code})")
                continue
            gap = np.abs(twin[:k].astype(float) - base[:k])
            wrong = np.flatnonzero(~(gap <= tolerance))
            if len(wrong):
                differ.append(f"k={k}: target {wrong[0]} and {len(wrong) - 1} more, up to {gap.max():.2g} nats")
        spread = f"{len(places)} places from {min(places)} to {max(places)}"
        kind = f"within {tolerance:.1e} nats" if tolerance else "bit for bit"
        self.add("twins", label, not differ, f"{spread}, {kind}; differ: {'; '.join(differ[:3]) or 'none'}",
                 since=begin)

    def training_twin(self):
        """What is trained must not depend on the validation shard beside it."""
        begin, window = time.monotonic(), self.hints["eval_seq_len"]
        train, size, vals = self.training_text(), 4 * window + 1, []
        for seed in (1, 2):
            random = np.random.default_rng([self.arguments.seed, seed])
            vals.append(draw_text(self.ngrams, self.sampler, self.real, size, random, 8).tokens)
        runs = self.run_all([dict(tokens=val, train=train, scores_file=False) for val in vals])
        first, second = (run.artifacts for run in runs)
        if not first or not second:
            tail = printable(" ".join(runs[0].output.split()[-30:]))
            self.add("training twin", "", SKIPPED, f"ten steps left no artifact (exit codes {runs[0].code}, "
                     f"{runs[1].code}): {tail}", since=begin)
            return
        differ = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
        self.add("training twin", "", not differ, f"{TRAINING_STEPS} steps beside two validation shards: "
                 f"{len(first)} artifact(s), different: {', '.join(differ) or 'none'}", since=begin)

    def overlap(self):
        """Validation text inside the training shards, by the hashes of 32 tokens."""
        if not self.arguments.train_data:
            self.add("overlap", "", SKIPPED, "no --train-data")
            return
        begin = time.monotonic()
        share = shared_blocks(self.real, find_shards(self.arguments.train_data, "train"))
        self.add("overlap", "", share < 0.1, f"{100 * share:.2f} % of the validation text's blocks of "
                 f"{BLOCK} tokens stand in the training shards", since=begin)

    def verify(self):
        """Run all tests; returns the exit code. Raises UntestableError."""
        self.first_run()
        self.draw_exam(self.choose_size())
        self.take_exam()
        for label, printed in self.base.printed.items():
            if printed.declared_illegal:
                self.add("declared", label, False, "the script itself calls this score illegal")
        self.recount()
        self.bet()
        self.overlap()
        if self.arguments.skip_training:
            self.add("training twin", "", SKIPPED, "--skip-training")
        else:
            self.training_twin()
        self.twins()
        return ILLEGAL if any(r.status == FAIL for r in self.results) else LEGAL


BLOCK = 32


def block_hashes(tokens, step):
    """uint64 polynomial hashes of the blocks of BLOCK tokens that begin at every `step`-th place."""
    starts = np.arange(0, len(tokens) - BLOCK + 1, step)
    out = np.zeros(len(starts), np.uint64)
    for offset in range(BLOCK):
        out = out * np.uint64(0x9E3779B97F4A7C15) + tokens[starts + offset].astype(np.uint64) + np.uint64(1)
    return out


def shared_blocks(val, train_paths, piece=1 << 22):
    """Share of val's blocks, side by side, that stand anywhere in the training shards."""
    blocks = np.unique(block_hashes(val, BLOCK))
    seen = np.zeros(len(blocks), bool)
    for path in train_paths:
        tokens = read_shard(path)
        for at in range(0, len(tokens), piece):
            found = block_hashes(np.array(tokens[at:at + piece + BLOCK - 1]), 1)
            seen |= np.isin(blocks, found)
    return float(seen.mean()) if len(seen) else 0.0


# ----------------------------------------------------------------------------------------------------
# Command line and report
# ----------------------------------------------------------------------------------------------------
def only_file(folder, pattern, wish, what):
    """The file that was named, else the only one of its kind in the folder; None if there is none."""
    if wish:
        if not Path(wish).is_file():
            raise UntestableError(f"{wish}: no such {what}")
        return Path(wish).resolve()
    found = sorted(Path(folder).glob(pattern))
    if len(found) > 1:
        raise UntestableError(f"{folder} holds {len(found)} files {pattern}: say which one is the {what}")
    return found[0].resolve() if found else None


def parse(arguments):
    on_gpu = Path("/dev/nvidia0").exists()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", help="the submission: script, artifact (*.ptz), tokenizer (*.model)")
    add("--data", required=True, help="directory of fineweb_val_*.bin: what ordinary text looks like")
    add("--train-data", default="", help="directory of fineweb_train_*.bin for the training twin")
    add("--script", default="", help="default: train_gpt.py in the folder")
    add("--artifact", default="", help="default: the *.ptz in the folder")
    add("--tokenizer", default="", help="default: the *.model in the folder")
    add("--seed", type=int, default=None, help="of texts and places; default: drawn, and reported")
    add("--minutes", type=float, default=2.7, help="time to spend; longer texts and more twins")
    add("--tokens", type=int, default=0, help="targets of the texts; default: what the time allows")
    add("--twins", type=int, default=16, help="most twins to run")
    add("--q", choices=("auto", "model", "ngram"), default="auto", help="what the bet's texts are drawn from")
    add("--ranks", type=int, default=1, help="processes of each run, by torchrun")
    add("--jobs", type=int, default=1 if on_gpu else max(1, min(4, os.cpu_count() or 1)),
        help="runs at the same time")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable for every run")
    add("--seconds-per-run", type=float, default=3600.0, help="time limit of each run")
    add("--memory-gb", type=float, default=0.0 if on_gpu else 32.0, help="address space of each run, 0: any")
    add("--skip-training", action="store_true", help="no training twin")
    add("--json", default="", help="write the report here")
    return parser.parse_args(arguments)


def report(verifier, code, sandbox, arguments, seconds):
    """Print the summary; write the JSON report if asked to."""
    isolated = "no network" if sandbox.wrapper else "WITH network: unshare -rn is not permitted here"
    words = {LEGAL: "nothing illegal found", ILLEGAL: "ILLEGAL", UNTESTED: "could not be tested"}[code]
    results = verifier.results if verifier else []
    missing = sorted({r.test for r in results if r.status == SKIPPED})
    print(f"isolation: own directory, bare environment, {isolated}")
    if missing:
        print(f"not run: {', '.join(missing)}")
    runs = verifier.candidate.runs if verifier else 0
    chance = sum(r.error_probability for r in results)
    print(f"verdict: {words}; a legal script fails with probability {chance:.1e}; {runs} runs in "
          f"{seconds:.0f} s, seed {arguments.seed}")
    if arguments.json:
        value = dict(verdict=words, exit_code=code, seed=arguments.seed, seconds=seconds, runs=runs,
                     network=not sandbox.wrapper, error_probability=chance,
                     results=[r._asdict() for r in results])
        Path(arguments.json).write_text(json.dumps(value, indent=1) + "\n")


def prepare(arguments, root):
    """(Sandbox, Verifier) for the command line. Raises UntestableError."""
    if not all("=" in pair for pair in arguments.set):
        raise UntestableError("--set expects NAME=VALUE")
    settings = dict(pair.split("=", 1) for pair in arguments.set)
    script = only_file(arguments.folder, "train_gpt.py", arguments.script, "script")
    artifact = only_file(arguments.folder, "*.ptz", arguments.artifact, "artifact")
    tokenizer = only_file(arguments.folder, "*.model", arguments.tokenizer, "tokenizer")
    if not script or not tokenizer:
        raise UntestableError(f"{arguments.folder}: expected a script and a tokenizer: name them by --script "
                              "and --tokenizer")
    real = np.concatenate([read_shard(path) for path in find_shards(arguments.data, "val")])
    pieces = Tokenizer(tokenizer)
    if real.max() >= pieces.size or len(real) < PROBE_TOKENS:
        raise UntestableError(f"{arguments.data}: expected at least {PROBE_TOKENS} tokens below "
                              f"{pieces.size}: name shards that belong to the tokenizer")
    sandbox = Sandbox(settings, arguments.memory_gb, root)
    candidate = Candidate(sandbox, script, artifact, tokenizer, arguments)
    return sandbox, Verifier(candidate, pieces, real, arguments)


def main(arguments=None):
    """Returns the exit code."""
    arguments = parse(arguments)
    if arguments.seed is None:
        arguments.seed = int.from_bytes(os.urandom(4), "little")
    begin, verifier = time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="verify_", ignore_cleanup_errors=True) as root:
        try:
            sandbox, verifier = prepare(arguments, root)
            code = verifier.verify()
        except UntestableError as error:
            print(f"error: {error}", file=sys.stderr)
            found = verifier and any(r.status == FAIL for r in verifier.results)
            code = ILLEGAL if found else UNTESTED
        if verifier:
            report(verifier, code, sandbox, arguments, time.monotonic() - begin)
    return code


if __name__ == "__main__":
    sys.exit(main())
