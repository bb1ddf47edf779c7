"""Shards, the stream of training sequences, bytes per token against real text, the demo corpus."""

import hashlib
import itertools
import os
import pydoc_data.topics

import numpy as np
import pytest
import torch
from helpers import VOCAB, tiny_config, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BOS,
    DataError,
    TokenBytes,
    TrainStream,
    ValidationSet,
    read_shard,
    write_shard,
)

PROPERTY = dict(deadline=None, derandomize=True, database=None)
TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


# ---- shards ----


def shard_bytes(magic=20240520, version=1, promised=5, tokens=(1, 2, 3, 4, 5)):
    """The challenge's shard format, written without the code under test."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, promised
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


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


DAMAGED = {
    "magic": (shard_bytes(magic=20240521), "[20240521, 1]"),
    "version": (shard_bytes(version=2), "[20240520, 2]"),
    "truncated": (shard_bytes(promised=6), "1034 bytes, expected 1036 for the 6 tokens of its"),
    "over-long": (shard_bytes(promised=4), "1034 bytes, expected 1032 for the 4 tokens of its"),
    "header only": (shard_bytes(promised=0, tokens=[]), "0 tokens"),
    "header cut": (shard_bytes()[:1023], "not a token shard"),
    "empty": (b"", "not a token shard"),
}


@pytest.mark.parametrize("content, found", DAMAGED.values(), ids=DAMAGED)
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


# ---- training sequences in the order of the shards ----


def write_shards(folder, *parts):
    paths = [folder / f"fineweb_train_{i:06d}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        write_shard(path, np.asarray(part))
    return paths


@pytest.fixture
def three_shards(tmp_path):
    """Shards of 7, 1 and 15 tokens that hold 0 to 22."""
    return write_shards(tmp_path, range(7), range(7, 8), range(8, 23))


@pytest.mark.parametrize("seq_len", [1, 4, 7, 23, 50])
def test_sequences_share_their_boundary_token_and_wrap_over_shards(three_shards, seq_len):
    stream = TrainStream(three_shards, 23, seq_len)
    assert (stream.num_tokens, stream.num_sequences) == (23, 23 // seq_len)
    expected = [[(n * seq_len + i) % 23 for i in range(seq_len + 1)] for n in range(60)]
    rows = stream.sequences(0, 60)
    assert rows.tolist() == expected and rows.dtype == np.uint16
    # A function of the numbers alone: any part, in any order, as ranks and a resumed run take them.
    for first, count in ((59, 1), (10, 3), (0, 1), (13, 20)):
        assert stream.sequences(first, count).tolist() == expected[first : first + count]


def test_a_token_outside_the_vocabulary_is_an_error_when_it_is_read(tmp_path):
    paths = write_shards(tmp_path, [1, 2, 3], [4, 22, 5])
    stream = TrainStream(paths, 22, seq_len=2)
    assert stream.sequences(0, 1).tolist() == [[1, 2, 3]]
    with pytest.raises(DataError) as error:
        stream.sequences(1, 1)
    assert str(error.value).startswith(f"{paths[1]}: token id 22 is outside VOCAB_SIZE=22")
    assert TrainStream(paths, 23, seq_len=5).sequences(0, 1).tolist() == [[1, 2, 3, 4, 22, 5]]


def test_a_shard_that_changes_in_mid_run_is_an_error(three_shards):
    """A map over a file that shrank kills the process; one that was replaced holds other tokens."""
    stream, path = TrainStream(three_shards, 23, seq_len=10), three_shards[2]
    stream.sequences(0, 1)
    longer = shard_bytes(promised=16, tokens=range(16))
    for content in (path.read_bytes()[:-2], b"", longer, None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path}: .*restore the shard"):
            stream.sequences(1, 1)


def test_tokens_reach_the_device_as_int64(runtime):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)[:, 1:]
    moved = runtime(tiny_config()).to_device(array)
    assert moved.dtype == torch.int64 and moved.tolist() == array.tolist()


# ---- bytes per token ----

SYMBOLS = ["<sep>", "日本", "a b", "▁y", "o▁w", " x"]
TRAITS = ["byte_fallback", "dummy_prefix", "symbols"]
ALL_TRAITS = [c for n in range(len(TRAITS) + 1) for c in itertools.combinations(TRAITS, n)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{traits: (model, TokenBytes)} of models that keep the text with all of its spaces."""
    folder, made = tmp_path_factory.mktemp("tokenizers"), {}
    for traits in ALL_TRAITS:
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


WORDS = [*SYMBOLS, "the ", " of", "hello world", "  ", " ", "x y", "日", "本", "ﬁ", "é", "\n", "\t"]
WORDS += ["🙂", "<s>"]
LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=8)
TEXTS = st.lists(st.sampled_from(WORDS) | LETTERS, max_size=12).map(
    lambda parts: "".join(parts).replace("▁", " ")
)


@pytest.mark.parametrize("traits", ALL_TRAITS, ids=lambda traits: "+".join(traits) or "plain")
@settings(max_examples=120, **PROPERTY)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_counted_bytes_of_any_text_pass_the_check(tokenizers, traits, texts):
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
    ids=str,
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
        if silent(id) or model.is_byte(id):
            return 0 if silent(id) else 1
        piece = model.id_to_piece(id)
        has_space = piece.startswith("▁") and not silent(previous)
        return len(piece.removeprefix("▁").encode()) + has_space

    previous, ids = np.meshgrid(range(VOCAB), range(VOCAB))
    found = TokenBytes(tmp_path / "model").count(previous, ids)
    assert found.shape == (VOCAB, VOCAB)
    assert found.ravel().tolist() == [rule(int(a), int(b)) for a, b in zip(previous.flat, ids.flat)]
    silents = [model.id_to_piece(i) for i in range(VOCAB) if silent(i)]
    assert silents == ["<pad>", "<s>", "</s>", "<unk>", "<ctl>"]


@pytest.mark.parametrize("text", ["hello world", " one more text", "no document start"])
@pytest.mark.parametrize("traits", [(), ("byte_fallback", "dummy_prefix")], ids=["plain", "both"])
def test_the_check_stops_at_a_single_wrong_byte(tokenizers, traits, text, monkeypatch):
    model, token_bytes = tokenizers[traits]
    ids = [BOS, *model.encode("some text"), BOS, *model.encode(text), BOS]
    if text.startswith("no"):
        ids = model.encode(text)
    token_bytes.check(ids)
    right, wrong = TokenBytes.count, model.encode(text)[-1]
    monkeypatch.setattr(
        token_bytes, "count", lambda before, ids: right(token_bytes, before, ids) + (ids == wrong)
    )
    with pytest.raises(DataError, match="bytes per token are wrong"):
        token_bytes.check(ids)


def test_a_document_that_the_checked_slice_cuts_inside_a_character_is_no_error(tokenizers):
    model, token_bytes = tokenizers["byte_fallback",]
    ids = np.array([BOS, *model.encode("long 日語é🙂" * 50)])
    for end in range(len(ids) - 40, len(ids)):
        token_bytes.check(ids[:end])


def test_a_space_spelt_in_bytes_is_refused_or_counted_as_one(tmp_path):
    """Byte fallback without a piece "▁" spells a space in three bytes: no score may gain by it."""
    words = [word for text in TOPICS[:20] for word in text.split()]
    model = train_tokenizer(words, tmp_path / "model", normalization_rule_name="identity")
    assert model.piece_to_id("▁") == model.unk_id()
    text = "the text of a document"
    token_bytes = TokenBytes(tmp_path / "model")
    assert counted(model, token_bytes, text) > len(text.encode())
    with pytest.raises(DataError, match="with a piece for a space"):
        token_bytes.check([BOS, *model.encode(text), BOS])


# ---- the validation split ----


class OneByte:
    """Stands for TokenBytes where only totals matter."""

    def __init__(self, total=None, vocab_size=1024):
        self.total = total
        self.vocab_size = vocab_size

    def count(self, before, after):
        sizes = np.ones(len(after), np.uint16)
        if self.total is not None:
            sizes[0] += self.total - len(after)
        return sizes

    def check(self, ids):
        pass


@pytest.mark.parametrize("tokens,targets", [(65, 64), (66, 64), (128, 64), (129, 128), (200, 192)])
def test_the_validation_split_joins_its_shards_in_order_and_keeps_whole_windows(
    tmp_path, tokens, targets
):
    for number, low, high in ((1, 40, 60), (0, 0, 40), (2, 60, tokens)):
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", np.arange(low, high))
    write_shard(tmp_path / "fineweb_train_000000.bin", np.arange(10))
    split = ValidationSet.load(tiny_config(data_path=str(tmp_path), eval_seq_len=64), OneByte())
    assert split.num_targets == len(split.bytes) == targets
    assert split.tokens.tolist() == list(range(targets + 1))


def test_each_target_gets_the_bytes_of_its_own_pair():
    """Counting goes part by part; a pair across an edge must not be lost or counted twice."""

    class Pairs(OneByte):
        def count(self, before, after):
            return (np.asarray(before, np.int64) * 7 + after).astype(np.uint16)

    tokens = (np.arange((1 << 21) + 5) % 1000).astype(np.uint16)
    split = ValidationSet(tokens, Pairs())
    assert np.array_equal(split.bytes, Pairs().count(tokens[:-1], tokens[1:]))


def test_the_fingerprint_tells_tokens_bytes_documents_and_sha256(tmp_path):
    ids = np.array([BOS, 5, 6, BOS, 7] * 13)
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    split = ValidationSet.load(
        tiny_config(data_path=str(tmp_path), eval_seq_len=32), OneByte(total=96)
    )
    assert split.fingerprint == dict(
        val_tokens=65,
        val_targets=64,
        val_bytes=96,
        val_documents=26,
        bytes_per_token=1.5,
        scope="proxy",
        val_sha256=hashlib.sha256(ids.astype("<u2").tobytes()).hexdigest(),
    )


@pytest.mark.parametrize("vocab, targets", [(1024, 1000), (8192, 700)])
def test_only_the_known_counts_make_a_split_canonical(monkeypatch, vocab, targets):
    monkeypatch.setattr(train_gpt, "CANONICAL_TARGETS", {1024: 1000, 8192: 700})
    monkeypatch.setattr(train_gpt, "CANONICAL_BYTES", (2000, 4000))

    def scope(total, more_targets=0, more_pieces=0):
        tokens = np.zeros(targets + more_targets + 1, np.uint16)
        split = ValidationSet(tokens, OneByte(total, vocab + more_pieces))
        assert split.scope == split.fingerprint["scope"]
        return split.scope

    assert scope(2000) == scope(4000) == "canonical-by-counts"
    others = (1999,), (4001,), (3000, -1), (3000, 1), (3000, 0, 1)
    assert {scope(*counts) for counts in others} == {"proxy"}
    monkeypatch.undo()
    # The same text: 2.4359 and 3.7266 bytes per token.
    assert train_gpt.CANONICAL_TARGETS == {1024: 62_021_632, 8192: 40_540_160}
    low, high = train_gpt.CANONICAL_BYTES
    for pieces, rate in ((1024, 2.4359), (8192, 3.7266)):
        assert low <= train_gpt.CANONICAL_TARGETS[pieces] * rate <= high


def test_validation_data_shorter_than_a_window_are_refused(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.zeros(64))
    with pytest.raises(DataError, match=f"{tmp_path}: 64 validation tokens .* EVAL_SEQ_LEN=64"):
        ValidationSet.load(tiny_config(data_path=str(tmp_path)), OneByte())


def test_loading_checks_the_bytes_against_the_text(tiny_data, monkeypatch):
    token_bytes = TokenBytes(tiny_data.tokenizer_path)
    split = ValidationSet.load(tiny_config(data_path=str(tiny_data.data_path)), token_bytes)
    pairs = zip(split.tokens[:-1], split.tokens[1:])
    assert split.bytes.tolist() == [int(token_bytes.count([a], [b])[0]) for a, b in pairs]
    token_bytes.base[::50] += 1
    with pytest.raises(DataError, match="bytes per token are wrong"):
        ValidationSet.load(tiny_config(data_path=str(tiny_data.data_path)), token_bytes)


def test_pieces_of_another_tokenizer_are_noticed(tmp_path):
    """They decode and count like any others: only their text, encoded again, gives them away."""
    halves = TOPICS[:40], TOPICS[40:]
    models = [train_tokenizer(half, tmp_path / str(i)) for i, half in enumerate(halves)]
    ids = [BOS]
    for text in TOPICS:
        ids += [*models[0].encode(text), BOS]
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array(ids))
    for i, mismatch in enumerate((False, True)):
        token_bytes = TokenBytes(tmp_path / str(i))
        config = tiny_config(data_path=str(tmp_path), vocab_size=token_bytes.vocab_size)
        assert ValidationSet.load(config, token_bytes).retokenisation_mismatch() == mismatch


# ---- the demo corpus ----

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
    first, second, third = train_gpt.english_of(path)
    assert first.startswith("The module's own")
    assert second == "    Its second paragraph keeps\n    its indentation."
    assert third.startswith("A docstring of a") and "\nnothing at all for rather more" in third


@pytest.mark.parametrize(
    "content", [b"", b"x = 1\n", b'"""unfinished', b'"""\xff\xfe"""', b'"""\0"""', None]
)
def test_a_file_that_cannot_be_parsed_has_no_english(tmp_path, content):
    path = tmp_path / "module.py"
    if content is not None:
        path.write_bytes(content)
    assert train_gpt.english_of(path) == []


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """build(folder, **changes) -> (config, log) of a demo whose corpus is small."""
    texts = [text[:4000] for text in TOPICS]
    parts = {"train": texts[:50], "val": texts[50:60]}
    monkeypatch.setattr(train_gpt, "demo_documents", lambda: parts)

    def build(folder="demo", **changes):
        paths = dict(
            data_path=str(tmp_path / folder / "data"),
            tokenizer_path=str(tmp_path / folder / "tokenizers" / "demo.model"),
        )
        lines = []
        config = tiny_config(**paths, **changes)
        train_gpt.build_demo_data(config, lines.append)
        return config, lines

    build.parts = parts
    return build


def contents(config):
    """The built files' bytes by name, without the lock."""
    folder = os.path.dirname(os.path.dirname(config.tokenizer_path))
    files = {name: os.path.join(at, name) for at, _, names in os.walk(folder) for name in names}
    return {name: open(path, "rb").read() for name, path in files.items() if name != "lock"}


def test_the_demo_data_are_ordinary_shards_of_documents_that_decode_to_the_corpus(small_demo):
    config, lines = small_demo()
    token_bytes = train_gpt.load_token_bytes(config)
    model = token_bytes.model
    for split, texts in small_demo.parts.items():
        (path,) = train_gpt.find_shards(config, split)
        tokens = read_shard(path).astype(int)
        starts = np.flatnonzero(tokens == BOS)
        assert starts[0] == 0 and len(starts) == len(texts)
        documents = [model.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]
        assert documents == [model.decode(model.encode(text)) for text in texts]
    ValidationSet.load(config, token_bytes)
    assert lines and all(line.startswith("demo_data: ") for line in lines)


def test_the_demo_data_are_built_once_always_the_same_and_again_after_an_interruption(small_demo):
    config, _ = small_demo()
    first = contents(config)
    assert small_demo()[1] == [] and contents(config) == first
    assert contents(small_demo("elsewhere")[0]) == first and len(first) == 3
    shards = [f"{config.data_path}/fineweb_{split}_000000.bin" for split in ("train", "val")]
    for path in (*shards, config.tokenizer_path):
        os.unlink(path)
        small_demo()
        assert contents(config) == first


def test_an_evaluation_does_not_build_the_demos_training_shard_again(small_demo):
    config, _ = small_demo()
    os.unlink(f"{config.data_path}/fineweb_train_000000.bin")
    assert small_demo(eval_only="some.ptz")[1] == []
    assert sorted(contents(config)) == ["demo.model", "fineweb_val_000000.bin"]


def test_no_paragraph_of_the_demo_corpus_is_taken_twice(tmp_path, monkeypatch):
    """Modules share licences and notes; scored text must not repeat what was trained on."""
    stdlib, site = tmp_path / "python3", tmp_path / "site"
    folders = [stdlib, stdlib / "package", site / "torch"]
    shared = [
        f"Shared paragraph {i} that many of these modules repeat, word for word, as it is so good."
        for i in range(7)
    ]
    for i in range(300):
        alone = f"Paragraph of module {i} alone, which is long enough to be kept, and no label."
        path = folders[i % 3] / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{shared[i % 7]}\n\n{alone}\n\n{shared[i % 5]}\n\nToo short."""\n')
    (stdlib / "test").mkdir()
    (stdlib / "test" / "m.py").write_text(f'"""{shared[0] * 3} of the tests."""\n')
    monkeypatch.setattr(train_gpt.sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    monkeypatch.setattr(train_gpt.torch, "__file__", str(site / "torch" / "__init__.py"))
    parts = train_gpt.demo_documents()
    texts = parts["train"] + parts["val"]
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) == 307 and set(shared) < set(paragraphs)
    assert 300 * 0.01 < len(parts["val"]) < 300 * 0.08 and len(texts) == 300
    # File systems list in orders of their own: the names' order decides.
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda top: ((at, subs, files[::-1]) for at, subs, files in walk(top))
    )
    assert train_gpt.demo_documents() == parts
