"""The training loop: one synchronisation per step, where time goes, every step's loss on record."""

import math
import re
import types

import pytest
import torch
from helpers import EVERY_PART, events, tiny_config, weights

import train_gpt


def copy_of(made, name):
    return train_gpt.private_copy(getattr(made, name).state_dict())


# --------------------------------------------------------------------------------------------------
# One synchronisation per step
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def order(monkeypatch):
    """What happened, in order: "backward", "copy" and "read" of the loss."""
    seen = []
    backward = torch.Tensor.backward

    def recorded_backward(*arguments, **options):
        seen.append("backward")
        return backward(*arguments, **options)

    class RecordedCopy(train_gpt.HostCopy):
        def __init__(self, tensor):
            seen.append("copy")
            super().__init__(tensor)

        def read(self):
            seen.append("read")
            return super().read()

    monkeypatch.setattr(torch.Tensor, "backward", recorded_backward)
    monkeypatch.setattr(train_gpt, "HostCopy", RecordedCopy)
    return seen


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_loss_is_copied_before_the_last_backward_and_read_after_it(
    trainer, order, micro_batches
):
    batch = tiny_config().train_batch_tokens
    made = trainer(micro_batch_tokens=batch // micro_batches)
    assert made.accumulation_steps == micro_batches
    made.one_step()
    assert order == [*["backward"] * (micro_batches - 1), "copy", "backward", "read"]


class Synchronisations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations that make a host wait for a device, after the last backward or not."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.after = []  # how many backward passes had been launched at each

    def __torch_dispatch__(self, operation, _, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in self.WAITING:
            self.after.append(self.order.count("backward"))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [dict(), dict(swa_enabled=True, late_qat_threshold=0.5)])
def test_a_step_waits_once_and_only_after_the_last_backward_was_launched(trainer, order, settings):
    made = trainer(micro_batch_tokens=tiny_config().train_batch_tokens // 2, **settings)
    made.one_step()
    order.clear()
    with Synchronisations(order) as synchronisations:
        made.one_step()
    assert synchronisations.after == [2]


def test_a_copy_from_a_device_is_awaited_by_its_own_event(monkeypatch):
    """What CUDA does, on a stand-in: the event is recorded right behind the copy, and awaited."""
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    class OnDevice:
        is_cuda = True

        def to(self, device, non_blocking):
            calls.append(("to", device, non_blocking))
            return torch.tensor(2.5)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = train_gpt.HostCopy(OnDevice())
    assert calls == [("to", "cpu", True), "record"]
    assert copy.read() == 2.5 and calls[-1] == "synchronize"


def test_a_loss_that_is_not_finite_never_reaches_the_weights(trainer):
    made = trainer()
    made.one_step()
    with torch.no_grad():
        made.model.tok_emb.weight.fill_(math.nan)
    muon, average = copy_of(made, "muon"), copy_of(made, "average")
    with pytest.raises(train_gpt.DivergedError, match="step 2"):
        made.one_step()
    assert made.step == 1
    assert all(torch.equal(muon[name], now) for name, now in made.muon.state_dict().items())
    assert all(map(torch.equal, average["ema"], made.average.ema))


# --------------------------------------------------------------------------------------------------
# Every step's loss, the pace, and where time goes
# --------------------------------------------------------------------------------------------------
def lines_of(made):
    return (made.runtime.dir / "train.log").read_text().splitlines()


def test_every_step_is_an_event_and_every_nth_a_line(trainer):
    made = trainer(iterations=12, train_log_every=10)
    for _ in range(12):
        made.one_step()
    recorded = events(made.runtime.dir, "step")
    assert [event["step"] for event in recorded] == list(range(1, 13))
    logged = [line for line in lines_of(made) if "train_loss:" in line]
    # The first five, every tenth, and the last.
    assert [int(line[5:].partition("/")[0]) for line in logged] == [1, 2, 3, 4, 5, 10, 12]


def test_the_pace_is_that_of_the_steps_since_the_last_line(trainer, monkeypatch):
    made = trainer(iterations=20, train_log_every=10)
    seconds = iter([9.0] * 5 + [1.0] * 4 + [6.0] + [0.5] * 10)
    monkeypatch.setattr(
        made, "agree", lambda loss: train_gpt.StepFacts(loss, False, False, next(seconds))
    )
    for _ in range(20):
        made.one_step()
    tokens = made.config.train_batch_tokens
    paces = [line.split("tokens_per_s:")[1] for line in lines_of(made) if "train_loss:" in line]
    # Each of the first five took 9 s; 6 to 10 took 10 s together; 11 to 20 took 5 s.
    expected = [tokens / 9] * 5 + [tokens * 5 / 10, tokens * 10 / 5]
    assert paces == [f"{pace:.0f}" for pace in expected]


def test_a_training_line_begins_with_the_fields_that_other_tools_parse(trainer):
    made = trainer(iterations=1)
    made.one_step()
    line = next(line for line in lines_of(made) if "train_loss:" in line)
    known, _, pace = line.rpartition(" ")
    pattern = r"step:1/1 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
    assert re.fullmatch(pattern, known)
    assert re.fullmatch(r"tokens_per_s:\d+", pace)


def throughput(made):
    """The two lines of the end, and their event."""
    made.report_throughput()
    return lines_of(made)[-2:], events(made.runtime.dir, "throughput")[-1]


def test_the_end_tells_the_pace_and_where_time_went(trainer, monkeypatch):
    made = trainer(iterations=100)
    made.timer.steps = [0.1] * 90 + [0.3] * 10
    made.timer.seconds = dict(data=1.0, forward_backward=8.0, optimiser=2.0, validation=4.0)
    made.seconds = sum(made.timer.steps)  # 12 s for 100 steps
    tokens = made.config.train_batch_tokens
    (pace, where), event = throughput(made)
    assert pace.startswith(f"throughput tokens_per_s:{100 * tokens / 12:.0f} ")
    assert " step_median:100.00ms step_p95:300.00ms " in pace
    assert "peak_share:unknown (no bfloat16 peak is listed for " in pace
    assert where == (
        "time_in data:1.0s forward_backward:8.0s optimiser:2.0s validation:4.0s all_steps:12.0s"
    )
    assert event["peak_share"] is None and event["seconds_in"]["data"] == 1.0


def test_the_share_of_the_peak_counts_all_ranks(trainer, monkeypatch):
    made = trainer(iterations=10)
    made.timer.steps = [0.5] * 10
    made.timer.flops = 1e12
    made.seconds = 5.0
    monkeypatch.setattr(made.comm, "world", 4)
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    (pace, _), event = throughput(made)
    assert event["peak_share"] == pytest.approx(1e12 / 5.0 / (4 * 312e12))
    assert pace.endswith("% (of 312 TFLOP/s, NVIDIA A100-SXM4-40GB)")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),  # SXM
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),  # a slice
        ("Tesla V100-SXM2-16GB", None),  # has no bfloat16
        ("2-core x86_64 CPU", None),
    ],
)
def test_the_peak_of_a_device_is_read_from_its_name(name, expected):
    assert train_gpt.peak_flops(name) == expected


def test_flops_of_a_token_are_those_of_the_formula():
    """base_7k: all parameters but the 4096 x 128 of the bigram table, 11 layers of 512 at 2048."""
    settings = {**train_gpt.PRESETS["base_7k"], "preset": "base_7k"}
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**settings))
    assert train_gpt.flops_per_token(model) == 6 * (27_137_223 - 4096 * 128) + 12 * 11 * 512 * 2048


def test_a_looped_layer_costs_each_of_its_visits():
    with torch.device("meta"):
        model = train_gpt.GPT(tiny_config(num_loops=2, loop_start=1, loop_end=1))
    model.looped = False
    plain = train_gpt.flops_per_token(model)
    model.looped = True
    layer = sum(param.numel() for param in model.blocks[1].parameters())
    attention = model.config.model_dim * model.config.train_seq_len
    assert train_gpt.flops_per_token(model) - plain == 2 * (6 * layer + 12 * attention)


def test_the_operations_of_a_run_are_those_of_its_steps(trainer):
    made = trainer(iterations=4, num_layers=2, num_loops=1, loop_start=1, loop_end=1, loop_at=0.5)
    expected = 0
    for looped in (False, False, True, True):
        made.set_order()
        assert made.model.looped == looped
        expected += train_gpt.flops_per_token(made.model) * made.config.train_batch_tokens
        made.one_step()
    assert made.timer.flops == expected
    restored = train_gpt.StepTimer()
    restored.load_state_dict(made.timer.state_dict())
    assert restored.flops == expected


def test_time_is_booked_where_it_is_spent(trainer, monkeypatch):
    made = trainer()
    clock = [0.0]
    monkeypatch.setattr(
        train_gpt,
        "time",
        types.SimpleNamespace(monotonic=lambda: clock[0], time=lambda: 0),
    )

    def slow(owner, name, seconds):
        function = getattr(owner, name)

        def slower(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, slower)

    slow(made.stream, "take", 1.0)
    slow(made, "loss", 20.0)
    slow(train_gpt, "reduce_clip_step", 300.0)
    slow(train_gpt, "evaluate", 4000.0)
    rounds = made.accumulation_steps
    made.step_started = 0.0
    made.one_step()
    made.validate()
    assert made.timer.seconds == dict(
        data=1.0, forward_backward=20.0 * rounds, optimiser=300.0, validation=4000.0
    )
    made.one_step()
    # The second step holds the first one's optimiser, and no validation.
    assert made.timer.steps == [1.0 + 20 * rounds, 300.0 + 1.0 + 20 * rounds]


def test_times_survive_a_stop(trainer, tmp_path):
    made = trainer(run_dir=str(tmp_path / "run"), iterations=6)
    for _ in range(3):
        made.one_step()
    made.save(wait=True)
    made.runtime.close()
    again = trainer(run_dir=str(tmp_path / "run"), iterations=6)
    again.load()
    assert again.timer.steps == made.timer.steps and len(again.timer.steps) == 3
    assert again.timer.seconds == made.timer.seconds and again.timer.seconds["optimiser"] > 0
    again.one_step()
    assert again.timer.recent(1) == again.timer.steps[-1]


@pytest.mark.parametrize("cap, stops", [(46.0, True), (47.0, False)])
def test_the_cap_is_kept_by_the_pace_of_the_last_steps(trainer, cap, stops):
    """30 steps of 0.5 s, then 20 of 1.5 s: the next one will not take the mean of 0.9 s."""
    made = trainer(max_wallclock_seconds=cap, iterations=1000)
    made.timer.steps = [0.5] * 30 + [1.5] * 20
    made.step, made.seconds = 50, 45.0
    assert made.out_of_time() is stops


# --------------------------------------------------------------------------------------------------
# Rates and averages of a run
# --------------------------------------------------------------------------------------------------
def test_the_scale_reaches_every_rate(trainer):
    made = trainer(embed_lr=0.04, scalar_lr=0.02, matrix_lr=0.03, muon_momentum_warmup_steps=10)
    made.step = 5
    made.set_lrs(0.5)
    assert (made.muon.lr, [group["lr"] for group in made.adamw.param_groups]) == (
        0.015,
        [0.02, 0.01],
    )
    assert made.muon.momentum == pytest.approx((0.92 + 0.99) / 2)


def recorded_run(made, monkeypatch, steps=5):
    """Take `steps` training steps; returns the raw weights before and after each."""
    history, original = [weights(made.model)], train_gpt.reduce_clip_step

    def recording(*arguments):
        original(*arguments)
        history.append(weights(made.model))

    monkeypatch.setattr(train_gpt, "reduce_clip_step", recording)
    made.step_started = train_gpt.time.monotonic()
    for _ in range(steps):
        made.one_step()
    return history


@pytest.mark.parametrize(
    "settings", [dict(), dict(swa_enabled=True, swa_every=2, swa_start_scale=0.7)]
)
def test_a_run_exports_the_hand_computed_average_of_its_weights(settings, trainer, monkeypatch):
    """Five steps, a warmdown of four: the scales are 1, 1, 3/4, 2/4, 1/4, so the one snapshot is
    step 4's."""
    made = trainer(iterations=5, warmdown_iters=4, ema_full_steps=1, **settings)
    history = recorded_run(made, monkeypatch)
    exported = made.export()["state_dict"]
    moved = 0
    for name in history[0]:
        ema, means = history[0][name], []
        for values, decay in zip(history[1:], (1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14)):
            ema = decay * ema + (1 - decay) * values[name]
            means.append(ema)
        torch.testing.assert_close(
            exported[name], means[3] if settings else means[4], atol=1e-6, rtol=1e-5
        )
        moved += not torch.equal(exported[name], history[-1][name])
    assert moved > 10


# --------------------------------------------------------------------------------------------------
# Warm-up
# --------------------------------------------------------------------------------------------------
def with_warm_up(made, monkeypatch):
    """Make the trainer believe that it compiles, and count the steps of its warm-up."""
    steps, original = [], train_gpt.reduce_clip_step

    def counting(*arguments):
        steps.append(1)
        original(*arguments)

    made.runtime.compiling = True
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "reduce_clip_step", counting)
        made.warm_up()
    return len(steps)


def flat(tree, at=""):
    """{path: leaf} of a tree of dictionaries and lists."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {
            path: leaf for key, value in items for path, leaf in flat(value, f"{at}/{key}").items()
        }
    return {at: tree}


def same_tree(left, right):
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    different = [
        path
        for path, leaf in left.items()
        if not (
            torch.equal(leaf, right[path])
            if isinstance(leaf, torch.Tensor)
            else leaf == right[path]
        )
    ]
    return not different


@pytest.mark.parametrize("trained", [0, 2])
def test_the_warm_up_restores_weights_and_optimisers_bit_for_bit(trained, trainer, monkeypatch):
    monkeypatch.setattr(train_gpt.Runtime, "compiled", lambda self, function: function)
    made = trainer(
        warmup_steps=3, swa_enabled=True, **dict(EVERY_PART, ve_last_n=1), late_qat_threshold=0.5
    )
    recorded_run(made, monkeypatch, trained)
    before, position = train_gpt.private_copy(made.training_state()), made.stream.position
    assert with_warm_up(made, monkeypatch) == 3
    assert same_tree(train_gpt.private_copy(made.training_state()), before)
    assert made.stream.position == position
    assert (made.step, made.stopped_early) == (trained, False)


def test_a_run_after_a_warm_up_is_the_run_without_one(trainer, monkeypatch, tmp_path):
    monkeypatch.setattr(train_gpt.Runtime, "compiled", lambda self, function: function)
    finals = []
    for warm in (True, False):
        made = trainer(
            warmup_steps=2, run_dir=str(tmp_path / f"warm_{warm}"), **dict(EVERY_PART, ve_last_n=1)
        )
        if warm:
            assert with_warm_up(made, monkeypatch) == 2
        finals.append(recorded_run(made, monkeypatch, 3)[-1])
    assert same_tree(*finals)


def test_nothing_is_warmed_up_where_nothing_is_compiled(trainer, monkeypatch):
    made = trainer(warmup_steps=3)
    monkeypatch.setattr(
        made, "accumulate", lambda *arguments: pytest.fail("a step without compilation")
    )
    made.warm_up()
