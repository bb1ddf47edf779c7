"""Parts for several test modules: tiny settings, random models, and three ways to run the script.

    run_main   main() in this process: cheapest, for all that needs no process of its own
    Children   processes forked from a server with PyTorch in it: they can be killed and stopped
    launch     python or torchrun as a user starts them: for what only a fresh interpreter can show

Everything is small, hermetic and on the CPU. Fixtures are in conftest.py.
"""

import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

VOCAB = 384
SEQ, STRIDE, CHUNK = 64, 16, 256
# A model with every feature of the trunk that trains a step in milliseconds.
TINY = dict(
    vocab_size=VOCAB,
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=4,
    xsa_last_n=2,
    bigram_vocab_size=64,
    bigram_dim=16,
    nfm_hidden_dim=16,
    iterations=6,
    train_batch_tokens=512,
    train_seq_len=SEQ,
    micro_batch_tokens=256,
    warmdown_iters=3,
    warmup_steps=0,
    train_log_every=1,
    val_loss_every=0,
    checkpoint_every=0,
    checkpoint_seconds=0.0,
    eval_seq_len=SEQ,
    eval_stride=STRIDE,
    eval_batch_seqs=4,
    ttt_chunk_tokens=CHUNK,
    ttt_epochs=1,
    ttt_batch_seqs=2,
    ttt_freeze_blocks=1,
    device="cpu",
    dtype="float32",
)
# Parts that the trunk of TINY lacks.
EVERY_PART = dict(
    ve_dim=8,
    ve_last_n=2,
    flow_enabled=True,
    flow_latent_dim=8,
    flow_hidden_dim=16,
    e2e_ttt_enabled=True,
)


def tiny_config(**changes):
    """A Config of TINY with `changes`, for tests that stay in this process."""
    return train_gpt.Config(**{**TINY, **changes})


def environ_of(command, **more):
    """{name: text} of a command's assignments."""
    return {**dict(word.split("=", 1) for word in command.split()), **more}


def preset_config(name, **changes):
    """A preset with `changes`, as its variables would give it."""
    text = {key.upper(): str(value) for key, value in changes.items()}
    return train_gpt.Config.from_env({"PRESET": name, **text})


def layers_for(preset):
    """Loops and parallel residuals of a preset, for a model of two or three layers."""
    differences = train_gpt.PRESETS[preset]
    if "num_loops" not in differences:
        return {}
    parallel = min(1, differences.get("parallel_last_n", 0))
    return dict(loop_start=0, loop_end=1, parallel_last_n=parallel)


# ---- data ----


@dataclasses.dataclass(frozen=True)
class TinyData:
    """Two training shards, one validation shard and their tokenizer (384 pieces, byte fallback)."""

    data_path: Path
    tokenizer_path: Path

    @property
    def paths(self):
        return dict(data_path=str(self.data_path), tokenizer_path=str(self.tokenizer_path))

    @property
    def settings(self):
        return dict(TINY, **self.paths)


def train_tokenizer(texts, path, vocab_size=VOCAB, **options):
    """Train a SentencePiece model like the challenge's, write it to `path` and return it."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        character_coverage=0.999,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()),
        model_writer=model,
        vocab_size=vocab_size,
        **{**settings, **options},
    )
    Path(path).write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


# ---- models ----


@torch.no_grad()
def randomised(module):
    """Every parameter away from its initial value, which could hide what it multiplies."""
    for param in module.parameters():
        noise = torch.randn_like(param)
        param.copy_(noise / param.size(-1) ** 0.5 if param.dim() > 1 else 0.5 * noise)
    return module


@torch.no_grad()
def random_model(config, attend=train_gpt.sdpa_attention, seed=0, spread=0.15):
    """A model a little off its initial weights, in training mode as a trainer would leave it."""
    torch.manual_seed(seed)
    model = train_gpt.GPT(config, attend)
    for param in model.parameters():
        param.add_(spread * torch.randn_like(param))
    return model.train()


def random_batch(config, length=21):
    """ids and targets (2, length); documents begin inside the rows."""
    ids = torch.randint(train_gpt.BOS + 1, config.vocab_size, (2, length + 1))
    ids[0, 0] = ids[:, length // 3] = ids[1, length // 2] = train_gpt.BOS
    return ids[:, :-1], ids[:, 1:]


def weights(model):
    """{name: copy} of the state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(left, right):
    """True if two states are the same bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def count(module):
    return sum(param.numel() for param in module.parameters())


def assert_near(mine, expected, atol, rtol, name):
    torch.testing.assert_close(
        mine, expected, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}"
    )


class Operations(TorchDispatchMode):
    """Names of the operations that are dispatched inside, in order; views are left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returned = operation._schema.returns
        aliases = [value.alias_info for value in returned]
        if not returned or any(alias is None or alias.is_write for alias in aliases):
            self.names.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


# ---- the model's formulas, plain, for references ----


def plain_norm(x):
    """RMSNorm without gain, with float32's epsilon in any type."""
    return x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()


def plain_rope(x, dims, base):
    """x (B, T, d) of one head: the pair (x_j, x_{j + dims/2}) is a complex number that turns."""
    half = dims // 2
    angle = torch.tensor(
        [[t * base ** (-2 * j / dims) for j in range(half)] for t in range(x.size(1))]
    )
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(x[..., :half], x[..., half:dims]) * turn
    return torch.cat([turned.real, turned.imag, x[..., dims:]], -1)


def plain_heads(c, q_gain, q, k, v, is_exclusive, gates=None):
    """Attention before its projection, by a loop over heads and an explicit mask.

    q (B, T, D), k and v (B, T, K*d), gates' logits (B, T, H) or None -> (B, T, D).
    """
    d, heads = c.head_dim, []
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool).triu(1)
    for h in range(c.num_heads):
        mine, group = slice(h * d, (h + 1) * d), h // (c.num_heads // c.num_kv_heads)
        shared = slice(group * d, (group + 1) * d)
        query = plain_rope(plain_norm(q[..., mine]), c.rope_dims, c.rope_base) * q_gain[h]
        key = plain_rope(plain_norm(k[..., shared]), c.rope_dims, c.rope_base)
        value = v[..., shared]
        scores = (query @ key.mT / math.sqrt(d)).masked_fill(future, -math.inf)
        y = torch.softmax(scores, -1) @ value
        if is_exclusive:
            unit = value / value.norm(dim=-1, keepdim=True)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        if gates is not None:
            y = y * torch.sigmoid(gates[..., h])[..., None]
        heads.append(y)
    return torch.cat(heads, -1)


# ---- evaluations in this process ----


class Seen(train_gpt.Observer):
    """nll of every target as the loop counted it."""

    def __init__(self, num_targets):
        self.nll = np.full(num_targets, np.nan)

    def scored(self, targets, logps, nll):
        assert np.isnan(self.nll[targets]).all()
        self.nll[targets] = nll.double().numpy()


@dataclasses.dataclass
class Case:
    """A configuration, a runtime and a validation stream."""

    config: train_gpt.Config
    runtime: train_gpt.Runtime
    stream: train_gpt.ValidationSet

    def model(self):
        choice = train_gpt.pick_attention(self.runtime.device, self.runtime.dtype)
        return random_model(self.config, choice.function)

    def run(self, model=None, stream=None, stride=None, **options):
        """(Score, Seen) of one evaluation."""
        model, stream = model or self.model(), stream or self.stream
        options.setdefault("observer", Seen(stream.num_targets))
        score = train_gpt.evaluate(model, stream, self.config, self.runtime, stride, **options)
        return score, options["observer"]

    def log(self):
        return log_of(self.runtime.dir)

    def checkpoints(self):
        """Keeps states in the run's directory, none unless the evaluation stops."""
        return train_gpt.Checkpointer(self.runtime, "eval", self.config.checkpoint_seconds)


# ---- files of a run ----


def read_json(path):
    return json.loads(Path(path).read_text())


def log_of(run_dir):
    return (Path(run_dir) / "train.log").read_text()


def events(run_dir, kind=None):
    """Events of metrics.jsonl, those of one kind if given; every line must parse."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["event"])]


def steps_of(run_dir):
    """Steps logged so far, [] before the first; a line may be unfinished."""
    path = Path(run_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [int(step) for step in re.findall(r'"event": "step".*?"step": (\d+)', text)]


def exact_scores(output):
    """{label: bits per byte as printed} of the exact lines."""
    found = dict(re.findall(r"^(\w+)_exact .*val_bpb:(\S+)", output, re.M))
    found.pop("final_int8_zlib_roundtrip", None)  # repeats the headline score
    return found


def newest(run_dir):
    """Path of the newest training checkpoint."""
    return sorted((Path(run_dir) / "checkpoint").glob("step_*.pt"))[-1]


def contents(folder):
    """{relative path: bytes} of the files below."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# ---- run the script ----


def environment(**settings):
    """Environment for a run: what it needs to start, and `settings` as variables in capitals."""
    names = ("PATH", "LANG", "TMPDIR", "HOME")
    keep = {name: os.environ[name] for name in names if name in os.environ}
    text = {
        name.upper(): str(int(value)) if isinstance(value, bool) else str(value)
        for name, value in settings.items()
    }
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **text}


def launch(settings, cwd, ranks=1, script=ROOT / "train_gpt.py", timeout=240):
    """Run the script as a user would; returns the CompletedProcess, stdout and stderr as text."""
    return subprocess.run(
        [*python_command(ranks), str(script)],
        cwd=cwd,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python_command(ranks):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else [])]


@dataclasses.dataclass(frozen=True)
class Finished:
    """Exit code, printed text and directory of a run."""

    code: int
    out: str
    err: str
    dir: Path

    @property
    def lines(self):
        return self.out.splitlines()

    def scores(self):
        return read_json(self.dir / "scores.json")["scores"]


def run_main(run_dir=None, arguments=(), cwd=None, **settings):
    """train_gpt.main() in this process, `settings` as its environment; returns Finished.

    A process of its own would spend seconds on imports.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    if run_dir is not None:
        settings["run_dir"] = run_dir
    with pytest.MonkeyPatch.context() as patch, redirected[0], redirected[1]:
        patch.setattr(os, "environ", environment(**settings))
        patch.setattr(sys, "argv", ["train_gpt.py", *arguments])
        patch.chdir(cwd or Path(run_dir).parent)
        try:
            train_gpt.main()
        except train_gpt.GolfError as error:
            code = error.code
            print(f"error: {error}", file=sys.stderr)
        except SystemExit as leaving:
            code = leaving.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if code:
        gc.collect()  # a stopped run's lock goes with its Runtime, which frames may still hold
    return Finished(code, out.getvalue(), err.getvalue(), Path(settings.get("run_dir") or ""))


# ---- runs that are killed, stopped and repeated ----

SERVER = """
import json, os, runpy, sys
import numpy, sentencepiece, torch, torch._dynamo, torch.distributed, zstandard
sys.path.insert(0, sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:  # waits for the run and leaves its exit status in a file
        pid = os.fork()
        if pid == 0:
            break
        for name in ("pid", "rc"):
            value = pid if name == "pid" else os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with open(job["files"] + "tmp", "w") as file:
                print(value, file=file)
            os.rename(job["files"] + "tmp", job["files"] + name)
        os._exit(0)
    while os.waitpid(-1, os.WNOHANG)[0]:
        pass
else:
    os._exit(0)
os.environ.clear()
os.environ.update(job["environ"])
os.chdir(job["cwd"])
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(os.open(job["files"] + name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
sys.argv[:] = [job["script"]]
runpy.run_path(job["script"], run_name="__main__")
"""
# 12 steps of a small model that validates, and saves after every step and every item of an
# evaluation.
QUICK = dict(
    num_layers=2,
    xsa_last_n=1,
    iterations=12,
    warmdown_iters=4,
    eval_stride=32,
    micro_batch_tokens=512,
    eval_batch_seqs=8,
    val_loss_every=5,
    checkpoint_seconds=1e-9,
    dtype="float32",
)
MAIN = """
try:
    train_gpt.main()
except train_gpt.GolfError as error:
    sys.exit(print(f"error: {error}", file=sys.stderr) or error.code)
"""
# Every durable write ends in a rename. AT="name number what" lets this happen at one of those of
# files name*: die with half of it written, with the whole but unnamed, or named; hold on and say
# so; or get a signal.
AT_WRITE = """
replace, count, (name, number, what) = os.replace, [], os.environ.pop("AT").split()
def at_write(source, target):
    match = os.path.basename(target).startswith(name.strip("*"))
    count.extend([1] * match)
    hit = match and len(count) == int(number)
    if hit and what == "half":
        os.truncate(source, os.path.getsize(source) // 2)
    if not hit or what not in ("half", "whole"):
        replace(source, target)
    if hit and what in ("half", "whole", "named"):
        os.kill(os.getpid(), 9)
    while hit and what == "hold":
        open(os.environ["RUN_DIR"] + ".held", "w").close()
        time.sleep(0.01)
    if hit:
        os.kill(os.getpid(), int(what))
os.replace = at_write
"""


def at_step(step, action):
    """A patch that runs `action` in the step after `step` others; it may use `self`, change
    `loss`."""
    return f"""
accumulate = train_gpt.Trainer.accumulate
def at_step(self, step, rows):
    loss = accumulate(self, step, rows)
    if step == {step}:
        {action}
    return loss
train_gpt.Trainer.accumulate = at_step
"""


class Group:
    """The processes of one run, one per rank."""

    def __init__(self, files):
        self.files = files

    def _read(self, name, rank, timeout=30.0):
        path, end = Path(f"{self.files[rank]}{name}"), time.monotonic() + timeout
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.002)
        return path.read_text() if path.exists() else None

    def kill(self):
        for rank in range(len(self.files)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self._read("pid", rank)), signal.SIGKILL)

    def wait(self, timeout=240.0):
        """Exit status of every rank (negative for signals); None if one runs after `timeout`."""
        end = time.monotonic() + timeout
        codes = [
            self._read("rc", rank, max(0.0, end - time.monotonic()))
            for rank in range(len(self.files))
        ]
        return None if None in codes else [int(code) for code in codes]

    def stdout(self, rank=0):
        return self._read("stdout", rank) or ""

    def stderr(self, rank=0):
        return self._read("stderr", rank) or ""

    def until(self, holds):
        """Wait until holds() is true; False when the run ended before."""
        end = time.monotonic() + 240
        while not holds():
            if self.wait(0.0) is not None:
                return holds()
            shown = f"{self.stdout()}\n{self.stderr()}"
            assert time.monotonic() < end, f"waited in vain:\n{shown}"
            time.sleep(0.001)
        return True


class Children:
    """Starts runs by forking the server; `folder` holds output, run directories and scripts."""

    def __init__(self, folder, data):
        self.folder, self.data = Path(folder), data
        self.count, self.groups, self.made = 0, [], {}
        command = [sys.executable, "-c", SERVER, str(ROOT)]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment())

    def new(self, name):
        self.count += 1
        return self.folder / f"{self.count:03d}_{name}"

    def script(self, patch):
        """A file that imports train_gpt, runs `patch` and then main()."""
        path = self.new("wrapper.py")
        path.write_text(
            f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"import train_gpt\n{patch}\n{MAIN}"
        )
        return path

    def settings(self, run_dir, **changes):
        return {**self.data.settings, **QUICK, "run_dir": run_dir, **changes}

    def start(self, run_dir, ranks=1, patch=None, script=ROOT / "train_gpt.py", **changes):
        """A running Group of QUICK with `changes`, of the script or with a patch of it."""
        script = self.script(patch) if patch else script
        settings = self.settings(run_dir, **changes)
        return self.start_script(script, settings, self.folder, ranks)

    def start_script(self, script, settings, cwd, ranks=1):
        """A running Group of any script and settings."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = Group([str(self.new(f"rank{rank}_")) for rank in range(ranks)])
        for rank, files in enumerate(group.files):
            place = dict(rank=rank, local_rank=rank, world_size=ranks, master_addr="localhost")
            ranked = dict(place, master_port=port) if ranks > 1 else {}
            environ = environment(**settings, **ranked)
            job = dict(files=files, script=str(script), environ=environ, cwd=str(cwd))
            print(json.dumps(job), file=self.server.stdin, flush=True)
        self.groups.append(group)
        return group

    def finish(self, run_dir, ranks=1, patch=None, code=0, **changes):
        """Run to the end and check the exit status of rank 0 (all ranks where it is 0)."""
        group = self.start(run_dir, ranks, patch, **changes)
        codes = group.wait()
        expected = [code] * (ranks if code == 0 else 1)
        output = f"{group.stdout()[-2000:]}\n{group.stderr()[-3000:]}"
        assert codes and codes[: len(expected)] == expected, f"{codes}\n{output}"
        return group

    def once(self, name, **options):
        """(directory, output) of a run that is made once for all modules."""
        if name not in self.made:
            run_dir = self.new(name)
            self.made[name] = run_dir, self.finish(run_dir, **options).stdout()
        return self.made[name]

    def copy(self, run_dir):
        """A copy of a run's directory."""
        target = self.new("copy")
        shutil.copytree(run_dir, target)
        return target

    def unscored(self, run_dir):
        """A copy of a finished run that has still to be scored."""
        target = self.copy(run_dir)
        (target / "scores.json").unlink()
        return target

    def close(self):
        for group in self.groups:
            if group.wait(0.0) is None:
                group.kill()
        self.server.stdin.close()
        self.server.wait(10)


def outcome(run_dir):
    """Tensors, artifact and scores: all that must not depend on interruptions."""
    saved = train_gpt.load_tensors(Path(run_dir) / "final_model.pt")["state_dict"]
    results = read_json(Path(run_dir) / "scores.json")
    for score in results["scores"].values():
        del score["eval_time_s"], score["audited"]  # an audit may come after the score
    return dict(
        weights={name: tensor.numpy().tobytes() for name, tensor in saved.items()},
        artifact=(Path(run_dir) / "final_model.int6.ptz").read_bytes(),
        **{name: results[name] for name in ("scores", "finished", "steps")},
    )
