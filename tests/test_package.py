"""slurm/package.py: a packed script is the same program, and a folder that cannot be proved never
appears.
"""

import ast
import inspect
import shutil
import signal
import subprocess
import sys
import traceback

import pytest
from helpers import ROOT, environment, launch, read_json
from runs_helpers import run_records as runs

import package  # isort: skip

SOURCE = (ROOT / "train_gpt.py").read_text()
# A program with all that could get lost: docstrings, comments, odd bytes, f-strings, names that the
# stub uses itself, bodies that are nothing but a docstring.
PROGRAM = '''"""Module docstring: stays."""
# a comment
from __future__ import annotations

s, n = "'quote' \\\\ back\\rslash \\0 null # no comment", b"\\xff\\x00"
größe = {"a": "ä"}


class Thing:
    """Class docstring: goes."""


class Other:
    """Goes
    too."""  # with its comment

    value: int = 3  # another comment

    def method(self, x):
        """Goes."""

        if x > self.value:  # a comment
            raise ValueError(f"{x!r} is more than {self.value}")
        return """not a

        # docstring"""


def empty():
    """All there is."""


def several(a=1,  # a comment
            b=f"{größe['a']} # {len(f'{s}')}"
              f' and "more"'):

    # nothing but this
    return a, b


if __name__ == "__main__":
    print(__file__, __doc__, n, ascii(several()), Other().method(1).encode())
'''


# --- The packed script ---------------------------------------------------------------------------


def tree(source):
    """The syntax tree of a program as text, without inner docstrings and what stands for them."""
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            node.body = node.body[bool(ast.get_docstring(node)) :]
            node.body = [each for each in node.body if not isinstance(each, ast.Pass)]
    return ast.dump(parsed)


@pytest.mark.parametrize("source", [PROGRAM, SOURCE], ids=["program", "train_gpt.py"])
def test_a_stripped_script_has_the_syntax_tree_of_the_input_without_docstrings(source):
    kept = package.strip(source)
    assert tree(kept) == tree(source)


def test_the_packed_train_gpt_is_small_plain_text_and_the_same_each_time():
    packed = package.pack(SOURCE)
    assert packed == package.pack(SOURCE) and packed.isascii()
    assert len(packed) <= 80_000 and len(packed) < 0.35 * len(SOURCE.encode())


def test_a_packed_module_has_the_names_and_the_source_of_the_original(tmp_path, monkeypatch):
    (tmp_path / "packed_program.py").write_bytes(package.pack(PROGRAM))
    monkeypatch.syspath_prepend(tmp_path)
    import packed_program as packed

    names = {"annotations", "s", "n", "größe", "Thing", "Other", "empty", "several"}
    assert {name for name in vars(packed) if not name.startswith("__")} == names
    assert packed.__doc__ == "Module docstring: stays."
    assert packed.Thing.__doc__ is None and packed.empty() is None
    source = inspect.getsource(packed)
    assert "goes" not in source.lower() and "a comment" not in source and "# no comment" in source
    assert inspect.getsource(packed.Other.method).lstrip().startswith("def method(self, x):")
    with pytest.raises(ValueError) as caught:
        packed.Other().method(4)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.filename == packed.__file__ and last.line.startswith("raise ValueError(f")


def test_the_packed_script_runs_as_a_script_under_its_own_name(tmp_path):
    outputs = []
    for content in (PROGRAM.encode(), package.pack(PROGRAM)):
        script = tmp_path / "run_me.py"
        script.write_bytes(content)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and outputs[1].startswith(str(script))


# --- The folder ----------------------------------------------------------------------------------
# Stands in for train_gpt.py in the proof: reports the scores it is told to, and the environment.
STAND_IN = """
import json, os, sys, time
from pathlib import Path

folder = Path(os.environ["RUN_DIR"])
folder.mkdir(parents=True)
text = "".join(f"{name}={value}\\n" for name, value in sorted(os.environ.items()))
(folder / "train.log").write_text(text)
time.sleep(PAUSE)
(folder / "scores.json").write_text(json.dumps(SCORES))
sys.exit(STATUS)
"""


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    """The folder of a tiny finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = launch({**tiny_data.settings, "run_dir": folder}, folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


def stand_in(path, scores, status=0, pause=0):
    settings = f"nan = float('nan')\nSCORES, STATUS, PAUSE = {scores!r}, {status}, {pause}\n"
    path.write_text(settings + STAND_IN)
    return path


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def packaged(*arguments):
    """The exit code of package.py, run in this process."""
    return package.main([str(argument) for argument in arguments])


def test_a_packed_folder_is_built_and_proves_its_scores(trained, tmp_path, capfd):
    out = tmp_path / "submission"
    assert packaged(trained, "--out", out, "--packed", "--", "--author", "Ada") == 0
    assert entries(out) == [
        "README.md",
        "curves.png",
        "final_model.int6.ptz",
        "requirements.txt",
        "submission.json",
        "train.log",
        "train_gpt.py",
        "verify.log",
    ]
    assert entries(tmp_path) == ["submission"]
    code, model = ((out / name).stat().st_size for name in ("train_gpt.py", package.ARTIFACT_NAME))
    submission = read_json(out / "submission.json")
    assert submission["author"] == "Ada"
    assert (submission["bytes_code"], submission["bytes_total"]) == (code, code + model)
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# ") and f"({runs.with_separators(code)} bytes; packed" in readme
    report = capfd.readouterr().out
    for label, score in read_json(trained / "scores.json")["scores"].items():
        line = f"proved {label} val_bpb:{score['val_bpb']:.8f} val_loss:{score['val_loss']:.8f}\n"
        assert (line in report) == (label != "pre_quant")
    headroom = runs.with_separators(16_000_000 - code - model)
    assert f"packed code: {runs.with_separators(code)} bytes\n" in report
    assert f"headroom: {headroom} bytes\n" in report
    assert "audit pass" in (out / "verify.log").read_text()


def test_the_proof_knows_paths_libraries_data_and_the_arithmetic_alone(
    trained, tmp_path, monkeypatch
):
    for name in ("PRESET", "EVAL_STRIDE", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")
    carried = dict(CUDA_VISIBLE_DEVICES="0", LD_LIBRARY_PATH="/lib", PYTHONPATH="/p", COMPILE="0")
    for name, value in carried.items():
        monkeypatch.setenv(name, value)
    script = stand_in(tmp_path / "train_gpt.py", read_json(trained / "scores.json"))
    assert packaged(trained, "--out", tmp_path / "out", "--script", script) == 0
    lines = (tmp_path / "out" / "verify.log").read_text().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    own = (
        "AUDIT DATA_PATH DEVICE DTYPE EVAL_ONLY HOME OMP_NUM_THREADS PATH PYTHONDONTWRITEBYTECODE "
        "RUN_DIR TOKENIZER_PATH"
    )
    assert found.keys() - {"LC_CTYPE"} == {*own.split(), *carried}
    assert found.items() >= carried.items()
    assert found["DTYPE"] == read_json(trained / "config.json")["config"]["dtype"]
    assert (tmp_path / "out" / "train_gpt.py").read_text() == script.read_text(), "not --packed"


def test_a_failing_proof_and_a_difference_in_the_eighth_digit_are_refused(trained, tmp_path, capfd):
    scores = read_json(trained / "scores.json")
    bpb = scores["scores"]["legal_ttt"]["val_bpb"]
    scores["scores"]["legal_ttt"]["val_bpb"] = bpb + 1e-8
    script = stand_in(tmp_path / "other.py", scores)
    command = [trained, "--out", tmp_path / "out", "--script", script]
    assert packaged(*command) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "does not score what the run claims: legal_ttt: the run has" in error
    assert f"{bpb:.8f}" in error and f"{bpb + 1e-8:.8f}" in error
    stand_in(script, scores, status=6)
    assert packaged(*command) == 1
    assert "train_gpt.py ended with exit code 6" in capfd.readouterr().err
    assert entries(tmp_path) == ["other.py"]
    stand_in(script, scores)
    assert packaged(*command, "--tolerance", "2e-8") == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores: scores.pop("legal_ttt"),
        lambda scores: scores["legal_ttt"].update(tokens=scores["legal_ttt"]["tokens"] - 1),
        lambda scores: scores["legal_ttt"].update(val_bpb=float("nan")),
    ],
    ids=["missing", "fewer tokens", "NaN"],
)
def test_a_proof_without_the_whole_score_is_refused(spoil, trained):
    proof = read_json(trained / "scores.json")
    run = package.load_run(trained)
    assert len(package.compare(run, proof, tolerance=0.0)) == 3
    spoil(proof["scores"])
    with pytest.raises(package.PackageError, match="claims: legal_ttt: the run has") as refused:
        package.compare(run, proof, tolerance=0.0)
    assert refused.value.code == 1


def test_a_folder_over_the_budget_is_refused_by_how_much(trained, tmp_path, monkeypatch, capfd):
    model = (trained / package.ARTIFACT_NAME).stat().st_size
    total = model + (ROOT / "train_gpt.py").stat().st_size
    monkeypatch.setattr(package, "BUDGET_BYTES", total - 1)
    assert packaged(trained, "--out", tmp_path / "out") == 4
    both, budget = runs.with_separators(total), runs.with_separators(total - 1)
    assert f"= {both} bytes, 1 over the budget of {budget}" in capfd.readouterr().err
    assert entries(tmp_path) == []


def test_a_signal_leaves_nothing_behind(trained, tmp_path):
    script = stand_in(tmp_path / "slow.py", {}, pause=60)
    arguments = [trained, "--out", tmp_path / "out", "--script", script]
    building = subprocess.Popen(
        [sys.executable, str(ROOT / "slurm" / "package.py"), *map(str, arguments)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in building.stderr:
        if "proof: the folder scores its artifact" in line:
            break
    assert len(entries(tmp_path)) == 2
    building.send_signal(signal.SIGTERM)
    assert building.wait(timeout=30) == 128 + signal.SIGTERM
    building.stderr.close()
    assert entries(tmp_path) == ["slow.py"]


def replaced(name, old, new):
    """Change one place of a file in a run."""

    def spoil(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "is no folder of a run"),
        (replaced("scores.json", "{", ""), "scores.json: not readable"),
        (replaced("scores.json", '"finished": true', '"finished": false'), "has not finished"),
        (replaced("scores.json", '"scores"', '"others"'), "finished without a score"),
        (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda run: (run / "train.log").unlink(), "train.log is missing"),
        (lambda run: (run / package.ARTIFACT_NAME).unlink(), "int6.ptz is missing"),
        (lambda run: (run / package.ARTIFACT_NAME).write_bytes(b""), "is not what the run"),
    ],
)
def test_an_unusable_run_gets_one_message(spoil, message, trained, tmp_path, capfd):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    spoil(run_dir)
    assert packaged(run_dir, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("package.py: error: ") and message in error
    assert not any(name.startswith((".out", "out")) for name in entries(tmp_path))


def test_a_real_run_tells_the_kind_of_every_setting_and_its_log_the_same_as_its_folder(trained):
    run, log = runs.read_run_dir(trained), runs.read_log(trained / "train.log")
    assert run.kinds.keys() == run.config.keys() and run.kinds["run_dir"] == "run"
    assert runs.differing_settings([run, log]) == {} and log.finished
    for stage, score in run.scores.items():
        assert log.scores[stage].val_bpb == pytest.approx(score.val_bpb, abs=5.1e-9)
    for name in ("steps", "artifact_bytes", "code_bytes", "total_bytes"):
        assert log.results[name] == run.results[name], name
    assert log.train_curve.keys() <= run.train_curve.keys() and log.train_curve
    assert log.manifest["artifact_sha256"] == run.artifact_sha256


def test_what_collect_refuses_and_places_that_do_not_work_leave_nothing(trained, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    for arguments, message in (
        ([trained, trained, "--out", tmp_path / "out"], "two runs of seed 42"),
        (
            [trained, "--out", tmp_path / "out", "--data-path", tmp_path / "nowhere"],
            "nowhere does not exist: give --data-path for the proof",
        ),
        ([trained, "--out", tmp_path / "file/out"], "name a folder where you may write"),
        ([trained, "--out", tmp_path / "mine"], "exists: name a new folder"),
    ):
        assert packaged(*arguments) == 2
        assert message in capfd.readouterr().err
        assert entries(tmp_path) == ["file", "mine"] and entries(tmp_path / "mine") == []


@pytest.mark.slow
def test_several_seeds_ship_the_first_artifact_and_all_logs(trained, tiny_data, tmp_path):
    second = tmp_path / "second"
    assert launch({**tiny_data.settings, "run_dir": second, "seed": 7}, tmp_path).returncode == 0
    script = stand_in(tmp_path / "train_gpt.py", read_json(trained / "scores.json"))
    out = tmp_path / "out"
    assert packaged(trained, second, "--out", out, "--script", script) == 0
    assert {"train.log", "train_seed42.log", "train_seed7.log"} <= set(entries(out))
    assert (out / "train.log").read_bytes() == (trained / "train.log").read_bytes()
    assert read_json(out / "submission.json")["seeds"] == [42, 7]
    shipped, model = (folder / package.ARTIFACT_NAME for folder in (out, trained))
    assert shipped.read_bytes() == model.read_bytes()
