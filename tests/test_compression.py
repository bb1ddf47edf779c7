"""Compression: what rounding may cost, what the container must keep, and what its reader must
refuse."""

import ast
import dataclasses
import hashlib
import json
import lzma
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from helpers import ROOT, environment, layers_for, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import ArtifactError

# One block, every kind of tensor, under 5,000 weights: a file of it is opened in a few
# milliseconds.
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
MORE_LAYERS = dict(SMALL, num_layers=11)
TOKENIZER_SHA = "ab" * 32


def random_state(config, seed=0):
    """A state dict of `config` with normal weights, so that no tensor is zero."""
    random = torch.Generator().manual_seed(seed)
    state = train_gpt.GPT(config).state_dict()
    return {name: 0.3 * torch.randn(value.shape, generator=random) for name, value in state.items()}


@pytest.fixture
def all_integers(monkeypatch):
    """Matrices of tiny models are stored as integers too, as those of a real one are."""
    monkeypatch.setattr(train_gpt, "HALF_LIMIT", 64)


# --------------------------------------------------------------------------------------------------
# Rounding
# --------------------------------------------------------------------------------------------------
def heavy_tailed(rows=48, columns=2000):
    """Rows with outliers, so that clipping pays, at magnitudes from 1e-2 to 1e2."""
    random = np.random.default_rng(3)
    values = random.standard_t(3, (rows, columns)) * 10 ** np.linspace(-2, 2, rows)[:, None]
    return torch.from_numpy(values).float()


def dequantised(weight, bits):
    codes, scales = train_gpt.quantize_rows(weight, bits)
    return codes.float() * scales.float()


def rounded_at(weight, clip, bits):
    """Plain reference: the rows of `weight` (float64) rounded with float16 steps of clip / top."""
    top = 2 ** (bits - 1) - 1
    step = (clip / top).half().double()
    return (weight / step).round().clamp(-top, top) * step


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_rounding_errs_by_at_most_half_a_step_inside_the_clip(bits):
    weight, top = heavy_tailed(), 2 ** (bits - 1) - 1
    codes, scales = train_gpt.quantize_rows(weight, bits)
    inside = weight.abs() <= top * scales.float()
    error = (codes.double() * scales.double() - weight.double()).abs()
    assert inside.float().mean() > 0.99
    assert (error <= scales.double() * (0.5 + 1e-6))[inside].all()
    assert (
        codes.dtype == torch.int8
        and scales.dtype == torch.float16
        and scales.shape == (len(weight), 1)
    )


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_what_lies_beyond_the_clip_takes_the_outermost_code_of_its_sign(bits):
    weight, top = heavy_tailed(), 2 ** (bits - 1) - 1
    codes, scales = train_gpt.quantize_rows(weight, bits)
    outside = weight.abs() > top * scales.float()
    assert outside.any()
    assert torch.equal(codes[outside].float(), top * weight[outside].sign())
    assert codes.abs().max() <= top


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_searching_the_clip_is_never_worse_than_no_clip(bits):
    weight = heavy_tailed().double()
    searched = (dequantised(weight.float(), bits).double() - weight).square().sum(1)
    whole = (rounded_at(weight, weight.abs().amax(1, keepdim=True), bits) - weight).square().sum(1)
    assert (searched <= whole * (1 + 1e-5)).all()
    assert (searched < 0.9 * whole).any() or bits == 8  # coarse grids gain by clipping these tails


@pytest.mark.parametrize("columns", [1, 2, 5, 300, 1000, 2000])
@pytest.mark.parametrize("bits", [5, 6, 8])
def test_gptq_lite_keeps_the_least_squared_error_of_the_five_quantiles(bits, columns):
    weight = heavy_tailed()[:, :columns].double()
    errors = []
    for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.quantile(weight.abs(), quantile, dim=1, keepdim=True)
        errors.append((rounded_at(weight, clip, bits) - weight).square().sum(1))
    least = torch.stack(errors).amin(0)
    found = (dequantised(weight.float(), bits).double() - weight).square().sum(1)
    # A float16 step may fall to the other side in float32 arithmetic; that moves a row's error by a
    # little.
    assert ((found - least).abs() <= 2e-2 * least + 1e-12).all()
    assert ((found - least).abs() <= 1e-4 * least + 1e-12).float().mean() > 0.9


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_rows_of_zeros_stay_zero_and_do_not_disturb_their_neighbours(bits):
    weight = heavy_tailed(4, 100)
    weight[1] = 0
    codes, scales = train_gpt.quantize_rows(weight, bits)
    assert (codes[1] == 0).all() and torch.isfinite(scales).all() and (scales > 0).all()
    alone = train_gpt.quantize_rows(weight[2:3], bits)
    assert torch.equal(codes[2:3], alone[0]) and torch.equal(scales[2:3], alone[1])


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_the_scale_floor_is_an_epsilon_and_not_a_step(bits):
    """A floor of 1 / top, as published, would round every weight of these rows to zero."""
    unit, top = torch.linspace(-1, 1, 64)[None], 2 ** (bits - 1) - 1
    for magnitude in (1e-1, 1e-2, 1e-3, 1e-4):
        error = (dequantised(magnitude * unit, bits) - magnitude * unit).abs().max()
        # Half a step, and half a unit of float16 in the scale.
        assert error <= 0.51 * magnitude / top + top * 2.0**-25


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_vanishing_and_huge_rows_stay_finite(bits):
    unit, top = torch.linspace(-1, 1, 64)[None], 2 ** (bits - 1) - 1
    for magnitude in (1e-30, 1e-9, 1e-7, 65504.0 * top * 0.99, 1e30):
        codes, scales = train_gpt.quantize_rows(magnitude * unit, bits)
        values = codes.float() * scales.float()
        assert torch.isfinite(values).all() and (scales > 0).all()
        assert values.abs().max() <= 1.001 * magnitude + 2.0**-24
    largest = 65504.0 * top
    assert (dequantised(largest * unit, bits) - largest * unit).abs().max() <= 0.51 * 65504.0


def test_a_stack_of_matrices_is_rounded_row_by_row():
    weight = torch.randn(3, 4, 50)
    codes, scales = train_gpt.quantize_rows(weight, 6)
    flat = train_gpt.quantize_rows(weight.reshape(12, 50), 6)
    assert codes.shape == (12, 50) and torch.equal(codes, flat[0]) and torch.equal(scales, flat[1])


# --------------------------------------------------------------------------------------------------
# Schemes
# --------------------------------------------------------------------------------------------------
SCHEMES_AT_FULL_SIZE = [
    ("tok_emb.weight", (1024, 512), "int8"),
    ("bigram.embed.weight", (4096, 128), "int8"),
    ("ve.embed.weight", (1024, 128), "int8"),
    ("nfm.inp.weight", (256, 512), "int8"),
    ("ttt.c_q.weight", (512, 512), "int8"),
    ("blocks.0.attn.c_q.weight", (512, 512), "int6"),
    ("blocks.10.attn.c_k.weight", (256, 512), "int6"),
    ("blocks.4.mlp.fc.weight", (1536, 512), "int6"),
    ("blocks.5.mlp.fc.weight", (1536, 512), "int5"),
    ("blocks.5.mlp.proj.weight", (512, 1536), "int5"),
    ("blocks.5.attn.proj.weight", (512, 512), "int6"),
    ("bigram.proj.weight", (512, 128), "fp16"),  # 65,536 elements, the last size that stays
    ("bigram.proj.weight", (512, 129), "int8"),
    ("blocks.3.attn.attn_gate.weight", (8, 512), "fp16"),
    ("flow.down.weight", (64, 512), "fp16"),
    ("ttt.w", (8, 64, 64), "fp16"),
    ("skip_weights", (5, 512), "fp32"),
    ("blocks.3.resid_mix", (2, 512), "fp32"),
    ("blocks.3.attn_scale", (512,), "fp32"),
    ("blocks.3.attn.q_gain", (8,), "fp32"),
    ("blocks.3.attn.vr_lambda", (2,), "fp32"),
    ("smear.gate", (512,), "fp32"),
    ("nfm.gate", (), "fp32"),
    ("nfm.inp.bias", (256,), "fp32"),
]


@pytest.mark.parametrize("name, shape, expected", SCHEMES_AT_FULL_SIZE)
def test_each_tensor_is_stored_as_the_reference_says(name, shape, expected):
    assert train_gpt.scheme_of(name, shape, train_gpt.Config(), int5_layers=(5,)) == expected


def test_the_20k_presets_store_embeddings_in_int6_too():
    config = train_gpt.Config.from_env({"PRESET": "base_20k"})
    for name, shape, scheme in SCHEMES_AT_FULL_SIZE:
        if scheme.startswith("int"):
            assert train_gpt.scheme_of(name, shape, config) == "int6"


# --------------------------------------------------------------------------------------------------
# Roundtrip
# --------------------------------------------------------------------------------------------------
def stored(state, config, int5_layers=()):
    """What an artifact must give back: every tensor rounded once, by hand."""
    out = {}
    for name, value in state.items():
        scheme = train_gpt.scheme_of(name, value.shape, config, int5_layers)
        if scheme.startswith("int"):
            out[name] = dequantised(value, int(scheme[3:])).view_as(value)
        else:
            out[name] = value.half().float() if scheme == "fp16" else value
    return out


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("compressor", ["zstd", "lzma"])
@pytest.mark.parametrize(
    "block_bits, embed_bits, int5_layers",
    [(6, 8, ()), (6, 8, (0, 2)), (6, 6, (1,)), (8, 5, ()), (5, 8, (0, 1, 2))],
)
def test_an_artifact_gives_back_exactly_the_rounded_weights(
    all_integers, compressor, block_bits, embed_bits, int5_layers
):
    config = tiny_config(
        **dict(SMALL, num_layers=3),
        block_bits=block_bits,
        embed_bits=embed_bits,
        compressor=compressor,
    )
    state = random_state(config)
    blob = train_gpt.pack_artifact(config, state, int5_layers, TOKENIZER_SHA)
    assert_same(train_gpt.unpack_artifact(blob)[1], stored(state, config, int5_layers))
    assert_same(train_gpt.unpack_artifact(blob)[1], stored(state, config, int5_layers))
    assert blob == train_gpt.pack_artifact(config, state, int5_layers, TOKENIZER_SHA)


def test_packing_what_was_unpacked_changes_nothing(all_integers):
    config = tiny_config(**SMALL)
    first = train_gpt.unpack_artifact(train_gpt.pack_artifact(config, random_state(config)))[1]
    assert_same(train_gpt.unpack_artifact(train_gpt.pack_artifact(config, first))[1], first)


@pytest.mark.parametrize("preset", sorted(train_gpt.PRESETS))
def test_the_architecture_and_the_evaluation_of_every_preset_travel_in_its_artifact(
    preset, tmp_path
):
    shrink = dict(SMALL, num_layers=2, ttt_chunk_tokens=4096, **layers_for(preset))
    names = {f"{name}".upper(): str(value) for name, value in shrink.items()}
    config = train_gpt.Config.from_env(
        {"PRESET": preset, "DTYPE": "float32", "EVAL_STRIDE": "48", **names}
    )
    path = tmp_path / "model.ptz"
    path.write_bytes(train_gpt.pack_artifact(config, random_state(config), (), TOKENIZER_SHA))
    loaded = train_gpt.load_weights(path)
    assert loaded.config.as_dict("arch", "eval") == config.as_dict("arch", "eval")
    assert loaded.tokenizer_sha256 == TOKENIZER_SHA
    assert loaded.sha256 == train_gpt.sha256_file(path)
    train_gpt.GPT(loaded.config).load_state_dict(
        loaded.state_dict
    )  # strict: nothing missing, nothing foreign


def test_settings_of_the_training_machine_do_not_travel():
    config = tiny_config(**SMALL, data_path="/secret/place", run_id="mine", seed=7)
    raw = payload(train_gpt.pack_artifact(config, random_state(config)))
    assert b"/secret/place" not in raw and b"run_id" not in raw and b"seed" not in raw


# --------------------------------------------------------------------------------------------------
# The ladder
# --------------------------------------------------------------------------------------------------
OUTWARD_FROM_THE_MIDDLE = [5, 6, 4, 7, 3, 8, 2, 9, 1, 10, 0]


@pytest.fixture(scope="module")
def eleven_layers():
    config = tiny_config(**MORE_LAYERS)
    return config, random_state(config)


def size_with(config, state, layers):
    return len(train_gpt.pack_artifact(config, state, tuple(layers), TOKENIZER_SHA))


def test_mlp_layers_drop_to_int5_from_the_middle_outward(all_integers, eleven_layers):
    config, state = eleven_layers
    for count in (1, 2, 3, 4, 10):
        budget = size_with(config, state, OUTWARD_FROM_THE_MIDDLE[:count]) + 1000
        fitted = dataclasses.replace(config, budget_bytes=budget)
        blob, layers = train_gpt.fit_budget(fitted, state, 1000, TOKENIZER_SHA)
        assert list(layers) == OUTWARD_FROM_THE_MIDDLE[:count]


def test_the_ladder_stops_at_the_first_size_that_fits(all_integers, eleven_layers):
    config, state = eleven_layers
    sizes = [size_with(config, state, OUTWARD_FROM_THE_MIDDLE[:count]) for count in range(12)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 12
    for slack, expected in ((0, 0), (-1, 1)):
        fitted = dataclasses.replace(config, budget_bytes=sizes[0] + 500 + slack)
        blob, layers = train_gpt.fit_budget(fitted, state, 500, TOKENIZER_SHA)
        assert len(layers) == expected and len(blob) + 500 <= fitted.budget_bytes
        assert_same(train_gpt.unpack_artifact(blob)[1], stored(state, config, layers))


def test_a_model_over_the_budget_in_int5_throughout_is_an_error_of_exit_code_4(
    all_integers, eleven_layers
):
    config, state = eleven_layers
    smallest = size_with(config, state, OUTWARD_FROM_THE_MIDDLE)
    fits = dataclasses.replace(config, budget_bytes=smallest + 500)
    assert len(train_gpt.fit_budget(fits, state, 500, TOKENIZER_SHA)[1]) == 11
    over = dataclasses.replace(config, budget_bytes=smallest + 499)
    with pytest.raises(ArtifactError, match="BUDGET_BYTES") as error:
        train_gpt.fit_budget(over, state, 500, TOKENIZER_SHA)
    assert error.value.code == 4


# --------------------------------------------------------------------------------------------------
# Hostile artifacts
# --------------------------------------------------------------------------------------------------
def payload(blob):
    """The decompressed payload of an honest artifact."""
    compressor = blob[9]
    body = blob[train_gpt.ARTIFACT_HEAD.size :]
    return lzma.decompress(body) if compressor else zstandard.ZstdDecompressor().decompress(body)


def sealed(raw, compressor=0, raw_size=None, body=None):
    """A file with right sizes and checksum around a payload that need not be honest."""
    if body is None:
        body = (
            lzma.compress(raw, preset=0)
            if compressor
            else zstandard.ZstdCompressor(level=1).compress(raw)
        )
    raw_size = len(raw) if raw_size is None else raw_size
    head = (train_gpt.ARTIFACT_MAGIC, train_gpt.ARTIFACT_VERSION, compressor, raw_size, len(body))
    return train_gpt.ARTIFACT_HEAD.pack(*head, hashlib.sha256(body).digest()) + body


def split(raw):
    """(header as a dict, bytes of the tensors)."""
    (length,) = struct.unpack_from("<I", raw)
    return json.loads(raw[4 : 4 + length]), raw[4 + length :]


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + data


@pytest.fixture(scope="module")
def small_artifacts():
    """A small artifact with integer, half and single tensors, by compressor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "HALF_LIMIT", 128)
        blobs = {}
        for compressor in ("zstd", "lzma"):
            config = tiny_config(**SMALL, compressor=compressor)
            blobs[compressor] = train_gpt.pack_artifact(
                config, random_state(config), (0,), TOKENIZER_SHA
            )
    return blobs


@pytest.fixture
def honest(small_artifacts, monkeypatch):
    """The small artifacts, for a reader that takes tensors of their size for large ones."""
    monkeypatch.setattr(train_gpt, "HALF_LIMIT", 128)
    return small_artifacts


def test_the_small_artifact_is_honest_and_has_every_scheme(honest):
    for blob in honest.values():
        header, _ = split(payload(blob))
        assert {row[2] for row in header["tensors"]} == {"int5", "int6", "int8", "fp16", "fp32"}
        assert len(train_gpt.unpack_artifact(sealed(payload(blob)))[1]) == len(header["tensors"])


@pytest.mark.parametrize("compressor", ["zstd", "lzma"])
def test_every_truncation_is_refused(honest, compressor):
    blob = honest[compressor]
    for length in range(len(blob)):
        with pytest.raises(ArtifactError):
            train_gpt.unpack_artifact(blob[:length])


@pytest.mark.parametrize("compressor", ["zstd", "lzma"])
def test_every_single_byte_change_of_the_head_is_refused(honest, compressor):
    blob = honest[compressor]
    for at in range(train_gpt.ARTIFACT_HEAD.size):
        for value in set(range(256)) - {blob[at]}:
            with pytest.raises(ArtifactError):
                train_gpt.unpack_artifact(blob[:at] + bytes([value]) + blob[at + 1 :])


@pytest.mark.parametrize("compressor", ["zstd", "lzma"])
def test_every_changed_byte_of_the_payload_is_refused(honest, compressor):
    blob = honest[compressor]
    for at in range(train_gpt.ARTIFACT_HEAD.size, len(blob)):
        with pytest.raises(ArtifactError, match="checksum"):
            train_gpt.unpack_artifact(blob[:at] + bytes([blob[at] ^ 0x10]) + blob[at + 1 :])


@pytest.mark.parametrize("compressor", [0, 1])
def test_trailing_bytes_are_refused_wherever_they_are(honest, compressor):
    raw = payload(honest["zstd"])
    whole = sealed(raw, compressor)
    body = whole[train_gpt.ARTIFACT_HEAD.size :]
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
        with pytest.raises(ArtifactError):
            train_gpt.unpack_artifact(hostile)


@pytest.mark.parametrize("length", [0, 1, -1, 2**20 + 1, 2**31, 2**32 - 1])
def test_a_wrong_header_length_is_refused(honest, length):
    raw = payload(honest["zstd"])
    (right,) = struct.unpack_from("<I", raw)
    wrong = right + length if length in (1, -1) else length
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(struct.pack("<I", wrong) + raw[4:]))


def test_a_payload_too_short_for_its_own_header_length_is_refused():
    for raw in (b"", b"\0", b"\0\0\0", b"\0\0\0\0"):
        with pytest.raises(ArtifactError):
            train_gpt.unpack_artifact(sealed(raw))


DEEP = b"[" * 400_000
HEADERS_THAT_ARE_NO_HEADERS = {
    "empty": b"",
    "no json": b"{",
    "number": b"7",
    "null": b"null",
    "list": b"[]",
    "string": b'"config"',
    "not utf-8": b"\xff\xfe{",
    "nul": b"\0" * 64,
    "deep": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "deep but closed": DEEP[:100_000] + b"]" * 100_000,
    "deep inside config": b'{"config": {"dtype": '
    + b"[" * 900
    + b"]" * 900
    + b'}, "tokenizer_sha256": "", "tensors": []}',
    "long number": b"9" * 1_000_000,
    "long exponent": b"1e" + b"9" * 1000,
    "surrogate": b'{"config": {"\\ud800": 1}, "tokenizer_sha256": "", "tensors": []}',
}


@pytest.mark.parametrize(
    "text", HEADERS_THAT_ARE_NO_HEADERS.values(), ids=HEADERS_THAT_ARE_NO_HEADERS
)
def test_a_header_that_is_no_header_is_refused(honest, text):
    _, data = split(payload(honest["zstd"]))
    with pytest.raises(ArtifactError) as error:
        train_gpt.unpack_artifact(sealed(joined(text, data)))
    assert len(str(error.value)) < 2000


def put(*path_and_value):
    """An edit of a header that sets one entry."""
    *path, last, value = path_and_value

    def edit(header):
        for key in path:
            header = header[key]
        header[last] = value

    return edit


def drop(*path):
    def edit(header):
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return edit


HOSTILE_SETTINGS = {
    "vocab_size": [16.0, "16", True, None, [16], -16, 0, 7, 65537, 10**30],
    "num_layers": [0, -1, 65, 10**9, 1.0, "1"],
    "model_dim": [15, 0, 5000, 2**40, -16, 4096],
    "num_heads": [0, 3, 64, -2],
    "num_kv_heads": [0, 3, -1],
    "mlp_mult": [0, -1.0, 17, math.nan, math.inf, "2"],
    "rope_dims": [3, 10**6, -2],
    "bigram_vocab_size": [1, 2**21, 2**20],
    "bigram_dim": [0, 4097, 4096],
    "nfm_hidden_dim": [0, 4097],
    "nfm_enabled": [1, "true", None, False],
    "e2e_ttt_enabled": [True],
    "dtype": ["int8", "float64", 7, None],
    "eval_seq_len": [1, 0, -1, 10**30],
    "eval_stride": [0, 65],
    "slot": ["", "yes", None, ["off"], {}],
    "ttt_chunk_tokens": [0, 63],
    "logit_softcap": [0.0, -1.0, math.inf, math.nan],
}


@pytest.mark.parametrize(
    "name, value",
    [(n, v) for n, values in HOSTILE_SETTINGS.items() for v in values],
    ids=lambda x: str(x)[:20],
)
def test_an_absurd_setting_is_refused(honest, name, value):
    header, data = split(payload(honest["zstd"]))
    header["config"][name] = value
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data)))


@pytest.mark.parametrize(
    "field",
    [
        f.name
        for f in dataclasses.fields(train_gpt.Config)
        if f.type is float and f.metadata["kind"] in ("arch", "eval")
    ],
)
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_a_number_beyond_every_float_is_refused(honest, field, value):
    """JSON carries integers of any size; arithmetic with them raises OverflowError, late or at
    once."""
    header, data = split(payload(honest["zstd"]))
    header["config"].update({field: value, "e2e_ttt_enabled": field.startswith("e2e")})
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data)))


EDITS = {
    "no config": drop("config"),
    "no tensors": drop("tensors"),
    "no sha": drop("tokenizer_sha256"),
    "one more key": put("code", "import os"),
    "config is a list": put("config", []),
    "config is null": put("config", None),
    "config is text": put("config", "vocab_size"),
    "missing setting": drop("config", "model_dim"),
    "unknown setting": put("config", "evil", 1),
    "setting of place": put("config", "run_dir", "/tmp/x"),
    "setting of training": put("config", "seed", 1),
    "hidden setting": put("config", "explicit", []),
    "preset": put("config", "preset", "demo"),
    "sha is a number": put("tokenizer_sha256", 5),
    "sha is null": put("tokenizer_sha256", None),
    "tensors is an object": put("tensors", {}),
    "tensors is text": put("tensors", "abc"),
    "tensors is a number": put("tensors", 3),
    "no tensor": put("tensors", []),
    "row of two": put("tensors", 0, ["tok_emb.weight", [16, 16]]),
    "row is text": put("tensors", 0, "abc"),
    "row is a number": put("tensors", 0, 5),
    "name is a number": put("tensors", 0, 0, 5),
    "name is a list": put("tensors", 0, 0, []),
    "name is null": put("tensors", 0, 0, None),
    "foreign name": put("tensors", 0, 0, "x"),
    "attribute as a name": put("tensors", 0, 0, "__class__"),
    "missing tensor": drop("tensors", 0),
    "shape is a number": put("tensors", 0, 1, 5),
    "shape is text": put("tensors", 0, 1, "16"),
    "shape is null": put("tensors", 0, 1, None),
    "no shape": put("tensors", 0, 1, []),
    "negative shape": put("tensors", 0, 1, 0, -1),
    "zero shape": put("tensors", 0, 1, 0, 0),
    "huge shape": put("tensors", 0, 1, 0, 10**300),
    "one more dimension": put("tensors", 0, 1, [16, 16, 1]),
    "nested shape": put("tensors", 0, 1, 0, [16]),
    "true as a shape": put("tensors", -1, 1, [True]),
    "unknown scheme": put("tensors", 0, 2, "int7"),
    "scheme is a type": put("tensors", 0, 2, "float64"),
    "scheme is a number": put("tensors", 0, 2, 6),
    "scheme is null": put("tensors", 0, 2, None),
    "scheme is a list": put("tensors", 0, 2, []),
    "scheme of another size": put("tensors", 0, 2, "fp16"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_header_with_one_wrong_entry_is_refused(honest, edit):
    header, data = split(payload(honest["zstd"]))
    edit(header)
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data)))


def float_shape(row):
    row[1] = [float(n) for n in row[1]]


def transposed(row):
    row[1] = row[1][::-1]


@pytest.mark.parametrize("edit", [float_shape, transposed])
def test_shapes_must_be_the_architectures_own_integers(honest, edit):
    header, data = split(payload(honest["zstd"]))
    edit(next(row for row in header["tensors"] if len(row[1]) == 2 and row[1][0] != row[1][1]))
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data)))


@pytest.mark.parametrize("swap", [False, True])
def test_a_tensor_given_twice_is_refused(honest, swap):
    """Once as an extra row with its own bytes, once in the place of a tensor of the same size."""
    header, data = split(payload(honest["zstd"]))
    rows = header["tensors"]
    last = rows[-1]
    if swap:
        twin = next(row for row in rows[:-1] if row[1] == last[1])
        twin[0] = last[0]
    else:
        rows.append(last)
        data += b"\0" * 4 * math.prod(last[1])
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data)))


def a_scalar_in_int8(header):
    row = next(row for row in header["tensors"] if row[1] == [])
    row[2] = "int8"
    return -3


def a_vector_in_int6(header):
    row = next(row for row in header["tensors"] if len(row[1]) == 1)
    row[2] = "int6"
    return -3 * row[1][0]


@pytest.mark.parametrize("edit", [a_scalar_in_int8, a_vector_in_int6])
def test_what_has_no_rows_cannot_be_stored_per_row(honest, edit):
    header, data = split(payload(honest["zstd"]))
    less = edit(header)
    header["tensors"].sort(key=lambda row: ["int5", "int6", "int8", "fp16", "fp32"].index(row[2]))
    with pytest.raises(ArtifactError):
        train_gpt.unpack_artifact(sealed(joined(header, data[:less])))


BYTES = {"int5": 1, "int6": 1, "int8": 1, "fp16": 2, "fp32": 4}


def places(header):
    """{scheme: (offset of the values, offset of the scales or None)} of the first such tensor."""
    at, found = 0, {}
    scales_at = sum(math.prod(shape) * BYTES[scheme] for _, shape, scheme in header["tensors"])
    for _, shape, scheme in header["tensors"]:
        is_int = scheme.startswith("int")
        found.setdefault(scheme, (at, scales_at if is_int else None))
        at += math.prod(shape) * BYTES[scheme]
        scales_at += 2 * math.prod(shape[:-1]) * is_int
    return found


def patched(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def test_the_places_of_scales_and_values_are_known(honest):
    """The tests below would be empty if they wrote beside what they mean."""
    header, data = split(payload(honest["zstd"]))
    at, scales_at = places(header)["int6"]
    name = next(row[0] for row in header["tensors"] if row[2] == "int6")
    changed = patched(patched(data, at, b"\x07"), scales_at, np.float16(0.5).tobytes())
    state = train_gpt.unpack_artifact(sealed(joined(header, changed)))[1]
    assert float(state[name].flatten()[0]) == 3.5


@pytest.mark.parametrize("scheme", ["int5", "int6", "int8"])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -0.5, 0.0, -0.0])
def test_a_scale_that_is_not_a_positive_number_is_refused(honest, scheme, scale):
    header, data = split(payload(honest["zstd"]))
    changed = patched(data, places(header)[scheme][1], np.float16(scale).tobytes())
    with pytest.raises(ArtifactError, match="scale"):
        train_gpt.unpack_artifact(sealed(joined(header, changed)))


@pytest.mark.parametrize(
    "scheme, code",
    [("int5", 16), ("int5", -16), ("int6", 32), ("int6", -32), ("int6", 127), ("int8", -128)],
)
def test_a_code_outside_its_grid_is_refused(honest, scheme, code):
    header, data = split(payload(honest["zstd"]))
    changed = patched(data, places(header)[scheme][0], np.int8(code).tobytes())
    with pytest.raises(ArtifactError, match="code"):
        train_gpt.unpack_artifact(sealed(joined(header, changed)))


@pytest.mark.parametrize("scheme, kind", [("fp16", np.float16), ("fp32", np.float32)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(honest, scheme, kind, value):
    header, data = split(payload(honest["zstd"]))
    changed = patched(data, places(header)[scheme][0], kind(value).tobytes())
    with pytest.raises(ArtifactError, match="values"):
        train_gpt.unpack_artifact(sealed(joined(header, changed)))


def zstd_zeros(mib, content_size=True):
    packer = zstandard.ZstdCompressor(level=1, write_content_size=content_size)
    stream = packer.compressobj(size=mib << 20) if content_size else packer.compressobj()
    return b"".join([stream.compress(bytes(1 << 20)) for _ in range(mib)] + [stream.flush()])


def lzma_zeros(mib):
    stream = lzma.LZMACompressor(preset=0)
    return b"".join([stream.compress(bytes(1 << 20)) for _ in range(mib)] + [stream.flush()])


def bombs():
    """(name, blob): small files with right checksums that promise, hide or ask for much; none is a
    model."""
    most, few = train_gpt.MAX_RAW_BYTES, bytes(100)
    zstd_512, lzma_400 = zstd_zeros(512), lzma_zeros(400)
    wide = lzma.compress(few, filters=[dict(id=lzma.FILTER_LZMA2, preset=0, dict_size=1 << 30)])
    yield "zstd_hides_512_mib", sealed(b"", 0, 100, zstd_512)
    yield "zstd_promises_512_mib", sealed(b"", 0, 512 << 20, zstd_512)
    yield "zstd_promises_2_to_the_62", sealed(b"", 0, 2**62, zstd_512)
    yield "zstd_says_no_size", sealed(b"", 0, 100, zstd_zeros(512, content_size=False))
    yield "zstd_zeros_of_the_largest_size", sealed(b"", 0, most, zstd_zeros(most >> 20))
    yield (
        "zstd_promises_more_than_it_has",
        sealed(b"", 0, most, zstandard.ZstdCompressor().compress(few)),
    )
    yield "lzma_hides_400_mib", sealed(b"", 1, 100, lzma_400)
    yield "lzma_promises_2_to_the_62", sealed(b"", 1, 2**62, lzma_400)
    yield "lzma_has_more_than_the_largest_size", sealed(b"", 1, most, lzma_400)
    yield "lzma_wants_a_window_of_1_gib", sealed(b"", 1, 100, wide)
    yield "header_of_1_mib_of_brackets", sealed(joined(b"[" * (1 << 20), b""))
    rows = b'{"config": {}, "tensors": [' + b'["a",[1],"int6"],' * 58_000
    yield "header_of_1_mib_of_rows", sealed(joined(rows, b""))


def zeros_of_a_real_architecture():
    """(blob, MiB of its model): 4 kB of 95 MiB of codes that fit an architecture; the last scale
    is NaN."""
    config = tiny_config(**dict(SMALL, vocab_size=65536, model_dim=1328, num_heads=16))
    with torch.device("meta"):
        state = train_gpt.GPT(config).state_dict()
    shapes = {name: list(value.shape) for name, value in state.items()}
    rows = [
        [name, shape, train_gpt.scheme_of(name, shape, config)] for name, shape in shapes.items()
    ]
    rows.sort(key=lambda row: list(BYTES).index(row[2]))
    values = sum(math.prod(shape) * BYTES[scheme] for _, shape, scheme in rows)
    scales = sum(math.prod(shape[:-1]) for _, shape, scheme in rows if scheme.startswith("int"))
    header = dict(config=config.as_dict("arch", "eval"), tokenizer_sha256="", tensors=rows)
    data = (
        bytes(values) + np.ones(scales - 1, np.float16).tobytes() + np.float16(math.nan).tobytes()
    )
    return sealed(joined(header, data)), 4 * sum(value.numel() for value in state.values()) >> 20


# In a process of its own, since only the peak of a whole process counts what the C libraries take:
# how far a new peak lies above the memory in use before. Seconds are the processor's, whatever else
# the machine does. The first artifact is honest: what PyTorch imports at its first use is no cost
# of the others.
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
    print(path, outcome, peak() - now if peak() > before else 0, time.process_time() - begin)
"""


@pytest.fixture(scope="module")
def bomb_measures(tmp_path_factory):
    """{name: (outcome, MiB of growth beyond the honest size, seconds)}."""
    folder = tmp_path_factory.mktemp("bombs")
    honest_mib, paths = {}, [folder / "honest"]
    config = tiny_config(**SMALL)
    paths[0].write_bytes(train_gpt.pack_artifact(config, random_state(config)))
    last = "zeros_of_a_real_architecture", *zeros_of_a_real_architecture()
    for name, blob, size in [*((*bomb, 0) for bomb in bombs()), last]:
        paths.append(folder / name)
        paths[-1].write_bytes(blob)
        honest_mib[name] = size
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), *map(str, paths)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    measures = {}
    for name, line in zip(honest_mib, child.stdout.splitlines(), strict=True):
        _, outcome, mib, seconds = line.split()
        measures[name] = outcome, int(mib) - honest_mib[name], float(seconds)
    return measures


def test_bombs_are_refused(bomb_measures):
    assert {name: row[0] for name, row in bomb_measures.items()} == dict.fromkeys(
        bomb_measures, "refused"
    )


def test_bombs_take_less_than_256_mb_beyond_the_honest_size(bomb_measures):
    assert {name: row[1] for name, row in bomb_measures.items() if row[1] > 256} == {}


def test_bombs_take_less_than_two_seconds(bomb_measures):
    assert {name: row[2] for name, row in bomb_measures.items() if row[2] > 2} == {}


# --------------------------------------------------------------------------------------------------
# Fuzz
# --------------------------------------------------------------------------------------------------
SPLICE = st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12))
SPLICES = st.lists(SPLICE, min_size=1, max_size=4)
JSON_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([2**31, 2**63, 10**400, -1, 1e308, math.nan, math.inf, ""]),
    st.sampled_from(["int5", "int6", "int8", "fp16", "fp32", "off", "causal", "float32"]),
    st.lists(st.integers(-2, 20), max_size=3),
    st.just({}),
)


def spliced(blob, splices):
    """`blob` with some spans cut out and others put in."""
    for place, cut, insert in splices:
        at = int(place * len(blob))
        blob = blob[:at] + insert + blob[at + cut :]
    return blob


def flipped(blob, flips):
    data = bytearray(blob)
    for place, bit in flips:
        data[int(place * (len(data) - 1))] ^= 1 << bit
    return bytes(data)


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=4)


def with_leaf(raw, choices, leaf):
    """The payload with one entry of its JSON header replaced; `choices` in [0, 1) lead to it."""
    header, data = split(raw)
    node = header
    for depth, choice in enumerate(choices):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[int(choice * len(keys))]
        inner = node[key]
        if depth == len(choices) - 1 or not isinstance(inner, (dict, list)) or not inner:
            node[key] = leaf
            break
        node = inner
    return joined(header, data)


FRACTION = st.floats(0, 1, exclude_max=True)
MUTATIONS = st.one_of(
    SPLICES.map(lambda how: (spliced, how)), FLIPS.map(lambda how: (flipped, how))
)


def opens_honestly_or_is_refused(blob):
    """Whatever is not refused must be a whole model of finite numbers."""
    try:
        config, state = train_gpt.unpack_artifact(blob)
    except ArtifactError:
        return
    with torch.device("meta"):
        expected = train_gpt.GPT(config).state_dict()
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in expected.items()}
    assert all(torch.isfinite(value).all() for value in state.values())


def fuzz_settings(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples < 5000,
        suppress_health_check=list(HealthCheck),
    )


def fuzz_file(honest, examples):
    @fuzz_settings(examples)
    @given(st.sampled_from(["zstd", "lzma"]), MUTATIONS)
    def run(compressor, mutation):
        mutate, how = mutation
        opens_honestly_or_is_refused(mutate(honest[compressor], how))

    run()


def fuzz_payload(honest, examples):
    raw = payload(honest["zstd"])
    mutations = st.one_of(
        SPLICES.map(lambda s: spliced(raw, s)),
        FLIPS.map(lambda f: flipped(raw, f)),
        st.tuples(st.lists(FRACTION, min_size=1, max_size=4), JSON_LEAVES).map(
            lambda x: with_leaf(raw, *x)
        ),
    )

    @fuzz_settings(examples)
    @given(mutations, st.sampled_from([0, 1]))
    def run(mutated, compressor):
        opens_honestly_or_is_refused(sealed(mutated, compressor))

    run()


def fuzz_body(honest, examples):
    """The compressed stream itself, with a checksum that agrees."""

    @fuzz_settings(examples)
    @given(st.sampled_from(["zstd", "lzma"]), MUTATIONS)
    def run(compressor, mutation):
        mutate, how = mutation
        blob = honest[compressor]
        body = mutate(blob[train_gpt.ARTIFACT_HEAD.size :], how)
        opens_honestly_or_is_refused(sealed(b"", blob[9], len(payload(blob)), body))

    run()


FUZZ = {"file": fuzz_file, "payload": fuzz_payload, "body": fuzz_body}


@pytest.mark.parametrize("fuzz, examples", [("file", 600), ("payload", 800), ("body", 600)])
def test_a_mutated_artifact_is_refused_or_whole(honest, fuzz, examples):
    FUZZ[fuzz](honest, examples)


@pytest.mark.slow
@pytest.mark.parametrize("fuzz, examples", [("file", 5000), ("payload", 10000), ("body", 5000)])
def test_20000_mutated_artifacts_are_refused_or_whole(honest, fuzz, examples):
    FUZZ[fuzz](honest, examples)


# --------------------------------------------------------------------------------------------------
# Nothing is executed
# --------------------------------------------------------------------------------------------------
def project_sources():
    folders = ROOT / "slurm", ROOT / "tests"
    return [
        ROOT / "train_gpt.py",
        *sorted(path for folder in folders for path in folder.glob("*.py")),
    ]


def imported_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def calls(tree, name):
    """Calls of something whose last name is `name`, as {keyword: source of its value}."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        last = getattr(node.func, "id", getattr(node.func, "attr", None))
        if last == name:
            yield node, {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", project_sources(), ids=lambda path: path.name)
def test_no_source_unpickles_anything(path):
    tree = ast.parse(path.read_text())
    forbidden = {
        "pickle",
        "cPickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
        "joblib",
    }
    assert not set(imported_names(tree)) & forbidden
    for node, keywords in calls(tree, "load"):
        if ast.unparse(node.func) == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"


def test_the_script_evaluates_no_text_as_code():
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    for name in (
        "eval",
        "exec",
        "compile",
        "__import__",
        "import_module",
        "system",
        "popen",
        "Popen",
    ):
        found = [ast.unparse(node.func) for node, _ in calls(tree, name)]
        assert not [
            call
            for call in found
            if call not in ("model.eval", "self.model.eval", "torch.compile", "re.compile")
        ]


def test_float_weights_come_back_bit_for_bit(tmp_path):
    config = tiny_config(**SMALL)
    state, path = random_state(config), tmp_path / "final_model.pt"
    train_gpt.save_tensors(
        path, dict(config=config.as_dict("arch", "eval"), state_dict=state, info={})
    )
    loaded = train_gpt.load_weights(path)
    assert loaded.config.as_dict("arch", "eval") == config.as_dict("arch", "eval")
    assert_same(loaded.state_dict, state)


def test_what_is_no_weights_file_is_refused_by_name(tmp_path):
    for name, content in (
        ("empty.ptz", b""),
        ("text.ptz", b"hello" * 100),
        ("zip.pt", b"PK\x03\x04" * 40),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=name):
            train_gpt.load_weights(tmp_path / name)
    for path in (tmp_path, tmp_path / "absent.ptz"):
        with pytest.raises(ArtifactError, match=path.name):
            train_gpt.load_weights(path)
