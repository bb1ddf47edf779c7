"""Shards, the two streams, bytes per token against real text, and the demo corpus."""

import hashlib
import itertools
import json
import os
import pydoc_data.topics
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers import ROOT, VOCAB, environment, tiny_config, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BOS,
    ConfigError,
    DataError,
    TokenBytes,
    TrainStream,
    ValidationSet,
    read_shard,
    write_shard,
)

PROPERTY = dict(deadline=None, derandomize=True, database=None)
TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


# Shards


def shard_bytes(magic=20240520, version=1, promised=5, tokens=(1, 2, 3, 4, 5)):
    """The challenge's shard format, written without the code under test."""
    header = [magic, version, promised] + [0] * 253
    return b"".join(n.to_bytes(4, "little", signed=True) for n in header) + b"".join(
        n.to_bytes(2, "little") for n in tokens
    )


@pytest.fixture
def shard(tmp_path):
    return tmp_path / "fineweb_train_000000.bin"


def test_a_shard_is_read_as_its_little_endian_tokens(shard):
    shard.write_bytes(shard_bytes(promised=3, tokens=[1, 258, 65535]))
    tokens = read_shard(shard)
    assert tokens.tolist() == [1, 258, 65535] and tokens.dtype == np.dtype("<u2")
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


def test_a_written_shard_has_the_challenges_bytes(shard):
    write_shard(shard, np.array([1, 2, 3, 4, 5]))
    assert shard.read_bytes() == shard_bytes()


@pytest.mark.parametrize(
    "content,found",
    [
        (shard_bytes(magic=20240521), "[20240521, 1]"),
        (shard_bytes(version=2), "[20240520, 2]"),
        (shard_bytes(promised=6), "1034 bytes, expected 1036 for the 6 tokens of its header"),
        (shard_bytes(promised=4), "1034 bytes, expected 1032 for the 4 tokens of its header"),
        (shard_bytes()[:-1], "1033 bytes, expected 1034 for the 5 tokens of its header"),
        (shard_bytes() + b"\0", "1035 bytes"),
        (shard_bytes(promised=-1, tokens=[]), "-1 tokens"),
        (shard_bytes(promised=0, tokens=[]), "0 tokens"),
        (shard_bytes()[:1023], "not a token shard"),
        (shard_bytes()[:8], "not a token shard"),
        (b"", "not a token shard"),
        (b"PK\3\4" + bytes(2000), "not a token shard"),
    ],
    ids=[
        "magic",
        "version",
        "truncated",
        "over-long",
        "half a token less",
        "half a token more",
        "negative",
        "header only",
        "header cut",
        "two words",
        "empty",
        "foreign",
    ],
)
def test_a_damaged_shard_is_refused_with_what_was_found(shard, content, found):
    shard.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_shard(shard)
    assert str(error.value).startswith(f"{shard}: ") and found in str(error.value)


def test_a_missing_shard_is_an_error_that_names_it(shard):
    with pytest.raises(DataError, match=f"^{shard}: No such file or directory: restore the shard"):
        read_shard(shard)
    with pytest.raises(DataError, match=f"^{shard.parent}: Is a directory"):
        read_shard(shard.parent)


# The train stream


def write_shards(folder, *parts):
    paths = [folder / f"fineweb_train_{i:06d}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        write_shard(path, np.asarray(part))
    return paths


@pytest.fixture
def three_shards(tmp_path):
    """Shards of 7, 1 and 15 tokens that hold 0 to 22."""
    return write_shards(tmp_path, range(7), range(7, 8), range(8, 23))


@pytest.mark.parametrize("span", [1, 4, 7, 23, 50])
def test_spans_are_contiguous_share_their_boundary_token_and_wrap_over_shards(three_shards, span):
    stream = TrainStream(three_shards, 23)
    for step in range(40):
        expected = [(step * span + i) % 23 for i in range(span + 1)]
        assert stream.take(span, 0, span).tolist() == expected
        assert stream.position == (step + 1) * span


@pytest.mark.parametrize(
    "span,ranks,micro", [(12, 1, 4), (12, 2, 3), (12, 3, 1), (24, 4, 2), (60, 2, 5)]
)
def test_ranks_and_micro_batches_see_the_tokens_of_the_whole_span(three_shards, span, ranks, micro):
    whole, streams = (
        TrainStream(three_shards, 23),
        [TrainStream(three_shards, 23) for _ in range(ranks)],
    )
    share = span // ranks
    for _ in range(5):
        expected = whole.take(span, 0, span)
        parts = [
            stream.take(span, rank * share, (rank + 1) * share)
            for rank, stream in enumerate(streams)
        ]
        assert all(len(part) == share + 1 for part in parts)
        assert (
            np.concatenate([part[:-1] for part in parts]).tolist() == expected[:-1].tolist()
        )  # inputs
        assert (
            np.concatenate([part[1:] for part in parts]).tolist() == expected[1:].tolist()
        )  # targets
        rows = [
            whole_part[i : i + micro + 1] for whole_part in parts for i in range(0, share, micro)
        ]
        assert np.concatenate([row[1:] for row in rows]).tolist() == expected[1:].tolist()


def test_a_restored_position_continues_the_stream(three_shards):
    stream, positions, spans = TrainStream(three_shards, 23), [], []
    for _ in range(9):
        positions.append(stream.position)
        spans.append(stream.take(6, 0, 6).tolist())
    for position, expected in zip(positions, spans):
        saved = json.loads(json.dumps(position))  # a plain number
        assert TrainStream(three_shards, 23, saved).take(6, 0, 6).tolist() == expected


def test_a_token_outside_the_vocabulary_is_an_error_when_it_is_read(tmp_path):
    paths = write_shards(tmp_path, [1, 2, 3], [4, 22, 5])
    stream = TrainStream(paths, 22)
    assert stream.take(2, 0, 2).tolist() == [1, 2, 3]
    with pytest.raises(DataError) as error:
        stream.take(2, 0, 2)
    assert str(error.value).startswith(f"{paths[1]}: token id 22 is outside VOCAB_SIZE=22")
    assert TrainStream(paths, 23).take(5, 0, 5).tolist() == [1, 2, 3, 4, 22, 5]


@pytest.mark.parametrize("opened", [True, False], ids=["while open", "before it is opened"])
@pytest.mark.parametrize(
    "damage",
    ["vanished", "truncated", "emptied", "replaced by a shorter one", "replaced by a longer one"],
)
def test_a_shard_that_changes_in_mid_run_is_an_error(three_shards, damage, opened):
    """A map over a file that shrank kills the process; one that was replaced holds other tokens."""
    stream, path = TrainStream(three_shards, 23), three_shards[2]
    if opened:
        stream.take(10, 0, 10)
    else:
        stream.position = 20
    contents = {
        "truncated": path.read_bytes()[:-2],
        "emptied": b"",
        "replaced by a shorter one": shard_bytes(promised=12, tokens=range(12)),
        "replaced by a longer one": shard_bytes(promised=16, tokens=range(16)),
    }
    path.unlink()
    if damage in contents:
        path.write_bytes(contents[damage])
    with pytest.raises(DataError, match=str(path)):
        stream.take(10, 0, 10)


# Bytes per token

SYMBOLS = ["<sep>", "日本", "a b", "▁y", "o▁w", " x"]
TRAITS = ["byte_fallback", "dummy_prefix", "symbols"]


def known_pieces(text, model, symbols):
    """(unit, whether the model knows it) for the user-defined symbols and single characters of a
    text."""
    spelt = [symbol.replace("▁", " ") for symbol in symbols]
    units = re.findall("|".join(map(re.escape, spelt)) + "|." if spelt else ".", text, re.DOTALL)
    for unit in units:
        known = unit in spelt or model.piece_to_id(unit.replace(" ", "▁")) != model.unk_id()
        yield unit, known


def bytes_of_text(text, model, traits):
    """The bytes that count: known text, less a space at its start or right after unknown text.

    A model with a dummy prefix puts a space of its own there, so the text's first space counts.
    """
    if "byte_fallback" in traits:
        return len(text.encode()) - (text.startswith(" ") and "dummy_prefix" not in traits)
    total, after_silence = 0, "dummy_prefix" not in traits
    for unit, known in known_pieces(text, model, SYMBOLS if "symbols" in traits else []):
        total += len(unit.encode()) - (after_silence and unit.startswith(" ")) if known else 0
        after_silence = not known
    return total


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{traits: (model, TokenBytes)} of models that keep the text as it is, whatever spaces it
    has."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for count in range(len(TRAITS) + 1):
        for traits in itertools.combinations(TRAITS, count):
            path = folder / "_".join(["t", *traits])
            model = train_tokenizer(
                [text[:3000] for text in TOPICS[:40]],
                path,
                byte_fallback="byte_fallback" in traits,
                add_dummy_prefix="dummy_prefix" in traits,
                user_defined_symbols=SYMBOLS if "symbols" in traits else [],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
            )
            made[traits] = model, TokenBytes(path)
    return made


def counted(model, token_bytes, text):
    """Bytes of one document: its tokens after a BOS."""
    ids = np.array([BOS, *model.encode(text)])
    return int(token_bytes.count(ids[:-1], ids[1:]).sum())


WORDS = st.sampled_from(
    [
        *SYMBOLS,
        "the ",
        " of",
        "hello world",
        "  ",
        " ",
        "x y",
        "日",
        "本",
        "ﬁ",
        "é",
        "\n",
        "\t",
        "🙂",
        "<s>",
    ]
)
LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=8)
TEXTS = st.lists(WORDS | LETTERS, max_size=12).map(lambda parts: "".join(parts).replace("▁", " "))


every_kind_of_tokenizer = pytest.mark.parametrize(
    "traits",
    [traits for n in range(len(TRAITS) + 1) for traits in itertools.combinations(TRAITS, n)],
    ids=lambda traits: "+".join(traits) or "plain",
)


@every_kind_of_tokenizer
@settings(max_examples=120, **PROPERTY)
@given(text=TEXTS)
def test_counted_bytes_are_the_utf8_length_of_the_text(tokenizers, traits, text):
    model, token_bytes = tokenizers[traits]
    assert counted(model, token_bytes, text) == bytes_of_text(text, model, traits)


@every_kind_of_tokenizer
@settings(max_examples=60, **PROPERTY)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_the_check_against_decoded_text_accepts_every_honest_stream(tokenizers, traits, texts):
    model, token_bytes = tokenizers[traits]
    ids = [id for text in texts for id in [BOS, *model.encode(text)]]
    token_bytes.check(np.array([*ids, BOS], np.uint16))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(add_dummy_prefix=True),
        dict(model_type="unigram"),
        dict(model_type="char", vocab_size=400),
        dict(split_by_whitespace=False),
        dict(byte_fallback=False),
        dict(treat_whitespace_as_suffix=True),
    ],
    ids=lambda options: "_".join(map(str, [*options, *options.values()])) or "challenge",
)
def test_counted_bytes_are_the_decoded_length_on_real_text(tmp_path, options):
    texts = [text[:3000] for text in TOPICS[::2]]
    model = train_tokenizer(texts, tmp_path / "model", **options)
    token_bytes = TokenBytes(tmp_path / "model")
    for text in [*texts, *(text[:2000] for text in TOPICS[1::8])]:
        ids = model.encode(text)
        if model.unk_id() not in ids:
            assert counted(model, token_bytes, text) == len(model.decode(ids).encode())


def test_bytes_follow_the_challenges_table(tmp_path):
    """docs/REFERENCE.md, section 2, written as the plain rule over pairs of tokens."""
    model = train_tokenizer(
        TOPICS[:20], tmp_path / "model", user_defined_symbols=["<sep>"], control_symbols=["<ctl>"]
    )

    def silent(id):
        return model.is_control(id) or model.is_unknown(id) or model.is_unused(id)

    def rule(previous, id):
        if silent(id):
            return 0
        if model.is_byte(id):
            return 1
        piece = model.id_to_piece(id)
        return len(piece.removeprefix("▁").encode()) + (
            piece.startswith("▁") and not silent(previous)
        )

    previous, ids = (grid.ravel() for grid in np.meshgrid(range(VOCAB), range(VOCAB)))
    expected = [rule(int(a), int(b)) for a, b in zip(previous, ids)]
    assert TokenBytes(tmp_path / "model").count(previous, ids).tolist() == expected
    silents = [model.id_to_piece(i) for i in range(VOCAB) if silent(i)]
    assert silents == ["<pad>", "<s>", "</s>", "<unk>", "<ctl>"]


def test_counts_have_the_shape_of_the_tokens(tiny_data):
    token_bytes = TokenBytes(tiny_data.tokenizer_path)
    ids = np.arange(4, 64).reshape(3, 20)
    assert token_bytes.count(ids, ids).shape == (3, 20)
    assert (
        token_bytes.count(ids[0].astype(np.uint16), ids[1].astype(np.uint16)).tolist()
        == token_bytes.count(ids[0], ids[1]).tolist()
    )


@pytest.mark.parametrize(
    "traits", [(), ("byte_fallback", "dummy_prefix")], ids=["plain", "fallback"]
)
def test_the_check_stops_at_a_single_wrong_byte(tokenizers, traits, monkeypatch):
    model, token_bytes = tokenizers[traits]
    ids = np.array([BOS, *model.encode("hello world"), BOS, *model.encode(" one more text"), BOS])
    token_bytes.check(ids)
    world = model.encode("hello world")[-1]
    right = TokenBytes.count
    monkeypatch.setattr(
        token_bytes,
        "count",
        lambda before, after: right(token_bytes, before, after) + (np.asarray(after) == world),
    )
    with pytest.raises(DataError, match="bytes per token are wrong"):
        token_bytes.check(ids)


def test_a_stream_without_document_starts_is_checked_too(tokenizers, monkeypatch):
    model, token_bytes = tokenizers["byte_fallback",]
    ids = np.array(model.encode("hello world, this is one document that never ends"))
    token_bytes.check(ids)
    monkeypatch.setattr(token_bytes, "count", lambda before, after: np.ones(len(after), np.uint16))
    with pytest.raises(DataError, match="bytes per token are wrong"):
        token_bytes.check(ids)


def test_a_document_that_the_checked_slice_cuts_inside_a_character_is_no_error(tokenizers):
    model, token_bytes = tokenizers["byte_fallback",]
    ids = np.array([BOS, *model.encode("long 日語é🙂" * 50)])
    for end in range(len(ids) - 40, len(ids)):
        token_bytes.check(ids[:end])


def test_pieces_of_another_tokenizer_are_noticed(tmp_path):
    """They decode and count like any others: only their text, encoded again, gives them away."""
    halves = TOPICS[:40], TOPICS[40:]
    models = [train_tokenizer(half, tmp_path / str(i)) for i, half in enumerate(halves)]
    ids = [BOS]
    for text in TOPICS:
        ids += [*models[0].encode(text), BOS]
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array(ids))
    for i, is_foreign in enumerate((False, True)):
        token_bytes = TokenBytes(tmp_path / str(i))
        config = val_config(tmp_path, vocab_size=token_bytes.vocab_size)
        assert ValidationSet.load(config, token_bytes).is_foreign() == is_foreign


def test_a_space_spelt_in_bytes_is_not_counted_as_three(tmp_path):
    """So does byte fallback without a piece "▁", as <0xE2><0x96><0x81>; no score must profit from
    it."""
    words = [word for text in TOPICS[:20] for word in text.split()]
    model = train_tokenizer(words, tmp_path / "model", normalization_rule_name="identity")
    text = "the text of a document"
    ids = [BOS, *model.encode(text), BOS]
    assert model.piece_to_id("▁") == model.unk_id()
    try:
        token_bytes = TokenBytes(tmp_path / "model")
        token_bytes.check(ids)
    except DataError:
        return
    assert counted(model, token_bytes, text) == len(text.encode())


# On its way to the device


def test_tokens_go_to_a_gpu_through_pinned_memory_and_without_waiting(runtime, monkeypatch):
    made, calls = runtime(tiny_config()), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pin") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *args, **kwargs: calls.append((args, kwargs)) or tensor
    )
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)[:, 1:]
    assert torch.equal(made.to_device(array), torch.tensor(array.astype(np.int64)))
    assert calls == [((torch.device("cpu"),), dict(non_blocking=True))]
    made.device = torch.device("cuda", 1)
    assert made.to_device(array).dtype == torch.int64
    assert calls[1:] == ["pin", ((torch.device("cuda", 1),), dict(non_blocking=True))]


# The validation stream


class OneByte:
    """Stands for TokenBytes where only totals matter."""

    vocab_size = 1024

    def __init__(self, total=None):
        self.total = total

    def count(self, before, after):
        sizes = np.ones(len(after), np.uint16)
        if self.total is not None:
            sizes[0] += self.total - len(after)
        return sizes

    def check(self, ids):
        pass


def val_config(folder, **changes):
    return tiny_config(data_path=str(folder), **changes)


@pytest.mark.parametrize("tokens,targets", [(65, 64), (66, 64), (128, 64), (129, 128), (200, 192)])
def test_the_validation_stream_is_trimmed_to_whole_windows(tmp_path, tokens, targets):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(tokens) % 300)
    stream = ValidationSet.load(val_config(tmp_path, eval_seq_len=64), OneByte())
    assert stream.num_targets == len(stream.bytes) == targets and len(stream.tokens) == targets + 1
    assert stream.tokens.tolist() == [i % 300 for i in range(targets + 1)]


def test_the_validation_stream_joins_its_shards_in_order(tmp_path):
    for name, tokens in (
        ("000001", range(40, 90)),
        ("000000", range(40)),
        ("000002", range(90, 129)),
    ):
        write_shard(tmp_path / f"fineweb_val_{name}.bin", np.array(tokens))
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(10))
    assert ValidationSet.load(val_config(tmp_path), OneByte()).tokens.tolist() == list(range(129))


def test_each_target_gets_the_bytes_of_its_own_pair(tiny_data, monkeypatch):
    config = val_config(tiny_data.data_path, tokenizer_path=str(tiny_data.tokenizer_path))
    token_bytes = TokenBytes(tiny_data.tokenizer_path)
    stream = ValidationSet.load(config, token_bytes)
    pairs = [
        int(token_bytes.count([a], [b])[0]) for a, b in zip(stream.tokens[:-1], stream.tokens[1:])
    ]
    assert stream.bytes.tolist() == pairs


def test_bytes_do_not_depend_on_where_the_stream_is_cut_into_parts():
    """Counting goes part by part; a pair across an edge must not be lost or counted twice."""

    class Pairs(OneByte):
        def count(self, before, after):
            assert len(before) == len(after)
            return (np.asarray(before, np.int64) * 7 + after).astype(np.uint16)

    tokens = (np.arange((1 << 21) + 5) % 1000).astype(np.uint16)
    stream = ValidationSet(tokens, Pairs())
    assert np.array_equal(stream.bytes, Pairs().count(tokens[:-1], tokens[1:]))


def test_the_fingerprint_tells_tokens_bytes_documents_and_sha256(tmp_path):
    ids = np.array([BOS, 5, 6, BOS, 7] * 13)
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    stream = ValidationSet.load(val_config(tmp_path, eval_seq_len=32), OneByte(total=96))
    assert stream.fingerprint == dict(
        val_tokens=65,
        val_targets=64,
        val_bytes=96,
        val_documents=26,
        bytes_per_token=1.5,
        scope="proxy",
        val_sha256=hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest(),
    )


@pytest.mark.parametrize(
    "targets,total,vocab,scope",
    [
        (1000, 3000, 1024, "canonical"),
        (1000, 2000, 1024, "canonical"),
        (1000, 4000, 1024, "canonical"),
        (700, 3000, 8192, "canonical"),
        (1000, 1999, 1024, "proxy"),
        (1000, 4001, 1024, "proxy"),
        (999, 3000, 1024, "proxy"),
        (1001, 3000, 1024, "proxy"),
        (1000, 3000, 1023, "proxy"),
        (1000, 3000, 8192, "proxy"),
        (700, 3000, 1024, "proxy"),
    ],
)
def test_only_the_known_counts_make_a_split_canonical(monkeypatch, targets, total, vocab, scope):
    """The counts of a tokenizer; without the digest they are all there is to say."""
    monkeypatch.setattr(train_gpt, "CANONICAL_TARGETS", {1024: 1000, 8192: 700})
    monkeypatch.setattr(train_gpt, "CANONICAL_BYTES", (2000, 4000))
    token_bytes = OneByte(total)
    token_bytes.vocab_size = vocab
    tokens = np.zeros(targets + 1, np.uint16)
    certain = ValidationSet(tokens, token_bytes, hashlib.sha256(tokens.tobytes()).hexdigest())
    assert certain.scope == certain.fingerprint["scope"] == scope
    by_counts = ValidationSet(tokens, token_bytes)
    expected = "canonical-by-counts" if scope == "canonical" else "proxy"
    assert by_counts.scope == by_counts.fingerprint["scope"] == expected


def test_the_known_counts_are_those_of_the_official_splits():
    """The same text: 2.4359 and 3.7266 bytes per token."""
    assert train_gpt.CANONICAL_TARGETS == {1024: 62_021_632, 8192: 40_540_160}
    assert train_gpt.CANONICAL_BYTES == (151_020_000, 151_080_000)
    for pieces, rate in ((1024, 2.4359), (8192, 3.7266)):
        targets = train_gpt.CANONICAL_TARGETS[pieces]
        assert targets % 2048 == 0 and 151_020_000 <= targets * rate <= 151_080_000


def test_other_tokens_than_the_expected_ones_are_an_error(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(70))
    digest = hashlib.sha256(np.arange(65).astype("<u2").tobytes()).hexdigest()  # of what is scored
    assert ValidationSet.load(val_config(tmp_path, val_sha256=digest), OneByte()).scope == "proxy"
    with pytest.raises(DataError, match=f"have SHA-256 {digest}, expected VAL_SHA256={'0' * 64}:"):
        ValidationSet.load(val_config(tmp_path, val_sha256="0" * 64), OneByte())
    with pytest.raises(ConfigError, match="VAL_SHA256='abc': expected 64 hexadecimal digits"):
        val_config(tmp_path, val_sha256="abc")


def test_validation_data_shorter_than_a_window_are_refused(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.zeros(64))
    with pytest.raises(DataError, match=f"{tmp_path}: 64 validation tokens .* EVAL_SEQ_LEN=64"):
        ValidationSet.load(val_config(tmp_path), OneByte())


def test_loading_checks_the_bytes_against_the_text(tiny_data, monkeypatch):
    config = val_config(tiny_data.data_path)
    token_bytes = TokenBytes(tiny_data.tokenizer_path)
    right = TokenBytes.count
    monkeypatch.setattr(
        token_bytes,
        "count",
        lambda before, after: right(token_bytes, before, after) + (np.asarray(after) % 50 == 0),
    )
    with pytest.raises(DataError, match="bytes per token are wrong"):
        ValidationSet.load(config, token_bytes)


# The demo corpus

SOURCE = '''"""The module's own text, long enough to be taken as a text by anyone who looks at
more than a hundred and sixty characters, which is where the line is drawn between a label and a
text.

    Its second paragraph keeps
    its indentation.
"""
import os

SHORT = "a short text"
TABLE = "%s"


def function():
    """A docstring of a function, which is long enough as well, because it goes on and on, and says
    nothing at all for rather more than one hundred and sixty characters, as its author had nothing
    to say."""
    return f"no {os} text"
''' % ("x" * 300)


def test_the_english_of_a_file_is_the_paragraphs_of_its_long_texts(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    paragraphs = list(train_gpt.english_of(path))
    assert [paragraph.split()[0] for paragraph in paragraphs] == ["The", "Its", "A"]
    assert paragraphs[1] == "    Its second paragraph keeps\n    its indentation."
    assert (
        paragraphs[2].startswith("A docstring of a")
        and "\nnothing at all for rather more" in paragraphs[2]
    )


@pytest.mark.parametrize(
    "content", [b"", b"x = 1\n", b'"""unfinished', b'"""\xff\xfe"""', b'"""\0"""', None]
)
def test_a_file_that_cannot_be_parsed_has_no_english(tmp_path, content):
    path = tmp_path / "module.py"
    if content is not None:
        path.write_bytes(content)
    assert list(train_gpt.english_of(path)) == []


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """(config, build) of a demo whose corpus is small: build() returns its log."""
    texts = [text[:4000] for text in TOPICS]
    monkeypatch.setattr(
        train_gpt, "demo_texts", lambda: train_gpt.DemoTexts(texts[:50], texts[50:60])
    )

    def build(folder="demo", **changes):
        config = tiny_config(
            data_path=str(tmp_path / folder / "data"),
            tokenizer_path=str(tmp_path / folder / "tokenizers" / "demo.model"),
            **changes,
        )
        lines = []
        train_gpt.build_demo_data(config, lines.append)
        return config, lines

    build.texts = texts
    return build


def contents(config):
    """The built files' bytes by name, without the lock."""
    folder = os.path.dirname(os.path.dirname(config.tokenizer_path))
    return {
        name: open(os.path.join(at, name), "rb").read()
        for at, _, names in os.walk(folder)
        for name in names
        if name != "lock"
    }


def test_the_demo_data_are_ordinary_shards_of_documents_that_decode_to_the_corpus(small_demo):
    config, lines = small_demo()
    token_bytes = train_gpt.load_token_bytes(config)
    model = token_bytes.model
    for split, texts in (("train", small_demo.texts[:50]), ("val", small_demo.texts[50:60])):
        (path,) = train_gpt.find_shards(config, split)
        tokens = read_shard(path).astype(int)
        starts = np.flatnonzero(tokens == BOS)
        assert starts[0] == 0 and len(starts) == len(texts)
        documents = [model.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert documents == [model.decode(model.encode(text)) for text in texts]
    ValidationSet.load(config, token_bytes)
    assert lines and all(line.startswith("demo_data: ") for line in lines)


def test_the_demo_data_are_built_once_and_always_the_same(small_demo):
    config, _ = small_demo()
    first = contents(config)
    assert small_demo()[1] == [] and contents(config) == first
    assert contents(small_demo("elsewhere")[0]) == first and len(first) == 3


@pytest.mark.parametrize(
    "missing", ["fineweb_val_000000.bin", "fineweb_train_000000.bin", "demo.model"]
)
def test_demo_data_whose_building_was_interrupted_are_built_again(small_demo, missing):
    config, _ = small_demo()
    first = contents(config)
    path = (
        config.tokenizer_path
        if missing == "demo.model"
        else os.path.join(config.data_path, missing)
    )
    os.unlink(path)
    small_demo()
    assert contents(config) == first


def test_an_evaluation_does_not_build_the_demos_training_shard_again(small_demo):
    config, _ = small_demo()
    os.unlink(os.path.join(config.data_path, "fineweb_train_000000.bin"))
    assert small_demo(eval_only="some.ptz")[1] == []
    assert sorted(contents(config)) == ["demo.model", "fineweb_val_000000.bin"]


def test_no_paragraph_of_the_demo_corpus_is_taken_twice(tmp_path, monkeypatch):
    """Modules share licences and notes; the part that is scored must not repeat what was trained
    on."""
    stdlib, site = tmp_path / "python3", tmp_path / "site"
    shared = [
        f"Shared paragraph {i} that many of these modules repeat, word for word, as it is so good."
        for i in range(7)
    ]
    for i in range(300):
        own = f"Paragraph of module {i} alone, which is long enough to be kept, and no label."
        path = [stdlib / f"m{i}.py", stdlib / "package" / f"m{i}.py", site / "torch" / f"m{i}.py"][
            i % 3
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{shared[i % 7]}\n\n{own}\n\n{shared[i % 5]}\n\nToo short."""\n')
    (stdlib / "test").mkdir()
    (stdlib / "test" / "m.py").write_text(f'"""{shared[0] * 3} of the tests."""\n')
    monkeypatch.setattr(train_gpt.sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    monkeypatch.setattr(train_gpt.torch, "__file__", str(site / "torch" / "__init__.py"))
    train, val = train_gpt.demo_texts()
    paragraphs = [paragraph for text in train + val for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) == 307 and set(shared) < set(paragraphs)
    assert 300 * 0.01 < len(val) < 300 * 0.08 and len(train) + len(val) == 300


DIGEST = textwrap.dedent("""
    import hashlib, json, train_gpt
    texts = train_gpt.demo_texts()
    print(hashlib.sha256(json.dumps(texts).encode()).hexdigest())
""")


@pytest.mark.slow
def test_the_demo_corpus_is_large_enough_deterministic_and_has_no_text_in_both_parts():
    train, val = train_gpt.demo_texts()
    assert sum(len(text.encode()) for text in train) >= 6_000_000
    assert sum(len(text.encode()) for text in val) >= 250_000
    seen = [
        {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")}
        for texts in (train, val)
    ]
    assert all(seen) and not seen[0] & seen[1]
    digest = hashlib.sha256(json.dumps([train, val]).encode()).hexdigest()
    child = subprocess.run(
        [sys.executable, "-c", DIGEST],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**environment(), "PYTHONHASHSEED": "7"},
    )
    assert child.stdout.strip() == digest
