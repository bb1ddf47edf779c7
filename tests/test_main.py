"""Section main: scores belong to files, places are safe, and what a person reads."""

import dataclasses
import re
import shutil

import pytest
from helpers import ROOT, exact_scores, launch, read_json, run_main

import train_gpt

SCORES = ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A finished run: (folder, settings)."""
    folder = tmp_path_factory.mktemp("trained")
    settings = dict(tiny_data.settings, run_dir="run")
    done = run_main(cwd=folder, **settings)
    assert done.code == 0, done.err
    return folder, settings


def artifact_in(cwd, trained):
    """Settings of EVAL_ONLY on a copy of the artifact in `cwd`."""
    folder, settings = trained
    if not (cwd / "model.ptz").exists():
        shutil.copy(folder / "run" / train_gpt.ARTIFACT_NAME, cwd / "model.ptz")
    data = {name: settings[name] for name in ("data_path", "tokenizer_path")}
    return dict(data, device="cpu", eval_only="model.ptz")


def evaluate(trained, cwd, **settings):
    """Score a copy of the artifact in `cwd`."""
    return run_main(cwd=cwd, **artifact_in(cwd, trained), **settings)


def test_a_given_file_is_audited_and_every_score_is_computed_anew(trained, tmp_path):
    first = evaluate(trained, tmp_path)
    assert first.code == 0, first.err
    assert list(exact_scores(first.out)) == SCORES
    assert "audit pass" in first.out
    again = evaluate(trained, tmp_path)
    assert exact_scores(again.out) == exact_scores(first.out)
    assert "audit pass" in again.out and "phase_done" not in again.out


def test_another_artifact_under_the_same_name_gets_its_own_scores(trained, tiny_data, tmp_path):
    before = evaluate(trained, tmp_path, run_dir="out")
    other = run_main(
        cwd=tmp_path, **dict(tiny_data.settings, run_dir="other", seed=7, iterations=1)
    )
    assert other.code == 0, other.err
    shutil.copy(tmp_path / "other" / train_gpt.ARTIFACT_NAME, tmp_path / "model.ptz")
    after = evaluate(trained, tmp_path, run_dir="out")
    truth = exact_scores(other.out)
    assert exact_scores(after.out) == {label: truth[label] for label in SCORES}
    assert exact_scores(after.out) != exact_scores(before.out)


def test_finished_scores_that_came_with_a_folder_are_not_believed(trained, tmp_path):
    honest = evaluate(trained, tmp_path)
    scores = next(tmp_path.glob("runs/eval_*/scores.json"))
    forged = re.sub(r'"val_bpb": [0-9.]+', '"val_bpb": 1.0', scores.read_text())
    assert forged != scores.read_text()
    scores.write_text(forged)
    again = evaluate(trained, tmp_path)
    assert exact_scores(again.out) == exact_scores(honest.out)
    assert "1.0000" not in re.findall(r"^result .*", again.out, re.M)[-1]


def test_an_edited_script_does_not_go_on_with_a_run(trained, tmp_path):
    folder, settings = trained
    script = tmp_path / "train_gpt.py"
    script.write_text((ROOT / "train_gpt.py").read_text() + "# edited\n")
    shutil.copytree(folder / "run", tmp_path / "run")
    again = launch(settings, tmp_path, script=script)
    assert again.returncode == 2
    assert "holds a run of other settings, data or code: train_gpt.py:" in again.stderr


def test_an_evaluation_never_overwrites_a_training_run(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    refused = evaluate(trained, tmp_path, run_dir="run")
    assert refused.code == 2 and "holds a run of other settings" in refused.err
    assert read_json(tmp_path / "run" / "scores.json")["finished"]


def test_the_file_to_be_scored_is_never_set_aside(trained, tmp_path):
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    data = {name: settings[name] for name in ("data_path", "tokenizer_path")}
    artifact = f"run/{train_gpt.ARTIFACT_NAME}"
    refused = run_main(
        cwd=tmp_path, **dict(data, eval_only=artifact, run_dir="run", resume="never")
    )
    assert refused.code == 2 and "would set aside" in refused.err
    assert (tmp_path / artifact).exists() and not (tmp_path / "run" / "old_1").exists()


@pytest.mark.parametrize("eval_only, same", [("", True), ("model.ptz", False)])
def test_a_training_run_goes_on_without_the_users_key_and_a_check_does_not(
    eval_only, same, runtime, monkeypatch
):
    config = train_gpt.Config(device="cpu", eval_only=eval_only)
    run = train_gpt.Run(config, runtime(config))
    monkeypatch.setattr(run, "evaluation_key", lambda path: "file/script/settings")
    keys = []
    for key in ("mine", "another machine's"):
        monkeypatch.setattr(run.runtime, "user_key", lambda key=key: key)
        keys.append(run.state_key("file"))
    assert (keys[0] == keys[1]) is same


@pytest.mark.parametrize("name", ["config.json", "scores.json"])
def test_a_damaged_record_is_named_with_the_way_out(trained, tmp_path, name):
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    text = (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / name).write_bytes(text[: len(text) // 2])
    refused = run_main(cwd=tmp_path, **settings)
    assert refused.code == 2 and f"{name} is damaged" in refused.err
    assert "RESUME=never" in refused.err


@pytest.mark.parametrize("mode", ["sample", "audit"])
def test_a_run_that_is_only_read_is_never_set_aside(trained, tmp_path, mode):
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    refused = run_main(cwd=tmp_path, **dict(settings, mode=mode, resume="never"))
    assert refused.code == 2 and "would set aside" in refused.err
    assert (tmp_path / "run" / train_gpt.ARTIFACT_NAME).exists()


def test_the_sizes_of_a_given_file_name_its_own_compressor(trained, tmp_path):
    folder, _ = trained
    weights = train_gpt.load_weights(folder / "run" / train_gpt.FLOAT_NAME)
    config = dataclasses.replace(weights.config, compressor="lzma")
    blob = train_gpt.pack_artifact(config, weights.state_dict)
    (tmp_path / "model.ptz").write_bytes(blob)
    over = evaluate(trained, tmp_path, budget_bytes=1000)
    assert f"Serialized model int6+lzma: {len(blob)} bytes" in over.out


def test_a_file_over_the_budget_is_not_scored(trained, tmp_path):
    over = evaluate(trained, tmp_path, budget_bytes=1000)
    assert over.code == 4
    size = (tmp_path / "model.ptz").stat().st_size
    code = (ROOT / "train_gpt.py").stat().st_size
    assert f"Total submission size int6+zstd: {size + code} bytes" in over.out
    assert "more than BUDGET_BYTES=1000" in over.err and not exact_scores(over.out)


def test_code_bytes_leave_room_when_packing_but_are_not_believed_when_scoring(trained, tmp_path):
    folder, settings = trained
    artifact = (folder / "run" / train_gpt.ARTIFACT_NAME).stat().st_size
    budget = artifact + 5000
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*.ptz"))
    settings = dict(settings, run_dir="packed", budget_bytes=budget, code_bytes=5000)
    packed = run_main(cwd=tmp_path, **settings)
    assert packed.code == 0, packed.err
    assert "Code size: 5000 bytes" in packed.out
    scored = evaluate(trained, tmp_path, budget_bytes=budget, code_bytes=5000)
    assert scored.code == 4


def test_the_headline_is_a_fixed_order_and_not_the_minimum(runtime):
    config = train_gpt.Config(device="cpu")
    run = train_gpt.Run(config, runtime(config))
    for label, bpb in [("pre_quant", 1.0), ("final_int6_sliding_window", 1.1), ("legal_ttt", 1.2)]:
        run.results["scores"][label] = dict(val_bpb=bpb, legal=True, audited=False)
    assert run.headline() == "legal_ttt"
    run.results["scores"]["legal_ttt"]["legal"] = False
    assert run.headline() == "final_int6_sliding_window"


def test_float_weights_can_be_scored_but_have_no_headline(trained, tmp_path):
    folder, settings = trained
    data = {name: settings[name] for name in ("data_path", "tokenizer_path")}
    weights = folder / "run" / train_gpt.FLOAT_NAME
    done = run_main(cwd=tmp_path, **dict(data, device="cpu", eval_only=weights, run_dir="out"))
    assert done.code == 0, done.err
    assert list(exact_scores(done.out)) == [
        "float_roundtrip",
        "float_sliding_window",
        "float_legal_ttt",
    ]
    assert "summary: score" not in done.out


def test_nproc_keeps_the_exit_code_that_torchrun_loses(trained, tmp_path):
    settings = dict(artifact_in(tmp_path, trained), nproc=2)
    assert launch(dict(settings, budget_bytes=1000), tmp_path).returncode == 4
    illegal = launch(dict(settings, slot="published"), tmp_path)
    assert illegal.returncode == 6, illegal.stderr


def sampled(trained, **settings):
    folder, run_settings = trained
    settings = dict(dict(run_settings, sample_tokens=12, mode="sample"), **settings)
    done = run_main(cwd=folder, **settings)
    assert done.code == 0, done.err
    return done.out


def test_sample_continues_the_prompt_the_same_way_for_the_same_seed(trained):
    text = sampled(trained, prompt="The value", seed=1)
    assert text.startswith("The value") and len(text.strip()) > len("The value")
    assert sampled(trained, prompt="The value", seed=1) == text
    assert sampled(trained, prompt="The value", seed=2) != text


def test_sample_at_temperature_zero_takes_the_likeliest_token(trained):
    greedy = sampled(trained, prompt="The", temperature=0, seed=1)
    assert sampled(trained, prompt="The", temperature=0, seed=2) == greedy
    assert sampled(trained, prompt="The", temperature=1, top_k=1, seed=3) == greedy


def test_sample_needs_no_data_and_touches_no_score(trained, tmp_path):
    folder, settings = trained
    scores = (folder / "run" / "scores.json").read_bytes()
    artifact = folder / "run" / train_gpt.ARTIFACT_NAME
    done = run_main(
        cwd=tmp_path,
        eval_only=artifact,
        tokenizer_path=settings["tokenizer_path"],
        mode="sample",
        sample_tokens=5,
        device="cpu",
    )
    assert done.code == 0 and done.out.startswith("The")
    assert (folder / "run" / "scores.json").read_bytes() == scores


def test_an_audit_that_comes_later_covers_the_scores_that_are_there(trained, tmp_path):
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    done = launch(dict(settings, audit=1), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "phase_done:legal_ttt" in done.stdout and "audit pass" in done.stdout
    assert re.search(r"^result legal_ttt .* legal:1 ", done.stdout, re.M)
