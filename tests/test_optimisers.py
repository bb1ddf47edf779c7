"""Muon and AdamW against plain references, schedules and weight averages against hand-written
tables."""

import math

import pytest
import torch
from helpers import assert_near, layers_for, tiny_config, weights

import train_gpt

EVERYTHING = dict(nfm_enabled=True, flow_enabled=True, e2e_ttt_enabled=True, ve_dim=8)


def build(**changes):
    config = tiny_config(**changes)
    model = train_gpt.GPT(config)
    muon, adamw = train_gpt.build_optimizers(model, config)
    for group in adamw.param_groups:
        group["lr"] = group["base_lr"]
    return config, model, muon, adamw


def give_gradients(model, seed, size=1.0):
    """A random gradient for every parameter; returns copies by name."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = size * torch.randn(param.shape, generator=generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def step(config, muon, adamw, clip=0.0):
    train_gpt.reduce_clip_step(muon, adamw, train_gpt.Comm(), clip)


# --------------------------------------------------------------------------------------------- Muon
def newton_schulz(matrix, steps):
    """The quintic iteration on one matrix, on its transpose where it is tall."""
    x = matrix / matrix.norm()
    if x.size(0) > x.size(1):
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def muon_step(weight, grad, buffer, lr, momentum, decay, steps, row_norm=False):
    """One step of one matrix: (weight, buffer)."""
    buffer = momentum * buffer + grad
    ahead = grad + momentum * buffer  # Nesterov looks one step ahead
    if row_norm:  # MuonEq-R
        for row in ahead:
            row /= row.norm()
    update = newton_schulz(ahead, steps)
    factor = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
    return weight * (1 - lr * decay) - lr * factor * update, buffer


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("ns_steps", [1, 5])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_takes_the_steps_of_a_loop_over_matrices(decay, ns_steps, row_norm):
    config, model, muon, adamw = build(
        muon_wd=decay, muon_ns_steps=ns_steps, matrix_lr=0.07, muon_row_norm=row_norm
    )
    expected = {n: p for n, p in weights(model).items() if is_block_matrix(n)}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    for number, momentum in enumerate((0.85, 0.9, 0.95, 0.95)):
        muon.momentum, muon.lr = momentum, 0.07 / (1 + number)
        grads = give_gradients(model, number)
        step(config, muon, adamw)
        for name in expected:
            expected[name], buffers[name] = muon_step(
                expected[name],
                grads[name],
                buffers[name],
                muon.lr,
                momentum,
                decay,
                ns_steps,
                row_norm,
            )
    after = weights(model)
    for name, value in expected.items():
        assert_near(after[name], value, 2e-5, 1e-4, name)


def is_block_matrix(name):
    """The six matrices of every block, written down rather than derived."""
    kinds = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    return name.startswith("blocks.") and name.endswith(tuple(f".{kind}.weight" for kind in kinds))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48), (16, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_nearly_orthogonal_with_the_singular_vectors_of_the_gradient(shape, dtype):
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    muon = train_gpt.Muon(params, lr=1.0, momentum=0.0, weight_decay=0.0, dtype=dtype)
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


def test_a_gradient_of_zeros_gives_a_finite_update():
    config, model, muon, adamw = build(muon_wd=0.0, adam_wd=0.0)
    before = weights(model)
    give_gradients(model, 0, size=0.0)
    step(config, muon, adamw)
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


def test_restored_optimisers_go_on_bit_for_bit():
    config, model, muon, adamw = build()
    for number in range(2):
        give_gradients(model, number)
        step(config, muon, adamw)
    _, other, other_muon, other_adamw = build()
    other.load_state_dict(model.state_dict())
    other_muon.load_state_dict(train_gpt.private_copy(muon.state_dict()))
    other_adamw.load_state_dict(train_gpt.private_copy(adamw.state_dict()))
    for number in range(2, 4):
        give_gradients(model, number), give_gradients(other, number)
        step(config, muon, adamw), step(config, other_muon, other_adamw)
    left, right = weights(model), weights(other)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_saved_momentum_is_a_copy():
    config, model, muon, adamw = build()
    give_gradients(model, 0)
    step(config, muon, adamw)
    saved = {name: value.clone() for name, value in muon.state_dict().items()}
    state = muon.state_dict()
    give_gradients(model, 1)
    step(config, muon, adamw)
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    assert any(not torch.equal(state[name], now) for name, now in muon.state_dict().items())


# -------------------------------------------------------------------------------------------- AdamW
def test_adamw_takes_the_published_steps_with_its_own_rate_per_group():
    config, model, muon, adamw = build(
        embed_lr=0.05,
        scalar_lr=0.02,
        adam_wd=0.1,
        beta1=0.8,
        beta2=0.9,
        adam_eps=1e-6,
        **EVERYTHING,
    )
    expected = {n: p.double() for n, p in weights(model).items() if not is_block_matrix(n)}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for number in range(1, 4):
        grads = give_gradients(model, number)
        step(config, muon, adamw)
        for name, value in expected.items():
            lr = (
                0.05
                if name in ("tok_emb.weight", "bigram.embed.weight", "ve.embed.weight")
                else 0.02
            )
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
    config, model, muon, adamw = build(embed_lr=0.5, scalar_lr=0.25, **settings)
    before = weights(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    step(config, muon, adamw)
    after = weights(model)
    for name, rate, decay in (("tok_emb.weight", 0.5, embed), ("skip_weights", 0.25, scalar)):
        torch.testing.assert_close(after[name], before[name] * (1 - rate * decay))


# ------------------------------------------------------------------------------------------- groups
def preset_config(name, **changes):
    return train_gpt.Config(**{**train_gpt.PRESETS[name], "preset": name, **changes})


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_every_parameter_of_a_preset_is_in_exactly_one_group(preset):
    with torch.device("meta"):
        model = train_gpt.GPT(preset_config(preset))
    groups = train_gpt.parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(groups) == {"muon", "embed", "scalar"}
    assert set(groups["muon"]) == {name for name in names if is_block_matrix(name)}
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve.embed.weight"}
    assert set(groups["embed"]) == tables & set(names)


FOUR_SYSTEMS = [
    "nfm_7k",
    "base_7k",
    "base_20k",
    "flow_20k",
    "ttt_linear_10l",
    "ttt_linear_11l",
    "slot_11l",
]


@pytest.mark.parametrize("preset", train_gpt.PRESETS)
def test_the_optimisers_of_a_preset_hold_every_parameter_once(preset):
    small = dict(
        num_layers=6,  # the looped layers of some presets are 3 to 5
        model_dim=32,
        num_heads=4,
        num_kv_heads=2,
        rope_dims=4,
        xsa_last_n=3,
        vocab_size=64,
        bigram_vocab_size=32,
        ttt_freeze_blocks=0,
    )
    config = preset_config(preset, **small, **layers_for(preset))
    model = train_gpt.GPT(config)
    muon, adamw = train_gpt.build_optimizers(model, config)
    held = [id(p) for stack in muon.stacks for p in stack]
    held += [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    if preset in FOUR_SYSTEMS:  # the others have rates of their own
        assert [group["base_lr"] for group in adamw.param_groups] == [0.035, 0.025]
        assert muon.lr == 0.025


@pytest.mark.parametrize("change", ["drop", "repeat"])
def test_a_parameter_in_no_group_or_in_two_stops_the_start_by_name(change, monkeypatch):
    original = train_gpt.parameter_groups

    def spoiled(model):
        groups = original(model)
        if change == "drop":
            groups["scalar"].pop("smear.gate")
        else:
            groups["embed"]["smear.gate"] = groups["scalar"]["smear.gate"]
        return groups

    monkeypatch.setattr(train_gpt, "parameter_groups", spoiled)
    with pytest.raises((AssertionError, ValueError), match="smear.gate|more than one"):
        build()


# ----------------------------------------------------------------------------------------- clipping
def momenta(model, muon, adamw):
    """(Muon's buffers, AdamW's first moments): after one step proportional to the gradients they
    saw."""
    return torch.cat([b.flatten() for b in muon.state_dict().values()]), {
        name: adamw.state[p]["exp_avg"] for name, p in model.named_parameters() if p in adamw.state
    }


@pytest.mark.parametrize(
    "size, clip, clipped", [(1.0, 0.3, True), (1e-6, 0.3, False), (1.0, 0.0, False)]
)
def test_gradients_are_clipped_by_their_global_norm(size, clip, clipped):
    config, model, muon, adamw = build()
    grads = give_gradients(model, 0, size)
    total = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    factor = clip / total if clipped else 1.0
    step(config, muon, adamw, clip)
    buffers, moments = momenta(model, muon, adamw)
    matrices = math.sqrt(
        sum(grads[n].double().square().sum().item() for n in grads if is_block_matrix(n))
    )
    assert buffers.norm().item() == pytest.approx(factor * matrices, rel=1e-4)
    assert len(moments) == sum(not is_block_matrix(name) for name in grads)
    for name, moment in moments.items():
        torch.testing.assert_close(
            moment, (1 - config.beta1) * factor * grads[name], rtol=1e-4, atol=1e-12
        )


def test_a_parameter_without_a_gradient_counts_as_zero():
    config, model, muon, adamw = build(muon_wd=0.0, adam_wd=0.0)
    give_gradients(model, 0)
    model.smear.gate.grad = None
    before = weights(model)
    step(config, muon, adamw, 0.3)
    assert torch.equal(model.smear.gate, before["smear.gate"])
    assert not torch.equal(model.skip_weights, before["skip_weights"])


# ---------------------------------------------------------------------------------------- schedules
LINEAR = dict(iterations=10, warmdown_iters=4, warmdown_shape="linear")
COSINE = dict(LINEAR, warmdown_shape="cosine")
CAP = dict(iterations=1000, warmdown_iters=10, max_wallclock_seconds=100.0)


@pytest.mark.parametrize(
    "settings, step, seconds, expected",
    [
        (LINEAR, 0, 0.0, 1.0),  # start
        (LINEAR, 5, 0.0, 1.0),  # five of ten left, the warmdown has four
        (LINEAR, 6, 0.0, 1.0),  # four left: the warmdown begins at the full rate
        (LINEAR, 7, 0.0, 0.75),  # 3/4 left
        (LINEAR, 8, 0.0, 0.5),  # 2/4 left
        (LINEAR, 9, 0.0, 0.25),  # 1/4 left: the last step still learns
        (LINEAR, 10, 0.0, 0.0),  # past the end
        (LINEAR, 11, 0.0, 0.0),  # never negative
        (COSINE, 6, 0.0, 1.0),  # (1 - cos(pi)) / 2
        (COSINE, 7, 0.0, 0.8535534),  # (1 - cos(3 pi / 4)) / 2
        (COSINE, 8, 0.0, 0.5),  # (1 - cos(pi / 2)) / 2
        (COSINE, 9, 0.0, 0.1464466),  # (1 - cos(pi / 4)) / 2
        (COSINE, 10, 0.0, 0.0),  # (1 - cos(0)) / 2
        (dict(LINEAR, warmdown_iters=0), 9, 0.0, 1.0),  # no warmdown
        (dict(LINEAR, warmdown_iters=20), 0, 0.0, 0.5),  # longer than the run: begins half-way down
        (LINEAR, 8, 1e6, 0.5),  # without a cap the time does not matter
        (CAP, 0, 0.0, 1.0),  # nothing measured yet
        (CAP, 50, 50.0, 1.0),  # 1 s a step: the warmdown takes 10 s, 50 s are left
        (CAP, 90, 90.0, 1.0),  # 10 s left: it begins
        (CAP, 95, 95.0, 0.5),  # 5 of 10 s
        (CAP, 99, 99.0, 0.1),  # 1 of 10 s
        (CAP, 40, 80.0, 1.0),  # 2 s a step: the warmdown takes 20 s, 20 s are left
        (CAP, 45, 90.0, 0.5),  # 10 of 20 s
        (CAP, 120, 120.0, 0.0),  # past the cap
        (dict(CAP, iterations=20), 15, 15.0, 0.5),  # the steps end before the time does
        (dict(CAP, warmdown_shape="cosine"), 95, 95.0, 0.5),  # cosine of the time left
        (dict(CAP, warmdown_shape="cosine"), 99, 99.0, 0.0244717),  # (1 - cos(pi / 10)) / 2
        (dict(CAP, warmdown_iters=0), 99, 99.0, 1.0),  # no warmdown before the cap either
    ],
)
def test_the_learning_rate_follows_the_table(settings, step, seconds, expected):
    assert train_gpt.lr_scale(tiny_config(**settings), step, seconds) == pytest.approx(
        expected, abs=1e-6
    )


# The record of 2026-04-09: full rate for 28 % of the run, then linear to 0.
RECORD = dict(iterations=20000, warmdown_frac=0.72)
CAPPED = dict(RECORD, max_wallclock_seconds=600.0)


@pytest.mark.parametrize(
    "settings, step, seconds, expected",
    [
        (RECORD, 0, 0.0, 1.0),  # start
        (RECORD, 5600, 0.0, 1.0),  # 28 % of the steps: the warmdown begins at the full rate
        (RECORD, 9200, 0.0, 0.75),  # 46 %: a quarter of the warmdown is over
        (RECORD, 12800, 0.0, 0.5),  # 64 %: half of it
        (RECORD, 20000, 0.0, 0.0),  # the end
        (RECORD, 12800, 1e6, 0.5),  # without a cap the time does not matter
        (CAPPED, 0, 0.0, 1.0),  # start
        (CAPPED, 1302, 168.0, 1.0),  # 28 % of the time
        (CAPPED, 2139, 276.0, 0.75),  # 46 % of the time
        (CAPPED, 2976, 384.0, 0.5),  # 64 % of the time, 15 % of the steps
        (CAPPED, 4604, 594.0, 1 / 72),  # 99 % of the time
        (CAPPED, 4651, 600.0, 0.0),  # the end
        (CAPPED, 4660, 601.0, 0.0),  # past it
        (dict(CAPPED, iterations=400), 256, 33.0, 0.5),  # the steps end before the time does
        (dict(RECORD, warmdown_shape="cosine"), 9200, 0.0, 0.8535534),  # (1 - cos(3 pi / 4)) / 2
        (dict(RECORD, min_lr=0.1), 12800, 0.0, 0.5),  # above the floor it changes nothing
        (dict(RECORD, min_lr=0.1), 19000, 0.0, 0.1),  # 0.05 / 0.72 would be below it
        (dict(RECORD, min_lr=0.1), 20000, 0.0, 0.1),  # and there it stays
        (dict(LINEAR, min_lr=0.3), 9, 0.0, 0.3),  # with WARMDOWN_ITERS too: 0.25 without it
        (dict(LINEAR, warmdown_frac=1.0), 3, 0.0, 0.7),  # the whole run is the warmdown
    ],
)
def test_the_learning_rate_follows_the_table_of_a_warmdown_by_share(
    settings, step, seconds, expected
):
    assert train_gpt.lr_scale(tiny_config(**settings), step, seconds) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize(
    "settings, step, seconds, expected",
    [
        (RECORD, 5000, 0.0, 0.25),
        (RECORD, 25000, 0.0, 1.0),
        (CAPPED, 1000, 150.0, 0.25),  # of the time
        (CAPPED, 15000, 150.0, 0.75),  # of the steps, which end first
    ],
)
def test_the_share_of_the_run_that_is_over_is_that_of_what_ends_it(
    settings, step, seconds, expected
):
    assert train_gpt.run_fraction(tiny_config(**settings), step, seconds) == expected


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.92),  # start
        (375, 0.9375),  # a quarter of the way
        (750, 0.955),  # half-way
        (1500, 0.99),  # warm
        (7000, 0.99),  # and stays
    ],
)
def test_muon_momentum_follows_the_table(step, expected):
    assert train_gpt.momentum_at(train_gpt.Config(), step) == pytest.approx(expected, abs=1e-12)


def test_muon_momentum_without_a_warm_up_is_constant():
    assert train_gpt.momentum_at(train_gpt.Config(muon_momentum_warmup_steps=0), 0) == 0.99


# ----------------------------------------------------------------------------------------- averages
RECORDED = [torch.tensor([value, -value]) for value in (1.0, 3.0, 2.0, 7.0, 5.0)]
FIRST = torch.tensor([10.0, -10.0])
LOW, HIGH = (1.0, 0.15, 0.1, 0.05, 0.0), (1.0,) * 5  # learning-rate scales of five steps
SNAPSHOTS = dict(swa_enabled=True, swa_every=4)


def averaged(scales=LOW, **settings):
    """WeightAverage after five recorded steps at the given learning-rate scales."""
    param = torch.nn.Parameter(FIRST.clone())
    config = tiny_config(**{"ema_full_steps": 1, **settings})  # averaged as in a long run
    average = train_gpt.WeightAverage([param], config)
    for number, (value, scale) in enumerate(zip(RECORDED, scales)):
        with torch.no_grad():
            param.copy_(value)
        average.update(number, scale)
    return average


def emas(cap):
    """The averages after each of the five steps, with decays min(cap, 1/10, 2/11, 3/12, 4/13,
    5/14)."""
    ema, out = FIRST, []
    for value, decay in zip(RECORDED, (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14)):
        decay = min(cap, decay)
        ema = decay * ema + (1 - decay) * value
        out.append(ema)
    return out


@pytest.mark.parametrize("cap", [0.997, 0.2])
def test_the_ema_is_the_hand_computed_mean_of_five_steps(cap):
    kind, (got,) = averaged(ema_decay=cap).exported()
    assert (
        kind
        == f"EMA weights (decay {min(cap, 5 / 14):.4f}: {1 / (1 - min(cap, 5 / 14)):.0f} steps)"
    )
    torch.testing.assert_close(got, emas(cap)[-1])


def test_snapshots_are_taken_of_the_ema_every_n_steps_below_the_scale():
    """Steps 2 and 4 (counted from 1) end a pair; step 2's scale 0.2 is not below 0.2."""
    average = averaged((1.0, 0.2, 0.1, 0.05, 0.0), swa_enabled=True, swa_every=2, ema_decay=0.997)
    torch.testing.assert_close(average.exported()[1][0], emas(0.997)[3])
    average = averaged((1.0, 0.19, 0.1, 0.05, 0.0), swa_enabled=True, swa_every=2, ema_decay=0.997)
    torch.testing.assert_close(average.exported()[1][0], (emas(0.997)[1] + emas(0.997)[3]) / 2)


def test_snapshots_are_taken_of_the_raw_weights_without_an_ema():
    average = averaged((1.0, 0.19, 0.1, 0.05, 0.0), swa_enabled=True, swa_every=1, ema_decay=0.0)
    torch.testing.assert_close(
        average.exported()[1][0], torch.tensor([17 / 4, -17 / 4])
    )  # of 3, 2, 7, 5


@pytest.mark.parametrize(
    "settings, scales, expected",
    [
        (dict(ema_decay=0.997), LOW, emas(0.997)[-1]),  # EMA alone
        (dict(ema_decay=0.0), LOW, RECORDED[-1]),  # neither: the raw weights
        (dict(ema_decay=0.997, **SNAPSHOTS), LOW, emas(0.997)[3]),  # one snapshot, of the EMA
        (dict(ema_decay=0.0, **SNAPSHOTS), LOW, RECORDED[3]),  # one snapshot, of the raw weights
        (
            dict(ema_decay=0.997, **SNAPSHOTS),
            HIGH,
            emas(0.997)[-1],
        ),  # never below the scale: the EMA
        (dict(ema_decay=0.0, **SNAPSHOTS), HIGH, RECORDED[-1]),  # no snapshot and no EMA: raw
    ],
)
def test_snapshots_come_before_the_ema_and_the_ema_before_the_raw_weights(
    settings, scales, expected
):
    average = averaged(scales, **settings)
    torch.testing.assert_close(average.exported()[1][0], expected)


def test_averages_survive_their_state_dict():
    settings = dict(swa_enabled=True, swa_every=1, ema_decay=0.997, ema_full_steps=1)
    average = averaged(**settings)
    restored = train_gpt.WeightAverage(
        [torch.nn.Parameter(torch.zeros(2))], tiny_config(**settings)
    )
    restored.load_state_dict(train_gpt.private_copy(average.state_dict()))
    assert restored.exported()[0] == average.exported()[0]
    assert torch.equal(restored.exported()[1][0], average.exported()[1][0])
    for one in (average, restored):
        with torch.no_grad():
            one.params[0].copy_(torch.tensor([4.0, 4.0]))
        one.update(5, 0.0)
    assert torch.equal(restored.exported()[1][0], average.exported()[1][0])


AVERAGED = dict(ema_decay=0.997, iterations=7000)  # a horizon of 333 steps


@pytest.mark.parametrize(
    "settings, step, seconds, expected",
    [
        (AVERAGED, 6999, 0.0, 0.997),  # the four systems: as published
        (dict(AVERAGED, iterations=20000), 19999, 0.0, 0.997),
        (dict(AVERAGED, iterations=5000), 4999, 0.0, 0.997),  # just long enough
        # Half of it: an eighth of the horizon. 1,500 steps: 0.3 cubed, which leaves nine steps.
        (dict(AVERAGED, iterations=2500), 2499, 0.0, 1 - 8 * 0.003),
        (dict(AVERAGED, iterations=1500), 1499, 0.0, 1 - 0.003 / 0.027),
        # 1,400 steps would leave 7.3 steps, too few to help.
        (dict(AVERAGED, iterations=1400), 1399, 0.0, 0.0),
        (dict(AVERAGED, iterations=300), 299, 0.0, 0.0),
        (AVERAGED, 0, 0.0, 0.1),  # the initial weights are left behind
        (AVERAGED, 80, 0.0, 0.9),
        # With a wallclock cap the length is what the pace so far will give.
        (dict(AVERAGED, max_wallclock_seconds=600.0), 4650, 400.0, 0.997),  # 6975 steps
        (dict(AVERAGED, max_wallclock_seconds=600.0), 1250, 300.0, 1 - 8 * 0.003),  # 2500 steps
        (dict(AVERAGED, max_wallclock_seconds=600.0), 100, 200.0, 0.0),  # 300 steps
        # The record of 2026-04-09, 4,650 steps: its own decay whatever the length.
        (dict(ema_decay=0.9965, ema_full_steps=1, iterations=20000), 4650, 0.0, 0.9965),
        (dict(ema_decay=0.9965, ema_full_steps=1, iterations=300), 299, 0.0, 300 / 309),
    ],
)
def test_the_average_forgets_sooner_in_a_short_run(settings, step, seconds, expected):
    config = tiny_config(**settings)
    assert train_gpt.ema_decay_at(config, step, seconds) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "seconds, scale, momentum",
    [
        (0.0, 1.0, 0.92),  # start
        (96.75, 1.0, 0.955),  # step 750, half of the momentum's warm-up
        (168.0, 1.0, 0.92 + 0.07 * 1302 / 1500),  # 28 % of the time: the warmdown begins
        (276.0, 0.75, 0.99),  # 46 %
        (384.0, 0.5, 0.99),  # 64 %
        (600.0, 0.0, 0.99),  # the end, 4,651 steps
    ],
)
def test_the_preset_of_the_record_follows_its_table(seconds, scale, momentum):
    config = preset_config("record_0409", quantizer="lite")  # which needs no time of the cap
    number = int(seconds / 0.129)  # 129 ms a step
    assert train_gpt.lr_scale(config, number, seconds) == pytest.approx(scale, abs=1e-6)
    assert train_gpt.momentum_at(config, number) == pytest.approx(momentum, abs=1e-9)
    if number > 3000:
        assert train_gpt.ema_decay_at(config, number, seconds) == 0.9965


def test_the_warmdown_ends_when_the_quantiser_s_time_begins():
    config = preset_config("record_0409")
    number, pace = 3000, 0.129
    end = train_gpt.training_cap(config, number, number * pace)
    assert 0 < end < config.max_wallclock_seconds
    fraction = number * pace / end
    scale = train_gpt.lr_scale(config, number, number * pace)
    assert scale == pytest.approx((1 - fraction) / 0.72)


def test_the_groups_of_the_record_have_its_rates_and_decays():
    small = dict(num_layers=8, model_dim=32, num_heads=4, num_kv_heads=2)
    config = preset_config("record_0409", rope_dims=4, xsa_last_n=8, vocab_size=64, **small)
    muon, adamw = train_gpt.build_optimizers(train_gpt.GPT(config), config)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.085, 0.02]
    assert [group["base_lr"] for group in adamw.param_groups] == [0.03, 0.02]
    assert (muon.lr, muon.weight_decay, muon.row_norm) == (0.022, 0.095, True)


def test_a_short_run_exports_its_raw_weights_and_says_so():
    kind, (got,) = averaged(ema_decay=0.997, ema_full_steps=5000, iterations=300).exported()
    assert torch.equal(got, RECORDED[-1])
    assert kind == "raw weights (a short run: see EMA_FULL_STEPS)"
