"""Legality: the audit passes what is legal and catches violations; one artifact has one score."""

import json
import re
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
    "ttt": dict(ttt_enabled=True),
    "slot": dict(ttt_enabled=False, slot="causal"),
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
    """(directory, process, opened files): the artifact scored alone, under a guard."""
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
    # The last line repeats the headline score under the challenge's own name.
    labels = [*LABELS, "final_int8_zlib_roundtrip"]
    assert [line.split()[0] for line in expected] == [f"{label}_exact" for label in labels]
    assert expected[-1].split()[1:] == expected[-2].split()[1:]
    assert exact_lines(reviewed[1].stdout) == expected
    assert reviewed[1].stdout.count("score_scope:proxy") >= len(LABELS)


def test_evaluation_opens_no_training_shard_and_no_network(reviewed):
    opened = reviewed[2]
    kinds = ("fineweb_val_", ".ptz", "fineweb_train")
    assert [any(kind in path for path in opened) for kind in kinds] == [True, True, False]


def test_the_audit_of_the_real_run_is_printed_and_written(reviewed):
    folder, done, _ = reviewed
    report = read_json(folder / "out" / "audit.json")
    assert report["passed"] is True and {check["name"] for check in report["checks"]} == CHECKS
    for name in CHECKS:
        assert f"legality {name} pass " in done.stdout
    assert [event["passed"] for event in events(folder / "out", "audit")] == [True]


def test_the_manifest_comes_before_any_result_and_is_written(reviewed, tiny_data):
    folder, done, _ = reviewed
    before, after = re.split("^manifest:", done.stdout, maxsplit=1, flags=re.M)
    assert not re.search(rf"^(legality|audit|val_loader|{'|'.join(LABELS)})", before, re.M)
    manifest = json.loads(after.splitlines()[0])
    assert manifest == read_json(folder / "out" / "manifest.json")
    for name, file in (("artifact", "final_model.int6.ptz"), ("code", "train_gpt.py")):
        assert manifest[f"{name}_sha256"] == train_gpt.sha256_file(folder / file)
        assert manifest[f"{name}_bytes"] == (folder / file).stat().st_size
    assert manifest["tokenizer_sha256"] == train_gpt.sha256_file(tiny_data.tokenizer_path)
    assert manifest["torch"] == torch.__version__ and manifest["numpy"] == np.__version__
    assert manifest["device"] == "cpu" and manifest["world_size"] == 1
    assert len(manifest["config_hash"]) == 16
    config = tiny_config(**tiny_data.paths)
    val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
    assert manifest["data"] == dict(train_shards=0, **val.fingerprint)


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
    lines = re.findall(r"^illegal_slot_published.* val_bpb.*$", found.out, re.M)
    assert len(lines) == 2 and all(line.endswith(" legality:illegal") for line in lines)
    assert {label: score["legal"] for label, score in found.scores().items()} == {
        "final_int6_roundtrip": True,
        "final_int6_sliding_window": True,
        "illegal_slot_published": False,
    }
    assert [event["legal"] for event in events(found.dir, "score")] == [True, True, False]


def test_the_audit_alone_scores_nothing(score_artifact):
    found = score_artifact(mode="audit")
    assert read_json(found.dir / "audit.json")["passed"] is True
    assert exact_lines(found.out) == [] and not (found.dir / "scores.json").exists()


def test_a_training_run_scores_the_file_that_was_written(tiny_data, runtime, tmp_path):
    """The file holds another model than the float weights."""
    config = tiny_config(**tiny_data.paths, ttt_enabled=False, run_dir=str(tmp_path / "run"))
    run = train_gpt.Run(config, runtime(config))
    run.prepare()
    floats, written = (random_model(config, seed=seed) for seed in (1, 2))
    info = dict(steps=0, train_time_s=0.0, step_avg_ms=0.0, stopped_early=False, peak_mib=0)
    content = dict(config=config.as_dict("arch", "eval"), state_dict=floats.state_dict(), info=info)
    train_gpt.save_tensors(run.path / train_gpt.FLOAT_NAME, content)
    blob = train_gpt.pack_artifact(config, written.state_dict())
    train_gpt.write_atomic(run.artifact_path, [blob])
    run.score()
    written.load_state_dict(train_gpt.unpack_artifact(blob)[1])
    for label, model in (("pre_quant", floats), ("final_int6_roundtrip", written)):
        expected = train_gpt.evaluate(model, run.val, config, run.runtime, config.eval_seq_len)
        assert run.results["scores"][label]["val_loss"] == expected.val_loss
