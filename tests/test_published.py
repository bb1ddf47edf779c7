"""Variables of the published scripts: renamed, built in, refused. test_presets.py has commands."""

import re

import pytest
from helpers import environ_of, tiny_config

from train_gpt import BUILT_IN, REFUSED, RENAMED, Config, ConfigError


def resolve(command="", **more):
    return Config.from_env(environ_of(command, **more))


@pytest.mark.parametrize(
    "command,preset,field,value",
    [
        ("TIED_EMBED_LR=0.05", "nfm_7k", "embed_lr", 0.05),
        ("TIED_EMBED_LR=0.05 EMBED_LR=5e-2", "nfm_7k", "embed_lr", 0.05),
        ("TIED_EMBED_INIT_STD=0.01", "nfm_7k", "embed_init_std", 0.01),
        ("MUON_BACKEND_STEPS=4", "nfm_7k", "muon_ns_steps", 4),
        ("NATIVE_FLOW_ENABLED=0", "nfm_7k", "nfm_enabled", False),
        ("NATIVE_FLOW_HIDDEN_DIM=512", "nfm_7k", "nfm_hidden_dim", 512),
        ("NATIVE_FLOW_LOSS_WEIGHT=0.2", "nfm_7k", "nfm_loss_weight", 0.2),
        ("MUON_ROW_NORMALIZE=1", "nfm_7k", "muon_row_norm", True),
        ("ENABLE_LOOPING_AT=0.5", "nfm_7k", "loop_at", 0.5),
        ("SKIP_GATES_ENABLED=1", "nfm_7k", "skip_gates", True),
        ("EMBEDDING_DIM=256", "record_0409", "embed_dim", 256),
        ("SAVE_EVERY=500", "nfm_7k", "checkpoint_every", 500),
        ("SAVE_DIR=/scratch/run", "nfm_7k", "run_dir", "/scratch/run"),
        ("EMA_ENABLED=0", "nfm_7k", "ema_decay", 0.0),
        ("EMA_ENABLED=1", "nfm_7k", "ema_decay", 0.997),
        ("EMA_ENABLED=1", "record_0409", "ema_decay", 0.9965),
        ("EMA_ENABLED=1 EMA_DECAY=0.9", "nfm_7k", "ema_decay", 0.9),
        ("VE_ENABLED=1", "nfm_7k", "ve_dim", 128),
        ("VE_ENABLED=1 VE_DIM=64", "nfm_7k", "ve_dim", 64),
        ("VE_ENABLED=0", "slot_11l", "ve_dim", 0),
        ("VE_LAYERS=8,9,10", "slot_11l", "ve_last_n", 3),
        ("LATE_QAT=1", "nfm_7k", "late_qat_threshold", 0.15),
        ("LATE_QAT=0", "slot_11l", "late_qat_threshold", 0.0),
        ("SLOT_ENABLED=1", "nfm_7k", "slot", "causal"),
        ("SLOT_ENABLED=1 SLOT=published", "nfm_7k", "slot", "published"),
        ("SLOT_ENABLED=0", "slot_11l", "slot", "off"),
        ("PARALLEL_RESIDUAL_START=7", "record_0405", "parallel_last_n", 4),
        ("PARALLEL_RESIDUAL_START=7 NUM_LAYERS=9", "record_0409", "parallel_last_n", 2),
        ("PARALLEL_RESIDUAL_START=11", "record_0409", "parallel_last_n", 0),
        ("PARALLEL_RESIDUAL_START=-1", "record_0409", "parallel_last_n", 0),
        # The one value that is built in, or that of another field, in any spelling.
        ("LEAKY_SLOPE=.50", "nfm_7k", "seed", 42),
        ("LEAKY_RELU=true", "nfm_7k", "seed", 42),
        ("LN_SCALE=1.0", "nfm_7k", "seed", 42),
        ("QAT_ENABLED=false", "nfm_7k", "seed", 42),
        ("TTT_OPTIMIZER=SGD", "nfm_7k", "seed", 42),
        ("NATIVE_FLOW_INIT_SCALE=1e-2", "nfm_7k", "seed", 42),
        ("FLOW_INIT_SCALE=0.01", "flow_20k", "seed", 42),
        ("E2E_TTT_NUM_HEADS=4 NUM_HEADS=4", "nfm_7k", "num_heads", 4),
        ("ROPE_TRAIN_SEQ_LEN=1024 TRAIN_SEQ_LEN=1024", "nfm_7k", "train_seq_len", 1024),
    ],
)
def test_a_published_variable_sets_its_field_and_no_other(command, preset, field, value):
    config = resolve(command, PRESET=preset)
    assert getattr(config, field) == value
    named = {word.split("=")[0].lower() for word in command.split()}
    assert config.differences().keys() <= {field, *named}


# A value for each refused name, and values that a name with one value does not take.
WRONG = dict.fromkeys(REFUSED, "1") | dict(
    LEAKY_SLOPE="0.3",
    LEAKY_RELU="0",
    LN_SCALE="nan",
    TIE_EMBEDDINGS="0",
    CANON_LAST_N="4",
    CTW_WEIGHT="0.1",
    QAT_ENABLED="1",
    INT5_MLP="0",
    LEGAL_TTT="0",
    TTT_OPTIMIZER="adamw",
    NATIVE_FLOW_INIT_SCALE="0.1",
    FLOW_INIT_SCALE="1",
    SLIDING_WINDOW_ENABLED="0",
    VAL_DOC_FRACTION="0.5",
    E2E_TTT_NUM_HEADS="4",
    ROPE_TRAIN_SEQ_LEN="1024",
    VE_LAYERS="3,4",
)


@pytest.mark.parametrize("name,text", [*WRONG.items(), ("VE_LAYERS", "10,9"), ("VE_LAYERS", "x")])
def test_a_value_that_cannot_be_honoured_is_refused_with_the_reason(name, text):
    with pytest.raises(ConfigError) as error:
        resolve(**{name: text})
    assert error.value.code == 2
    assert re.match(rf"{name}='?{text}'?.*(only|not a setting).*[a-z]{{3}}", str(error.value))


def test_every_name_has_one_meaning_and_a_refused_one_names_what_to_do():
    fields = Config.names()
    names = [*map(str.upper, fields), *RENAMED, *BUILT_IN, *REFUSED]
    assert len(names) == len(set(names))
    assert {r if isinstance(r, str) else r[0] for r in RENAMED.values()} <= set(fields)
    assert BUILT_IN.keys() <= WRONG.keys()
    for removed, instead in dict(
        NPROC="torchrun --standalone --nproc_per_node",
        RESUME="set another RUN_ID",
        EMA_FULL_STEPS="EMA_DECAY",
        EVAL_CHECKPOINT_SECONDS="CHECKPOINT_SECONDS",
        GPTQ_CALIBRATION_BATCHES="CALIBRATION_TOKENS",
        WEIGHT_DECAY="MUON_WD",
    ).items():
        assert instead in REFUSED[removed]


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


@pytest.mark.parametrize(
    "command,expected",
    [
        ("TIED_EMBED_LR=fast", "TIED_EMBED_LR='fast': expected float"),
        ("TIED_EMBED_LR=nan", "EMBED_LR=nan: expected a finite number"),
        ("EMA_ENABLED=yes", "EMA_ENABLED='yes': expected 0, 1, true or false"),
        ("SAVE_EVERY=1.5", "SAVE_EVERY='1.5': expected int"),
        ("NATIVE_FLOW_HIDDEN_DIM=0", "NFM_HIDDEN_DIM=0: expected at least 1"),
        ("PARALLEL_RESIDUAL_START=7.5", "PARALLEL_RESIDUAL_START='7.5': expected int"),
    ],
)
def test_a_wrong_value_is_reported_like_any_other(command, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve(command)


def test_a_published_name_may_not_contradict_an_artifact():
    artifact = tiny_config().as_dict("arch", "eval")
    with pytest.raises(ConfigError, match="NFM_HIDDEN_DIM=512 contradicts the artifact.* 16"):
        Config.from_env({"NATIVE_FLOW_HIDDEN_DIM": "512"}, artifact)
    # The layers and heads that a value is compared with are the artifact's, not the defaults.
    config = Config.from_env({"VE_LAYERS": "1,2", "E2E_TTT_NUM_HEADS": "4"}, artifact)
    assert config.ve_last_n == 2
