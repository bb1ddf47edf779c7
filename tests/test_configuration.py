"""Where settings come from, what is refused, what the hash covers, what an artifact brings."""

import dataclasses
import math

import pytest
from helpers import environ_of, run_main, tiny_config

import train_gpt
from train_gpt import PRESETS, Config, ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PLACE_AND_PACE = """
    preset data_path tokenizer_path run_id run_dir eval_only mode audit audit_seed spot_checks
    scores_file prompt sample_tokens temperature top_k device dtype compile micro_batch_tokens
    warmup_steps train_log_every val_loss_every checkpoint_every checkpoint_seconds
    time_limit_seconds
"""
PACKING = """
    quantizer calibration_tokens block_bits embed_bits compressor zstd_level budget_bytes code_bytes
"""


def other_value(name):
    """A Config that differs from the defaults in this field alone, and is allowed."""
    field, value = FIELDS[name], getattr(Config(), name)
    if name == "preset":
        candidates = ["base_7k"]
    elif field.metadata["choices"]:
        candidates = [choice for choice in field.metadata["choices"] if choice != value]
    elif field.type is bool:
        candidates = [not value]
    elif field.type is str:
        candidates = ["cpu" if name == "device" else value + "other"]
    else:
        candidates = [value * 2, value / 2 if field.type is float else value // 2, value + 1]
    for candidate in candidates:
        if candidate != value:
            try:
                return Config(**{name: candidate})
            except ConfigError:
                continue
    raise AssertionError(f"no other value of {name} is allowed: {candidates}")


def test_an_explicit_variable_beats_the_preset_and_the_preset_the_default():
    named = {"run_id": "nfm_7k_seed42", "run_dir": "runs/nfm_7k_seed42"}
    assert Config.from_env({}).as_dict() == {**Config().as_dict(), **named}
    assert Config().eval_seq_len == 1024 and Config().iterations == 7000
    preset = Config.from_env({"PRESET": "base_20k"})
    assert (preset.eval_seq_len, preset.iterations, preset.nfm_enabled) == (2048, 20000, False)
    explicit = Config.from_env({"PRESET": "base_20k", "EVAL_SEQ_LEN": "1024", "NFM_ENABLED": "1"})
    assert (explicit.eval_seq_len, explicit.iterations, explicit.nfm_enabled) == (1024, 20000, True)


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("AUDIT", "1", True),
        ("NFM_ENABLED", "FALSE", False),
        ("ITERATIONS", "12", 12),
        ("MATRIX_LR", "2", 2.0),
        ("COMPILE", "0", "0"),
        ("WARMDOWN_SHAPE", "cosine", "cosine"),
        ("DEVICE", "cuda:3", "cuda:3"),
        ("QK_GAIN_INIT", "-1.5", -1.5),
    ],
)
def test_a_value_is_read_in_its_fields_type(name, text, value):
    found = getattr(Config.from_env({name: text}), name.lower())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name,texts,expected",
    [
        ("AUDIT", ["yes", "", "2"], "0, 1, true or false"),
        ("ITERATIONS", ["many", "7e3", "1.5", ""], "expected int"),
        ("MATRIX_LR", ["fast"], "expected float"),
        ("MATRIX_LR", ["nan", "-inf", "1e400"], "expected a finite number"),
        ("BETA1", ["1", "-0.1"], "expected at least 0 and at most 0.9999"),
        ("MATRIX_LR", ["-0.1"], "expected at least 0"),
        ("BLOCK_BITS", ["7"], "expected one of 5, 6, 8"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(name, texts, expected):
    for text in texts:
        with pytest.raises(ConfigError) as error:
            Config.from_env({name: text})
        message = str(error.value)
        assert message.startswith(f"{name}=") and message.endswith(expected)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_what_is_beyond_its_bounds_and_choices(name):
    field = FIELDS[name]
    low, high = field.metadata["low"], field.metadata["high"]
    wrong = [value for value in (low - 1, high + 1) if math.isfinite(value)]
    wrong += ["no such choice"] if field.metadata["choices"] else []
    wrong += [None, True] if field.type in (int, float) else [None, 1.5]
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{name.upper()}=.*expected"):
            Config(**{name: value})


@pytest.mark.parametrize(
    "settings,named",
    [
        ("NUM_HEADS=7", "MODEL_DIM=512 NUM_HEADS=7 multiple"),
        ("NUM_KV_HEADS=3", "NUM_HEADS=8 NUM_KV_HEADS=3 multiple"),
        ("NUM_KV_HEADS=16", "NUM_HEADS=8 NUM_KV_HEADS=16 multiple"),
        ("ROPE_DIMS=15", "ROPE_DIMS=15 64"),
        ("ROPE_DIMS=66", "ROPE_DIMS=66 64"),
        ("MODEL_DIM=16 NUM_HEADS=1 NUM_KV_HEADS=1 MLP_MULT=0.25", "MLP_MULT=0.25 raise"),
        ("TTT_FREEZE_BLOCKS=12", "TTT_FREEZE_BLOCKS=12 NUM_LAYERS=11 lower"),
        ("EMBED_DIM=513", "EMBED_DIM=513 MODEL_DIM=512 lower"),
        ("SMEAR_INPUTS=513", "SMEAR_INPUTS=513 MODEL_DIM=512 lower"),
        ("GATE_INPUTS=513", "GATE_INPUTS=513 MODEL_DIM=512 lower"),
        ("PARALLEL_LAST_N=12", "PARALLEL_LAST_N=12 NUM_LAYERS=11 lower"),
        ("NUM_LOOPS=1 LOOP_START=5 LOOP_END=4", "LOOP_START=5 LOOP_END=4 NUM_LAYERS=11"),
        ("NUM_LOOPS=1 LOOP_END=11", "LOOP_START=3 LOOP_END=11 NUM_LAYERS=11"),
        ("BIGRAM_VOCAB_SIZE=1", "BIGRAM_VOCAB_SIZE=1 0 2"),
        ("VE_DIM=8 VE_LAST_N=12", "VE_LAST_N=12 NUM_LAYERS=11 lower"),
        ("TRAIN_BATCH_TOKENS=786433", "TRAIN_BATCH_TOKENS=786433 TRAIN_SEQ_LEN=2048 multiple"),
        ("MICRO_BATCH_TOKENS=2047", "MICRO_BATCH_TOKENS=2047 TRAIN_SEQ_LEN=2048 raise"),
        (
            "EVAL_BATCH_SEQS=4096 TTT_BATCH_SEQS=1",
            "EVAL_BATCH_SEQS=4096 EVAL_SEQ_LEN=1024 MODEL_DIM=512 2147483648 536870912",
        ),
        ("EVAL_STRIDE=1025", "EVAL_STRIDE=1025 EVAL_SEQ_LEN=1024 never"),
        (
            "EVAL_SEQ_LEN=2048 EVAL_STRIDE=1 TTT_CHUNK_TOKENS=2048",
            "EVAL_SEQ_LEN=2048 EVAL_STRIDE=1 2048 1024",
        ),
        ("TTT_CHUNK_TOKENS=32769", "TTT_CHUNK_TOKENS=32769 EVAL_SEQ_LEN=1024 multiple"),
        ("SLOT=causal EVAL_STRIDE=1024", "SLOT='causal' EVAL_STRIDE=1024 lower"),
        ("SLOT=published EVAL_STRIDE=1024", "SLOT='published' EVAL_STRIDE=1024 lower"),
        ("QK_GAIN_INIT=0", "QK_GAIN_INIT=0.0 published"),
        ("EMBED_WD=-0.5", "EMBED_WD=-0.5 -1 ADAM_WD"),
        ("SCALAR_WD=-0.01", "SCALAR_WD=-0.01 -1 ADAM_WD"),
        ("LATE_QAT_THRESHOLD=0.15 MIN_LR=0.15", "LATE_QAT_THRESHOLD=0.15 MIN_LR=0.15 never"),
        (
            "QUANTIZER=gptq MAX_WALLCLOCK_SECONDS=12",
            "GPTQ_RESERVE_SECONDS=12.0 MAX_WALLCLOCK_SECONDS=12.0 lower raise",
        ),
        ("DEVICE=gpu", "DEVICE='gpu' auto, cpu, cuda or cuda:N"),
        ("PRESET=nfm7k", f"PRESET='nfm7k' {' '.join(PRESETS)}"),
    ],
)
def test_settings_that_do_not_fit_together_are_named_with_their_values(settings, named):
    with pytest.raises(ConfigError) as error:
        Config.from_env(environ_of(settings))
    assert error.value.code == 2
    assert [word for word in named.split() if word not in str(error.value)] == []


def test_what_is_off_refuses_nothing():
    Config.from_env(environ_of("NUM_LAYERS=1 VE_LAST_N=2 TTT_FREEZE_BLOCKS=0 EVAL_STRIDE=1024"))
    Config.from_env(environ_of("MAX_WALLCLOCK_SECONDS=5"))  # lite keeps no time for packing
    Config.from_env(environ_of("QUANTIZER=gptq GPTQ_RESERVE_SECONDS=12"))  # there is no cap


@pytest.mark.parametrize(
    "settings,seconds",
    [
        ("", 0.0),
        ("QUANTIZER=gptq", 0.0),
        ("MAX_WALLCLOCK_SECONDS=600", 600.0),
        ("MAX_WALLCLOCK_SECONDS=600 QUANTIZER=gptq", 588.0),
        ("PRESET=record_0409 GPTQ_RESERVE_SECONDS=0", 600.0),
    ],
)
def test_training_leaves_gptq_its_share_of_the_wallclock_cap(settings, seconds):
    assert Config.from_env(environ_of(settings)).training_seconds == seconds


@pytest.mark.parametrize(
    "misspelt,meant",
    [
        ("ITERATONS", "ITERATIONS"),
        ("PRSET", "PRESET"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("iterations", "ITERATIONS"),
        ("NATIVE_FLOW_HIDEN_DIM", "NATIVE_FLOW_HIDDEN_DIM"),
        ("ve_layers", "VE_LAYERS"),
    ],
)
def test_a_misspelt_variable_is_an_error_that_names_the_one_meant(misspelt, meant):
    with pytest.raises(ConfigError) as error:
        Config.from_env({misspelt: "123"})
    assert f"{misspelt}='123'" in str(error.value) and f"like {meant}:" in str(error.value)


@pytest.mark.parametrize(
    "name, meant", [("SEEDS", "SEED"), ("MODEL", "MODE"), ("COMPILER", "COMPILE")]
)
def test_a_near_miss_of_a_short_name_warns_and_a_place_of_other_scripts_too(name, meant):
    environ = {name: "9", "DATA_DIR": "/data"}
    assert Config.from_env(environ) == Config.from_env({})
    warned = train_gpt.name_warnings(environ)
    assert len(warned) == 2 and f"{name}=9" in warned[0] and f"did you mean {meant}?" in warned[0]
    assert "DATA_DIR=/data does nothing here: set DATA_PATH and TOKENIZER_PATH" in warned[1]


@pytest.mark.parametrize(
    "settings",
    [
        "CASEOPS_ENABLED=1",
        "LQER_ENABLED=1 LQER_RANK=4",
        "PHASED_TTT_ENABLED=1",
        "TTT_LORA_RANK=96",
        "NGRAM_TILT_ENABLED=1",
        "MTP_NUM_HEADS=2",
        "GATED_ATTN_ENABLED=1",
        "ATTN_VARIANT=mla",
        "QAT=1",
    ],
)
def test_a_feature_that_this_code_lacks_is_refused_unless_it_is_off(settings):
    on = environ_of(settings)
    with pytest.raises(ConfigError, match="this code has no"):
        Config.from_env(on)
    name = next(iter(on))
    off = {**on, name: "0"}
    assert Config.from_env(off) == Config.from_env({})


def test_the_variables_of_ordinary_machines_are_no_near_misses():
    names = """
        PATH HOME LANG USER LOGNAME SHELL TERM PWD OLDPWD TMPDIR EDITOR PAGER DISPLAY HOSTNAME MAIL
        SHLVL COLUMNS LINES PYTHONPATH VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV LD_LIBRARY_PATH
        CUDA_HOME CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER NCCL_DEBUG OMP_NUM_THREADS MKL_NUM_THREADS
        HF_HOME TOKENIZERS_PARALLELISM TORCH_HOME TORCH_LOGS WANDB_MODE RANK LOCAL_RANK WORLD_SIZE
        LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
        TORCHELASTIC_RESTART_COUNT SLURM_JOB_NAME SLURM_NODEID SLURM_PROCID SLURM_NTASKS
        SLURM_JOB_END_TIME SLURM_SUBMIT_DIR XDG_RUNTIME_DIR XDG_DATA_DIRS SSH_CLIENT LS_COLORS
        MODULEPATH MODULESHOME DEBUG CI DATASET DATA_DIR NSLOTS
    """
    assert Config.from_env(dict.fromkeys(names.split(), "1")) == Config.from_env({})


def test_help_lists_every_variable_with_its_meaning_default_and_presets(tmp_path):
    """Even where the environment is wrong: help is for those who are stuck."""
    text = run_main(cwd=tmp_path, arguments=["--help"], preset="no such preset").out
    variables, published = text.split("Variables", 1)[1].split("\n\nPublished names", 1)
    for name in (*train_gpt.RENAMED, *train_gpt.BUILT_IN, *train_gpt.REFUSED):
        assert f"\n  {name}\n      " in published
    entries = {}
    for line in variables.splitlines()[1:]:
        if not line.startswith("   "):
            name = line.strip().split("=")[0]
            entries[name] = line
        else:
            entries[name] += line
    assert list(entries) == [name.upper() for name in FIELDS]
    for name, field in FIELDS.items():
        entry = entries[name.upper()]
        assert entry.startswith(f"  {name.upper()}={field.default} ")
        assert field.metadata["text"] in entry and len(field.metadata["text"]) > 5
        for preset, values in PRESETS.items():
            assert (f"[{preset}={values.get(name)}]" in entry) == (name in values)
        for choice in PRESETS if name == "preset" else field.metadata["choices"] or ():
            assert str(choice) in entry


def test_printing_the_configuration_gives_an_environment_that_resolves_to_it(tmp_path):
    environ = environ_of("PRESET=slot_11l SEED=7 NFM_ENABLED=1 MATRIX_LR=1e-3 SLURM_JOB_ID=12")
    text = run_main(cwd=tmp_path, arguments=["--print-config"], **environ).out
    printed = dict(line.split("=", 1) for line in text.splitlines())
    assert list(printed) == [name.upper() for name in FIELDS]
    assert Config.from_env(printed) == Config.from_env(environ)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_covers_what_changes_a_result_and_nothing_else():
    configs = {name: other_value(name) for name in FIELDS}
    base = Config().hash()
    same = {name for name, config in configs.items() if config.hash() == base}
    assert same == set(PLACE_AND_PACE.split())
    assert len({config.hash() for config in configs.values()}) == len(FIELDS) - len(same) + 1
    assert len(base) == 16 and int(base, 16) >= 0
    assert set(Config.names("pack")) == set(PACKING.split())
    # However a value was given.
    demo = Config.from_env({"PRESET": "demo"})
    spelled_out = {name.upper(): str(value) for name, value in PRESETS["demo"].items()}
    assert Config.from_env(spelled_out).hash() == demo.hash() != Config().hash()


def test_differences_are_what_the_user_changed_from_the_preset():
    """A variable that repeats the preset's value changes nothing; a run's name is no setting."""
    assert PRESETS["base_20k"]["eval_seq_len"] == 2048
    settings = "PRESET=base_20k SEED=7 EVAL_SEQ_LEN=2048 WARMUP_STEPS=3 RUN_ID=mine"
    config = Config.from_env(environ_of(settings))
    assert config.differences() == {"seed": 7, "warmup_steps": 3}


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def from_artifact(**changes):
    """Settings that an artifact of a tiny model gives a run that scores it."""
    loaded = train_gpt.LoadedWeights(tiny_config(**changes), {}, "", {}, "0123456789abcdef")
    return loaded.from_artifact()


def test_an_artifact_brings_its_architecture_and_evaluation():
    changes = dict(eval_stride=32, ttt_lr=0.5)
    environ = environ_of("SEED=5 MICRO_BATCH_TOKENS=4096 DATA_PATH=/somewhere SLURM_JOB_ID=9")
    own, merged = Config.from_env(environ), Config.from_env(environ, from_artifact(**changes))
    assert merged.as_dict("arch", "eval") == tiny_config(**changes).as_dict("arch", "eval")
    named = {"run_id": "eval_01234567_9", "run_dir": "runs/eval_01234567_9"}
    others = own.as_dict("train", "pack", "run")  # a file of others is not believed: audit
    assert merged.as_dict("train", "pack", "run") == {**others, **named, "audit": True}
    # An explicit evaluation setting comes first.
    environ = environ_of("EVAL_STRIDE=16 TTT_ENABLED=0")
    merged = Config.from_env(environ, from_artifact(**changes))
    assert (merged.eval_stride, merged.ttt_enabled, merged.ttt_lr) == (16, False, 0.5)
    assert merged.eval_seq_len == 64


def test_an_explicit_architecture_must_be_the_artifacts():
    assert Config.from_env({"NUM_LAYERS": "3"}, from_artifact()).num_layers == 3
    expected = "NUM_LAYERS=4 contradicts the artifact, which has 3: unset NUM_LAYERS"
    with pytest.raises(ConfigError, match=expected):
        Config.from_env({"NUM_LAYERS": "4"}, from_artifact())
    # A preset is no explicit setting.
    merged = Config.from_env({"PRESET": "slot_11l"}, from_artifact())
    assert merged.num_layers == 3 and merged.preset == "slot_11l"


@pytest.mark.parametrize(
    "name,text,changes",
    [
        ("EVAL_STRIDE", "2048", dict(eval_seq_len=2048, ttt_chunk_tokens=4096)),
        ("TTT_CHUNK_TOKENS", "192", dict(eval_seq_len=64)),
        ("MODEL_DIM", "32", dict(model_dim=32, num_heads=4, rope_dims=4)),
        ("NUM_HEADS", "3", dict(model_dim=48, num_heads=3, num_kv_heads=1)),
    ],
)
def test_an_explicit_setting_need_only_fit_the_artifact(name, text, changes):
    """The defaults it would not fit are replaced by the artifact's values."""
    merged = Config.from_env({name: text}, from_artifact(**changes))
    assert str(getattr(merged, name.lower())) == text
    with pytest.raises(ConfigError, match="EVAL_STRIDE=100 and EVAL_SEQ_LEN=64: targets between"):
        Config.from_env({"EVAL_STRIDE": "100"}, from_artifact())


@pytest.mark.parametrize(
    "environ,run_id",
    [
        ("", "nfm_7k_seed42"),
        ("PRESET=demo SEED=3", "demo_seed3"),
        ("SLURM_JOB_ID=77", "nfm_7k_seed42_77"),
        (
            "SLURM_JOB_ID=79 SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=2 SLURM_RESTART_COUNT=1",
            "nfm_7k_seed42_77_2",
        ),
        ("SLURM_JOB_ID=77 RUN_ID=mine", "mine"),
        ("RUN_ID=", "nfm_7k_seed42"),
    ],
)
def test_the_run_is_named_by_preset_seed_and_slurm_job(environ, run_id):
    config = Config.from_env(environ_of(environ))
    assert (config.run_id, config.run_dir) == (run_id, f"runs/{run_id}")
    assert Config.from_env(environ_of(environ, RUN_DIR="/a")).run_dir == "/a"
