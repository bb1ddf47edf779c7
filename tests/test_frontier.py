"""Looped layers, large vocabularies and whole runs with all that the records of April 2026 added.

Their formulas are in test_model.py's reference.
"""

import signal

import pytest
import torch
from helpers import (
    at_step,
    events,
    launch,
    outcome,
    random_batch,
    randomised,
    run_main,
    tiny_config,
)

import train_gpt

RECORD_0405 = {**train_gpt.PRESETS["record_0405"], "preset": "record_0405"}
RECORD_0409 = {**train_gpt.PRESETS["record_0409"], "preset": "record_0409"}


@pytest.mark.parametrize(
    "settings, order",
    [
        (RECORD_0409, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
        (RECORD_0405, [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_the_published_orders_of_the_layers_and_a_skip_for_every_other_visit(settings, order):
    config = train_gpt.Config(**settings)
    assert train_gpt.layer_order(config, True) == order
    assert train_gpt.layer_order(config, False) == list(range(11))
    with torch.device("meta"):
        model = train_gpt.GPT(config)
    assert model.skip_weights.shape == model.skip_gates.shape == (len(order) // 2, 512)


def test_a_looped_layer_counts_at_each_of_its_visits():
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**RECORD_0409))
    block = sum(param.numel() for param in model.blocks[3].parameters())
    model.looped = False
    once = train_gpt.flops_per_token(model)
    assert once == 6 * 35_944_536 + 12 * 11 * 512 * 2048
    model.looped = True
    assert train_gpt.flops_per_token(model) - once == 6 * (6 * block + 2 * 6 * 512 * 2048)


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(num_loops=1, loop_start=2, loop_end=1), ("LOOP_START=2", "LOOP_END=1")),
        (dict(num_loops=1, loop_start=1, loop_end=3), ("LOOP_END=3", "NUM_LAYERS=3")),
        (dict(parallel_last_n=4), ("PARALLEL_LAST_N=4", "NUM_LAYERS=3")),
        (dict(embed_dim=33), ("EMBED_DIM=33", "MODEL_DIM=32")),
        (dict(smear_inputs=33), ("SMEAR_INPUTS=33", "MODEL_DIM=32")),
        (dict(gate_inputs=33), ("GATE_INPUTS=33", "MODEL_DIM=32")),
        (dict(bigram_vocab_size=1), ("BIGRAM_VOCAB_SIZE=1",)),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, names):
    with pytest.raises(train_gpt.ConfigError) as error:
        tiny_config(**changes)
    assert all(name in str(error.value) for name in names)


# ---- the switch to looped layers ----

LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
LOOPED_RUN = dict(
    LOOPS, num_layers=4, loop_at=0.5, checkpoint_every=1, ttt_enabled=False, eval_stride=64
)


def test_both_orders_stay_compiled():
    model = randomised(train_gpt.GPT(tiny_config(**LOOPS, num_layers=4)))
    ids, targets = random_batch(model.config, 12)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, dynamic=False, backend=keep)
    losses = {}
    for looped in (False, True, False, True):
        model.looped = looped
        losses.setdefault(looped, set()).add(compiled(ids, targets).item())
    assert len(graphs) == 2
    assert all(len(values) == 1 for values in losses.values()) and losses[False] != losses[True]


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_resumed_on_either_side_of_the_switch_is_the_same_run(step, children):
    whole, _ = children.once("looped", **LOOPED_RUN)
    again = children.new("looped_again")
    kill = at_step(step, "os.kill(os.getpid(), 9)")
    children.finish(again, patch=kill, code=-signal.SIGKILL, **LOOPED_RUN)
    assert "resumed_from:" in children.finish(again, **LOOPED_RUN).stdout()
    assert outcome(again) == outcome(whole)


def test_the_log_says_when_layers_are_looped_and_in_which_order(children):
    _, out = children.once("looped", **LOOPED_RUN)
    assert [line for line in out.splitlines() if line.startswith("layer_order ")] == [
        "layer_order step:0 visits:4 layers:0 1 2 3",
        "layer_order step:6 visits:8 layers:0 1 2 1 2 1 2 3",
    ]
    assert "no step of this run loops layers" not in out


def test_a_run_that_never_loops_what_every_score_loops_says_so(tiny_data, tmp_path):
    settings = {**tiny_data.settings, **LOOPED_RUN, "loop_at": 0.9, "iterations": 2}
    assert "no step of this run loops layers" in run_main(tmp_path / "run", **settings).out


# ---- large vocabularies ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_in_blocks_is_the_loss_of_all(reduction, monkeypatch, double):
    model = randomised(train_gpt.GPT(tiny_config(nfm_enabled=False)))
    hidden, targets = torch.randn(2, 21, 32), torch.randint(384, (2, 21))

    def result():
        model.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = model.cross_entropy(states, targets, reduction)
        (loss * torch.arange(1, loss.numel() + 1).view_as(loss)).sum().backward()
        return loss, states.grad, model.tok_emb.weight.grad

    whole = result()
    monkeypatch.setattr(train_gpt, "LOGITS_AT_ONCE", 8 * 384)  # 42 positions in blocks of 8
    for mine, expected in zip(result(), whole):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-10)


def test_the_loss_in_blocks_compiles_to_one_graph(monkeypatch):
    """The blocks are computed again inside the compiled graph: every record does so on a GPU."""
    monkeypatch.setattr(train_gpt, "LOGITS_AT_ONCE", 8 * 384)
    model = randomised(train_gpt.GPT(tiny_config(nfm_enabled=False)))
    hidden, targets = torch.randn(2, 21, 32), torch.randint(384, (2, 21))
    torch._dynamo.reset()
    compiled = torch.compile(
        model.cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    results = []
    for loss_of in (model.cross_entropy, compiled):
        model.zero_grad()
        loss = loss_of(hidden, targets)
        loss.backward()
        results.append((loss, model.tok_emb.weight.grad))
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected)


def test_memory_kept_for_the_gradient_does_not_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(train_gpt, "LOGITS_AT_ONCE", 4096)

    def kept(vocab_size):
        model = train_gpt.GPT(tiny_config(vocab_size=vocab_size))
        hidden, targets = torch.randn(2, 64, 32, requires_grad=True), torch.randint(384, (2, 64))
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            model.cross_entropy(hidden, targets)
        return max(size for size in sizes if size != model.tok_emb.weight.numel())

    assert kept(4096) <= kept(512)


def test_a_vocabulary_of_1024_is_one_block_and_nothing_is_computed_twice():
    config = train_gpt.Config()
    assert train_gpt.LOGITS_AT_ONCE // config.vocab_size >= config.micro_batch_tokens
    assert config.micro_batch_tokens > train_gpt.LOGITS_AT_ONCE // 8192


# ---- whole runs ----

ALL = dict(
    LOOPS,
    num_layers=4,
    skip_gates=True,
    parallel_last_n=3,
    smear_enabled=True,
    smear_inputs=6,
    gated_attention=True,
    gate_inputs=6,
    embed_dim=16,
)


@pytest.mark.parametrize("quantizer", ["lite", "gptq"])
def test_a_run_with_every_part_trains_packs_passes_the_audit_and_scores(
    quantizer, tiny_data, tmp_path
):
    parts = dict(bigram_vocab_size=0, e2e_ttt_enabled=True, late_qat_threshold=0.9, slot="causal")
    settings = {**tiny_data.settings, **ALL, **parts, "quantizer": quantizer, "audit": True}
    result = run_main(tmp_path / "run", **settings)
    assert result.code == 0, result.err
    labels = {event["label"] for event in events(tmp_path / "run", "score")}
    assert any("ttt" in label for label in labels), labels


@pytest.fixture(scope="module")
def by_ranks(tiny_data, tmp_path_factory):
    """get(ranks) -> (losses by step, scores by label) of a run with every part, once per world."""
    kept = {}

    def get(ranks):
        if ranks not in kept:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            changes = dict(ALL, iterations=4, loop_at=0.5, dtype="float32", run_dir=folder / "run")
            result = launch({**tiny_data.settings, **changes}, folder, ranks)
            assert result.returncode == 0, result.stderr
            losses = {e["step"]: e["train_loss"] for e in events(folder / "run", "step")}
            scores = {e["label"]: e["val_bpb"] for e in events(folder / "run", "score")}
            kept[ranks] = losses, scores
        return kept[ranks]

    return get


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_scores_do_not_depend_on_the_ranks(ranks, by_ranks):
    losses, scores = by_ranks(ranks)
    expected_losses, expected_scores = by_ranks(1)
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert scores == pytest.approx(expected_scores, rel=1e-4)
    assert len(scores) >= 3
