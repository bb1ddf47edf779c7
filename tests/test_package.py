"""slurm/package.py: a packed script is the same program, and a folder that cannot be proved never
appears.
"""

import ast
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest
from conftest import ROOT, environment, launch, read_json

pytest.importorskip("python_minifier", reason="pip install -r slurm/requirements.txt")
sys.path.insert(0, str(ROOT / "slurm"))

import package  # noqa: E402
import runs  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_text()

# A program with all that could get lost: docstrings, comments, odd bytes, names that the stub uses
# itself.
PROGRAM = '''"""Module docstring: stays."""
# a comment
from __future__ import annotations

s, n = "'quote' \\\\ back\\rslash \\0 null", b"\\xff\\x00"


class Thing:
    """Class docstring: goes."""


class Other:
    """Goes too."""
    value: int = 3  # another comment

    def method(self, x):
        """Goes."""
        if x > self.value:
            raise ValueError(f"{x!r} is more than {self.value}")
        return """not a
        docstring"""


def empty():
    """All there is."""


if __name__ == "__main__":
    print(__file__, __doc__, s == "'quote' \\\\ back\\rslash \\0 null", n)
'''


# --- The packed script ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed PROGRAM as an imported module."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "packed_program.py").write_bytes(package.pack(PROGRAM))
    sys.path.insert(0, str(folder))
    import packed_program

    yield packed_program
    sys.path.remove(str(folder))
    del sys.modules["packed_program"]


@pytest.fixture(scope="module")
def packed_train_gpt():
    return package.pack(SOURCE)


@pytest.fixture(scope="module")
def packed_folder(packed_train_gpt, tmp_path_factory):
    """A folder with the packed train_gpt.py."""
    folder = tmp_path_factory.mktemp("packed_script")
    (folder / "train_gpt.py").write_bytes(packed_train_gpt)
    return folder


def tree(source):
    """The syntax tree of a program as text, but for the docstrings of its functions and classes.

    A function that has nothing else may keep any constant in its place.
    """
    parsed = ast.parse(source)
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[:1] = [ast.Pass()] if len(node.body) == 1 else []
    return ast.dump(parsed)


def test_what_is_unpacked_has_the_syntax_tree_of_the_input(packed_train_gpt):
    unpacked = package.unpack(packed_train_gpt)
    assert tree(unpacked) == tree(SOURCE)
    assert ast.get_docstring(ast.parse(unpacked)) == ast.get_docstring(ast.parse(SOURCE))
    assert tree(package.unpack(package.pack(PROGRAM))) == tree(PROGRAM)


def test_a_script_that_does_not_unpack_to_its_source_is_never_written(monkeypatch):
    monkeypatch.setattr(package, "minify", lambda source: source.replace("more than", "less than"))
    with pytest.raises(package.PackageError, match="does not unpack to its source"):
        package.pack(PROGRAM)


def test_only_comments_and_the_docstrings_of_functions_and_classes_are_dropped():
    kept = package.minify(PROGRAM)
    assert "stays" in kept and "not a\\n        docstring" in kept
    assert "goes" not in kept.lower() and "All there is" not in kept and "comment" not in kept


def test_packing_a_script_saves_most_of_its_bytes(packed_train_gpt):
    assert len(packed_train_gpt) < 0.35 * len(SOURCE.encode())


def test_packing_is_deterministic():
    assert package.pack(PROGRAM) == package.pack(PROGRAM)


def test_a_packed_script_carries_all_bytes_and_characters(tmp_path):
    awkward = "text = " + repr("".join(map(chr, range(0x250)))) + "\nprint(ascii(text))\n"
    (tmp_path / "awkward.py").write_bytes(package.pack(awkward))
    shown = subprocess.run(
        [sys.executable, str(tmp_path / "awkward.py")], capture_output=True, text=True
    )
    assert shown.stdout.strip() == ascii("".join(map(chr, range(0x250)))), shown.stderr


def test_a_packed_script_is_plain_ascii_text(packed_train_gpt):
    assert packed_train_gpt.isascii() and packed_train_gpt.decode().count("\n") == 7


def test_fstrings_stand_in_the_packed_script_as_in_the_source_so_that_python_3_10_reads_them():
    source = """name = {'a': 'ä'}
print(f"{name['a']} # {len(f'{name}')}"  # a comment
      f' and "more"', f'ü{name["a"]:>{4}}')
"""
    text = package.with_fstrings_of(
        source, package.python_minifier.minify(source, **package.LAYOUT_ONLY)
    )
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(source))
    assert """f"{name['a']} # {len(f'{name}')}" """ in text and """f'ü{name["a"]:>{4}}'""" in text
    assert "comment" not in text and len(text.splitlines()) == 2


def test_names_beyond_ascii_survive():
    source = "größe = 3\nprint(größe)\n"
    assert package.unpack(package.pack(source)) == "größe=3\nprint(größe)"


def test_statements_that_do_nothing_but_fill_a_body_survive():
    source = (
        "class Empty:\n    ...\n\n\ndef nothing():\n    pass\n\n\n"
        "def three():\n    4\n    return 3\n"
    )
    names = {}
    exec(package.unpack(package.pack(source)), names)
    assert names["nothing"]() is None and names["three"]() == 3 and names["Empty"]


def test_a_script_that_is_not_packed_is_not_unpacked():
    with pytest.raises(ValueError, match="not a script packed"):
        package.unpack(b"print('hello')\n")


def test_the_packed_module_has_the_names_of_the_original_and_no_others(packed):
    assert {name for name in vars(packed) if not name.startswith("__")} == {
        "annotations",
        "s",
        "n",
        "Thing",
        "Other",
        "empty",
    }
    assert packed.__doc__ == "Module docstring: stays."
    assert packed.__file__.endswith("packed_program.py")
    assert packed.Thing.__doc__ is None and packed.empty() is None


def test_the_source_of_packed_functions_and_classes_can_be_inspected(packed):
    assert inspect.getsource(packed.Other.method).lstrip().startswith("def method(self,x):")
    assert inspect.getsource(packed.Other).startswith("class Other:")


def test_a_traceback_shows_the_line_that_raised(packed):
    with pytest.raises(ValueError) as caught:
        packed.Other().method(4)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.line.endswith('raise ValueError(f"{x!r} is more than {self.value}")')


def test_the_packed_script_runs_as_a_script_under_its_own_name(tmp_path):
    script = tmp_path / "run_me.py"
    script.write_bytes(package.pack(PROGRAM))
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert shown.stdout == f"{script} Module docstring: stays. True b'\\xff\\x00'\n", shown.stderr


def test_the_packed_train_gpt_explains_itself_like_the_readable_one(packed_folder):
    readable, packed = (
        launch({}, packed_folder, script=folder / "train_gpt.py", arguments=["--help"])
        for folder in (ROOT, packed_folder)
    )
    assert packed.returncode == 0 and len(packed.stdout) > 2000
    assert packed.stdout == readable.stdout


def seconds_to_load(folder):
    """CPU seconds of a process that imports torch first, and then only what is in train_gpt.py."""
    code = (
        "import sys, time; sys.path.insert(0, '.'); import torch, numpy, sentencepiece, zstandard; "
        "start = time.process_time(); import train_gpt; print(time.process_time() - start)"
    )
    shown = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return float(shown.stdout)


def test_unpacking_costs_less_than_three_tenths_of_a_second(packed_folder, tmp_path):
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    plain = min(seconds_to_load(tmp_path) for _ in range(2))
    packed = min(seconds_to_load(packed_folder) for _ in range(2))
    assert packed - plain < 0.3, f"{packed:.2f} s packed, {plain:.2f} s plain"


# --- The folder ----------------------------------------------------------------------------------
# Stands in for train_gpt.py in the proof: reports the scores it is told to, and what it found
# around it.
STAND_IN = """
import json, os, sys, time
from pathlib import Path

folder = Path(os.environ["RUN_DIR"])
folder.mkdir(parents=True)
(folder / "train.log").write_text("stand-in\\n" + "\\n".join(sorted(os.environ)) + "\\n")
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


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of it to tamper with."""
    return shutil.copytree(trained, tmp_path / "run")


def stand_in(path, scores, status=0, pause=0):
    settings = f"SCORES, STATUS, PAUSE = {scores!r}, {status}, {pause}\n"
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
    code, model = (
        (out / "train_gpt.py").stat().st_size,
        (out / "final_model.int6.ptz").stat().st_size,
    )
    submission = read_json(out / "submission.json")
    assert submission["author"] == "Ada"
    assert (submission["bytes_code"], submission["bytes_total"]) == (code, code + model)
    report = capfd.readouterr().out
    for label, score in read_json(trained / "scores.json")["scores"].items():
        line = f"proved {label} val_bpb:{score['val_bpb']:.8f} val_loss:{score['val_loss']:.8f}\n"
        assert (line in report) == (label != "pre_quant")
    readable, packed, model_size, headroom = (
        runs.with_separators(size)
        for size in ((ROOT / "train_gpt.py").stat().st_size, code, model, 16_000_000 - code - model)
    )
    assert (
        f"readable code: {readable} bytes\npacked code: {packed} bytes\nmodel: {model_size} bytes\n"
        in report
    )
    assert f"headroom: {headroom} bytes" in report
    assert "legality C1 future_flip pass" in (out / "verify.log").read_text()


def test_the_proof_knows_nothing_but_paths_and_data(trained, tmp_path, monkeypatch):
    for name in ("PRESET", "EVAL_STRIDE", "PYTHONPATH", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")
    script = stand_in(tmp_path / "train_gpt.py", read_json(trained / "scores.json"))
    assert packaged(trained, "--out", tmp_path / "out", "--script", script) == 0
    found = (tmp_path / "out" / "verify.log").read_text().split()[1:]
    assert set(found) - {"LC_CTYPE"} == {
        "AUDIT",
        "DATA_PATH",
        "DEVICE",
        "EVAL_ONLY",
        "HOME",
        "OMP_NUM_THREADS",
        "PATH",
        "PYTHONDONTWRITEBYTECODE",
        "RUN_DIR",
        "TOKENIZER_PATH",
    }
    assert (
        tmp_path / "out" / "train_gpt.py"
    ).read_text() == script.read_text()  # readable unless --packed


def changed(scores, label, **values):
    other = json.loads(json.dumps(scores))
    other["scores"][label].update(values)
    return other


def test_a_difference_in_the_eighth_digit_is_refused(trained, tmp_path, capfd):
    scores = read_json(trained / "scores.json")
    bpb = scores["scores"]["legal_ttt"]["val_bpb"]
    script = stand_in(tmp_path / "other.py", changed(scores, "legal_ttt", val_bpb=bpb + 1e-8))
    assert packaged(trained, "--out", tmp_path / "out", "--script", script) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "does not score what the run claims: legal_ttt: the run has" in error
    assert f"{bpb:.8f}" in error and f"{bpb + 1e-8:.8f}" in error
    assert entries(tmp_path) == ["other.py"]
    assert (
        packaged(trained, "--out", tmp_path / "out", "--script", script, "--tolerance", "2e-8") == 0
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores: scores["scores"].pop("legal_ttt"),
        lambda scores: scores["scores"]["legal_ttt"].update(
            tokens=scores["scores"]["legal_ttt"]["tokens"] - 1
        ),
        lambda scores: scores["scores"]["legal_ttt"].update(val_bpb=float("nan")),
    ],
    ids=["missing", "fewer tokens", "NaN"],
)
def test_a_proof_without_the_whole_score_is_refused(spoil, trained):
    scores = read_json(trained / "scores.json")
    assert len(package.compare(package.load_run(trained), scores, tolerance=0.0)) == 3
    spoil(scores)
    with pytest.raises(package.PackageError, match="claims: legal_ttt: the run has") as refused:
        package.compare(package.load_run(trained), scores, tolerance=0.0)
    assert refused.value.code == 1


def test_a_failing_proof_is_refused(trained, tmp_path, capfd):
    script = stand_in(tmp_path / "other.py", read_json(trained / "scores.json"), status=6)
    assert packaged(trained, "--out", tmp_path / "out", "--script", script) == 1
    assert "train_gpt.py ended with exit code 6" in capfd.readouterr().err
    assert entries(tmp_path) == ["other.py"]


def test_a_folder_over_the_budget_is_refused_by_how_much(trained, tmp_path, monkeypatch, capfd):
    total = (trained / "final_model.int6.ptz").stat().st_size + (
        ROOT / "train_gpt.py"
    ).stat().st_size
    monkeypatch.setattr(package, "BUDGET_BYTES", total - 1)
    assert packaged(trained, "--out", tmp_path / "out") == 4
    both, budget = runs.with_separators(total), runs.with_separators(total - 1)
    assert f"= {both} bytes, 1 over the budget of {budget}" in capfd.readouterr().err
    assert entries(tmp_path) == []


def test_a_signal_leaves_nothing_behind(trained, tmp_path):
    script = stand_in(tmp_path / "slow.py", {}, pause=60)
    building = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "slurm" / "package.py"),
            str(trained),
            "--out",
            str(tmp_path / "out"),
            "--script",
            str(script),
        ],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in building.stderr:
        if "proof: the folder scores its artifact" in line:
            break
    assert len(entries(tmp_path)) == 2
    time.sleep(0.3)
    building.send_signal(signal.SIGTERM)
    assert building.wait(timeout=30) == 128 + signal.SIGTERM
    building.stderr.close()
    assert entries(tmp_path) == ["slow.py"]


def cut(path):
    path.write_text(path.read_text()[:40])


def edit(path, **values):
    path.write_text(json.dumps({**read_json(path), **values}))


def spoil_score(path, value):
    scores = read_json(path)
    scores["scores"]["legal_ttt"]["val_bpb"] = value
    path.write_text(json.dumps(scores))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "is no folder of a run"),
        (lambda run: (run / "scores.json").unlink(), "has not finished"),
        (lambda run: cut(run / "scores.json"), "scores.json: not readable as JSON"),
        (lambda run: (run / "scores.json").write_text("[]"), "scores.json: not readable as JSON"),
        (lambda run: edit(run / "scores.json", finished=False), "has not finished"),
        (lambda run: edit(run / "scores.json", scores={}), "has no score of the artifact"),
        (lambda run: spoil_score(run / "scores.json", float("nan")), "legal_ttt is ["),
        (lambda run: spoil_score(run / "scores.json", None), "scores.json: not readable as JSON"),
        (lambda run: (run / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda run: (run / "train.log").unlink(), "train.log is missing"),
        (lambda run: (run / "final_model.int6.ptz").unlink(), "final_model.int6.ptz is missing"),
        (
            lambda run: (run / "final_model.int6.ptz").write_bytes(b"other"),
            "is not what the run wrote",
        ),
    ],
)
def test_an_unusable_run_gets_one_message(spoil, message, run_dir, tmp_path, capfd):
    spoil(run_dir)
    assert packaged(run_dir, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("package.py: error: ") and message in error
    assert not any(name.startswith((".out", "out")) for name in entries(tmp_path))


def test_a_real_run_tells_the_kind_of_every_setting_once(trained):
    written, kinds = read_json(trained / "config.json"), runs.read_run_dir(trained).kinds
    assert sorted(name for names in kinds.values() for name in names) == sorted(written["config"])
    assert "seed" in kinds["train"] and {"run_dir", "device"} <= set(kinds["run"])


def test_two_runs_of_one_seed_are_refused(trained, run_dir, tmp_path, capfd):
    assert packaged(trained, run_dir, "--out", tmp_path / "out") == 2
    assert "two runs have seed 42" in capfd.readouterr().err


def test_a_folder_that_exists_is_left_alone(trained, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert packaged(trained, "--out", tmp_path / "out") == 2
    assert "exists: name a new folder" in capfd.readouterr().err
    assert entries(tmp_path / "out") == ["mine"]


def test_data_that_are_not_there_are_asked_for(trained, tmp_path, capfd):
    assert packaged(trained, "--out", tmp_path / "out", "--data-path", tmp_path / "nowhere") == 2
    assert "nowhere does not exist: give --data-path for the proof" in capfd.readouterr().err
    assert entries(tmp_path) == []


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
    assert (out / "final_model.int6.ptz").read_bytes() == (
        trained / "final_model.int6.ptz"
    ).read_bytes()


def test_a_folder_in_a_place_that_cannot_be_written_is_refused(trained, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert packaged(trained, "--out", tmp_path / "file" / "out") == 2
    assert "name a folder where you may write" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["file"]
