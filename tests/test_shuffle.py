"""SHUFFLE=1: random order, each sequence once per pass, one integer of state, few bytes read."""

import collections
import os
import shutil

import numpy as np
import pytest
from conftest import events, launch, tiny_config

import train_gpt
from train_gpt import DataError, ShuffledStream, TrainStream, write_shard

T = 8
SIZES = [400, 3, 9, 1000, 17]  # the second shard holds no sequence, the third exactly one


@pytest.fixture
def paths(tmp_path):
    """Shards of numbers that tell where they stand: 1000 x shard + place."""
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(len(SIZES))]
    for i, (path, size) in enumerate(zip(paths, SIZES)):
        write_shard(path, 10_000 * i + np.arange(size))
    return paths


def stream(paths, seed=1, position=0, vocab_size=65536):
    made = ShuffledStream(paths, vocab_size, T, seed)
    made.position = position
    return made


def take(made, sequences):
    """The next sequences (n, T + 1), as one rank takes them."""
    return made.rows(sequences * T, 0, sequences * T, T).astype(int)


def sequences_of_a_pass(made, number):
    made.begin_pass(number, 0)
    return len(made.order)


def test_a_row_is_a_contiguous_piece_of_one_shard(paths):
    rows = take(stream(paths), 300)
    assert rows.shape == (300, T + 1)
    assert (np.diff(rows, axis=1) == 1).all()
    for first, last in rows[:, [0, -1]]:
        assert first // 10_000 == last // 10_000 and last % 10_000 < SIZES[last // 10_000]


def test_every_sequence_comes_once_per_pass(paths):
    """And what is left out of a pass is less than a sequence at either end of a shard."""
    made = stream(paths)
    for number in range(4):
        rows = take(made, sequences_of_a_pass(stream(paths), number))
        targets = collections.Counter(rows[:, 1:].flatten().tolist())
        assert set(targets.values()) == {1}
        for i, size in enumerate(SIZES):
            seen = sorted(t % 10_000 for t in targets if t // 10_000 == i)
            assert seen == list(range(seen[0], seen[-1] + 1)) if seen else size <= T
            assert not seen or (seen[0] <= T and size - seen[-1] <= T)


def test_passes_differ_in_phase_and_order(paths):
    made = stream(paths)
    first, second = (take(made, sequences_of_a_pass(stream(paths), number)) for number in range(2))
    assert not np.array_equal(first[:50], second[:50])
    phases = [stream(paths, seed).phases.tolist() for seed in range(30)]
    assert {phase[3] for phase in phases} == set(range(T)) and {phase[2] for phase in phases} == {0}


def test_the_order_is_a_function_of_the_seed_and_the_number(paths):
    assert np.array_equal(take(stream(paths), 400), take(stream(paths), 400))
    assert not np.array_equal(take(stream(paths), 400), take(stream(paths, seed=2), 400))


def test_the_order_is_random(paths):
    """Sequences of the largest shard come at all times, and neighbours seldom follow each other."""
    made = stream(paths)
    rows = take(made, len(made.order))[:, 0]
    places = rows[rows // 10_000 == 3] % 10_000
    assert (np.diff(places) == T).mean() < 0.1
    assert abs(np.corrcoef(np.arange(len(places)), places)[0, 1]) < 0.3
    half = rows[: len(rows) // 2]
    assert abs((half // 10_000 == 3).mean() - (rows // 10_000 == 3).mean()) < 0.1


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_sequences_of_one(paths, ranks):
    whole, parts = stream(paths), [stream(paths) for _ in range(ranks)]
    span = 12 * T
    for _ in range(40):  # more than a pass
        expected = whole.rows(span, 0, span, T)
        share = span // ranks
        found = [part.rows(span, r * share, (r + 1) * share, T) for r, part in enumerate(parts)]
        assert np.array_equal(np.concatenate(found), expected)
        assert {part.position for part in parts} == {whole.position}


def test_a_position_is_all_that_a_resumed_run_needs(paths):
    made, saved, expected = stream(paths), [], []
    for _ in range(40):
        saved.append(made.position)
        expected.append(take(made, 12))
    for position, rows in zip(saved, expected):
        assert np.array_equal(take(stream(paths, position=position), 12), rows)
    for position, rows in reversed(list(zip(saved, expected))):  # backwards in one object, too
        made.position = position
        assert np.array_equal(take(made, 12), rows)


def test_without_shuffle_rows_are_the_contiguous_span(paths):
    plain, tokens = TrainStream(paths, 65536), TrainStream(paths, 65536)
    for _ in range(5):
        rows = plain.rows(6 * T, 2 * T, 5 * T, T)
        span = tokens.take(6 * T, 2 * T, 5 * T)
        assert rows[:, :-1].flatten().tolist() == span[:-1].tolist()
        assert rows[:, 1:].flatten().tolist() == span[1:].tolist()


def test_a_step_reads_its_own_bytes_shard_by_shard_from_front_to_back(tmp_path, monkeypatch):
    """What a network file system sees: no read-ahead, one opening per shard, rising offsets."""
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(5)]
    for path in paths:
        write_shard(path, np.arange(50_000) % 1000)
    seq_len, sequences = 256, 64
    made = ShuffledStream(paths, 1000, seq_len, 1)
    reads, opened, pread, opens = [], [], os.pread, open

    def counted_pread(file, size, offset):
        data = pread(file, size, offset)
        reads.append((os.readlink(f"/proc/self/fd/{file}"), offset, len(data)))
        return data

    def counted_open(path, *args, **kwargs):
        opened.append(path)
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr("builtins.open", counted_open)
    before = io_of_this_process()
    made.rows(sequences * seq_len, 0, sequences * seq_len, seq_len)
    read = io_of_this_process() - before
    needed = 2 * sequences * (seq_len + 1)
    assert sum(size for *_, size in reads) == needed and needed <= read < needed + 4096
    assert reads == sorted(reads) and len(reads) == sequences
    assert len([path for path in opened if path in paths]) <= len(paths)


def io_of_this_process():
    """Bytes that this process has read by system calls."""
    with os.fdopen(os.open("/proc/self/io", os.O_RDONLY)) as file:
        return int(next(line for line in file if line.startswith("rchar:")).split()[1])


@pytest.mark.parametrize("damage", ["vanished", "truncated", "longer"])
def test_a_shard_that_changes_in_mid_run_is_an_error(paths, damage):
    made = stream(paths)
    take(made, 20)
    content = paths[3].read_bytes()
    paths[3].unlink()
    if damage != "vanished":
        paths[3].write_bytes(content[:-2] if damage == "truncated" else content + b"\0\0")
    with pytest.raises(DataError, match=f"{paths[3]}: .*restore the shard"):
        take(made, 100)


def test_a_token_outside_the_vocabulary_is_an_error(paths):
    with pytest.raises(DataError, match="token id .* is outside VOCAB_SIZE=30000"):
        take(stream(paths, vocab_size=30_000), 150)


def test_shards_without_a_whole_sequence_are_refused(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(T))
    with pytest.raises(DataError, match=f"no training shard has a sequence of TRAIN_SEQ_LEN={T} "):
        stream([path])
    write_shard(path, np.arange(T + 1))
    assert take(stream([path]), 3).tolist() == [list(range(T + 1))] * 3


def test_the_switch_chooses_the_stream(paths):
    folder = str(paths[0].parent)
    assert type(train_gpt.open_train_stream(tiny_config(data_path=folder))) is TrainStream
    shuffled = train_gpt.open_train_stream(tiny_config(data_path=folder, shuffle=True, seed=7))
    assert type(shuffled) is ShuffledStream and (shuffled.seq_len, shuffled.seed) == (64, 7)


# Whole runs


def losses(folder):
    return {event["step"]: event["train_loss"] for event in events(folder, "step")}


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """(settings, folder) of a shuffled run of 6 steps, more than a pass, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("shuffled")
    settings = dict(
        tiny_data.settings, shuffle=True, dtype="float32", train_batch_tokens=8192, checkpoint_every=2,
        ttt_enabled=False, eval_stride=64,
    )  # fmt: skip
    done = launch({**settings, "run_dir": folder / "run"}, folder)
    assert done.returncode == 0, done.stderr
    return settings, folder / "run"


def test_a_resumed_run_goes_on_with_the_same_sequences(whole, tmp_path):
    settings, run_dir = whole
    shutil.copytree(run_dir, tmp_path / "run")
    for name in ("final_model.pt", "final_model.int6.ptz", "scores.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    newest = max((tmp_path / "run/checkpoint").glob("step_*.pt"))
    newest.unlink()  # the one before it is left
    done = launch({**settings, "run_dir": tmp_path / "run"}, tmp_path)
    assert done.returncode == 0 and "resumed_from:" in done.stdout, done.stderr
    expected, found = losses(run_dir), losses(tmp_path / "run")
    assert found and found == {step: expected[step] for step in found}
    name = "final_model.int6.ptz"
    assert (tmp_path / "run" / name).read_bytes() == (run_dir / name).read_bytes()


def test_two_ranks_train_on_the_same_sequences(whole, tmp_path):
    settings, run_dir = whole
    done = launch({**settings, "run_dir": tmp_path / "run"}, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(run_dir), rel=1e-4)
