"""Options, fixtures and what they start; everything else that modules share is in helpers.py."""

import contextlib
import dataclasses
import os
import pydoc_data.topics
import signal
import tempfile

import numpy as np
import pytest
import torch
from helpers import AT_WRITE, Case, Children, TinyData, tiny_config, train_tokenizer

import train_gpt

# Two test processes with two threads each wait for each other at every barrier of OpenMP: tenfold.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture
def double():
    """float64 everywhere, constants made inside the model included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    topics = sorted(pydoc_data.topics.topics)
    texts = [pydoc_data.topics.topics[name][:6000] for name in topics]
    model = train_tokenizer(texts, folder / "tokenizer.model")
    ids = [np.array([train_gpt.BOS, *model.encode(text)]) for text in texts]
    train, val = np.concatenate(ids[:40]), np.concatenate(ids[40:])[:1500]
    half = len(train) // 2
    shards = dict(train_000000=train[:half], train_000001=train[half:], val_000000=val)
    for name, tokens in shards.items():
        train_gpt.write_shard(folder / f"fineweb_{name}.bin", tokens)
    return TinyData(folder, folder / "tokenizer.model")


@pytest.fixture
def runtime(tmp_path):
    """make(config, **environ) -> Runtime in a fresh directory, closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(config, **environ):
            run_dir = config.run_dir or str(tmp_path / "run")
            made = train_gpt.Runtime(dataclasses.replace(config, run_dir=run_dir), environ)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def case(runtime, tiny_data):
    """make(targets, **changes of the configuration) -> Case."""
    tokens = np.array(train_gpt.read_shard(tiny_data.data_path / "fineweb_val_000000.bin"))
    token_bytes = train_gpt.TokenBytes(tiny_data.tokenizer_path)

    def make(targets=300, **changes):
        config = tiny_config(**changes)
        stream = train_gpt.ValidationSet(tokens[: targets + 1], token_bytes)
        return Case(config, runtime(config), stream)

    return make


@pytest.fixture
def trainer(tiny_data, runtime):
    """make(**changes) -> Trainer on the tiny data, each in the test's own directory."""

    def make(**changes):
        config = tiny_config(**tiny_data.paths, **{"num_layers": 1, "xsa_last_n": 1, **changes})
        val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
        return train_gpt.Trainer(config, runtime(config), val)

    return make


# ---- runs in processes of their own ----


@pytest.fixture(scope="session")
def children(tiny_data):
    """One server of forked runs; their directories lie in memory, as each save is flushed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    options = dict(prefix="golf_", dir=memory, ignore_cleanup_errors=True)
    with tempfile.TemporaryDirectory(**options) as folder:
        made = Children(folder, tiny_data)
        yield made
        made.close()


@pytest.fixture(scope="session")
def whole(children):
    """Directory of an uninterrupted run."""
    return children.once("whole")[0]


@pytest.fixture(scope="session")
def whole_two(children):
    """Directory of an uninterrupted run of two ranks."""
    return children.once("whole_two", ranks=2)[0]


@pytest.fixture(scope="session")
def stopped(children):
    """(directory, output) of a run that SIGUSR1 stopped in training, at its sixth checkpoint."""
    at = f"step_ 6 {int(signal.SIGUSR1)}"
    return children.once("stopped", code=75, patch=AT_WRITE, at=at)
