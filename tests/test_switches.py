"""Every setting acts: a flip of each field of Config shows in what is computed, written or said."""

import dataclasses
import hashlib
import re
from unittest import mock

import pytest
import torch
from helpers import events, random_model, run_main

import train_gpt
from train_gpt import Config


def flip(look, to, **given):
    """`look` differs when a field becomes `to`, with the settings `given` on both sides."""
    return look, to, given


class Lab:
    """Tiny data, settings and weights that all looks share; looks without a flip are kept."""

    def __init__(self, data, folder):
        self.folder, self.folders, self.seen, self.finished = folder, 0, {}, {}
        changes = dict(dtype="float32", ttt_enabled=False, eval_stride=32)
        self.base = {**data.settings, **changes}
        # An artifact for the looks that train nothing.
        run = self.good_run(self.settings(iterations=1))
        self.artifact = str(run.dir / "final_model.int6.ptz")

    def fresh_folder(self):
        self.folders += 1
        folder = self.folder / str(self.folders)
        folder.mkdir()
        return folder

    def settings(self, **changes):
        return {**self.base, **{k: v(self) if callable(v) else v for k, v in changes.items()}}

    def before(self, look, given):
        key = look, str(given)
        if key not in self.seen:
            self.seen[key] = look(self, self.settings(**given))
        return self.seen[key]

    def run(self, settings):
        """A whole run without torch.compile; one for all looks with the same settings."""
        key = str(settings)
        if key not in self.finished:
            with mock.patch.object(torch, "compile", side_effect=lambda function, **_: function):
                self.finished[key] = run_main(self.fresh_folder() / "run", **settings)
        return self.finished[key]

    def good_run(self, settings):
        run = self.run(settings)
        assert run.code == 0, run.err
        return run

    def forget(self):
        self.finished.clear()


@pytest.fixture(scope="module")
def lab(tiny_data, tmp_path_factory):
    return Lab(tiny_data, tmp_path_factory.mktemp("switches"))


# --------------------------------------------------------------------------------------------------
# Looks: each takes the lab and all settings and returns something that can be compared
# --------------------------------------------------------------------------------------------------
def digest(state):
    return {name: hashlib.sha256(value.numpy()).hexdigest() for name, value in state.items()}


def open_run(lab, settings):
    config = Config(**{**settings, "run_dir": str(lab.fresh_folder() / "run")})
    val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    return config, train_gpt.Runtime(config, {}), val


def defaults(lab, settings):
    return Config.from_env({"PRESET": settings.get("preset", "nfm_7k")}).as_dict("arch", "eval")


def parameters(lab, settings):
    """Names and sizes of the parameters."""
    return {name: p.numel() for name, p in train_gpt.GPT(Config(**settings)).named_parameters()}


def logits(lab, settings):
    """The model's output on fixed tokens with fixed weights."""
    model = random_model(Config(**settings), spread=0.3).eval()
    ids = torch.randint(2, 384, (2, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return digest({"logits": model.logits(model.hidden(ids))})


def trained(lab, settings):
    """Steps made and weights exported by a training run."""
    config, runtime, val = open_run(lab, settings)
    train_gpt.train(config, runtime, val, runtime.dir / "final_model.pt")
    runtime.close()
    steps = [event["steps"] for event in events(runtime.dir, "trained")]
    return steps, digest(train_gpt.load_weights(runtime.dir / "final_model.pt").state_dict)


def packed(lab, settings):
    """The artifact's bytes, of weights that are large enough to be quantised."""
    config = Config(**settings)
    blob = train_gpt.pack_artifact(config, random_model(config, spread=0.3).state_dict())
    return hashlib.sha256(blob).hexdigest()


def run_artifact(lab, settings):
    """The artifact of a whole run."""
    artifact = lab.good_run(settings).dir / "final_model.int6.ptz"
    return hashlib.sha256(artifact.read_bytes()).hexdigest()


def dropped_to_int5(lab, settings):
    config = Config(**settings)
    try:
        return train_gpt.fit_lite(config, random_model(config, spread=0.3).state_dict(), 0)[1]
    except train_gpt.ArtifactError as error:
        return str(error)


def scored(lab, settings):
    """The score of fixed weights, by TTT or SLOT where they are configured."""
    config, runtime, val = open_run(lab, settings)
    model = random_model(config, spread=0.3)
    by = dict(ttt=config.ttt_enabled, slot=config.slot)
    result = train_gpt.evaluate(model, val, config, runtime, **by)
    runtime.close()
    return result.val_loss, result.tokens


def batches(lab, settings):
    """Windows in each batch that reaches the model."""
    config, runtime, val = open_run(lab, settings)
    model, sizes = random_model(config, spread=0.3), []
    hidden = model.hidden
    model.hidden = lambda ids, *last: (sizes.append(len(ids)), hidden(ids, *last))[1]
    train_gpt.evaluate(model, val, config, runtime)
    runtime.close()
    return sizes


def compilations(lab, settings):
    """Calls of torch.compile during an evaluation."""
    replaced = mock.patch.object(torch, "compile", side_effect=lambda function, **_: function)
    with replaced as compiler:
        scored(lab, settings)
    return compiler.call_count > 0


def device(lab, settings):
    """The device that is used, or why it cannot be."""
    try:
        return str(open_run(lab, settings)[1].device)
    except train_gpt.ConfigError as error:
        return str(error)


def ended(lab, settings):
    """Exit code and error message of a whole run."""
    result = lab.run(settings)
    return result.code, result.err


def labels(lab, settings):
    """The scores of a whole run."""
    return list(lab.good_run(settings).scores())


def files(lab, settings):
    """The files of a whole run."""
    folder = lab.good_run(settings).dir
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def directory(lab, settings):
    """Where a run leaves its log, relative to where it was started."""
    folder = lab.fresh_folder()
    result = run_main(cwd=folder, **{"run_dir": "", **settings})
    assert result.code == 0, result.err
    return [str(path.relative_to(folder)) for path in folder.rglob("train.log")]


def sampled(lab, settings):
    """The text that MODE=sample prints."""
    return lab.good_run(settings).out


def lines(pattern):
    """The log lines of a whole run, as far as they match."""

    def log_lines(lab, settings):
        return re.findall(f"^{pattern}", lab.good_run(settings).out, re.M)

    return log_lines


STEPS = lines(r"step:\d+/\d+ train_loss")
VALIDATIONS = lines(r"step:\d+/\d+ val_loss")
CHECKPOINTS = lines(r"checkpoint_saved step:\d+")
WIDE = dict(model_dim=176, num_layers=1)  # its matrices are large enough for intN
SWA = dict(swa_enabled=True, swa_every=1, iterations=12, warmdown_iters=12)
TTT = dict(ttt_enabled=True)
TTT_LINEAR = dict(e2e_ttt_enabled=True)
LOOPS = dict(num_loops=1, loop_start=1, loop_end=1)
ARTIFACT = dict(eval_only=lambda lab: lab.artifact, audit=False)
SAMPLE = dict(ARTIFACT, mode="sample", sample_tokens=20)

FLIPS = dict(
    preset=flip(defaults, "base_7k"),
    # architecture
    vocab_size=flip(parameters, 320),
    num_layers=flip(parameters, 4),
    model_dim=flip(parameters, 64),
    num_heads=flip(parameters, 2),
    num_kv_heads=flip(parameters, 1),
    mlp_mult=flip(parameters, 2.0),
    rope_dims=flip(logits, 8),
    rope_base=flip(logits, 100.0),
    logit_softcap=flip(logits, 5.0),
    bigram_vocab_size=flip(parameters, 32),
    bigram_dim=flip(parameters, 8),
    embed_dim=flip(parameters, 16),
    smear_enabled=flip(parameters, False),
    smear_inputs=flip(parameters, 4),
    gate_inputs=flip(parameters, 4),
    num_loops=flip(logits, 2, loop_start=1, loop_end=1),
    loop_start=flip(logits, 0, **LOOPS),
    loop_end=flip(logits, 2, **LOOPS),
    skip_gates=flip(parameters, True),
    parallel_last_n=flip(logits, 2),
    ve_dim=flip(parameters, 8),
    ve_last_n=flip(parameters, 1, ve_dim=8),
    xsa_last_n=flip(logits, 3),
    gated_attention=flip(parameters, False),
    value_residual=flip(parameters, False),
    e2e_ttt_enabled=flip(parameters, True),
    e2e_ttt_mini_batch=flip(logits, 4, **TTT_LINEAR),
    e2e_ttt_base_lr=flip(logits, 0.5, **TTT_LINEAR),
    flow_enabled=flip(parameters, True),
    flow_latent_dim=flip(parameters, 8, flow_enabled=True),
    flow_hidden_dim=flip(parameters, 8, flow_enabled=True),
    nfm_enabled=flip(parameters, False),
    nfm_hidden_dim=flip(parameters, 8),
    # training
    seed=flip(trained, 7, iterations=0),
    iterations=flip(trained, 3),
    train_batch_tokens=flip(trained, 256),
    train_seq_len=flip(trained, 32),
    shuffle=flip(trained, True),
    warmdown_iters=flip(trained, 5),
    warmdown_frac=flip(trained, 0.9),
    min_lr=flip(trained, 0.5),
    warmdown_shape=flip(trained, "cosine"),
    max_wallclock_seconds=flip(trained, 1e-6),
    gptq_reserve_seconds=flip(trained, 999.999999, max_wallclock_seconds=1000.0, quantizer="gptq"),
    embed_lr=flip(trained, 0.01),
    scalar_lr=flip(trained, 0.01),
    matrix_lr=flip(trained, 0.01),
    muon_momentum=flip(trained, 0.5, muon_momentum_warmup_steps=2),
    muon_momentum_warmup_start=flip(trained, 0.5, muon_momentum_warmup_steps=2),
    muon_momentum_warmup_steps=flip(trained, 2),
    muon_ns_steps=flip(trained, 2),
    muon_wd=flip(trained, 0.0),
    muon_row_norm=flip(trained, True),
    adam_wd=flip(trained, 0.0),
    embed_wd=flip(trained, 0.0),
    scalar_wd=flip(trained, 0.0),
    beta1=flip(trained, 0.5),
    beta2=flip(trained, 0.5),
    adam_eps=flip(trained, 1e-2),
    grad_clip_norm=flip(trained, 0.0),
    qk_gain_init=flip(trained, 1.0, iterations=0),
    embed_init_std=flip(trained, 0.02, iterations=0),
    nfm_loss_weight=flip(trained, 0.0),
    ema_decay=flip(trained, 0.2),
    swa_enabled=flip(trained, True, **{**SWA, "swa_enabled": False}),
    swa_every=flip(trained, 2, **SWA),
    loop_at=flip(trained, 0.9, **LOOPS),
    late_qat_threshold=flip(trained, 0.9, warmdown_iters=6, **WIDE),
    # packing
    quantizer=flip(run_artifact, "gptq"),
    calibration_tokens=flip(run_artifact, 256, quantizer="gptq"),
    block_bits=flip(packed, 5, **WIDE),
    embed_bits=flip(packed, 6, model_dim=256, num_layers=1),
    compressor=flip(packed, "lzma"),
    zstd_level=flip(packed, 1, **WIDE),
    budget_bytes=flip(dropped_to_int5, 160_000, **WIDE),
    code_bytes=flip(lines("Code size: .*"), 123_456),
    # evaluation
    dtype=flip(scored, "bfloat16"),
    eval_seq_len=flip(scored, 32),
    eval_stride=flip(scored, 64),
    eval_batch_seqs=flip(batches, 8),
    ttt_enabled=flip(labels, True, **ARTIFACT),
    ttt_lr=flip(scored, 0.02, **TTT),
    ttt_momentum=flip(scored, 0.0, **TTT),
    ttt_epochs=flip(scored, 2, **TTT),
    ttt_chunk_tokens=flip(scored, 512, **TTT),
    ttt_batch_seqs=flip(scored, 4, **TTT),
    ttt_freeze_blocks=flip(scored, 3, **TTT),
    ttt_grad_clip=flip(scored, 1e-3, **TTT),
    slot=flip(scored, "causal"),
    slot_lr=flip(scored, 0.1, slot="causal"),
    slot_steps=flip(scored, 1, slot="causal"),
    # place and pace
    data_path=flip(ended, "no/such/folder"),
    tokenizer_path=flip(ended, "no/such/file"),
    run_id=flip(directory, "mine", run_dir="", **ARTIFACT),
    run_dir=flip(directory, "there/run", **ARTIFACT),
    eval_only=flip(labels, ARTIFACT["eval_only"], iterations=1, audit=False),
    mode=flip(files, "audit", **ARTIFACT),
    audit=flip(files, True, **ARTIFACT),
    audit_seed=flip(lines("spot_checks .*"), 7, **ARTIFACT),
    spot_checks=flip(lines("spot_checks .*"), 0.5, **ARTIFACT),
    scores_file=flip(files, "run/{label}.f32", **ARTIFACT),
    prompt=flip(sampled, "A list", **SAMPLE),
    sample_tokens=flip(sampled, 4, **SAMPLE),
    temperature=flip(sampled, 0.0, **SAMPLE),
    top_k=flip(sampled, 1, **SAMPLE),
    device=flip(device, "cuda"),
    compile=flip(compilations, "1"),
    micro_batch_tokens=flip(lines("world_size:.*"), 128),
    warmup_steps=flip(lines("warmup_steps:.*"), 2, compile="1"),
    train_log_every=flip(STEPS, 4, iterations=8),
    val_loss_every=flip(VALIDATIONS, 2),
    checkpoint_every=flip(CHECKPOINTS, 2),
    checkpoint_seconds=flip(CHECKPOINTS, 1e-6),
    time_limit_seconds=flip(ended, 1e-3),
)


FIELDS = {field.name: field.default for field in dataclasses.fields(Config)}
FIRST_USE = {look.__name__: (look, given) for look, _, given in reversed(FLIPS.values())}


def test_every_field_of_config_is_flipped():
    assert sorted(FLIPS) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_switch_does_something(name, lab):
    look, to, given = FLIPS[name]
    before, after = lab.settings(**given), lab.settings(**{**given, name: to})
    assert after[name] != before.get(name, FIELDS[name]), "this is no flip"
    assert look(lab, after) != lab.before(look, given)


@pytest.mark.parametrize("name", FIRST_USE)
def test_without_a_flip_nothing_changes(name, lab):
    """Otherwise chance, and not the switch, could have made the difference."""
    look, given = FIRST_USE[name]
    before = lab.before(look, given)
    lab.forget()
    assert look(lab, lab.settings(**given)) == before
