"""Muon and AdamW against plain references, schedules and weight averages against hand-written
tables."""

import math

import pytest
import torch
from helpers import (
    EVERY_PART,
    Operations,
    assert_near,
    preset_config,
    tiny_config,
    weights,
)

import train_gpt


def build(**changes):
    config = tiny_config(**changes)
    model = train_gpt.GPT(config)
    muon, adamw = train_gpt.build_optimizers(model, config)
    for group in adamw.param_groups:
        group["lr"] = group["base_lr"]
    return model, muon, adamw


def give_gradients(model, seed, size=1.0):
    """A random gradient for every parameter; returns copies by name."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = size * torch.randn(param.shape, generator=generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def step(muon, adamw, clip=0.0):
    train_gpt.reduce_clip_step(muon, adamw, train_gpt.Comm(), clip)


def is_block_matrix(name):
    """The six matrices of every block, written down rather than derived."""
    kinds = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    return name.startswith("blocks.") and name.endswith(tuple(f".{kind}.weight" for kind in kinds))


# ---- Muon ----
def newton_schulz(matrix, steps):
    """The quintic iteration on one matrix, on its transpose where it is tall."""
    x = matrix / matrix.norm()
    if x.size(0) > x.size(1):
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def muon_step(weight, grad, buffer, lr, momentum, decay, steps, row_norm):
    """One step of one matrix: (weight, buffer)."""
    buffer = momentum * buffer + grad
    ahead = grad + momentum * buffer  # Nesterov looks one step ahead
    if row_norm:  # MuonEq-R
        ahead = ahead / ahead.norm(dim=1, keepdim=True)
    update = newton_schulz(ahead, steps)
    factor = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
    return weight * (1 - lr * decay) - lr * factor * update, buffer


@pytest.mark.parametrize("decay, ns_steps, row_norm", [(0.3, 5, False), (0.0, 1, True)])
def test_muon_takes_the_steps_of_a_loop_over_matrices(decay, ns_steps, row_norm):
    model, muon, adamw = build(muon_wd=decay, muon_ns_steps=ns_steps, muon_row_norm=row_norm)
    expected = {n: p for n, p in weights(model).items() if is_block_matrix(n)}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    for number, momentum in enumerate((0.85, 0.9, 0.95, 0.95)):
        muon.momentum, muon.lr = momentum, 0.07 / (1 + number)
        grads = give_gradients(model, number)
        step(muon, adamw)
        settings = muon.lr, momentum, decay, ns_steps, row_norm
        for name, weight in expected.items():
            expected[name], buffers[name] = muon_step(weight, grads[name], buffers[name], *settings)
    after = weights(model)
    for name, value in expected.items():
        assert_near(after[name], value, 2e-5, 1e-4, name)


@pytest.mark.parametrize("shape", [(64, 32), (48, 48), (16, 160)])
def test_an_update_is_nearly_orthogonal_with_the_singular_vectors_of_the_gradient(shape):
    """In bfloat16, Muon's default."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    muon = train_gpt.Muon(params, lr=1.0, momentum=0.0, weight_decay=0.0)
    for param in params:
        spread = torch.diag(torch.linspace(0.3, 3, min(shape)))
        left, right = (torch.linalg.qr(torch.randn(n, min(shape)))[0] for n in shape)
        param.grad = left @ spread @ right.T
    muon.launch()
    muon.collect()
    muon.step()
    for param in params:
        update = -param.detach() / max(1, shape[0] / shape[1]) ** 0.5
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6 and values.max() < 1.3
        left, _, right = torch.linalg.svd(param.grad, full_matrices=False)
        assert (update * (left @ right)).sum() / update.norm() / min(shape) ** 0.5 > 0.97


def test_the_operations_of_an_optimiser_step_do_not_grow_with_the_layers():
    counts = []
    for layers in (2, 6):
        model, muon, adamw = build(num_layers=layers)
        give_gradients(model, 0)
        step(muon, adamw)  # the first one also makes AdamW's state
        give_gradients(model, 1)
        with Operations() as operations:
            step(muon, adamw)
        counts.append(len(operations.names))
    assert counts[0] == counts[1]


# ---- AdamW ----
def test_adamw_takes_the_published_steps_with_its_own_rate_per_group():
    betas = dict(beta1=0.8, beta2=0.9, adam_eps=1e-6)
    model, muon, adamw = build(embed_lr=0.05, scalar_lr=0.02, adam_wd=0.1, **betas, **EVERY_PART)
    expected = {n: p.double() for n, p in weights(model).items() if not is_block_matrix(n)}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    tables = ("tok_emb.weight", "bigram.embed.weight", "ve.embed.weight")
    for number in range(1, 4):
        grads = give_gradients(model, number)
        step(muon, adamw)
        for name, value in expected.items():
            lr = 0.05 if name in tables else 0.02
            grad = grads[name].double()
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            root = (second[name] / (1 - 0.9**number)).sqrt() + 1e-6
            expected[name] = value * (1 - lr * 0.1) - lr * first[name] / (1 - 0.8**number) / root
    after = weights(model)
    for name, value in expected.items():
        assert_near(after[name].double(), value, 1e-5, 1e-5, name)


@pytest.mark.parametrize(
    "settings, embed, scalar",
    [
        (dict(), 0.04, 0.04),
        (dict(adam_wd=0.1), 0.1, 0.1),  # both follow it
        (dict(adam_wd=0.1, embed_wd=0.085), 0.085, 0.1),
        (dict(adam_wd=0.1, scalar_wd=0.02), 0.1, 0.02),
        (dict(adam_wd=0.1, embed_wd=0.0, scalar_wd=0.0), 0.0, 0.0),  # 0 is a value of its own
    ],
)
def test_embeddings_and_scalars_shrink_by_their_own_weight_decay(settings, embed, scalar):
    model, muon, adamw = build(embed_lr=0.5, scalar_lr=0.25, muon_wd=0.0, **settings)
    before = weights(model)
    give_gradients(model, 0, size=0.0)
    step(muon, adamw)
    after = weights(model)
    for name, rate, decay in (
        ("tok_emb.weight", 0.5, embed),
        ("skip_weights", 0.25, scalar),
        ("blocks.0.mlp.fc.weight", 1.0, 0.0),  # a gradient of zeros has no direction
    ):
        torch.testing.assert_close(after[name], before[name] * (1 - rate * decay))


# ---- groups ----
@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_parameter_of_a_preset_is_in_the_right_group_once(preset):
    config = preset_config(preset)
    with torch.device("meta"):
        model = train_gpt.GPT(config)
        muon, adamw = train_gpt.build_optimizers(model, config)
    embed, scalar = (group["params"] for group in adamw.param_groups)
    names = {id(param): name for name, param in model.named_parameters()}
    held = [[names[id(p)] for p in part] for part in (sum(muon.stacks, []), embed, scalar)]
    assert sorted(sum(held, [])) == sorted(names.values())
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve.embed.weight"}
    assert set(held[0]) == {name for name in names.values() if is_block_matrix(name)}
    assert set(held[1]) == tables & set(names.values())


# ---- clipping ----
@pytest.mark.parametrize(
    "size, clip, clipped", [(1.0, 0.3, True), (1e-6, 0.3, False), (1.0, 0.0, False)]
)
def test_gradients_are_clipped_by_their_global_norm(size, clip, clipped):
    model, muon, adamw = build(beta1=0.9)
    grads = give_gradients(model, 0, size)

    def norm(names):
        return math.sqrt(sum(grads[name].double().square().sum().item() for name in names))

    factor = clip / norm(grads) if clipped else 1.0
    step(muon, adamw, clip)
    # After one step momentum and first moments are proportional to the gradients they saw.
    buffers = torch.cat([buffer.flatten() for buffer in muon.state_dict().values()])
    matrices = norm(filter(is_block_matrix, grads))
    assert buffers.norm().item() == pytest.approx(factor * matrices, rel=1e-4)
    for name, param in model.named_parameters():
        if not is_block_matrix(name):
            moment = adamw.state[param]["exp_avg"]
            expected = 0.1 * factor * grads[name]
            torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-12)


def test_a_parameter_without_a_gradient_counts_as_zero():
    model, muon, adamw = build(muon_wd=0.0, adam_wd=0.0)
    give_gradients(model, 0)
    model.smear.gate.grad = None
    before = weights(model)
    step(muon, adamw, 0.3)
    assert torch.equal(model.smear.gate, before["smear.gate"])
    assert not torch.equal(model.skip_weights, before["skip_weights"])


# ---- schedules ----
LINEAR = dict(iterations=10, warmdown_iters=4, warmdown_shape="linear")
COSINE = dict(LINEAR, warmdown_shape="cosine")
CAP = dict(iterations=1000, warmdown_iters=10, max_wallclock_seconds=100.0)
# The record of 2026-04-09: full rate for 28 % of the run, then linear to 0.
RECORD = dict(iterations=20000, warmdown_frac=0.72)
CAPPED = dict(RECORD, max_wallclock_seconds=600.0)


@pytest.mark.parametrize(
    "settings, step, seconds, expected",
    [
        (LINEAR, 6, 0.0, 1.0),  # four left: the warmdown begins at the full rate
        (LINEAR, 7, 0.0, 0.75),  # 3/4 left
        (LINEAR, 9, 0.0, 0.25),  # 1/4 left: the last step still learns
        (LINEAR, 11, 0.0, 0.0),  # never negative
        (COSINE, 7, 0.0, 0.8535534),  # (1 - cos(3 pi / 4)) / 2
        (dict(LINEAR, warmdown_iters=0), 9, 0.0, 1.0),  # no warmdown
        (dict(LINEAR, warmdown_iters=20), 0, 0.0, 0.5),  # longer than the run: begins half-way down
        (LINEAR, 8, 1e6, 0.5),  # without a cap the time does not matter
        (CAP, 0, 0.0, 1.0),  # nothing measured yet
        (CAP, 95, 95.0, 0.5),  # 5 of 10 s
        (CAP, 45, 90.0, 0.5),  # 10 of 20 s
        (CAP, 120, 120.0, 0.0),  # past the cap
        (dict(CAP, iterations=20), 15, 15.0, 0.5),  # the steps end before the time does
        (dict(CAP, warmdown_shape="cosine"), 99, 99.0, 0.0244717),  # (1 - cos(pi / 10)) / 2
        (dict(CAP, warmdown_iters=0), 99, 99.0, 1.0),  # no warmdown before the cap either
        (dict(CAP, quantizer="gptq"), 83, 83.0, 0.5),  # packing takes the last 12 s
        (RECORD, 9200, 0.0, 0.75),  # 46 %: a quarter of the warmdown is over
        (RECORD, 12800, 1e6, 0.5),  # without a cap the time does not matter
        (CAPPED, 2976, 384.0, 0.5),  # 64 % of the time, 15 % of the steps
        (dict(CAPPED, quantizer="gptq"), 2976, 376.32, 0.5),  # 64 % of 588 s
        (CAPPED, 4660, 601.0, 0.0),  # past the end
        (dict(CAPPED, iterations=400), 256, 33.0, 0.5),  # the steps end before the time does
        (dict(RECORD, min_lr=0.1), 19000, 0.0, 0.1),  # 0.05 / 0.72 would be below it
        (dict(LINEAR, min_lr=0.3), 9, 0.0, 0.3),  # with WARMDOWN_ITERS too: 0.25 without it
        (dict(LINEAR, warmdown_frac=1.0), 3, 0.0, 0.7),  # the whole run is the warmdown
    ],
)
def test_the_learning_rate_follows_the_table(settings, step, seconds, expected):
    scale = train_gpt.lr_scale(tiny_config(**settings), step, seconds)
    assert scale == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "settings, step, expected",
    [
        (dict(), 0, 0.92),  # start
        (dict(), 375, 0.9375),  # a quarter of the way
        (dict(), 7000, 0.99),  # warm
        (dict(muon_momentum_warmup_steps=0), 0, 0.99),
    ],
)
def test_muon_momentum_follows_the_table(settings, step, expected):
    config = train_gpt.Config(**settings)
    assert train_gpt.momentum_at(config, step) == pytest.approx(expected, abs=1e-12)


# ---- averages ----
RECORDED = [torch.tensor([value, -value]) for value in (1.0, 3.0, 2.0, 7.0, 5.0)]
FIRST = torch.tensor([10.0, -10.0])
LOW, HIGH = (1.0, 0.15, 0.1, 0.05, 0.0), (1.0,) * 5  # learning-rate scales of five steps


def emas(cap):
    """The averages after each of the five steps, with decays min(cap, 1/10, 2/11, 3/12, 4/13,
    5/14)."""
    ema, out = FIRST, []
    for value, decay in zip(RECORDED, (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14)):
        decay = min(cap, decay)
        ema = decay * ema + (1 - decay) * value
        out.append(ema)
    return out


def swa(every, decay):
    return dict(swa_enabled=True, swa_every=every, ema_decay=decay)


EMA, RAW = dict(ema_decay=0.997), dict(ema_decay=0.0)
LATE = (1.0, 0.2, 0.1, 0.05, 0.0)  # step 2's scale 0.2 is not below 0.2


@pytest.mark.parametrize(
    "settings, scales, kind, expected",
    [
        (EMA, LOW, "EMA weights (decay 0.997)", emas(0.997)[-1]),
        (dict(ema_decay=0.2), LOW, "EMA weights (decay 0.2)", emas(0.2)[-1]),
        (RAW, LOW, "raw weights", RECORDED[-1]),
        (swa(4, 0.997), LOW, "mean of 1 snapshots of the EMA", emas(0.997)[3]),
        (swa(4, 0.0), LOW, "mean of 1 snapshots of the raw weights", RECORDED[3]),
        (swa(2, 0.997), LOW, "mean of 2 ", (emas(0.997)[1] + emas(0.997)[3]) / 2),
        (swa(2, 0.997), LATE, "mean of 1 ", emas(0.997)[3]),
        (swa(1, 0.0), LOW, "mean of 4 ", torch.tensor([17 / 4, -17 / 4])),  # 3, 2, 7, 5
        (swa(4, 0.997), HIGH, "EMA weights (decay 0.997); warning: SWA", emas(0.997)[-1]),
        (swa(4, 0.0), HIGH, "raw weights; warning: SWA took no snapshot", RECORDED[-1]),
    ],
)
def test_snapshots_come_before_the_ema_and_the_ema_before_the_raw_weights(
    settings, scales, kind, expected
):
    param = torch.nn.Parameter(FIRST.clone())
    average, restored = (
        train_gpt.WeightAverage([param], tiny_config(**settings)) for _ in range(2)
    )
    for number, (value, scale) in enumerate(zip(RECORDED, scales)):
        with torch.no_grad():
            param.copy_(value)
        average.update(number, scale)
    restored.load_state_dict(train_gpt.private_copy(average.state_dict()))
    for one in (average, restored):
        found, (tensor,) = one.exported()
        assert found.startswith(kind)
        torch.testing.assert_close(tensor, expected)
