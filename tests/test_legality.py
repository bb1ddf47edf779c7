"""Legality: the audit passes what is legal and catches each violation; one artifact has one score.
Legality: the audit passes what is legal and catches each violation; one artifact has one score."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHUNK,
    EVERY_PART,
    ROOT,
    SEQ,
    events,
    launch,
    random_model,
    read_json,
    run_main,
    same,
    tiny_config,
    weights,
)

import train_gpt

MODES = {
    "sliding": dict(ttt_enabled=False),
    "ttt": dict(ttt_enabled=True),
    "slot": dict(ttt_enabled=False, slot="causal"),
    "ttt_slot": dict(ttt_enabled=True, slot="causal"),
}
CHECKS = set(train_gpt.CHECKS)


def failed(case, model=None):
    """Names of the checks that a legal audit would have passed and this one did not."""
    checks = train_gpt.audit(model or case.model(), case.stream, case.config, case.runtime)
    return {check["name"] for check in checks if not check["passed"]}


# --------------------------------------------------------------------------------------------------
# What is legal passes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
def test_a_legal_evaluation_passes_every_check(case, mode):
    case = case(3 * CHUNK, ttt_lr=0.05, **MODES[mode])
    model = case.model()
    before = weights(model)
    checks = train_gpt.audit(model, case.stream, case.config, case.runtime)
    assert {check["name"] for check in checks} == CHECKS and len(checks) == len(CHECKS)
    assert [check for check in checks if not check["passed"]] == []
    assert same(before, weights(model))
    for name in CHECKS:
        assert f"legality {name} pass " in case.log()


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="bfloat16"),
        EVERY_PART,
        dict(eval_stride=SEQ),
        dict(eval_batch_seqs=1),
        dict(eval_stride=37, eval_batch_seqs=3, ttt_freeze_blocks=0, ttt_epochs=2),
    ],
    ids=lambda c: "-".join(c),
)
def test_other_shapes_and_every_part_of_the_model_pass_too(case, changes):
    assert failed(case(3 * CHUNK, **changes)) == set()


def test_a_stream_shorter_than_the_audits_slice_passes(case):
    assert failed(case(SEQ)) == set()


# --------------------------------------------------------------------------------------------------
# One violation per check
# --------------------------------------------------------------------------------------------------
def peek(patch, distance):
    """Every state also holds something of the token `distance` places after its input."""
    original = train_gpt.GPT.hidden

    def hidden(self, ids, last=None):
        ahead = F.pad(ids[:, distance:], (0, distance), value=5)
        states = original(self, ids, last)
        return states + 0.1 * self.tok_emb(ahead)[:, -states.size(1) :]

    patch.setattr(train_gpt.GPT, "hidden", hidden)


def look_ahead_by_one(patch):
    peek(patch, 1)


def look_ahead_by_two(patch):
    peek(patch, 2)


def train_first(patch):
    """Each chunk's steps come before its scores."""
    original = train_gpt.plan_work

    def plan(windows, targets, config, per_round, ttt):
        def chunk_and_kind(item):
            is_score = isinstance(item, train_gpt.ScoreRound)
            first = windows[item.low].first if is_score else item.first
            return first // config.ttt_chunk_tokens, is_score

        return sorted(original(windows, targets, config, per_round, ttt), key=chunk_and_kind)

    patch.setattr(train_gpt, "plan_work", plan)


def train_on_the_next_chunk(patch):
    original = train_gpt.plan_work

    def plan(windows, targets, config, per_round, ttt):
        work = original(windows, targets, config, per_round, ttt)
        chunk = config.ttt_chunk_tokens
        return [
            item._replace(first=item.first + chunk)
            if isinstance(item, train_gpt.TrainStep)
            else item
            for item in work
        ]

    patch.setattr(train_gpt, "plan_work", plan)


def train_on_other_tokens_than_planned(patch):
    original = train_gpt.Evaluation.train

    def train(self, item):
        original(self, item._replace(first=item.first + CHUNK))

    patch.setattr(train_gpt.Evaluation, "train", train)


def train_on_other_tokens_in_secret(patch):
    """The same, and the refusal is out of the way."""
    original = train_gpt.Evaluation.train

    def train(self, item):
        scored, self.scored_until = self.scored_until, 1 << 40
        original(self, item._replace(first=item.first + CHUNK // 2))
        self.scored_until = scored

    patch.setattr(train_gpt.Evaluation, "train", train)


def train_on_a_late_chunk_first(patch):
    """The short runs of an audit do not get there."""
    original = train_gpt.plan_work

    def plan(windows, targets, config, per_round, ttt):
        work = original(windows, targets, config, per_round, ttt)
        late = [
            i
            for i, item in enumerate(work)
            if isinstance(item, train_gpt.TrainStep) and item.first >= 4 * CHUNK
        ]
        if late:
            work.insert(late[0] - 3, work[late[0]])
        return work

    patch.setattr(train_gpt, "plan_work", plan)


def slot_off_by_one(patch):
    """The shift is also fitted on the first target that the window scores."""
    original = train_gpt.slot_shift

    def shift(model, hidden, batch, config, slot):
        windows = [w._replace(first=min(w.first + 1, w.end)) for w in batch.windows]
        return original(model, hidden, batch._replace(windows=windows), config, slot)

    patch.setattr(train_gpt, "slot_shift", shift)


def look_ahead(when):
    """Final states hold something of the next token, in the evaluations that `when` chooses."""

    def violation(patch):
        original = train_gpt.scored_nll

        def scored(model, hidden, batch, observer):
            if when(peeking[0], batch):
                hidden = hidden + 0.05 * model.tok_emb(batch.targets)[:, -hidden.size(1) :]
            return original(model, hidden, batch, observer)

        def batch_nll(self, *args):
            peeking[0] = self
            return original_batch(self, *args)

        peeking, original_batch = [None], train_gpt.Evaluation.batch_nll
        patch.setattr(train_gpt.Evaluation, "batch_nll", batch_nll)
        patch.setattr(train_gpt, "scored_nll", scored)

    return violation


look_ahead_in_the_roundtrip = look_ahead(lambda evaluation, batch: batch.count == SEQ)
look_ahead_with_test_time_training = look_ahead(lambda evaluation, batch: evaluation.ttt)
look_ahead_after_some_training = look_ahead(
    lambda evaluation, batch: evaluation.sgd is not None and len(evaluation.sgd.state) > 0
)


def free_targets(which):
    """Targets that `which(indices, tokens)` chooses cost nothing."""

    def violation(patch):
        original = train_gpt.scored_nll

        class Generous(train_gpt.Observer):
            def __init__(self, observer, batch):
                self.observer, self.tokens = observer, batch.targets[: len(batch.windows)]
                self.tokens = self.tokens[:, -batch.count :].flatten().numpy()

            def scored(self, targets, logps, nll):
                nll[torch.from_numpy(which(targets, self.tokens))] *= 0.0
                self.observer.scored(targets, logps, nll)

        def scored(model, hidden, batch, observer):
            return original(model, hidden, batch, Generous(observer, batch))

        patch.setattr(train_gpt, "scored_nll", scored)

    return violation


better_at_some_targets = free_targets(lambda targets, tokens: targets % 97 == 50)
# The texts of these tests hold neither, but other texts do.
controls_are_free = free_targets(lambda targets, tokens: tokens < 4)
bytes_are_free = free_targets(lambda targets, tokens: (tokens > 3) & (tokens < 260))


def bonus_where_the_model_is_sure(patch):
    """Which the model of these tests never is."""
    original = train_gpt.log_probs

    def log_probs(logits):
        logps = original(logits)
        return torch.where(logps > -0.1, 0.5 * logps, logps)

    patch.setattr(train_gpt, "log_probs", log_probs)


def bonus_in_every_tenth_item(patch):
    """Short runs have few items."""
    original = train_gpt.Evaluation.states

    def states(self, batch):
        ahead = 0.05 * self.model.tok_emb(batch.targets) * (self.cursor % 10 == 9)
        hidden = original(self, batch)
        return hidden + ahead[:, -hidden.size(1) :]

    patch.setattr(train_gpt.Evaluation, "states", states)


def result_with(**factors):
    def violation(patch):
        original = train_gpt.Evaluation.result

        def result(self, complete):
            score = original(self, complete)
            return dataclasses.replace(
                score, **{k: getattr(score, k) * f for k, f in factors.items()}
            )

        patch.setattr(train_gpt.Evaluation, "result", result)

    return violation


lower_loss, lower_bits = result_with(val_loss=0.95), result_with(val_bpb=0.99)


def large_ln_2(patch):
    patch.setattr(train_gpt, "bits_per_byte", lambda nats, num_bytes: nats / 0.7 / num_bytes)


def some_bytes_twice(patch):
    original = train_gpt.TokenBytes.count

    def count(self, prev_ids, target_ids):
        return original(self, prev_ids, target_ids) + (np.asarray(target_ids) % 5 == 0)

    patch.setattr(train_gpt.TokenBytes, "count", count)


def unnormalised_head(patch):
    patch.setattr(train_gpt, "log_probs", lambda logits: logits - logits.amax(-1, keepdim=True))


def slightly_unnormalised_head(patch):
    patch.setattr(train_gpt, "log_probs", lambda logits: F.log_softmax(logits.float(), -1) + 3e-4)


class Generous(torch.Tensor):
    """Log-probabilities that look right and give better entries than they hold."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        is_entry = getattr(function, "__name__", "") in ("gather", "take_along_dim", "nll_loss")
        return 0.9 * out if is_entry else out


def better_entries(patch):
    original = train_gpt.log_probs
    patch.setattr(train_gpt, "log_probs", lambda logits: original(logits).as_subclass(Generous))


def count_less(patch):
    """The sum does not hold what was observed."""
    original = train_gpt.Meter.add

    def add(self, windows, nll, num_bytes):
        original(self, windows, 0.9 * nll, num_bytes)

    patch.setattr(train_gpt.Meter, "add", add)


def change_weights_while_scoring(patch):
    original = train_gpt.GPT.hidden

    def hidden(self, ids, last=None):
        with torch.no_grad():
            self.smear.gate.add_(1e-4)
        return original(self, ids, last)

    patch.setattr(train_gpt.GPT, "hidden", hidden)


def no_reset_at_bos(patch):
    original = train_gpt.SmearGate.forward

    def forward(self, x, ids):
        return original(self, x, torch.full_like(ids, 5))

    patch.setattr(train_gpt.SmearGate, "forward", forward)


def tail_twice(patch):
    """The last window scores eight targets of the one before it again."""
    original = train_gpt.plan_windows

    def plan(*args):
        windows = original(*args)
        start, first, _ = windows[-1]
        return [*windows[:-1], windows[-1]._replace(first=max(start, first - 8))]

    patch.setattr(train_gpt, "plan_windows", plan)


def tail_twice_with_a_meter_that_counts(patch):
    tail_twice(patch)

    def add(self, windows, nll, num_bytes):
        for _, first, end in windows:
            self.coverage[first:end] += 1
            self.tokens, self.last = self.tokens + end - first, end
        self.nll, self.bytes = self.nll + nll, self.bytes + num_bytes

    patch.setattr(train_gpt.Meter, "add", add)


def tail_twice_with_a_meter_that_hides_it(patch):
    tail_twice(patch)

    def add(self, windows, nll, num_bytes):
        for _, first, end in windows:
            self.coverage[first:end] = 1
            self.tokens, self.last = self.tokens + end - first, end
        self.nll, self.bytes = self.nll + nll, self.bytes + num_bytes

    patch.setattr(train_gpt.Meter, "add", add)


def tail_left_out(patch):
    original = train_gpt.plan_windows
    patch.setattr(train_gpt, "plan_windows", lambda *args: original(*args)[:-1])


VIOLATIONS = [
    (look_ahead_by_one, "C1 own_token"),
    (look_ahead_by_two, "C1 future_flip"),
    (no_reset_at_bos, "rule smear_bos"),
    (unnormalised_head, "C2 normalised"),
    (slightly_unnormalised_head, "C2 normalised"),
    (better_entries, "C2 nll_is_entry"),
    (count_less, "C2 nll_is_entry"),
    (train_first, "C3 trained_is_scored"),
    (train_on_the_next_chunk, "C3 trained_is_scored"),
    (train_on_other_tokens_than_planned, "C3 trained_is_scored"),
    (train_on_other_tokens_in_secret, "C3 twin_run"),
    (train_on_a_late_chunk_first, "C3 trained_is_scored"),
    (look_ahead_in_the_roundtrip, "C1 dense_sweep"),
    (look_ahead_with_test_time_training, "C1 own_token"),
    (look_ahead_after_some_training, "C1 own_token"),
    (better_at_some_targets, "C2 nll_is_entry"),
    (controls_are_free, "C2 nll_is_entry"),
    (bytes_are_free, "C2 nll_is_entry"),
    (bonus_where_the_model_is_sure, "C2 normalised"),
    (bonus_in_every_tenth_item, "C1 dense_sweep"),
    (lower_loss, "C4 score"),
    (lower_bits, "C4 score"),
    (large_ln_2, "C4 score"),
    (some_bytes_twice, "C4 score"),
    (change_weights_while_scoring, "C3 state_unchanged"),
    (tail_twice, "C4"),
    (tail_twice_with_a_meter_that_counts, "C4"),
    (tail_twice_with_a_meter_that_hides_it, "C4"),
    (tail_left_out, "C4"),
]
# Each of these breaks one promise and keeps the others.
PURE = (
    no_reset_at_bos,
    unnormalised_head,
    slightly_unnormalised_head,
    train_on_other_tokens_in_secret,
    lower_loss,
)


@pytest.mark.parametrize("violation, check", VIOLATIONS, ids=range(len(VIOLATIONS)))
def test_a_violation_is_caught_by_the_check_meant_for_it(case, monkeypatch, violation, check):
    case = case(1450, ttt_lr=0.05)
    model = case.model()
    violation(monkeypatch)
    case.stream = case.stream.replaced(case.stream.tokens)  # its bytes are counted anew
    found = failed(case, model)
    assert any(name.startswith(check) for name in found), found


@pytest.mark.parametrize("violation", PURE, ids=range(len(PURE)))
def test_a_violation_fails_no_check_of_what_still_holds(case, monkeypatch, violation):
    """A check that failed with every violation would tell a reviewer nothing."""
    case = case(3 * CHUNK, ttt_lr=0.05)
    model = case.model()
    violation(monkeypatch)
    assert failed(case, model) == {dict(VIOLATIONS)[violation]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(ttt_enabled=False),
        dict(ttt_enabled=False, eval_seq_len=256, eval_stride=16, eval_batch_seqs=8),
    ],
)
def test_slot_fitted_on_one_target_too_many_is_found_by_the_dense_sweep(case, monkeypatch, changes):
    case = case(1450, slot="causal", slot_lr=0.05, ttt_chunk_tokens=512, **changes)
    assert failed(case) == set()
    slot_off_by_one(monkeypatch)
    assert failed(case) == {"C1 own_token", "C1 dense_sweep"}


@pytest.mark.parametrize("ttt", [False, True])
def test_published_slot_fails_the_causality_check(case, ttt):
    case = case(3 * CHUNK, slot="published", ttt_enabled=ttt)
    assert "C1 future_flip" in failed(case)


# --------------------------------------------------------------------------------------------------
# One artifact, one score
# --------------------------------------------------------------------------------------------------
LABELS = ("final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")


def exact_lines(text):
    return [
        line for line in text.splitlines() if "_exact " in line and not line.startswith("pre_quant")
    ]


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A finished training run by a script of its own: (its directory, its output)."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(ROOT / "train_gpt.py", folder)
    done = launch(dict(tiny_data.settings, run_dir=folder / "run"), folder, script="train_gpt.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run", done.stdout


GUARD = """
import os, sys
notes = open(os.environ["OPENED_FILES"], "a", buffering=1)
def watch(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"no network in evaluation: {event}")
    if event == "open" and str(args[0]).endswith((".bin", ".ptz", ".pt", ".model")):
        notes.write(f"{args[0]}\\n")
        if "train_0" in str(args[0]):
            raise PermissionError("no training data in evaluation")
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def reviewed(trained, tiny_data, tmp_path_factory):
    """(directory, process, opened files): the artifact scored where there is nothing else, under a
    guard."""
    folder, guard = tmp_path_factory.mktemp("reviewer"), tmp_path_factory.mktemp("guard")
    shutil.copy(trained[0].parent / "train_gpt.py", folder)
    shutil.copy(trained[0] / "final_model.int6.ptz", folder)
    shutil.copy(tiny_data.tokenizer_path, folder / "tokenizer.model")
    shutil.copy(tiny_data.data_path / "fineweb_val_000000.bin", folder)
    (guard / "sitecustomize.py").write_text(GUARD)
    settings = dict(
        eval_only="final_model.int6.ptz",
        data_path=".",
        tokenizer_path="tokenizer.model",
        audit=1,
        run_dir="out",
        device="cpu",
        pythonpath=guard,
        opened_files=guard / "opened",
    )
    done = launch(settings, folder, script="train_gpt.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, done, (guard / "opened").read_text().splitlines()


def test_the_artifact_alone_gives_the_training_runs_scores_digit_for_digit(trained, reviewed):
    expected = exact_lines(trained[1])
    assert [line.split()[0] for line in expected] == [f"{label}_exact" for label in LABELS]
    assert exact_lines(reviewed[1].stdout) == expected
    assert reviewed[1].stdout.count("score_scope:proxy") >= len(LABELS)


def test_evaluation_opens_no_training_shard_and_no_network(reviewed):
    opened = reviewed[2]
    assert any("fineweb_val_" in path for path in opened) and any(
        path.endswith(".ptz") for path in opened
    )
    assert [path for path in opened if "fineweb_train" in path] == []


def test_the_audit_of_the_real_run_is_printed_and_written(reviewed):
    folder, done, _ = reviewed
    report = read_json(folder / "out" / "audit.json")
    assert report["passed"] is True and {check["name"] for check in report["checks"]} == CHECKS
    for name in CHECKS:
        assert f"legality {name} pass " in done.stdout
    assert [event["passed"] for event in events(folder / "out", "audit")] == [True]


def test_the_manifest_comes_before_any_result_and_is_written(reviewed, tiny_data):
    folder, done, _ = reviewed
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("manifest:"))
    assert not [
        line for line in lines[:at] if line.startswith(("legality", "audit", *LABELS, "val_loader"))
    ]
    manifest = json.loads(lines[at][len("manifest:") :])
    assert manifest == read_json(folder / "out" / "manifest.json")
    for name, path in (
        ("artifact", folder / "final_model.int6.ptz"),
        ("code", folder / "train_gpt.py"),
    ):
        assert manifest[f"{name}_sha256"] == train_gpt.sha256_file(path)
        assert manifest[f"{name}_bytes"] == path.stat().st_size
    assert manifest["tokenizer_sha256"] == train_gpt.sha256_file(tiny_data.tokenizer_path)
    assert manifest["torch"] == torch.__version__ and manifest["numpy"] == np.__version__
    assert (
        manifest["device"] == "cpu"
        and manifest["world_size"] == 1
        and len(manifest["config_hash"]) == 16
    )
    token_bytes = train_gpt.TokenBytes(tiny_data.tokenizer_path)
    stream = train_gpt.ValidationSet.load(
        tiny_config(data_path=str(tiny_data.data_path)), token_bytes
    )
    assert manifest["data"] == dict(train_shards=0, **stream.fingerprint)


def test_an_illegal_configuration_ends_with_exit_code_6_and_its_report(score_artifact, tmp_path):
    done = score_artifact(slot="published")
    assert done.code == 6 and "legality C1 future_flip FAIL" in done.out
    assert "C1 future_flip" in done.err and "Traceback" not in done.err
    report = read_json(done.dir / "audit.json")
    assert report["passed"] is False
    assert "C1 future_flip" in {check["name"] for check in report["checks"] if not check["passed"]}
    assert exact_lines(done.out) == []  # no score of an evaluation that failed its audit
    assert [event["code"] for event in events(done.dir, "error")] == [6]


@pytest.fixture
def score_artifact(tmp_path, trained, tiny_data):
    """call(**settings) -> Finished of main() on the trained artifact."""
    artifact = trained[0] / "final_model.int6.ptz"

    def call(**settings):
        fixed = dict(tiny_data.paths, eval_only=artifact, device="cpu")
        return run_main(tmp_path / "out", **{**fixed, **settings})

    return call


def test_a_score_of_published_slot_is_marked_illegal_everywhere(
    score_artifact, tiny_data, tmp_path
):
    """Also: evaluation asks nothing of training shards that cannot be read."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_data.data_path / "fineweb_val_000000.bin", data)
    (data / "fineweb_train_000000.bin").mkdir()
    found = score_artifact(slot="published", ttt_enabled=0, data_path=data, audit=0)
    out, output = found.dir, found.lines
    lines = [
        line for line in output if line.startswith("illegal_slot_published") and "val_bpb" in line
    ]
    assert len(lines) == 2 and all(line.endswith(" legality:illegal") for line in lines)
    scores = read_json(out / "scores.json")["scores"]
    assert {label: score["legal"] for label, score in scores.items()} == {
        "final_int6_roundtrip": True,
        "final_int6_sliding_window": True,
        "illegal_slot_published": False,
    }
    assert [event["legal"] for event in events(out, "score")] == [True, True, False]


def test_the_audit_alone_scores_nothing(score_artifact):
    found = score_artifact(mode="audit")
    assert read_json(found.dir / "audit.json")["passed"] is True
    assert exact_lines(found.out) == [] and not (found.dir / "scores.json").exists()


def test_the_training_run_scores_the_file_it_wrote(tiny_data, runtime, monkeypatch, tmp_path):
    """Another model is written in the place of the one in memory: the scores must be the written
    one's."""
    config = tiny_config(
        data_path=str(tiny_data.data_path),
        tokenizer_path=str(tiny_data.tokenizer_path),
        ttt_enabled=False,
        run_dir=str(tmp_path / "run"),
    )
    made = runtime(config)
    run = train_gpt.Run(config, made)
    run.prepare()
    trained_state, written_state = (random_model(config, seed=seed).state_dict() for seed in (1, 2))
    info = dict(steps=0, train_time_s=0.0, step_avg_ms=0.0, stopped_early=False, peak_mib=0)
    train_gpt.save_tensors(
        run.path / train_gpt.FLOAT_NAME,
        dict(config=config.as_dict("arch", "eval"), state_dict=trained_state, info=info),
    )
    fit = train_gpt.fit_budget
    monkeypatch.setattr(
        train_gpt, "fit_budget", lambda config, _, *rest: fit(config, written_state, *rest)
    )
    run.pack()
    run.score()
    scores = {label: score["val_loss"] for label, score in run.results["scores"].items()}
    for label, state in (("pre_quant", trained_state), ("final_int6_roundtrip", written_state)):
        model = random_model(config)
        packed = train_gpt.pack_artifact(config, state)
        model.load_state_dict(
            state if label == "pre_quant" else train_gpt.unpack_artifact(packed)[1]
        )
        assert (
            scores[label]
            == train_gpt.evaluate(model, run.val, config, made, config.eval_seq_len).val_loss
        )
