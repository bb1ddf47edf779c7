"""Every published system is a preset: its variables, its size, and its way from text to score."""

import dataclasses
import math
import pydoc_data.topics
import sys

import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    count,
    environ_of,
    events,
    layers_for,
    preset_config,
    read_json,
    run_main,
)

import train_gpt
from train_gpt import GPT, PRESETS, Config

# --------------------------------------------------------------------------------------------------
# The settings, by hand from docs/REFERENCE.md §3 to §7 and the authors' commands
# --------------------------------------------------------------------------------------------------
# Settings of every system whose row says nothing else.
COMMON = """
    VOCAB_SIZE=1024 NUM_LAYERS=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3.0
    ROPE_DIMS=16 ROPE_BASE=10000 LOGIT_SOFTCAP=30.0 QK_GAIN_INIT=1.5 TIED_EMBED_INIT_STD=0.005
    XSA_LAST_N=11 VALUE_RESIDUAL=1 GATED_ATTENTION=1 GATE_INPUTS=0 SMEAR_ENABLED=1 SMEAR_INPUTS=0
    BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=128 VE_ENABLED=0 VE_LAYERS=9,10 EMBEDDING_DIM=0
    NUM_LOOPS=0 LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35 SKIP_GATES_ENABLED=0
    PARALLEL_RESIDUAL_START=-1
    NATIVE_FLOW_ENABLED=0 NATIVE_FLOW_HIDDEN_DIM=256 NATIVE_FLOW_LOSS_WEIGHT=0.1
    FLOW_ENABLED=0 FLOW_LATENT_DIM=64 FLOW_HIDDEN_DIM=256 FLOW_INIT_SCALE=0.01
    E2E_TTT_ENABLED=0 E2E_TTT_MINI_BATCH=16 E2E_TTT_BASE_LR=1.0
    TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 MICRO_BATCH_TOKENS=98304 WARMUP_STEPS=20 SHUFFLE=0
    WARMDOWN_FRAC=0 WARMDOWN_SHAPE=linear MIN_LR=0 MAX_WALLCLOCK_SECONDS=0 GPTQ_RESERVE_SECONDS=12
    MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_WD=0.04 ADAM_WD=0.04 EMBED_WD=-1
    SCALAR_WD=-1 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 MUON_BACKEND_STEPS=5 MUON_ROW_NORMALIZE=0
    MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
    GRAD_CLIP_NORM=0.3 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0 SWA_EVERY=50
    LATE_QAT_THRESHOLD=0
    QUANTIZER=lite CALIBRATION_TOKENS=65536 BLOCK_BITS=6 EMBED_BITS=8 COMPRESSOR=zstd ZSTD_LEVEL=16
    BUDGET_BYTES=16000000 CODE_BYTES=0
    EVAL_SEQ_LEN=2048 EVAL_STRIDE=64 SLOT_ENABLED=0 SLOT_LR=0.003 SLOT_STEPS=5
    TTT_ENABLED=1 TTT_LR=0.002 TTT_EPOCHS=10 TTT_FREEZE_BLOCKS=2 TTT_BATCH_SEQS=32
    TTT_CHUNK_TOKENS=32768 TTT_GRAD_CLIP=1.0 TTT_MOMENTUM=0.9
"""
NFM = """
    MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 BIGRAM_DIM=128 MATRIX_LR=0.025
    SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_WD=0.04 ADAM_WD=0.04 TRAIN_BATCH_TOKENS=786432
    TRAIN_SEQ_LEN=2048 WARMUP_STEPS=20 VOCAB_SIZE=1024 SEED=42 ITERATIONS=7000 WARMDOWN_ITERS=2800
    MAX_WALLCLOCK_SECONDS=0 NUM_LAYERS=11 TIE_EMBEDDINGS=1 BIGRAM_VOCAB_SIZE=4096 ROPE_DIMS=16
    ROPE_BASE=10000 LOGIT_SOFTCAP=30.0 LN_SCALE=1 XSA_LAST_N=11 VALUE_RESIDUAL=1 GATED_ATTENTION=1
    QK_GAIN_INIT=1.5 LEAKY_RELU=1 LEAKY_SLOPE=0.5 MUON_MOMENTUM=0.99 GRAD_CLIP_NORM=0.3
    EVAL_STRIDE=64 EMA_ENABLED=1 EMA_DECAY=0.997 CANON_LAST_N=0 SWA_ENABLED=0 QAT_ENABLED=0
    FLOW_ENABLED=0 NATIVE_FLOW_HIDDEN_DIM=256 NATIVE_FLOW_INIT_SCALE=0.01
    NATIVE_FLOW_LOSS_WEIGHT=0.1 TTT_ENABLED=1 LEGAL_TTT=1 TTT_OPTIMIZER=sgd TTT_LR=0.002
    TTT_EPOCHS=10 TTT_FREEZE_BLOCKS=2 TTT_BATCH_SEQS=32 TTT_CHUNK_TOKENS=32768 TTT_GRAD_CLIP=1.0
    TTT_MOMENTUM=0.9
"""
LONG = "ITERATIONS=20000 WARMDOWN_ITERS=12000 SEED=42"
# The commands leave these to the scripts: no gate, no value residual, SWA, late QAT, lzma.
VE128 = """
    GATED_ATTENTION=0 VALUE_RESIDUAL=0 XSA_LAST_N=4 SWA_ENABLED=1 LATE_QAT_THRESHOLD=0.15
    COMPRESSOR=lzma
"""
TTT_LINEAR = """
    MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 BIGRAM_DIM=128 MATRIX_LR=0.025
    SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_WD=0.04 ADAM_WD=0.04 TRAIN_BATCH_TOKENS=786432
    TRAIN_SEQ_LEN=2048 WARMUP_STEPS=20 VOCAB_SIZE=1024 SEED=42 ITERATIONS=7185 WARMDOWN_ITERS=4311
    BIGRAM_VOCAB_SIZE=1536 EVAL_STRIDE=64 E2E_TTT_ENABLED=1 E2E_TTT_NUM_HEADS=8
    E2E_TTT_MINI_BATCH=16 E2E_TTT_BASE_LR=1.0 FLOW_ENABLED=1 FLOW_LATENT_DIM=64 FLOW_HIDDEN_DIM=256
    FLOW_INIT_SCALE=0.01 VE_ENABLED=1 VE_DIM=128 MAX_WALLCLOCK_SECONDS=0
"""
SLOT = """
    SLOT_ENABLED=1 SLOT_LR=0.003 SLOT_STEPS=5 CTW_WEIGHT=0 NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=1536
    XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50 ROPE_DIMS=16 LN_SCALE=1
    LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 TTT_ENABLED=1
    TTT_LR=0.002 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9
    TTT_BATCH_SEQS=32 TTT_GRAD_CLIP=1.0 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025
    TIED_EMBED_LR=0.035 MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92
    MUON_MOMENTUM_WARMUP_STEPS=1500 WARMDOWN_ITERS=3500 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600
    EVAL_STRIDE=64
"""
# Defaults of the scripts of 04-05 and 04-09, as far as they are settings here.
RECORD = """
    VOCAB_SIZE=8192 ITERATIONS=20000 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048
    EVAL_SEQ_LEN=2048 EVAL_STRIDE=64 MAX_WALLCLOCK_SECONDS=600 GPTQ_RESERVE_SECONDS=12
    NUM_LAYERS=11 XSA_LAST_N=11 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4.0
    SKIP_GATES_ENABLED=1 TIE_EMBEDDINGS=1 LOGIT_SOFTCAP=30.0 ROPE_BASE=10000.0 ROPE_DIMS=16
    ROPE_TRAIN_SEQ_LEN=2048 LN_SCALE=1 NUM_LOOPS=2 LOOP_END=5 MIN_LR=0.0 TIED_EMBED_LR=0.03
    TIED_EMBED_INIT_STD=0.005 SCALAR_LR=0.02 MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_ROW_NORMALIZE=1 MUON_MOMENTUM_WARMUP_STEPS=1500 BETA1=0.9
    BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3 EMBED_WD=0.085 SLIDING_WINDOW_ENABLED=1
"""
RECORD_0409 = f"""{RECORD}
    QK_GAIN_INIT=5.25 LOOP_START=3 ENABLE_LOOPING_AT=0.35 MATRIX_LR=0.022 MUON_WD=0.095
    EMA_DECAY=0.9965 WARMDOWN_FRAC=0.72 PARALLEL_RESIDUAL_START=7 TTT_ENABLED=1 TTT_LR=0.005
    TTT_EPOCHS=3 TTT_MOMENTUM=0.9 TTT_CHUNK_TOKENS=32768
"""
# They leave these to their code: no bigram, smear, gates or value residual.
SP8192 = """
    BIGRAM_VOCAB_SIZE=0 SMEAR_ENABLED=0 GATED_ATTENTION=0 VALUE_RESIDUAL=0 SHUFFLE=1 SCALAR_WD=0.02
    QUANTIZER=gptq WARMDOWN_ITERS=2800
"""
FRONTIER = f"""{SP8192}
    SMEAR_ENABLED=1 SMEAR_INPUTS=12 GATED_ATTENTION=1 GATE_INPUTS=12 TTT_FREEZE_BLOCKS=0
"""
# {preset: (parameters, command, what the command leaves to its script)}
TABLE = {
    "nfm_7k": (27_530_952, f"{NFM} NATIVE_FLOW_ENABLED=1", "EVAL_SEQ_LEN=1024"),
    "base_7k": (27_137_223, f"{NFM} NATIVE_FLOW_ENABLED=0", ""),
    "base_20k": (27_137_223, LONG, "WARMDOWN_SHAPE=cosine EMBED_BITS=6"),
    "flow_20k": (
        27_235_848,
        f"{LONG} FLOW_ENABLED=1 NATIVE_FLOW_ENABLED=0",
        "WARMDOWN_SHAPE=cosine EMBED_BITS=6",
    ),
    "ttt_linear_10l": (
        25_749_398,
        f"{TTT_LINEAR} NUM_LAYERS=10 VE_LAYERS=8,9",
        f"{VE128} TTT_ENABLED=0",
    ),
    "ttt_linear_11l": (
        28_110_750,
        f"{TTT_LINEAR} NUM_LAYERS=11 VE_LAYERS=9,10 INT5_MLP=1 TIE_EMBEDDINGS=1 LN_SCALE=1",
        f"{VE128} TTT_ENABLED=0",
    ),
    "slot_11l": (26_928_220, SLOT, f"{VE128} MLP_MULT=2.8"),  # parameters at MLP_MULT=3
    "record_0405": (
        35_943_512,
        f"{RECORD} QK_GAIN_INIT=4.0 LOOP_START=4 ENABLE_LOOPING_AT=0.5 MATRIX_LR=0.02 "
        "MUON_WD=0.085 EMA_DECAY=0.997 WARMDOWN_FRAC=0.667 PARALLEL_RESIDUAL_START=-1",
        f"{SP8192} TTT_ENABLED=0",
    ),
    "record_0409": (35_944_536, RECORD_0409, f"{SP8192} TTT_FREEZE_BLOCKS=0"),
    # The record, per layer 8 heads x 12 gate inputs, and once 12 smear inputs and a strength.
    "frontier_8192": (35_944_536 + 11 * 8 * 12 + 12 + 1, RECORD_0409, FRONTIER),
    "frontier_1024": (
        32_865_436,
        RECORD_0409,
        f"{FRONTIER} VOCAB_SIZE=1024 BIGRAM_VOCAB_SIZE=4096 VALUE_RESIDUAL=1",
    ),
}
SYSTEMS = [name for name in TABLE if not name.startswith(("record", "frontier"))]


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_published_settings_and_number_of_parameters(name):
    parameters, command, rest = TABLE[name]
    if name != "frontier_1024":  # the record's command says VOCAB_SIZE=8192
        assert Config.from_env(environ_of(command, PRESET=name)).differences() == {}
    environ = {**environ_of(COMMON), **environ_of(command), **environ_of(rest)}
    assert Config.from_env({**environ, "PRESET": name}).differences() == {}
    judged = {*train_gpt.read_variables(environ, {}), "seed", "eval_batch_seqs"}
    assert judged >= set(Config.names("arch", "train", "pack", "eval"))
    config = preset_config(name, **({"mlp_mult": 3.0} if name == "slot_11l" else {}))
    with torch.device("meta"):
        assert count(GPT(config)) == parameters


def scored_runs():
    """(preset, variables, parameters) of the rows of docs/REFERENCE.md's table in section 10."""
    text = (ROOT / "docs" / "REFERENCE.md").read_text()
    section = text.split("\n## 10. Described and scored\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    return [(row[0], environ_of(row[3]), int(row[4].replace(",", ""))) for row in cells]


def test_the_tables_have_every_preset_once():
    assert set(PRESETS) == {*TABLE, "demo"}
    assert Config.from_env({}).preset == "nfm_7k" and PRESETS["nfm_7k"] == {}
    assert sorted(name for name, _, _ in scored_runs()) == sorted(SYSTEMS)


@pytest.mark.parametrize("name, variables, parameters", scored_runs())
def test_the_variables_of_a_scored_run_give_what_was_scored(name, variables, parameters):
    scored = Config.from_env({"PRESET": name, **variables})
    # Every variable is needed: the preset, as described, has another value.
    assert len(scored.differences()) == len(variables)
    assert scored.rope_base == pytest.approx(10000 * (2048 / 1024) ** (16 / 14), abs=0.01)
    assert scored.eval_seq_len == 2048 and scored.warmdown_shape == "linear"
    assert scored.embed_bits == 8
    with torch.device("meta"):
        assert count(GPT(scored)) == parameters


def test_the_demo_has_every_feature_of_the_submission():
    demo, submission = preset_config("demo").as_dict(), preset_config("nfm_7k").as_dict()
    features = (
        "gated_attention value_residual nfm_enabled flow_enabled e2e_ttt_enabled ve_dim "
        "swa_enabled compressor block_bits embed_bits ttt_enabled slot"
    )
    assert all(demo[name] == submission[name] for name in features.split())
    assert demo["xsa_last_n"] == demo["num_layers"] and demo["eval_stride"] < demo["eval_seq_len"]
    assert 0 < demo["ema_decay"] < submission["ema_decay"]  # a short run forgets sooner


# --------------------------------------------------------------------------------------------------
# The whole path at a reduced size
# --------------------------------------------------------------------------------------------------
# Wide enough that block matrices and the embedding are large ones (int6, int8), and a warmdown that
# ends below the thresholds of SWA and late QAT. A preset's own features stay out of here.
FREE = {"xsa_last_n", "ttt_freeze_blocks", "nfm_hidden_dim"}
REDUCED = {name: value for name, value in TINY.items() if name not in FREE} | dict(
    num_layers=2,
    model_dim=176,
    nfm_hidden_dim=16,
    train_batch_tokens=256,
    micro_batch_tokens=128,
    iterations=8,
    warmdown_iters=8,
    swa_every=1,
    eval_stride=32,
    eval_batch_seqs=16,
    ttt_chunk_tokens=512,
    max_wallclock_seconds=0.0,  # steps count
)
FILES = (
    "config.json manifest.json train.log metrics.jsonl final_model.pt final_model.int6.ptz "
    "scores.json"
)


def reduced(name):
    """The reduced settings of a preset, which keep what it has by layer."""
    settings = {**REDUCED, **layers_for(name), "preset": name}
    if name == "ttt_linear_11l":
        settings.update(num_layers=3)  # its 10-layer sibling has 2
    return settings


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_from_text_to_its_scores(name, tiny_data, tmp_path):
    run = run_main(tmp_path / "run", **{**tiny_data.settings, **reduced(name)})
    assert run.code == 0, run.err
    preset = preset_config(name)
    last = ["legal_ttt"] if preset.ttt_enabled else []
    last = ["legal_ttt_slot_causal"] if name == "slot_11l" else last
    labels = ["pre_quant", "final_int6_roundtrip", "final_int6_sliding_window", *last]
    assert list(run.scores()) == labels
    result = read_json(run.dir / "scores.json")
    assert result["finished"] and result["preset"] == name and result["steps"] == 8
    assert {path.name for path in run.dir.iterdir()} >= set(FILES.split())
    targets = read_json(run.dir / "manifest.json")["data"]["val_targets"]
    for score in run.scores().values():
        assert score["legal"] and math.isfinite(score["val_bpb"]) and score["tokens"] == targets
    losses = [event["train_loss"] for event in events(run.dir, "step")]
    assert losses[-1] < losses[0] - 0.5
    # The log says how the weights were averaged and packed.
    averaged = "mean of 1 snapshots of the " * preset.swa_enabled
    packed = f"Serialized model int6+{preset.artifact_compressor}: "
    for start in (packed, f"export:{averaged}EMA weights (decay "):
        assert any(line.startswith(start) for line in run.lines), start
    # The artifact brings the trained model back.
    config, state = train_gpt.unpack_artifact((run.dir / "final_model.int6.ptz").read_bytes())
    settings = read_json(run.dir / "config.json")["config"]
    assert config.as_dict("arch", "eval").items() <= settings.items()
    trained = train_gpt.load_weights(run.dir / "final_model.pt").state_dict
    assert trained.keys() == state.keys()
    for tensor, weight in trained.items():
        # The coarsest step that lite takes below the rows' own: 1/15 with 5 bits, 1/31 with 6.
        assert (weight - state[tensor]).abs().max() <= max(1 / 30, 0.1 * weight.abs().max()), tensor


# --------------------------------------------------------------------------------------------------
# The full size
# --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_full_size_preset_trains_and_fits_the_budget(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "slurm"), *sys.path])
    package = pytest.importorskip("package")
    torch.manual_seed(0)
    config = preset_config(name)
    model = GPT(config).train()
    muon, adamw = train_gpt.build_optimizers(model, config)
    text = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    ids = torch.tensor(list(text.encode()[:2049]))[None]  # bytes of English stand in for tokens
    losses = []
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        train_gpt.reduce_clip_step(muon, adamw, train_gpt.Comm(), config.grad_clip_norm)
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses)) and losses[1] < losses[0]
    code = len(package.pack((ROOT / "train_gpt.py").read_text()))  # as it is submitted
    if name == "ttt_linear_11l":  # published as over the cap, with 16,681,127 bytes
        config = dataclasses.replace(config, budget_bytes=20_000_000)
    blob, _ = train_gpt.fit_lite(config, model.state_dict(), code)
    assert len(blob) + code <= config.budget_bytes
    assert train_gpt.unpack_artifact(blob)[0].as_dict("arch") == config.as_dict("arch")
