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


@dataclasses.dataclass(frozen=True)
class Flip:
    """`look` differs when a field becomes `to`, with the settings `given` on both sides."""

    says: str
    look: object
    to: object
    given: dict


def flip(says, look, to, **given):
    return Flip(says, look, to, given)


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


def score(lab, settings, **options):
    config, runtime, val = open_run(lab, settings)
    result = train_gpt.evaluate(random_model(config, spread=0.3), val, config, runtime, **options)
    runtime.close()
    return result.val_loss, result.tokens


def scored(lab, settings):
    """Sliding-window score of fixed weights."""
    return score(lab, settings)


def adapted_score(lab, settings):
    """The score with test-time training."""
    return score(lab, settings, ttt=True)


def slot_score(lab, settings):
    """The score with the configured SLOT."""
    return score(lab, settings, slot=settings.get("slot", "off"))


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
        score(lab, settings)
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
TTT_LINEAR = dict(e2e_ttt_enabled=True)
LOOPS = dict(num_loops=1, loop_start=1, loop_end=1)
ARTIFACT = dict(eval_only=lambda lab: lab.artifact, audit=False)
SAMPLE = dict(ARTIFACT, mode="sample", sample_tokens=20)

FLIPS = dict(
    preset=flip("the defaults of other settings", defaults, "base_7k"),
    # architecture
    vocab_size=flip("the rows of the embedding", parameters, 320),
    num_layers=flip("the blocks", parameters, 4),
    model_dim=flip("the width of all matrices", parameters, 64),
    num_heads=flip("the gains and gates per head", parameters, 2),
    num_kv_heads=flip("the width of keys and values", parameters, 1),
    mlp_mult=flip("the MLP's hidden width", parameters, 2.0),
    rope_dims=flip("which dimensions are rotated", logits, 8),
    rope_base=flip("the rotation's frequencies", logits, 100.0),
    logit_softcap=flip("the bound of the logits", logits, 5.0),
    bigram_vocab_size=flip("the rows of the bigram table", parameters, 32),
    bigram_dim=flip("the width of the bigram table", parameters, 8),
    embed_dim=flip("the columns of the embedding", parameters, 16),
    smear_enabled=flip("the smear gate disappears", parameters, False),
    smear_inputs=flip("the smear gate reads its token", parameters, 4),
    gate_inputs=flip("the columns of the attention gates", parameters, 4),
    num_loops=flip("how often the looped layers run", logits, 2, loop_start=1, loop_end=1),
    loop_start=flip("which layers are looped", logits, 0, **LOOPS),
    loop_end=flip("which layers are looped", logits, 2, **LOOPS),
    skip_gates=flip("the gates appear", parameters, True),
    parallel_last_n=flip("what the MLPs read", logits, 2),
    ve_dim=flip("the value embedding appears", parameters, 8),
    ve_last_n=flip("a scale per layer that receives it", parameters, 1, ve_dim=8),
    xsa_last_n=flip("the attention's output", logits, 3),
    gated_attention=flip("the gates disappear", parameters, False),
    value_residual=flip("the mixing scalars disappear", parameters, False),
    e2e_ttt_enabled=flip("TTT-Linear appears", parameters, True),
    e2e_ttt_mini_batch=flip("where the inner gradients are taken", logits, 4, **TTT_LINEAR),
    e2e_ttt_base_lr=flip("the inner steps", logits, 0.5, **TTT_LINEAR),
    flow_enabled=flip("FlowRefiner appears", parameters, True),
    flow_latent_dim=flip("its latent width", parameters, 8, flow_enabled=True),
    flow_hidden_dim=flip("its hidden width", parameters, 8, flow_enabled=True),
    nfm_enabled=flip("NativeFlowMatcher disappears", parameters, False),
    nfm_hidden_dim=flip("its hidden width", parameters, 8),
    # training
    seed=flip("the initial weights", trained, 7, iterations=0),
    iterations=flip("the number of steps", trained, 3),
    train_batch_tokens=flip("the tokens of a step", trained, 256),
    train_seq_len=flip("the context in training", trained, 32),
    shuffle=flip("the order of the sequences", trained, True),
    warmdown_iters=flip("the rates of the last steps", trained, 5),
    warmdown_frac=flip("the rates of the last steps", trained, 0.9),
    min_lr=flip("the rates of the last steps", trained, 0.5),
    warmdown_shape=flip("the rates of the last steps", trained, "cosine"),
    max_wallclock_seconds=flip("training ends early", trained, 1e-6),
    gptq_reserve_seconds=flip(
        "training ends earlier", trained, 999.999999, max_wallclock_seconds=1000.0, quantizer="gptq"
    ),
    embed_lr=flip("the steps of embeddings", trained, 0.01),
    scalar_lr=flip("the steps of gains and gates", trained, 0.01),
    matrix_lr=flip("the steps of matrices", trained, 0.01),
    muon_momentum=flip(
        "the momentum after its warm-up", trained, 0.5, muon_momentum_warmup_steps=2
    ),
    muon_momentum_warmup_start=flip(
        "the momentum before", trained, 0.5, muon_momentum_warmup_steps=2
    ),
    muon_momentum_warmup_steps=flip("the momentum in between", trained, 2),
    muon_ns_steps=flip("how orthogonal an update is", trained, 2),
    muon_wd=flip("the shrinking of the blocks' matrices", trained, 0.0),
    muon_row_norm=flip("the rows' share of an update", trained, True),
    adam_wd=flip("the shrinking of the rest", trained, 0.0),
    embed_wd=flip("the shrinking of the embeddings", trained, 0.0),
    scalar_wd=flip("the shrinking of gains and gates", trained, 0.0),
    beta1=flip("AdamW's first moment", trained, 0.5),
    beta2=flip("AdamW's second moment", trained, 0.5),
    adam_eps=flip("AdamW's divisor", trained, 1e-2),
    grad_clip_norm=flip("the size of gradients", trained, 0.0),
    qk_gain_init=flip("the initial query gains", trained, 1.0, iterations=0),
    embed_init_std=flip("the initial embedding", trained, 0.02, iterations=0),
    nfm_loss_weight=flip("the weight of the flow-matching gradient", trained, 0.0),
    ema_decay=flip("the exported average", trained, 0.2),
    swa_enabled=flip("the exported average", trained, True, **{**SWA, "swa_enabled": False}),
    swa_every=flip("which steps are in it", trained, 2, **SWA),
    loop_at=flip("the step at which layers are looped", trained, 0.9, **LOOPS),
    late_qat_threshold=flip(
        "the rounding under the last gradients", trained, 0.9, warmdown_iters=6, **WIDE
    ),
    # packing
    quantizer=flip("the artifact", run_artifact, "gptq"),
    calibration_tokens=flip("the artifact", run_artifact, 256, quantizer="gptq"),
    block_bits=flip("the grid of block matrices", packed, 5, **WIDE),
    embed_bits=flip("the grid of the embedding", packed, 6, model_dim=256, num_layers=1),
    compressor=flip("the payload", packed, "lzma"),
    zstd_level=flip("how far zstd goes", packed, 1, **WIDE),
    budget_bytes=flip("MLPs drop to int5", dropped_to_int5, 160_000, **WIDE),
    code_bytes=flip("the bytes that are left for the model", lines("Code size: .*"), 123_456),
    # evaluation
    dtype=flip("the arithmetic", scored, "bfloat16"),
    eval_seq_len=flip("the context of a target", scored, 32),
    eval_stride=flip("the context of a target", scored, 64),
    eval_batch_seqs=flip("the windows per batch", batches, 8),
    ttt_enabled=flip("the score legal_ttt appears", labels, True, **ARTIFACT),
    ttt_lr=flip("the adapted weights", adapted_score, 0.02),
    ttt_momentum=flip("the adapted weights", adapted_score, 0.0),
    ttt_epochs=flip("the adapted weights", adapted_score, 2),
    ttt_chunk_tokens=flip("when weights adapt", adapted_score, 512),
    ttt_batch_seqs=flip("the adapted weights", adapted_score, 4),
    ttt_freeze_blocks=flip("which weights adapt", adapted_score, 3),
    ttt_grad_clip=flip("the size of gradients", adapted_score, 1e-3),
    slot=flip("the scored states", slot_score, "causal"),
    slot_lr=flip("the size of the shift", slot_score, 0.1, slot="causal"),
    slot_steps=flip("the size of the shift", slot_score, 1, slot="causal"),
    # place and pace
    data_path=flip("an error that names it", ended, "no/such/folder"),
    tokenizer_path=flip("an error that names it", ended, "no/such/file"),
    run_id=flip("the default directory", directory, "mine", run_dir="", **ARTIFACT),
    run_dir=flip("the directory", directory, "there/run", **ARTIFACT),
    eval_only=flip("nothing is trained", labels, ARTIFACT["eval_only"], iterations=1, audit=False),
    mode=flip("audit.json instead of scores.json", files, "audit", **ARTIFACT),
    audit=flip("audit.json beside scores.json", files, True, **ARTIFACT),
    audit_seed=flip("the seed that is logged", lines("spot_checks .*"), 7, **ARTIFACT),
    spot_checks=flip("the number of checked rounds", lines("spot_checks .*"), 0.5, **ARTIFACT),
    scores_file=flip("the file", files, "run/{label}.f32", **ARTIFACT),
    prompt=flip("the text that is continued", sampled, "A list", **SAMPLE),
    sample_tokens=flip("how long the text becomes", sampled, 4, **SAMPLE),
    temperature=flip("which tokens are drawn", sampled, 0.0, **SAMPLE),
    top_k=flip("the tokens to draw from", sampled, 1, **SAMPLE),
    device=flip("where it runs, or why it cannot", device, "cuda"),
    compile=flip("torch.compile is used", compilations, "1"),
    micro_batch_tokens=flip("the accumulation that the log states", lines("world_size:.*"), 128),
    warmup_steps=flip("the warm-up's log line", lines("warmup_steps:.*"), 2, compile="1"),
    train_log_every=flip("the steps in the log", STEPS, 4, iterations=8),
    val_loss_every=flip("the validations in the log", VALIDATIONS, 2),
    checkpoint_every=flip("the checkpoints", CHECKPOINTS, 2),
    checkpoint_seconds=flip("the checkpoints", CHECKPOINTS, 1e-6),
    time_limit_seconds=flip("exit code 75", ended, 1e-3),
)


FIELDS = {field.name: field.default for field in dataclasses.fields(Config)}
FIRST_USE = {row.look.__name__: row for row in reversed(FLIPS.values())}


def test_every_field_of_config_is_flipped():
    assert sorted(FLIPS) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_switch_does_something(name, lab):
    row = FLIPS[name]
    before, after = lab.settings(**row.given), lab.settings(**{**row.given, name: row.to})
    assert after[name] != before.get(name, FIELDS[name]), "this is no flip"
    assert row.look(lab, after) != lab.before(row.look, row.given), (
        f"{name.upper()} should change {row.says}"
    )


@pytest.mark.parametrize("look", FIRST_USE)
def test_without_a_flip_nothing_changes(look, lab):
    """Otherwise chance, and not the switch, could have made the difference."""
    row = FIRST_USE[look]
    before = lab.before(row.look, row.given)
    lab.forget()
    assert row.look(lab, lab.settings(**row.given)) == before
