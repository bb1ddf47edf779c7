"""What the records of April 2026 added, against plain float64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    events,
    launch,
    plain_heads,
    plain_norm,
    random_batch,
    randomised,
    tiny_config,
)

import train_gpt

BOS = train_gpt.BOS
RECORD_0405 = {**train_gpt.PRESETS["record_0405"], "preset": "record_0405"}
RECORD_0409 = {**train_gpt.PRESETS["record_0409"], "preset": "record_0409"}


# Shapes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings, skips", [(RECORD_0405, 7), (RECORD_0409, 8)])
def test_skips_belong_to_visits_and_not_to_layers(settings, skips):
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**settings))
    assert model.skip_weights.shape == model.skip_gates.shape == (skips, 512)


@pytest.mark.parametrize(
    "settings, order",
    [
        (RECORD_0409, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]),
        (RECORD_0405, [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_the_published_orders_of_the_layers(settings, order):
    config = train_gpt.Config(**settings)
    assert train_gpt.layer_order(config, True) == order
    assert train_gpt.layer_order(config, False) == list(range(11))


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


def test_new_parts_start_where_they_change_nothing_or_as_published():
    model = train_gpt.GPT(tiny_config(smear_inputs=4, gate_inputs=4, skip_gates=True))
    for name in (
        "smear.proj.weight",
        "smear.scale",
        "skip_gates",
        "blocks.1.attn.attn_gate.weight",
    ):
        assert not model.state_dict()[name].any(), name
    assert "blocks.1.attn.attn_gate.bias" not in model.state_dict()
    ids, _ = random_batch(model.config)
    x = torch.randn(*ids.shape, 32)
    assert torch.equal(model.smear(x, ids), x)


# Reference ----------------------------------------------------------------------------------------
def reference_input(c, w, ids):
    """The stream before the first block, by a loop over positions."""
    x = w["tok_emb.weight"][ids]
    if c.embed_dim:
        x = x @ w["embed_in.weight"].T
    x = plain_norm(x)
    if not c.smear_enabled:
        return x
    out = [x[:, 0]]
    for t in range(1, ids.size(1)):
        gate = torch.sigmoid(x[:, t, : c.smear_inputs] @ w["smear.proj.weight"][0])
        inside = (ids[:, t] != BOS).to(x.dtype)
        out.append(x[:, t] + (w["smear.scale"] * gate * inside)[:, None] * x[:, t - 1])
    return torch.stack(out, 1)


def reference_attention(c, w, layer, x):
    """Attention of the records, with XSA and the sparse gate."""
    at = f"blocks.{layer}.attn."
    q, k, v = (x @ w[f"{at}{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
    gates = None
    if c.gated_attention:
        gates = x[..., : c.gate_inputs] @ w[f"{at}attn_gate.weight"].T
    heads = plain_heads(c, w[f"{at}q_gain"], q, k, v, True, gates)
    return heads @ w[f"{at}proj.weight"].T


def reference_mlp(w, layer, x):
    up = x @ w[f"blocks.{layer}.mlp.fc.weight"].T
    return torch.where(up > 0, up, 0.5 * up).square() @ w[f"blocks.{layer}.mlp.proj.weight"].T


def reference_hidden(c, w, ids, order):
    """Final states: the first half of `order` pushes its outputs, the rest pops before it runs."""
    x = x0 = reference_input(c, w, ids)
    skips, half = [], len(order) // 2
    for visit, layer in enumerate(order):
        at, scale = f"blocks.{layer}.", 1 / math.sqrt(layer + 1)
        if visit >= half and skips:
            skip = w["skip_weights"][visit - half] * skips.pop()
            if c.skip_gates:
                gate = torch.sigmoid(w["skip_gates"][visit - half])
                x = (1 - gate) * skip + gate * x
            else:
                x = x + skip
        h = w[f"{at}resid_mix"][0] * x + w[f"{at}resid_mix"][1] * x0
        attended = h + w[f"{at}attn_scale"] * reference_attention(
            c, w, layer, plain_norm(h) * scale
        )
        reads = h if layer >= c.num_layers - c.parallel_last_n else attended
        x = attended + w[f"{at}mlp_scale"] * reference_mlp(w, layer, plain_norm(reads) * scale)
        if visit < half:
            skips.append(x)
    return plain_norm(x)


def reference_loss(c, w, ids, targets, order):
    x = reference_hidden(c, w, ids, order)
    if c.embed_dim:
        x = x @ w["embed_out.weight"].T
    logits = c.logit_softcap * torch.tanh(x @ w["tok_emb.weight"].T / c.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


TRUNK = dict(
    nfm_enabled=False,
    num_layers=5,
    model_dim=48,
    rope_dims=4,
    xsa_last_n=5,
    logit_softcap=2.0,
    value_residual=False,
    gated_attention=False,
    bigram_vocab_size=0,
    smear_enabled=False,
)
LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
ALL = dict(
    LOOPS,
    skip_gates=True,
    parallel_last_n=3,
    smear_enabled=True,
    smear_inputs=6,
    gated_attention=True,
    gate_inputs=6,
    embed_dim=24,
)
VARIANTS = {
    "bare trunk": {},
    "loops": LOOPS,
    "one loop over the last layers": dict(num_loops=1, loop_start=3, loop_end=4),
    "loops from layer 0": dict(num_loops=1, loop_start=0, loop_end=4),
    "skip gates": dict(skip_gates=True),
    "parallel from layer 2": dict(parallel_last_n=3),
    "sparse attention gate": dict(gated_attention=True, gate_inputs=6),
    "smear gate by input": dict(smear_enabled=True, smear_inputs=6),
    "narrow embedding": dict(embed_dim=24),
    "everything": ALL,
}


@pytest.mark.parametrize("looped", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_plain_reference(variant, looped, double):
    config = tiny_config(**{**TRUNK, **VARIANTS[variant]})
    model = randomised(train_gpt.GPT(config, train_gpt.sdpa_attention))
    model.looped = looped
    order = list(range(5))
    if looped and config.num_loops:
        middle = order[config.loop_start : config.loop_end + 1]
        order = (
            order[: config.loop_start]
            + middle * (config.num_loops + 1)
            + order[config.loop_end + 1 :]
        )
    ids, targets = random_batch(config, 13)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_loss(config, weights, ids, targets, order)
    expected.backward()
    loss = model(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, param in model.named_parameters():
        assert_near(param.grad, weights[name].grad, 1e-9, 1e-7, name)


@pytest.mark.parametrize("variant", ["loops", "one loop over the last layers", "everything"])
def test_the_last_positions_alone_have_the_states_of_all(variant, double):
    model = randomised(train_gpt.GPT(tiny_config(**{**TRUNK, **VARIANTS[variant]})))
    ids, _ = random_batch(model.config, 30)
    with torch.no_grad():
        assert_near(model.hidden(ids, 7), model.hidden(ids)[:, -7:], 1e-10, 1e-10, variant)


def test_everything_is_causal_and_safe_at_the_start_of_a_document():
    model = randomised(train_gpt.GPT(tiny_config(**{**TRUNK, **ALL, "nfm_enabled": True}))).eval()
    ids, _ = random_batch(model.config, 37)
    changed = ids.clone()
    changed[:, 20:] = ids[:, 20:].flip(1)
    with torch.no_grad():
        assert torch.equal(model.hidden(changed)[:, :20], model.hidden(ids)[:, :20])
        row = torch.tensor([[5, 9, BOS, 7]])
        other = torch.tensor([[5, 8, BOS, 7]])
        assert torch.equal(model.embed(row)[:, 2:], model.embed(other)[:, 2:])


@pytest.mark.slow
def test_the_record_of_0409_trains_at_full_size():
    """One pass of 2,048 tokens forward and backward through 17 visits: every parameter learns."""
    torch.manual_seed(0)
    small = dict(train_batch_tokens=2048, micro_batch_tokens=2048)
    config = train_gpt.Config(**RECORD_0409, **small)
    model = train_gpt.GPT(config, train_gpt.sdpa_attention)
    for block in model.blocks:  # a fresh projection is zero and lets nothing through
        torch.nn.init.orthogonal_(block.attn.proj.weight)
        torch.nn.init.orthogonal_(block.mlp.proj.weight)
    ids, targets = random_batch(config, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(8192), abs=0.3)
    for name, param in model.named_parameters():
        assert torch.isfinite(param.grad).all() and param.grad.any(), name


# The switch ---------------------------------------------------------------------------------------
def test_both_orders_stay_compiled():
    model = train_gpt.GPT(tiny_config(**{**TRUNK, **LOOPS}))
    ids, targets = random_batch(model.config, 12)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=keep)
    losses = {}
    for looped in (False, True, False, True):
        model.looped = looped
        losses.setdefault(looped, set()).add(compiled(ids, targets).item())
    assert len(graphs) == 2
    assert all(len(values) == 1 for values in losses.values())


def trained(runtime, tiny_data, run_dir, watch, **changes):
    """A Trainer after its run; `watch` receives model.looped of every step."""
    paths = dict(data_path=str(tiny_data.data_path), tokenizer_path=str(tiny_data.tokenizer_path))
    config = tiny_config(
        **{
            **paths,
            **LOOPS,
            "num_layers": 4,
            "loop_at": 0.5,
            "checkpoint_every": 1,
            "run_dir": str(run_dir),
            **changes,
        }
    )
    machine = runtime(config)
    val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    trainer = train_gpt.Trainer(config, machine, val)
    trainer.announce()
    one_step = trainer.one_step

    def watched():
        watch.append(trainer.model.looped)
        one_step()

    trainer.one_step = watched
    try:
        trainer.run()
    finally:
        machine.close()
    return trainer


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_resumed_on_either_side_of_the_switch_is_the_same_run(
    stop, runtime, tiny_data, tmp_path
):
    whole, looped, rest = tmp_path / "whole", [], []
    trainer = trained(runtime, tiny_data, whole, looped)
    assert looped == [False, False, False, True, True, True]
    again = tmp_path / "again"
    early = trained_until(runtime, tiny_data, again, stop)
    assert early == [False, False, False, True][:stop]
    resumed = trained(runtime, tiny_data, again, rest)
    assert rest == looped[stop:]
    for mine, other in zip(resumed.model.parameters(), trainer.model.parameters()):
        assert torch.equal(mine, other)


def test_the_log_says_when_layers_are_looped_and_in_which_order(runtime, tiny_data, tmp_path):
    trained(runtime, tiny_data, tmp_path / "run", [])
    log = (tmp_path / "run" / "train.log").read_text()
    orders = [line for line in log.splitlines() if line.startswith("layer_order ")]
    assert orders == [
        "layer_order step:0 visits:4 layers:0 1 2 3",
        "layer_order step:3 visits:8 layers:0 1 2 1 2 1 2 3",
    ]


@pytest.mark.parametrize("loop_at,warned", [(0.8, False), (0.9, True)])
def test_a_run_that_never_loops_what_every_score_loops_says_so(
    loop_at, warned, runtime, tiny_data, tmp_path, capsys
):
    looped = []
    trained(runtime, tiny_data, tmp_path / "run", looped, iterations=6, loop_at=loop_at)
    assert ("no step of this run loops layers" in capsys.readouterr().out) is warned
    assert any(looped) is not warned


def trained_until(runtime, tiny_data, run_dir, stop):
    """model.looped of the first `stop` steps of the same run, which ends there as by a kill."""
    looped = []

    class Killed(Exception):
        pass

    class Watch(list):
        def append(self, value):
            if len(looped) == stop:
                raise Killed
            looped.append(value)

    with pytest.raises(Killed):
        trained(runtime, tiny_data, run_dir, Watch())
    return looped


# Large vocabularies -------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_in_blocks_is_the_loss_of_all(reduction, monkeypatch, double):
    model = randomised(train_gpt.GPT(tiny_config(**TRUNK)))
    hidden, targets = torch.randn(2, 21, 48), torch.randint(384, (2, 21))

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
    """What every record does on a GPU: the blocks are computed again inside the compiled graph."""
    monkeypatch.setattr(train_gpt, "LOGITS_AT_ONCE", 8 * 384)
    model = randomised(train_gpt.GPT(tiny_config(**TRUNK)))
    hidden, targets = torch.randn(2, 21, 48), torch.randint(384, (2, 21))
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
        model = train_gpt.GPT(tiny_config(**{**TRUNK, "vocab_size": vocab_size}))
        hidden, targets = torch.randn(2, 64, 48, requires_grad=True), torch.randint(384, (2, 64))
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        with hooks:
            model.cross_entropy(hidden, targets)
        return max(size for size in sizes if size != model.tok_emb.weight.numel())

    assert kept(4096) <= kept(512)


def test_a_vocabulary_within_the_limit_is_one_block():
    """base_7k's micro-batch at 1024 pieces: nothing is computed twice."""
    config = train_gpt.Config()
    assert train_gpt.LOGITS_AT_ONCE // config.vocab_size >= config.micro_batch_tokens
    assert config.micro_batch_tokens > train_gpt.LOGITS_AT_ONCE // 8192


# The whole program --------------------------------------------------------------------------------
@pytest.mark.parametrize("quantizer", ["lite", "gptq"])
def test_a_run_with_every_part_trains_packs_passes_the_audit_and_scores(
    quantizer, tiny_data, tmp_path
):
    parts = {
        **ALL,
        "num_layers": 4,
        "loop_end": 2,
        "embed_dim": 16,
        "bigram_vocab_size": 0,
        "nfm_enabled": True,
        "e2e_ttt_enabled": True,
        "late_qat_threshold": 0.9,
        "slot": "causal",
    }
    settings = {
        **tiny_data.settings,
        **parts,
        "quantizer": quantizer,
        "audit": True,
        "run_dir": tmp_path / "run",
    }
    result = launch(settings, tmp_path)
    assert result.returncode == 0, result.stderr
    labels = {event["label"] for event in events(tmp_path / "run", "score")}
    assert any("ttt" in label for label in labels), labels


@pytest.fixture(scope="module")
def by_ranks(tiny_data, tmp_path_factory):
    """get(ranks) -> (losses by step, scores by label) of a run with every part, once per world."""
    kept = {}

    def get(ranks):
        if ranks not in kept:
            folder = tmp_path_factory.mktemp(f"ranks{ranks}")
            parts = {**ALL, "num_layers": 4, "embed_dim": 16, "iterations": 4, "loop_at": 0.5}
            settings = {
                **tiny_data.settings,
                **parts,
                "dtype": "float32",
                "run_dir": folder / "run",
            }
            result = launch(settings, folder, ranks)
            assert result.returncode == 0, result.stderr
            losses = {
                event["step"]: event["train_loss"] for event in events(folder / "run", "step")
            }
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
