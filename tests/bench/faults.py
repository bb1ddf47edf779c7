"""Faults of one line, put into train_gpt.py one at a time: which of them do the tests catch?

    python tests/bench/faults.py --out faults.json            # all rooms; hours on one core
    python tests/bench/faults.py --out faults.json --rooms Data Model
    python tests/bench/faults.py --check                      # each fault applies and compiles
    python tests/bench/faults.py --out faults.json --report   # the table, without running anything

Works in a copy of the repository. A fault is put in, the tests of its room run until the first
failure, and the fault is taken out. --out keeps each outcome, so that the same command goes on
where it was stopped. Tests that fail without any fault, and slow ones, count for nothing.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QUICK = 0.5  # seconds; the quicker tests run first
SLOWER = 3  # times as long as without a fault, and a minute: then the tests hang, which is caught
# Tests of each room, cheapest first.
TESTS = {
    "Data": ["data", "shuffle", "odd_data", "bad_input", "demo"],
    "Model": ["model", "refiners", "frontier", "published"],
    "Optimisers": ["optimisers", "training", "distributed"],
    "Training": ["training", "optimisers", "frontier", "distributed", "resume", "log"],
    "Evaluation": ["evaluation", "legality", "distributed", "resume", "main", "log"],
    "Quantisation": ["quantisation", "main", "log"],
    "main": ["main", "log", "bad_input", "runtime", "resume", "faults", "evaluation", "legality"],
}
# A line is the name of a fault and the code around it, with each change as «old → new». The code
# without the changes stands at one place of train_gpt.py.
LINES = {
    "Data": r"""
header of 255 words: SHARD_HEADER = «256 → 255»
big-endian tokens: np.memmap(path, "«< → >»u2", "r", HEADER_BYTES
size of a shard unchecked: if num_tokens <= 0« or size != expected_size → »:
id equal to the vocabulary: ids.max() «>= → >» vocab_size
sequences step over their last target: at = first * «self.seq_len → (self.seq_len + 1)» %
ring jumps a shard's end: np.searchsorted(self.ends, at, side="«right → left»")
shuffle in the same order in each pass: np.random.default_rng([self.seed, «number → 0»])
shuffle without room for the last target: (sizes - «1 - → » self.phases) // self.seq_len
shuffled sequences counted from the next shard: self.«before → counted»[shards]
space counted after BOS: self.spaced[target_ids]« & ~self.is_boundary[prev_ids] → »
byte piece of two bytes: self.base[i] = «1 → 2»
characters instead of bytes: len(piece.removeprefix("▁").replace("▁", " ")«.encode() → »)
control pieces have bytes: «model.is_control(i) or  → »model.is_unknown(i)
bytes summed in 16 bits: total = int(self.bytes.sum(dtype=np.«int64 → uint16»))
bytes of the previous token: (tokens[low:high], tokens[«low + 1 : high + 1 → low:high»])
last target trimmed: tokens[: windows * config.eval_seq_len« + 1 → »]
any tokenizer is the artifact's: if expected_sha256« →  and False» and sha256_file(
a proxy called canonical: has_the_targets «and → or» low <= total <= high else
""",
    "Model": r"""
attention sees all: F.scaled_dot_product_attention(q, k, v, is_causal=«True → False»
rotary frequencies inverted: config.rope_base ** («-even → even» / config.rope_dims)
rotation is a reflection: a * cos «- → +» b * sin
gradient rotated forward: rotate_(dx, cos, «-sin → sin»)
deeper layers louder: torch.tensor((layer + 1) ** «-0.5 → 0.5»)
own value added: torch.addcmul(grouped, along, v, value=«-1 → 1»)
XSA in a layer less: layer «>= → >» config.num_layers - config.xsa_last_n
no gain of queries: RMSNorm.apply(q, «self.q_gain[:, None] → None», cos, sin)
value residual swapped: mix[«0 → 1»] * (v if v_first is None else v_first) + mix[«1 → 0»] * v
gate without sigmoid: y * «torch.sigmoid(gate) → gate».unsqueeze(-1)
MLP not leaky: F.leaky_relu(self.fc(x, scale), «0.5 → 0.0»).square()
residual mix swapped: torch.addcmul(x * mix[«0 → 1»], x0, mix[«1 → 0»])
parallel MLP sees attention: «normed if self.parallel else  → »rms_norm(x)
bigram hash swapped: torch.bitwise_xor(36313 * t[:, «1: → :-1»], 27191 * t[:, «:-1 → 1:»])
first bigram row: (1, 0), value=«last → 0»)
smear crosses documents: inside = (ids != «BOS → -1»)
smear adds instead of mixing: torch.sigmoid(self.gate).to(x.dtype) * (predecessors(x, ids)« - x → »)
value embedding from the first layer on: range(«config.num_layers - config.ve_last_n → 0»,
FlowRefiner without residual: z = «z + → » self.proj(F.gelu(self.fc(z)))
flow line reversed: x_t = (1 - along) * «z + along * x → x + along * z»
flow loss teaches the trunk: self.nfm.flow_loss(flow_input«.detach() → », noise_keys)
noise too narrow: «math.sqrt(2) *  → »torch.erfinv(
TTT-Linear sees all: (q_part @ k_part.mT + 1)«.tril() → »
TTT-Linear unlearns: w = w «- → +» self.rate * (k_part.mT @ gradient)
LayerNorm's Jacobian cut: inverse * (g - mean« - unit * along → »)
skips in encoder order: skips.pop(« → 0»)
skip gate reversed: torch.lerp(«weight * skip, x → x, weight * skip», gate)
no soft cap: return cap * «torch.tanh(raw) → raw»
a loop less: layers[config.loop_start : after] * «(config.num_loops + 1) → config.num_loops»
weight of the flow loss ignored: loss + «weight *  → »self.nfm.flow_loss(
late QAT stops the gradient: torch.lerp(value, rounded, self.qat_blend)« + (self.weight - value) → »
LayerNorm by the sum of squares: centred.square().«mean → sum»(-1, keepdim=True)
""",
    "Optimisers": r"""
sign of a coefficient: NEWTON_SCHULZ_B = «-4.7750 → 4.7750»
stack normalised as one: x.norm(«dim=(-2, -1), keepdim=True → »)
no Nesterov: ahead = «grad.add(buffer, alpha=self.momentum) → buffer.clone()»
gradient damped in the momentum: buffer.mul_(self.momentum).add_(grad« → , alpha=1 - self.momentum»)
factor of the other shape: («rows / columns → columns / rows») ** 0.5
decay without the rate: 1 - «self.lr *  → »self.weight_decay
columns of equal norm: ((ahead[:num_wide], «-1 → -2»), (ahead[num_wide:], «-2 → -1»))
tables in the scalar group: group = "«embed → scalar»"
EMBED_WD=0 ignored: config.embed_wd «>= → >» 0
betas swapped: betas=(«config.beta1, config.beta2 → config.beta2, config.beta1»)
small gradients blown up: (clip / (norm + 1e-6))«.clamp(max=1.0) → »
clip by Muon's norm alone: («squared + squared_norm(grads) → squared»).sqrt()
clip by one rank's norm: «comm.all_reduce(squared).wait() → pass»
MIN_LR ignored: return «max(left, config.min_lr) → left»
warmdown a step late: steps_left = config.iterations - step« →  + 1»
cosine upside down: left = 0.5 * (1 «- → +» math.cos(math.pi * left))
momentum warms back: «(1 - done) → done» * config.muon_momentum_warmup_start + «done → (1 - done)»
average of the newest: torch._foreach_lerp_(self.ema, self.params, «1 - decay → decay»)
snapshots a step early: «(step + 1) → step» % self.config.swa_every == 0
sum of the snapshots: [total« / self.snapshots → » for total in self.swa]
share of the run by the slower clock: fraction = «max → min»(fraction, seconds /
momentum not restored: «buffer[: len(part)].copy_(part) → pass»
padding sent to the wrong rank: first = «self.comm.rank * len(buffer) → 0»
""",
    "Training": r"""
ranks read the same sequences: first = (self.step * self.comm.world« + self.comm.rank → »)
each token its own target: self.loss(tokens[:, :-1], tokens[:, «1: → :-1»], noise)
sum over micro-batches: («self.accumulation_steps *  → »self.comm.world)
sum over ranks: (self.accumulation_steps« * self.comm.world → »)
gradients of the step before: «self.model.zero_grad() → pass»
the same noise in each micro-batch: config, step, first« + low → », self.micro_batch_seqs
the same noise in each step: config, «step → 0», first + low, self.micro_batch_seqs
clock lost at a resume: state["timing"]["steps"].tolist()« → ; self.seconds = 0.0»
average not saved: PARTS = ("model", "muon", "adamw"«, "average" → »)
infinite loss goes on: if «not math.isfinite → math.isnan»(loss):
cap passed by a step: if self.seconds« + max(mean, median) → » > cap:
AdamW's rate constant: group["lr"] = group["base_lr"]« * scale → »
Muon's rate constant: self.muon.lr = config.matrix_lr« * scale → »
Muon's momentum constant: «momentum_at(config, self.step) → config.muon_momentum»
QAT early instead of late: float(scale «< → >» config.late_qat_threshold)
loops before LOOP_AT: fraction «>= → <» self.config.loop_at
CHECKPOINT_EVERY ignored: if save« or (every and self.step % every == 0) → »:
raw weights exported: «state.update(zip(names, tensors, strict=True)) → pass»
pace of one step: tokens = config.train_batch_tokens« * len(recent) → »
VAL_LOSS_EVERY at other steps: if done or (every and self.step and self.step % every == «0 → 1»):
average never updated: «self.average.update(self.step, scale) → pass»
""",
    "Evaluation": r"""
nats called bits: return nats« / math.log(2) → » / num_bytes
context shorter by the stride: Window(max(0, end - seq_len« →  + stride // 2»), done, end)
a window's first target left out: Window(max(0, end - seq_len), done« →  + 1», end)
window of the next chunk scored before training: windows[high].first «< → <=» (c + 1) * chunk
TTT's rate rises: (1 «+ → -» math.cos(math.pi * c / (chunks - 1)))
TTT_EPOCHS ignored: for _ in range(«config.ttt_epochs → 1»):
training ahead allowed: if «end > self.scored_until → False»:
bytes of the next target: self.stream.bytes[«first:end → first + 1 : end + 1»].sum(dtype=np.int64)
targets may come twice: if «first < self.last → False»:
gaps allowed: if «not (coverage == 1).all() → False»:
weights stay adapted: «param.copy_(value) → pass»
last blocks frozen: model.blocks[«:freeze_blocks → freeze_blocks:»]
SLOT fitted on what is scored: known_until = «first if causal else  → »end
one shift for all windows: rows = «len(known) if causal else  → »1
TTT without momentum: torch.optim.SGD(params, self.config.ttt_lr«, self.config.ttt_momentum → »)
TTT's rate constant: «self.sgd.param_groups[0]["lr"] = rate → pass»
TTT not clipped: if «self.config.ttt_grad_clip → False»:
each rank trains on all rows: mine = starts«[self.comm.rank :: self.comm.world] → »
mean of parts summed: share = «len(ids) / len(rows) → 1.0»
adapted weights not restored: «self.model.load_state_dict(state["model"]) → pass»
state of another evaluation taken up: from_main(«state["identity"] == self.identity → True»)
spot checks see nothing: if «not counted.equals(again) → False»:
published SLOT called legal: adapting.insert(0, "«illegal → legal»")
published SLOT marked legal: legal=«self.slot != "published" → True»
rank's share begins at the round: low = item.low« + self.comm.rank * size → »
sliding window by whole windows: int6_sliding_window", config.«eval_stride → eval_seq_len»
""",
    "Quantisation": r"""
a code too many: return 2 ** (bits - 1)« - 1 → »
codes not clamped: (weight / scale).round()«.clamp(-top, top) → »
small tensors in integers: math.prod(shape) «<= → >» HALF_LIMIT and not
worst clip taken: errors.«argmin → argmax»(0, keepdim=True)
clip between the wrong neighbours: (largest[:, «low → high»], largest[:, «high → low»], part)
int5 from the ends inward: («abs → -abs»(layer - middle), -layer)
code not in the budget: over = len(blob)« + code_bytes → » - config.budget_bytes
exact fit refused: if over «<= → <» 0:
error pushed the wrong way: upper[j, j + 1 : high], alpha=«-1 → 1»)
later blocks not corrected: «left[:, high:] -= errors @ upper[low:high, high:] → pass»
columns stay sorted: «torch.empty_like(codes).index_copy_(1, order, codes) → codes»
predicted loss doubled: return «0.5 *  → »weight * ((error @ hessian) * error).sum(1)
steps of columns inverted: to_exponents(«reach / level → level / reach»)
steps of rows inverted: to_exponents(level * weight.«rsqrt → sqrt»())
variance without its second factor: (probs« * (1 - probs) → »).sum(0)
the gradient's sum of absolutes: .grad.float().«square → abs»().sum(1)
high plane of negative codes: high = («(codes - low) → codes» >> 8).astype(np.int8)
checksum unchecked: («hashlib.sha256(body).digest() == digest → True»,
room to spare in the payload: if at «!= → >» len(raw):
version of the format unchecked: («version == ARTIFACT_VERSION → True»,
bits of blocks and tables swapped: config.block_bits if« →  not» name.startswith("blocks.") else
control scalars in half precision: if «len(shape) < 2 or name.split(".")[-1] in CONTROL → False»:
gptq where rounding is better: better = losses «<= → >=» plain
calibration on the first sequences: stream.sequences(i« * stream.num_sequences // wanted → », 1)
""",
    "main": r"""
exit code of data errors: code = «3 → 4»
exit code of artifact errors: code = «4 → 2»
exit code of divergence: code = «5 → 1»
exit code of illegal scores: code = «6 → 1»
exit code of a full disk: code = «7 → 1»  #
exit code of a stop: code = «75 → 0»
weakest score as headline: return legal[«-1 → 0»] if legal else None
illegal score not marked: mark = ""« if score.legal else " legality:illegal" → »
loss printed as bits per byte: val_bpb:{score.«val_bpb → val_loss»:.8f}{mark}
code not in the total: total_bytes=artifact_bytes« + code_bytes → »
artifact scored as float weights: self.float_path if job.label == "«pre_quant → »"
illegal score called legal: if «not score["legal"] → False»:
temperature inverted: torch.softmax(best «/ → *» config.temperature, 0)
sample goes on after a document: if token in («BOS, EOS → »):
audit of another file taken up: passed_before = «old.get("key") == key and  → »old["passed"]
failed audit passes: «[check["name"] for check in checks if not check["passed"]] → []»
unfinished for ever: finished=«True → False»)
artifact with any tokenizer: = «self.load(self.artifact_path).tokenizer_sha256 → ""»
budget of a given file unchecked: if «over > 0 → False»:
roundtrip as a submission: ("pre_quant", "float"))« and not label.endswith("_roundtrip") → »
other settings of a run ignored: «self.compare_with(old) → pass»
""",
}


class Fault(NamedTuple):
    """One fault, its code before and after."""

    room: str
    name: str
    old: str
    new: str


def fault(room, line):
    name, _, code = line.partition(": ")
    old, new = (re.sub("«(.*?) → (.*?)»", side, code) for side in (r"\1", r"\2"))
    return Fault(room, name, old, new)


FAULTS = [fault(room, line) for room, lines in LINES.items() for line in lines.strip().split("\n")]


def injected(source, fault):
    """The source with the fault in it. Raises ValueError unless its code stands at one place."""
    if source.count(fault.old) != 1:
        raise ValueError(f"{fault.old!r} stands at {source.count(fault.old)} places")
    return source.replace(fault.old, fault.new)


def check(source):
    """Messages on faults that do not apply, do not compile or change nothing, and lost tests."""
    tree = ast.dump(ast.parse(source))
    messages = []
    for fault in FAULTS:
        try:
            if ast.dump(ast.parse(injected(source, fault))) == tree:
                messages.append(f"{fault.name}: changes nothing")
        except (ValueError, SyntaxError) as error:
            messages.append(f"{fault.room}: {fault.name}: {error}")
    names = [fault.name for fault in FAULTS]
    messages += [f"{name}: twice" for name in set(names) if names.count(name) > 1]
    paths = {path for room in TESTS for path in test_paths(room)}
    return messages + [f"{path}: no such file" for path in paths if not (ROOT / path).exists()]


def test_paths(room):
    return [f"tests/test_{name}.py" for name in TESTS[room]]


class Workplace:
    """A copy of the repository in which faults are put in and tests are run."""

    def __init__(self, folder):
        self.folder = Path(folder) / "repo"
        skipped = shutil.ignore_patterns(".git", "__pycache__", "runs", "data", "*.ptz", "*.pt")
        shutil.copytree(ROOT, self.folder, ignore=skipped)
        self.script = self.folder / "train_gpt.py"
        self.source = self.script.read_text()

    def pytest(self, *arguments, seconds=None):
        """(exit code, output) of pytest; 124 where the tests take more than `seconds`."""
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb=no"]
        child = subprocess.Popen(
            [*command, "-p", "no:cacheprovider", *arguments],
            cwd=self.folder,
            # A cached bytecode file is told from a new one by size and second alone.
            env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(timeout=seconds)
            return child.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            return 124, ""

    def clean_tests(self, room):
        """(quick tests, others, seconds of all): the tests of a room that pass without a fault."""
        begin = time.monotonic()
        self.script.write_text(self.source)
        durations = ("--durations=0", f"--durations-min={QUICK}")
        _, output = self.pytest("-rA", *durations, *test_paths(room))
        slow = set(re.findall(r"^\S+s (?:setup|call|teardown) +(.+)$", output, re.M))
        passed = named_tests(output, "PASSED")
        quick = [test for test in passed if test not in slow]
        others = [test for test in passed if test in slow]
        return quick, others, time.monotonic() - begin

    def outcome(self, fault, quick, others, seconds):
        """The verdict of one fault: the room's clean tests run until the first failure."""
        begin = time.monotonic()
        self.script.write_text(injected(self.source, fault))
        code, output = 0, ""
        for tests in (quick, others):
            if tests and code == 0:
                code, output = self.pytest("-x", "-rfE", *tests, seconds=SLOWER * seconds + 60)
        verdict = {0: "survived", 1: "caught", 2: "caught", 124: "caught"}.get(code, "error")
        return dict(
            room=fault.room,
            verdict=verdict,
            by="time" if code == 124 else "; ".join(named_tests(output, "FAILED", "ERROR")),
            seconds=round(time.monotonic() - begin, 1),
        )


def named_tests(output, *words):
    """Tests that the short summary of pytest names after one of the words."""
    lines = [line.partition(" ") for line in output.splitlines()]
    return [rest.split(" - ")[0] for word, _, rest in lines if word in words and "::" in rest]


def report(found):
    """Print caught and all faults by room, then those that survived."""
    faults = found["faults"]
    for room in TESTS:
        verdicts = [fault["verdict"] for fault in faults.values() if fault["room"] == room]
        print(f"{room:14}{verdicts.count('caught'):4} of {len(verdicts)}")
    caught = sum(fault["verdict"] == "caught" for fault in faults.values())
    print(f"{'all':14}{caught:4} of {len(faults)}, {len(FAULTS)} in the list")
    for name, fault in faults.items():
        if fault["verdict"] != "caught":
            print(f"{fault['verdict']}: {fault['room']}: {name}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("faults.json"), help="JSON of outcomes")
    parser.add_argument("--rooms", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--check", action="store_true", help="run no tests")
    parser.add_argument("--report", action="store_true", help="print what --out holds")
    options = parser.parse_args()
    messages = check((ROOT / "train_gpt.py").read_text())
    if options.check:
        print("\n".join([*messages, f"{len(FAULTS)} faults, {len(messages)} messages"]))
        sys.exit(bool(messages))
    found = dict(clean={}, faults={})
    if options.out.exists():
        found = json.loads(options.out.read_text())
    if options.report:
        report(found)
        return
    if messages:
        sys.exit("\n".join(messages))
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        place = Workplace(folder)
        for fault in FAULTS:
            room = fault.room
            if room not in options.rooms or fault.name in found["faults"]:
                continue
            if room not in found["clean"]:
                found["clean"][room] = place.clean_tests(room)
            outcome = place.outcome(fault, *found["clean"][room])
            found["faults"][fault.name] = outcome
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{outcome['verdict']:9}{room:14}{fault.name} ({outcome['by']})", flush=True)
    report(found)


if __name__ == "__main__":
    main()
