"""Variables of the published scripts: what each means here, what cannot be honoured, and whole
commands."""

import re

import pytest
from helpers import tiny_config

import train_gpt
from train_gpt import PUBLISHED, ConfigError

# Settings of the published commands by pull request: training, then the evaluation of #1170.
WIDTHS = "MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 BIGRAM_DIM=128"
RATES = "MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 MUON_WD=0.04 ADAM_WD=0.04"
SHAPES = "TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 WARMUP_STEPS=20 VOCAB_SIZE=1024"
NFM = (
    f"{WIDTHS} {RATES} {SHAPES} SEED=42 ITERATIONS=7000 WARMDOWN_ITERS=2800 "
    "MAX_WALLCLOCK_SECONDS=0 "
    "NUM_LAYERS=11 TIE_EMBEDDINGS=1 BIGRAM_VOCAB_SIZE=4096 ROPE_DIMS=16 ROPE_BASE=10000 "
    "LOGIT_SOFTCAP=30.0 LN_SCALE=1 XSA_LAST_N=11 VALUE_RESIDUAL=1 GATED_ATTENTION=1 "
    "QK_GAIN_INIT=1.5 "
    "LEAKY_RELU=1 LEAKY_SLOPE=0.5 MUON_MOMENTUM=0.99 GRAD_CLIP_NORM=0.3 "
    "EVAL_STRIDE=64 EMA_ENABLED=1 "
    "EMA_DECAY=0.997 CANON_LAST_N=0 SWA_ENABLED=0 QAT_ENABLED=0 FLOW_ENABLED=0 "
    "NATIVE_FLOW_ENABLED=1 "
    "NATIVE_FLOW_HIDDEN_DIM=256 NATIVE_FLOW_INIT_SCALE=0.01 NATIVE_FLOW_LOSS_WEIGHT=0.1"
)
LEGAL_TTT = (
    "TTT_ENABLED=1 LEGAL_TTT=1 TTT_OPTIMIZER=sgd TTT_LR=0.002 TTT_EPOCHS=10 TTT_FREEZE_BLOCKS=2 "
    "TTT_BATCH_SEQS=32 TTT_CHUNK_TOKENS=32768 TTT_GRAD_CLIP=1.0 TTT_MOMENTUM=0.9"
)
TTT_LINEAR = (
    f"{WIDTHS} {RATES} {SHAPES} SEED=42 ITERATIONS=7185 WARMDOWN_ITERS=4311 BIGRAM_VOCAB_SIZE=1536 "
    "EVAL_STRIDE=64 E2E_TTT_ENABLED=1 E2E_TTT_NUM_HEADS=8 E2E_TTT_MINI_BATCH=16 "
    "E2E_TTT_BASE_LR=1.0 "
    "FLOW_ENABLED=1 FLOW_LATENT_DIM=64 FLOW_HIDDEN_DIM=256 FLOW_INIT_SCALE=0.01 "
    "VE_ENABLED=1 VE_DIM=128 "
    "MAX_WALLCLOCK_SECONDS=0"
)
SLOT = (
    "SLOT_ENABLED=1 SLOT_LR=0.003 SLOT_STEPS=5 CTW_WEIGHT=0 NUM_LAYERS=11 BIGRAM_VOCAB_SIZE=1536 "
    "XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=1 SWA_EVERY=50 ROPE_DIMS=16 LN_SCALE=1 "
    "LATE_QAT=1 LATE_QAT_THRESHOLD=0.15 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 "
    "TTT_ENABLED=1 TTT_LR=0.002 "
    "TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_FREEZE_BLOCKS=0 TTT_MOMENTUM=0.9 TTT_BATCH_SEQS=32 "
    "TTT_GRAD_CLIP=1.0 MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 "
    "TIED_EMBED_LR=0.035 "
    "MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 "
    "WARMDOWN_ITERS=3500 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=64"
)
# What the scripts of 04-05 and 04-09 have as defaults, as far as they are settings here.
RECORD = (
    "VOCAB_SIZE=8192 ITERATIONS=20000 WARMUP_STEPS=20 TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 "
    "EVAL_SEQ_LEN=2048 EVAL_STRIDE=64 MAX_WALLCLOCK_SECONDS=600 NUM_LAYERS=11 XSA_LAST_N=11 "
    "MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=4.0 SKIP_GATES_ENABLED=1 TIE_EMBEDDINGS=1 "
    "LOGIT_SOFTCAP=30.0 ROPE_BASE=10000.0 ROPE_DIMS=16 ROPE_TRAIN_SEQ_LEN=2048 LN_SCALE=1 "
    "NUM_LOOPS=2 LOOP_END=5 MIN_LR=0.0 TIED_EMBED_LR=0.03 TIED_EMBED_INIT_STD=0.005 SCALAR_LR=0.02 "
    "MUON_MOMENTUM=0.99 MUON_BACKEND_STEPS=5 MUON_MOMENTUM_WARMUP_START=0.92 MUON_ROW_NORMALIZE=1 "
    "MUON_MOMENTUM_WARMUP_STEPS=1500 BETA1=0.9 BETA2=0.95 ADAM_EPS=1e-8 GRAD_CLIP_NORM=0.3 "
    "EMBED_WD=0.085 SLIDING_WINDOW_ENABLED=1"
)
COMMANDS = {
    "nfm_7k": [f"{NFM} {LEGAL_TTT}"],
    "base_7k": [f"{NFM} {LEGAL_TTT}".replace("NATIVE_FLOW_ENABLED=1", "NATIVE_FLOW_ENABLED=0")],
    "flow_20k": [
        "FLOW_ENABLED=1 NATIVE_FLOW_ENABLED=0 ITERATIONS=20000 WARMDOWN_ITERS=12000 SEED=42"
    ],
    "ttt_linear_10l": [f'{TTT_LINEAR} NUM_LAYERS=10 VE_LAYERS="8,9"'],
    "ttt_linear_11l": [
        f'{TTT_LINEAR} NUM_LAYERS=11 VE_LAYERS="9,10" INT5_MLP=1 XSA_LAST_N=4 '
        "TIE_EMBEDDINGS=1 LN_SCALE=1"
    ],
    "slot_11l": [SLOT],
    "record_0405": [
        f"{RECORD} QK_GAIN_INIT=4.0 LOOP_START=4 ENABLE_LOOPING_AT=0.5 MATRIX_LR=0.02 "
        "MUON_WD=0.085 EMA_DECAY=0.997 WARMDOWN_FRAC=0.667 PARALLEL_RESIDUAL_START=-1"
    ],
    "record_0409": [
        f"{RECORD} QK_GAIN_INIT=5.25 LOOP_START=3 ENABLE_LOOPING_AT=0.35 MATRIX_LR=0.022 "
        "MUON_WD=0.095 EMA_DECAY=0.9965 WARMDOWN_FRAC=0.72 PARALLEL_RESIDUAL_START=7 "
        "TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3 TTT_MOMENTUM=0.9 TTT_CHUNK_TOKENS=32768"
    ],
}


def environ_of(command, **more):
    """{name: text} of a command's assignments, as a shell reads them."""
    pairs = [word.split("=", 1) for word in command.split()]
    return {**{name: text.strip('"') for name, text in pairs}, **more}


def resolve(command="", **more):
    return train_gpt.Config.from_env(environ_of(command, **more))


@pytest.mark.parametrize("preset", COMMANDS)
def test_the_published_command_is_the_preset(preset):
    for command in COMMANDS[preset]:
        assert resolve(command, PRESET=preset).differences() == {}


def test_nfm_7k_needs_no_preset():
    assert resolve(COMMANDS["nfm_7k"][0]).hash() == resolve().hash()


def test_a_published_value_is_the_fields_value():
    config = resolve(
        "NATIVE_FLOW_HIDDEN_DIM=512 NATIVE_FLOW_LOSS_WEIGHT=0.2 TIED_EMBED_LR=0.05 SAVE_EVERY=500 "
        "TIED_EMBED_INIT_STD=0.01 MUON_BACKEND_STEPS=4 SAVE_DIR=/scratch/run"
    )
    assert config.differences() == dict(
        nfm_hidden_dim=512,
        nfm_loss_weight=0.2,
        embed_lr=0.05,
        checkpoint_every=500,
        embed_init_std=0.01,
        muon_ns_steps=4,
    )
    assert config.run_dir == "/scratch/run"
    assert resolve("NATIVE_FLOW_ENABLED=0").nfm_enabled is False
    record = resolve("MUON_ROW_NORMALIZE=1 ENABLE_LOOPING_AT=0.5 SKIP_GATES_ENABLED=1")
    assert record.differences() == dict(muon_row_norm=True, loop_at=0.5, skip_gates=True)
    assert resolve("EMBEDDING_DIM=256").differences() == dict(embed_dim=256)


@pytest.mark.parametrize(
    "command,preset,field,value",
    [
        ("EMA_ENABLED=0", "nfm_7k", "ema_decay", 0.0),
        ("EMA_ENABLED=1", "nfm_7k", "ema_decay", 0.997),
        ("EMA_ENABLED=1 EMA_DECAY=0.9", "nfm_7k", "ema_decay", 0.9),
        ("VE_ENABLED=1", "nfm_7k", "ve_dim", 128),
        ("VE_ENABLED=1 VE_DIM=64", "nfm_7k", "ve_dim", 64),
        ("VE_ENABLED=0", "slot_11l", "ve_dim", 0),
        ("VE_LAYERS=8,9,10", "slot_11l", "ve_last_n", 3),
        ("PARALLEL_RESIDUAL_START=5", "record_0409", "parallel_last_n", 6),
        ("PARALLEL_RESIDUAL_START=4 NUM_LAYERS=6", "nfm_7k", "parallel_last_n", 2),
        ("PARALLEL_RESIDUAL_START=11", "record_0409", "parallel_last_n", 0),
        ("PARALLEL_RESIDUAL_START=-1", "record_0409", "parallel_last_n", 0),
        ("LATE_QAT=1", "nfm_7k", "late_qat_threshold", 0.15),
        ("LATE_QAT=0", "slot_11l", "late_qat_threshold", 0.0),
        ("SLOT_ENABLED=1", "nfm_7k", "slot", "causal"),
        ("SLOT_ENABLED=1 SLOT=published", "nfm_7k", "slot", "published"),
        ("SLOT_ENABLED=0", "slot_11l", "slot", "off"),
        ("PARALLEL_RESIDUAL_START=7", "record_0405", "parallel_last_n", 4),
        ("PARALLEL_RESIDUAL_START=7 NUM_LAYERS=9", "record_0409", "parallel_last_n", 2),
        ("EMBEDDING_DIM=256", "record_0409", "embed_dim", 256),
    ],
)
def test_a_switch_sets_its_field_unless_that_says_more(command, preset, field, value):
    assert getattr(resolve(command, PRESET=preset), field) == value


@pytest.mark.parametrize(
    "command",
    [
        "LEAKY_SLOPE=0.3",
        "LEAKY_RELU=0",
        "LN_SCALE=0",
        "TIE_EMBEDDINGS=0",
        "CANON_LAST_N=4",
        "CTW_WEIGHT=0.1",
        "QAT_ENABLED=1",
        "INT5_MLP=0",
        "LEGAL_TTT=0",
        "TTT_OPTIMIZER=adamw",
        "NATIVE_FLOW_INIT_SCALE=0.1",
        "E2E_TTT_NUM_HEADS=4",
        "VE_LAYERS=3,4",
        "VE_LAYERS=10,9",
        "VE_LAYERS=last",
        "LN_SCALE=nan",
        "WEIGHT_DECAY=0.04",
        "SLIDING_WINDOW_ENABLED=0",
        "ROPE_TRAIN_SEQ_LEN=1024",
        "MATRIX_BITS=6",
        "MATRIX_CLIP_SIGMAS=12.85",
        "EMBED_CLIP_SIGMAS=20",
        "GPTQ_CALIBRATION_BATCHES=64",
        "GPTQ_RESERVE_SECONDS=12",
        "RECUR_LAYERS=4,5",
        "RECUR_START_STEP=3000",
        "PARALLEL_START_LAYER=7",
        "SMEAR_GATE_ENABLED=1",
        "SPARSE_ATTN_GATE_ENABLED=1",
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused_with_the_reason(command):
    name, text = command.split("=")
    with pytest.raises(
        ConfigError, match=rf"^{name}='?{text}'?.*(only|not a setting).*[a-z]{{3}}"
    ) as error:
        resolve(command)
    assert error.value.code == 2


@pytest.mark.parametrize(
    "command",
    [
        "LEAKY_SLOPE=.50",
        "LEAKY_RELU=true",
        "LN_SCALE=1.0",
        "QAT_ENABLED=false",
        "TTT_OPTIMIZER=SGD",
        "NATIVE_FLOW_INIT_SCALE=1e-2",
        "CANON_LAST_N=0",
    ],
)
def test_the_built_in_value_may_be_spelt_in_any_way(command):
    assert resolve(command) == resolve()


@pytest.mark.parametrize(
    "command,named",
    [
        ("TIED_EMBED_LR=0.03 EMBED_LR=0.6", "EMBED_LR=0.6"),
        ("NATIVE_FLOW_ENABLED=1 NFM_ENABLED=0", "NFM_ENABLED=False"),
        ("EMA_ENABLED=0 EMA_DECAY=0.997", "EMA_DECAY=0.997"),
        ("EMA_ENABLED=1 EMA_DECAY=0", "EMA_DECAY=0.0"),
        ("SLOT_ENABLED=1 SLOT=off", "SLOT=off"),
        ("VE_LAYERS=9,10 VE_LAST_N=3", "VE_LAST_N=3"),
        ("SAVE_DIR=/a RUN_DIR=/b", "RUN_DIR=/b"),
        ("PARALLEL_RESIDUAL_START=7 PARALLEL_LAST_N=3", "PARALLEL_LAST_N=3"),
    ],
)
def test_two_names_that_contradict_each_other_are_refused(command, named):
    first = command.split()[0]
    with pytest.raises(ConfigError, match=f"^{first} contradicts {named}: unset one of them$"):
        resolve(command)


def test_two_names_that_agree_are_one():
    assert resolve("TIED_EMBED_LR=0.05 EMBED_LR=5e-2").embed_lr == 0.05


@pytest.mark.parametrize(
    "command,expected",
    [
        ("TIED_EMBED_LR=fast", "TIED_EMBED_LR='fast': expected float"),
        ("EMA_ENABLED=yes", "EMA_ENABLED='yes': expected 0, 1, true or false"),
        ("SAVE_EVERY=1.5", "SAVE_EVERY='1.5': expected int"),
        ("NATIVE_FLOW_HIDDEN_DIM=0", "NFM_HIDDEN_DIM=0: expected at least 1"),
        ("PARALLEL_RESIDUAL_START=7.5", "PARALLEL_RESIDUAL_START='7.5': expected int"),
    ],
)
def test_a_wrong_value_is_reported_like_any_other(command, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve(command)


@pytest.mark.parametrize(
    "misspelt,meant",
    [
        ("NATIVE_FLOW_HIDEN_DIM", "NATIVE_FLOW_HIDDEN_DIM"),
        ("TIED_EMBD_LR", "TIED_EMBED_LR"),
        ("LEAKY_SLOP", "LEAKY_SLOPE"),
        ("VE_LAYER", "VE_LAYERS"),
        ("EMA_ENABLE", "EMA_ENABLED"),
        ("TTT_OPTIMISER", "TTT_OPTIMIZER"),
        ("MUON_WDS", "MUON_WD"),
        ("ve_layers", "VE_LAYERS"),
    ],
)
def test_near_misses_of_published_names_are_errors(misspelt, meant):
    with pytest.raises(
        ConfigError, match=f"{misspelt}='1' is not a setting, but looks like {meant}:"
    ):
        resolve(**{misspelt: "1"})


def test_a_published_name_may_not_contradict_an_artifact():
    brought = tiny_config().as_dict("arch", "eval")
    with pytest.raises(
        ConfigError, match="NFM_HIDDEN_DIM=512 contradicts the artifact, which has 16"
    ):
        train_gpt.Config.from_env({"NATIVE_FLOW_HIDDEN_DIM": "512"}, brought)
    # What is built in follows the artifact, not the defaults.
    config = train_gpt.Config.from_env({"VE_LAYERS": "1,2", "E2E_TTT_NUM_HEADS": "4"}, brought)
    assert config.ve_last_n == 2


def test_every_published_name_that_is_no_field_has_one_meaning():
    fields = set(train_gpt.Config.names())
    assert not fields & {name.lower() for name in PUBLISHED}
    for meaning in PUBLISHED.values():
        assert getattr(meaning, "field", "seed") in fields
