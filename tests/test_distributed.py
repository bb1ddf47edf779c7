"""One, two and four ranks train the same model and report the same scores; uneven shares never hang.

Each world size runs once, over gloo, a script that uses the public parts of train_gpt.py (two ranks by
torchrun as a user would, the others forked); many tests look at what it left.
"""
import os
import re
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import train_gpt
from conftest import ROOT, TINY, events, launch, read_json, tiny_config
from test_resume import AT_WRITE, at_step, children, copy_run, outcome, unscored  # noqa: F401

LAB = f"""
import dataclasses, json, os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import bench, torch, train_gpt
""" + """
def score(name, model, stream, **options):
    changes = options.pop("changes", {})
    changed = dataclasses.replace(config, **changes)
    found = train_gpt.evaluate(model, stream, changed, runtime, **options)
    left["scores"][name] = [found.val_loss, found.val_bpb, found.tokens, found.bytes]

left = dict(scores={}, out=os.environ.pop("LAB_OUT"))
config = train_gpt.Config.from_env(os.environ)
train_gpt.Comm = bench.CountingComm
runtime = train_gpt.Runtime(config, os.environ)
val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
trainer = train_gpt.Trainer(config, runtime, val)
trainer.announce()
trainer.run()
left["bytes_sent"] = runtime.comm.gather_rows([runtime.comm.bytes_sent])[:, 0].tolist()
sums = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
left["same_on_all_ranks"] = bool((runtime.comm.gather_rows(sums) == sums).all())

torch.manual_seed(1)
model = train_gpt.GPT(config)  # the same weights at every world size
with torch.no_grad():
    for param in model.parameters():
        param.add_(0.05 * torch.randn_like(param))
few = val.replaced(val.tokens[:2 * config.eval_seq_len + 1])
half = val.replaced(val.tokens[:10 * config.eval_seq_len + 1])
score("roundtrip", model, val, stride=config.eval_seq_len)
score("sliding", model, val)
score("four_targets_per_window", model, few, stride=4)
score("two_windows", model, few, stride=config.eval_seq_len)
score("slot", model, few, slot="causal")
score("ttt", model, val, ttt=True, changes=dict(ttt_lr=0.02))
score("ttt_two_epochs", model, few, ttt=True, changes=dict(ttt_chunk_tokens=64, ttt_epochs=2, ttt_lr=0.05))
score("ttt_small_chunks", model, half, ttt=True, changes=dict(ttt_chunk_tokens=64, ttt_lr=0.05))
score("ttt_one_row_steps", model, half, ttt=True, changes=dict(ttt_batch_seqs=1))
score("ttt_slot", model, few, ttt=True, slot="causal", changes=dict(ttt_chunk_tokens=64))
if runtime.comm.world == 2:
    left["audit"] = [c["name"] for c in train_gpt.audit(model, val, config, runtime) if not c["passed"]]
if runtime.is_main:
    train_gpt.save_tensors(left["out"] + ".pt", dict(trainer.model.state_dict()))
    train_gpt.write_json(left["out"] + ".json", left)
runtime.close()
"""
WORLDS = (1, 2, 4)
STEPS = dict(TINY, num_layers=2, xsa_last_n=1, iterations=20, warmdown_iters=8, dtype="float32")


@pytest.fixture(scope="module")
def labs(children, tmp_path_factory):
    """{world size: what its launch left: state, losses, scores, output}."""
    folder, labs = tmp_path_factory.mktemp("labs"), {}
    script = folder / "lab.py"
    script.write_text(LAB)
    for world in WORLDS:
        run_dir, out = folder / f"run{world}", folder / f"lab{world}"
        settings = dict(STEPS, lab_out=out)
        if world != 2:
            group = children.finish(run_dir, world, script=script, **settings)
            stdout = "".join(group.stdout(rank) for rank in range(world))
        else:
            done = launch(children.settings(run_dir, **settings), folder, world, script)
            assert done.returncode == 0, done.stderr[-4000:]
            stdout = done.stdout
        losses = {e["step"]: e["train_loss"] for e in events(run_dir, "step")}
        labs[world] = SimpleNamespace(**read_json(f"{out}.json"), state=train_gpt.load_tensors(f"{out}.pt"),
                                      losses=losses, stdout=stdout)
    return labs


@pytest.mark.parametrize("world", WORLDS[1:])
def test_parameters_agree_with_one_rank_after_twenty_steps(labs, world):
    for name, expected in labs[1].state.items():
        found = labs[world].state[name]
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


def test_training_has_moved_every_parameter(labs, tiny_data):
    """Otherwise their agreement would say nothing."""
    torch.manual_seed(42)
    fresh = train_gpt.GPT(tiny_config(num_layers=2, xsa_last_n=1)).state_dict()
    still = [name for name, value in labs[4].state.items() if torch.equal(value, fresh[name])]
    assert not still


@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_agree_with_one_rank_at_every_step(labs, world):
    assert sorted(labs[world].losses) == list(range(1, 21))
    assert labs[world].losses == pytest.approx(labs[1].losses, rel=1e-5)
    assert labs[1].losses[20] < labs[1].losses[1] - 1


def test_all_ranks_hold_the_same_parameters(labs):
    assert all(lab.same_on_all_ranks for lab in labs.values())


@pytest.mark.parametrize("name", ["roundtrip", "sliding", "four_targets_per_window", "two_windows"])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_scores_without_training_do_not_depend_on_the_ranks(labs, world, name):
    found, expected = labs[world].scores[name], labs[1].scores[name]
    assert found[:2] == pytest.approx(expected[:2], rel=1e-9)
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("name", ["ttt", "ttt_two_epochs", "ttt_small_chunks", "ttt_one_row_steps", "slot",
                                  "ttt_slot"])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_scores_with_training_do_not_depend_on_the_ranks(labs, world, name):
    found, expected = labs[world].scores[name], labs[1].scores[name]
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    assert found[2:] == expected[2:]


def test_the_adapted_scores_differ_from_the_plain_ones(labs):
    """Otherwise their agreement would say nothing."""
    scores = labs[1].scores
    assert abs(scores["ttt"][0] / scores["sliding"][0] - 1) > 1e-3
    assert abs(scores["ttt_small_chunks"][0] / scores["ttt_one_row_steps"][0] - 1) > 1e-3
    assert scores["ttt_slot"][0] != scores["slot"][0]


def test_the_audit_passes_at_two_ranks(labs):
    assert labs[2].audit == []


def test_all_log_lines_come_from_rank_0(labs):
    for world, lab in labs.items():
        assert lab.stdout.count("model_params:") == 1
        assert re.findall(r"^step:(\d+)/20 train_loss", lab.stdout, re.M) == [str(s) for s in range(1, 21)]
        assert len(re.findall(r"^legality C1 future_flip", lab.stdout, re.M)) == (world == 2)
        assert f"world_size:{world} grad_accum_steps:{2 if world == 1 else 1}" in lab.stdout


class Collectives:
    """Stands in for torch.distributed on rank 0 of `world` equal ranks; sums what a ring makes each send."""

    def __init__(self, world):
        self.world, self.sent = world, 0

    def all_reduce(self, tensor, async_op):
        tensor.mul_(self.world)
        self.sent += 2 * self.part(tensor)
        return SimpleNamespace(wait=lambda: None)

    def reduce_scatter(self, out, stack, async_op):
        out.copy_(stack[:len(out)] * self.world)
        self.sent += self.part(stack)
        return SimpleNamespace(wait=lambda: None)

    def all_gather(self, out, part, async_op):
        out.copy_(part.repeat(self.world, *[1] * (part.dim() - 1)))
        self.sent += self.part(out)
        return SimpleNamespace(wait=lambda: None)

    def part(self, tensor):
        return tensor.numel() * tensor.element_size() * (self.world - 1) // self.world


def bytes_of_a_step(monkeypatch, world):
    """(counted by the bench, moved by the collectives) in one optimiser step of the tiny model."""
    ring, comm = Collectives(world), bench.CountingComm(0, world)
    monkeypatch.setattr(train_gpt, "dist", SimpleNamespace(all_reduce=ring.all_reduce))
    monkeypatch.setattr(train_gpt, "reduce_scatter", ring.reduce_scatter)
    monkeypatch.setattr(train_gpt, "all_gather", ring.all_gather)
    config = tiny_config(num_layers=2, xsa_last_n=1)
    model = train_gpt.GPT(config)
    ids = torch.randint(2, config.vocab_size, (2, 17))
    model(ids[:, :-1], ids[:, 1:]).backward()
    muon, adamw = train_gpt.build_optimizers(model, config, comm)
    train_gpt.reduce_clip_step(muon, adamw, comm, config.grad_clip_norm)
    return comm.bytes_sent, ring.sent, 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_bytes_counted_are_the_bytes_that_the_collectives_move(labs, monkeypatch, world):
    counted, moved, parameters = bytes_of_a_step(monkeypatch, world)
    assert counted == moved
    assert moved >= 2 * parameters * (world - 1) // world, "less than replicated parameters need at least"
    assert labs[world].bytes_sent == [20 * counted] * world


def test_one_rank_sends_nothing(labs):
    assert labs[1].bytes_sent == [0]


# The whole program over ranks -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def two(children):
    """(a run stopped at two ranks, the same run finished at two)."""
    run_dir = children.new("two")
    group = children.start(run_dir, ranks=2, patch=at_step(6, "os.kill(os.getpid(), 15)"))
    assert group.wait() == [75, 75], group.stderr()
    finished = copy_run(children, run_dir)
    children.finish(finished, ranks=2)
    return run_dir, finished


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_saved_at_two_ranks_resumes_at_another_number(children, two, ranks):
    run_dir = copy_run(children, two[0])
    output = children.finish(run_dir, ranks).stdout()
    assert "resumed_from:" in output and f"world_size:{ranks} " in output
    weights, expected = (train_gpt.load_tensors(folder / "final_model.pt")["state_dict"]
                         for folder in (run_dir, two[1]))
    for name, value in expected.items():
        assert (weights[name] - value).norm() <= 1e-4 * value.norm(), name
    for label, score in outcome(two[1])["scores"].items():
        assert outcome(run_dir)["scores"][label]["tokens"] == score["tokens"]
        assert outcome(run_dir)["scores"][label]["val_bpb"] == pytest.approx(score["val_bpb"], rel=1e-4)


def test_an_evaluation_saved_at_two_ranks_is_scored_the_same_at_one(children, two):
    """No target may be scored twice or lost, whether the saved state is used or not."""
    run_dir = unscored(children, two[1])
    group = children.start(run_dir, ranks=2, patch=AT_WRITE, at="eval_legal_ttt 5 hold")
    assert group.until(Path(f"{run_dir}.held").exists)
    group.kill()
    group.wait()
    children.finish(run_dir)
    found, expected = (outcome(d)["scores"]["legal_ttt"] for d in (run_dir, two[1]))
    assert found["tokens"] == expected["tokens"] and found["bytes"] == expected["bytes"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


def test_ranks_that_cannot_share_the_batch_are_refused(children):
    run_dir = children.new("three")
    group = children.start(run_dir, ranks=3)
    codes = group.wait()
    assert codes and codes[0] == 2 and all(codes)
    assert re.search(r"error: TRAIN_BATCH_TOKENS=512 is 8 sequences.*3 ranks", group.stderr())
    assert "Traceback" not in group.stderr()


def test_rank_variables_without_torchrun_mean_one_process(runtime):
    made = runtime(tiny_config())
    assert made.comm.world == 1 and made.is_main and os.path.exists(made.dir / "train.log")
