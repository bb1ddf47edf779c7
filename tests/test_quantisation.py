"""Quantisation: what rounding may cost, how the size is found, what the file must keep, and what
its reader must refuse."""

import dataclasses
import hashlib
import json
import lzma
import math
import os
import random
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from helpers import (
    ROOT,
    environment,
    events,
    layers_for,
    random_model,
    run_main,
    tiny_config,
)

import train_gpt as golf
from train_gpt import ArtifactError

# One block, every kind of tensor, under 5,000 weights: its file opens in a few milliseconds.
SMALL = dict(
    vocab_size=16,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    rope_dims=2,
    xsa_last_n=1,
    bigram_vocab_size=8,
    bigram_dim=8,
    nfm_hidden_dim=8,
    ttt_freeze_blocks=0,
)
TOKENIZER_SHA = "ab" * 32


@pytest.fixture
def all_integers(monkeypatch):
    """Matrices of tiny models are stored as integers too, as those of a real one are."""
    monkeypatch.setattr(golf, "HALF_LIMIT", 64)


# ---- lite: rounding ----


@pytest.mark.parametrize("columns", [1, 2, 5, 300, 2000])
@pytest.mark.parametrize("bits, top", [(5, 15), (6, 31), (8, 127)])
def test_each_row_is_rounded_by_the_clip_of_the_least_squared_error(bits, top, columns):
    """Against all candidates in float64. No step is below 1 by the largest code, as published."""
    rows = np.random.default_rng(3).standard_t(3, (54, columns))
    # Outliers, so that clipping pays; rows of every size, zeros and what float16 cannot hold.
    sizes = [0.0, 1e-30, 1e-7, 0.9, 60_000.0 * top, 1e30, *10 ** np.linspace(-2, 2, 48)]
    rows[:6] = np.linspace(-1, 1, columns)
    weight = torch.from_numpy(rows * np.array(sizes)[:, None]).float()
    codes, scales = golf.quantize_rows(weight, bits)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert scales.shape == (len(weight), 1) and (scales >= np.float16(1 / top)).all()
    exact, steps, errors = weight.double(), scales.double(), []
    assert torch.equal(codes.double(), (exact / steps).round().clamp(-top, top))
    for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.quantile(exact.abs(), quantile, dim=1, keepdim=True)
        step = (clip / top).clamp(1 / top, 65504.0).half().double()
        rounded = (exact / step).round().clamp(-top, top) * step
        errors.append((rounded - exact).square().sum(1))
    least = torch.stack(errors).amin(0)
    found = (codes * steps - exact).square().sum(1)
    # In float32 a float16 step may fall to the other side, which moves a row's error a little.
    assert ((found - least).abs() <= 2e-2 * least + 1e-12).all()
    assert ((found - least).abs() <= 1e-4 * least + 1e-12).float().mean() > 0.9


# ---- schemes ----

SCHEMES_AT_FULL_SIZE = [  # name, shape, under lite, under gptq
    ("tok_emb.weight", (1024, 512), "int8", "grid"),
    ("ttt.c_q.weight", (512, 512), "int8", "grid"),
    ("blocks.0.attn.c_q.weight", (512, 512), "int6", "grid"),
    ("blocks.4.mlp.fc.weight", (1536, 512), "int6", "grid"),
    ("blocks.5.mlp.fc.weight", (1536, 512), "int5", "grid"),
    ("blocks.5.attn.proj.weight", (512, 512), "int6", "grid"),
    ("bigram.proj.weight", (512, 128), "fp16", "grid"),  # 65,536: the last size that stays
    ("bigram.proj.weight", (512, 129), "int8", "grid"),
    ("blocks.3.attn.attn_gate.weight", (8, 512), "fp16", "grid"),
    ("ttt.w", (8, 64, 64), "fp16", "fp16"),
    ("skip_weights", (5, 512), "fp32", "fp16"),
    ("blocks.3.resid_mix", (2, 512), "fp32", "fp16"),
    ("nfm.gate", (), "fp32", "fp16"),
    ("nfm.inp.bias", (256,), "fp32", "fp16"),
]


def test_each_tensor_is_stored_as_the_reference_says():
    embeddings_in_6 = golf.Config.from_env({"PRESET": "base_20k"})
    for name, shape, lite, gptq in SCHEMES_AT_FULL_SIZE:
        assert golf.scheme_of(name, shape, golf.Config(), int5_layers=(5,)) == lite, name
        assert golf.gptq_scheme_of(name, shape) == gptq, name
        if lite.startswith("int"):
            assert golf.scheme_of(name, shape, embeddings_in_6) == "int6"


# ---- lite: the file and its size ----


def stored(state, config, int5_layers=()):
    """Weights that an artifact of lite must give back: every tensor rounded once, by hand."""
    out = {}
    for name, value in state.items():
        scheme = golf.scheme_of(name, value.shape, config, int5_layers)
        if scheme.startswith("int"):
            codes, scales = golf.quantize_rows(value, int(scheme[3:]))
            out[name] = codes.float() * scales.float()
        else:
            out[name] = value.half().float() if scheme == "fp16" else value
    return out


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    "compressor, block_bits, embed_bits, int5_layers",
    [("zstd", 6, 8, (0, 2)), ("lzma", 6, 6, (1,)), ("zstd", 8, 5, ())],
)
def test_an_artifact_gives_back_exactly_the_rounded_weights(
    all_integers, compressor, block_bits, embed_bits, int5_layers
):
    bits = dict(block_bits=block_bits, embed_bits=embed_bits)
    config = tiny_config(**dict(SMALL, num_layers=3), **bits, compressor=compressor)
    state = random_model(config).state_dict()
    blob = golf.pack_artifact(config, state, int5_layers, TOKENIZER_SHA)
    found = golf.unpack_artifact(blob)[1]
    assert_same(found, stored(state, config, int5_layers))
    assert blob == golf.pack_artifact(config, state, int5_layers, TOKENIZER_SHA)
    again = golf.unpack_artifact(golf.pack_artifact(config, found, int5_layers))[1]
    assert_same(again, found)


def test_the_file_is_laid_out_as_older_readers_expect(all_integers):
    """Written here byte by byte: files of before must open, new ones must open there."""
    config = tiny_config(**SMALL)
    state = random_model(config).state_dict()
    order = ["int5", "int6", "int8", "fp16", "fp32"]
    rows = [
        [name, list(value.shape), golf.scheme_of(name, value.shape, config, (0,))]
        for name, value in state.items()
    ]
    rows.sort(key=lambda row: order.index(row[2]))
    values, all_scales = b"", b""
    for name, _, scheme in rows:
        if scheme.startswith("int"):
            codes, scales = golf.quantize_rows(state[name], int(scheme[3:]))
            values += codes.numpy().tobytes()
            all_scales += scales.numpy().tobytes()
        else:
            values += state[name].numpy().astype(f"<f{int(scheme[2:]) // 8}").tobytes()
    header = dict(
        config=config.as_dict("arch", "eval"), tokenizer_sha256=TOKENIZER_SHA, tensors=rows
    )
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(4, "little") + text + values + all_scales
    body = zstandard.ZstdCompressor(level=16).compress(raw)
    sizes = len(raw).to_bytes(8, "little") + len(body).to_bytes(8, "little")
    by_hand = b"PGolf\r\n\x1a\1\0\0\0" + sizes + hashlib.sha256(body).digest() + body
    assert golf.pack_artifact(config, state, (0,), TOKENIZER_SHA) == by_hand


@pytest.mark.parametrize("preset", sorted(golf.PRESETS))
def test_architecture_and_evaluation_of_every_preset_travel_in_its_artifact(preset, tmp_path):
    shrink = dict(SMALL, num_layers=2, ttt_chunk_tokens=4096, **layers_for(preset))
    names = {name.upper(): str(value) for name, value in shrink.items()}
    config = golf.Config.from_env({"PRESET": preset, "EVAL_STRIDE": "48", **names})
    config = dataclasses.replace(config, quantizer="lite", run_id="mine", data_path="/secret/place")
    path = tmp_path / "model.ptz"
    blob = golf.pack_artifact(config, random_model(config).state_dict(), (), TOKENIZER_SHA)
    path.write_bytes(blob)
    loaded = golf.load_weights(path)
    assert loaded.config.as_dict("arch", "eval") == config.as_dict("arch", "eval")
    assert loaded.tokenizer_sha256 == TOKENIZER_SHA
    assert loaded.sha256 == golf.sha256_file(path)
    golf.GPT(loaded.config).load_state_dict(loaded.state_dict)  # strict
    for foreign in (b"/secret/place", b"run_id", b"seed"):
        assert foreign not in payload(blob)


OUTWARD_FROM_THE_MIDDLE = [5, 6, 4, 7, 3, 8, 2, 9, 1, 10, 0]


def test_lite_lowers_mlps_from_the_middle_outward_until_the_file_fits(all_integers):
    config = tiny_config(**dict(SMALL, num_layers=11))
    state = random_model(config).state_dict()
    sizes = [
        len(golf.pack_artifact(config, state, tuple(OUTWARD_FROM_THE_MIDDLE[:count])))
        for count in range(12)
    ]
    assert sizes == sorted(set(sizes), reverse=True)
    for count, slack in ((0, 0), (1, 0), (4, 5), (11, 0)):
        fitted = dataclasses.replace(config, budget_bytes=sizes[count] + 500 + slack)
        blob, layers = golf.fit_lite(fitted, state, 500)
        assert list(layers) == OUTWARD_FROM_THE_MIDDLE[:count]
        assert len(blob) + 500 <= fitted.budget_bytes
        assert_same(golf.unpack_artifact(blob)[1], stored(state, config, layers))
    over = dataclasses.replace(config, budget_bytes=sizes[11] + 499)
    with pytest.raises(ArtifactError, match="BUDGET_BYTES") as error:
        golf.fit_lite(over, state, 500)
    assert error.value.code == 4


# ---- gptq: codes ----


def random_hessian(size, seed=0, tokens=None):
    """Second moment of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens or 4 * size, size, generator=generator, dtype=torch.float64)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = noise @ mix
    return inputs.T @ inputs / len(inputs)


def steps_of(grid, step):
    """(R, C) steps of a grid."""
    rows, columns = (torch.from_numpy(side) for side in golf.grid_steps(grid, step))
    return rows * columns


def quantised(weight, hessian, fisher, step):
    """Quantised of a single matrix."""
    names = dict(w=weight), dict(w=hessian), dict(w=fisher)
    return golf.Quantiser(*names, pytest.fail).quantise(step)["w"]


def matrices_of(state):
    """{name: tensor} of what gptq rounds."""
    return {n: t for n, t in state.items() if golf.gptq_scheme_of(n, t.shape) == "grid"}


def made_up_costs(state):
    """(hessians, fisher) of the matrices of a state; those of one width share an H."""
    generator = torch.Generator().manual_seed(0)
    matrices = matrices_of(state)
    by_width = {size: random_hessian(size, size) for size in {t.size(1) for t in matrices.values()}}
    hessians = {name: by_width[tensor.size(1)] for name, tensor in matrices.items()}
    fisher = {
        name: torch.rand(len(tensor), dtype=torch.float64, generator=generator)
        for name, tensor in matrices.items()
    }
    return hessians, fisher


def plain_gptq(weight, hessian, steps):
    """Column by column, with an explicit inverse of what is left (optimal brain surgeon)."""
    left = weight.clone()
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    damped = hessian + golf.DAMPING * hessian.diagonal().mean() * identity
    columns = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    codes = torch.zeros_like(weight)
    while columns:
        inverse = torch.linalg.inv(damped[columns][:, columns])
        j = columns[0]
        codes[:, j] = (left[:, j] / steps[:, j]).round()
        error = (left[:, j] - codes[:, j] * steps[:, j]) / inverse[0, 0]
        left[:, columns] -= error[:, None] * inverse[0]
        columns = columns[1:]
    return codes


@pytest.mark.parametrize("size", [1, 128, 129, 300])
def test_gptq_equals_the_plain_column_by_column_reference(size):
    hessian = random_hessian(size, seed=size)
    weight = torch.randn(7, size, dtype=torch.float64)
    rows = 0.1 + torch.rand(7, 1, dtype=torch.float64)
    columns = 0.1 + torch.rand(1, size, dtype=torch.float64)
    codes = golf.gptq(weight, golf.factorise(hessian, "h", pytest.fail), rows, columns)
    assert torch.equal(codes, plain_gptq(weight, hessian, rows * columns))


@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_never_above_roundings(seed):
    """tr(E H E^T), weighed by row; half of the Hessians are singular before damping."""
    hessian = random_hessian(40, seed, tokens=20 if seed % 2 else 200)
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed))
    fisher = torch.rand(30, dtype=torch.float64)
    found = quantised(weight, hessian, fisher, 0.3)
    steps = steps_of(found.grid, 0.3)

    def loss(codes):
        error = (weight - codes * steps).double()
        return 0.5 * fisher * ((error @ hessian) * error).sum(1)

    mine = loss(torch.from_numpy(found.codes).float())
    plain = loss((weight / steps).round())
    assert (mine <= plain * (1 + 1e-4) + 1e-12).all()
    assert mine.sum() < 0.9 * plain.sum()  # and usually far below
    assert np.allclose(found.losses, mine, rtol=1e-3)


@pytest.mark.parametrize("value", [-1.0, math.nan, 0.0, 2.0])
def test_a_failed_factorisation_names_the_matrix_and_rounds(value):
    """2.0 is a sound diagonal Hessian: rounding, too, but without a warning."""
    hessian = value * torch.eye(5, dtype=torch.float64)
    lines = []
    factor = golf.factorise(hessian, "blocks.1.mlp.fc", lines.append)
    assert len(lines) == (value != 2.0)
    assert all(line.startswith("warning") and "blocks.1.mlp.fc" in line for line in lines)
    weight = torch.randn(4, 5)
    codes = golf.gptq(weight, factor, torch.full((4, 1), 0.1), torch.ones(1, 5))
    assert torch.equal(codes, (weight / 0.1).round())


def test_dead_inputs_do_no_harm():
    hessian = random_hessian(12)
    dead = [2, 7]
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = quantised(torch.randn(6, 12), hessian, torch.ones(6, dtype=torch.float64), 0.1)
    assert np.isfinite(found.losses).all()
    live = [j for j in range(12) if j not in dead]
    column = found.grid.column
    assert min(column[dead]) > max(column[live]), "what nothing reads should cost least"


def test_one_dial_gives_every_entry_of_every_matrix_the_same_predicted_loss(monkeypatch):
    """d_i s_ij^2 / U_jj^2 but for the rounding of row and column to half octaves.

    1 / U_jj^2 is what is left of column j's variance when the columns after it are known.
    """
    monkeypatch.setattr(golf, "ROW_TEMPER", 1.0)
    losses = []
    for size, fisher in ((8, torch.rand(5)), (12, 64 + torch.rand(7))):
        hessian = random_hessian(size, size)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        damped = hessian + golf.DAMPING * hessian.diagonal().mean() * torch.eye(size)
        grid = golf.equalising_grid(fisher.double(), golf.factorise(hessian, "h", pytest.fail))
        steps = steps_of(grid, 1.0).double()
        for place, j in enumerate(order.tolist()):
            left = order[place:]
            reach = torch.linalg.inv(damped[left][:, left])[0, 0]  # U_jj^2
            losses.append(fisher * steps[:, j] ** 2 / reach)
    losses = torch.cat(losses).log2()
    assert (losses - losses.mean()).abs().max() <= 1 + 1e-6


def test_rows_whose_codes_would_not_fit_take_coarser_steps():
    weight = torch.randn(4, 6)
    weight[1] *= 1000
    found = quantised(weight, torch.eye(6, dtype=torch.float64), torch.ones(4).double(), 1e-2)
    usual = found.grid.row[0]
    assert found.grid.row.tolist()[2:] == [usual, usual] and found.grid.row[1] > usual
    assert abs(found.codes).max() < golf.MAX_CODE
    steps = steps_of(found.grid, 1e-2)
    error = (torch.from_numpy(found.codes) * steps - weight).abs() / steps
    assert error.max() < 0.51


# ---- gptq: coding ----


def test_sections_give_back_every_code_and_step():
    drawn = np.random.default_rng(0)
    shapes = [(3, 5), (64, 32), (1, 7)]
    matrices = []
    for rows, columns in shapes:
        codes = drawn.standard_normal((rows, columns)) * 10 ** drawn.uniform(-1, 3.5)
        codes = codes.round().clip(-golf.MAX_CODE, golf.MAX_CODE).astype(np.int16)
        codes[0, 0], codes[-1, -1] = golf.MAX_CODE, -golf.MAX_CODE
        grid = golf.Grid(*(drawn.integers(-64, 65, n).astype(np.int8) for n in (rows, columns)))
        matrices.append(golf.Quantised(codes, grid, np.zeros(rows)))
    raw = golf.grid_sections(matrices)
    assert len(raw) == sum(2 * rows * columns + 2 * (rows + columns) for rows, columns in shapes)
    read = golf.read_grid_sections(np.frombuffer(raw, np.int8), shapes, 0.25)
    for matrix, found in zip(matrices, read, strict=True):
        row, column = (2.0 ** (side / 2) for side in matrix.grid)
        expected = matrix.codes.astype(np.float64) * 0.25 * row[:, None] * column
        assert np.allclose(found, expected, rtol=1e-6)


# ---- gptq: the size ----


def search(budget, first=1.0, jitter=300):
    """search_step on a model of a million parameters whose files fall with the step, nearly."""

    def pack(step):
        bits = max(0.0, 3 - math.log2(step))
        size = int(10_000 + 125_000 * bits + jitter * math.sin(1e4 * step))
        return bytes(size), step  # the step takes the place of the codes

    lines = []
    found = golf.search_step(pack, budget, first, 1e-5, -125_000, lines.append, lambda: None)
    assert len(lines) == found[2]
    return found


@pytest.mark.parametrize("first", [1e-5, 0.1, 50.0])
@pytest.mark.parametrize("jitter", [0, 600])
def test_the_search_fills_the_budget(first, jitter):
    blob, _, trials = search(500_000, first, jitter)
    assert 500_000 * (1 - 0.001) <= len(blob) <= 500_000
    assert trials <= (12 if jitter else 6)


def test_a_small_model_gets_the_finest_useful_steps_and_what_cannot_fit_is_an_error():
    _, step, trials = search(10**9)
    assert step == pytest.approx(1e-5) and trials <= 3
    with pytest.raises(ArtifactError, match="over the 9000 that BUDGET_BYTES") as error:
        search(9_000)
    assert error.value.code == 4


def test_a_real_model_fills_its_budget_and_finer_steps_lose_less(monkeypatch):
    """Of half a million weights, made up; neither chance nor threads have a say."""
    config = tiny_config(model_dim=128, quantizer="gptq")
    state = random_model(config).state_dict()
    costs = made_up_costs(state)
    parameters = sum(tensor.numel() for tensor in state.values())
    losses = []
    for bits in (2.5, 4, 6):
        budget = int(bits * parameters / 8) + 7000
        sized = dataclasses.replace(config, budget_bytes=budget)
        blob, breakdown, trials = golf.fit_gptq(sized, state, *costs, 7000)
        assert trials <= 12 and 0.999 * budget <= len(blob) + 7000 <= budget
        # The breakdown is of every parameter and every byte.
        assert sum(group["bytes"] for group in breakdown) == pytest.approx(len(blob))
        assert sum(group["parameters"] for group in breakdown) == parameters
        losses.append(sum(group["loss"] for group in breakdown))
    assert losses[0] > 4 * losses[1] > 16 * losses[2]
    monkeypatch.setattr(golf.os, "cpu_count", lambda: 5)
    torch.set_num_threads(2)
    assert golf.fit_gptq(sized, state, *costs, 7000)[0] == blob
    torch.set_num_threads(1)


# ---- gptq: calibration ----


def calibration_config(tiny_data, **changes):
    return tiny_config(**tiny_data.paths, quantizer="gptq", calibration_tokens=1024, **changes)


@pytest.mark.parametrize(
    "features",
    [
        dict(),
        dict(ve_dim=8, flow_enabled=True, e2e_ttt_enabled=True, gated_attention=False),
        dict(gate_inputs=8, smear_inputs=8, embed_dim=16),
    ],
)
def test_every_matrix_has_a_hessian_and_its_fisher_information(tiny_data, runtime, features):
    config = calibration_config(tiny_data, **features)
    model = random_model(config)
    hessians, fisher = golf.calibrate(model, config, runtime(config))
    matrices = matrices_of(model.state_dict())
    assert fisher.keys() == hessians.keys() == matrices.keys()
    for name, tensor in matrices.items():
        assert fisher[name].shape == (len(tensor),) and (fisher[name] >= 0).all(), name
        hessian = hessians[name]
        assert hessian.shape == (tensor.size(1),) * 2 and hessian.trace() > 0, name
        assert torch.linalg.eigvalsh(hessian).min() > -1e-6 * hessian.trace(), name
    assert hessians["blocks.1.attn.c_q.weight"] is hessians["blocks.1.attn.c_v.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hessian_is_of_what_the_attention_reads(tiny_data, runtime, dtype):
    """Its projections are one product that calls no layer: the input must be seen all the same.

    The sum is never rounded to bfloat16.
    """
    config = calibration_config(tiny_data, dtype=dtype)
    model = random_model(config)
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    hessians, _ = golf.calibrate(model, config, runtime(config))
    inputs = torch.cat([x.flatten(0, 1) for x in seen]).double()
    expected = inputs.T @ inputs / len(inputs)
    found = hessians["blocks.1.attn.c_q.weight"]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_fisher_information_is_of_the_gradient_on_drawn_labels(tiny_data, runtime):
    """Against finite differences: the loss of a small change, on average over the model's own
    labels, is 1/2 d_i e H e^T."""
    config = calibration_config(tiny_data, num_layers=1, xsa_last_n=1)
    model = random_model(config).eval()
    hessians, fisher = golf.calibrate(model, config, runtime(config))
    stream = golf.open_train_stream(config)
    ids = np.concatenate([stream.sequences(i * stream.num_sequences // 16, 1) for i in range(16)])
    ids = torch.from_numpy(ids.astype(np.int64))[:, :-1]
    name = "blocks.0.mlp.proj.weight"
    weight = dict(model.named_parameters())[name]
    change = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def logps():
        return model.logits(model.hidden(ids)).double().log_softmax(-1)

    before = logps()
    with torch.no_grad():
        weight += change
    measured = float((before.exp() * (before - logps())).sum(-1).mean())  # KL, nats per token
    predicted = float(golf.row_losses(change.double(), hessians[name], fisher[name]).sum())
    assert predicted == pytest.approx(measured, rel=0.5)


def test_a_logit_s_weight_is_the_variance_of_a_drawn_label(tiny_data, runtime):
    config = calibration_config(tiny_data)
    model = random_model(config).eval()
    with torch.no_grad():
        model.tok_emb.weight.mul_(20)  # some labels are likely
    ids = torch.arange(2, 34).view(1, -1)
    found = {}
    golf.calibrate_batch(model, ids, 0, runtime(config), found.__setitem__)
    p = model.logits(model.hidden(ids)).double().softmax(-1)[0]
    assert p.max() > 0.5
    expected = (p - p.square()).sum(0).float()
    torch.testing.assert_close(found["label_variance"], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shuffle", [False, True])
def test_calibration_text_is_training_text_spread_over_the_shards(
    tiny_data, runtime, tmp_path, shuffle
):
    """There is no validation shard to read."""
    for path in tiny_data.data_path.glob("fineweb_train_*.bin"):
        (tmp_path / path.name).symlink_to(path)
    config = calibration_config(tiny_data, shuffle=shuffle)
    config = dataclasses.replace(config, data_path=str(tmp_path))
    model, batches = random_model(config), []
    model.tok_emb.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    golf.calibrate(model, config, runtime(config))
    ids = torch.cat(batches).numpy()
    assert ids.shape == (16, 64) and len(set(map(bytes, ids))) == 16
    for path in golf.find_shards(config, "train"):
        windows = np.lib.stride_tricks.sliding_window_view(np.array(golf.read_shard(path)), 64)
        known = set(map(tuple, windows.tolist()))
        assert sum(tuple(row) in known for row in ids.tolist()) >= 4, "a shard was left out"


@pytest.mark.parametrize("tokens", [1024, 64])
def test_ranks_share_the_text_and_add_up_to_one_rank(tiny_data, runtime, monkeypatch, tokens):
    """Sixteen sequences in batches of two; or one, when each rank takes one all the same."""
    config = dataclasses.replace(calibration_config(tiny_data), calibration_tokens=tokens)
    monkeypatch.setattr(golf, "BATCH_TOKENS", 128)
    monkeypatch.setattr(golf, "per_matrix", lambda model, sums, tokens: (dict(sums), tokens))
    model = random_model(config)
    made = runtime(config)

    class Alone(golf.Comm):
        """One of several ranks that keeps its own sums."""

        def all_reduce(self, tensor):
            return self

        def wait(self):
            pass

    parts = []
    for rank in range(4):
        monkeypatch.setattr(made, "comm", Alone(rank, 4))
        parts.append(golf.calibrate(model, config, made))
    assert len({frozenset(sums) for sums, _ in parts}) == 1  # they meet at every sum
    monkeypatch.setattr(made, "comm", golf.Comm())
    whole, read = golf.calibrate(model, config, made)
    assert {total for _, total in parts} == {max(tokens, 4 * 64)}
    for name, total in whole.items():
        if read == max(tokens, 4 * 64):  # the same text as that of the ranks together
            assert torch.allclose(total, sum(sums[name] for sums, _ in parts), rtol=1e-6), name


# ---- gptq: whole runs ----


# Their models have all there is between them.
@pytest.mark.parametrize("preset", ["nfm_7k", "ttt_linear_11l", "record_0409"])
def test_a_preset_packs_and_scores_as_its_float_weights(tiny_data, tmp_path, preset):
    changes = dict(tiny_data.settings, preset=preset, spot_checks=0, audit=False)
    changes.update(quantizer="gptq", calibration_tokens=1024, ttt_enabled=False)
    changes.update(layers_for(preset), run_dir=tmp_path / "run")
    if golf.PRESETS[preset].get("ve_dim"):
        changes["ve_dim"] = 8
    run = run_main(**changes)
    assert run.code == 0, run.err
    loss = {label: score["val_loss"] for label, score in run.scores().items()}
    assert abs(loss["final_int6_roundtrip"] - loss["pre_quant"]) < 0.01
    assert "warning: the Hessian" not in run.out
    assert run.out.count("\nsize_breakdown ") >= 6
    (packed,) = events(run.dir, "packed")
    whole, quantiser = packed["with_training_seconds"], packed["quantiser_seconds"]
    assert whole > quantiser > packed["calibration_seconds"] > 0
    assert sum(group["bytes"] for group in packed["size_breakdown"]) == pytest.approx(
        packed["artifact_bytes"]
    )


def test_the_same_weights_give_the_same_bytes_at_one_number_of_ranks(children):
    """And about the same predicted loss at another."""
    changes = dict(quantizer="gptq", calibration_tokens=32768, budget_bytes=30_000, code_bytes=100)
    changes.update(iterations=0, micro_batch_tokens=64, audit=False, ttt_enabled=False)
    blobs, losses = [], []
    for ranks in (1, 2, 2):
        run_dir = children.new("packed")
        output = children.finish(run_dir, ranks, **changes).stdout()
        blobs.append((run_dir / golf.ARTIFACT_NAME).read_bytes())
        losses.append(float(re.search(r"^predicted_loss:(\S+)", output, re.M)[1]))
    assert blobs[1] == blobs[2]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


# ---- reading ----


def payload(blob):
    """The decompressed payload of an honest artifact."""
    body = blob[golf.ARTIFACT_HEAD.size :]
    return lzma.decompress(body) if blob[9] else zstandard.ZstdDecompressor().decompress(body)


def sealed(raw, compressor=0, raw_size=None, body=None):
    """A file with right sizes and checksum around a payload that need not be honest."""
    if body is None and compressor:
        body = lzma.compress(raw, preset=0)
    elif body is None:
        body = zstandard.ZstdCompressor(level=1).compress(raw)
    raw_size = len(raw) if raw_size is None else raw_size
    head = (golf.ARTIFACT_MAGIC, golf.ARTIFACT_VERSION, compressor, raw_size, len(body))
    return golf.ARTIFACT_HEAD.pack(*head, hashlib.sha256(body).digest()) + body


def split(raw):
    """(header as a dict, bytes of the tensors)."""
    (length,) = struct.unpack_from("<I", raw)
    return json.loads(raw[4 : 4 + length]), raw[4 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + data


@pytest.fixture(scope="module")
def honest():
    """Small artifacts by name: integers, halves and floats in two compressors, and a grid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(golf, "HALF_LIMIT", 128)
        blobs = {}
        for compressor in ("zstd", "lzma"):
            config = tiny_config(**SMALL, compressor=compressor)
            blobs[compressor] = golf.pack_artifact(
                config, random_model(config).state_dict(), (0,), TOKENIZER_SHA
            )
    config = tiny_config(**SMALL, quantizer="gptq", budget_bytes=6000)
    state = random_model(config).state_dict()
    blobs["gptq"] = golf.fit_gptq(config, state, *made_up_costs(state), 0)[0]
    lite = {"int5", "int6", "int8", "fp16", "fp32"}
    for kind, blob in blobs.items():
        header, _ = split(payload(blob))
        schemes = {row[2] for row in header["tensors"]}
        assert schemes == ({"grid", "fp16"} if kind == "gptq" else lite)
        assert len(golf.unpack_artifact(sealed(payload(blob)))[1]) == len(header["tensors"])
    return blobs


KINDS = pytest.mark.parametrize("kind", ["zstd", "lzma", "gptq"])


def refused(blob, match=None):
    with pytest.raises(ArtifactError, match=match) as error:
        golf.unpack_artifact(blob)
    assert len(str(error.value)) < 2000 and "\n" not in str(error.value)


@KINDS
def test_every_truncation_and_every_changed_byte_is_refused(honest, kind):
    blob = honest[kind]
    for at in range(len(blob)):
        refused(blob[:at])
        for bit in range(8):
            refused(blob[:at] + bytes([blob[at] ^ 1 << bit]) + blob[at + 1 :])


@pytest.mark.parametrize("compressor", [0, 1])
def test_trailing_bytes_are_refused_wherever_they_are(honest, compressor):
    raw = payload(honest["zstd"])
    whole = sealed(raw, compressor)
    body = whole[golf.ARTIFACT_HEAD.size :]
    frame = lzma.compress(b"more") if compressor else zstandard.ZstdCompressor().compress(b"more")
    for hostile in (
        whole + b"\0",
        sealed(raw, compressor, body=body + b"\0"),
        sealed(raw, compressor, body=body + frame),
        sealed(raw, compressor, len(raw) + 4, body=body + frame),
        sealed(raw + b"\0", compressor),
        sealed(raw[:-1], compressor),
        sealed(raw, compressor, len(raw) - 1),
        sealed(raw, compressor, len(raw) + 1),
    ):
        refused(hostile)


# One for each check.
EDITS = {
    "no config": lambda header: header.pop("config"),
    "one more key": lambda header: header.update(code="import os"),
    "missing setting": lambda header: header["config"].pop("model_dim"),
    "unknown setting": lambda header: header["config"].update(evil=1),
    "another architecture": lambda header: header["config"].update(model_dim=32),
    "float for an integer": lambda header: header["config"].update(vocab_size=16.0),
    "huge layers": lambda header: header["config"].update(num_layers=10**9),
    "number beyond every float": lambda header: header["config"].update(logit_softcap=10**400),
    "nan": lambda header: header["config"].update(logit_softcap=math.nan),
    "sha of other letters": lambda header: header.update(tokenizer_sha256="\x1b[2J" * 16),
    "row of two": lambda header: header["tensors"][0].pop(),
    "unknown name": lambda header: header["tensors"][0].__setitem__(0, "x"),
    "missing tensor": lambda header: header["tensors"].pop(0),
    "tensor twice": lambda header: header["tensors"].append(header["tensors"][-1]),
    "transposed shape": lambda header: next(
        shape for _, shape, _ in header["tensors"] if len(set(shape)) > 1
    ).reverse(),
    "no list for a shape": lambda header: next(
        entry for entry in header["tensors"] if not entry[1]
    ).__setitem__(1, ""),
    "unknown scheme": lambda header: header["tensors"][0].__setitem__(2, "int7"),
    "scheme of another size": lambda header: header["tensors"][0].__setitem__(2, "fp32"),
    "grid of a scalar": lambda header: header["tensors"][-1].__setitem__(2, "grid"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_header_with_one_wrong_entry_is_refused(honest, edit):
    for kind in ("zstd", "gptq"):
        header, data = split(payload(honest[kind]))
        edit(header)
        refused(sealed(joined(header, data)))


def test_a_grid_needs_a_step_that_is_a_number(honest):
    header, data = split(payload(honest["gptq"]))
    for step in (None, [], "x"):
        refused(sealed(joined(dict(header, step=step), data)))
    del header["step"]
    refused(sealed(joined(header, data)))


def test_a_header_that_is_no_header_is_refused(honest):
    raw = payload(honest["zstd"])
    for header in (
        b"",
        b"null",
        b"\xff\xfe{",  # not UTF-8
        b"[" * 400_000,  # deep
        b"9" * 1_000_000,
        b'{"config": {"\\ud800": 1}, "tokenizer_sha256": "", "tensors": []}',
    ):
        refused(sealed(joined(header, split(raw)[1])))
    (right,) = struct.unpack_from("<I", raw)
    for wrong in (0, right - 1, right + 1, 2**20 + 1, 2**31, 2**32 - 1):
        refused(sealed(struct.pack("<I", wrong) + raw[4:]))
    for short in (b"", b"\0", b"\0\0\0", b"\0\0\0\0"):
        refused(sealed(short))


def test_a_file_may_name_the_arithmetic_or_not(honest, tmp_path):
    header, data = split(payload(honest["zstd"]))
    for change in (dict(dtype="float32"), {}):
        header["config"].pop("dtype", None)
        header["config"].update(change)
        assert golf.unpack_artifact(sealed(joined(header, data)))[1]


@pytest.mark.parametrize("place", ["payload", "compressed stream"])
def test_mutants_with_a_right_checksum_are_refused_or_whole(honest, place):
    draw = random.Random(0)
    opened = 0
    for _ in range(700):
        blob = honest[draw.choice(sorted(honest))]
        raw = payload(blob)
        data = bytearray(raw if place == "payload" else blob[golf.ARTIFACT_HEAD.size :])
        at = draw.randrange(len(data))
        data[at : at + draw.randint(0, 8)] = draw.randbytes(draw.randint(0, 8))
        if place == "payload":
            hostile = sealed(bytes(data), draw.choice([0, 0, 1]))
        else:
            hostile = sealed(b"", blob[9], len(raw), bytes(data))
        try:
            config, state = golf.unpack_artifact(hostile)
        except ArtifactError:
            continue
        golf.GPT(config).load_state_dict(state)  # whole: strict names and shapes
        opened += 1
    assert 0 < opened < 350  # other codes are another model, not a damaged file


# ---- bombs ----


def zeros_of_a_real_architecture():
    """4 kB that stand for 95 MiB of codes of a sound architecture, one byte short."""
    config = tiny_config(**dict(SMALL, vocab_size=65536, model_dim=1328, num_heads=16))
    with torch.device("meta"):
        state = golf.GPT(config).state_dict()
    table = [(n, list(v.shape), golf.scheme_of(n, v.shape, config)) for n, v in state.items()]
    size = -1
    for _, shape, scheme in table:
        dtype, bits = golf.SCHEMES[scheme]
        size += math.prod(shape) * np.dtype(dtype).itemsize + (2 * shape[0] if bits else 0)
    header = dict(config=config.as_dict("arch", "eval"), tokenizer_sha256="", tensors=table)
    return sealed(joined(header, bytes(size)))


def bombs():
    """{name: blob}: small files with right checksums that promise, hide or ask for much."""
    most, few, zeros = golf.MAX_RAW_BYTES, bytes(100), bytes(400 << 20)
    packed = zstandard.ZstdCompressor(level=1).compress(zeros)
    wide = lzma.compress(few, filters=[dict(id=lzma.FILTER_LZMA2, preset=0, dict_size=1 << 30)])
    return dict(
        zstd_hides_400_mib=sealed(b"", 0, 100, packed),
        zstd_promises_400_mib=sealed(b"", 0, len(zeros), packed),
        zstd_zeros_of_the_largest_size=sealed(zeros[:most]),
        lzma_hides_400_mib=sealed(b"", 1, 100, lzma.compress(zeros, preset=0)),
        lzma_wants_a_window_of_1_gib=sealed(b"", 1, 100, wide),
        zeros_of_a_real_architecture=zeros_of_a_real_architecture(),
    )


# In a process of its own, since only the peak of a whole process counts what the C libraries take:
# how far a new peak lies above the memory in use before. Seconds are the processor's. The first
# artifact is honest: what PyTorch imports at its first use is no cost of the others.
MEASURE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import train_gpt
train_gpt.unpack_artifact(open(sys.argv[2], "rb").read())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
in_use = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
for path in sys.argv[3:]:
    blob = open(path, "rb").read()
    now, before, begin = in_use(), peak(), time.process_time()
    try:
        train_gpt.unpack_artifact(blob)
        outcome = "opened"
    except train_gpt.ArtifactError:
        outcome = "refused"
    print(outcome, peak() - now if peak() > before else 0, time.process_time() - begin)
"""


def test_bombs_are_refused_in_a_second_and_little_memory(honest, tmp_path):
    made = bombs()
    for name, blob in dict(made, honest=honest["zstd"]).items():
        (tmp_path / name).write_bytes(blob)
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), "honest", *made],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    for name, line in zip(made, child.stdout.splitlines(), strict=True):
        outcome, mib, seconds = line.split()
        assert outcome == "refused", name
        assert int(mib) <= 256 and float(seconds) < 1, (name, line)


# ---- nothing is executed ----


class Planted:
    """Unpickled, this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_float_checkpoint_runs_no_code(tmp_path):
    planted, path = tmp_path / "planted", tmp_path / "final_model.pt"
    torch.save(dict(config={}, state_dict={}, info=Planted(planted)), path)
    with pytest.raises(ArtifactError):
        golf.load_weights(path)
    assert not planted.exists()
    torch.load(path, weights_only=False)
    assert planted.exists(), "the file would have done no harm"


# ---- float weights ----


def test_float_weights_come_back_bit_for_bit_and_foreign_ones_are_refused(tmp_path):
    config = tiny_config(**SMALL)
    state, path = random_model(config).state_dict(), tmp_path / "final_model.pt"
    saved = dict(config=config.as_dict("arch", "eval"), state_dict=state, info=dict(steps=3))
    golf.save_tensors(path, saved)
    loaded = golf.load_weights(path)
    assert loaded.config.as_dict("arch", "eval") == config.as_dict("arch", "eval")
    assert loaded.info == dict(steps=3) and loaded.sha256 == golf.sha256_file(path)
    assert_same(loaded.state_dict, state)
    for wrong in (
        None,
        torch.zeros(3),
        dict(saved, config={"\x1b[2J": 1}),
        dict(saved, state_dict={name: tensor.double() for name, tensor in state.items()}),
        dict(saved, state_dict={"\x1b[2J": torch.zeros(1).expand(1 << 40)}),
        dict(saved, state_dict=[torch.zeros(2)]),
        dict(saved, info=7),
    ):
        golf.save_tensors(path, wrong)
        with pytest.raises(ArtifactError, match="not the final weights of a run") as error:
            golf.load_weights(path)
        assert str(error.value).isprintable()


def test_files_that_hold_no_weights_are_refused_by_name(tmp_path):
    contents = {"empty.ptz": b"", "text.ptz": b"hello" * 100, "zip.pt": b"PK\x03\x04" * 40}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for path in [tmp_path, tmp_path / "absent.ptz", *(tmp_path / name for name in contents)]:
        with pytest.raises(ArtifactError, match=path.name):
            golf.load_weights(path)


# ---- full size ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    ["nfm_7k", "slot_11l", "ttt_linear_11l", "record_0409", "frontier_8192", "frontier_1024"],
)
def test_full_size_fills_the_budget_to_a_thousandth(preset):
    """Weights and their costs are made up, sizes are real."""
    config = golf.Config.from_env({"PRESET": preset, "QUANTIZER": "gptq"})
    torch.manual_seed(0)
    state = golf.GPT(config).state_dict()
    for tensor in matrices_of(state).values():
        tensor.normal_(std=0.02)  # where training starts from zeros, too
    blob, _, trials = golf.fit_gptq(config, state, *made_up_costs(state), 40_000)
    assert 15_984_000 <= len(blob) + 40_000 <= 16_000_000
    assert trials <= 12
