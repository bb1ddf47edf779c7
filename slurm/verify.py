"""Judge a submission folder from outside: run its own scoring on texts that this program wrote.

    python slurm/verify.py FOLDER --data DIR                # DIR holds fineweb_val_*.bin
    python slurm/verify.py FOLDER --data DIR --seed 7 --minutes 30 --ranks 2 --json report.json
    python slurm/verify.py FOLDER --data DIR --q ngram --set DEVICE=cpu --whole

The folder holds a script, an artifact (*.ptz) and a tokenizer (*.model). Nothing that the script
says is believed unless it can be computed again. The challenge's four conditions (issue #1017) are
judged for every score that it prints: C1 no score depends on later tokens, C2 scores come from one
normalised distribution, C3 nothing learns from a token before its score is final, C4 every token
is scored once.

* Repeat. The same text twice gives the same digits; on a GPU all but the noise of its kernels. The
  first run shows its scores, audits itself and checks every round (AUDIT=1, SPOT_CHECKS=1); the
  second is the published command, with no variable that tells that it is watched. That its own
  checks pass is not believed; a script that calls a score illegal, by exit code 6 or by word, is.
  No run may change the artifact that it was given.
* Bet (C1 to C4 at once). Tokens are drawn from a distribution q that only this program knows. If
  the script's p is a legal prediction, then p(x)/q(x) is at most 1 on average, at each token and
  whatever came before it. So a gambler who stakes a share of his money on p/q, token after token,
  multiplies it by e^c with probability e^-c at most (Ville's inequality). How much he stakes, and
  where, may depend on the past alone.
* Twins (C1, C3). Two shards are equal up to k and differ after it, on disk. All scores up to k must
  be equal, bit for bit.
* Recount (C4, bytes). Targets, nats and UTF-8 bytes, counted here, must give the printed digits, in
  every line that names a score.
* Model alone (C1). The script's GPT, imported, must give the same logits at a place whatever
  follows it, in whole windows and where only the last positions are asked for: what leaks from the
  target itself changes no score before it.
* Training twin. Ten steps beside two validation shards must give the same artifact: one is the
  training text, the other unlike any, so that a choice by validation loss falls differently.

SCORES_FILE=path/{label}.f32 asks the script for the nll of every target. A script that does not
know this variable gets the tests that need printed lines only, and the report names the others.
Exit code: 0 nothing illegal was found, 6 illegal, 2 could not be tested.

What no test from outside can show: a script that behaves well on texts of --tokens targets and
otherwise on the official split, which it may know by size or hash (--whole looks at a text of full
length), or on more ranks than --ranks; the better of two legal evaluations of the whole text (it
gains ln 2 nats at most, and changes with the text only where the order of the two does); a choice
by validation text in training that begins after the ten steps of the training twin.
"""

import argparse
import contextlib
import hashlib
import itertools
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

BOS = 1  # every document of the official shards starts with this token
THRESHOLD = 14.0  # nats; a legal script wins as much with probability e^-14 = 8e-7

# Exit codes.
LEGAL = 0
UNTESTED = 2
ILLEGAL = 6

# What a test says.
PASS = "pass"
FAIL = "FAIL"
SKIPPED = "not run"


class UntestableError(Exception):
    """What keeps the folder from being tested; the message says what to change."""


class ConfessedError(Exception):
    """The script's own checks found it illegal and ended it: there is no score to test."""


def printable(text, limit=400):
    """Text of a stranger, safe for a terminal: one line, no escape sequences, bounded."""
    shown = []
    for character in text[:limit]:
        if character.isascii() and character.isprintable():
            shown.append(character)
        else:
            shown.append(ascii(character)[1:-1])
    return "".join(shown)


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
    paths = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UntestableError(
            f"{folder}: no fineweb_{split}_*.bin in it: name the directory of the shards"
        )
    return paths


class Tokenizer:
    """Kinds of pieces, each an array (V,), and the bytes that tokens really stand for."""

    def __init__(self, path):
        self.path = path
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            reason = printable(str(error))
            raise UntestableError(f"{path}: not a SentencePiece model: {reason}") from None
        model = self.model
        self.size = model.vocab_size()
        self.silent = np.zeros(self.size, bool)  # control, unknown and unused pieces: no bytes
        self.spaced = np.zeros(self.size, bool)  # begins with a space
        self.digit = np.zeros(self.size, bool)
        self.byte = np.full(self.size, -1)  # 0xE2 for the piece <0xE2>, -1 for all other pieces
        for i in range(self.size):
            # SentencePiece writes a space as "▁".
            piece = model.id_to_piece(i)
            self.silent[i] = model.is_control(i) or model.is_unknown(i) or model.is_unused(i)
            self.spaced[i] = piece.startswith("▁")
            self.digit[i] = piece.strip("▁").isdigit()
            if model.is_byte(i):
                self.byte[i] = int(piece[3:5], 16)
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
class Utf8Rule:
    """Which byte pieces may follow which: loaders refuse text that is not valid UTF-8."""

    # State -> (first byte, last byte, state after) of what may come next; RFC 3629, section 4.
    FOLLOW = {
        0: [
            (0x00, 0x7F, 0),
            (0xC2, 0xDF, 1),
            (0xE0, 0xE0, 4),  # shorter forms of the same character are not allowed
            (0xE1, 0xEC, 2),
            (0xED, 0xED, 5),  # halves of UTF-16 pairs are not allowed
            (0xEE, 0xEF, 2),
            (0xF0, 0xF0, 6),
            (0xF1, 0xF3, 3),
            (0xF4, 0xF4, 7),  # Unicode ends at 0x10FFFF
        ],
        1: [(0x80, 0xBF, 0)],
        2: [(0x80, 0xBF, 1)],
        3: [(0x80, 0xBF, 2)],
        4: [(0xA0, 0xBF, 1)],
        5: [(0x80, 0x9F, 1)],
        6: [(0x90, 0xBF, 2)],
        7: [(0x80, 0x8F, 2)],
    }
    LONGEST = 4  # bytes of a character

    def __init__(self, tokenizer):
        byte = tokenizer.byte
        shape = len(self.FOLLOW), len(byte)
        self.allowed = np.zeros(shape, bool)
        self.after = np.zeros(shape, np.int8)
        self.allowed[0] = byte < 0
        for state, ranges in self.FOLLOW.items():
            for first, last, after in ranges:
                inside = (byte >= first) & (byte <= last)
                self.allowed[state] |= inside
                self.after[state, inside] = after
        # Near the end of a text no character may begin, or it would stay unfinished.
        self.ending = self.allowed[0] & (self.after[0] == 0)

    def states(self, tokens):
        """The state after each token (n,): 0 between two characters."""
        out = np.zeros(len(tokens), np.int8)
        state = 0
        for place, token in enumerate(tokens):
            state = self.after[state, token]
            out[place] = state
        return out


class NgramSource:
    """A trigram model of the given text, each order smoothed with the shorter one (Witten & Bell
    1991, "The zero-frequency problem"). It knows nothing of the script, and sees what is gross.
    """

    name = "a trigram model"
    context = 2  # tokens that it looks back
    SPREAD = 2.0  # above 1: flatter than the text, as the script's prediction of drawn text is

    def __init__(self, tokens, vocab):
        tokens = [int(token) for token in tokens]
        counts = np.bincount(tokens, minlength=vocab) + 0.5  # no piece is impossible
        self.unigram = counts / counts.sum()
        self.tables = {length: self.count(tokens, length) for length in (1, 2)}

    @staticmethod
    def count(tokens, length):
        """{the last `length` tokens: (ids that came next, how often)}"""
        counts = {}
        for place in range(length, len(tokens)):
            past = tuple(tokens[place - length : place])
            after = counts.setdefault(past, {})
            after[tokens[place]] = after.get(tokens[place], 0) + 1
        table = {}
        for past, after in counts.items():
            table[past] = np.fromiter(after, int), np.fromiter(after.values(), float)
        return table

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        return np.stack([self.row(past.tolist()) for past in contexts])

    def row(self, past):
        """Probabilities (V,) after the tokens `past`."""
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
        return p

    def close(self):
        """Nothing to end."""


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
    unpacked = candidate.unpack_artifact(file.read())
model = candidate.GPT(unpacked[0]).eval()
model.load_state_dict(unpacked[1])
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)
while head := sys.stdin.buffer.read(16):
    rows, length, place, last = struct.unpack("<iiii", head)
    ids = np.frombuffer(sys.stdin.buffer.read(4 * rows * length), "<i4").reshape(rows, length)
    ids = torch.from_numpy(ids.astype(np.int64)).to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        if last:  # as a sliding window asks for the states of its last positions only
            hidden = model.hidden(ids, last)[:, place - length]
        else:
            hidden = model.hidden(ids)[:, place]
        logits = model.logits(hidden)
    answer.write(logits.float().cpu().numpy().astype("<f4").tobytes())
    answer.flush()
"""


class ModelSource:
    """The artifact's own model, fed only the past, by importing the script in a child process.

    The child may be hostile: it answers with logits and never learns what is drawn from them, so
    the worst it can do is to blunt the bet.
    """

    name = "the artifact's own model"
    PATIENCE = 300.0  # seconds for one answer

    def __init__(self, sandbox, script, artifact, vocab, context):
        self.sandbox = sandbox
        self.vocab = vocab
        self.context = context
        command = [sys.executable, "-c", ORACLE, str(script), str(artifact)]
        self.child = sandbox.start(
            command,
            sandbox.folder(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def predict(self, contexts):
        """Probabilities (B, V) of the token after each row of contexts (B, T)."""
        contexts = contexts[:, -self.context :]
        logits = self.logits(contexts, contexts.shape[1] - 1).astype(float)
        # Whatever comes is made a distribution.
        logits = np.clip(np.nan_to_num(logits), -100, 100)
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def logits(self, ids, place, last=0):
        """The model's logits (B, V) at one place of the windows ids (B, T).

        With `last` only the states of so many last positions are asked for.
        """
        ids = np.ascontiguousarray(ids, "<i4")
        head = np.array([*ids.shape, place, last], "<i4")
        try:
            self.child.stdin.write(head.tobytes() + ids.tobytes())
            self.child.stdin.flush()
            answer = self.read(4 * len(ids) * self.vocab)
        except OSError:
            raise UntestableError("--q model: the script's GPT cannot be run by import") from None
        return np.frombuffer(answer, "<f4").reshape(len(ids), self.vocab)

    def read(self, size):
        """`size` bytes of the child's answer. Raises OSError if it ends or stays silent."""
        pipe = self.child.stdout.fileno()
        answer = b""
        while len(answer) < size:
            ready, _, _ = select.select([pipe], [], [], self.PATIENCE)
            if not ready:
                raise OSError("silent")
            part = os.read(pipe, size - len(answer))
            if not part:
                raise OSError("ended")
            answer += part
        return answer

    def close(self):
        self.sandbox.end(self.child)


class Text(NamedTuple):
    """Tokens (n,) and the ln q (n,) with which each was drawn; NaN where it was not drawn."""

    tokens: np.ndarray
    log_q: np.ndarray


class Sampler:
    """Draws texts in which what is rare, and dear to cheaters, occurs often enough."""

    # Share of the draws that each kind of piece gets, whatever the source says.
    BOS_SHARE = 0.004
    BYTE_SHARE = 0.004
    SILENT_SHARE = 0.0015
    DIGIT_SHARE = 0.003
    ANY_SHARE = 0.006
    AGAIN_SHARE = 0.002  # the token before once more
    # After a silent piece: a space there has no byte, and is rare at the start of a text.
    SPACE_SHARE = 0.3

    def __init__(self, tokenizer):
        self.utf8 = Utf8Rule(tokenizer)
        self.silent = tokenizer.silent
        special = np.zeros(tokenizer.size)
        for share, kind in (
            (self.BOS_SHARE, np.arange(tokenizer.size) == BOS),
            (self.BYTE_SHARE, tokenizer.byte >= 0x80),
            (self.SILENT_SHARE, tokenizer.silent),
            (self.DIGIT_SHARE, tokenizer.digit),
            (self.ANY_SHARE, np.ones(tokenizer.size, bool)),
        ):
            special += share * kind / max(1, kind.sum())
        spaces = self.SPACE_SHARE * tokenizer.spaced / max(1, tokenizer.spaced.sum())
        self.special = np.stack([special, special + spaces])  # (2, V): after text, after silence

    def probabilities(self, source, contexts, states, room):
        """q (B, V) after contexts (B, T): the source's and the specials', as UTF-8 allows.

        `states` (B,) are those of Utf8Rule, `room` is the number of tokens up to the end.
        """
        allowed = self.utf8.allowed[states]
        if room <= self.utf8.LONGEST:
            allowed = np.where(states[:, None] == 0, self.utf8.ending, allowed)
        special = self.special[self.silent[contexts[:, -1]].astype(int)]  # (B, V)
        special[np.arange(len(contexts)), contexts[:, -1]] += self.AGAIN_SHARE
        q = (1 - special.sum(1, keepdims=True)) * source.predict(contexts) + special
        q = (q + 1e-9) * allowed  # the source may give no mass to what must come next
        return q / q.sum(1, keepdims=True)

    def draw(self, source, given, steps, random):
        """Tokens (B, steps) that continue `given` (B, T), and their ln q (B, steps)."""
        rows, start = given.shape
        tokens = np.concatenate([given, np.zeros((rows, steps), int)], 1)
        log_q = np.zeros((rows, steps))
        states = np.zeros(rows, int)
        each = np.arange(rows)
        for step in range(steps):
            at = start + step
            contexts = tokens[:, max(0, at - source.context) : at]
            q = self.probabilities(source, contexts, states, steps - step)
            total = q.cumsum(1)
            point = random.random((rows, 1)) * total[:, -1:]
            chosen = (total <= point).sum(1)
            tokens[:, at] = chosen
            log_q[:, step] = np.log(q[each, chosen])
            states = self.utf8.after[states, chosen]
        return tokens[:, start:], log_q


class Writer:
    """Writes the texts of one verification, from the user's text and what is drawn."""

    FITTED_TOKENS = 200_000  # of the user's text: enough for trigrams, and read in a second
    STREAM_TOKENS = 320  # of a drawn text: streams are drawn side by side
    OPENINGS = ("plain", "bos", "bytes", "digit", "rare")  # how the other part of a twin begins

    def __init__(self, tokenizer, real, seed):
        self.tokenizer = tokenizer
        self.real = np.array(real[: self.FITTED_TOKENS])
        self.random = np.random.default_rng(seed)
        self.sampler = Sampler(tokenizer)
        self.states = self.sampler.utf8.states(self.real)
        self.ngrams = NgramSource(self.real, tokenizer.size)

    def streams(self, size):
        return max(8, size // self.STREAM_TOKENS)

    def real_pieces(self, rows, length, from_start=False):
        """Pieces (rows, length) of real text that begin and end between two characters.

        With `from_start` the first one is the beginning of the text.
        """
        # A piece begins at the token after one that ends a character.
        last = np.arange(len(self.real) - length)
        whole = (self.states[last] == 0) & (self.states[last + length] == 0)
        starts = self.random.choice(last[whole], rows) + 1
        pieces = np.stack([self.real[at : at + length] for at in starts]).astype(int)
        if from_start:
            pieces[0] = self.real[:length]
            # It ends between two characters too.
            end = 1 + np.flatnonzero(self.states[:length] == 0)[-1]
            pieces[0, end:] = self.tokenizer.plain[0]
        return pieces

    def text(self, source, size, streams, steps=None):
        """A Text of `size` tokens: pieces of real text, each continued by what `source` draws.

        `steps` tokens are drawn for each, at most as many as its share of the text leaves beside
        the context.
        """
        share = -(-size // streams)  # rounded up
        room = share - min(source.context, share // 2)
        steps = min(steps or room, room)
        # A script may know the text by how it begins.
        given = self.real_pieces(streams, share - steps, from_start=True)
        return self.continued(source, given, steps, size)

    def drawn_text(self, source, size):
        """A Text that is drawn from its second token on, as the bet on a printed sum needs."""
        return self.continued(source, np.full((1, 1), BOS), size - 1, size)

    def continued(self, source, given, steps, size):
        """The Text of rows `given` (B, T), each followed by `steps` drawn tokens."""
        tokens, log_q = self.sampler.draw(source, given, steps, self.random)
        unknown = np.full(given.shape, np.nan)
        tokens = np.concatenate([given, tokens], 1).reshape(-1)
        log_q = np.concatenate([unknown, log_q], 1).reshape(-1)
        return Text(tokens[:size], log_q[:size])

    def ordinary(self, size):
        """Tokens (size,) like those of the exam, by the n-gram model: these are drawn quickly."""
        return self.text(self.ngrams, size, self.streams(size)).tokens

    def opening(self, kind, unlike):
        """The first tokens of a twin's other part, of some kind and not beginning with `unlike`."""
        tokenizer = self.tokenizer
        if kind == "bytes":
            pieces = [np.flatnonzero(tokenizer.byte == byte)[:1] for byte in "é".encode()]
            whole = np.concatenate(pieces).tolist()
            if len(whole) == len(pieces) and whole[0] != unlike:
                return whole
        choices = tokenizer.plain
        if kind == "bos":
            choices = np.array([BOS])
        elif kind == "digit":
            choices = np.flatnonzero(tokenizer.digit)
        elif kind == "rare":
            rare = np.argsort(self.ngrams.unigram)[:50]
            choices = rare[tokenizer.byte[rare] < 0]
        choices = choices[choices != unlike]
        if len(choices) == 0:
            choices = tokenizer.plain[tokenizer.plain != unlike]
        return [int(self.random.choice(choices))]

    def twin(self, tokens, k, kind):
        """`tokens` up to and with token k, then others: the first k targets are the same."""
        head = self.opening(kind, tokens[k + 1])
        other = self.ordinary(len(tokens))
        states = self.sampler.utf8.states(other)
        entry = k + 1 + len(head)
        # The other text may be entered only between two characters.
        while entry < len(other) and states[entry - 1]:
            head.append(int(self.random.choice(self.tokenizer.plain)))
            entry += 1
        twin = np.concatenate([tokens[: k + 1], head, other[entry:]])
        return twin[: len(tokens)].astype(int)

    def twin_places(self, tokens, count, size, hints):
        """`count` numbers k of shared targets: spread over the text at random, some at edges."""
        states = self.sampler.utf8.states(tokens)
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
            k = min(max(k, 1), size - 1)
            while states[k]:  # not inside a character
                k -= 1
            places.append(k)
        # In random order: a search that ends early was everywhere.
        return self.random.permutation(places).tolist()


# --------------------------------------------------------------------------------------------------
# Child processes
# Each has a directory, a time limit and a memory limit of its own, an environment made from
# nothing, and no network where the system lets an ordinary user take it away.
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
LARGEST_FILE = 8 << 30  # bytes that a child may write into one file


class Sandbox:
    """Starts and ends child processes below the directory `root`."""

    def __init__(self, settings, memory_gb, root):
        self.settings = settings  # the user's, for every child
        self.memory_gb = memory_gb
        self.root = root
        self.wrapper = []
        no_network = ["unshare", "-rn", sys.executable, "-I", "-c", NO_NETWORK]
        with contextlib.suppress(OSError):  # no such program
            if subprocess.run([*no_network, "true"], capture_output=True).returncode == 0:
                self.wrapper = no_network

    def limit(self):
        """Runs in the child, before the program."""
        if self.memory_gb:
            size = int(self.memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))

    def folder(self):
        return Path(tempfile.mkdtemp(dir=self.root))

    def environment(self, folder, settings):
        """All that a child gets to know; its directory is its home."""
        environ = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environ.update(HOME=str(folder), TMPDIR=str(folder), LANG="C.UTF-8")
        # One thread: children run side by side, and the same number gives the same bits.
        environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        # What the script itself printed as a setting must not take the place of these.
        return {**settings, **environ, **self.settings}

    def start(self, command, folder, settings=(), **pipes):
        """A child process that runs `command` in `folder`; pipes as for Popen."""
        return subprocess.Popen(
            [*self.wrapper, *command],
            cwd=folder,
            env=self.environment(folder, dict(settings)),
            preexec_fn=self.limit,
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


class Printed(NamedTuple):
    """One score as printed, and whether its line says that it is illegal."""

    val_loss: float
    val_bpb: float
    declared_illegal: bool


class Outcome(NamedTuple):
    """What one run of the script left."""

    code: int  # exit code, negative for a signal
    seconds: float
    output: str  # the end of it
    printed: dict  # label -> Printed
    repeated: list  # labels that were printed twice
    nll: dict  # label -> nll by target (n,) float32, as SCORES_FILE shows it
    artifacts: dict  # file name -> SHA-256 of what training left
    given_changed: bool  # whether the artifact that was given to score is another one afterwards

    def last_words(self):
        return printable(" ".join(self.output.split()[-40:]))


EXACT_LINE = re.compile(
    r"^([\w.+-]{1,80})_exact val_loss:([\d.]{1,40}) val_bpb:([\d.]{1,40})(.{0,200})$",
    re.ASCII | re.MULTILINE,
)
OUTPUT_LIMIT = 4 << 20  # bytes of a child's output that are looked at, from its end
FILES_LIMIT = 100  # files of one kind that are looked at
ARTIFACT_LIMIT = 256 << 20  # bytes


def read_end(file):
    """The end of what was written to an open file, as text."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OUTPUT_LIMIT))
    return file.read(OUTPUT_LIMIT).decode("utf-8", "replace").replace("\r", "\n")


def ordinary_files(folder, pattern):
    """Some files below a folder that are neither links nor pipes, and not among the data."""
    found = []
    for path in itertools.islice(Path(folder).rglob(pattern), FILES_LIMIT):
        if path.is_file() and not path.is_symlink() and "data" not in path.parts:
            found.append(path)
    return sorted(found)


def sha256_of(path):
    """Hexadecimal SHA-256 of an artifact as far as ARTIFACT_LIMIT; "" where no ordinary file is."""
    if not path.is_file() or path.is_symlink():
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(ARTIFACT_LIMIT)).hexdigest()


def parse_output(output):
    """({label: Printed}, labels printed twice) of the lines with all digits."""
    printed = {}
    repeated = []
    for label, val_loss, val_bpb, rest in EXACT_LINE.findall(output):
        if label in printed:
            repeated.append(label)
        with contextlib.suppress(ValueError):  # such as 1.2.3
            printed[label] = Printed(float(val_loss), float(val_bpb), "illegal" in rest)
    return printed, repeated


# Where the challenge's scripts look for shards: a script may behave otherwise anywhere else.
OFFICIAL_DATA = "data/datasets/fineweb10B_sp1024"


# A count of what is done so far marks a line of progress, whose digits are not final.
PROGRESS = re.compile(r"\d\s*/\s*\d|\d\s*%|progress|running", re.IGNORECASE)
DIGITS = re.compile(r"\bval_(loss|bpb):(\d+)(?:\.(\d{1,12}))?(?!\S)", re.ASCII)


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


class Candidate:
    """The folder under test: runs its script in a fresh copy of it, on shards that are given."""

    def __init__(self, sandbox, script, artifact, tokenizer, ranks, seconds):
        self.sandbox = sandbox
        self.script = script
        self.artifact = artifact  # None: it can only train
        # A link of the reviewer's is followed, one that a run leaves is not.
        self.artifact_sha256 = "" if artifact is None else sha256_of(artifact.resolve())
        self.tokenizer = tokenizer
        self.ranks = ranks
        self.seconds = seconds  # that a run may take
        self.runs = 0

    def command(self):
        if self.ranks == 1:
            return [sys.executable, self.script.name]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc_per_node={self.ranks}", self.script.name]

    def run(self, val, train=None, scores_file=True, settings=()):
        """Score a validation shard, or with training tokens train and score; returns an Outcome."""
        folder = self.sandbox.folder()
        data = folder / OFFICIAL_DATA
        data.mkdir(parents=True)
        (folder / "scores").mkdir()
        shutil.copy(self.script, folder)
        shutil.copy(self.tokenizer, folder)
        write_shard(data / "fineweb_val_000000.bin", val)
        environ = dict(settings)
        environ.update(DATA_PATH=f"./{OFFICIAL_DATA}", TOKENIZER_PATH=self.tokenizer.name)
        if train is None:
            shutil.copy(self.artifact, folder)
            environ["EVAL_ONLY"] = self.artifact.name
        else:
            write_shard(data / "fineweb_train_000000.bin", train)
        if scores_file:
            environ["SCORES_FILE"] = "scores/{label}.f32"
        try:
            return self.outcome(folder, environ, len(val))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def outcome(self, folder, environ, size):
        """Run the command in `folder` to its end or its time limit, and look at what it left."""
        begin = time.monotonic()
        with open(folder / "output", "w+b") as output:
            child = self.sandbox.start(
                self.command(),
                folder,
                environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = child.wait(self.seconds)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            finally:
                self.sandbox.end(child)
            # By the open file: the child may have put something else in its place.
            text = read_end(output)
        seconds = time.monotonic() - begin
        self.runs += 1
        nll = {}
        for path in ordinary_files(folder / "scores", "*.f32"):
            # One value more than there can be shows a file that is too long.
            nll[path.stem] = np.fromfile(path, "<f4", size)
        artifacts = {}
        for path in ordinary_files(folder, "*.ptz") or ordinary_files(folder, "*.pt"):
            artifacts[path.name] = sha256_of(path)
        given = environ.get("EVAL_ONLY")
        changed = given is not None and sha256_of(folder / given) != self.artifact_sha256
        return Outcome(code, seconds, text, *parse_output(text), nll, artifacts, changed)


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
    """What the script's own configuration lines say. Wrong hints only blunt the tests."""

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
# Validation text inside training text
# --------------------------------------------------------------------------------------------------
BLOCK = 32  # tokens: long enough not to meet by chance
MOST_SHARED = 0.1  # web pages repeat each other; a shard that was copied shares nearly all


def block_hashes(tokens, step):
    """uint64 polynomial hashes of the blocks of BLOCK tokens at every `step`-th place."""
    starts = np.arange(0, len(tokens) - BLOCK + 1, step)
    out = np.zeros(len(starts), np.uint64)
    for offset in range(BLOCK):
        out *= np.uint64(0x9E3779B97F4A7C15)  # odd, so that nothing is lost modulo 2^64
        out += tokens[starts + offset].astype(np.uint64)
    return out


def shared_blocks(val, train_paths, piece=1 << 22):
    """Share of val's blocks, side by side, that stand at any place of the training shards."""
    blocks = np.unique(block_hashes(val, BLOCK))
    seen = np.zeros(len(blocks), bool)
    for path in train_paths:
        tokens = read_shard(path)
        for at in range(0, len(tokens), piece):
            # Pieces overlap, so that no block is cut in two.
            part = np.array(tokens[at : at + piece + BLOCK - 1])
            if len(part) >= BLOCK:
                seen |= np.isin(blocks, block_hashes(part, 1))
    return float(seen.mean())


# --------------------------------------------------------------------------------------------------
# The tests
# Each adds lines to the report. A test that needs what the script does not show says so.
# --------------------------------------------------------------------------------------------------
class Result(NamedTuple):
    """One line of the report."""

    test: str
    label: str  # of the score, if it is about one
    status: str
    detail: str
    error_probability: float  # that a legal script fails this test
    seconds: float


HINT_LINE = re.compile(r"^config:([a-z0-9_]{1,40})=(\S{1,200})", re.ASCII | re.MULTILINE)
TIME_LINE = re.compile(r" eval_time:(\d{1,9})ms", re.ASCII)
# Settings of place and pace, for which the verifier has its own, and what is no setting at all.
NOT_REPEATED = {
    "preset",
    "data_path",
    "tokenizer_path",
    "run_id",
    "run_dir",
    "resume",
    "eval_only",
    "mode",
    "audit",
    "scores_file",
    "time_limit_seconds",
}
NOT_SETTINGS = ("ld_", "python", "path", "home", "bash", "omp_")

FIRST_RUN_TOKENS = 4113
EXAM_TARGETS = 20_480
EXAM_CHUNKS = 2.5  # of test-time training: some chunks and a part of one
MODEL_CONTEXT = 64  # tokens; longer is dearer and hardly sharper
MODEL_PLACES = 25
TRAINING_STEPS = 10
TRAINING_SEQS = 8  # per step
TRAINING_TOKENS = 32_768
LAST_DIGIT = 1.5e-8  # what two ways to round to eight decimals, and float32 values, may differ by


# Settings of the script's own checks, which take time. ALL_CHECKS: it audits itself and repeats
# every round; that it passes is not believed, that it does not is, see Verifier.heed().
# AS_PUBLISHED sets nothing: no variable tells the script that it is watched.
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
        self.writer = Writer(tokenizer, real, arguments.seed)
        self.results = []
        self.crashed = False  # some run showed nothing: then nothing is legal
        self.confessed = set()  # labels that the script itself calls illegal, "" for all
        # Known after the first run.
        self.trains = candidate.artifact is None  # it has to train before it scores
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

    def verify(self):
        """Run the tests, the cheapest first; returns the exit code. Raises UntestableError."""
        self.first_run()
        self.draw_exam()
        try:
            self.take_exam()
        except ConfessedError:
            return ILLEGAL
        tests = [
            self.recount,
            self.bet,
            self.model_alone,
            self.overlap,
            self.training_twin,
            self.twins,
            self.whole_text,
        ]
        for test in tests:
            if self.arguments.stop and self.illegal():
                break
            test()
        if self.illegal():
            return ILLEGAL
        return UNTESTED if self.crashed else LEGAL

    def illegal(self):
        return any(result.status == FAIL for result in self.results)

    def left(self):
        """Seconds left of the time that the user gave."""
        return 60 * self.arguments.minutes - (time.monotonic() - self.started)

    def add(self, test, label, passed, detail, begin, error_probability=0.0):
        """Note and print a result. passed: True, False, or None for a test that was not run."""
        status = {True: PASS, False: FAIL, None: SKIPPED}[passed]
        seconds = time.monotonic() - begin
        self.results.append(Result(test, label, status, detail, error_probability, seconds))
        print(f"{status:8}{test:14}{printable(label):28}{printable(detail)}", flush=True)

    # -- runs --------------------------------------------------------------------------------------
    def run(self, tokens, scores_file=True, train=None, checks=NO_CHECKS):
        """Outcome of the script on a validation shard; one that cannot score only, trains first.

        `checks` are the settings of its own checks.
        """
        settings = dict(checks)
        if self.trains and train is None:
            train = self.training_text()
        if train is not None:
            settings.update(self.training_settings())
        return self.candidate.run(tokens, train, scores_file, settings)

    def run_all(self, jobs):
        """Outcomes of several runs, some at the same time. jobs: keyword arguments of run()."""
        begin = time.monotonic()
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            outcomes = list(pool.map(lambda job: self.run(**job), jobs))
        for outcome in outcomes:
            self.heed(outcome, begin)
        return outcomes

    def first_run(self):
        """Find out how the script is run, what it shows and how fast it is."""
        begin = time.monotonic()
        tokens = self.real[:FIRST_RUN_TOKENS].astype(int)
        outcome = self.run(tokens)
        self.heed(outcome, begin)
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
        self.read_hints(outcome.output)
        scoring = sum(int(ms) for ms in TIME_LINE.findall(outcome.output)) / 1000
        scoring = min(scoring or outcome.seconds / 2, outcome.seconds)
        # The only chunk of the first run is its last, which is not trained on: half as much again.
        self.target_seconds = 1.5 * scoring / FIRST_RUN_TOKENS
        self.start_seconds = outcome.seconds - scoring

    def heed(self, outcome, begin):
        """A script that itself finds a score illegal is believed in this."""
        verdicts = {
            label: "printed with the word illegal"
            for label, printed in outcome.printed.items()
            if printed.declared_illegal
        }
        if not self.trains and outcome.given_changed:
            verdicts["artifact"] = "a run that scores changed the artifact that it was given"
        if outcome.code == ILLEGAL:
            verdicts[""] = f"the script ends with exit code 6: {outcome.last_words()}"
        for label in verdicts.keys() - self.confessed:  # once is enough
            self.confessed.add(label)
            self.add("own verdict", label, False, verdicts[label], begin)

    def read_hints(self, output):
        """Keep what the script prints of its configuration."""
        for name, value in HINT_LINE.findall(output):
            if name not in NOT_REPEATED and not name.startswith(NOT_SETTINGS):
                self.settings[name] = value
        for name in Hints._fields:
            with contextlib.suppress(ValueError, KeyError):
                value = min(1 << 24, max(1, int(self.settings[name])))
                self.hints = self.hints._replace(**{name: value})

    def training_text(self):
        """Training tokens: the user's, or text of the n-gram model."""
        if self.arguments.train_data:
            path = find_shards(self.arguments.train_data, "train")[0]
            return np.array(read_shard(path)[:4_000_000])
        # The same in every run that has to train before it scores.
        return Writer(self.tokenizer, self.real, self.arguments.seed).ordinary(TRAINING_TOKENS)

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

    # -- the exam ----------------------------------------------------------------------------------
    def choose_size(self):
        """Targets of the exam: whole windows, some chunks and a part of one, if time allows."""
        window = self.hints.eval_seq_len
        size = self.arguments.tokens
        if not size:
            wanted = max(EXAM_TARGETS, EXAM_CHUNKS * self.hints.ttt_chunk_tokens)
            seconds = self.left() / 8 - self.start_seconds
            affordable = seconds / max(self.target_seconds, 1e-9)
            size = int(min(wanted, max(affordable, FIRST_RUN_TOKENS)))
        return (size // window + 3) * window

    def open_source(self):
        """The model's own predictions if the script can be imported, else the n-gram model's."""
        wish = self.arguments.q
        if wish == "ngram" or self.trains or not self.shows_nll:
            return self.writer.ngrams
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
            return self.writer.ngrams
        return source

    def draw_exam(self):
        """Draw the text that all runs begin like."""
        # A few tokens more than whole windows, which have to be trimmed.
        extra = int(self.writer.random.integers(1, self.hints.eval_seq_len + 1))
        size = self.choose_size() + extra
        self.source = self.open_source()
        if not self.shows_nll:
            self.text = self.writer.drawn_text(self.source, size)
        else:
            streams = self.writer.streams(size)
            steps = self.affordable_steps(streams)
            self.text = self.writer.text(self.source, size, streams, steps)

    def affordable_steps(self, streams):
        """Tokens to draw in each stream; None for as many as there is room for."""
        if not isinstance(self.source, ModelSource):
            return None
        contexts = np.resize(self.real[:FIRST_RUN_TOKENS], (streams, self.source.context))
        # The first answer warms the model up, the second tells what a step costs.
        self.source.predict(contexts)
        begin = time.monotonic()
        self.source.predict(contexts)
        seconds = time.monotonic() - begin
        return max(8, int(0.15 * self.left() / seconds))

    def take_exam(self):
        """Run the script on the exam, watched and not: the digits must be the same."""
        begin = time.monotonic()
        tokens = self.text.tokens
        # The one that is not watched is the published command, with no variable that tells.
        jobs = [
            dict(tokens=tokens, checks=ALL_CHECKS),
            dict(tokens=tokens, scores_file=False, checks=AS_PUBLISHED),
        ]
        watched, alone = self.run_all(jobs)
        self.exam = watched
        if ILLEGAL in (watched.code, alone.code):
            raise ConfessedError  # it ended before its last score
        for outcome in (watched, alone):
            if outcome.code or not outcome.printed:
                raise UntestableError(
                    f"no score on the text of the exam (exit code {outcome.code}): "
                    f"{outcome.last_words()}"
                )
        for label in sorted({**watched.printed, **alone.printed}):
            self.compare_digits(label, watched.printed.get(label), alone.printed.get(label), begin)

    def compare_digits(self, label, watched, alone, begin):
        """A script could show one thing and count another, or draw lots."""
        same = watched is not None and watched == alone
        if watched and alone and not same:
            same = self.explained_by_noise(label, watched.val_loss - alone.val_loss)
        detail = "the same digits twice"
        if self.shows_nll:
            detail = "the same digits with and without SCORES_FILE"
        if label in self.noise:
            detail += f", but for noise of {self.noise[label]:.1e} nats per target"
        self.add("repeat", label, same, detail, begin)

    def explained_by_noise(self, label, gap):
        """Whether equal runs differ, as with atomics on a GPU, and enough to explain `gap`."""
        if not on_gpu():
            return False  # one thread of a CPU gives the same bits each time
        again = self.run(self.text.tokens)
        before = self.exam.nll.get(label)
        after = again.nll.get(label)
        if before is None or after is None or len(before) != len(after):
            return False
        noise = float(np.abs(before - after).max())
        if not noise > 0:
            return False
        self.noise[label] = noise
        # Of a mean over independent targets, with room for their not being so.
        return abs(gap) <= 8 * noise / math.sqrt(len(before)) + 1e-6

    # -- C4 and bytes ------------------------------------------------------------------------------
    def recount(self):
        """What is printed follows from targets, nats and bytes counted here."""
        begin = time.monotonic()
        printed = self.exam.printed
        nll = self.exam.nll
        matched = not self.shows_nll or set(printed) == set(nll)
        detail = (
            f"{len(printed)} printed scores, {len(nll)} evaluations shown, "
            f"{len(self.exam.repeated)} labels printed twice"
        )
        self.add("recount", "", matched and not self.exam.repeated, detail, begin)
        other = other_digits(self.exam.output, printed)
        detail = "all lines that name a score say the same of it"
        self.add("recount", "other lines", not other, "; ".join(other[:3]) or detail, begin)
        for label in printed:
            if label in nll:
                self.recount_shown(label, nll[label], begin)
            else:
                self.recount_printed(label, begin)

    def recount_shown(self, label, nll, begin):
        """Every target once, nll >= 0, and the printed digits from their sum and the bytes."""
        printed = self.exam.printed[label]
        tokens = self.text.tokens
        window = self.hints.eval_seq_len
        expected = (len(tokens) - 1) // window * window  # the official script trims like this
        num_bytes = self.tokenizer.count_bytes(tokens[: expected + 1])
        nats = float(nll.sum(dtype=np.float64))
        val_loss = nats / max(1, len(nll))
        val_bpb = nats / math.log(2) / num_bytes
        faults = []
        if len(nll) != expected:
            faults.append(f"{len(nll)} targets instead of {expected}")
        if not (np.isfinite(nll) & (nll >= 0)).all():
            faults.append("some nll is negative or no number")
        if not abs(val_loss - printed.val_loss) < LAST_DIGIT:
            faults.append(f"val_loss {printed.val_loss:.8f} printed, {val_loss:.8f} shown")
        if not abs(val_bpb - printed.val_bpb) < LAST_DIGIT:
            faults.append(f"val_bpb {printed.val_bpb:.8f} printed, {val_bpb:.8f} counted")
        detail = f"{expected} targets, {num_bytes} bytes, {nats:.4f} nats: all digits"
        self.add("recount", label, not faults, "; ".join(faults) or detail, begin)

    def recount_printed(self, label, begin):
        """Without the nll: the ratio of the two digits is that of targets to bytes."""
        count = self.count_targets(label)
        detail = f"val_bpb is val_loss over the bytes of {count} targets"
        if not count:
            detail = "no number of whole windows explains val_bpb by val_loss and the bytes"
        self.add("recount", label, count > 0, detail, begin)

    def count_targets(self, label):
        """Targets that were scored: as shown, else the whole windows that explain the digits."""
        nll = self.exam.nll.get(label)
        tokens = self.text.tokens
        if nll is not None:
            return min(len(nll), len(tokens) - 1)
        printed = self.exam.printed[label]
        for window in (self.hints.eval_seq_len, 1024, 2048, 4096, 1):
            count = (len(tokens) - 1) // window * window
            num_bytes = self.tokenizer.count_bytes(tokens[: count + 1])
            expected = printed.val_loss * count / math.log(2) / max(1, num_bytes)
            if count and abs(expected - printed.val_bpb) < 2 * LAST_DIGIT:
                return count
        return 0

    # -- C1 to C4 ----------------------------------------------------------------------------------
    def bet(self):
        """No score may be better than the distribution that drew the text allows."""
        for label in self.exam.printed:
            begin = time.monotonic()
            won, where = self.winnings(label)
            if won is None:
                self.add("bet", label, None, "the number of targets is unknown", begin)
                continue
            drawn = int(np.isfinite(self.text.log_q).sum())
            detail = (
                f"{won:+.1f} nats, less than {THRESHOLD:.0f} allowed; most on {where}; "
                f"{drawn} tokens by {self.source.name}"
            )
            self.add("bet", label, won < THRESHOLD, detail, begin, math.exp(-THRESHOLD))

    def winnings(self, label):
        """(nats won against one score, where); (None, "") where nothing can be bet."""
        count = self.count_targets(label)
        log_q = self.text.log_q[1 : count + 1]  # of the targets
        nll = self.exam.nll.get(label)
        if count and nll is not None:
            return evidence(nll[:count], log_q, predictable_places(count, self.hints))
        if count and np.isfinite(log_q).all():
            # The sum alone is a bet of everything on all targets. It is known to half a unit of its
            # last digit.
            nats = (self.exam.printed[label].val_loss + 5e-9) * count
            return -float(log_q.sum()) - nats, "the sum"
        return None, ""

    # -- C1 and C3 ---------------------------------------------------------------------------------
    def model_alone(self):
        """C1 by import: the model's logits at a place see no later token and no other window.

        A leak from the very next token, the target, changes no score before it, so no twins on disk
        can show it; and if the model was not trained with the leak, it does not pay in the bet.
        """
        begin = time.monotonic()
        if not isinstance(self.source, ModelSource):
            self.add("model alone", "", None, "the script's GPT was not imported", begin)
            return
        window = min(self.hints.eval_seq_len, len(self.writer.real) // 2)
        # Whole windows, then the last positions, which a script may compute in another way.
        stride = min(self.hints.eval_stride, window)
        wrong = self.leaking_places(window, np.linspace(0, window - 2, MODEL_PLACES), 0)
        tested = MODEL_PLACES
        with contextlib.suppress(UntestableError):  # this model knows no such call
            places = np.linspace(window - stride, window - 2, MODEL_PLACES // 2)
            wrong += self.leaking_places(window, places, stride)
            tested += len(places)
        self.source.close()
        detail = f"logits at {tested} places of a window, all that follows replaced"
        if wrong:
            detail += f": different at {wrong[:5]}"
        self.add("model alone", "", not wrong, detail, begin)

    def leaking_places(self, window, places, last):
        """Those places of a window at which the model's logits change with what follows them."""
        writer = self.writer
        wrong = []
        for number, place in enumerate(places.astype(int)):
            ids = writer.real_pieces(8, window)
            other = writer.real_pieces(8, window)
            kind = writer.OPENINGS[number % len(writer.OPENINGS)]
            if number % 2:
                # A token at the place itself, such as a BOS, may be treated apart.
                rare = writer.OPENINGS[number // 2 % len(writer.OPENINGS)]
                ids[0, place] = writer.opening(rare, ids[0, place])[0]
            other[0, : place + 1] = ids[0, : place + 1]
            other[0, place + 1] = writer.opening(kind, ids[0, place + 1])[0]
            # The same row of two batches of one shape: what is equal gives equal bits.
            before = self.source.logits(ids, place, last)[0]
            after = self.source.logits(other, place, last)[0]
            if not np.array_equal(before, after):
                wrong.append(int(place))
        return wrong

    def twins(self):
        """What comes after target k changes no score up to k."""
        begin = time.monotonic()
        if not self.shows_nll:
            self.add("twins", "", None, "the script writes no SCORES_FILE", begin)
            return
        jobs_at_once = self.arguments.jobs
        tokens = self.text.tokens
        # The exam's own time has the script's checks in it.
        each = 1.1 * (self.start_seconds + self.target_seconds * len(tokens)) / jobs_at_once
        count = int(np.clip(self.left() / each, 4, self.arguments.twins))
        size = min(len(nll) for nll in self.exam.nll.values())
        places = self.writer.twin_places(tokens, count, size, self.hints)
        outcomes = []
        for first in range(0, count, jobs_at_once):
            jobs = []
            for number, k in enumerate(places[first : first + jobs_at_once], first):
                kind = self.writer.OPENINGS[number % len(self.writer.OPENINGS)]
                jobs.append(dict(tokens=self.writer.twin(tokens, k, kind)))
            outcomes += self.run_all(jobs)
            different = [self.differences(self.exam, places, outcomes, x) for x in self.exam.nll]
            if self.arguments.stop and any(different):
                break
        for label in self.exam.nll:
            self.judge_twins("twins", self.exam, places[: len(outcomes)], outcomes, label, begin)

    def differences(self, base, places, outcomes, label):
        """Sentences on those twins of `base` whose scores up to their k are not the same."""
        nll = base.nll[label]
        found = []
        for k, outcome in zip(places, outcomes):
            twin = outcome.nll.get(label)
            if twin is None or len(twin) != len(nll):
                continue  # see judge_twins
            gap = np.abs(twin[:k].astype(float) - nll[:k])
            wrong = np.flatnonzero(~(gap <= 8 * self.noise.get(label, 0.0)))
            if len(wrong):
                found.append(
                    f"k={k}: {len(wrong)} targets from {wrong[0]} on, by up to {gap.max():.2g} nats"
                )
        return found

    def judge_twins(self, test, base, places, outcomes, label, begin):
        """Add the result of twins for one score."""
        missing = [x for x in outcomes if len(x.nll.get(label, ())) != len(base.nll[label])]
        if missing:
            self.crashed = True
            detail = (
                f"{len(missing)} of {len(outcomes)} twins have no such score (exit code "
                f"{missing[0].code}): {missing[0].last_words()}"
            )
            self.add(test, label, None, detail, begin)
        found = self.differences(base, places, outcomes, label)
        detail = (
            f"{len(places)} places k from {min(places)} to {max(places)}: all scores up to k are "
            "the same"
        )
        if label in self.noise:
            detail += ", but for the noise"
        self.add(test, label, not found, "; ".join(found[:3]) or detail, begin)

    def whole_text(self):
        """Twins of the whole given text: a script may know it by its size or hash."""
        begin = time.monotonic()
        if not self.arguments.whole or not self.shows_nll:
            self.add("whole text", "", None, "no --whole, or no SCORES_FILE", begin)
            return
        tokens = np.array(self.real)
        other = np.roll(tokens, len(tokens) // 2)
        byte = self.tokenizer.byte
        k = int(self.writer.random.uniform(0.5, 0.95) * len(tokens))
        # Texts may be joined only between two characters.
        while byte[tokens[k]] >= 0 or byte[other[k + 2]] >= 0:
            k -= 1
        twin = np.concatenate([tokens[: k + 1], other[k + 1 :]])
        twin[k + 1] = self.writer.opening("plain", tokens[k + 1])[0]
        base, changed = self.run_all([dict(tokens=tokens), dict(tokens=twin)])
        for label in base.nll:
            self.judge_twins("whole text", base, [k], [changed], label, begin)

    # -- training ----------------------------------------------------------------------------------
    def training_twin(self):
        """What is trained must not depend on the validation shard beside it."""
        begin = time.monotonic()
        if self.arguments.skip_training:
            self.add("training twin", "", None, "--skip-training", begin)
            return
        train = self.training_text()
        jobs = []
        for val in self.unlike_texts(4 * self.hints.eval_seq_len + 1, train):
            jobs.append(dict(tokens=val, train=train, scores_file=False))
        first, second = self.run_all(jobs)
        if not first.artifacts or not second.artifacts:
            detail = (
                f"{TRAINING_STEPS} steps left no artifact (exit code {first.code}): "
                f"{first.last_words()}"
            )
            self.add("training twin", "", None, detail, begin)
            return
        different = sorted({name for name, _ in first.artifacts.items() ^ second.artifacts.items()})
        detail = f"{TRAINING_STEPS} steps beside two validation shards leave the same artifact"
        if different:
            detail = f"different beside another validation shard: {', '.join(different)}"
        self.add("training twin", "", not different, detail, begin)

    def unlike_texts(self, size, train):
        """Two validation texts (size,): what training learns, and what it makes less likely.

        A choice by validation loss (of a step, a rate, a scale) falls differently on them, where it
        would be the same on two pieces of ordinary text.
        """
        learnt = np.resize(train, size).astype(int)
        tokenizer = self.tokenizer
        random = self.writer.random
        # What training makes less likely: characters of two bytes, or else its rarest pieces.
        leads = np.flatnonzero((tokenizer.byte >= 0xC2) & (tokenizer.byte <= 0xDF))
        others = np.flatnonzero((tokenizer.byte >= 0x80) & (tokenizer.byte <= 0xBF))
        if len(leads) and len(others):
            strange = random.choice(others, size)
            strange[0::2] = random.choice(leads, len(strange[0::2]))
            strange[-1] = tokenizer.plain[0]  # no character begins at the end
        else:
            counts = np.bincount(train, minlength=tokenizer.size)
            rarest = tokenizer.plain[np.argsort(counts[tokenizer.plain])]
            strange = random.choice(rarest[: 1 + len(rarest) // 8], size)
        return learnt, strange

    def overlap(self):
        """Validation text inside the training shards, by hashes of BLOCK tokens."""
        begin = time.monotonic()
        if not self.arguments.train_data:
            self.add("overlap", "", None, "no --train-data", begin)
            return
        share = shared_blocks(self.real, find_shards(self.arguments.train_data, "train"))
        detail = (
            f"{100 * share:.2f} % of the validation text's blocks of {BLOCK} tokens stand in the "
            "training shards"
        )
        self.add("overlap", "", share < MOST_SHARED, detail, begin)


# --------------------------------------------------------------------------------------------------
# Command line and report
# --------------------------------------------------------------------------------------------------
def one_file(folder, pattern, named, what):
    """The file that was named, else the only one like `pattern` in the folder; None without any."""
    if named:
        if not Path(named).is_file():
            raise UntestableError(f"{named}: no such file: name the {what}")
        return Path(named).resolve()
    found = sorted(Path(folder).glob(pattern))
    if len(found) > 1:
        raise UntestableError(
            f"{folder} holds {len(found)} files {pattern}: say which one is the {what}"
        )
    if not found:
        return None
    return found[0].resolve()


def on_gpu():
    """Whether a script finds an NVIDIA GPU here."""
    return Path("/dev/nvidia0").exists()


def parse(arguments):
    """The command line as a namespace."""
    # On a GPU runs would wait for each other, and CUDA reserves far more memory than it uses.
    jobs = 1 if on_gpu() else min(4, os.cpu_count() or 1)
    memory = 0.0 if on_gpu() else 32.0
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
    add("--memory-gb", type=float, default=memory, help="address space of a run, 0 for no limit")
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
    sandbox = Sandbox(settings, arguments.memory_gb, root)
    candidate = Candidate(
        sandbox, script, artifact, tokenizer_path, arguments.ranks, arguments.seconds_per_run
    )
    return Verifier(candidate, tokenizer, real, arguments)


VERDICTS = {
    LEGAL: "nothing illegal found",
    ILLEGAL: "ILLEGAL",
    UNTESTED: "could not be tested",
}


def report(verifier, code, seconds):
    """Print the verdict; write the JSON report if it was asked for."""
    arguments = verifier.arguments
    results = verifier.results
    runs = verifier.candidate.runs
    network = not verifier.candidate.sandbox.wrapper
    not_run = sorted({result.test for result in results if result.status == SKIPPED})
    chance = sum(result.error_probability for result in results)
    isolation = "no network"
    if network:
        isolation = "WITH network, since unshare -rn is not permitted here"
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
            results=[result._asdict() for result in results],
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
        if verifier and verifier.source:
            verifier.source.close()
        if verifier:
            report(verifier, code, time.monotonic() - begin)
    return code


if __name__ == "__main__":
    sys.exit(main())
