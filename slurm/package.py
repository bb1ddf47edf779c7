"""Build the submission folder of one or more runs, and prove that it scores what it claims.

    python slurm/package.py runs/nfm_7k_seed42 runs/nfm_7k_seed1337 --out submission --packed
    python slurm/package.py runs/demo_seed42 --out submission \\
        --data-path ./data/datasets/demo_sp1024 \\
        --tokenizer-path ./data/tokenizers/demo_1024_bpe.model
    python slurm/package.py runs/a --out submission -- --author Ada --name "My model"

What follows a lone -- goes to collect.py.

The first run's artifact goes into the folder; all runs go into submission.json, their logs beside
it. Then the folder's own train_gpt.py scores the folder's own artifact (EVAL_ONLY, AUDIT=1) in an
environment that has nothing but PATH, HOME and where the data are, and every score must agree with
the run's in all eight digits. The folder gets its name only after that; on any error nothing is
left. The budget of 16,000,000 bytes is decimal and covers code + model.

--packed writes train_gpt.py as a self-extracting script: its source without comments, layout and
the docstrings of functions and classes (python-minifier), compressed (LZMA), in text (base85). The
module's docstring stays, since --help prints it. The syntax tree of what is unpacked equals the
input's but for those docstrings; this is checked on every script that is written.

Exit codes: 0 done, 1 the proof failed, 2 wrong use or unusable runs, 4 over budget.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

import python_minifier
from runs import RunDataProblem, read_json, read_run_dir, with_separators

BUDGET_BYTES = 16_000_000
ARTIFACT_NAME = "final_model.int6.ptz"
REPOSITORY = Path(__file__).resolve().parent.parent


class PackageError(Exception):
    """What keeps the folder from being built; `code` is the exit code."""

    # 2 unless said otherwise: most of what keeps a folder from being built is wrong use
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# --- The packed script ---------------------------------------------------------------------------

# Everything python-minifier can do beyond layout is off: it would save 2 kB of 16 MB, and the
# syntax tree could no longer be compared. Names stay, so a traceback of a packed script can be
# read.
LAYOUT_ONLY = dict(
    remove_literal_statements=True,
    remove_annotations=False,
    remove_pass=False,
    combine_imports=False,
    hoist_literals=False,
    rename_locals=False,
    rename_globals=False,
    remove_object_base=False,
    convert_posargs_to_args=False,
    preserve_shebang=False,
    remove_explicit_return_none=False,
    remove_builtin_exception_brackets=False,
    constant_folding=False,
    remove_dead_branches=False,
)
# Plain LZMA: its header is 13 bytes, and what it holds is checked by the syntax tree, not by a
# checksum.
COMPRESSION = dict(format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
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


def is_literal(statement):
    """True for a statement that is only a constant, such as a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def shape_of(source):
    """The syntax tree of a program as text, without constants that stand as statements.

    The module's docstring counts: the program can print it.
    """
    # Annotations and defaults stay in: dataclasses and NamedTuples read them at run time
    tree = ast.parse(source)
    docstring = ast.get_docstring(tree, clean=False)
    # python-minifier puts a 0 where a body would be empty: that is a literal as well
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, [each for each in statements if not is_literal(each)])
    return repr(docstring) + ast.dump(tree)


def outer_fstrings(source):
    """The positions (begin, end), in characters, of the f-strings that stand in no other one."""
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)]
    inner = {id(child) for node in strings for child in ast.walk(node) if child is not node}
    lines = source.splitlines(keepends=True)

    def position(row, column):
        # The tree counts columns in bytes
        within = len(lines[row - 1].encode()[:column].decode())
        return sum(map(len, lines[: row - 1])) + within

    spans = []
    for node in strings:
        if id(node) not in inner:
            begin = position(node.lineno, node.col_offset)
            spans.append((begin, position(node.end_lineno, node.end_col_offset)))
    return sorted(spans)


def on_one_line(literal):
    """A literal of several pieces without the comments and line breaks between them."""
    text = f"({literal})"
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token in reversed(tokens):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            begin = starts[token.start[0] - 1] + token.start[1]
            text = f"{text[:begin]} {text[begin + len(token.string) :]}"
    return text[1:].rstrip()[:-1]


def with_fstrings_of(source, text):
    """The minified `text` with its f-strings as they stand in the source.

    Since Python 3.12 an f-string may hold its own quotes (PEP 701), and there python-minifier and
    ast.unparse make use of it: Python 3.10 could not read the result.
    """
    pairs = list(zip(outer_fstrings(text), outer_fstrings(source)))
    # From the end, so that the positions in front stay what they are
    for (begin, end), (first, last) in reversed(pairs):
        text = text[:begin] + on_one_line(source[first:last]) + text[end:]
    return text


def minify(source):
    """The same program without comments, layout and inner docstrings."""
    # It drops every literal statement, so the one that the program may print is put back
    text = python_minifier.minify(source, **LAYOUT_ONLY)
    if sys.version_info >= (3, 12):
        text = with_fstrings_of(source, text)
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    return text if docstring is None else f"{docstring!r}\n{text}"


def pack(source):
    """A self-extracting script (bytes) of a program (str); PackageError if they differ."""
    # Base85 has neither quotes nor backslashes: it can stand in a string as it is
    data = base64.b85encode(lzma.compress(minify(source).encode(), **COMPRESSION))
    packed = STUB.format(data=data.decode()).encode()
    # Look at what was written, not at what was meant to be
    with contextlib.suppress(SyntaxError):
        if shape_of(unpack(packed)) == shape_of(source):
            return packed
    raise PackageError(
        "the packed script does not unpack to its source: this is a defect of package.py"
    )


def unpack(packed):
    """The source inside a packed script (bytes), without running it; ValueError if unpacked."""
    start = STUB.partition("{data}")[0].encode()
    if not packed.startswith(start):
        raise ValueError("not a script packed by package.py")
    # The payload is the default of the only argument of run()
    (data,) = ast.parse(packed).body[0].args.defaults
    return lzma.decompress(base64.b85decode(data.value)).decode()


# --- Runs ----------------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_run(path):
    """The finished Run of a folder; PackageError, one message, for what cannot be submitted."""
    # Cheap checks first; the artifact is hashed last
    if not path.is_dir():
        raise PackageError(f"{path} is no folder of a run")
    try:
        run = read_run_dir(path)
    except RunDataProblem as problem:
        raise PackageError(str(problem)) from None
    if not run.finished:
        raise PackageError(
            f"{path} has not finished: run its command again to go on, then package it"
        )
    for name in ("manifest.json", "train.log", ARTIFACT_NAME):
        if not (path / name).is_file():
            raise PackageError(f"{path / name} is missing: without it there is nothing to submit")
    check_scores(run)
    if sha256(path / ARTIFACT_NAME) != run.artifact_sha256:
        raise PackageError(
            f"{path / ARTIFACT_NAME} is not what the run wrote: manifest.json has another sha256"
        )
    # The file that is shipped counts, whatever scores.json says
    run.artifact_bytes = (path / ARTIFACT_NAME).stat().st_size
    return run


def packed_scores(scores):
    """The entries of scores.json that are of the artifact, by label."""
    return {label: score for label, score in scores.items() if label != "pre_quant"}


def check_scores(run):
    """PackageError unless the artifact has scores and all of them are numbers."""
    scores = packed_scores(run.raw_scores)
    if not scores:
        raise PackageError(f"{run.path}/scores.json has no score of the artifact")
    # JSON of Python may hold NaN and Infinity
    for label, score in scores.items():
        values = [score.get("val_loss"), score.get("val_bpb")]
        if not all(math.isfinite(value) for value in values):
            raise PackageError(
                f"{run.path}/scores.json: {label} is {values}: expected finite scores"
            )


def data_path(run, name, given):
    """The absolute path of a data setting: the option, else the run's."""
    used = run.config.get(name, "")
    # A run may have been started from anywhere; its paths are as its user wrote them
    places = [Path(given)] if given else [Path.cwd() / used, REPOSITORY / used]
    for place in places:
        if place.exists():
            return str(place.resolve())
    raise PackageError(f"{places[0]} does not exist: give --{name.replace('_', '-')} for the proof")


def load_runs(paths):
    """All runs, each of another seed; what else may differ is collect.py's to judge."""
    runs = [load_run(path) for path in paths]
    seeds = [run.seed for run in runs]
    for run in runs:
        if seeds.count(run.seed) > 1:
            raise PackageError(f"{run.path}: two runs have seed {run.seed}: give one run per seed")
    return runs


# --- The folder ----------------------------------------------------------------------------------


def write_code(args, folder, runs):
    """Write train_gpt.py and return its size; PackageError if code + model exceed the budget."""
    try:
        source = args.script.read_text(encoding="utf-8")
        code = pack(source) if args.packed else args.script.read_bytes()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise PackageError(f"--script {args.script}: {error}") from None
    # Not an error: a comment may have been added since, and the proof runs this script
    used = {run.code_sha256 for run in runs}
    if used != {sha256(args.script)}:
        say(
            f"note: {args.script} has changed since the runs (or they differ): the logs are of "
            "other code"
        )
    # Every seed has to fit, not only the one that is shipped
    for run in runs:
        total = len(code) + run.artifact_bytes
        if total > BUDGET_BYTES:
            over = with_separators(total - BUDGET_BYTES)
            raise PackageError(
                f"{run.path}: code {with_separators(len(code))} + model "
                f"{with_separators(run.artifact_bytes)} = {with_separators(total)} bytes, "
                f"{over} over the budget of {with_separators(BUDGET_BYTES)}",
                4,
            )
    (folder / "train_gpt.py").write_bytes(code)
    return len(code)


def collect(args, folder, runs):
    """submission.json, curves.png and the text of results.md, by collect.py."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("collect.py")),
        *(str(run.path) for run in runs),
        "--out",
        str(folder),
        *args.collect,
    ]
    # A process of its own: matplotlib and scipy stay out of this one
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise PackageError(f"collect.py refused the runs (exit code {done.returncode}): see above")
    # Its text becomes the head of README.md
    results = folder / "results.md"
    text = results.read_text()
    results.unlink()
    return text


def count_bytes(folder, code_bytes, runs):
    """Put the folder's own sizes into submission.json: collect.py knows only the run's."""
    path = folder / "submission.json"
    submission = read_json(path)
    # The largest model counts, as in collect.py
    total = code_bytes + max(run.artifact_bytes for run in runs)
    submission.update(bytes_code=code_bytes, bytes_total=total)
    if "artifact_under_16mb" in submission.get("compliance", {}):
        submission["compliance"]["artifact_under_16mb"] = total <= BUDGET_BYTES
    path.write_text(json.dumps(submission, indent=2, ensure_ascii=False) + "\n")


def write_logs(folder, runs):
    """The first run's log as train.log; with several runs the logs of all seeds beside it."""
    # The challenge wants a train.log, whatever else there is
    shutil.copyfile(runs[0].path / "train.log", folder / "train.log")
    if len(runs) == 1:
        return
    for run in runs:
        shutil.copyfile(run.path / "train.log", folder / f"train_seed{run.seed}.log")


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
    tail = README_TAIL.format(
        packed=how,
        artifact=ARTIFACT_NAME,
        seed=run.seed,
        code=with_separators(code_bytes),
        model=with_separators(run.artifact_bytes),
        total=with_separators(code_bytes + run.artifact_bytes),
        budget=with_separators(BUDGET_BYTES),
    )
    (folder / "README.md").write_text(results.rstrip() + "\n" + tail)


# --- The proof -----------------------------------------------------------------------------------


def proof_environment(args, run, run_dir):
    """All that the proof may know: programs, data, and what decides the last digits of a sum."""
    # Without HOME some libraries write their caches into the folder
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {
        **kept,
        "EVAL_ONLY": ARTIFACT_NAME,
        "AUDIT": "1",
        "RUN_DIR": str(run_dir),
        "DEVICE": run.config.get("device", "auto"),
        "DATA_PATH": data_path(run, "data_path", args.data_path),
        "TOKENIZER_PATH": data_path(run, "tokenizer_path", args.tokenizer_path),
        "OMP_NUM_THREADS": str(run.torch_threads),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def prove(args, folder, run):
    """Score the folder with its own script; lines to report, PackageError if a score differs."""
    # The sum of a score is rounded by ranks and threads: the proof uses the run's
    world = run.world_size
    torchrun = []
    if world > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    with tempfile.TemporaryDirectory(prefix="golf_proof_") as scratch:
        # The folder itself must stay as it will be shipped
        run_dir = Path(scratch) / "run"
        environment = proof_environment(args, run, run_dir)
        say(
            f"proof: the folder scores its artifact in a clean environment, with {world} "
            "process(es) and "
            f"{environment['OMP_NUM_THREADS']} thread(s) like the run"
        )
        command = [sys.executable, *torchrun, "train_gpt.py"]
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
    for label, score in packed_scores(run.raw_scores).items():
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
        hint = (
            ""
            if tolerance
            else "; on another device than the run's, --tolerance allows a difference"
        )
        raise PackageError(
            "the folder does not score what the run claims: " + "; ".join(wrong) + hint, 1
        )
    return lines


# --- main ----------------------------------------------------------------------------------------


def say(line):
    print(f"package.py: {line}", file=sys.stderr, flush=True)


def bits(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return value


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
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="finished runs; the first one is shipped",
    )
    add(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to build; must not exist"
    )
    add("--packed", action="store_true", help="write train_gpt.py as a self-extracting script")
    add(
        "--script", type=Path, default=REPOSITORY / "train_gpt.py", help="default: the repository's"
    )
    add("--data-path", metavar="DIR", help="shards for the proof (default: the run's)")
    add("--tokenizer-path", metavar="FILE", help="tokenizer for the proof (default: the run's)")
    add(
        "--tolerance",
        type=bits,
        default=0.0,
        metavar="BPB",
        help="allowed difference of val_bpb, for a proof on another device (default: none)",
    )
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
        # mkdtemp makes it private
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        # After the rename there is nothing left to remove
        shutil.rmtree(folder, ignore_errors=True)


def build(args):
    """Build and prove the folder; returns the report."""
    runs = load_runs(args.runs)
    # Cheap steps first: the proof takes as long as an evaluation
    with building(args.out) as folder:
        code_bytes = write_code(args, folder, runs)
        results = collect(args, folder, runs)
        count_bytes(folder, code_bytes, runs)
        write_logs(folder, runs)
        shutil.copyfile(runs[0].path / ARTIFACT_NAME, folder / ARTIFACT_NAME)
        shutil.copyfile(REPOSITORY / "requirements.txt", folder / "requirements.txt")
        write_readme(folder, results, code_bytes, args.packed, runs[0])
        proved = prove(args, folder, runs[0])
    return [*proved, *sizes_of(args, code_bytes, runs[0].artifact_bytes), f"submission: {args.out}"]


def sizes_of(args, code_bytes, model_bytes):
    """Lines on what the folder weighs, in bytes."""
    # Readable and packed side by side: what packing is worth
    lines = [("readable code", args.script.stat().st_size)]
    if args.packed:
        lines.append(("packed code", code_bytes))
    lines.append(("model", model_bytes))
    total = code_bytes + model_bytes
    report = [f"{name}: {with_separators(size)} bytes" for name, size in lines]
    report.append(
        f"code + model: {with_separators(total)} of {with_separators(BUDGET_BYTES)} bytes"
    )
    report.append(f"headroom: {with_separators(BUDGET_BYTES - total)} bytes")
    return report


def main(arguments=None):
    args = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # building() then cleans up
    try:
        print("\n".join(build(args)))
    except PackageError as error:
        say(f"error: {error}")
        return error.code
    except RunDataProblem as problem:
        say(f"error: {problem}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
