"""NativeFlowMatcher, FlowRefiner, TTT-Linear and rounding in training, each against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, random_batch, randomised, tiny_config

import train_gpt


def build(**changes):
    config = tiny_config(**changes)
    return config, randomised(train_gpt.GPT(config))


def trunk(model):
    """The same weights without refiners: the states of this model are what the first receives."""
    plain = train_gpt.GPT(tiny_config(nfm_enabled=False))
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# ---- NativeFlowMatcher ----


def velocity(w, x, t):
    """v(x, t) of docs/REFERENCE.md §4 from the state-dict; t has x's leading shape or is 0-d."""
    half = x.size(-1) // 2
    angle = t[..., None] * torch.tensor([10000.0 ** (-j / half) for j in range(half)])
    sinusoids = torch.cat([angle.cos(), angle.sin()], -1)
    tau = gelu(sinusoids @ w["nfm.time.weight"].T + w["nfm.time.bias"])
    return gelu(x @ w["nfm.inp.weight"].T + w["nfm.inp.bias"] + tau) @ w["nfm.out.weight"].T


def test_training_adds_the_weighted_flow_matching_loss(double):
    config, model = build(nfm_loss_weight=0.7)
    ids, targets = random_batch(config)
    keys = torch.tensor([3, -4])
    x, w = trunk(model).hidden(ids), model.state_dict()
    z, t = (draw.double() for draw in train_gpt.draw_noise(keys, ids.size(1), config.model_dim))
    x_t = (1 - t[..., None]) * z + t[..., None] * x
    flow = (velocity(w, x_t, t) - (x - z)).square().mean()
    logits = model.logits(model.hidden(ids))
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    total = cross_entropy + 0.7 * flow
    assert model(ids, targets, keys).item() == pytest.approx(total.item(), abs=1e-6)
    assert model(ids, targets).item() == pytest.approx(cross_entropy.item(), abs=1e-6)


def test_the_flow_loss_sends_no_gradient_into_the_trunk():
    gradients = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        config, model = build(nfm_loss_weight=weight)
        ids, targets = random_batch(config)
        model(ids, targets, torch.arange(len(ids))).backward()
        gradients[weight] = {name: p.grad for name, p in model.named_parameters()}
    moved = {name for name, g in gradients[0.0].items() if not torch.equal(g, gradients[0.5][name])}
    velocity_field = ("inp.weight", "inp.bias", "time.weight", "time.bias", "out.weight")
    assert moved == {f"nfm.{name}" for name in velocity_field}


def keys_of(config, step, first, count):
    return train_gpt.flow_noise_keys(config, step, first, count, torch.device("cpu"))


def drawn(config, step, first, count):
    """z and t of the step's sequences [first, first + count), as training draws them."""
    keys = keys_of(config, step, first, count)
    return train_gpt.draw_noise(keys, config.train_seq_len, config.model_dim)


ODD = dict(train_seq_len=33, train_batch_tokens=132, model_dim=33, num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize("changes", [{}, ODD], ids=["even", "odd"])
def test_flow_noise_does_not_depend_on_how_ranks_and_micro_batches_slice_a_step(changes):
    config = tiny_config(**changes)
    torch.manual_seed(3)
    parts = [drawn(config, 7, first, count) for first, count in ((0, 1), (1, 2), (3, 1))]
    draw = torch.randn(4)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), draw), "the global generator has no say"
    for mine, whole in zip(zip(*parts), drawn(config, 7, 0, 4)):
        assert torch.equal(torch.cat(mine), whole)


def test_flow_noise_differs_between_sequences_steps_and_seeds():
    places = [(seed, step, i) for seed in (42, 43) for step in (-1, 0, 1) for i in (0, 1)]
    draws = [drawn(tiny_config(seed=seed), step, i, 1) for seed, step, i in places]
    for kind in zip(*draws):
        assert len({d.numpy().tobytes() for d in kind}) == len(draws)


BIG = dict(train_seq_len=512, train_batch_tokens=4096, micro_batch_tokens=4096, model_dim=256)


def test_flow_noise_is_standard_normal_and_its_times_are_uniform():
    """Moments and tails of a million numbers, each within four standard errors."""
    z, t = drawn(tiny_config(**BIG), 0, 0, 8)
    assert z.shape == (8, 512, 256) and t.shape == (8, 512)
    count = z.numel()
    z = z.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = 4 * math.sqrt(variance / count)
        assert z.pow(power).mean().item() == pytest.approx(moment, abs=error)
    for bound in (0.5, 1, 2, 3, 4):
        tail = math.erfc(bound / math.sqrt(2))
        found = (z.abs() > bound).double().mean().item()
        assert found == pytest.approx(tail, abs=4 * math.sqrt(tail / count))
    assert t.min() > 0 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / t.numel()))
    assert t.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_flow_noise_is_independent_between_neighbours_sequences_steps_and_times():
    first, t = drawn(tiny_config(**BIG), 0, 0, 8)
    second, _ = drawn(tiny_config(**BIG), 1, 0, 8)
    flat = first.flatten(1)
    half = flat.size(1) // 2  # the two numbers of one hash
    pairs = {
        "channels": (first[..., 1:], first[..., :-1]),
        "positions": (first[:, 1:], first[:, :-1]),
        "sequences": (first[1:], first[:-1]),
        "steps": (first, second),
        "halves of a hash": (flat[:, half:], flat[:, :half]),
        "sizes": ((first.square() - 1) / 3, second.square() - 1),
        "times": (first.mean(-1) * 16, t - 0.5),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).double().mean().abs().item()
        assert correlation < 4 / math.sqrt(min(a.numel(), first.numel() / 2)), name


@pytest.mark.parametrize("changes", [dict(nfm_enabled=False), dict(nfm_loss_weight=0.0)])
def test_flow_noise_is_not_drawn_where_nothing_uses_it(changes):
    assert keys_of(tiny_config(**changes), 0, 0, 2) is None


# ---- FlowRefiner ----


def flow_refiner(w, x):
    z = x @ w["flow.down.weight"].T
    inner = gelu(z @ w["flow.fc.weight"].T + w["flow.fc.bias"])
    inner = inner @ w["flow.proj.weight"].T + w["flow.proj.bias"]
    return x + torch.sigmoid(w["flow.gate"]) * ((z + inner) @ w["flow.up.weight"].T)


# ---- TTT-Linear ----

TTT = dict(nfm_enabled=False, e2e_ttt_enabled=True)


def layer_norm(x, gain, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def inner_steps(q, k, v, w, b, gain, bias, rate, mini_batch):
    """Outputs of one head's f(k) = k + LN(kW + b), one autograd step per token; q, k, v (T, d).

    All gradients of a mini-batch are taken at its start; token i uses those of tokens <= i of it.
    """
    outputs = []
    for i in range(len(q)):
        if i % mini_batch == 0:
            w_start, b_start, w_now, b_now = w, b, w, b
        error = layer_norm(k[i] @ w_start + b_start, gain, bias, 1e-6) - (v[i] - k[i])
        loss = 0.5 * error.square().sum()
        dw, db = torch.autograd.grad(loss, (w_start, b_start), create_graph=True)
        w_now, b_now = w_now - rate * dw, b_now - rate * db
        outputs.append(q[i] + layer_norm(q[i] @ w_now + b_now, gain, bias, 1e-6))
        if i % mini_batch == mini_batch - 1:
            w, b = w_now, b_now
    return torch.stack(outputs)


def plain_ttt(config, w, x):
    """The refiner on x (B, T, D) from its state-dict: loops over sequences, heads and tokens."""
    d, rows = config.head_dim, []
    rate, mini_batch = config.e2e_ttt_base_lr / d, config.e2e_ttt_mini_batch
    for row in x:
        q, k, v = (row @ w[f"{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
        heads = []
        for h in range(config.num_heads):
            part = slice(h * d, (h + 1) * d)
            state = w["w"][h], w["b"][h, 0], w["ln_gain"][h, 0], w["ln_bias"][h, 0]
            heads.append(inner_steps(q[:, part], k[:, part], v[:, part], *state, rate, mini_batch))
        z = layer_norm(torch.cat(heads, -1), w["norm.weight"], w["norm.bias"], 1e-6)
        rows.append(row + torch.sigmoid(w["gate"]) * (z @ w["proj.weight"].T))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "length, mini_batch, base_lr",
    [(5, 16, 1.0), (20, 7, 1.0), (21, 7, 4.0), (9, 1, 1.0), (20, 7, 0.0)],
)
def test_ttt_linear_equals_inner_gradient_steps_taken_token_by_token(
    length, mini_batch, base_lr, double
):
    config, model = build(**TTT, e2e_ttt_mini_batch=mini_batch, e2e_ttt_base_lr=base_lr)
    ttt = model.ttt
    x, weigh = torch.randn(2, 2, length, config.model_dim)
    x.requires_grad_()
    plain_x = x.detach().clone().requires_grad_()
    weights = {name: p.detach().clone().requires_grad_() for name, p in ttt.named_parameters()}
    expected, got = plain_ttt(config, weights, plain_x), ttt(x)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    (expected * weigh).sum().backward()
    (got * weigh).sum().backward()
    torch.testing.assert_close(x.grad, plain_x.grad, atol=1e-7, rtol=1e-7)
    for name, param in ttt.named_parameters():
        assert_near(param.grad, weights[name].grad, 1e-7, 1e-7, name)
        assert param.grad.abs().max() > 1e-6 or base_lr == 0, f"nothing depends on {name}"


def test_the_memory_of_ttt_linear_is_linear_in_length():
    config, model = build(**TTT)

    def kept(length):
        sizes = {}
        x = torch.randn(1, length, config.model_dim, requires_grad=True)

        def keep(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model.ttt(x)
        assert y.requires_grad
        return sum(sizes.values())

    sizes = [kept(length) for length in (128, 256, 512)]
    assert sizes[2] - sizes[1] <= 2.1 * (sizes[1] - sizes[0])  # a quadratic term would make it 4


def test_the_inner_steps_stay_out_of_bfloat16():
    """The inner state sums hundreds of steps; only the projections and their input are rounded."""
    config, model = build(**TTT)
    x = torch.randn(1, 64, config.model_dim)
    exact = model.ttt(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.ttt(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("refiners", [["nfm"], ["flow"], ["ttt", "flow", "nfm"]])
def test_refiners_follow_their_formulas_in_the_order_ttt_flow_nfm(refiners, double):
    parts = dict(flow_latent_dim=8, flow_hidden_dim=24)
    switches = dict(nfm="nfm_enabled", flow="flow_enabled", ttt="e2e_ttt_enabled")
    parts |= {switch: name in refiners for name, switch in switches.items()}
    config, model = build(**parts)
    ids, _ = random_batch(config, 20)
    x, w = trunk(model).hidden(ids), model.state_dict()
    formulas = dict(
        ttt=lambda x: plain_ttt(config, of_ttt, x),
        flow=lambda x: flow_refiner(w, x),
        nfm=lambda x: x + torch.sigmoid(w["nfm.gate"]) * velocity(w, x, torch.tensor(1.0)),
    )
    of_ttt = {n[4:]: p.requires_grad_() for n, p in w.items() if n.startswith("ttt.")}
    for name in refiners:
        before, x = x, formulas[name](x)
        assert (x - before).abs().max() > 0.01, name
    assert_near(model.hidden(ids), x, 1e-9, 1e-9, "states")


# ---- rounding in training ----

# Widths at which some matrices exceed the artifact's float16 limit and others do not.
QAT = dict(
    num_layers=2,
    model_dim=288,
    mlp_mult=1.0,
    e2e_ttt_enabled=True,
    nfm_hidden_dim=256,
    ve_dim=8,
    late_qat_threshold=0.15,
)
# TTT-Linear's inner W, no layer's weight, exceeds that limit at two heads of 192.
WIDE = dict(
    num_layers=1,
    model_dim=384,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=0.25,
    nfm_enabled=False,
    ve_dim=0,
)


def large_ones_rounded(config, model):
    """The state-dict with exactly the tensors stored as integers as the artifact returns them."""
    state = model.state_dict()
    packed = train_gpt.unpack_artifact(train_gpt.pack_artifact(config, state))[1]
    schemes = {name: train_gpt.scheme_of(name, t.shape, config) for name, t in state.items()}
    return {name: (packed if schemes[name].startswith("int") else state)[name] for name in state}


def twin(config_changes, state):
    """A model without rounding that has the given weights."""
    model = train_gpt.GPT(tiny_config(**{**config_changes, "late_qat_threshold": 0.0}))
    model.load_state_dict(state)
    return model.train()


def loss_and_gradients(model, ids, targets, keys):
    model.zero_grad()
    loss = model(ids, targets, keys)
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), named


def qat_case(**changes):
    config, model = build(**{**QAT, **changes})
    ids, targets = random_batch(config, 12)
    return config, model.train(), (ids, targets, keys_of(config, 0, 0, len(ids)))


@pytest.mark.parametrize("changes", [dict(block_bits=5, embed_bits=6), WIDE])
def test_with_the_blend_at_one_training_sees_the_weights_of_the_artifact(changes):
    config, model, case = qat_case(**changes)
    model.set_qat(1.0)
    with torch.no_grad():
        for param in model.parameters():  # the scales must follow the weights
            param.mul_(1.7)
        raw = twin({**QAT, **changes}, model.state_dict())(*case).item()
    model.set_qat(1.0)
    loss, gradients = loss_and_gradients(model, *case)
    rounded = twin({**QAT, **changes}, large_ones_rounded(config, model))
    expected, straight_through = loss_and_gradients(rounded, *case)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert abs(loss - raw) > 1e-5  # ten times the rounding of float32
    for name, gradient in gradients.items():  # as if the rounded weights were the parameters
        assert_near(gradient, straight_through[name], 1e-6, 1e-4, name)


def test_rounding_is_off_at_blend_zero_and_in_evaluation_bit_for_bit():
    config, model, (ids, targets, keys) = qat_case()
    raw = twin(QAT, model.state_dict())
    expected, gradients = loss_and_gradients(raw, ids, targets, keys)
    for has_been_on in (False, True):
        if has_been_on:
            model.set_qat(1.0)
            assert torch.equal(model.eval()(ids, targets), raw.eval()(ids, targets))
            model.train().set_qat(0.0)
        loss, mine = loss_and_gradients(model, ids, targets, keys)
        assert loss == expected
        assert all(torch.equal(mine[name], gradients[name]) for name in gradients)
