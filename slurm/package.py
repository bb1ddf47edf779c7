"""Build the submission folder of one or more runs, and prove that it scores what it claims.

    python slurm/package.py runs/nfm_7k_seed42 runs/nfm_7k_seed1337 --out submission --packed
    python slurm/package.py runs/demo_seed42 --out submission --data-path ./data/datasets/demo_sp1024 \\
        --tokenizer-path ./data/tokenizers/demo_1024_bpe.model
    python slurm/package.py runs/a --out submission -- --author Ada --name "My model"     # for collect.py

The first run's artifact goes into the folder; all runs go into submission.json, their logs beside it. Then
the folder's own train_gpt.py scores the folder's own artifact (EVAL_ONLY, AUDIT=1) in an environment that has
nothing but PATH, HOME and where the data are, and every score must agree with the run's in all eight digits.
The folder gets its name only after that; on any error nothing is left. Sizes are in bytes, and the budget of
16,000,000 is decimal and covers code + model.

--packed writes train_gpt.py as a self-extracting script. Its source is the input without comments, layout and
the docstrings of functions and classes (the module's stays: --help prints it), so the two syntax trees are
equal but for those docstrings; this is checked by unpacking what was written.

Exit codes: 0 done, 1 the proof failed, 2 wrong use or unusable runs, 4 over budget.
"""
import argparse
import ast
import bz2
import contextlib
import hashlib
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

BUDGET_BYTES = 16_000_000
ARTIFACT_NAME = "final_model.int6.ptz"
REPOSITORY = Path(__file__).resolve().parent.parent


class PackageError(Exception):
    """What keeps the folder from being built; `code` is the exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# ----------------------------------------------------------------------------------------------------
# The packed script
# ----------------------------------------------------------------------------------------------------
# Python's own compressors only. For text of this size bzip2 mostly wins.
LZMA = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
COMPRESSORS = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, filters=[LZMA]),
}
# The payload is a Latin-1 string, one byte of file per byte of data (base 85 would take a quarter more), on a
# line of its own that no traceback shows. The source runs in the module's own namespace under its own name,
# and nothing else is left there; the line cache gets it, for tracebacks, inspect and torch.compile.
STUB = """\
# coding: latin-1
exec((lambda s,n:(__import__('linecache').cache.update({{n:(len(s),None,s.splitlines(True),n)}}),
compile(s,n,'exec'))[1])(
__import__('{module}').decompress('{payload}'.encode('latin-1')).decode(),__file__))
"""


def without_docstrings(tree):
    """Drop the docstrings of functions and classes in place, and return the tree."""
    for node in ast.walk(tree):
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if inner and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def minify(source):
    """The same program without comments, layout and inner docstrings."""
    return ast.unparse(without_docstrings(ast.parse(source))) + "\n"


def escape(data):
    """Bytes as the inside of a 'string' in a Latin-1 file: what Python's reader would change is escaped."""
    text = data.decode("latin-1")
    for plain, escaped in (("\\", "\\\\"), ("\r", "\\r"), ("\n", "\\n"), ("'", "\\'"), ("\0", "\\x00")):
        text = text.replace(plain, escaped)
    return text


def pack(source):
    """A self-extracting script (bytes) of a program (str), by the compressor that makes it smallest."""
    data = minify(source).encode()
    scripts = [STUB.format(module=name, payload=escape(compress(data))).encode("latin-1")
               for name, compress in COMPRESSORS.items()]
    packed = min(scripts, key=len)
    if ast.dump(ast.parse(unpack(packed))) != ast.dump(without_docstrings(ast.parse(source))):
        raise PackageError("the packed script does not unpack to its source: a defect of package.py")
    return packed


def unpack(packed):
    """The source inside a packed script (bytes), found without running it. ValueError if it is not packed."""
    calls = [node for node in ast.walk(ast.parse(packed)) if isinstance(node, ast.Call)]
    payloads = [call.func.value.value for call in calls
                if isinstance(call.func, ast.Attribute) and call.func.attr == "encode"]
    modules = [call.func.value.args[0].value for call in calls
               if isinstance(call.func, ast.Attribute) and call.func.attr == "decompress"]
    if not packed.startswith(b"# coding: latin-1\nexec(") or len(payloads) != 1 or len(modules) != 1:
        raise ValueError("not a script packed by package.py")
    decompress = {"zlib": zlib.decompress, "bz2": bz2.decompress, "lzma": lzma.decompress}[modules[0]]
    return decompress(payloads[0].encode("latin-1")).decode()


# ----------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------
def read_json(path):
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise PackageError(f"{path}: {error.strerror}: is {path.parent} a finished run's folder?") from None
    except ValueError as error:
        raise PackageError(f"{path} is no complete JSON file ({error}): run the same command again") from None
    if not isinstance(value, dict):
        raise PackageError(f"{path} holds no JSON object: it was not written by train_gpt.py")
    return value


class Run:
    """A finished run. Raises PackageError, with one message, for anything that cannot be submitted."""

    def __init__(self, path):
        self.path, self.log, self.artifact = path, path / "train.log", path / ARTIFACT_NAME
        if not path.is_dir():
            raise PackageError(f"{path} is no folder of a run")
        self.results = read_json(path / "scores.json")
        self.manifest = read_json(path / "manifest.json")
        self.config = read_json(path / "config.json").get("config", {})
        if not self.results.get("finished"):
            raise PackageError(f"{path} has not finished: run its command again to go on, then package it")
        for file in (self.log, self.artifact):
            if not file.is_file():
                raise PackageError(f"{file} is missing: without it there is nothing to submit")
        self.seed, self.artifact_bytes = self.results.get("seed"), self.artifact.stat().st_size
        scores = self.results.get("scores", {})
        self.scores = {label: score for label, score in scores.items() if label != "pre_quant"}
        self.check_scores()
        if sha256(self.artifact) != self.manifest.get("artifact_sha256"):
            raise PackageError(f"{self.artifact} is not what the run wrote: manifest.json has another sha256")

    def check_scores(self):
        if not self.scores:
            raise PackageError(f"{self.path}/scores.json has no score of the artifact")
        for label, score in self.scores.items():
            values = [score.get("val_loss"), score.get("val_bpb")]
            if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
                raise PackageError(f"{self.path}/scores.json: {label} is {values}: expected finite scores")

    def data_path(self, name, given):
        """The absolute path of a data setting: the option, else the run's, from here or the repository."""
        used = self.config.get(name, "")
        places = [Path(given)] if given else [Path.cwd() / used, REPOSITORY / used]
        for place in places:
            if place.exists():
                return str(place.resolve())
        raise PackageError(f"{places[0]} does not exist: give --{name.replace('_', '-')} for the proof")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_runs(paths):
    """All runs, each of another seed. What they may differ in otherwise is collect.py's to judge."""
    runs = [Run(path) for path in paths]
    seeds = [run.seed for run in runs]
    for run in runs:
        if seeds.count(run.seed) > 1:
            raise PackageError(f"{run.path}: two runs have seed {run.seed}: give one run per seed")
    return runs


# ----------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------
def write_code(args, folder, runs):
    """Write train_gpt.py and return its size; PackageError when it and an artifact exceed the budget."""
    try:
        source = args.script.read_text(encoding="utf-8")
        code = pack(source) if args.packed else args.script.read_bytes()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise PackageError(f"--script {args.script}: {error}") from None
    used = {run.manifest.get("code_sha256") for run in runs}
    if used != {sha256(args.script)}:
        say(f"note: {args.script} has changed since the runs (or they differ): the logs are of other code")
    for run in runs:
        total = len(code) + run.artifact_bytes
        if total > BUDGET_BYTES:
            raise PackageError(f"{run.path}: code {len(code)} + model {run.artifact_bytes} = {total} bytes, "
                               f"{total - BUDGET_BYTES} over the budget of {BUDGET_BYTES}", 4)
    (folder / "train_gpt.py").write_bytes(code)
    return len(code)


def collect(args, folder, runs):
    """submission.json, curves.png and the text of results.md, by collect.py."""
    command = [sys.executable, str(Path(__file__).with_name("collect.py")), *(str(run.path) for run in runs),
               "--out", str(folder), *args.collect]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise PackageError(f"collect.py refused the runs (exit code {done.returncode}): see above")
    results = folder / "results.md"
    text = results.read_text()
    results.unlink()
    return text


def count_bytes(folder, code_bytes, runs):
    """Put the folder's own sizes into submission.json: collect.py knows only the sizes at training time."""
    path = folder / "submission.json"
    submission = read_json(path)
    total = code_bytes + max(run.artifact_bytes for run in runs)
    submission.update(bytes_code=code_bytes, bytes_total=total)
    if "artifact_under_16mb" in submission.get("compliance", {}):
        submission["compliance"]["artifact_under_16mb"] = total <= BUDGET_BYTES
    path.write_text(json.dumps(submission, indent=2, ensure_ascii=False) + "\n")


def write_logs(folder, runs):
    shutil.copyfile(runs[0].log, folder / "train.log")
    for run in runs if len(runs) > 1 else []:
        shutil.copyfile(run.log, folder / f"train_seed{run.seed}.log")


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


def write_readme(folder, results, code_bytes, packed, run):
    how = "; packed: it unpacks itself when it starts" if packed else ""
    model = run.artifact_bytes
    tail = README_TAIL.format(code=code_bytes, packed=how, artifact=ARTIFACT_NAME, seed=run.seed, model=model,
                              total=code_bytes + model, budget=BUDGET_BYTES)
    (folder / "README.md").write_text(results.rstrip() + "\n" + tail)


# ----------------------------------------------------------------------------------------------------
# The proof
# ----------------------------------------------------------------------------------------------------
def proof_environment(args, run, run_dir):
    """All that the proof may know: where programs and data are, and what decides the last digits of a sum."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    device = run.config.get("device", "auto")
    return {
        **kept, "EVAL_ONLY": ARTIFACT_NAME, "AUDIT": "1", "RUN_DIR": str(run_dir), "DEVICE": device,
        "DATA_PATH": run.data_path("data_path", args.data_path),
        "TOKENIZER_PATH": run.data_path("tokenizer_path", args.tokenizer_path),
        "OMP_NUM_THREADS": str(run.manifest.get("torch_threads", 1)), "PYTHONDONTWRITEBYTECODE": "1",
    }


def prove(args, folder, run):
    """Score the folder with its own script. Returns lines to report; PackageError if a score differs."""
    world = run.results.get("world_size", 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] * (world > 1)
    with tempfile.TemporaryDirectory(prefix="golf_proof_") as scratch:
        run_dir = Path(scratch) / "run"
        environment = proof_environment(args, run, run_dir)
        say(f"proof: the folder scores its artifact in a clean environment, with {world} process(es) and "
            f"{environment['OMP_NUM_THREADS']} thread(s) like the run")
        command = [sys.executable, *torchrun, "train_gpt.py"]
        code = subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr).returncode
        if code:
            raise PackageError(f"the folder's train_gpt.py ended with exit code {code}: see above", 1)
        shutil.copyfile(run_dir / "train.log", folder / "verify.log")
        return compare(run, read_json(run_dir / "scores.json"), args.tolerance)


def compare(run, proof, tolerance):
    """One line per score of the run; PackageError if the proof differs in eight digits or `tolerance` bpb."""
    lines, wrong = [], []
    for label, score in run.scores.items():
        found = proof.get("scores", {}).get(label)
        if found is None:
            wrong.append(f"{label}: the run has {score['val_bpb']:.8f}, the folder no such score")
            continue
        names = ("val_bpb", "val_loss")
        ours, theirs = (" ".join(f"{name}:{s[name]:.8f}" for name in names) for s in (found, score))
        same = ours == theirs and found["tokens"] == score["tokens"] and found["bytes"] == score["bytes"]
        near = tolerance > 0 and abs(found["val_bpb"] - score["val_bpb"]) <= tolerance
        if same or near:
            lines.append(f"proved {label} {ours}" + ("" if same else f" (the run has {theirs})"))
        else:
            wrong.append(f"{label}: the run has {theirs}, the folder {ours}")
    if wrong:
        hint = "" if tolerance else "; on another device than the run's, --tolerance allows a difference"
        raise PackageError("the folder does not score what the run claims: " + "; ".join(wrong) + hint, 1)
    return lines


# ----------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------
def say(line):
    print(f"package.py: {line}", file=sys.stderr, flush=True)


def bits(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return value


def parse(arguments):
    """Our own arguments, with those behind a lone -- kept for collect.py as `collect`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments behind -- go to collect.py: --author, --github-id, --name, --blurb, --track, ...")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="finished runs; the first one is shipped")
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to build; must not exist")
    add("--packed", action="store_true", help="write train_gpt.py as a self-extracting script")
    add("--script", type=Path, default=REPOSITORY / "train_gpt.py", help="default: the repository's")
    add("--data-path", metavar="DIR", help="shards for the proof (default: the run's)")
    add("--tokenizer-path", metavar="FILE", help="tokenizer for the proof (default: the run's)")
    add("--tolerance", type=bits, default=0.0, metavar="BPB",
        help="allowed difference of val_bpb, for a proof on another device (default: none, 8 digits)")
    args = parser.parse_args(arguments[:split])
    args.collect = arguments[split + 1:]
    return args


@contextlib.contextmanager
def building(out):
    """A folder beside `out` that gets its name if all went well, and is removed in all other cases."""
    if out.exists() or out.is_symlink():
        raise PackageError(f"--out {out} exists: name a new folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise PackageError(f"--out {out}: {error.strerror}: name a folder where you may write") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(args):
    """Build and prove the folder; returns the report."""
    runs = load_runs(args.runs)
    with building(args.out) as folder:
        code_bytes = write_code(args, folder, runs)
        results = collect(args, folder, runs)
        count_bytes(folder, code_bytes, runs)
        write_logs(folder, runs)
        shutil.copyfile(runs[0].artifact, folder / ARTIFACT_NAME)
        shutil.copyfile(REPOSITORY / "requirements.txt", folder / "requirements.txt")
        write_readme(folder, results, code_bytes, args.packed, runs[0])
        proved = prove(args, folder, runs[0])
    model = runs[0].artifact_bytes
    sizes = [f"readable code: {args.script.stat().st_size} bytes"]
    sizes += [f"packed code: {code_bytes} bytes"] if args.packed else []
    sizes += [f"model: {model} bytes", f"code + model: {code_bytes + model} of {BUDGET_BYTES} bytes",
              f"headroom: {BUDGET_BYTES - code_bytes - model} bytes"]
    return [*proved, *sizes, f"submission: {args.out}"]


def main(arguments=None):
    args = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # building() then cleans up
    try:
        print("\n".join(build(args)))
    except PackageError as error:
        say(f"error: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
