"""Build the submission folder of one or more runs, and prove that it scores what it claims.

    python slurm/package.py runs/nfm_7k_seed42 runs/nfm_7k_seed1337 --out submission --packed
    python slurm/package.py runs/demo_seed42 --out submission \\
        --data-path ./data/datasets/demo_sp1024 \\
        --tokenizer-path ./data/tokenizers/demo_1024_bpe.model
    python slurm/package.py runs/a --out submission -- --author Ada --name "My model"

Arguments behind a lone -- go to collect.py.

The first run's artifact goes into the folder; all runs go into submission.json, their logs beside
it. Then the folder's own train_gpt.py scores the folder's own artifact (EVAL_ONLY, AUDIT=1) in an
environment that holds nothing but where programs, libraries and the data are, the device and its
arithmetic; every score must agree with the run's in all eight digits. The folder gets its name only
after that; on any error nothing is left. The budget of 16,000,000 bytes is decimal and covers
code + model.

--packed writes train_gpt.py as a self-extracting script: its source without comments, blank lines
and the docstrings of functions and classes, compressed (LZMA), in text (base85). The module's
docstring stays, since --help prints it.

Exit codes: 0 done, 1 the proof failed, 2 wrong use or unusable runs, 4 over budget.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from runs import (
    RunDataProblem,
    number_from_0,
    open_terminal,
    read_json,
    read_run_dir,
    with_separators,
)

BUDGET_BYTES = 16_000_000
ARTIFACT_NAME = "final_model.int6.ptz"
REPOSITORY = Path(__file__).resolve().parent.parent


class PackageError(Exception):
    """Keeps the folder from being built; `code` is the exit code, most often that of wrong use."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# --- The packed script ---------------------------------------------------------------------------

# The text runs in the module's own namespace under its own name, and nothing else is left there;
# the line cache gets it, for tracebacks, inspect and torch.compile.
STUB = """\
# Unpacks itself; see slurm/package.py.
def run(data="{data}"):
 import base64,linecache,lzma
 text=lzma.decompress(base64.b85decode(data)).decode()
 linecache.cache[__file__]=len(text),None,text.splitlines(True),__file__
 return compile(text,__file__,"exec")
exec(globals().pop("run")())
"""


def strip(source):
    """The same program without comments, blank lines and inner docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def pack(source):
    """A self-extracting script (bytes) of a program (str)."""
    text = strip(source).encode()
    # Plain LZMA: its header is 13 bytes. Base85 has neither quotes nor backslashes
    data = lzma.compress(text, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    return STUB.format(data=base64.b85encode(data).decode()).encode()


# --- Runs ----------------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_run(path):
    """The finished Run of a folder; PackageError for a run that cannot be submitted."""
    if not path.is_dir():
        raise PackageError(f"{path} is no folder of a run")
    run = read_run_dir(path)
    if not run.finished:
        raise PackageError(
            f"{path} has not finished: run its command again to go on, then package it"
        )
    for name in ("manifest.json", "train.log", ARTIFACT_NAME):
        if not (path / name).is_file():
            raise PackageError(f"{path / name} is missing: without it there is nothing to submit")
    if sha256(path / ARTIFACT_NAME) != run.artifact_sha256:
        raise PackageError(
            f"{path / ARTIFACT_NAME} is not what the run wrote: manifest.json has another sha256"
        )
    return run


def model_bytes(run):
    """Size of the file that is shipped, whatever scores.json says."""
    return (run.path / ARTIFACT_NAME).stat().st_size


# --- The folder ----------------------------------------------------------------------------------


def write_code(args, folder, runs):
    """Write train_gpt.py and return its size; PackageError if code + model exceed the budget."""
    try:
        code = args.script.read_bytes()
        if args.packed:
            code = pack(code.decode())
    except (OSError, SyntaxError, ValueError) as error:
        raise PackageError(f"--script {args.script}: {error}") from None
    # Not an error: a comment may have been added since, and the proof runs this script
    if {run.manifest.get("code_sha256") for run in runs} != {sha256(args.script)}:
        say(
            f"note: {args.script} has changed since the runs (or they differ): the logs are of "
            "other code"
        )
    # Every seed has to fit, not only the one that is shipped
    for run in runs:
        total = len(code) + model_bytes(run)
        if total > BUDGET_BYTES:
            raise PackageError(
                f"{run.path}: code {with_separators(len(code))} + model "
                f"{with_separators(model_bytes(run))} = {with_separators(total)} bytes, "
                f"{with_separators(total - BUDGET_BYTES)} over the budget of "
                f"{with_separators(BUDGET_BYTES)}",
                4,
            )
    (folder / "train_gpt.py").write_bytes(code)
    return len(code)


def collect(args, folder, runs):
    """Write submission.json and curves.png by collect.py; returns the text of results.md."""
    command = [sys.executable, str(Path(__file__).with_name("collect.py"))]
    command += [str(run.path) for run in runs]
    command += ["--out", str(folder), "--script", str(folder / "train_gpt.py"), *args.collect]
    # A process of its own: matplotlib and scipy stay out of this one
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    if done.returncode:
        raise PackageError(f"collect.py refused the runs (exit code {done.returncode}): see above")
    results = folder / "results.md"
    text = results.read_text(encoding="utf-8")
    results.unlink()
    return text


README_TAIL = """
## This folder

- `train_gpt.py`: everything that trains, compresses and scores the model ({code} bytes{packed})
- `{artifact}`: the model of seed {seed} ({model} bytes; code + model: {total} of {budget})
- `train.log`: the log of that run; `train_seed*.log`: the logs of all seeds, if there are several
- `verify.log`: the log of the command below, run in this folder when it was built

Verify it, given the official validation shards and tokenizer (no training data, no network):

    pip install -r requirements.txt
    DATA_PATH=… TOKENIZER_PATH=… AUDIT=1 EVAL_ONLY={artifact} python train_gpt.py
"""


# --- The proof -----------------------------------------------------------------------------------


def data_path(run, name, given):
    """The absolute path of a data setting: the option, else the run's."""
    used = run.config.get(name, "")
    # A run may have been started from anywhere; its paths are as its user wrote them
    places = [Path(given)] if given else [Path.cwd() / used, REPOSITORY / used]
    for place in places:
        if place.exists():
            return str(place.resolve())
    raise PackageError(f"{places[0]} does not exist: give --{name.replace('_', '-')} for the proof")


def proof_environment(args, run, run_dir):
    """All that the proof may know: programs, libraries, data, and the run's own arithmetic."""
    # Without HOME some libraries write their caches into the folder
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in kept or name.startswith("CUDA_")
    }
    # DTYPE=auto may be another type on this machine: the manifest has the one that was used
    arithmetic = {**run.config, "dtype": run.manifest["dtype"]}
    for name in ("device", "compile", "dtype"):
        environment[name.upper()] = os.environ.get(name.upper(), str(arithmetic[name]))
    return {
        **environment,
        "EVAL_ONLY": ARTIFACT_NAME,
        "AUDIT": "1",
        "RUN_DIR": str(run_dir),
        "DATA_PATH": data_path(run, "data_path", args.data_path),
        "TOKENIZER_PATH": data_path(run, "tokenizer_path", args.tokenizer_path),
        "OMP_NUM_THREADS": str(run.manifest.get("torch_threads", 1)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def prove(args, folder, run):
    """Score the folder with its own script; lines to report, PackageError if a score differs."""
    # Ranks and threads decide how a score's sum is rounded: the proof uses the run's
    world = run.manifest.get("world_size", 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *(torchrun if world > 1 else []), "train_gpt.py"]
    with tempfile.TemporaryDirectory(prefix="golf_proof_") as scratch:
        # The folder itself must stay as it will be shipped
        run_dir = Path(scratch) / "run"
        environment = proof_environment(args, run, run_dir)
        say(
            f"proof: the folder scores its artifact in a clean environment, with {world} "
            f"process(es) and {environment['OMP_NUM_THREADS']} thread(s) like the run"
        )
        code = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr).returncode
        if code:
            raise PackageError(
                f"the folder's train_gpt.py ended with exit code {code}: see above", 1
            )
        shutil.copyfile(run_dir / "train.log", folder / "verify.log")
        return compare(run, read_json(run_dir / "scores.json"), args.tolerance)


def digits(score):
    """A score with the eight digits that have to agree."""
    return f"val_bpb:{score['val_bpb']:.8f} val_loss:{score['val_loss']:.8f}"


def compare(run, proof, tolerance):
    """One line per score; PackageError if one differs in eight digits or `tolerance` bpb."""
    lines, wrong = [], []
    for label, score in run.results["scores"].items():
        if label == "pre_quant":
            continue  # a score of the float weights, which are not in the folder
        claimed, found = digits(score), proof.get("scores", {}).get(label)
        if found is None:
            wrong.append(f"{label}: the run has {claimed}, the folder no such score")
            continue
        proved = digits(found)
        # The same digits of another text would be an accident
        same_text = found["tokens"] == score["tokens"] and found["bytes"] == score["bytes"]
        # Another device rounds otherwise; the digits are then compared as numbers
        near = tolerance > 0 and abs(found["val_bpb"] - score["val_bpb"]) <= tolerance
        if proved == claimed and same_text:
            lines.append(f"proved {label} {proved}")
        elif near:
            lines.append(f"proved {label} {proved} (the run has {claimed})")
        else:
            wrong.append(f"{label}: the run has {claimed}, the folder {proved}")
    if wrong:
        hint = "; on another device than the run's, --tolerance allows a difference"
        raise PackageError(
            f"the folder does not score what the run claims: {'; '.join(wrong)}"
            f"{'' if tolerance else hint}",
            1,
        )
    return lines


# --- main ----------------------------------------------------------------------------------------


def say(line):
    print(f"package.py: {line}", file=sys.stderr, flush=True)


def parse(arguments):
    """Our own arguments, with those behind a lone -- kept for collect.py as `collect`."""
    # argparse would take a lone -- for itself
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments behind -- go to collect.py: --author, --github-id, --name, --blurb, ...",
    )
    add = parser.add_argument
    shipped = "finished runs; the first one is shipped"
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help=shipped)
    new = "the folder to build; must not exist"
    add("--out", type=Path, required=True, metavar="DIR", help=new)
    add("--packed", action="store_true", help="write train_gpt.py as a self-extracting script")
    script = REPOSITORY / "train_gpt.py"
    add("--script", type=Path, default=script, help="default: the repository's")
    add("--data-path", metavar="DIR", help="shards for the proof (default: the run's)")
    add("--tokenizer-path", metavar="FILE", help="tokenizer for the proof (default: the run's)")
    allowed = "allowed difference of val_bpb, for a proof on another device (default: none)"
    add("--tolerance", type=number_from_0, default=0.0, metavar="BPB", help=allowed)
    args = parser.parse_args(arguments[:split])
    args.collect = arguments[split + 1 :]
    return args


@contextlib.contextmanager
def building(out):
    """A folder beside `out` that gets its name if all went well, and is removed otherwise."""
    # Never into something that is there, not even an empty folder or a dangling link
    if out.exists() or out.is_symlink():
        raise PackageError(f"--out {out} exists: name a new folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PackageError(
            f"--out {out}: {error.strerror}: name a folder where you may write"
        ) from None
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after the rename there is nothing to remove


def build(args):
    """Build and prove the folder; returns the report."""
    runs = [load_run(path) for path in args.runs]
    shipped = runs[0]
    # Cheap steps first: the proof takes as long as an evaluation
    with building(args.out) as folder:
        code_bytes = write_code(args, folder, runs)
        results = collect(args, folder, runs)
        # The challenge wants a train.log, whatever else there is
        shutil.copyfile(shipped.path / "train.log", folder / "train.log")
        for run in runs if len(runs) > 1 else []:
            shutil.copyfile(run.path / "train.log", folder / f"train_seed{run.seed}.log")
        shutil.copyfile(shipped.path / ARTIFACT_NAME, folder / ARTIFACT_NAME)
        shutil.copyfile(REPOSITORY / "requirements.txt", folder / "requirements.txt")
        sizes = {
            "code": code_bytes,
            "model": model_bytes(shipped),
            "total": code_bytes + model_bytes(shipped),
            "budget": BUDGET_BYTES,
            "headroom": BUDGET_BYTES - code_bytes - model_bytes(shipped),
            "readable": args.script.stat().st_size,
        }
        shown = {name: with_separators(size) for name, size in sizes.items()}
        packed = "; packed: it unpacks itself when it starts" if args.packed else ""
        tail = README_TAIL.format(**shown, packed=packed, artifact=ARTIFACT_NAME, seed=shipped.seed)
        (folder / "README.md").write_text(results + tail, encoding="utf-8")
        report = prove(args, folder, shipped)
    # Readable and packed side by side: that is what packing is worth
    report.append(f"readable code: {shown['readable']} bytes")
    if args.packed:
        report.append(f"packed code: {shown['code']} bytes")
    return [
        *report,
        f"model: {shown['model']} bytes",
        f"code + model: {shown['total']} of {shown['budget']} bytes",
        f"headroom: {shown['headroom']} bytes",
        f"submission: {args.out}",
    ]


def main(arguments=None):
    open_terminal()
    args = parse(sys.argv[1:] if arguments is None else arguments)
    # building() then cleans up
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        print("\n".join(build(args)))
    except (PackageError, RunDataProblem) as error:
        say(f"error: {error}")
        return getattr(error, "code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
