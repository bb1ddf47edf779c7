"""Where settings come from, what is refused, what the hash covers, and what an artifact brings
with it."""

import dataclasses

import pytest
from helpers import run_main, tiny_config

import train_gpt
from train_gpt import PRESETS, Config, ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
PLACE_AND_PACE = {
    "preset",
    "data_path",
    "tokenizer_path",
    "val_sha256",
    "run_id",
    "run_dir",
    "resume",
    "eval_only",
    "mode",
    "audit",
    "audit_seed",
    "spot_checks",
    "scores_file",
    "ttt_cuda_graph",
    "nproc",
    "code_bytes",
    "prompt",
    "sample_tokens",
    "temperature",
    "top_k",
    "device",
    "compile",
    "micro_batch_tokens",
    "warmup_steps",
    "train_log_every",
    "val_loss_every",
    "checkpoint_every",
    "checkpoint_seconds",
    "eval_checkpoint_seconds",
    "time_limit_seconds",
}


# docs/REFERENCE.md, sections 3 to 7, by hand: the submission that the defaults are.
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
        candidates = [dict(device="cpu", val_sha256="0" * 64).get(name, value + "other")]
    else:
        candidates = [value * 2, value / 2 if field.type is float else value // 2, value + 1]
    for candidate in candidates:
        if candidate != value:
            try:
                return Config(**{name: candidate})
            except ConfigError:
                continue
    raise AssertionError(f"no other value of {name} is allowed: {candidates}")


def test_an_empty_environment_gives_the_defaults():
    config = Config.from_env({})
    assert config.as_dict() == {
        **Config().as_dict(),
        "run_id": "nfm_7k_seed42",
        "run_dir": "runs/nfm_7k_seed42",
    }


def test_an_explicit_variable_beats_the_preset_and_the_preset_the_default():
    assert Config().eval_seq_len == 1024 and Config().iterations == 7000
    preset = Config.from_env({"PRESET": "base_20k"})
    assert (preset.eval_seq_len, preset.iterations, preset.nfm_enabled) == (2048, 20000, False)
    explicit = Config.from_env({"PRESET": "base_20k", "EVAL_SEQ_LEN": "1024", "NFM_ENABLED": "1"})
    assert (explicit.eval_seq_len, explicit.iterations, explicit.nfm_enabled) == (1024, 20000, True)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_defaults_but_for_its_differences(preset):
    config = Config.from_env({"PRESET": preset})
    expected = {
        **Config().as_dict(),
        **PRESETS[preset],
        "preset": preset,
        "run_id": f"{preset}_seed42",
        "run_dir": f"runs/{preset}_seed42",
    }
    assert config.as_dict() == expected
    assert config.differences() == {}


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("AUDIT", "1", True),
        ("AUDIT", "true", True),
        ("AUDIT", "True", True),
        ("NFM_ENABLED", "0", False),
        ("NFM_ENABLED", "false", False),
        ("NFM_ENABLED", "FALSE", False),
        ("ITERATIONS", "12", 12),
        ("MATRIX_LR", "1e-3", 1e-3),
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
    "name,text,expected",
    [
        ("AUDIT", "yes", "0, 1, true or false"),
        ("AUDIT", "", "0, 1, true or false"),
        ("AUDIT", "2", "0, 1, true or false"),
        ("ITERATIONS", "many", "expected int"),
        ("ITERATIONS", "7e3", "expected int"),
        ("ITERATIONS", "1.5", "expected int"),
        ("ITERATIONS", "", "expected int"),
        ("MATRIX_LR", "fast", "expected float"),
        ("MATRIX_LR", "nan", "expected a finite number"),
        ("MAX_WALLCLOCK_SECONDS", "inf", "expected a finite number"),
    ],
)
def test_a_value_that_does_not_parse_is_named_with_what_was_expected(name, text, expected):
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: text})
    message = str(error.value)
    assert message.startswith(f"{name}=") and text in message and expected in message


@pytest.mark.parametrize(
    "name,text",
    [
        ("SEED", "-1"),
        ("SEED", "2147483648"),
        ("NUM_LAYERS", "0"),
        ("VOCAB_SIZE", "65537"),
        ("MUON_MOMENTUM", "1.5"),
        ("BETA1", "1"),
        ("EMA_DECAY", "1"),
        ("MATRIX_LR", "-0.1"),
        ("EVAL_STRIDE", "0"),
        ("TTT_EPOCHS", "0"),
        ("ZSTD_LEVEL", "23"),
        ("BUDGET_BYTES", "0"),
        ("ITERATIONS", "-1"),
        ("EVAL_BATCH_SEQS", "0"),
        ("CHECKPOINT_SECONDS", "-1"),
        ("TRAIN_SEQ_LEN", "1"),
        ("ADAM_EPS", "0"),
        ("BIGRAM_VOCAB_SIZE", "-1"),
        ("LOGIT_SOFTCAP", "0"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_bounds(name, text):
    with pytest.raises(ConfigError, match=f"^{name}={text}.*: expected at least ") as error:
        Config.from_env({name: text})
    low = FIELDS[name.lower()].metadata["low"]
    assert str(low) in str(error.value)


@pytest.mark.parametrize(
    "name,text",
    [
        ("BLOCK_BITS", "7"),
        ("COMPRESSOR", "gzip"),
        ("SLOT", "on"),
        ("RESUME", "maybe"),
        ("MODE", "eval"),
        ("DTYPE", "float16"),
        ("COMPILE", "yes"),
        ("WARMDOWN_SHAPE", "Linear"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_those_that_do(name, text):
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: text})
    choices = ", ".join(map(str, FIELDS[name.lower()].metadata["choices"]))
    assert str(error.value).startswith(f"{name}=") and str(error.value).endswith(
        f"expected one of {choices}"
    )


@pytest.mark.parametrize(
    "settings,named",
    [
        (dict(NUM_HEADS="7"), ["MODEL_DIM=512", "NUM_HEADS=7"]),
        (dict(NUM_KV_HEADS="3"), ["NUM_HEADS=8", "NUM_KV_HEADS=3"]),
        (dict(NUM_KV_HEADS="16"), ["NUM_HEADS=8", "NUM_KV_HEADS=16"]),
        (dict(ROPE_DIMS="15"), ["ROPE_DIMS=15", "64"]),
        (dict(ROPE_DIMS="66"), ["ROPE_DIMS=66", "64"]),
        (dict(MODEL_DIM="16", NUM_HEADS="1", NUM_KV_HEADS="1", MLP_MULT="0.25"), ["MLP_MULT=0.25"]),
        (dict(TRAIN_BATCH_TOKENS="786433"), ["TRAIN_BATCH_TOKENS=786433", "TRAIN_SEQ_LEN=2048"]),
        (dict(MICRO_BATCH_TOKENS="2047"), ["MICRO_BATCH_TOKENS=2047", "TRAIN_SEQ_LEN=2048"]),
        (dict(EVAL_STRIDE="1025"), ["EVAL_STRIDE=1025", "EVAL_SEQ_LEN=1024"]),
        (dict(TTT_CHUNK_TOKENS="32769"), ["TTT_CHUNK_TOKENS=32769", "EVAL_SEQ_LEN=1024"]),
        (dict(TTT_FREEZE_BLOCKS="12"), ["TTT_FREEZE_BLOCKS=12", "NUM_LAYERS=11"]),
        (
            dict(VE_DIM="8", NUM_LAYERS="2", VE_LAST_N="3", TTT_FREEZE_BLOCKS="0"),
            ["VE_LAST_N=3", "NUM_LAYERS=2"],
        ),
        (dict(SLOT="causal", EVAL_STRIDE="1024"), ["SLOT='causal'", "EVAL_STRIDE=1024"]),
        (dict(SLOT="published", EVAL_STRIDE="1024"), ["SLOT='published'", "EVAL_STRIDE=1024"]),
        (dict(QK_GAIN_INIT="0"), ["QK_GAIN_INIT=0.0", "as published"]),
        (dict(EMBED_WD="-0.5"), ["EMBED_WD=-0.5", "-1 for ADAM_WD"]),
        (dict(SCALAR_WD="-0.01"), ["SCALAR_WD=-0.01", "-1 for ADAM_WD"]),
        (
            dict(LATE_QAT_THRESHOLD="0.15", MIN_LR="0.15"),
            ["LATE_QAT_THRESHOLD=0.15", "MIN_LR=0.15", "never begin"],
        ),
        (dict(DEVICE="gpu"), ["DEVICE='gpu'", "auto, cpu, cuda or cuda:N"]),
        (dict(PRESET="nfm7k"), ["PRESET='nfm7k'", *PRESETS]),
    ],
)
def test_settings_that_do_not_fit_together_are_named_with_their_values(settings, named):
    with pytest.raises(ConfigError) as error:
        Config.from_env(settings)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize(
    "misspelt,meant",
    [
        ("ITERATONS", "ITERATIONS"),
        ("SEEDS", "SEED"),
        ("DATAPATH", "DATA_PATH"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("TTT_ENABLE", "TTT_ENABLED"),
        ("PRSET", "PRESET"),
        ("EVALONLY", "EVAL_ONLY"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("iterations", "ITERATIONS"),
        ("Train_Seq_Len", "TRAIN_SEQ_LEN"),
    ],
)
def test_a_misspelt_variable_is_an_error_that_names_the_one_meant(misspelt, meant):
    with pytest.raises(ConfigError) as error:
        Config.from_env({misspelt: "123"})
    assert f"{misspelt}='123'" in str(error.value) and f"like {meant}:" in str(error.value)


def test_the_variables_of_ordinary_machines_are_no_near_misses():
    names = [
        "PATH",
        "HOME",
        "LANG",
        "USER",
        "LOGNAME",
        "SHELL",
        "TERM",
        "PWD",
        "OLDPWD",
        "TMPDIR",
        "EDITOR",
        "PAGER",
        "DISPLAY",
        "HOSTNAME",
        "MAIL",
        "SHLVL",
        "COLUMNS",
        "LINES",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "CONDA_DEFAULT_ENV",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "HF_HOME",
        "TOKENIZERS_PARALLELISM",
        "TORCH_HOME",
        "TORCH_LOGS",
        "WANDB_MODE",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_NAME",
        "SLURM_NODEID",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_JOB_END_TIME",
        "SLURM_SUBMIT_DIR",
        "XDG_RUNTIME_DIR",
        "XDG_DATA_DIRS",
        "SSH_CLIENT",
        "LS_COLORS",
        "MODULEPATH",
        "MODULESHOME",
        "DEBUG",
        "CI",
        "DATASET",
        "DATA_DIR",
        "NSLOTS",
    ]
    assert Config.from_env(dict.fromkeys(names, "1")) == Config.from_env({})


def test_help_lists_every_variable_with_its_meaning_default_and_presets(tmp_path):
    """Even where the environment is wrong: help is for those who are stuck."""
    text = run_main(cwd=tmp_path, arguments=["--help"], preset="no such preset").out
    entries = {}
    variables, published = text.split("Variables", 1)[1].split("\n\nPublished names", 1)
    assert all(f"\n  {name}\n" in published for name in train_gpt.PUBLISHED)
    for line in variables.splitlines()[1:]:
        if not line.startswith("   "):
            name = line.strip().split("=")[0]
            entries[name] = line
        else:
            entries[name] += line
    assert list(entries) == [name.upper() for name in FIELDS]
    for name, field in FIELDS.items():
        entry = entries[name.upper()]
        assert (
            entry.startswith(f"  {name.upper()}={field.default} ")
            and field.metadata["text"] in entry
        )
        assert len(field.metadata["text"]) > 5
        for preset, values in PRESETS.items():
            assert (f"[{preset}={values.get(name)}]" in entry) == (name in values)
        for choice in field.metadata["choices"] or ():
            assert str(choice) in entry
    assert all(preset in entries["PRESET"] for preset in PRESETS)


def test_printing_the_configuration_gives_an_environment_that_resolves_to_it(tmp_path):
    environ = dict(
        PRESET="slot_11l", SEED="7", NFM_ENABLED="1", MATRIX_LR="1e-3", SLURM_JOB_ID="12"
    )
    text = run_main(cwd=tmp_path, arguments=["--print-config"], **environ).out
    printed = dict(line.split("=", 1) for line in text.splitlines())
    assert list(printed) == [name.upper() for name in FIELDS]
    assert Config.from_env(printed) == Config.from_env(environ)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_covers_what_changes_a_result_and_nothing_else():
    hashes = {name: other_value(name).hash() for name in FIELDS}
    base = Config().hash()
    assert {name for name, value in hashes.items() if value == base} == PLACE_AND_PACE
    changing = [value for name, value in hashes.items() if name not in PLACE_AND_PACE]
    assert len(set(changing)) == len(changing)
    assert len(base) == 16 and int(base, 16) >= 0


def test_the_hash_does_not_depend_on_how_a_value_was_given():
    demo = Config.from_env({"PRESET": "demo"})
    spelled_out = {name.upper(): str(value) for name, value in PRESETS["demo"].items()}
    assert Config.from_env(spelled_out).hash() == demo.hash() != Config().hash()


def test_differences_are_what_the_user_changed_from_the_preset():
    """A variable that repeats the preset's value changes nothing; a run's name is no setting."""
    assert PRESETS["base_20k"]["eval_seq_len"] == 2048
    config = Config.from_env(
        {
            "PRESET": "base_20k",
            "SEED": "7",
            "EVAL_SEQ_LEN": "2048",
            "WARMUP_STEPS": "3",
            "RUN_ID": "mine",
        }
    )
    assert config.differences() == {"seed": 7, "warmup_steps": 3}


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@pytest.mark.parametrize("value", ["11", 11.0, True, None])
def test_a_value_of_the_wrong_type_is_refused(value):
    with pytest.raises(ConfigError, match="NUM_LAYERS.*expected int"):
        Config(num_layers=value)


def brought_by(config):
    """What an artifact of `config` brings into a run that scores it."""
    loaded = train_gpt.LoadedWeights(config, {}, "", {}, "0123456789abcdef")
    return loaded.from_artifact()


def test_an_artifact_brings_its_architecture_and_evaluation():
    artifact = tiny_config(eval_stride=32, ttt_lr=0.5)
    environ = {"SEED": "5", "MICRO_BATCH_TOKENS": "4096", "DATA_PATH": "/somewhere"}
    own, merged = Config.from_env(environ), Config.from_env(environ, brought_by(artifact))
    assert merged.as_dict("arch", "eval") == artifact.as_dict("arch", "eval")
    expected = {
        **own.as_dict("train", "run"),
        "run_id": merged.run_id,
        "run_dir": merged.run_dir,
        "audit": True,
    }  # a file of others is not believed
    assert merged.as_dict("train", "run") == expected


def test_an_explicit_evaluation_setting_beats_the_artifacts():
    artifact = tiny_config(eval_stride=32, ttt_lr=0.5)
    merged = Config.from_env({"EVAL_STRIDE": "16", "TTT_ENABLED": "0"}, brought_by(artifact))
    assert (merged.eval_stride, merged.ttt_enabled, merged.ttt_lr) == (16, False, 0.5)
    assert merged.eval_seq_len == 64


def test_an_explicit_architecture_must_be_the_artifacts():
    brought = brought_by(tiny_config())
    assert Config.from_env({"NUM_LAYERS": "3"}, brought).num_layers == 3
    with pytest.raises(
        ConfigError, match=r"NUM_LAYERS=4 contradicts the artifact, which has 3: unset NUM_LAYERS"
    ):
        Config.from_env({"NUM_LAYERS": "4"}, brought)


def test_a_preset_does_not_contradict_an_artifact():
    merged = Config.from_env({"PRESET": "slot_11l"}, brought_by(tiny_config()))
    assert merged.num_layers == 3 and merged.preset == "slot_11l"


@pytest.mark.parametrize(
    "settings,changes",
    [
        (dict(EVAL_STRIDE="2048"), dict(eval_seq_len=2048, ttt_chunk_tokens=4096)),
        (dict(TTT_CHUNK_TOKENS="192"), dict(eval_seq_len=64)),
        (dict(MODEL_DIM="32"), dict(model_dim=32, num_heads=4, rope_dims=4)),
        (dict(NUM_HEADS="3"), dict(model_dim=48, num_heads=3, num_kv_heads=1)),
    ],
)
def test_an_explicit_setting_need_only_fit_the_artifact(settings, changes):
    """The defaults it would not fit are replaced by the artifact's values."""
    merged = Config.from_env(settings, brought_by(tiny_config(**changes)))
    assert {name: str(getattr(merged, name.lower())) for name in settings} == settings


def test_settings_that_do_not_fit_the_artifact_are_refused():
    with pytest.raises(ConfigError, match="EVAL_STRIDE=100 and EVAL_SEQ_LEN=64: targets between"):
        Config.from_env({"EVAL_STRIDE": "100"}, brought_by(tiny_config()))


@pytest.mark.parametrize(
    "environ,run_id",
    [
        ({}, "nfm_7k_seed42"),
        ({"PRESET": "demo", "SEED": "3"}, "demo_seed3"),
        ({"SLURM_JOB_ID": "77"}, "nfm_7k_seed42_77"),
        (
            {"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2"},
            "nfm_7k_seed42_77_2",
        ),
        (
            {"SLURM_JOB_ID": "79", "SLURM_RESTART_COUNT": "1", "SLURM_NODEID": "3"},
            "nfm_7k_seed42_79",
        ),
        ({"SLURM_JOB_ID": "77", "RUN_ID": "mine"}, "mine"),
        ({"RUN_ID": ""}, "nfm_7k_seed42"),
    ],
)
def test_the_run_is_named_by_preset_seed_and_slurm_job(environ, run_id):
    config = Config.from_env(environ)
    assert (config.run_id, config.run_dir) == (run_id, f"runs/{run_id}")


def test_an_evaluation_is_named_by_the_file_it_scores():
    config = Config.from_env({"SLURM_JOB_ID": "9", "SEED": "3"}, brought_by(tiny_config()))
    assert (config.run_id, config.run_dir) == ("eval_01234567_9", "runs/eval_01234567_9")


def test_a_named_directory_is_used_as_it_is():
    config = Config.from_env({"RUN_DIR": "/elsewhere/run", "RUN_ID": "x"})
    assert (config.run_id, config.run_dir) == ("x", "/elsewhere/run")
