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
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
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
# Python's own compressors leave train_gpt.py above 31 kB. A text model that predicts each character from
# the ones before it leaves 29 kB, and its decoder is short enough to travel with the text.
# ----------------------------------------------------------------------------------------------------
# Interpolated Kneser-Ney smoothing (Chen & Goodman 1998) over contexts of 0 to 12 characters: t the text, k
# the known contexts, D order and discount of each, f those found for the next character, from the shortest.
# A context is [discounted count by character, total, mass that the discounts leave to shorter ones], and
# learns a character only where no longer one knew it. pick() chooses from all (character, frequency of
# 2^32), likely ones first. The stub has these lines as they stand, hence their terse layout. Doubles are
# IEEE wherever PyTorch runs, so both sides compute the same frequencies.
MODEL = """\
def grow(size,pick):
 D=(0,.36),(1,.68),(2,.78),(3,.8),(4,.8),(5,.85),(6,.9),(8,.77),(12,.69)
 t='';k={}
 def odds(f):
  u=set()
  for c,*_ in f[::-1]+[(map(chr,range(128)),)]:
   for s in c:
    if s not in u:
     u.add(s);p=1/128
     for c,n,m in f:
      p*=m
      if s in c:p+=c[s]/n
     yield s,int(p*2**32)+1
 while len(t)<size:
  i=len(t);f=[(d,k.setdefault(t[i-o:],[{},0,0]))for o,d in D if o<=i]
  s=pick(odds([(c,n,m/n)for _,(c,n,m)in f if n]));t+=s
  for d,v in f[::-1]:
   n=v[0].get(s,0);g=1-d if n==0 else.8 if n<1 else 1;v[0][s]=n+g;v[1]+=1;v[2]+=1-g
   if n:break
 return t
"""
# A range coder whose digits are the 251 bytes that may stand inside a '...' of a Latin-1 file.
READER = """\
def read(data,size):
 z=(b-sum(b>k for k in b"\\0\\n\\r'\\\\")for b in data.encode('latin-1')+bytes(9))
 x=0;r=1
 def pick(q):
  nonlocal x,r
  while r<2**56:x=x*251+next(z);r*=251
  r//=2**32+128
  for s,f in q:
   if x<f*r:break
   x-=f*r
  r*=f
  return s
 return grow(size,pick)
"""
# The text runs in the module's own namespace under its own name, and nothing else is left there; the line
# cache gets it, for tracebacks, inspect and torch.compile.
STUB = """\
# coding: latin-1
# Unpacks itself; see slurm/package.py.
def run(data='{data}',size={size}):
{functions}
 t=read(data,size)
 import linecache
 linecache.cache[__file__]=size,None,t.splitlines(True),__file__
 return compile(t,__file__,'exec')
exec(globals().pop('run')())
"""
DIGITS = bytes(sorted(set(range(256)) - set(b"\0\n\r'\\")))
CODEC = {}
exec(MODEL + READER, CODEC)  # the functions grow and read, as the stub has them


def without_docstrings(tree):
    """Drop the docstrings of functions and classes in place, and return the tree."""
    for node in ast.walk(tree):
        inner = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if inner and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def minify(source):
    """The same program in ASCII, without comments, inner docstrings and every space that can go."""
    text = ast.unparse(without_docstrings(ast.parse(source)))
    starts = [0, *itertools.accumulate(map(len, text.splitlines(True)))]
    tokens = [(tokenize.tok_name[t.type], *(starts[row - 1] + column for row, column in (t.start, t.end)))
              for t in tokenize.generate_tokens(io.StringIO(text).readline)]
    out, depth, nesting, start = [], 0, 0, 0
    for name, low, high in tokens:
        nesting += (name == "FSTRING_START") - (name == "FSTRING_END")  # Python 3.12 splits f-strings up
        if name == "FSTRING_START" and nesting == 1:
            start = low
        if nesting or name in ("NL", "ENDMARKER"):
            continue
        low = start if name == "FSTRING_END" else low
        depth += (name == "INDENT") - (name == "DEDENT")
        if name in ("INDENT", "DEDENT"):
            continue
        part = "\n" if name == "NEWLINE" else text[low:high]
        before = out[-1] if out else "\n"
        if before == "\n":
            out.append(" " * depth)
        elif re.fullmatch(r"\w\w", before[-1:] + part[:1]):
            out.append(" ")
        out.append(part)
    return "".join(out).encode("ascii", "backslashreplace").decode()


def encode(text):
    """The digits of an ASCII text (str), as bytes that a '...' of a Latin-1 file may hold."""
    symbols, low, width, digits = iter(text), 0, 1, 0

    def pick(odds):
        nonlocal low, width, digits
        while width < 2 ** 56:
            low, width, digits = low * 251, width * 251, digits + 1
        width //= 2 ** 32 + 128
        wanted, below = next(symbols), 0
        for symbol, frequency in odds:
            if symbol == wanted:
                break
            below += frequency
        low, width = low + below * width, frequency * width
        return wanted

    CODEC["grow"](len(text), pick)
    while width >= 251:  # any number in [low, low + width) will do: the one with the fewest digits
        low, width, digits = -(-low // 251), width // 251 - 1, digits - 1
    out = []
    for _ in range(digits):
        low, digit = divmod(low, 251)
        out.append(DIGITS[digit])
    return bytes(reversed(out))


def pack(source):
    """A self-extracting script (bytes) of a program (str)."""
    text = minify(source)
    functions = "".join(f" {line}\n" for line in (MODEL + READER).splitlines()).rstrip()
    data = encode(text).decode("latin-1")
    packed = STUB.format(data=data, size=len(text), functions=functions).encode("latin-1")
    with contextlib.suppress(SyntaxError):
        if ast.dump(ast.parse(unpack(packed))) == ast.dump(without_docstrings(ast.parse(source))):
            return packed
    raise PackageError("the packed script does not unpack to its source (it has names beyond ASCII, or this "
                       "is a defect of package.py)")


def unpack(packed):
    """The source inside a packed script (bytes), found without running it. ValueError if it is not packed."""
    start = STUB.partition("{data}")[0].encode()
    if not packed.startswith(start):
        raise ValueError("not a script packed by package.py")
    data, size = (node.value for node in ast.parse(packed).body[0].args.defaults)
    return CODEC["read"](data, size)


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
    world = run.manifest.get("world_size", 1)
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
