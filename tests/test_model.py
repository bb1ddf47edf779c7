"""The trunk against a plain, slow reference that reads the state-dict, and properties no reference
shows."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_near,
    count,
    plain_heads,
    plain_norm,
    random_batch,
    randomised,
    tiny_config,
)

import train_gpt

BOS = train_gpt.BOS
REFINERS = {
    "base": dict(nfm_enabled=False),
    "nfm": dict(nfm_enabled=True),
    "flow": dict(nfm_enabled=False, flow_enabled=True),
    "ttt": dict(nfm_enabled=False, e2e_ttt_enabled=True),
    "all": dict(nfm_enabled=True, flow_enabled=True, e2e_ttt_enabled=True, ve_dim=8),
}


def preset_model(name, **changes):
    """The preset at full size, without memory."""
    with torch.device("meta"):
        return train_gpt.GPT(
            train_gpt.Config(**{**train_gpt.PRESETS[name], "preset": name, **changes})
        )


# --------------------------------------------------------------------------------- parameter counts
PUBLISHED = {  # docs/REFERENCE.md §3; slot_11l's figure is at MLP_MULT=3
    "nfm_7k": ({}, 27_530_952),
    "base_7k": ({}, 27_137_223),
    "base_20k": ({}, 27_137_223),
    "flow_20k": ({}, 27_235_848),
    "ttt_linear_10l": ({}, 25_749_398),
    "ttt_linear_11l": ({}, 28_110_750),
    "slot_11l": (dict(mlp_mult=3.0), 26_928_220),
    "record_0405": ({}, 35_943_512),
    "record_0409": ({}, 35_944_536),
}
OURS = {"demo", "frontier_1024", "frontier_8192"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_exactly_the_published_number_of_parameters(preset):
    changes, parameters = PUBLISHED[preset]
    assert count(preset_model(preset, **changes)) == parameters


def test_every_preset_but_our_own_has_a_published_count():
    assert {*PUBLISHED, *OURS} == set(train_gpt.PRESETS)


@pytest.mark.parametrize(
    "hidden, parameters", [(128, 27_334_088), (256, 27_530_952), (512, 27_924_680)]
)
def test_the_ablations_of_the_flow_matcher_have_the_published_counts(hidden, parameters):
    assert count(preset_model("nfm_7k", nfm_hidden_dim=hidden)) == parameters


def test_each_part_of_the_base_has_the_published_count():
    model = preset_model("base_7k")
    block = model.blocks[3]
    assert count(model.tok_emb) == 524_288
    assert count(model.bigram) == 589_825
    assert count(model.smear) == 512
    assert model.skip_weights.shape == (5, 512)
    matrices = [p for name, p in block.named_parameters() if p.dim() == 2 and min(p.shape) > 8]
    assert sum(p.numel() for p in matrices) == 786_432 + 1_572_864
    assert count(block) - sum(p.numel() for p in matrices) == 8 + 512 + 512 + 1_024 + 4_104 + 2


@pytest.mark.parametrize(
    "preset, changes, difference",
    [
        ("base_7k", dict(nfm_enabled=True), 393_729),
        ("base_7k", dict(flow_enabled=True), 98_625),
        ("base_7k", dict(e2e_ttt_enabled=True), 1_083_905),
        ("base_7k", dict(gated_attention=False), -11 * 4_104),
        ("base_7k", dict(value_residual=False), -22),
        ("base_7k", dict(xsa_last_n=4), 0),
        ("base_7k", dict(bigram_vocab_size=1536), -(4096 - 1536) * 128),
        ("base_7k", dict(ve_dim=128), 1024 * 128 + 128 * 256 + 1 + 2),
        ("slot_11l", dict(mlp_mult=3.0), 11 * 2 * 512 * (1536 - 1432)),
    ],
)
def test_each_switch_adds_exactly_its_parameters(preset, changes, difference):
    assert count(preset_model(preset, **changes)) - count(preset_model(preset)) == difference


def test_an_mlp_of_2_8_has_1432_hidden_units():
    assert preset_model("slot_11l").blocks[0].mlp.fc.weight.shape == (1432, 512)


def test_the_state_dict_has_the_documented_names():
    everything = dict(nfm_enabled=True, gated_attention=True, value_residual=True)
    names = set(preset_model("ttt_linear_11l", **everything).state_dict())
    block = {
        f"blocks.10.{name}"
        for name in (
            "attn.c_q.weight",
            "attn.c_k.weight",
            "attn.c_v.weight",
            "attn.proj.weight",
            "attn.q_gain",
            "attn.vr_lambda",
            "attn.attn_gate.weight",
            "attn.attn_gate.bias",
            "mlp.fc.weight",
            "mlp.proj.weight",
            "attn_scale",
            "mlp_scale",
            "resid_mix",
        )
    }
    assert {n for n in names if n.startswith("blocks.10.")} == block
    parts = {"tok_emb", "bigram", "smear", "blocks", "skip_weights", "ve", "nfm", "flow", "ttt"}
    assert {n.split(".")[0] for n in names} == parts
    assert {"tok_emb.weight", "smear.gate", "skip_weights"} < names


# ------------------------------------------------------------------------------------- fresh models
@pytest.mark.parametrize("preset", ["nfm_7k", "ttt_linear_10l", "slot_11l"])
def test_a_fresh_model_of_full_size_knows_nothing(preset):
    config = train_gpt.Config(**{**train_gpt.PRESETS[preset], "preset": preset})
    model = train_gpt.GPT(config).eval()
    ids, targets = random_batch(config, 96)
    with torch.no_grad():
        assert model(ids, targets).item() == pytest.approx(math.log(1024), abs=0.05)


@pytest.mark.parametrize("refiner", REFINERS)
def test_a_fresh_small_model_knows_nothing(refiner):
    config = tiny_config(**REFINERS[refiner])
    model = train_gpt.GPT(config).eval()
    with torch.no_grad():
        assert model(*random_batch(config)).item() == pytest.approx(
            math.log(config.vocab_size), abs=0.05
        )


def test_the_training_loss_of_a_fresh_model_is_cross_entropy_plus_the_flow_term():
    config = tiny_config(nfm_loss_weight=0.3)
    model = train_gpt.GPT(config).train()
    ids, targets = random_batch(config)
    keys = torch.tensor([5, 6])
    z, _ = train_gpt.draw_noise(keys, ids.size(1), config.model_dim)
    with torch.no_grad():
        flow = (model.hidden(ids) - z).square().mean()  # a fresh velocity is 0
        cross_entropy = model(ids, targets, keys) - 0.3 * flow
    assert cross_entropy.item() == pytest.approx(math.log(config.vocab_size), abs=0.05)


def test_a_fresh_model_starts_as_the_reference_says():
    model = train_gpt.GPT(tiny_config(ve_dim=8, model_dim=64))
    state = model.state_dict()
    values = {
        "skip_weights": 1.0,
        "smear.gate": 0.0,
        "bigram.scale": 0.05,
        "bigram.embed.weight": 0.0,
        "ve.scale": 0.1,
        "ve.layer_scales": 1.0,
        "ve.proj.weight": 0.0,
        "nfm.gate": -5.0,
        "nfm.out.weight": 0.0,
    }
    per_block = {
        "attn.q_gain": 1.5,
        "attn.vr_lambda": 0.5,
        "attn.attn_gate.weight": 0.0,
        "attn.attn_gate.bias": 4.0,
        "attn.proj.weight": 0.0,
        "mlp.proj.weight": 0.0,
        "attn_scale": 1.0,
        "mlp_scale": 1.0,
    }
    values.update(
        (f"blocks.{i}.{name}", value) for i in range(3) for name, value in per_block.items()
    )
    for name, value in values.items():
        assert torch.equal(state[name], torch.full_like(state[name], value)), name
    for i in range(3):
        assert torch.equal(
            state[f"blocks.{i}.resid_mix"], torch.tensor([[1.0], [0.0]]).expand(2, 64)
        )
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
            assert_orthogonal(state[f"blocks.{i}.{name}.weight"])
    assert_orthogonal(state["bigram.proj.weight"])
    assert state["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.03)
    assert state["ve.embed.weight"].std().item() == pytest.approx(0.01, rel=0.08)


def assert_orthogonal(weight):
    narrow = weight if weight.size(0) <= weight.size(1) else weight.T
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(len(narrow)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- reference
def bigram_rows(ids, rows):
    """The hash with the wrap-around of 32-bit integers, position 0 in the last row."""
    t = ids.numpy().astype(np.int32)
    out = np.full(t.shape, rows - 1, np.int64)
    out[:, 1:] = np.mod(
        (np.int32(36313) * t[:, 1:]) ^ (np.int32(27191) * t[:, :-1]), np.int32(rows - 1)
    )
    return torch.from_numpy(out)


def reference_attention(c, w, layer, x, v0, ve):
    """(B, T, D) and this layer's values."""
    at = f"blocks.{layer}.attn."
    q, k, own = (x @ w[f"{at}{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
    v = own = own + ve
    if c.value_residual:  # layer 0 mixes its values with themselves
        mix = w[f"{at}vr_lambda"]
        v = mix[0] * (own if v0 is None else v0) + mix[1] * own
    gates = None
    if c.gated_attention:
        gates = x @ w[f"{at}attn_gate.weight"].T + w[f"{at}attn_gate.bias"]
    is_exclusive = layer >= c.num_layers - c.xsa_last_n
    heads = plain_heads(c, w[f"{at}q_gain"], q, k, v, is_exclusive, gates)
    return heads @ w[f"{at}proj.weight"].T, own


def reference_embedding(c, w, ids):
    bigram = (
        w["bigram.embed.weight"][bigram_rows(ids, c.bigram_vocab_size)] @ w["bigram.proj.weight"].T
    )
    x = plain_norm(w["tok_emb.weight"][ids] + bigram * w["bigram.scale"])
    gate, smeared = torch.sigmoid(w["smear.gate"]), []
    for t in range(ids.size(1)):
        before = torch.zeros_like(x[:, t]) if t == 0 else x[:, t - 1] * (ids[:, t] != BOS)[:, None]
        smeared.append((1 - gate) * x[:, t] + gate * before)
    return torch.stack(smeared, 1)


def reference_hidden(c, w, ids):
    x = x0 = reference_embedding(c, w, ids)
    v0, skips = None, []
    for i in range(c.num_layers):
        at, scale = f"blocks.{i}.", 1 / math.sqrt(i + 1)
        decoder = i - c.num_layers // 2
        if 0 <= decoder < c.num_layers // 2:
            x = x + w["skip_weights"][decoder] * skips.pop()
        ve, late = 0.0, i - (c.num_layers - c.ve_last_n)
        if c.ve_dim and late >= 0:
            ve = w["ve.embed.weight"][ids] @ w["ve.proj.weight"].T
            ve = ve * w["ve.scale"] * w["ve.layer_scales"][late]
        h = w[f"{at}resid_mix"][0] * x + w[f"{at}resid_mix"][1] * x0
        y, v = reference_attention(c, w, i, plain_norm(h) * scale, v0, ve)
        v0 = v if v0 is None else v0
        y = h + w[f"{at}attn_scale"] * y
        up = plain_norm(y) * scale @ w[f"{at}mlp.fc.weight"].T
        squared = torch.where(up > 0, up, 0.5 * up).square()
        x = y + w[f"{at}mlp_scale"] * (squared @ w[f"{at}mlp.proj.weight"].T)
        if i < c.num_layers // 2:
            skips.append(x)
    return plain_norm(x)


def reference_logits(c, w, ids):
    return c.logit_softcap * torch.tanh(
        reference_hidden(c, w, ids) @ w["tok_emb.weight"].T / c.logit_softcap
    )


# 24-wide heads rotate their first 16 dimensions; a low softcap makes its curvature visible.
TRUNK = dict(
    nfm_enabled=False,
    num_layers=5,
    model_dim=96,
    rope_dims=16,
    xsa_last_n=5,
    mlp_mult=1.5,
    logit_softcap=2.0,
)
VARIANTS = {
    "all features": {},
    "even number of layers": dict(num_layers=4, xsa_last_n=4),
    "one layer": dict(num_layers=1),
    "no gate": dict(gated_attention=False),
    "no value residual": dict(value_residual=False),
    "XSA on the last 4": dict(xsa_last_n=4),
    "no XSA": dict(xsa_last_n=0),
    "value embedding": dict(ve_dim=12),
    "value embedding in all layers": dict(ve_dim=12, ve_last_n=5),
    "MLP of 2.8": dict(mlp_mult=2.8),
    "one head per value": dict(num_kv_heads=4),
    "one value for all heads": dict(num_kv_heads=1),
    "another base of the angles": dict(rope_base=100.0),
    "the published #549 base": dict(
        gated_attention=False, value_residual=False, xsa_last_n=4, ve_dim=12, mlp_mult=2.8
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_logits_and_gradients_equal_the_plain_reference(variant, double):
    config = tiny_config(**{**TRUNK, **VARIANTS[variant]})
    model = randomised(train_gpt.GPT(config, train_gpt.sdpa_attention))
    ids, targets = random_batch(config, 13)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_logits(config, weights, ids)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    torch.testing.assert_close(model.logits(model.hidden(ids)), expected, atol=1e-9, rtol=1e-9)
    loss = model(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-9)
    for name, param in model.named_parameters():
        gradient = weights[name].grad
        if param.numel() == 0:  # a single layer has no skip
            continue
        assert gradient.abs().max() > 1e-9, f"the reference does not depend on {name}"
        assert_near(param.grad, gradient, 1e-9, 1e-7, name)


def test_the_bigram_hash_wraps_around_like_32_bit_integers(double):
    """Ids from 59,138 on overflow; a hash in 64 bits would give another model from the same
    weights."""
    config = tiny_config(**{**TRUNK, "num_layers": 1, "vocab_size": 65536, "bigram_vocab_size": 61})
    model = randomised(train_gpt.GPT(config))
    ids = torch.randint(58_000, 65_536, (2, 16))
    assert not torch.equal(
        bigram_rows(ids, 61)[:, 1:], (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % 60
    )
    with torch.no_grad():
        expected = reference_hidden(config, model.state_dict(), ids)
        torch.testing.assert_close(model.hidden(ids), expected, atol=1e-9, rtol=1e-9)


def test_forward_is_the_cross_entropy_of_logits_of_hidden():
    config = tiny_config()
    model = randomised(train_gpt.GPT(config)).eval()
    ids, targets = random_batch(config)
    with torch.no_grad():
        by_hand = F.cross_entropy(model.logits(model.hidden(ids)).flatten(0, 1), targets.flatten())
        assert torch.equal(model(ids, targets), by_hand)


@pytest.mark.parametrize("attend", [train_gpt.sdpa_attention, train_gpt.sdpa_attention])
def test_bfloat16_autocast_stays_close_to_float32_with_float32_logits(attend):
    config = tiny_config(**REFINERS["all"])
    model = randomised(train_gpt.GPT(config, attend)).eval()
    ids, targets = random_batch(config, 60)
    exact = gradients(model, ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, ids, targets)
        assert model.logits(model.hidden(ids)).dtype == torch.float32
    assert rounded["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.01)
    together = [torch.cat([g.flatten() for g in gs.values()]) for gs in (exact, rounded)]
    assert F.cosine_similarity(*together, dim=0) > 0.99


def gradients(model, ids, targets, noise=None, loss=None):
    """{"loss" and every parameter: value or gradient} of one backward pass by `loss`, else by the
    model."""
    model.zero_grad()
    value = (model if loss is None else loss)(ids, targets, noise)
    value.backward()
    return {
        "loss": value.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


# --------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("attend", [train_gpt.sdpa_attention, train_gpt.sdpa_attention])
@pytest.mark.parametrize("refiner", REFINERS)
def test_outputs_before_a_changed_token_stay_bit_identical(refiner, attend):
    config = tiny_config(**REFINERS[refiner])
    model = randomised(train_gpt.GPT(config, attend)).eval()
    ids, _ = random_batch(config, 37)
    with torch.no_grad():
        before = model.logits(model.hidden(ids))
        for t in (0, 1, 15, 16, 17, 30, 36):  # around and inside TTT-Linear's mini-batches of 16
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 7) % config.vocab_size
            after = model.logits(model.hidden(changed))
            assert torch.equal(after[:, :t], before[:, :t])
            assert torch.equal(after[1], before[1]), "the other sequence of the batch must not move"
            assert not torch.equal(after[0, t:], before[0, t:])


def test_causality_holds_under_bfloat16_autocast():
    config = tiny_config(**REFINERS["all"])
    model = randomised(train_gpt.GPT(config, train_gpt.sdpa_attention)).eval()
    ids, _ = random_batch(config, 37)
    changed = ids.clone()
    changed[:, 20:] = ids[:, 20:].flip(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.hidden(changed)[:, :20], model.hidden(ids)[:, :20])


@pytest.mark.parametrize("refiner", REFINERS)
def test_outputs_do_not_depend_on_the_sequence_length_in_use(refiner, double):
    config = tiny_config(**REFINERS[refiner])
    model = randomised(train_gpt.GPT(config, train_gpt.sdpa_attention)).eval()
    ids, _ = random_batch(config, 50)
    with torch.no_grad():
        long = model.hidden(ids)
        for length in (1, 2, 16, 33):
            assert_near(
                model.hidden(ids[:, :length]), long[:, :length], 1e-10, 1e-10, f"length {length}"
            )


def test_a_document_start_resets_the_smear_gate():
    """With attention and the bigram table silent, the smear gate is the only path between
    neighbours."""
    config = tiny_config(nfm_enabled=False)
    model = randomised(train_gpt.GPT(config)).eval()
    with torch.no_grad():
        model.bigram.embed.weight.zero_()
        for block in model.blocks:
            block.attn_scale.zero_()
        states = {}
        for token in (BOS, 9):
            left, right = (
                model.hidden(torch.tensor([[5, before, token, 7]])) for before in (20, 30)
            )
            states[token] = (left[0, 2] - right[0, 2]).abs().max().item()
            assert torch.equal(left[0, 3], right[0, 3]), (
                "the gate reaches one token back, no further"
            )
    assert states[BOS] == 0
    assert states[9] > 1e-3


# ------------------------------------------------------------------------------- attention backends
def explicit_attention(q, k, v):
    """Softmax over an explicit mask, one head at a time. q (B, T, H, d), k and v (B, T, K, d)."""
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool).triu(1)
    heads, per_group = [], q.size(2) // k.size(2)
    for h in range(q.size(2)):
        scores = q[:, :, h] @ k[:, :, h // per_group].mT / math.sqrt(q.size(3))
        heads.append(
            torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v[:, :, h // per_group]
        )
    return torch.stack(heads, 2)


def attention_case(attend, length, kv_heads, dtype=torch.float64):
    """Output and gradients of one backend on inputs that depend on the arguments alone."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, out = (
        torch.randn(2, length, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    inputs = [(3 * x).to(dtype).requires_grad_() for x in (q, k, v)]
    y = attend(*inputs)
    y.backward(out.to(dtype))
    return [y.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 63, 255, 256, 257, 520])
@pytest.mark.parametrize("attend", [train_gpt.sdpa_attention, train_gpt.sdpa_attention])
def test_a_backend_gives_the_values_and_gradients_of_explicit_attention(attend, length, kv_heads):
    expected = attention_case(explicit_attention, length, kv_heads)
    for mine, plain in zip(attention_case(attend, length, kv_heads), expected):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-9)


def test_the_blocked_backward_is_accurate_in_bfloat16():
    """bfloat16 has 8 significant bits; a scale or a block applied twice would be off by far more
    than 5 %."""
    exact = attention_case(explicit_attention, 300, 2)
    for mine, plain in zip(attention_case(train_gpt.sdpa_attention, 300, 2, torch.bfloat16), exact):
        assert (mine.double() - plain).norm() < 0.05 * plain.norm()


def test_extreme_scores_keep_gradients_finite():
    inputs = [(100 * torch.randn(1, 300, 2, 8)).requires_grad_() for _ in range(3)]
    train_gpt.sdpa_attention(*inputs).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_the_memory_that_attention_keeps_for_its_gradient_is_linear_in_length():
    def kept(length):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        ):
            train_gpt.sdpa_attention(
                *(torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
            )
        return sum(sizes)

    assert kept(512) <= 2.1 * kept(256)


def test_the_cpu_runtime_attends_like_pytorch(runtime):
    attend = train_gpt.pick_attention(runtime(tiny_config()).device, torch.float32).function
    for mine, plain in zip(
        attention_case(attend, 40, 2), attention_case(train_gpt.sdpa_attention, 40, 2)
    ):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-9)


# -------------------------------------------------------------------------------------- compilation
def assert_compiled_equals_eager(refiner, backend, tolerance, num_layers=2):
    config = tiny_config(
        num_layers=num_layers, xsa_last_n=1, ve_last_n=1, e2e_ttt_mini_batch=8, **REFINERS[refiner]
    )
    model = randomised(train_gpt.GPT(config, train_gpt.sdpa_attention)).train()
    ids, targets = random_batch(config, 20)
    noise = torch.arange(len(ids))
    expected = gradients(model, ids, targets, noise)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for name, value in gradients(model, ids, targets, noise, compiled).items():
        assert_near(value, expected[name], tolerance, tolerance, name)


@pytest.mark.parametrize(
    "refiner, backend, num_layers",
    [("base", "aot_eager", 1), ("nfm", "eager", 2), ("ttt", "eager", 2)],
)
def test_the_whole_model_compiles_to_one_graph_that_equals_eager(refiner, backend, num_layers):
    assert_compiled_equals_eager(refiner, backend, 1e-6, num_layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "refiner, backend", [("nfm", "inductor"), ("ttt", "inductor"), ("all", "aot_eager")]
)
def test_generated_code_equals_eager(refiner, backend):
    assert_compiled_equals_eager(refiner, backend, 1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_noise_is_that_of_plain_pytorch():
    """Positions times a large constant must wrap at 64 bits in generated code too."""
    keys = torch.tensor([0, -(2**63), 2**63 - 1, 12345])
    torch._dynamo.reset()
    compiled = torch.compile(train_gpt.draw_noise, fullgraph=True, dynamic=False)
    for mine, expected in zip(compiled(keys, 20, 33), train_gpt.draw_noise(keys, 20, 33)):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------ initial seeds
def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        torch.manual_seed(seed)
        return train_gpt.GPT(tiny_config()).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def test_initial_values_follow_the_configuration():
    config = dataclasses.replace(tiny_config(), qk_gain_init=2.25, embed_init_std=0.02)
    state = train_gpt.GPT(config).state_dict()
    assert torch.equal(state["blocks.1.attn.q_gain"], torch.full((4,), 2.25))
    assert state["tok_emb.weight"].std().item() == pytest.approx(0.02, rel=0.05)
