"""Looped layers, large vocabularies and whole runs with all that the records of April 2026 added.

Their formulas are in test_model.py's reference.
"""

import signal

import pytest
import torch
from helpers import at_step, events, outcome, randomised, run_main, tiny_config

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


# ---- the switch to looped layers ----

LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
LOOPED_RUN = dict(
    LOOPS, num_layers=4, loop_at=0.5, checkpoint_every=1, ttt_enabled=False, eval_stride=64
)


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


@pytest.mark.parametrize("reduction, compiling", [("mean", False), ("none", False), ("mean", True)])
def test_the_loss_in_blocks_is_the_loss_of_all(reduction, compiling, monkeypatch, double):
    """Compiled, the blocks are computed again inside the graph: every record does so on a GPU."""
    model = randomised(train_gpt.GPT(tiny_config(nfm_enabled=False)))
    hidden, targets = torch.randn(2, 21, 32), torch.randint(384, (2, 21))

    def result(cross_entropy):
        model.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = cross_entropy(states, targets, reduction)
        (loss * torch.arange(1, loss.numel() + 1).view_as(loss)).sum().backward()
        return loss, states.grad, model.tok_emb.weight.grad

    whole = result(model.cross_entropy)
    monkeypatch.setattr(train_gpt, "LOGITS_AT_ONCE", 8 * 384)  # 42 positions in blocks of 8
    cross_entropy = model.cross_entropy
    if compiling:
        torch._dynamo.reset()
        options = dict(fullgraph=True, dynamic=False, backend="aot_eager")
        cross_entropy = torch.compile(cross_entropy, **options)
    for mine, expected in zip(result(cross_entropy), whole):
        torch.testing.assert_close(mine, expected, atol=1e-12, rtol=1e-10)


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


@pytest.mark.parametrize("quantizer", ["lite", "gptq"])
def test_a_run_with_every_part_trains_packs_passes_the_audit_and_scores(
    quantizer, tiny_data, tmp_path
):
    settings = dict(
        tiny_data.settings,
        **LOOPS,
        num_layers=4,
        skip_gates=True,
        parallel_last_n=3,
        smear_inputs=6,
        gate_inputs=6,
        embed_dim=16,
        bigram_vocab_size=0,
        e2e_ttt_enabled=True,
        late_qat_threshold=0.9,
        slot="causal",
        quantizer=quantizer,
        audit=True,
    )
    result = run_main(tmp_path / "run", **settings)
    assert result.code == 0, result.err
    labels = {event["label"] for event in events(tmp_path / "run", "score")}
    assert any("ttt" in label for label in labels), labels
