"""Judge a submission folder from outside: run its own scoring on texts that this program wrote.

    python slurm/verify.py FOLDER --data DIR                # DIR holds fineweb_val_*.bin
    python slurm/verify.py FOLDER --data DIR --seed 7 --minutes 30 --ranks 2 --json report.json
    python slurm/verify.py FOLDER --data DIR --q ngram --set DEVICE=cpu --whole

The folder holds a script, an artifact (*.ptz) and a tokenizer (*.model). Every score that the
script prints is held against the challenge's four conditions (issue #1017): C1 no score depends on
later tokens, C2 scores come from one normalised distribution, C3 nothing learns from a token before
its score is final, C4 every token is scored once.

* Repeat. The same text twice gives the same digits; on a GPU all but the noise of its kernels. The
  first run shows its scores and runs the script's own checks (AUDIT=1, SPOT_CHECKS=1); the second
  is the published command, with no variable that tells the script that it is watched. A script that
  calls its own score illegal, by exit code 6 or by word, is believed; its praise is not.
* Bet (C1 to C4 at once). Tokens are drawn from a distribution q that only this program knows. If
  the script's p is a legal prediction, then p(x)/q(x) is at most 1 on average, at each token and
  whatever came before it. A gambler who stakes a share of his money on p/q, token after token,
  multiplies it by e^c with probability e^-c at most (Ville's inequality). The share, and the tokens
  that he bets on, may depend on the past alone.
* Twins (C1, C3). Two shards are equal up to k and differ after it, on disk. All scores up to k must
  be equal, bit for bit.
* Recount (C4, bytes). Targets, nats and UTF-8 bytes, counted here, must give the printed digits, in
  every line that names a score.
* Model alone (C1). The script's GPT, imported, must give the same logits at a place whatever comes
  next: a leak from the target itself changes no score before it, so that no twin shows it.
* Training twin. Ten steps beside two validation shards must give the same artifact: one shard is
  the training text, the other unlike any, so that a choice by validation loss falls differently.

SCORES_FILE=path/{label}.f32 asks the script for the nll of every target. A script that does not
know this variable gets the tests that need printed lines only, and the report names the others.
Exit code: 0 nothing illegal was found, 6 illegal, 2 could not be tested. docs/reviewing.md says
what no test from outside can show.
"""

import argparse
import codecs
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

BOS = 1  # every document of the official shards starts with this token
THRESHOLD = 14.0  # nats; a legal script wins as much with probability e^-14 = 8e-7

# Exit codes.
LEGAL = 0
UNTESTED = 2
ILLEGAL = 6
VERDICTS = {
    LEGAL: "nothing illegal found",
    ILLEGAL: "ILLEGAL",
    UNTESTED: "could not be tested",
}

# Status of a test; None stands for a test that was not run.
STATUS = {True: "pass", False: "FAIL", None: "not run"}


class UntestableError(Exception):
    """Something keeps the folder from being tested; the message says what to change."""


def printable(text, limit=400):
    """Text of a stranger, safe for a terminal: one line, no escape sequences, bounded."""
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in text[:limit])


def on_gpu():
    """True if a script finds an NVIDIA GPU here."""
    return Path("/dev/nvidia0").exists()


# --------------------------------------------------------------------------------------------------
# Shards and bytes
# Written anew here, so that a mistake in the script's reader is not repeated by its judge.
# --------------------------------------------------------------------------------------------------
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # little-endian int32


def read_shard(path):
    """Memory-mapped uint16 tokens (n,) of one shard. Raises UntestableError for anything else."""
    header = np.fromfile(path, "<i4", SHARD_HEADER)
    known = len(header) == SHARD_HEADER and list(header[:2]) == [SHARD_MAGIC, SHARD_VERSION]
    if not known or os.path.getsize(path) != 4 * SHARD_HEADER + 2 * int(header[2]):
        raise UntestableError(f"{path}: not a token shard, or cut off: download it again")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER, (int(header[2]),))


def write_shard(path, tokens):
    """Write tokens (n,) as a shard of the challenge's format."""
    header = np.zeros(SHARD_HEADER, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    body = np.asarray(tokens).astype("<u2")
    Path(path).write_bytes(header.tobytes() + body.tobytes())


def find_shards(folder, split):
    """Sorted paths of the "train" or "val" shards. Raises UntestableError without any."""
    # Byte counts may lie beside the shards, as fineweb_val_bytes_000000.bin.
    name = re.compile(rf"fineweb_{split}_\d+\.bin")
    paths = sorted(path for path in Path(folder).glob("*.bin") if name.fullmatch(path.name))
    if not paths:
        raise UntestableError(
            f"{folder}: no fineweb_{split}_*.bin in it: name the directory of the shards"
        )
    return paths


class Tokenizer:
    """Kinds of pieces, each an array (V,), and the bytes that tokens really stand for."""

    def __init__(self, path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = printable(str(error))
            raise UntestableError(f"{path}: not a SentencePiece model: {reason}") from None
        model = self.model
        self.size = model.vocab_size()
        ids = range(self.size)
        pieces = [model.id_to_piece(i) for i in ids]
        # Control, unknown and unused pieces: no bytes.
        silent = [model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids]
        self.silent = np.array(silent)
        self.spaced = np.array([piece.startswith("▁") for piece in pieces])  # SentencePiece's space
        # 0xE2 for the piece <0xE2>, -1 for all other pieces.
        self.byte = np.array([int(pieces[i][3:5], 16) if model.is_byte(i) else -1 for i in ids])
        # Pieces that go on with a character: no text may be cut before one of these.
        self.inside = (self.byte >= 0x80) & (self.byte <= 0xBF)
        # Ordinary pieces, which may stand anywhere.
        self.plain = np.flatnonzero(~self.silent & ~self.spaced & (self.byte < 0))

    def count_bytes(self, tokens):
        """UTF-8 bytes of the targets tokens[1:], by decoding what lies between silent pieces.

        By the challenge's rule a space right after a silent piece (BOS) does not count.
        """
        tokens = np.asarray(tokens, np.int64)
        silent_targets = 1 + np.flatnonzero(self.silent[tokens[1:]])
        edges = [0, *silent_targets.tolist(), len(tokens)]
        # SentencePiece drops a space at the start of a text: each run is decoded behind an anchor.
        anchor = [int(self.plain[0])]
        anchor_bytes = len(self.model.decode(anchor).encode())
        total = 0
        for left, right in itertools.pairwise(edges):
            run = tokens[left + 1 : right].tolist()
            # The end of the text may cut a character in two: each byte piece is one byte.
            while run and right == len(tokens) and self.byte[run[-1]] >= 0:
                run.pop()
                total += 1
            if not run:
                continue
            decoded = self.model.decode(anchor + run)
            total += len(decoded.encode()) - anchor_bytes
            if self.spaced[run[0]] and self.silent[tokens[left]]:
                total -= 1
        return total


# --------------------------------------------------------------------------------------------------
# Known distributions
# A source turns the past into probabilities, and texts are drawn from them. The closer a source
# comes to the script's own prediction, the more a bet sees; but the bet is fair with any source.
# --------------------------------------------------------------------------------------------------
class NgramSource:
    """A trigram model of the given text, each order smoothed with the shorter one (Witten & Bell
    1991, "The zero-frequency problem"). Knows nothing of the script, and sees gross faults only.
    """

    name = "a trigram model"
    context = 2  # tokens that it looks back
    SPREAD = 2.0  # above 1: flatter than the text, as the script's prediction of drawn text is

    def __init__(self, tokens, vocab):
        tokens = tokens.tolist()
        counts = np.bincount(tokens, minlength=vocab) + 0.5  # no piece is impossible
        self.unigram = counts / counts.sum()
        # By number of tokens: {the last tokens: (ids that came next, how often)}
        self.tables = {1: {}, 2: {}}
        for length, table in self.tables.items():
            counts = defaultdict(Counter)
            for place in range(length, len(tokens)):
                counts[tuple(tokens[place - length : place])][tokens[place]] += 1
            for past, after in counts.items():
                table[past] = np.fromiter(after, int), np.fromiter(after.values(), float)

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        rows = []
        for past in contexts.tolist():
            p = self.unigram
            for length in (1, 2):
                found = self.tables[length].get(tuple(past[-length:]))
                if found is None:
                    break  # then no longer context was seen either
                ids, counts = found
                backoff = self.SPREAD * len(ids)  # pseudo-counts that the shorter order gets
                total = counts.sum() + backoff
                p = p * (backoff / total)
                p[ids] += counts / total
            rows.append(p)
        return np.stack(rows)


# Runs in a process of its own. The script's standard output is moved away, so that nothing that it
# prints can be taken for an answer.
ORACLE = """
import importlib.util, os, struct, sys
answer = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import numpy as np, torch
spec = importlib.util.spec_from_file_location("candidate", sys.argv[1])
candidate = sys.modules["candidate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(candidate)
with open(sys.argv[2], "rb") as file:
    config, state_dict = candidate.unpack_artifact(file.read())[:2]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = candidate.GPT(config).eval()
model.load_state_dict(state_dict)
model.to(device)
while head := sys.stdin.buffer.read(12):
    rows, length, place = struct.unpack("<iii", head)
    ids = np.frombuffer(sys.stdin.buffer.read(4 * rows * length), "<i4").reshape(rows, length)
    ids = torch.from_numpy(ids.astype(np.int64)).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        logits = model.logits(model.hidden(ids)[:, place])
    answer.write(logits.float().cpu().numpy().astype("<f4").tobytes())
    answer.flush()
"""


class ModelSource:
    """The artifact's own model, fed only the past, by importing the script in a child process.

    The child may be hostile: it answers with logits and never learns what is drawn from them, so
    the worst it can do is to blunt the bet.
    """

    name = "the artifact's own model"

    def __init__(self, sandbox, script, artifact, vocab, context):
        self.sandbox = sandbox
        self.vocab = vocab
        self.context = context
        self.child = sandbox.start(
            [sys.executable, "-c", ORACLE, str(script), str(artifact)],
            sandbox.folder(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        contexts = contexts[:, -self.context :]
        logits = self.logits(contexts, contexts.shape[1] - 1).astype(float)
        # Any answer becomes a distribution.
        logits = np.clip(np.nan_to_num(logits), -100, 100)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def logits(self, ids, place):
        """The model's logits (B, V) at one place of the windows ids (B, T)."""
        ids = np.ascontiguousarray(ids, "<i4")
        head = np.array([*ids.shape, place], "<i4")
        try:
            self.child.stdin.write(head.tobytes() + ids.tobytes())
            self.child.stdin.flush()
            answer = self.child.stdout.read(4 * len(ids) * self.vocab)
        except OSError:
            answer = b""
        if len(answer) < 4 * len(ids) * self.vocab:
            raise UntestableError("--q model: the script's GPT cannot be run by import")
        return np.frombuffer(answer, "<f4").reshape(len(ids), self.vocab)

    def close(self):
        self.sandbox.end(self.child)


# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------
class Text(NamedTuple):
    """Tokens (n,) and the ln q (n,) with which each was drawn; NaN where it was not drawn."""

    tokens: np.ndarray
    log_q: np.ndarray


@functools.cache
def bytes_after(pending):
    """{byte: what is pending after it} for the bytes that may follow an unfinished character."""
    after = {}
    for byte in range(256):
        decoder = codecs.getincrementaldecoder("utf-8")()
        with contextlib.suppress(UnicodeDecodeError):
            decoder.decode(pending + bytes([byte]))
            rest = decoder.getstate()[0]
            # The decoder refuses a half of a UTF-16 pair only at its last byte.
            if not b"\xed\xa0" <= rest < b"\xee":
                after[byte] = rest
    return after


class Texts:
    """Writes the texts of one verification, from the user's text and from draws.

    All are valid UTF-8, since loaders refuse others.
    """

    FITTED_TOKENS = 200_000  # of the user's text: enough for trigrams, and read in a second
    STREAM_TOKENS = 320  # of a drawn text: streams are drawn side by side
    OPENINGS = ("plain", "bos", "bytes", "rare")  # how the other part of a twin begins
    LONGEST = 4  # bytes of a character

    def __init__(self, tokenizer, real, seed):
        self.tokenizer = tokenizer
        self.real = np.array(real[: self.FITTED_TOKENS])
        self.random = np.random.default_rng(seed)
        self.ngrams = NgramSource(self.real, tokenizer.size)
        byte = tokenizer.byte
        # Shares of all draws that kinds of pieces get, whatever the source says: each is rare in
        # text and dear to cheaters.
        special = np.zeros(tokenizer.size)
        for share, kind in (
            (0.004, np.arange(tokenizer.size) == BOS),
            (0.004, byte >= 0x80),
            (0.0015, tokenizer.silent),
            (0.009, np.ones(tokenizer.size, bool)),
        ):
            special += share * kind / max(1, kind.sum())
        # After a silent piece a space has no byte.
        spaces = 0.3 * tokenizer.spaced / max(1, tokenizer.spaced.sum())
        self.special = np.stack([special, special + spaces])  # (2, V): after text, after silence

    # ---- drawn ----

    def probabilities(self, source, contexts, pending, room):
        """q (B, V) after contexts (B, T): the source's and the special shares, as UTF-8 allows.

        `pending` are the rows' unfinished characters, `room` is the number of tokens up to the end.
        """
        rows = {}
        for start in set(pending):
            # Near the end no character may begin, or it would stay unfinished.
            ends = not start and room <= self.LONGEST
            possible = [byte for byte, rest in bytes_after(start).items() if not (ends and rest)]
            rows[start] = np.isin(self.tokenizer.byte, possible if start else [-1, *possible])
        allowed = np.stack([rows[start] for start in pending])
        special = self.special[self.tokenizer.silent[contexts[:, -1]].astype(int)]  # (B, V)
        special[np.arange(len(contexts)), contexts[:, -1]] += 0.002  # the token before once more
        q = (1 - special.sum(1, keepdims=True)) * source.predict(contexts) + special
        q = (q + 1e-9) * allowed  # the source may give no mass to what must come next
        return q / q.sum(1, keepdims=True)

    def continued(self, source, given, steps, size):
        """The Text of rows `given` (B, T), each followed by `steps` tokens drawn from `source`."""
        rows, start = given.shape
        tokens = np.concatenate([given, np.zeros((rows, steps), int)], 1)
        log_q = np.full(tokens.shape, np.nan)
        pending = [b""] * rows
        each = np.arange(rows)
        for at in range(start, start + steps):
            contexts = tokens[:, max(0, at - source.context) : at]
            q = self.probabilities(source, contexts, pending, start + steps - at)
            total = q.cumsum(1)
            point = self.random.random((rows, 1)) * total[:, -1:]
            chosen = (total <= point).sum(1)
            tokens[:, at] = chosen
            log_q[:, at] = np.log(q[each, chosen])
            byte = self.tokenizer.byte[chosen].tolist()
            pending = [bytes_after(p).get(b, b"") for p, b in zip(pending, byte)]
        return Text(tokens.reshape(-1)[:size], log_q.reshape(-1)[:size])

    def real_pieces(self, rows, length):
        """Pieces (rows, length) of real text that begin and end between two characters."""
        inside = self.tokenizer.inside[self.real]
        starts = np.flatnonzero(~inside[:-length] & ~inside[length:])
        starts = self.random.choice(starts, rows)
        return np.stack([self.real[at : at + length] for at in starts]).astype(int)

    def streams(self, size):
        return max(8, size // self.STREAM_TOKENS)

    def text(self, source, size, steps=None):
        """A Text of `size` tokens: pieces of real text, each continued by what `source` draws.

        `steps` tokens are drawn for each, at most as many as its share of the text leaves beside
        the context.
        """
        streams = self.streams(size)
        share = -(-size // streams)  # rounded up
        room = share - min(source.context, share // 2)
        steps = min(steps or room, room)
        given = self.real_pieces(streams, share - steps)
        # A script may know a text by its first tokens.
        first = self.real[: self.not_inside(self.real, share - steps - 1) + 1]
        given[0] = self.tokenizer.plain[0]
        given[0, : len(first)] = first
        return self.continued(source, given, steps, size)

    def drawn_text(self, source, size):
        """A Text that is drawn from its second token on, as the bet on a printed sum needs."""
        return self.continued(source, np.full((1, 1), BOS), size - 1, size)

    def ordinary(self, size):
        """Tokens (size,) like those of the exam, by the n-gram model: these are drawn quickly."""
        return self.text(self.ngrams, size).tokens

    # ---- twins ----

    def opening(self, kind, unlike):
        """First tokens of a twin's other part, of one of OPENINGS, not beginning with `unlike`."""
        byte = self.tokenizer.byte
        pieces = [np.flatnonzero(byte == value) for value in "é".encode()]
        if kind == "bytes" and all(map(len, pieces)) and pieces[0][0] != unlike:
            return [int(piece[0]) for piece in pieces]
        rare = np.argsort(self.ngrams.unigram)[:50]
        plain = self.tokenizer.plain
        choices = {"bos": np.array([BOS]), "rare": rare[byte[rare] < 0]}.get(kind, plain)
        choices = choices[choices != unlike]
        if len(choices) == 0:
            choices = plain[plain != unlike]
        return [int(self.random.choice(choices))]

    def twin(self, tokens, k, kind, other=None):
        """`tokens` up to and with token k, then others: the first k targets are the same."""
        if other is None:
            other = self.ordinary(len(tokens))
        head = self.opening(kind, tokens[k + 1])
        # The other text may be entered only between two characters.
        while k + 1 + len(head) < len(other) and self.tokenizer.inside[other[k + 1 + len(head)]]:
            head.append(int(self.random.choice(self.tokenizer.plain)))
        twin = np.concatenate([tokens[: k + 1], head, other[k + 1 + len(head) :]])
        return twin[: len(tokens)].astype(int)

    def not_inside(self, tokens, k):
        """`k`, or the last place before it after which no character goes on."""
        while self.tokenizer.inside[tokens[k + 1]]:
            k -= 1
        return k

    def twin_places(self, tokens, count, size, hints):
        """`count` numbers k of shared targets: spread over the text at random, some at edges."""
        window = hints.eval_seq_len
        stride = hints.eval_stride
        chunk = hints.ttt_chunk_tokens
        places = []
        for number in range(count):
            # One in each part of the text, so that no part is left out.
            k = int((number + self.random.random()) / count * size)
            beside = int(self.random.integers(-1, 2))
            if number % 4 == 1:  # the first target of a window, or the one before or after
                k = window + (k - window) // stride * stride + beside
            elif number % 4 == 0 and size > chunk:  # the same of a chunk
                # Just after an edge shows what was learnt of the targets behind it, all the others
                # little: three in four lie there.
                after = self.random.random() < 0.75
                k = max(1, round(k / chunk)) * chunk + (1 if after else beside)
            # The last window, and the last batch: both may be smaller than the others.
            if number == count - 1:
                k = size - 1 - int(self.random.integers(0, stride))
            if number == count - 2:
                k = size - 1 - int(self.random.integers(0, stride * hints.eval_batch_seqs))
            places.append(self.not_inside(tokens, min(max(k, 1), size - 1)))
        # In random order: a search that ends early was everywhere.
        return self.random.permutation(places).tolist()


# --------------------------------------------------------------------------------------------------
# Child processes
# Each has a directory of its own, a time limit, an environment made from nothing, and no network
# where the system lets an ordinary user take it away.
# --------------------------------------------------------------------------------------------------
# A new network namespace has even its loopback switched off, which several ranks need to meet.
NO_NETWORK = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, UP_AND_RUNNING = 0x8914, 0x41
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14s", b"lo", UP_AND_RUNNING, b""))
os.execvp(sys.argv[1], sys.argv[1:])
"""
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


class Sandbox:
    """Starts and ends child processes below the directory `root`."""

    def __init__(self, settings, root):
        self.settings = settings  # the user's, for every child
        self.root = root
        self.wrapper = []
        no_network = ["unshare", "-rn", sys.executable, "-I", "-c", NO_NETWORK]
        with contextlib.suppress(OSError):  # no such program
            if subprocess.run([*no_network, "true"], capture_output=True).returncode == 0:
                self.wrapper = no_network

    def folder(self):
        return Path(tempfile.mkdtemp(dir=self.root))

    def environment(self, folder, settings):
        """Environment of a child, whose directory is its home."""
        environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environ.update(HOME=str(folder), TMPDIR=str(folder), LANG="C.UTF-8")
        # One thread: children run side by side, and the same number gives the same bits.
        environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        # Settings that the script itself printed must not take the place of these.
        return {**settings, **environ, **self.settings}

    def start(self, command, folder, settings=(), **pipes):
        """A child process that runs `command` in `folder`; pipes as for Popen."""
        return subprocess.Popen(
            [*self.wrapper, *command],
            cwd=folder,
            env=self.environment(folder, dict(settings)),
            start_new_session=True,  # so that all that it starts can be ended with it
            **pipes,
        )

    def end(self, child):
        """End a child and all that it started in its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):
                pipe.close()

    def finish(self, command, folder, settings, seconds, output):
        """Exit code of `command`, ended after `seconds`; prints into the open file `output`."""
        child = self.start(
            command,
            folder,
            settings,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.end(child)


class Printed(NamedTuple):
    """One score as printed, and whether its line says that it is illegal."""

    val_loss: float
    val_bpb: float
    declared_illegal: bool


class Outcome(NamedTuple):
    """One finished run of the script."""

    code: int  # exit code, negative for a signal
    seconds: float
    output: str  # the end of it
    printed: dict  # label -> Printed
    nll: dict  # label -> nll by target (n,) float32, as SCORES_FILE shows it
    artifacts: dict  # file name -> SHA-256 of each artifact that training left

    def last_words(self):
        return printable(" ".join(self.output.split()[-40:]))


EXACT_LINE = re.compile(
    r"^([\w.+-]{1,80})_exact val_loss:([\d.]{1,40}) val_bpb:([\d.]{1,40})(.{0,200})$",
    re.ASCII | re.MULTILINE,
)
OUTPUT_LIMIT = 4 << 20  # bytes of a child's output that are looked at, from its end
OFFICIAL_LABEL = "final_int8_zlib_roundtrip"  # of the challenge's own script


def parse_output(output):
    """{label: Printed} of the lines with all digits."""
    printed = {}
    for label, val_loss, val_bpb, rest in EXACT_LINE.findall(output):
        with contextlib.suppress(ValueError):  # such as 1.2.3
            printed[label] = Printed(float(val_loss), float(val_bpb), "illegal" in rest)
    # A script with labels of its own may repeat its headline score under the official one.
    official = printed.pop(OFFICIAL_LABEL, None)
    if official and official not in printed.values():
        printed[OFFICIAL_LABEL] = official
    return printed


# A count of what is done so far marks a line of progress, whose digits are not final.
PROGRESS = re.compile(r"\d\s*/\s*\d|\d\s*%|progress|running", re.IGNORECASE)
DIGITS = re.compile(r"\bval_(loss|bpb):(\d+)(?:\.(\d{1,12}))?(?!\S)", re.ASCII)
LAST_DIGIT = 1.5e-8  # two ways to round to eight decimals, and float32 values, may differ by this


def other_digits(output, printed):
    """Sentences on lines of the output that name a printed score and give it other digits."""
    found = []
    for line in output.splitlines():
        words = line[:400].split()[:2]  # as in `LABEL val_loss:…` and `result LABEL val_bpb:…`
        label = next((word for word in words if word in printed), None)
        if label is None or PROGRESS.search(line[:400]):
            continue
        for name, whole, decimals in DIGITS.findall(line[:400]):
            value = getattr(printed[label], f"val_{name}")
            shown = float(f"{whole}.{decimals or 0}")
            # Rounded to the decimals of the line.
            if abs(shown - value) > 0.51 * 10.0 ** -len(decimals) + LAST_DIGIT:
                found.append(f"{label}: val_{name} {shown} beside {value:.8f}")
    return found


# Where the challenge's scripts look for shards: a script may behave otherwise anywhere else.
OFFICIAL_DATA = "data/datasets/fineweb10B_sp1024"


@dataclass
class Candidate:
    """The folder under test: runs its script in a fresh copy of it, on shards that are given."""

    sandbox: Sandbox
    script: Path
    artifact: Path | None  # None: the script can only train
    tokenizer: Path
    ranks: int
    seconds: float  # that a run may take
    runs: int = 0

    def run(self, val, train, scores_file, settings):
        """Score a validation shard, or with training tokens train and score; returns an Outcome."""
        folder = self.sandbox.folder()
        data = folder / OFFICIAL_DATA
        data.mkdir(parents=True)
        scores = folder / "scores"
        scores.mkdir()
        shutil.copy(self.script, folder)
        shutil.copy(self.tokenizer, folder)
        write_shard(data / "fineweb_val_000000.bin", val)
        places = dict(DATA_PATH=f"./{OFFICIAL_DATA}", TOKENIZER_PATH=self.tokenizer.name)
        environ = {**settings, **places}
        if train is None:
            shutil.copy(self.artifact, folder)
            environ["EVAL_ONLY"] = self.artifact.name
        else:
            write_shard(data / "fineweb_train_000000.bin", train)
        if scores_file:
            environ["SCORES_FILE"] = "scores/{label}.f32"
        command = [sys.executable, self.script.name]
        if self.ranks > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*torchrun, f"--nproc_per_node={self.ranks}"]
        begin = time.monotonic()
        try:
            with open(folder / "output", "w+b") as output:
                code = self.sandbox.finish(command, folder, environ, self.seconds, output)
                # By the open file: the child may have put something else in its place.
                output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_LIMIT))
                text = output.read(OUTPUT_LIMIT).decode("utf-8", "replace").replace("\r", "\n")
            seconds = time.monotonic() - begin
            self.runs += 1
            nll = {}
            for path in scores.glob("*.f32"):
                if path.is_file():  # no pipe, which would never end
                    # One value more than there can be shows a file that is too long.
                    nll[path.stem] = np.fromfile(path, "<f4", len(val))
            left = [*folder.rglob("*.ptz")] or [*folder.rglob("*.pt")]
            artifacts = {}
            for path in filter(Path.is_file, left):
                artifacts[path.name] = hashlib.sha256(path.read_bytes()).digest()
            return Outcome(code, seconds, text, parse_output(text), nll, artifacts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# The bet
# Waudby-Smith & Ramdas 2020, "Estimating means of bounded random variables by betting".
# --------------------------------------------------------------------------------------------------
STAKES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def evidence(nll, log_q, places):
    """ln of what a gambler made of 1 by staking on p/q at the targets of each set in `places`.

    He divides his money evenly among all pairs (set, stake): one winner pays for the others. For a
    legal p the result exceeds c with probability e^-c at most (Ville's inequality), if q drew the
    tokens and the sets depend on the past alone.
    nll, log_q (n,), log_q NaN where q drew nothing; places {name: bool (n,)}.
    Returns (nats, name of the set that won most).
    """
    drawn = np.isfinite(log_q)
    # A nll that is no number has failed the recount already; here it must not raise the odds.
    gain = np.where(np.isfinite(nll), -nll.astype(float) - log_q, -np.inf)
    ratio = np.exp(np.minimum(gain, 600.0))  # p/q, short of overflow
    wealth = []
    names = []
    for stake in STAKES:
        with np.errstate(divide="ignore"):  # he may lose all of a stake of 1
            growth = np.log1p(stake * (ratio - 1))  # (n,)
        for name, chosen in places.items():
            wealth.append(growth[chosen & drawn].sum())
            names.append(name)
    wealth = np.array(wealth)
    best = int(wealth.argmax())
    # ln of the mean of e^wealth, short of overflow.
    total = wealth[best] + math.log(np.exp(wealth - wealth[best]).mean())
    return float(total), names[best]


class Hints(NamedTuple):
    """Settings by the script's own configuration lines. Wrong hints only blunt the tests."""

    eval_seq_len: int = 1024
    eval_stride: int = 64
    eval_batch_seqs: int = 32
    ttt_chunk_tokens: int = 32768


# Hundreds of sets cost the gambler no more than ln of their number.
ROUND_PERIODS = (2, 3, 4, 5, 8, 10, 16, 20, 32, 40, 50)


def predictable_places(count, hints):
    """{name: bool (count,)} sets of targets to bet on, which depend on nothing but their place.

    A violation that shows at few places (the first target of each window, the last batch, every
    40th round) is diluted in the whole text and stands out in one of these.
    """
    index = np.arange(count)
    after_first_window = np.maximum(index - hints.eval_seq_len, 0)
    phase = after_first_window % hints.eval_stride
    in_chunk = index % hints.ttt_chunk_tokens
    rounds = after_first_window // (hints.eval_stride * hints.eval_batch_seqs)
    places = {
        "all targets": np.ones(count, bool),
        "first target of a window": phase == 0,
        "last target of a window": phase == hints.eval_stride - 1,
        "first quarter of a window": phase < hints.eval_stride / 4,
        "first window of a chunk": in_chunk < hints.eval_stride,
        "last quarter of a chunk": in_chunk >= 0.75 * hints.ttt_chunk_tokens,
    }
    for number in range(8):
        places[f"part {number + 1} of 8"] = index * 8 // count == number
    for period in ROUND_PERIODS:
        for first in range(period):
            places[f"every {period}th round from {first}"] = rounds % period == first
    return places


# --------------------------------------------------------------------------------------------------
# The tests
# Each adds lines to the report. A test that needs what the script does not show says so.
# --------------------------------------------------------------------------------------------------
HINT_LINE = re.compile(r"^config:([a-z0-9_]{1,40})=(\S{1,200})", re.ASCII | re.MULTILINE)
TIME_LINE = re.compile(r" eval_time:(\d{1,9})ms", re.ASCII)
# Settings of place and pace, for which the verifier has its own.
NOT_REPEATED = re.compile("preset|run_id|run_dir|resume|eval_only|mode|audit|time_limit_seconds")
FIRST_RUN_TOKENS = 4113
EXAM_TARGETS = 20_480
EXAM_CHUNKS = 2.5  # of test-time training: some chunks and a part of one
MODEL_CONTEXT = 64  # tokens; longer is dearer and hardly sharper
MODEL_PLACES = 25
TRAINING_STEPS = 10
TRAINING_SEQS = 8  # per step
TRAINING_TOKENS = 32_768

# Settings of the script's own checks, which take time: none of them, all of them, or nothing set,
# so that no variable tells the script that it is watched.
NO_CHECKS = {"AUDIT": "0"}
ALL_CHECKS = {"AUDIT": "1", "SPOT_CHECKS": "1"}
AS_PUBLISHED = {}


class Verifier:
    """Runs the tests on one folder; `results` holds what they found."""

    def __init__(self, candidate, tokenizer, real, arguments):
        self.candidate = candidate
        self.tokenizer = tokenizer
        self.real = real
        self.arguments = arguments
        self.started = time.monotonic()
        self.texts = Texts(tokenizer, real, arguments.seed)
        self.random = self.texts.random
        self.results = []
        self.crashed = False  # some run showed nothing: then nothing is legal
        self.confessed = set()  # labels that the script itself calls illegal, "" for all
        # Known after the first run.
        self.trains = candidate.artifact is None  # the script has to train before it scores
        self.shows_nll = False
        self.settings = {}
        self.hints = Hints()
        self.target_seconds = 0.0
        self.start_seconds = 0.0
        # Known after the exam.
        self.source = None
        self.text = None
        self.exam = None  # the Outcome
        self.noise = {}  # label -> nats by which equal runs differ
        self.counts = {}  # label -> targets that were scored

    def verify(self):
        """Run the tests, the cheapest first; returns the exit code. Raises UntestableError."""
        self.first_run()
        self.draw_exam()
        if not self.take_exam():
            return ILLEGAL
        for test in (
            self.recount,
            self.bet,
            self.model_alone,
            self.training_twin,
            self.twins,
            self.whole_text,
        ):
            if self.arguments.stop and self.illegal():
                break
            test()
        if self.illegal():
            return ILLEGAL
        return UNTESTED if self.crashed else LEGAL

    def illegal(self):
        return any(result["status"] == STATUS[False] for result in self.results)

    def left(self):
        """Seconds left of the time that the user gave."""
        return 60 * self.arguments.minutes - (time.monotonic() - self.started)

    def add(self, test, label, passed, detail, error_probability=0.0):
        """Note and print a result. passed: True, False, or None for a test that was not run.

        `error_probability` is that of a legal script to fail.
        """
        result = dict(test=test, label=label, status=STATUS[passed], detail=detail)
        self.results.append(dict(result, error_probability=error_probability))
        print(f"{STATUS[passed]:8}{test:14}{printable(label):28}{printable(detail)}", flush=True)

    # ---- runs ----

    def run(self, tokens, scores_file=True, train=None, checks=NO_CHECKS):
        """Outcome of the script on a validation shard; one that cannot score only, trains first.

        `checks` are the settings of the script's own checks.
        """
        settings = dict(checks)
        if self.trains and train is None:
            train = self.training_text
        if train is not None:
            settings.update(self.training_settings())
        return self.candidate.run(tokens, train, scores_file, settings)

    def run_all(self, jobs):
        """Outcomes of several runs, some at the same time. jobs: keyword arguments of run()."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            outcomes = list(pool.map(lambda job: self.run(**job), jobs))
        for outcome in outcomes:
            self.heed(outcome)
        return outcomes

    def first_run(self):
        """Find out how the script is run, which scores it shows and how fast it is."""
        tokens = self.real[:FIRST_RUN_TOKENS].astype(int)
        (outcome,) = self.run_all([dict(tokens=tokens)])
        if not outcome.printed and not self.trains:
            # The challenge's baseline knows no EVAL_ONLY: it scores what it has just trained.
            self.trains = True
            trained = self.run(tokens)
            if trained.printed:
                outcome = trained
        if not outcome.printed:
            raise UntestableError(
                f"the script printed no score (exit code {outcome.code}): {outcome.last_words()}"
            )
        self.shows_nll = bool(outcome.nll)
        for name, value in HINT_LINE.findall(outcome.output):
            if not NOT_REPEATED.fullmatch(name):
                self.settings[name] = value
        for name in Hints._fields:
            with contextlib.suppress(ValueError, KeyError):
                value = min(1 << 24, max(1, int(self.settings[name])))
                self.hints = self.hints._replace(**{name: value})
        scoring = sum(int(ms) for ms in TIME_LINE.findall(outcome.output)) / 1000
        scoring = min(scoring or outcome.seconds / 2, outcome.seconds)
        # The only chunk of the first run is its last, which is not trained on: half as much again.
        self.target_seconds = 1.5 * scoring / FIRST_RUN_TOKENS
        self.start_seconds = outcome.seconds - scoring

    def heed(self, outcome):
        """Add the script's own verdicts: one that finds a score illegal itself is believed."""
        verdicts = {
            label: "printed with the word illegal"
            for label, printed in outcome.printed.items()
            if printed.declared_illegal
        }
        if outcome.code == ILLEGAL:
            verdicts[""] = f"the script ends with exit code 6: {outcome.last_words()}"
        for label in verdicts.keys() - self.confessed:  # once is enough
            self.confessed.add(label)
            self.add("own verdict", label, False, verdicts[label])

    @functools.cached_property
    def training_text(self):
        """Training tokens: the user's, or text of the n-gram model."""
        if self.arguments.train_data:
            path = find_shards(self.arguments.train_data, "train")[0]
            return np.array(read_shard(path)[:4_000_000])
        return self.texts.ordinary(TRAINING_TOKENS)

    def training_settings(self):
        """The script's own settings, at a size that a few steps can be made of."""
        window = self.hints.eval_seq_len
        sizes = dict(
            ITERATIONS=TRAINING_STEPS,
            TRAIN_SEQ_LEN=window,
            TRAIN_BATCH_TOKENS=TRAINING_SEQS * window,
            MICRO_BATCH_TOKENS=TRAINING_SEQS * window,
            VAL_BATCH_SIZE=TRAINING_SEQS * window,
            VAL_LOSS_EVERY=TRAINING_STEPS // 5,  # what validation does may be the violation
            WARMUP_STEPS=0,
            WARMDOWN_ITERS=TRAINING_STEPS // 2,
            MAX_WALLCLOCK_SECONDS=0,  # or the number of steps would depend on the clock
        )
        own = {name.upper(): value for name, value in self.settings.items()}
        return {**own, **{name: str(value) for name, value in sizes.items()}}

    # ---- the exam ----

    def open_source(self):
        """The model's own predictions if the script can be imported, else the n-gram model's."""
        wish = self.arguments.q
        if wish == "ngram" or self.trains or not self.shows_nll:
            return self.texts.ngrams
        source = ModelSource(
            self.candidate.sandbox,
            self.candidate.script,
            self.candidate.artifact,
            self.tokenizer.size,
            min(self.hints.eval_seq_len, MODEL_CONTEXT),
        )
        try:
            source.predict(np.full((2, 2), BOS))
        except UntestableError:
            source.close()
            if wish == "model":
                raise
            return self.texts.ngrams
        return source

    def draw_exam(self):
        """Draw the text that all runs begin like: some chunks and a part of one, if time allows."""
        window = self.hints.eval_seq_len
        size = self.arguments.tokens
        if not size:
            wanted = max(EXAM_TARGETS, EXAM_CHUNKS * self.hints.ttt_chunk_tokens)
            seconds = self.left() / 8 - self.start_seconds
            affordable = seconds / max(self.target_seconds, 1e-9)
            size = int(min(wanted, max(affordable, FIRST_RUN_TOKENS)))
        # A few tokens more than whole windows, which have to be trimmed.
        extra = int(self.random.integers(1, window + 1))
        size = (size // window + 3) * window + extra
        self.source = self.open_source()
        if not self.shows_nll:
            self.text = self.texts.drawn_text(self.source, size)
            return
        steps = None  # to draw in each stream: as many as there is room for
        if isinstance(self.source, ModelSource):
            shape = self.texts.streams(size), self.source.context
            contexts = np.resize(self.real[:FIRST_RUN_TOKENS], shape)
            # The first answer warms the model up, the second tells the cost of a step.
            self.source.predict(contexts)
            begin = time.monotonic()
            self.source.predict(contexts)
            seconds = time.monotonic() - begin
            steps = max(8, int(0.15 * self.left() / seconds))
        self.text = self.texts.text(self.source, size, steps)

    def take_exam(self):
        """Run the script on the exam, watched and not: the digits must be the same.

        False if the script ended itself as illegal before its last score.
        """
        tokens = self.text.tokens
        watched, alone = self.run_all(
            [
                dict(tokens=tokens, checks=ALL_CHECKS),
                dict(tokens=tokens, scores_file=False, checks=AS_PUBLISHED),
            ]
        )
        self.exam = watched
        if ILLEGAL in (watched.code, alone.code):
            return False
        for outcome in (watched, alone):
            if outcome.code or not outcome.printed:
                raise UntestableError(
                    f"no score on the text of the exam (exit code {outcome.code}): "
                    f"{outcome.last_words()}"
                )
        if on_gpu():  # equal runs differ there, as sums are made in any order
            again = self.run(tokens)
            for label, nll in watched.nll.items():
                other = again.nll.get(label, ())
                if len(other) == len(nll):
                    self.noise[label] = float(np.abs(nll - other).max())
        # A script could show one thing and count another, or draw lots.
        for label in sorted({**watched.printed, **alone.printed}):
            first = watched.printed.get(label)
            second = alone.printed.get(label)
            same = first is not None and first == second
            detail = "the same digits with and without SCORES_FILE"
            if self.noise.get(label) and first and second:
                # Of a mean over independent targets, with room for their not being so.
                allowed = 8 * self.noise[label] / math.sqrt(len(tokens)) + 1e-6
                same = abs(first.val_loss - second.val_loss) <= allowed
                detail += f", but for noise of {self.noise[label]:.1e} nats per target"
            self.add("repeat", label, same, detail)
        return True

    # ---- C4 and bytes ----

    def recount(self):
        """Printed scores follow from targets, nats and bytes counted here."""
        printed = self.exam.printed
        shown = self.exam.nll
        matched = not self.shows_nll or set(printed) == set(shown)
        labels = [label for label, *_ in EXACT_LINE.findall(self.exam.output)]
        repeated = len(labels) - len(set(labels))
        detail = f"{len(printed)} scores, {len(shown)} shown, {repeated} labels printed twice"
        self.add("recount", "", matched and not repeated, detail)
        other = other_digits(self.exam.output, printed)
        detail = "all lines that name a score say the same of it"
        self.add("recount", "other lines", not other, "; ".join(other[:3]) or detail)
        for label, score in printed.items():
            count, num_bytes = self.whole_windows(score)
            faults = []
            if not count:
                faults.append("val_bpb is not val_loss over the bytes of any number of windows")
            nll = shown.get(label)
            if nll is not None:
                if len(nll) != count:
                    faults.append(f"{len(nll)} targets shown instead of {count}")
                if not (np.isfinite(nll) & (nll >= 0)).all():
                    faults.append("some nll is negative or no number")
                val_loss = float(nll.mean(dtype=np.float64))
                if not abs(val_loss - score.val_loss) < LAST_DIGIT:
                    faults.append(f"val_loss {score.val_loss:.8f} printed, {val_loss:.8f} shown")
                count = min(len(nll), len(self.text.tokens) - 1)
            self.counts[label] = count
            detail = f"{count} targets, {num_bytes} bytes: all digits"
            self.add("recount", label, not faults, "; ".join(faults) or detail)

    def whole_windows(self, score):
        """(targets, bytes) of the whole windows that explain a printed score; (0, 0) if none do."""
        tokens = self.text.tokens
        lengths = [self.hints.eval_seq_len]
        if not self.shows_nll:
            lengths += [1024, 2048, 4096, 1]  # the script may have said nothing of its windows
        for length in lengths:
            count = (len(tokens) - 1) // length * length  # the official script trims like this
            num_bytes = self.tokenizer.count_bytes(tokens[: count + 1])
            val_bpb = score.val_loss * count / math.log(2) / max(1, num_bytes)
            if count and abs(val_bpb - score.val_bpb) < 2 * LAST_DIGIT:
                return count, num_bytes
        return 0, 0

    # ---- C1 to C4 ----

    def bet(self):
        """No score may be better than the distribution that drew the text allows."""
        drawn = int(np.isfinite(self.text.log_q).sum())
        for label in self.exam.printed:
            count = self.counts[label]
            log_q = self.text.log_q[1 : count + 1]  # of the targets
            nll = self.exam.nll.get(label)
            if count and nll is not None:
                places = predictable_places(count, self.hints)
                won, where = evidence(nll[:count], log_q, places)
            elif count and np.isfinite(log_q).all():
                # The sum alone is a bet of everything on all targets. It is known to half a unit of
                # its last digit.
                nats = (self.exam.printed[label].val_loss + 5e-9) * count
                won, where = -float(log_q.sum()) - nats, "the sum"
            else:
                self.add("bet", label, None, "the number of targets is unknown")
                continue
            detail = (
                f"{won:+.1f} nats, less than {THRESHOLD:.0f} allowed; most on {where}; "
                f"{drawn} tokens by {self.source.name}"
            )
            self.add("bet", label, won < THRESHOLD, detail, math.exp(-THRESHOLD))

    # ---- C1 and C3 ----

    def model_alone(self):
        """C1 by import: the model's logits at a place see no later token and no other window.

        A leak from the very next token, the target, changes no score before it, so no twins on disk
        can show it; and if the model was not trained with the leak, it does not pay in the bet.
        """
        if not isinstance(self.source, ModelSource):
            self.add("model alone", "", None, "the script's GPT was not imported")
            return
        texts = self.texts
        window = min(self.hints.eval_seq_len, len(texts.real) // 2)
        stride = min(self.hints.eval_stride, window)
        places = np.concatenate(
            [
                np.linspace(0, window - 2, MODEL_PLACES),
                np.linspace(window - stride, window - 2, MODEL_PLACES // 2),  # most are scored here
            ]
        ).astype(int)
        wrong = []
        for number, place in enumerate(places):
            ids = texts.real_pieces(8, window)
            other = texts.real_pieces(8, window)
            kind = texts.OPENINGS[number % len(texts.OPENINGS)]
            if number % 2:
                # A token at the place itself, such as a BOS, may be treated apart.
                rare = texts.OPENINGS[number // 2 % len(texts.OPENINGS)]
                ids[0, place] = texts.opening(rare, ids[0, place])[0]
            other[0, : place + 1] = ids[0, : place + 1]
            other[0, place + 1] = texts.opening(kind, ids[0, place + 1])[0]
            # The same row of two batches of one shape: what is equal gives equal bits.
            before = self.source.logits(ids, place)[0]
            after = self.source.logits(other, place)[0]
            if not np.array_equal(before, after):
                wrong.append(int(place))
        self.source.close()
        detail = f"logits at {len(places)} places of a window, all that follows replaced"
        if wrong:
            detail += f": different at {wrong[:5]}"
        self.add("model alone", "", not wrong, detail)

    def twins(self):
        """No score up to target k changes with what comes after k."""
        if not self.shows_nll:
            self.add("twins", "", None, "the script writes no SCORES_FILE")
            return
        texts = self.texts
        tokens = self.text.tokens
        # The exam's own time has the script's checks in it.
        each = 1.1 * (self.start_seconds + self.target_seconds * len(tokens)) / self.arguments.jobs
        count = int(np.clip(self.left() / each, 4, self.arguments.twins))
        size = min(len(nll) for nll in self.exam.nll.values())
        places = texts.twin_places(tokens, count, size, self.hints)
        kinds = itertools.cycle(texts.OPENINGS)
        jobs = [dict(tokens=texts.twin(tokens, k, kind)) for k, kind in zip(places, kinds)]
        outcomes = []
        while len(outcomes) < count:
            at = len(outcomes)
            outcomes += self.run_all(jobs[at : at + self.arguments.jobs])
            if self.arguments.stop and any(self.twin_faults(self.exam, places, outcomes).values()):
                break
        self.judge_twins("twins", self.exam, places[: len(outcomes)], outcomes)

    def whole_text(self):
        """Twins of the whole given text: a script may know that by its size or hash."""
        if not self.arguments.whole or not self.shows_nll:
            self.add("whole text", "", None, "no --whole, or no SCORES_FILE")
            return
        tokens = np.array(self.real)
        k = int(self.random.uniform(0.5, 0.95) * len(tokens))
        k = self.texts.not_inside(tokens, k)
        twin = self.texts.twin(tokens, k, "plain", np.roll(tokens, len(tokens) // 2))
        base, changed = self.run_all([dict(tokens=tokens), dict(tokens=twin)])
        self.judge_twins("whole text", base, [k], [changed])

    def twin_faults(self, base, places, outcomes):
        """{label: sentences on twins of the run `base` whose scores up to their k differ}."""
        faults = {}
        for label, nll in base.nll.items():
            faults[label] = []
            for k, outcome in zip(places, outcomes):
                twin = outcome.nll.get(label, ())
                if len(twin) == len(nll):
                    gap = np.abs(twin[:k].astype(float) - nll[:k])
                    wrong = np.flatnonzero(~(gap <= 8 * self.noise.get(label, 0.0)))
                    if len(wrong):
                        where = f"k={k}: {len(wrong)} targets from {wrong[0]} on"
                        faults[label].append(f"{where}, by up to {gap.max():.2g} nats")
        return faults

    def judge_twins(self, test, base, places, outcomes):
        """Add the results of twins of the run `base`, one for each score."""
        for label, faults in self.twin_faults(base, places, outcomes).items():
            missing = [x for x in outcomes if len(x.nll.get(label, ())) != len(base.nll[label])]
            if missing:
                self.crashed = True
                detail = f"{len(missing)} twins have no such score (exit code {missing[0].code}): "
                self.add(test, label, None, detail + missing[0].last_words())
            detail = (
                f"{len(places)} places k from {min(places)} to {max(places)}: all scores up to k "
                f"are the same{', but for the noise' if self.noise.get(label) else ''}"
            )
            self.add(test, label, not faults, "; ".join(faults[:3]) or detail)

    # ---- training ----

    def training_twin(self):
        """Ten steps leave the same artifact beside two validation shards."""
        if self.arguments.skip_training:
            self.add("training twin", "", None, "--skip-training")
            return
        train = self.training_text
        size = 4 * self.hints.eval_seq_len + 1
        # The training text, and pieces that are rare in it: a choice by validation loss (of a step,
        # a rate, a scale) would be the same on two texts of ordinary pieces.
        plain = self.tokenizer.plain
        counts = np.bincount(train, minlength=self.tokenizer.size)
        rarest = plain[np.argsort(counts[plain])][: 1 + len(plain) // 8]
        texts = np.resize(train, size).astype(int), self.random.choice(rarest, size)
        jobs = [dict(tokens=val, train=train, scores_file=False) for val in texts]
        first, second = self.run_all(jobs)
        if not first.artifacts or not second.artifacts:
            detail = f"{TRAINING_STEPS} steps left no artifact (exit code {first.code}): "
            self.add("training twin", "", None, detail + first.last_words())
            return
        same = first.artifacts == second.artifacts
        found = "the same artifact" if same else "different artifacts"
        detail = f"{TRAINING_STEPS} steps beside two validation shards leave {found}"
        self.add("training twin", "", same, detail)


# --------------------------------------------------------------------------------------------------
# Command line and report
# --------------------------------------------------------------------------------------------------
def one_file(folder, pattern, named, kind):
    """The file that was named, else the only one like `pattern` in the folder; None without any."""
    if named:
        if not Path(named).is_file():
            raise UntestableError(f"{named}: no such file: name the {kind}")
        return Path(named).resolve()
    found = sorted(Path(folder).glob(pattern))
    if len(found) > 1:
        raise UntestableError(
            f"{folder} holds {len(found)} files {pattern}: say which one is the {kind}"
        )
    return found[0].resolve() if found else None


def parse(arguments):
    """The command line as a namespace."""
    # On a GPU runs would wait for each other.
    jobs = 1 if on_gpu() else min(4, os.cpu_count() or 1)
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folder", help="the submission: script, artifact (*.ptz), tokenizer (*.model)")
    add("--data", required=True, help="directory of fineweb_val_*.bin: what ordinary text is like")
    add("--train-data", default="", help="directory of fineweb_train_*.bin for the training twin")
    add("--script", default="", help="default: train_gpt.py in the folder")
    add("--artifact", default="", help="default: the *.ptz in the folder")
    add("--tokenizer", default="", help="default: the *.model in the folder")
    add("--seed", type=int, help="of texts and places; default: drawn, and reported")
    add("--minutes", type=float, default=2.5, help="time to spend: longer texts and more twins")
    add("--tokens", type=int, default=0, help="targets of the texts; default: what time allows")
    add("--twins", type=int, default=48, help="at most so many twins")
    add("--whole", action="store_true", help="also twins of the whole given text")
    add("--q", choices=("auto", "model", "ngram"), default="auto", help="source of the bet's text")
    add("--ranks", type=int, default=1, help="processes of each run, by torchrun")
    add("--jobs", type=int, default=jobs, help="runs at the same time")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of every run")
    add("--seconds-per-run", type=float, default=3600.0, help="time limit of a run")
    add("--skip-training", action="store_true", help="no training twin")
    add("--stop", action="store_true", help="end at the first test that fails")
    add("--json", default="", help="write the report here")
    return parser.parse_args(arguments)


def prepare(arguments, root):
    """The Verifier that the command line asks for. Raises UntestableError."""
    if not all("=" in pair for pair in arguments.set):
        raise UntestableError(f"--set {arguments.set}: expected NAME=VALUE")
    folder = arguments.folder
    script = one_file(folder, "train_gpt.py", arguments.script, "script")
    artifact = one_file(folder, "*.ptz", arguments.artifact, "artifact")
    tokenizer_path = one_file(folder, "*.model", arguments.tokenizer, "tokenizer")
    if not script or not tokenizer_path:
        raise UntestableError(
            f"{folder}: no script or no tokenizer in it: name them by --script and --tokenizer"
        )
    tokenizer = Tokenizer(tokenizer_path)
    real = np.concatenate([read_shard(path) for path in find_shards(arguments.data, "val")])
    if len(real) < FIRST_RUN_TOKENS or real.max() >= tokenizer.size:
        raise UntestableError(
            f"{arguments.data}: expected at least {FIRST_RUN_TOKENS} tokens below "
            f"{tokenizer.size}: name the shards that belong to the tokenizer"
        )
    settings = dict(pair.split("=", 1) for pair in arguments.set)
    sandbox = Sandbox(settings, root)
    candidate = Candidate(
        sandbox, script, artifact, tokenizer_path, arguments.ranks, arguments.seconds_per_run
    )
    return Verifier(candidate, tokenizer, real, arguments)


def report(verifier, code, seconds):
    """Print the verdict; write the JSON report if it was asked for."""
    arguments = verifier.arguments
    results = verifier.results
    runs = verifier.candidate.runs
    network = not verifier.candidate.sandbox.wrapper
    not_run = sorted({result["test"] for result in results if result["status"] == STATUS[None]})
    chance = sum(result["error_probability"] for result in results)
    isolation = "WITH network, since unshare -rn is not permitted here" if network else "no network"
    print(f"isolation: own directory, bare environment, {isolation}")
    print(f"not run: {', '.join(not_run) or 'nothing'}")
    print(
        f"verdict: {VERDICTS[code]} (exit code {code}); a legal script fails with probability "
        f"{chance:.0e} at most; {runs} runs, {seconds:.0f} s, seed {arguments.seed}"
    )
    if arguments.json:
        value = dict(
            verdict=VERDICTS[code],
            exit_code=code,
            seed=arguments.seed,
            seconds=seconds,
            runs=runs,
            network=network,
            not_run=not_run,
            error_probability=chance,
            results=results,
        )
        Path(arguments.json).write_text(json.dumps(value, indent=1) + "\n")


def main(arguments=None):
    """Verify one folder; returns the exit code."""
    arguments = parse(arguments)
    if arguments.seed is None:
        arguments.seed = int.from_bytes(os.urandom(4), "little")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verify_", ignore_cleanup_errors=True) as root:
        verifier = None
        try:
            verifier = prepare(arguments, root)
            code = verifier.verify()
        except UntestableError as error:
            print(f"error: {error}", file=sys.stderr)
            code = UNTESTED
            if verifier and verifier.illegal():
                code = ILLEGAL
        if verifier:
            if isinstance(verifier.source, ModelSource):
                verifier.source.close()
            report(verifier, code, time.monotonic() - begin)
    return code


if __name__ == "__main__":
    sys.exit(main())
