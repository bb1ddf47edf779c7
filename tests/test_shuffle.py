"""SHUFFLE=1: random order, each sequence once per pass, a function of its number alone."""

import collections
import os

import numpy as np
import pytest
from helpers import tiny_config

import train_gpt
from train_gpt import DataError, ShuffledStream, TrainStream, write_shard

T = 8
SIZES = [400, 3, 9, 1000, 17]  # the second shard holds no sequence, the third exactly one


@pytest.fixture
def paths(tmp_path):
    """Shards of numbers that tell where they stand: 10,000 x shard + place."""
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(len(SIZES))]
    for i, (path, size) in enumerate(zip(paths, SIZES)):
        write_shard(path, 10_000 * i + np.arange(size))
    return paths


def stream(paths, seed=1):
    return ShuffledStream(paths, 65536, T, seed)


def sequences(made, first, count):
    return made.sequences(first, count).astype(int)


def pass_lengths(paths, passes):
    made = stream(paths)
    lengths = [made.num_sequences]
    for number in range(1, passes):
        made.begin_pass(number, 0)
        lengths.append(len(made.order))
    return lengths


def test_every_sequence_is_a_piece_of_one_shard_and_comes_once_per_pass(paths):
    """And what is left out of a pass is less than a sequence at either end of a shard."""
    made, first = stream(paths), 0
    for length in pass_lengths(paths, 4):
        rows = sequences(made, first, length)
        assert (np.diff(rows, axis=1) == 1).all()
        targets = collections.Counter(rows[:, 1:].flatten().tolist())
        assert set(targets.values()) == {1}
        for i, size in enumerate(SIZES):
            seen = sorted(t % 10_000 for t in targets if t // 10_000 == i)
            assert seen == list(range(seen[0], seen[-1] + 1)) if seen else size <= T
            assert not seen or (seen[0] <= T and size - seen[-1] <= T)
        first += length


def test_passes_differ_in_phase_and_order(paths):
    made, length = stream(paths), stream(paths).num_sequences
    assert not np.array_equal(sequences(made, 0, 50), sequences(made, length, 50))
    phases = [stream(paths, seed).phases.tolist() for seed in range(30)]
    assert {phase[3] for phase in phases} == set(range(T)) and {phase[2] for phase in phases} == {0}


def test_the_order_is_a_function_of_the_seed_and_the_number(paths):
    """Ranks, micro-batches and a resumed run read any part in any order, over passes too."""
    expected = sequences(stream(paths), 0, 600)
    assert len(expected) > sum(pass_lengths(paths, 3))
    made = stream(paths)
    for first, count in ((590, 10), (0, 3), (100, 300), (550, 50), (170, 20)):
        assert np.array_equal(sequences(made, first, count), expected[first : first + count])
    assert not np.array_equal(sequences(stream(paths, seed=2), 0, 600), expected)


def test_the_order_is_random(paths):
    """Sequences of the largest shard come at all times, and neighbours seldom follow each other."""
    made = stream(paths)
    rows = sequences(made, 0, made.num_sequences)[:, 0]
    places = rows[rows // 10_000 == 3] % 10_000
    assert (np.diff(places) == T).mean() < 0.1
    assert abs(np.corrcoef(np.arange(len(places)), places)[0, 1]) < 0.3
    half = rows[: len(rows) // 2]
    assert abs((half // 10_000 == 3).mean() - (rows // 10_000 == 3).mean()) < 0.1


def test_a_step_reads_its_own_bytes_shard_by_shard_from_front_to_back(tmp_path, monkeypatch):
    """No read-ahead, one opening per shard, rising offsets: what a network file system sees."""
    paths = [tmp_path / f"fineweb_train_{i:06d}.bin" for i in range(5)]
    for path in paths:
        write_shard(path, np.arange(50_000) % 1000)
    made = ShuffledStream(paths, 1000, 256, 1)
    reads, pread = [], os.pread

    def counted(file, size, offset):
        reads.append((os.readlink(f"/proc/self/fd/{file}"), offset, size))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    made.sequences(0, 64)
    assert reads == sorted(reads) and [size for _, _, size in reads] == [2 * 257] * 64


def test_shards_without_a_whole_sequence_are_refused(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(T))
    with pytest.raises(DataError, match=f"no training shard has a sequence of TRAIN_SEQ_LEN={T} "):
        stream([path])
    write_shard(path, np.arange(T + 1))
    assert stream([path]).sequences(0, 3).tolist() == [list(range(T + 1))] * 3


def test_the_switch_chooses_the_stream(paths):
    folder = str(paths[0].parent)
    plain = train_gpt.open_train_stream(tiny_config(data_path=folder))
    assert type(plain) is TrainStream and plain.seq_len == 64
    shuffled = train_gpt.open_train_stream(tiny_config(data_path=folder, shuffle=True, seed=7))
    assert type(shuffled) is ShuffledStream and (shuffled.seq_len, shuffled.seed) == (64, 7)
