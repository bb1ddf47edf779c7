"""Every published system is a preset: the settings of the reference, from text to score."""

import dataclasses
import math
import pydoc_data.topics
import sys

import pytest
import torch
from helpers import ROOT, TINY, events, preset_config, read_json, run_main

import train_gpt
from train_gpt import GPT, PRESETS, Config

# --------------------------------------------------------------------------------------------------
# The settings, by hand from docs/REFERENCE.md
# --------------------------------------------------------------------------------------------------
# §4, §5 and §7 give these once for all systems.
COMMON = dict(
    vocab_size=1024,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    rope_dims=16,
    rope_base=10000.0,
    logit_softcap=30.0,
    bigram_dim=128,
    qk_gain_init=1.5,
    embed_init_std=0.005,
    nfm_hidden_dim=256,
    nfm_loss_weight=0.1,
    flow_latent_dim=64,
    flow_hidden_dim=256,
    flow_init_scale=0.01,
    e2e_ttt_mini_batch=16,
    e2e_ttt_base_lr=1.0,
    train_batch_tokens=786_432,
    train_seq_len=2048,
    micro_batch_tokens=98_304,
    warmup_steps=20,
    matrix_lr=0.025,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_ns_steps=5,
    embed_lr=0.035,
    scalar_lr=0.025,
    beta1=0.9,
    beta2=0.95,
    adam_eps=1e-8,
    muon_wd=0.04,
    adam_wd=0.04,
    grad_clip_norm=0.3,
    ema_decay=0.997,
    swa_every=50,
    swa_start_scale=0.2,
    block_bits=6,
    zstd_level=16,
    lzma_preset=6,
    budget_bytes=16_000_000,
    dtype="bfloat16",
    eval_stride=64,
    ttt_lr=0.002,
    ttt_momentum=0.9,
    ttt_chunk_tokens=32_768,
    ttt_batch_seqs=32,
    ttt_grad_clip=1.0,
    slot_lr=0.003,
    slot_steps=5,
    # What only later records have is off.
    embed_dim=0,
    smear_enabled=True,
    smear_inputs=0,
    gate_inputs=0,
    num_loops=0,
    loop_start=3,
    loop_end=5,
    loop_at=0.35,
    skip_gates=False,
    parallel_last_n=0,
    shuffle=False,
    warmdown_frac=0.0,
    min_lr=0.0,
    muon_row_norm=False,
    embed_wd=-1.0,  # as ADAM_WD
    scalar_wd=-1.0,
    ema_full_steps=5000,  # shorter than any of their runs
    quantizer="lite",
    calibration_tokens=65_536,
)

COLUMNS = {
    "trunk": "num_layers mlp_mult gated_attention value_residual xsa_last_n bigram_vocab_size "
    "ve_dim ve_last_n",
    "refiners": "e2e_ttt_enabled flow_enabled nfm_enabled",
    "steps": "iterations warmdown_iters warmdown_shape max_wallclock_seconds swa_enabled "
    "late_qat_threshold",
    "packing": "embed_bits compressor",
    "scoring": "eval_seq_len ttt_enabled ttt_epochs ttt_freeze_blocks slot",
}
# Parts that several systems share.
TRUNK = (11, 3.0, True, True, 11, 4096, 0, 2)  # §4
STEPS_7K = (7000, 2800, "linear", 0.0, False, 0.0)
STEPS_20K = (20000, 12000, "cosine", 0.0, False, 0.0)  # §5
# §4 #1166: no gate, no value residual, XSA 4, Bigram 1536, VE128 on the last two layers, both
# refiners, SWA, QAT, lzma
TTT_LINEAR = [
    (True, True, False),
    (7185, 4311, "linear", 0.0, True, 0.15),
    (8, "lzma"),
    (2048, False, 10, 2, "off"),
]
SCORING = (2048, True, 10, 2, "off")  # §7 window 2048
TABLE = {
    # §3 the default; §4 trunk with NativeFlowMatcher; §6 embeddings int8, zstd; §7 window 1024, 10
    # epochs, 2 blocks frozen
    "nfm_7k": [TRUNK, (False, False, True), STEPS_7K, (8, "zstd"), (1024, True, 10, 2, "off")],
    # §3 its matched base: no NFM
    "base_7k": [TRUNK, (False, False, False), STEPS_7K, (8, "zstd"), SCORING],
    # §5 20,000 steps; §6 everything int6
    "base_20k": [TRUNK, (False, False, False), STEPS_20K, (6, "zstd"), SCORING],
    # §3 the same with FlowRefiner
    "flow_20k": [TRUNK, (False, True, False), STEPS_20K, (6, "zstd"), SCORING],
    "ttt_linear_10l": [(10, 3.0, False, False, 4, 1536, 128, 2), *TTT_LINEAR],
    # §3 its 11-layer variant
    "ttt_linear_11l": [(11, 3.0, False, False, 4, 1536, 128, 2), *TTT_LINEAR],
    # §4 #1150: MLP 2.8, XSA 4, VE128 on 9-10, EMA + SWA, lzma, 600 s cap, TTT of 3 epochs, nothing
    # frozen, SLOT; steps, warmdown and QAT are those of the #549 base
    "slot_11l": [
        (11, 2.8, False, False, 4, 1536, 128, 2),
        (False, False, False),
        (9000, 3500, "linear", 600.0, True, 0.15),
        (8, "lzma"),
        (2048, True, 3, 0, "causal"),
    ],
}
SYSTEMS = list(TABLE)
# The frontier's records have their own table in tests/test_records.py.
RECORDS = ["record_0405", "record_0409", "frontier_8192", "frontier_1024"]


def row_of(name):
    fields = " ".join(COLUMNS.values()).split()
    return dict(zip(fields, [value for part in TABLE[name] for value in part], strict=True))


def test_the_presets_are_the_published_systems_and_the_demo():
    assert set(PRESETS) == {*SYSTEMS, *RECORDS, "demo"}
    assert Config.from_env({}).preset == "nfm_7k" and PRESETS["nfm_7k"] == {}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_has_the_settings_of_the_reference(name):
    config, expected = preset_config(name).as_dict(), {**COMMON, **row_of(name)}
    assert {field: config[field] for field in expected} == expected


def test_the_tables_miss_no_setting_that_could_change_a_result():
    judged = {*COMMON, *row_of("nfm_7k"), "seed", "eval_batch_seqs"}
    assert judged >= set(Config().as_dict("arch", "train", "eval"))
    assert judged >= {field for name in SYSTEMS for field in PRESETS[name]}


def test_the_demo_has_every_feature_of_the_submission():
    demo, submission = preset_config("demo").as_dict(), preset_config("nfm_7k").as_dict()
    features = (
        "gated_attention",
        "value_residual",
        "nfm_enabled",
        "flow_enabled",
        "e2e_ttt_enabled",
        "ve_dim",
        "ema_decay",
        "swa_enabled",
        "compressor",
        "block_bits",
        "embed_bits",
        "ttt_enabled",
        "slot",
        "eval_stride",
    )
    assert [demo[f] for f in features] == [submission[f] for f in features]
    assert demo["xsa_last_n"] == demo["num_layers"]


# --------------------------------------------------------------------------------------------------
# The whole path at a reduced size
# --------------------------------------------------------------------------------------------------
# Wide enough that block matrices and the embedding are large ones (int6, int8), and a warmdown that
# ends below the thresholds of SWA and late QAT. What makes a preset itself is not in here.
FREE = {"xsa_last_n", "ttt_freeze_blocks", "nfm_hidden_dim"}
REDUCED = {name: value for name, value in TINY.items() if name not in FREE} | dict(
    ema_full_steps=1,  # average as in a long run
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
)
FILES = {
    "config.json",
    "manifest.json",
    "train.log",
    "metrics.jsonl",
    "final_model.pt",
    "final_model.int6.ptz",
    "scores.json",
}
# What a record has by layer, on the two layers of the reduced size; no cap, so that steps count.
REDUCED_RECORD = dict(loop_start=0, loop_end=1, max_wallclock_seconds=0.0)
LAST = {
    "record_0405": [],
    "ttt_linear_10l": [],
    "ttt_linear_11l": [],
    "slot_11l": ["legal_ttt_slot_causal"],
}


@pytest.fixture(scope="module", params=PRESETS)
def finished(request, tiny_data, tmp_path_factory):
    settings = {**tiny_data.settings, **REDUCED, "preset": request.param}
    if request.param == "ttt_linear_11l":
        settings.update(num_layers=3)  # its 10-layer sibling has 2
    if request.param in RECORDS:
        settings.update(REDUCED_RECORD)
        settings.update(parallel_last_n=min(1, PRESETS[request.param].get("parallel_last_n", 0)))
    run = run_main(tmp_path_factory.mktemp(request.param) / "run", **settings)
    assert run.code == 0, run.err
    return request.param, run


def test_a_preset_runs_from_text_to_its_scores(finished):
    name, run = finished
    last = LAST.get(name, ["legal_ttt"])
    assert list(run.scores()) == [
        "pre_quant",
        "final_int6_roundtrip",
        "final_int6_sliding_window",
        *last,
    ]
    result = read_json(run.dir / "scores.json")
    assert result["finished"] and result["preset"] == name and result["steps"] == 8
    assert {path.name for path in run.dir.iterdir()} >= FILES
    targets = read_json(run.dir / "manifest.json")["data"]["val_targets"]
    for score in run.scores().values():
        assert score["legal"] and math.isfinite(score["val_bpb"]) and score["tokens"] == targets


def test_a_preset_learns_in_a_few_steps(finished):
    losses = [event["train_loss"] for event in events(finished[1].dir, "step")]
    assert losses[-1] < losses[0] - 0.5


def test_a_preset_s_artifact_brings_the_trained_model_back(finished):
    name, run = finished
    config, state = train_gpt.unpack_artifact((run.dir / "final_model.int6.ptz").read_bytes())
    reference = read_json(run.dir / "config.json")["config"]
    assert config.as_dict("arch", "eval") == {
        f: reference[f] for f in config.as_dict("arch", "eval")
    }
    trained = train_gpt.load_weights(run.dir / "final_model.pt").state_dict
    assert trained.keys() == state.keys()
    for tensor, weight in trained.items():
        assert (weight - state[tensor]).norm() <= 0.06 * weight.norm(), tensor


def test_a_preset_says_how_it_packed_and_averaged(finished):
    name, run = finished
    lzma, swa = preset_config(name).compressor == "lzma", preset_config(name).swa_enabled
    assert any(
        line.startswith(f"Serialized model int6+{'lzma' if lzma else 'zstd'}: ")
        for line in run.lines
    )
    averaged = f"export:{'mean of 1 snapshots of the ' * swa}EMA weights (decay "
    assert any(line.startswith(averaged) for line in run.lines)


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_a_preset_receives_a_gradient(name):
    """A part that is computed and not used, or used behind a constant, would leave some without."""
    torch.manual_seed(1)
    changes = {**REDUCED, "dtype": "float32"}
    if name in RECORDS:
        changes.update(REDUCED_RECORD, parallel_last_n=1)
    model = GPT(preset_config(name, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # off the zeros that some start from
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(2, TINY["vocab_size"], (4, 65))
    model.train()(ids[:, :-1], ids[:, 1:]).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.fixture(scope="module")
def slot_run(tiny_data, tmp_path_factory):
    changes = dict(model_dim=32, preset="slot_11l", dtype="float32", ttt_enabled=False, slot="off")
    run = run_main(
        tmp_path_factory.mktemp("slot") / "run", **{**tiny_data.settings, **REDUCED, **changes}
    )
    assert run.code == 0, run.err
    return run


@pytest.mark.parametrize(
    "slot, ttt, label, legal",
    [
        ("off", True, "legal_ttt", True),
        ("causal", False, "slot_causal", True),
        ("causal", True, "legal_ttt_slot_causal", True),
        ("published", False, "illegal_slot_published", False),
        ("published", True, "illegal_ttt_slot_published", False),
    ],
)
def test_the_last_score_is_named_by_what_adapts_and_whether_that_is_legal(
    slot, ttt, label, legal, slot_run, tiny_data, tmp_path
):
    run = run_main(
        tmp_path / "run",
        eval_only=slot_run.dir / "final_model.int6.ptz",
        device="cpu",
        slot=slot,
        audit=False,
        ttt_enabled=ttt,
        data_path=tiny_data.data_path,
        tokenizer_path=tiny_data.tokenizer_path,
    )
    assert run.code == 0, run.err
    assert list(run.scores()) == ["final_int6_roundtrip", "final_int6_sliding_window", label]
    assert run.scores()[label]["legal"] is legal
    marked = [line.split()[0] for line in run.lines if line.endswith(" legality:illegal")]
    assert marked == ([] if legal else [label, f"{label}_exact"])


def test_without_adaptation_the_sliding_window_is_the_last_score(slot_run):
    assert list(slot_run.scores())[-1] == "final_int6_sliding_window"


# --------------------------------------------------------------------------------------------------
# The full size
# --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_full_size_preset_trains_and_fits_the_budget(name, capsys, monkeypatch):
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
    blob, int5 = train_gpt.fit_lite(config, model.state_dict(), code)
    with capsys.disabled():
        print(
            f"\n{name}: artifact {len(blob)} + code {code} = {len(blob) + code} bytes, "
            f"int5 {int5}, {losses}"
        )
    assert len(blob) + code <= config.budget_bytes
    assert train_gpt.unpack_artifact(blob)[0].as_dict("arch") == config.as_dict("arch")
