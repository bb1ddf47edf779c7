"""Evaluation: the plan, the meter, the scoring loop, test-time training, SLOT, resuming."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CHUNK, EVERY_PART, SEQ, STRIDE, Seen, same, tiny_config, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ArtifactError,
    LegalityError,
    Meter,
    ScoreRound,
    Stopped,
    TrainStep,
    Window,
    plan_windows,
    plan_work,
)


# --------------------------------------------------------------------------------------------------
# Windows and work
# --------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 80))
def test_every_target_is_scored_exactly_once_in_order_with_as_much_context_as_fits(
    targets, seq_len, stride
):
    windows = plan_windows(targets, seq_len, stride)
    assert [t for _, first, end in windows for t in range(first, end)] == list(range(targets))
    for number, (start, first, end) in enumerate(windows):
        assert start <= first < end
        assert start == max(0, end - seq_len)
        # No window is wasted on fewer targets than it could score.
        most = min(stride, seq_len) if number else seq_len
        assert end - first == min(most, targets - first)


# The arguments of planned() below.
WORK = st.tuples(
    st.integers(1, 900),
    st.integers(2, 40),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 5),
)


def planned(targets, seq_len, stride, rows, per_round, epochs, batch, ttt=True):
    stride = min(stride, seq_len)
    config = tiny_config(
        eval_seq_len=seq_len,
        eval_stride=stride,
        ttt_chunk_tokens=rows * seq_len,
        ttt_epochs=epochs,
        ttt_batch_seqs=batch,
        ttt_lr=0.1,
    )
    windows = plan_windows(targets, seq_len, stride)
    return config, windows, plan_work(windows, targets, config, per_round, ttt)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(WORK)
def test_each_chunk_is_scored_before_it_is_trained_on_and_the_last_is_never_trained_on(numbers):
    """The rate follows a cosine over the chunks."""
    config, windows, work = planned(*numbers)
    targets, chunk, scored, trained = numbers[0], config.ttt_chunk_tokens, 0, {}
    chunks, rows = math.ceil(targets / chunk), chunk // config.eval_seq_len
    for item in work:
        if isinstance(item, ScoreRound):
            assert 0 < item.high - item.low <= numbers[4]
            assert windows[item.low].first == scored
            scored = windows[item.high - 1].end
            # Rounds do not cross chunks: all of the next chunk's windows see this chunk's training.
            assert windows[item.low].first // chunk == windows[item.high - 1].first // chunk
            assert windows[item.low].first // chunk == len(trained)
        else:
            first, low, high, rate = item
            assert 0 < high - low <= config.ttt_batch_seqs
            assert first + high * config.eval_seq_len <= scored
            trained.setdefault(first, []).extend(range(low, high))
            turn = math.pi * (first // chunk) / (chunks - 1)
            assert rate == pytest.approx(0.1 * (1 + math.cos(turn)) / 2, abs=1e-9)
    assert scored == targets
    assert trained == {c * chunk: list(range(rows)) * config.ttt_epochs for c in range(chunks - 1)}


# --------------------------------------------------------------------------------------------------
# The meter
# --------------------------------------------------------------------------------------------------
def test_the_meter_refuses_a_target_twice_and_a_step_back():
    meter = Meter(10, "cpu")
    meter.add([Window(0, 0, 2), Window(0, 2, 4)], torch.tensor(1.0), 4)
    with pytest.raises(LegalityError):
        meter.add([Window(0, 3, 6)], torch.tensor(1.0), 1)
    meter.add([Window(0, 6, 8)], torch.tensor(1.0), 2)
    with pytest.raises(LegalityError):
        meter.add([Window(0, 4, 6)], torch.tensor(1.0), 2)


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def plain_nll(model, tokens, seq_len, stride):
    """nll of every target in float64, each in its window and each window alone."""
    targets, ends = len(tokens) - 1, {}
    for t in range(targets):
        steps = max(0, math.ceil((t + 1 - seq_len) / stride))
        ends.setdefault(min(targets, seq_len + steps * stride), []).append(t)
    nll, ids, model = np.zeros(targets), torch.from_numpy(np.array(tokens, np.int64)), model.eval()
    for end, scored in ends.items():
        start = max(0, end - seq_len)
        logits = model.logits(model.hidden(ids[None, start:end]))[0].double()
        for t in scored:
            nll[t] = torch.logsumexp(logits[t - start], 0) - logits[t - start, ids[t + 1]]
    return nll


@pytest.mark.parametrize(
    "targets, stride, batch",
    [
        (150, 1, 5),
        (300, 37, 3),
        (300, SEQ, 50),
        (SEQ - 1, STRIDE, 4),
        (SEQ + 1, SEQ, 4),
    ],
)
def test_the_score_equals_a_plain_loop_over_all_windows(case, targets, stride, batch):
    """Summed in float64, over bytes by the tokenizer."""
    case = case(targets, eval_batch_seqs=batch)
    score, seen = case.run(stride=stride)
    ids = np.array(case.stream.tokens)
    assert np.abs(seen.nll - plain_nll(case.model(), ids, SEQ, stride)).max() < 2e-5
    assert score.tokens == targets and score.legal
    assert score.bytes == case.stream.token_bytes.count(ids[:-1], ids[1:]).sum()
    assert score.val_loss * targets == pytest.approx(seen.nll.sum(), rel=1e-13)
    assert score.val_bpb == pytest.approx(seen.nll.sum() / math.log(2) / score.bytes, rel=1e-13)


@pytest.mark.parametrize("stride", [1, SEQ])
def test_only_scored_positions_get_logits(case, stride):
    case = case(150)
    model, rows = case.model(), []
    logits = model.logits
    model.logits = lambda hidden: rows.append(hidden.numel() // hidden.size(-1)) or logits(hidden)
    case.run(model, stride=stride)
    assert sum(rows) == 150


@pytest.mark.parametrize("ttt", [False, True])
def test_weights_that_are_not_finite_are_a_clear_error(case, ttt):
    case = case(2 * CHUNK)
    model = case.model()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[0, 0] = math.inf
    with pytest.raises(ArtifactError, match="finite"):
        case.run(model, ttt=ttt)


# --------------------------------------------------------------------------------------------------
# Out of memory
# --------------------------------------------------------------------------------------------------
def with_memory_for(model, rows):
    """Let `model` hold at most `rows` sequences; returns a list that gets the sizes that ran."""
    ran = []

    def limited(function):
        def call(ids, *rest):
            if len(ids) > rows:
                raise torch.OutOfMemoryError("no memory")
            ran.append(len(ids))
            return function(ids, *rest)

        return call

    model.hidden, model.forward = limited(model.hidden), limited(model.forward)
    return ran


def test_out_of_memory_halves_the_batch_and_keeps_the_score(case):
    case = case(2 * CHUNK, eval_batch_seqs=8, ttt_batch_seqs=4)
    expected, every = case.run(ttt=True)
    model = case.model()
    ran = with_memory_for(model, 3)
    score, seen = case.run(model, ttt=True)
    assert max(ran) == 2
    assert re.findall(r"halved to (\d) windows", case.log()) == ["4", "2"]
    assert score.tokens == expected.tokens and score.bytes == expected.bytes
    assert score.val_loss == pytest.approx(expected.val_loss, rel=1e-6)
    assert np.abs(seen.nll - every.nll).max() < 1e-3


@pytest.mark.parametrize("ttt", [False, True])
def test_no_memory_for_one_window_is_an_error_of_exit_code_7(case, ttt):
    case = case(2 * CHUNK)
    model = case.model()
    if ttt:  # scoring fits, training does not
        model.forward = lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    else:
        with_memory_for(model, 0)
    with pytest.raises(train_gpt.ResourceError, match="EVAL_SEQ_LEN") as error:
        case.run(model, ttt=ttt)
    assert error.value.code == 7


# --------------------------------------------------------------------------------------------------
# Test-time training
# --------------------------------------------------------------------------------------------------
class Weights(Seen):
    """Also the weights that scored each chunk."""

    def __init__(self, num_targets):
        super().__init__(num_targets)
        self.by_chunk = {}

    def before_item(self, evaluation, item):
        if isinstance(item, ScoreRound):
            self.by_chunk[evaluation.windows[item.low].first // CHUNK] = weights(evaluation.model)


@pytest.mark.parametrize("clip, freeze", [(0.0, 1), (0.05, 0), (0.0, 3)])
def test_the_steps_on_a_chunk_equal_plain_sgd(case, clip, freeze):
    """Frozen blocks do not move, everything else does; the loss is the cross entropy alone."""
    rates = dict(ttt_lr=0.05, ttt_momentum=0.8, ttt_grad_clip=clip, ttt_freeze_blocks=freeze)
    case = case(3 * CHUNK, ttt_epochs=2, ttt_batch_seqs=3, **rates, **EVERY_PART)
    _, seen = case.run(ttt=True, observer=Weights(3 * CHUNK))
    model, momentum = case.model().eval(), {}
    tokens = torch.from_numpy(np.array(case.stream.tokens, np.int64))
    frozen = tuple(f"blocks.{i}." for i in range(freeze))
    params = {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}
    for chunk, rate in ((0, 0.05), (1, 0.025)):
        span = tokens[chunk * CHUNK : (chunk + 1) * CHUNK + 1]
        ids, targets = span[:-1].view(-1, SEQ), span[1:].view(-1, SEQ)
        for _ in range(2):
            for rows in (slice(0, 3), slice(3, 4)):
                logits = model.logits(model.hidden(ids[rows]))
                loss = F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten())
                grads = torch.autograd.grad(loss, list(params.values()))
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
                scale = min(1.0, clip / norm) if clip else 1.0
                for (name, param), grad in zip(params.items(), grads):
                    momentum[name] = 0.8 * momentum.get(name, 0) + scale * grad
                    param.data -= rate * momentum[name]
        found = seen.by_chunk[chunk + 1]
        for name, value in model.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=2e-5), (chunk, name)
    before = seen.by_chunk[0]
    assert {name for name in before if not torch.equal(before[name], found[name])} == set(params)


@pytest.mark.parametrize("item", [TrainStep(0, 0, 2, 0.1), TrainStep(CHUNK, 0, 4, 0.1)])
def test_training_on_what_is_not_scored_is_refused(case, item):
    """The first rows before any score; the second chunk when only the first is scored."""
    case = case(3 * CHUNK)

    class Impatient(Seen):
        def before_item(self, evaluation, upcoming):
            if evaluation.scored_until >= item.first:
                evaluation.train(item)

    with pytest.raises(LegalityError, match="are scored"):
        case.run(ttt=True, observer=Impatient(3 * CHUNK))


def test_test_time_training_is_deterministic_and_nothing_else_has_to_be(case, monkeypatch):
    """On CUDA, sums by atomics would give other weights each time."""
    case = case(2 * CHUNK)
    model, inside, outside = case.model(), [], []
    forward, hidden = model.forward, model.hidden
    mode = torch.are_deterministic_algorithms_enabled
    model.forward = lambda *a: inside.append(mode()) or forward(*a)
    model.hidden = lambda *a: outside.append(mode()) or hidden(*a)
    model.tok_emb.weight.register_hook(lambda grad: inside.append(mode()))  # backward
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: inside.append(mode()) or step(self))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    case.run(model, ttt=True)
    assert len(inside) == 3 * 2 and all(inside)  # 2 steps: forward, backward, update
    assert len(outside) > 4 and not any(outside)
    assert not mode() and torch.utils.deterministic.fill_uninitialized_memory == fill


@pytest.mark.parametrize("stop", [False, True])
def test_weights_modes_and_gradients_are_restored_after_the_evaluation(case, stop):
    case = case(2 * CHUNK, ttt_lr=0.05)
    model, fresh = case.model(), case.model()
    for one in (model, fresh):
        one.skip_weights.requires_grad_(False)
    before = weights(model)
    if stop:
        with pytest.raises(Stopped):
            case.run(model, ttt=True, observer=StopIn(case.runtime, 7, 2 * CHUNK))
        case.runtime.stop.reason = ""
    else:
        case.run(model, ttt=True)
    again, expected = (case.run(one, ttt=True)[0] for one in (model, fresh))
    assert result(again) == result(expected), "something is left of the first one"
    assert same(before, weights(model)) and model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["skip_weights"]
    assert all(param.grad is None for param in model.parameters())


# --------------------------------------------------------------------------------------------------
# SLOT
# --------------------------------------------------------------------------------------------------
def test_the_shift_of_a_window_equals_plain_adamw_on_that_window_alone(case):
    """A window without known targets gets none."""
    case = case(250, slot="causal", slot_lr=0.01, slot_steps=4)
    _, seen = case.run(slot="causal")
    model = case.model().eval().requires_grad_(False)
    ids = torch.from_numpy(np.array(case.stream.tokens, np.int64))
    for start, first, end in plan_windows(250, SEQ, STRIDE):
        hidden = model.hidden(ids[None, start:end])[0]
        shift = torch.zeros(1, hidden.size(1), requires_grad=True)
        adamw = torch.optim.AdamW([shift], lr=0.01, eps=1e-5, weight_decay=1e-8)
        for _ in range(4 if first > start else 0):
            known = slice(0, first - start)
            loss = F.cross_entropy(model.logits(hidden[known] + shift), ids[start + 1 : first + 1])
            (shift.grad,) = torch.autograd.grad(loss, shift)
            adamw.step()
        logits = model.logits(hidden + shift)[first - start :].detach()
        nll = F.cross_entropy(logits, ids[first + 1 : end + 1], reduction="none")
        assert np.allclose(seen.nll[first:end], nll, atol=1e-4)


def test_slot_computes_the_hidden_states_of_a_window_once(case):
    case = case(250, slot="causal", slot_steps=5)
    model, rows = case.model(), []
    hidden = model.hidden
    model.hidden = lambda ids, *last: rows.append(len(ids)) or hidden(ids, *last)
    case.run(model, slot="causal")
    assert sum(rows) == len(plan_windows(250, SEQ, STRIDE))


def test_only_published_slot_is_illegal_and_scored_without_checks(case):
    case = case(100)
    for slot in ("off", "causal", "published"):
        score = case.run(slot=slot, label="checked", spot_checks=0.5)[0]
        assert score.legal == (score.spot_checks > 0) == (slot != "published")


@pytest.mark.parametrize(
    "slot, ttt, label",
    [
        ("off", False, ""),
        ("off", True, "legal_ttt"),
        ("causal", False, "slot_causal"),
        ("causal", True, "legal_ttt_slot_causal"),
        ("published", False, "illegal_slot_published"),
        ("published", True, "illegal_ttt_slot_published"),
    ],
)
def test_the_label_of_a_score_says_whether_it_is_legal(slot, ttt, label):
    jobs = train_gpt.evaluation_jobs(tiny_config(slot=slot, ttt_enabled=ttt))
    assert [job.label for job in jobs[2:]] == [label] * bool(label)


# --------------------------------------------------------------------------------------------------
# Going on after a stop
# --------------------------------------------------------------------------------------------------
class StopIn(Seen):
    """Wishes to stop during work item `item`, as a signal would."""

    def __init__(self, runtime, item, num_targets):
        super().__init__(num_targets)
        self.runtime, self.item = runtime, item

    def before_item(self, evaluation, item):
        if evaluation.cursor == self.item:
            self.runtime.stop.reason = "SIGTERM"


def result(score):
    return dataclasses.replace(score, seconds=0.0)


MODES = {"sliding": {}, "ttt_slot": dict(ttt=True, slot="causal")}


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_stopped_after_every_item_gives_exactly_the_uninterrupted_score(case, mode):
    case = case(2 * CHUNK, ttt_lr=0.05, ttt_epochs=2, eval_batch_seqs=3)
    options = dict(MODES[mode], label=mode, spot_checks=0.5)
    expected, whole = case.run(**options)
    options.update(checkpoints=case.checkpoints(), identity="weights")
    # The observer of all processes would refuse a target that is scored again.
    observer, stops = StopIn(case.runtime, 0, 2 * CHUNK), 0
    while True:
        try:
            score = case.run(observer=observer, **options)[0]
            break
        except Stopped as stop:
            assert stop.code == 75 and mode in str(stop)
            case.runtime.stop.reason = ""
            observer.item += 1
            stops += 1
    assert stops >= 8 and result(score) == result(expected)
    assert np.array_equal(observer.nll, whole.nll)


def stopped_state(case, **options):
    """Checkpoints with the one state of an evaluation that stopped half-way."""
    checkpoints = case.checkpoints()
    observer = StopIn(case.runtime, 3, case.stream.num_targets)
    with pytest.raises(Stopped):
        case.run(observer=observer, checkpoints=checkpoints, **options)
    case.runtime.stop.reason = ""
    return checkpoints


@pytest.mark.parametrize(
    "change",
    [
        dict(identity="other"),
        dict(label="b"),
        dict(stride=8),
        dict(ttt=True),
        dict(slot="causal"),
        dict(text="another of the same length"),
    ],
)
def test_the_state_of_another_evaluation_is_ignored_with_a_warning(case, change):
    case = case(2 * CHUNK)
    checkpoints = stopped_state(case, identity="mine", label="a")
    options = {**dict(identity="mine", label="a"), **change}
    if options.pop("text", ""):
        options["stream"] = case.stream.replaced(case.stream.tokens[::-1].copy())
    expected = case.run(**options)[0]
    assert result(case.run(checkpoints=checkpoints, **options)[0]) == result(expected)
    assert "warning: " in case.log() and "resumed_evaluation" not in case.log()


def test_rank_0_decides_whether_a_state_is_taken_up(case, monkeypatch):
    """A rank of another machine, which finds another identity, goes along."""
    case = case(2 * CHUNK)
    checkpoints = stopped_state(case, identity="rank 0's")
    monkeypatch.setattr(case.runtime.comm, "from_main", lambda own: own or 1.0)
    case.run(checkpoints=checkpoints, identity="another rank's")
    assert "resumed_evaluation" in case.log()


def test_a_stop_that_cannot_be_saved_is_an_error_of_exit_code_7(case):
    case = case(2 * CHUNK)
    checkpoints = case.checkpoints()
    checkpoints.save = lambda number, state: None  # a full disk
    with pytest.raises(train_gpt.ResourceError, match="could not be written") as error:
        case.run(observer=StopIn(case.runtime, 3, 2 * CHUNK), checkpoints=checkpoints)
    assert error.value.code == 7


def test_a_finished_evaluation_does_not_stop_any_more(case):
    """A signal during the last item comes too late to lose anything."""
    case = case(100)
    items = len(plan_work(plan_windows(100, SEQ, STRIDE), 100, case.config, 4, False))
    last = StopIn(case.runtime, items - 1, 100)
    assert case.run(observer=last, checkpoints=case.checkpoints())[0].tokens == 100


# --------------------------------------------------------------------------------------------------
# Spot checks and the file of scores
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_spot_checks_leave_the_digits_and_the_text_as_they_are(case, mode):
    case = case(3 * CHUNK, ttt_lr=0.05)
    tokens = np.array(case.stream.tokens)
    plain, every = case.run(label="checked", **MODES[mode])
    score, seen = case.run(label="checked", spot_checks=0.5, **MODES[mode])
    assert score.spot_checks > 3
    assert result(score) == dataclasses.replace(result(plain), spot_checks=score.spot_checks)
    assert np.array_equal(seen.nll, every.nll) and np.array_equal(case.stream.tokens, tokens)
    assert f"spot_checks checked rounds:{score.spot_checks} audit_seed:" in case.log()


@pytest.mark.parametrize("distance, after", [(1, 0), (9, 2 * CHUNK)])
def test_spot_checks_see_a_look_ahead_wherever_it_begins(case, monkeypatch, distance, after):
    """A single target's score moves by 1e-3 for the token at `distance`, from target `after` on."""
    case = case(3 * CHUNK, ttt_lr=0.05)
    original = train_gpt.scored_nll

    def looking_ahead(model, hidden, batch, observer):
        first = batch.windows[0].first
        if first >= after:
            ahead = torch.roll(batch.targets, -distance, 1) % 2
            hidden = hidden + 1e-2 * ahead[:, -hidden.size(1) :, None]
        return original(model, hidden, batch, observer)

    monkeypatch.setattr(train_gpt, "scored_nll", looking_ahead)
    with pytest.raises(LegalityError, match="come after them"):
        case.run(label="checked", spot_checks=1.0, ttt=True)


def test_the_rounds_that_are_checked_follow_from_the_seed_or_from_what_is_scored(case):
    case = case(3 * CHUNK)

    def rounds(**options):
        made = train_gpt.Evaluation(
            case.model(), case.stream, case.config, case.runtime, STRIDE, spot_checks=0.3, **options
        )
        return made.spot_seed, made.spots

    assert rounds(identity="a") == rounds(identity="a") != rounds(identity="b")
    case.config = dataclasses.replace(case.config, audit_seed=7)
    assert rounds(identity="a") == rounds(identity="b") and rounds()[0] == 7
    work = [ScoreRound(i, i + 1) for i in range(1000)] + [TrainStep(0, 0, 1, 0.1)] * 50
    drawn = [len(train_gpt.draw_rounds(work, share, 1)) for share in (0, 1e-9, 0.01, 1)]
    assert drawn == [0, 1, 10, 1000]


@pytest.mark.parametrize("ttt", [False, True])
def test_only_adapted_scores_depend_on_the_number_of_threads(case, monkeypatch, ttt):
    case = case(2 * CHUNK, ttt_lr=0.05)
    checkpoints = stopped_state(case, ttt=ttt)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    case.run(checkpoints=checkpoints, ttt=ttt)
    assert ("resumed_evaluation" in case.log()) is not ttt


def test_the_file_of_scores_holds_every_nll_that_was_counted(case, tmp_path):
    case = case(2 * CHUNK, ttt_lr=0.05)
    expected, seen = case.run(ttt=True)
    file = train_gpt.ScoresFile(2 * CHUNK)
    score, _ = case.run(ttt=True, observer=file)
    file.write(tmp_path / "scores.f32", case.runtime)
    found = np.fromfile(tmp_path / "scores.f32", "<f4")
    assert np.array_equal(found, seen.nll.astype(np.float32)) and result(score) == result(expected)
    assert score.val_loss == pytest.approx(found.astype(float).mean(), rel=1e-9)
