"""Legality: the audit passes what is legal and catches violations; one artifact has one score."""

import re
import shutil

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
    log_of,
    random_model,
    read_json,
    run_main,
    same,
    tiny_config,
    weights,
)
from violations import (
    VIOLATIONS,
    at_normaliser,
    at_plan,
    at_states,
    named,
    nats_times,
    reordered,
    smear,
    undo,
)

import train_gpt

MODES = {
    "sliding": dict(ttt_enabled=False),
    "ttt_slot": dict(ttt_enabled=True, slot="causal"),
}
CHECKS = set(train_gpt.CHECKS)


def failed(case, model=None):
    """Names of the checks that fail in an audit."""
    checks = train_gpt.audit(model or case.model(), case.stream, case.config, case.runtime)
    return {check["name"] for check in checks if not check["passed"]}


# --------------------------------------------------------------------------------------------------
# Legal evaluations pass
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
    assert "_progress" not in case.log() and "spot_checks" not in case.log()


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="bfloat16"),
        EVERY_PART,
        dict(eval_stride=SEQ),
        dict(eval_batch_seqs=1, slot="causal"),
        dict(eval_stride=37, eval_batch_seqs=3, ttt_freeze_blocks=0, ttt_epochs=2),
    ],
    ids=lambda c: "-".join(c),
)
def test_other_shapes_and_every_part_of_the_model_pass_too(case, changes):
    assert failed(case(3 * CHUNK, **changes)) == set()


@pytest.mark.parametrize("targets", [SEQ // 2, CHUNK, CHUNK + 1])
def test_a_text_shorter_than_what_the_audit_looks_at_passes(case, targets):
    assert failed(case(targets)) == set()


# --------------------------------------------------------------------------------------------------
# Illegal ones fail
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def unpatched():
    """Puts train_gpt back after the test."""
    yield
    undo()


@pytest.fixture
def on_shards(tiny_data, runtime, unpatched):
    """make(**changes) -> (model, text, Config, Runtime) as a run would load them."""

    def make(**changes):
        config = tiny_config(**tiny_data.paths, ttt_lr=0.05, **changes)
        val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
        return random_model(config), val, config, runtime(config)

    return make


@pytest.mark.parametrize(
    "violation", [v for v in VIOLATIONS if v.caught_by == "both"], ids=lambda v: v.name
)
def test_the_audit_catches_a_violation_that_is_listed_as_its_own(on_shards, violation):
    violation.apply()
    settings = {name.lower(): value for name, value in violation.settings}  # all are texts: SLOT
    checks = train_gpt.audit(*on_shards(**settings))
    assert not all(check["passed"] for check in checks)


def test_the_names_that_the_other_violations_patch_exist(unpatched):
    for violation in VIOLATIONS:
        if violation.caught_by != "both":
            violation.apply()


@torch.no_grad()
def changed_weights(evaluation, batch, hidden):
    evaluation.model.smear.gate.add_(1e-4)
    return hidden


def tail_twice(windows):
    """The last window scores eight targets of the one before it again."""
    last = windows[-1]
    return [*windows[:-1], last._replace(first=max(last.start, last.first - 8))]


@pytest.mark.parametrize(
    "apply, check",
    [
        (at_states(changed_weights), "C1 future_flip"),
        (at_normaliser(lambda x: F.log_softmax(x, -1) + 3e-4), "C2 nll_is_entry"),
        (reordered(lambda chunk: 0), "C3 trained_is_scored"),
        (named("next_chunk_trained").apply, "C3 twin_run"),
        (at_plan(tail_twice), "C4 single_pass"),
        (at_plan(lambda windows: windows[:-1]), "C4 single_pass"),
        (nats_times(lambda evaluation: 0.95), "C4 score"),
        (smear(lambda mix, x, ids: mix(x, torch.full_like(ids, 5))), "rule smear_bos"),
    ],
)
def test_each_check_fails_alone_where_only_its_promise_is_broken(case, unpatched, apply, check):
    """A check that failed with every violation would tell a reviewer nothing."""
    case = case(3 * CHUNK, ttt_lr=0.05)
    model = case.model()
    apply()
    assert failed(case, model) == {check}


def test_published_slot_fails_the_causality_check(case):
    assert "C1 future_flip" in failed(case(3 * CHUNK, slot="published", ttt_enabled=False))


# --------------------------------------------------------------------------------------------------
# One artifact, one score
# --------------------------------------------------------------------------------------------------
LABELS = ("final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt")


def exact_lines(text):
    return re.findall(r"^(?!pre_quant)\w+_exact .*$", text, re.M)


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


def test_the_artifact_alone_gives_the_training_runs_scores_digit_for_digit(
    whole, tiny_data, tmp_path
):
    """Scored where there is nothing else, it opens no training shard and no network."""
    folder, guard = tmp_path / "reviewer", tmp_path / "guard"
    for made in (folder, guard, folder / "fineweb_train_000000.bin"):
        made.mkdir()
    shutil.copy(ROOT / "train_gpt.py", folder)
    shutil.copy(whole / "final_model.int6.ptz", folder)
    shutil.copy(tiny_data.tokenizer_path, folder / "tokenizer.model")
    shutil.copy(tiny_data.data_path / "fineweb_val_000000.bin", folder)
    (guard / "sitecustomize.py").write_text(GUARD)
    settings = dict(
        eval_only="final_model.int6.ptz",
        data_path=".",
        tokenizer_path="tokenizer.model",
        run_dir="out",
        device="cpu",
        dtype="float32",
        pythonpath=guard,
        opened_files=guard / "opened",
    )
    done = launch(settings, folder, script="train_gpt.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = exact_lines(log_of(whole))
    # The last line repeats the headline score under the challenge's own name.
    labels = [*LABELS, "final_int8_zlib_roundtrip"]
    assert [line.split()[0] for line in expected] == [f"{label}_exact" for label in labels]
    assert expected[-1].split()[1:] == expected[-2].split()[1:]
    assert exact_lines(done.stdout) == expected and "audit pass " in done.stdout
    opened = (guard / "opened").read_text()
    assert "fineweb_val_" in opened and ".ptz" in opened and "fineweb_train" not in opened


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
def score_artifact(tmp_path, whole, tiny_data):
    """call(**settings) -> Finished of main() on a run's artifact."""
    fixed = dict(tiny_data.paths, eval_only=whole / "final_model.int6.ptz", device="cpu")
    return lambda **settings: run_main(tmp_path / "out", **fixed, **settings)


def test_the_audit_alone_scores_nothing(score_artifact):
    found = score_artifact(mode="audit")
    assert read_json(found.dir / "audit.json")["passed"] is True
    assert exact_lines(found.out) == [] and not (found.dir / "scores.json").exists()
