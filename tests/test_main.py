"""Section main: scores belong to files, places are safe, and what a person reads."""

import re
import shutil

import pytest

import train_gpt
from conftest import ROOT, launch, read_json

SCORES = ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """A finished run: (folder, settings)."""
    folder = tmp_path_factory.mktemp("trained")
    settings = dict(tiny_data.settings, run_dir="run")
    done = launch(settings, folder)
    assert done.returncode == 0, done.stderr
    return folder, settings


def evaluate(trained, cwd, script=ROOT / "train_gpt.py", **settings):
    """Run EVAL_ONLY on a copy of the artifact in `cwd`."""
    folder, run_settings = trained
    if not (cwd / "model.ptz").exists():
        shutil.copy(folder / "run" / train_gpt.ARTIFACT_NAME, cwd / "model.ptz")
    data = {name: run_settings[name] for name in ("data_path", "tokenizer_path")}
    return launch(dict(data, device="cpu", eval_only="model.ptz", **settings), cwd, script=script)


def exact(output):
    return dict(re.findall(r"^(\w+)_exact .*val_bpb:(\S+)", output, re.M))


def test_a_given_file_is_audited_and_every_score_is_computed_anew(trained, tmp_path):
    first = evaluate(trained, tmp_path)
    assert first.returncode == 0, first.stderr
    assert list(exact(first.stdout)) == SCORES
    assert "audit pass" in first.stdout
    again = evaluate(trained, tmp_path)
    assert exact(again.stdout) == exact(first.stdout)
    assert "audit pass" in again.stdout and "phase_done" not in again.stdout


def test_another_artifact_under_the_same_name_gets_its_own_scores(trained, tiny_data, tmp_path):
    before = evaluate(trained, tmp_path, run_dir="out")
    other = launch(dict(tiny_data.settings, run_dir="other", seed=7, iterations=1), tmp_path)
    assert other.returncode == 0, other.stderr
    shutil.copy(tmp_path / "other" / train_gpt.ARTIFACT_NAME, tmp_path / "model.ptz")
    after = evaluate(trained, tmp_path, run_dir="out")
    truth = exact(other.stdout)
    assert exact(after.stdout) == {label: truth[label] for label in SCORES}
    assert exact(after.stdout) != exact(before.stdout)


def test_finished_scores_that_came_with_a_folder_are_not_believed(trained, tmp_path):
    honest = evaluate(trained, tmp_path)
    scores = next(tmp_path.glob("runs/eval_*/scores.json"))
    forged = re.sub(r'"val_bpb": [0-9.]+', '"val_bpb": 1.0', scores.read_text())
    assert forged != scores.read_text()
    scores.write_text(forged)
    again = evaluate(trained, tmp_path)
    assert exact(again.stdout) == exact(honest.stdout)
    assert "1.0000" not in re.findall(r"^result .*", again.stdout, re.M)[-1]


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
    assert refused.returncode == 2 and "holds a run of other settings" in refused.stderr
    assert read_json(tmp_path / "run" / "scores.json")["finished"]


def test_the_file_to_be_scored_is_never_set_aside(trained, tmp_path):
    folder, settings = trained
    shutil.copytree(folder / "run", tmp_path / "run")
    data = {name: settings[name] for name in ("data_path", "tokenizer_path")}
    artifact = f"run/{train_gpt.ARTIFACT_NAME}"
    refused = launch(dict(data, eval_only=artifact, run_dir="run", resume="never"), tmp_path)
    assert refused.returncode == 2 and "would set aside" in refused.stderr
    assert (tmp_path / artifact).exists() and not (tmp_path / "run" / "old_1").exists()


def test_a_file_over_the_budget_is_not_scored(trained, tmp_path):
    over = evaluate(trained, tmp_path, budget_bytes=1000)
    assert over.returncode == 4
    size = (tmp_path / "model.ptz").stat().st_size
    code = (ROOT / "train_gpt.py").stat().st_size
    assert f"Total submission size int6+zstd: {size + code} bytes" in over.stdout
    assert "more than BUDGET_BYTES=1000" in over.stderr and not exact(over.stdout)


def test_code_bytes_leave_room_when_packing_but_are_not_believed_when_scoring(trained, tmp_path):
    folder, settings = trained
    artifact = (folder / "run" / train_gpt.ARTIFACT_NAME).stat().st_size
    budget = artifact + 5000
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*.ptz"))
    settings = dict(settings, run_dir="packed", budget_bytes=budget, code_bytes=5000)
    packed = launch(settings, tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert "Code size: 5000 bytes" in packed.stdout
    scored = evaluate(trained, tmp_path, budget_bytes=budget, code_bytes=5000)
    assert scored.returncode == 4


def test_float_weights_and_the_roundtrip_are_no_submission(trained):
    folder, _ = trained
    log = (folder / "run" / "train.log").read_text()
    legality = dict(re.findall(r"^result (\w+) .*legal:(\w+)", log, re.M))
    assert legality == {
        "pre_quant": "no_submission",
        "final_int6_roundtrip": "no_submission",
        "final_int6_sliding_window": "unaudited",
        "legal_ttt": "unaudited",
    }
    assert read_json(folder / "run" / "scores.json")["headline"] == "legal_ttt"


def test_the_headline_is_a_fixed_order_and_not_the_minimum(runtime):
    config = train_gpt.Config(run_dir="run", device="cpu")
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
    done = launch(dict(data, device="cpu", eval_only=weights, run_dir="out"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(exact(done.stdout)) == [
        "float_roundtrip",
        "float_sliding_window",
        "float_legal_ttt",
    ]
    assert "summary: score" not in done.stdout


def test_nproc_keeps_the_exit_code_that_torchrun_loses(trained, tmp_path):
    assert evaluate(trained, tmp_path, budget_bytes=1000, nproc=2).returncode == 4
    illegal = evaluate(trained, tmp_path, slot="published", nproc=2)
    assert illegal.returncode == 6, illegal.stderr


def sampled(trained, **settings):
    folder, run_settings = trained
    settings = dict(dict(run_settings, sample_tokens=12, mode="sample"), **settings)
    done = launch(settings, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    done = launch(
        dict(
            eval_only=artifact,
            tokenizer_path=settings["tokenizer_path"],
            mode="sample",
            sample_tokens=5,
            device="cpu",
        ),
        tmp_path,
    )
    assert done.returncode == 0 and done.stdout.startswith("The")
    assert (folder / "run" / "scores.json").read_bytes() == scores
