"""The trunk against a plain, slow reference that reads the state-dict, and its properties."""

import importlib.util
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TINY,
    assert_near,
    layers_for,
    plain_heads,
    plain_norm,
    preset_config,
    random_batch,
    randomised,
    tiny_config,
)

import train_gpt

BOS = train_gpt.BOS
REFINERS = {
    "base": dict(nfm_enabled=False),
    "nfm": dict(nfm_enabled=True),
    "ttt": dict(nfm_enabled=False, e2e_ttt_enabled=True),
    "all": dict(nfm_enabled=True, flow_enabled=True, e2e_ttt_enabled=True, ve_dim=8),
}


# ---- parameters ----


def test_the_state_dict_has_the_documented_names():
    parts = dict(nfm_enabled=True, gated_attention=True, value_residual=True)
    with torch.device("meta"):
        names = set(train_gpt.GPT(preset_config("ttt_linear_11l", **parts)).state_dict())
    layers = "c_q.weight c_k.weight c_v.weight proj.weight q_gain vr_lambda attn_gate.weight"
    block = {f"attn.{name}" for name in [*layers.split(), "attn_gate.bias"]}
    block |= {"mlp.fc.weight", "mlp.proj.weight", "attn_scale", "mlp_scale", "resid_mix"}
    assert {n.removeprefix("blocks.10.") for n in names if n.startswith("blocks.10.")} == block
    parts = {"tok_emb", "bigram", "smear", "blocks", "skip_weights", "ve", "nfm", "flow", "ttt"}
    assert {n.split(".")[0] for n in names} == parts
    assert {"tok_emb.weight", "smear.gate", "skip_weights"} < names


# ---- fresh models ----


def test_a_fresh_model_starts_as_the_reference_says():
    parts = dict(ve_dim=8, flow_enabled=True, e2e_ttt_enabled=True)
    model = train_gpt.GPT(tiny_config(**parts, model_dim=64))
    state = model.state_dict()
    values = {
        "skip_weights": 1.0,
        "smear.gate": 0.0,
        "bigram.scale": 0.05,
        "bigram.embed.weight": 0.0,
        "ve.scale": 0.1,
        "ve.layer_scales": 1.0,
        "ttt.proj.weight": 0.0,
        "ttt.gate": -5.0,
        "flow.fc.bias": 0.0,
        "flow.proj.weight": 0.0,
        "flow.proj.bias": 0.0,
        "flow.gate": -5.0,
        "nfm.inp.bias": 0.0,
        "nfm.time.bias": 0.0,
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
    values.update({f"blocks.{i}.{n}": value for i in range(3) for n, value in per_block.items()})
    for name, value in values.items():
        assert torch.equal(state[name], torch.full_like(state[name], value)), name
    orthogonal = [f"blocks.{i}.{n}" for i in range(3) for n in ("attn.c_q", "attn.c_k", "mlp.fc")]
    orthogonal += ["blocks.1.attn.c_v", "bigram.proj", "ve.proj", "ttt.c_q", "ttt.c_k", "ttt.c_v"]
    orthogonal += ["flow.down", "flow.fc", "flow.up", "nfm.inp", "nfm.time"]
    for name in orthogonal:
        weight = state[f"{name}.weight"]
        narrow = weight if weight.size(0) <= weight.size(1) else weight.T
        assert_near(narrow @ narrow.T, torch.eye(len(narrow)), 1e-5, 0, name)
    for i in range(3):
        assert torch.equal(state[f"blocks.{i}.resid_mix"], torch.eye(2)[:, :1].expand(2, 64))
    assert state["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.03)
    assert state["ve.embed.weight"].std().item() == pytest.approx(0.01, rel=0.08)
    later = train_gpt.GPT(tiny_config(smear_inputs=4, gate_inputs=4, skip_gates=True)).state_dict()
    for name in (
        "smear.proj.weight",
        "smear.scale",
        "skip_gates",
        "blocks.1.attn.attn_gate.weight",
    ):
        assert not later[name].any(), name


@pytest.mark.parametrize("name", train_gpt.PRESETS)
def test_every_parameter_of_a_preset_learns_from_where_it_starts(name):
    """Behind two zero factors a parameter, and they themselves, would stay where they are."""
    torch.manual_seed(1)
    changes = {**TINY, **layers_for(name), "dtype": "float32", "num_layers": 3}
    model = train_gpt.GPT(preset_config(name, **changes)).train()
    ids = torch.randint(2, TINY["vocab_size"], (4, 65))
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        noise = train_gpt.flow_noise_keys(model.config, step, 0, len(ids), ids.device)
        model(ids[:, :-1], ids[:, 1:], noise).backward()
        # Gradients of one length: a small one counts too.
        for parameter in model.parameters():
            parameter.grad /= parameter.grad.norm().clamp(min=1e-30)
        optimizer.step()
    still = [key for key, value in model.named_parameters() if torch.equal(value, start[key])]
    assert not still


# ---- the reference ----


def bigram_rows(ids, rows):
    """The hash with the wrap-around of 32-bit integers, position 0 in the last row."""
    t = ids.numpy().astype(np.int32)
    hashes = (np.int32(36313) * t[:, 1:]) ^ (np.int32(27191) * t[:, :-1])
    out = np.full(t.shape, rows - 1, np.int64)
    out[:, 1:] = np.mod(hashes, np.int32(rows - 1))
    return torch.from_numpy(out)


def reference_input(c, w, ids):
    """The stream before the first block; the smear gates by a loop over positions."""
    x = w["tok_emb.weight"][ids]
    if c.embed_dim:
        x = x @ w["embed_in.weight"].T
    if c.bigram_vocab_size:
        rows = w["bigram.embed.weight"][bigram_rows(ids, c.bigram_vocab_size)]
        x = x + rows @ w["bigram.proj.weight"].T * w["bigram.scale"]
    x = plain_norm(x)
    if not c.smear_enabled:
        return x
    out = []
    for t in range(ids.size(1)):
        inside = (ids[:, t] != BOS).to(x.dtype)[:, None]
        before = inside * x[:, t - 1] if t else torch.zeros_like(x[:, 0])
        if c.smear_inputs:
            gate = torch.sigmoid(x[:, t, : c.smear_inputs] @ w["smear.proj.weight"].T)
            out.append(x[:, t] + w["smear.scale"] * gate * before)
        else:
            gate = torch.sigmoid(w["smear.gate"])
            out.append((1 - gate) * x[:, t] + gate * before)
    return torch.stack(out, 1)


def reference_attention(c, w, layer, x, v_first, v_emb):
    """(B, T, D) and this layer's values."""
    at = f"blocks.{layer}.attn."
    q, k, v = (x @ w[f"{at}{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
    v = mixed = v + v_emb
    if c.value_residual:  # layer 0 mixes its values with themselves
        mix = w[f"{at}vr_lambda"]
        mixed = mix[0] * (v if v_first is None else v_first) + mix[1] * v
    gates = None
    if c.gated_attention:
        inputs = x[..., : c.gate_inputs or c.model_dim]
        gates = inputs @ w[f"{at}attn_gate.weight"].T + w.get(f"{at}attn_gate.bias", 0.0)
    is_exclusive = layer >= c.num_layers - c.xsa_last_n
    heads = plain_heads(c, w[f"{at}q_gain"], q, k, mixed, is_exclusive, gates)
    return heads @ w[f"{at}proj.weight"].T, v


def reference_hidden(c, w, ids, order=None):
    """Final states: the first half of `order` pushes its outputs, the rest pops before it runs."""
    order = order or range(c.num_layers)
    x = x0 = reference_input(c, w, ids)
    v_first, skips, half = None, [], len(order) // 2
    for visit, layer in enumerate(order):
        at, scale = f"blocks.{layer}.", 1 / math.sqrt(layer + 1)
        if visit >= half and skips:
            skip = w["skip_weights"][visit - half] * skips.pop()
            gate = torch.sigmoid(w["skip_gates"][visit - half]) if c.skip_gates else None
            x = x + skip if gate is None else (1 - gate) * skip + gate * x
        v_emb, late = 0.0, layer - (c.num_layers - c.ve_last_n)
        if c.ve_dim and late >= 0:
            v_emb = w["ve.embed.weight"][ids] @ w["ve.proj.weight"].T
            v_emb = v_emb * w["ve.scale"] * w["ve.layer_scales"][late]
        h = w[f"{at}resid_mix"][0] * x + w[f"{at}resid_mix"][1] * x0
        y, v = reference_attention(c, w, layer, plain_norm(h) * scale, v_first, v_emb)
        v_first = v if v_first is None else v_first
        y = h + w[f"{at}attn_scale"] * y
        reads = h if layer >= c.num_layers - c.parallel_last_n else y
        up = plain_norm(reads) * scale @ w[f"{at}mlp.fc.weight"].T
        squared = torch.where(up > 0, up, 0.5 * up).square()
        x = y + w[f"{at}mlp_scale"] * (squared @ w[f"{at}mlp.proj.weight"].T)
        if visit < half:
            skips.append(x)
    return plain_norm(x)


def reference_logits(c, w, ids, order=None):
    x = reference_hidden(c, w, ids, order)
    if c.embed_dim:
        x = x @ w["embed_out.weight"].T
    return c.logit_softcap * torch.tanh(x @ w["tok_emb.weight"].T / c.logit_softcap)


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
LOOPS = dict(num_loops=2, loop_start=1, loop_end=2)
LATER = dict(
    LOOPS,
    bigram_vocab_size=0,
    value_residual=False,
    skip_gates=True,
    parallel_last_n=3,
    smear_inputs=6,
    gated_attention=True,
    gate_inputs=6,
    embed_dim=24,
)
VARIANTS = {
    "all of the first submissions": {},
    "one layer": dict(num_layers=1),
    "bare trunk, another base of the angles": dict(
        value_residual=False,
        gated_attention=False,
        bigram_vocab_size=0,
        smear_enabled=False,
        xsa_last_n=0,
        rope_base=100.0,
    ),
    "value embedding in all layers": dict(ve_dim=12, ve_last_n=5),
    "one head per value": dict(num_kv_heads=4),
    "one value for all heads": dict(num_kv_heads=1),
    "the published #549 base": dict(
        gated_attention=False, value_residual=False, xsa_last_n=4, ve_dim=12, mlp_mult=2.8
    ),
    "loops": LOOPS,
    "loops from the first layer to the last": dict(num_loops=1, loop_start=0, loop_end=4),
    "all of the later records": LATER,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_logits_and_gradients_equal_the_plain_reference(variant, double):
    config = tiny_config(**{**TRUNK, **VARIANTS[variant]})
    model = randomised(train_gpt.GPT(config))
    ids, targets = random_batch(config, 13)
    layers = list(range(config.num_layers))
    low, high = config.loop_start, config.loop_end + 1
    loops = layers[:low] + layers[low:high] * (config.num_loops + 1) + layers[high:]
    for looped in (False, True) if config.num_loops else (False,):
        model.looped = looped
        model.zero_grad()
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        expected = reference_logits(config, weights, ids, loops if looped else layers)
        expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        expected_loss.backward()
        assert_near(model.logits(model.hidden(ids)), expected, 1e-9, 1e-9, "logits")
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
    """From id 59,138 on it overflows; in 64 bits the same weights would be another model."""
    config = tiny_config(**{**TRUNK, "num_layers": 1, "vocab_size": 65536, "bigram_vocab_size": 61})
    model = randomised(train_gpt.GPT(config))
    ids = torch.randint(58_000, 65_536, (2, 16))
    in_64_bits = (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % 60
    assert not torch.equal(bigram_rows(ids, 61)[:, 1:], in_64_bits)
    with torch.no_grad():
        expected = reference_hidden(config, model.state_dict(), ids)
        assert_near(model.hidden(ids), expected, 1e-9, 1e-9, "states")


def gradients(model, ids, targets, noise=None, loss=None):
    """{"loss" and every parameter: value or gradient} of a backward pass by `loss` or the model."""
    model.zero_grad()
    value = (model if loss is None else loss)(ids, targets, noise)
    value.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value.detach(), **named}


def test_bfloat16_autocast_stays_close_to_float32_with_float32_logits():
    config = tiny_config(**REFINERS["all"])
    model = randomised(train_gpt.GPT(config)).eval()
    ids, targets = random_batch(config, 60)
    exact = gradients(model, ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, ids, targets)
        assert model.logits(model.hidden(ids)).dtype == torch.float32
    assert rounded["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.01)
    together = [torch.cat([g.flatten() for g in gs.values()]) for gs in (exact, rounded)]
    assert F.cosine_similarity(*together, dim=0) > 0.99


# ---- properties ----


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("parts", [REFINERS["all"], dict(LATER, num_layers=4)])
def test_outputs_before_a_changed_token_stay_bit_identical(parts, autocast):
    config = tiny_config(**parts)
    model = randomised(train_gpt.GPT(config)).eval()
    ids, _ = random_batch(config, 37)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = model.logits(model.hidden(ids))
        for t in (0, 1, 15, 16, 17, 30, 36):  # around and inside TTT-Linear's mini-batches of 16
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 7) % config.vocab_size
            after = model.logits(model.hidden(changed))
            assert torch.equal(after[:, :t], before[:, :t])
            assert torch.equal(after[1], before[1]), "the other sequence of the batch must not move"
            assert not torch.equal(after[0, t:], before[0, t:])


def test_outputs_do_not_depend_on_the_sequence_length_in_use(double):
    config = tiny_config(**REFINERS["all"])
    model = randomised(train_gpt.GPT(config)).eval()
    ids, _ = random_batch(config, 50)
    with torch.no_grad():
        long = model.hidden(ids)
        for length in (1, 2, 16, 33):
            short = model.hidden(ids[:, :length])
            assert_near(short, long[:, :length], 1e-10, 1e-10, f"length {length}")


# ---- attention backends ----


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_other_order_of_backends_gives_the_same_values_and_gradients(kv_heads, double):
    """Those of sdpa_attention are the reference's."""
    q, k, v, out = (3 * torch.randn(2, 520, heads, 8) for heads in (4, kv_heads, kv_heads, 4))
    results = []
    for attend in (train_gpt.flash_first_attention, train_gpt.sdpa_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, out)])
    for mine, expected in zip(*results):
        torch.testing.assert_close(mine, expected, atol=1e-10, rtol=1e-9)


@pytest.fixture
def fresh_pick():
    """pick_attention, which tries anew."""
    train_gpt.pick_attention.cache_clear()
    yield train_gpt.pick_attention
    train_gpt.pick_attention.cache_clear()


def test_the_cpu_runs_pytorchs_own_order_and_the_log_names_the_first(fresh_pick):
    choice = fresh_pick(torch.device("cpu"), torch.float32)
    assert choice.function is train_gpt.sdpa_attention
    assert choice.reason == "flash_attention: PyTorch's own order"


def test_the_trial_is_compiled_where_the_model_will_be(fresh_pick, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    fresh_pick(torch.device("cpu"), torch.float32, compiling=True)
    assert compiled == [dict(dynamic=False, fullgraph=True)]


def test_where_no_backend_runs_the_error_says_why(fresh_pick, monkeypatch):
    def no_kernel(*args, **options):
        raise RuntimeError("no kernel image\nand a page more")

    monkeypatch.setattr(F, "scaled_dot_product_attention", no_kernel)
    with pytest.raises(train_gpt.ConfigError, match=r"cpu in .*\(RuntimeError: no kernel image\)"):
        fresh_pick(torch.device("cpu"), torch.float32)


@pytest.fixture
def hopper(fresh_pick, monkeypatch):
    """pick() on a GPU that claims to be a Hopper with the package of FlashAttention-3."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: zeros(*shape, **rest))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flash_attn_interface")
    return lambda: fresh_pick(torch.device("cuda"), torch.bfloat16)


def test_hopper_takes_flash_attention_3_where_its_package_works(hopper, monkeypatch):
    activated = []
    monkeypatch.setattr(train_gpt, "activate_flash_attention_impl", activated.append)
    choice = hopper()
    assert activated == ["FA3"] and choice.function is train_gpt.flash_first_attention
    assert choice.reason.startswith("flash_attention_3: ")


def test_hopper_falls_back_where_the_package_does_not_import_and_says_so(hopper):
    choice = hopper()
    assert choice.function is train_gpt.sdpa_attention
    expected = r"^\w+: PyTorch's own order; not usable: flash_attention_3: .*ModuleNotFoundError"
    assert re.match(expected, choice.reason)
    assert torch.nn.attention.current_flash_attention_impl() is None


# ---- compilation ----


@pytest.mark.parametrize(
    "refiner, backend, num_layers",
    [
        ("base", "aot_eager", 1),
        ("nfm", "eager", 2),
        ("ttt", "eager", 2),
        *(
            pytest.param(refiner, backend, 2, marks=pytest.mark.slow)
            for refiner, backend in (("nfm", "inductor"), ("ttt", "inductor"), ("all", "aot_eager"))
        ),
    ],
)
def test_the_whole_model_compiles_to_one_graph_that_equals_eager(refiner, backend, num_layers):
    parts = dict(REFINERS[refiner], num_layers=num_layers, xsa_last_n=1, ve_last_n=1)
    config = tiny_config(**parts, e2e_ttt_mini_batch=8)
    model = randomised(train_gpt.GPT(config)).train()
    ids, targets = random_batch(config, 20)
    noise = train_gpt.flow_noise_keys(config, 0, 0, len(ids), ids.device)
    expected = gradients(model, ids, targets, noise)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    tolerance = 1e-6 if backend == "eager" or num_layers == 1 else 1e-4
    for name, value in gradients(model, ids, targets, noise, compiled).items():
        assert_near(value, expected[name], tolerance, tolerance, name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_noise_is_that_of_plain_pytorch():
    """Positions times a large constant must wrap at 64 bits in generated code too."""
    keys = torch.tensor([0, -(2**63), 2**63 - 1, 12345])
    torch._dynamo.reset()
    compiled = torch.compile(train_gpt.draw_noise, fullgraph=True, dynamic=False)
    for mine, expected in zip(compiled(keys, 20, 33), train_gpt.draw_noise(keys, 20, 33)):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
