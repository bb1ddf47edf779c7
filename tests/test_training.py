"""The training loop: its clock, log lines and checkpoints, its one synchronisation per step."""

import math
import re

import pytest
import torch
from helpers import EVERY_PART, Operations, count, events, log_of, preset_config, same, weights

import train_gpt


def lines_of(made):
    return log_of(made.runtime.dir).splitlines()


# ---- a step ----
@pytest.mark.parametrize(
    "settings", [dict(micro_batch_tokens=256), dict(swa_enabled=True, late_qat_threshold=0.5)]
)
def test_a_step_waits_for_the_device_once_after_the_last_backward_began(
    trainer, settings, monkeypatch
):
    made = trainer(**settings)
    made.one_step()
    backward = torch.Tensor.backward
    with Operations() as operations:

        def recorded(*arguments, **options):
            operations.names.append("backward")
            return backward(*arguments, **options)

        monkeypatch.setattr(torch.Tensor, "backward", recorded)
        made.one_step()
    waiting = ("backward", "_local_scalar_dense", "nonzero", "equal", "is_nonzero")
    found = [name for name in operations.names if name in waiting]
    assert found == ["backward"] * made.accumulation_steps + ["_local_scalar_dense"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_reaches_neither_weights_nor_averages(trainer, bad):
    made = trainer()
    made.one_step()
    loss = made.loss
    made.loss = lambda *arguments: loss(*arguments) + bad
    before = tensors_of(train_gpt.private_copy(made.training_state()))
    with pytest.raises(train_gpt.DivergedError, match=f"loss is {bad} at step 2"):
        made.one_step()
    assert made.step == 1
    assert all(map(torch.equal, before, tensors_of(made.training_state())))


def test_a_stop_with_weights_that_are_not_finite_is_no_saved_stop(trainer):
    made = trainer()
    made.one_step()
    with torch.no_grad():
        made.model.tok_emb.weight.fill_(math.nan)
    made.save()  # a warning: an older checkpoint may be there
    with pytest.raises(train_gpt.DivergedError, match="no checkpoint at step 1"):
        made.save(needed=True)


def test_a_step_s_loss_is_that_of_each_token_s_successor(trainer):
    made = trainer(nfm_enabled=False)
    rows = made.stream.sequences(0, made.seqs_per_rank)
    tokens = torch.from_numpy(rows.astype(int))
    expected = made.model(tokens[:, :-1], tokens[:, 1:]).item()
    assert made.accumulate(0, rows) == pytest.approx(expected, rel=1e-5)


def test_a_step_s_noise_is_a_function_of_its_number(trainer):
    made = trainer()
    rows = made.stream.sequences(0, made.seqs_per_rank)
    first, second, again = (made.accumulate(step, rows) for step in (0, 1, 0))
    assert first == again != second


def test_out_of_memory_names_the_micro_batch_to_take(trainer):
    made = trainer()

    def full(*arguments):
        raise torch.OutOfMemoryError

    made.loss = full
    with pytest.raises(train_gpt.ResourceError, match="MICRO_BATCH_TOKENS=128$"):
        made.one_step()


def test_every_schedule_follows_the_scale_of_the_rates_and_the_step(trainer):
    rates = dict(embed_lr=0.04, scalar_lr=0.02, matrix_lr=0.03)
    made = trainer(**rates, muon_momentum_warmup_steps=10, late_qat_threshold=0.15)
    made.step = 5
    for scale, blend in ((0.5, 0.0), (0.15, 0.0), (0.1, 1.0)):  # rounding begins below 0.15
        made.set_schedules(scale)
        found = [made.muon.lr, *(group["lr"] for group in made.adamw.param_groups)]
        assert found == [0.03 * scale, 0.04 * scale, 0.02 * scale]
        assert made.muon.momentum == pytest.approx((0.92 + 0.99) / 2)
        assert made.model.qat_blend == blend


@pytest.mark.parametrize("settings", [dict(), dict(swa_enabled=True, swa_every=6)])
def test_a_run_exports_the_hand_computed_average_of_its_weights(settings, trainer):
    """Six steps, a warmdown of eight: of the rates, only the last one's 1/8 is below 0.2."""
    made = trainer(iterations=6, warmdown_iters=8, **settings)
    history = [weights(made.model)]
    for _ in range(6):
        made.one_step()
        history.append(weights(made.model))
    exported = made.export()["state_dict"]
    moved = 0
    for name, mean in history[0].items():
        for number, values in enumerate(history[1:]):
            decay = (1 + number) / (10 + number)
            mean = decay * mean + (1 - decay) * values[name]
        torch.testing.assert_close(exported[name], mean, atol=1e-6, rtol=1e-5)
        moved += not torch.equal(exported[name], history[-1][name])
    assert moved > 10 and made.average.snapshots == bool(settings)


# ---- the clock and the lines ----
def test_every_step_is_an_event_and_every_nth_a_line(trainer):
    made = trainer(iterations=12, train_log_every=10)
    for _ in range(12):
        made.one_step()
    assert [event["step"] for event in events(made.runtime.dir, "step")] == list(range(1, 13))
    logged = [line for line in lines_of(made) if "train_loss:" in line]
    # The first five, every tenth, and the last.
    assert [int(line[5:].partition("/")[0]) for line in logged] == [1, 2, 3, 4, 5, 10, 12]
    known = r"step:12/12 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
    assert re.fullmatch(rf"{known} tokens_per_s:\d+", logged[-1])


def test_the_pace_is_that_of_the_steps_since_the_last_line(trainer, monkeypatch):
    made = trainer(iterations=20, train_log_every=10)
    seconds = iter([9.0] * 5 + [1.0] * 4 + [6.0] + [0.5] * 10)
    monkeypatch.setattr(made, "agree", lambda loss: (loss, False, False, next(seconds)))
    for _ in range(20):
        made.one_step()
    tokens = made.config.train_batch_tokens
    paces = [line.split("tokens_per_s:")[1] for line in lines_of(made) if "train_loss:" in line]
    # Each of the first five took 9 s; 6 to 10 took 10 s together; 11 to 20 took 5 s.
    expected = [tokens / 9] * 5 + [tokens * 5 / 10, tokens * 10 / 5]
    assert paces == [f"{pace:.0f}" for pace in expected]


def test_validations_and_checkpoints_are_no_training_time(trainer, monkeypatch):
    made = trainer(iterations=100, checkpoint_every=2)
    clock = [0.0]
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: clock[0])

    def slow(owner, name, seconds):
        """Each call takes `seconds` on a clock that else stands."""
        function = getattr(owner, name)

        def slower(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slower)

    slow(made.stream, "sequences", 1.0)
    slow(made, "loss", 20.0)
    slow(train_gpt, "reduce_clip_step", 300.0)
    slow(train_gpt, "evaluate", 4000.0)
    slow(torch, "save", 50000.0)
    made.step_started = train_gpt.time.monotonic()
    for _ in range(3):
        made.one_step()
        made.validate()
    assert len(events(made.runtime.dir, "checkpoint")) == 1
    assert len(events(made.runtime.dir, "val")) == 3
    # A step's optimisers run after its loss is known, so they count for the next step.
    step = 1.0 + 20 * made.accumulation_steps
    assert made.step_seconds == [step, 300.0 + step, 300.0 + step]
    assert made.seconds == sum(made.step_seconds)


@pytest.mark.parametrize("cap, stops", [(46.0, True), (47.0, False)])
def test_the_cap_is_kept_by_the_pace_of_the_last_steps(trainer, cap, stops):
    """30 steps of 0.5 s, then 20 of 1.5 s: the next one will not take the mean of 0.9 s."""
    made = trainer(max_wallclock_seconds=cap, iterations=1000)
    made.step_seconds = [0.5] * 30 + [1.5] * 20
    made.step, made.seconds = 50, 45.0
    assert made.out_of_time() is stops


@pytest.mark.parametrize("device", ["2-core x86_64 CPU", "NVIDIA A100-SXM4-40GB"])
def test_the_end_tells_the_pace_and_the_share_of_all_ranks_peak(trainer, monkeypatch, device):
    made = trainer(iterations=100)
    made.step = 100
    made.step_seconds = [0.1] * 90 + [0.3] * 10
    made.seconds = 12.0
    made.flops = 1e12
    monkeypatch.setattr(made.comm, "world", 4)
    monkeypatch.setattr(train_gpt, "device_name", lambda _: device)
    made.report_throughput()
    tokens_per_s = 100 * made.config.train_batch_tokens / 12
    share = 1e12 / 12 / (4 * 312e12) if "A100" in device else None
    text = f"unknown (no bfloat16 peak is listed for {device})"
    if share:
        text = f"{100 * share:.1f}% (of 312 TFLOP/s, {device})"
    assert lines_of(made)[-1] == (
        f"throughput tokens_per_s:{tokens_per_s:.0f} step_median:100.00ms step_p95:300.00ms "
        f"peak_share:{text}"
    )
    event = events(made.runtime.dir, "throughput")[-1]
    assert event["peak_share"] == pytest.approx(share) and event["step_p95_ms"] == 300


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),  # SXM
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),  # a slice
        ("Tesla V100-SXM2-16GB", None),  # has no bfloat16
    ],
)
def test_the_peak_of_a_device_is_read_from_its_name(name, expected):
    assert train_gpt.peak_flops(name) == expected


@pytest.mark.parametrize(
    "preset, tables, visits",
    [("base_7k", 4096 * 128, 0), ("record_0409", 0, 6)],  # layers 3, 4 and 5 run twice more
)
def test_flops_of_a_token_are_those_of_the_formula(preset, tables, visits):
    """6 N + 12 L D T of 11 layers of 512 at 2048 tokens; the tables multiply no token."""
    with torch.device("meta"):
        model = train_gpt.GPT(preset_config(preset))
    block = count(model.blocks[3])
    multiplied = count(model) - tables + visits * block
    assert train_gpt.flops_per_token(model) == 6 * multiplied + 12 * (11 + visits) * 512 * 2048


def test_a_looped_layer_costs_each_of_its_visits_from_the_step_on_at_which_it_is_looped(trainer):
    made = trainer(iterations=4, num_layers=2, num_loops=2, loop_start=1, loop_end=1, loop_at=0.25)
    made.model.looped = False
    plain = train_gpt.flops_per_token(made.model)
    layer = sum(param.numel() for param in made.model.blocks[1].parameters())
    attention = made.config.model_dim * made.config.train_seq_len
    for _ in range(4):
        made.set_layer_order()
        made.one_step()
    looped = plain + 2 * (6 * layer + 12 * attention)
    assert made.flops == (plain + 3 * looped) * made.config.train_batch_tokens


# ---- checkpoints ----
IDENTITY = {"matrix_lr": 0.025, "training tokens": 1000}


def resumable(trainer, tmp_path, **changes):
    """A Trainer that others with the same call go on from."""
    made = trainer(run_dir=str(tmp_path / "run"), iterations=6, **changes)
    made.identity = IDENTITY
    return made


def test_a_resumed_run_takes_the_steps_of_the_one_that_went_on(trainer, tmp_path):
    settings = dict(EVERY_PART, ve_last_n=1, shuffle=True)
    made = resumable(trainer, tmp_path, **settings)
    for _ in range(6):
        if made.step == 3:
            made.save()
        made.one_step()
    expected = made.export()["state_dict"]
    made.runtime.close()
    again = resumable(trainer, tmp_path, **settings)
    again.load()
    assert again.step_seconds == made.step_seconds[:3]
    assert again.seconds == pytest.approx(sum(again.step_seconds))
    assert again.flops == pytest.approx(made.flops / 2)
    for _ in range(3):
        again.one_step()
    assert same(expected, again.export()["state_dict"])


def test_a_checkpoint_of_another_training_is_refused_with_the_fields_that_differ(trainer, tmp_path):
    made = resumable(trainer, tmp_path)
    made.step = 1
    made.save()
    made.identity = {**IDENTITY, "matrix_lr": 0.03, "seed": 1}
    expected = r"belongs to other settings or data: matrix_lr: 0.025 -> 0.03; seed: None -> 1: "
    with pytest.raises(train_gpt.ConfigError, match=expected):
        made.load()


def test_a_checkpoint_that_cannot_be_written_is_an_error_only_where_it_is_needed(trainer):
    made = trainer(checkpoint_every=1, iterations=4)
    for step in (1, 2, 3):  # a folder that is not empty cannot be replaced by a file
        (made.checkpoints.path(step) / "x").mkdir(parents=True)
    made.one_step()
    assert any(line.startswith("warning: checkpoint not saved: ") for line in lines_of(made))
    assert not events(made.runtime.dir, "checkpoint")
    made.runtime.stop.reason = "SIGTERM"
    with pytest.raises(train_gpt.ResourceError, match="step 2 could not be written .*free space"):
        made.one_step()
    made.model.tok_emb.weight.data.fill_(math.inf)
    with pytest.raises(train_gpt.DivergedError):  # the error that the user must know
        made.one_step()
    assert "warning: no checkpoint at step 2: weights are not finite" in lines_of(made)


def test_a_run_that_is_stopped_in_a_validation_saves_first(trainer):
    made = trainer(iterations=4, val_loss_every=2)

    def signalled(loss, scale):  # after the ranks have agreed on the step
        if made.step == 2:
            made.runtime.stop.reason = "SIGTERM"

    made.report = signalled
    with pytest.raises(train_gpt.Stopped, match="validation"):
        made.run()
    assert made.checkpoints.last().endswith("step_00000002.pt")


# ---- warm-up ----
@pytest.mark.parametrize("trained", [0, 2])
def test_the_warm_up_takes_steps_and_leaves_no_trace(trained, trainer, tmp_path, monkeypatch):
    original, taken, finals = train_gpt.reduce_clip_step, [], []

    def counted(*arguments):
        taken.append(1)
        original(*arguments)

    monkeypatch.setattr(train_gpt, "reduce_clip_step", counted)
    for steps in (3, 0):
        made = trainer(
            **dict(EVERY_PART, ve_last_n=1),
            warmup_steps=steps,
            run_dir=str(tmp_path / str(steps)),
            swa_enabled=True,
            late_qat_threshold=0.5,
        )
        made.runtime.compiling = True  # or nothing would be warmed up
        for _ in range(trained):
            made.one_step()
        made.warm_up()
        for _ in range(2):
            made.one_step()
        assert len(taken) == trained + steps + 2
        taken.clear()
        assert len(made.step_seconds) == made.step == trained + 2
        state = train_gpt.private_copy(made.training_state())
        finals.append(torch.cat([x.flatten() for x in tensors_of(state)]))
    assert torch.equal(*finals)


def tensors_of(tree):
    """Every tensor in a tree of dicts and lists, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree.double()]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [tensor for branch in branches for tensor in tensors_of(branch)]


@pytest.mark.parametrize("compiling, step", [(False, 0), (True, 6)])
def test_nothing_is_warmed_up_that_is_not_compiled_or_not_needed(compiling, step, trainer):
    made = trainer(warmup_steps=3, iterations=6)
    made.runtime.compiling = compiling
    made.step = step
    made.accumulate = lambda *_: pytest.fail("a step for nothing")
    made.warm_up()
