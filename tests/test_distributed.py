"""One, two and four ranks train the same model, report the same scores, and never hang.

Each world size runs once, over gloo, a script that uses the public parts of train_gpt.py (two ranks
by torchrun as a user would, the others forked); many tests look at what it left.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import AT_WRITE, ROOT, TINY, at_step, events, launch, outcome, read_json, tiny_config

import train_gpt

LAB = (
    f"""
import dataclasses, os, sys, time
sys.path[:0] = [{str(ROOT)!r}]
import torch, train_gpt
"""
    + """
def score(name, model, stream, changes={}, **options):
    changed = dataclasses.replace(config, **changes)
    found = train_gpt.evaluate(model, stream, changed, runtime, **options)
    left["scores"][name] = [found.val_loss, found.val_bpb, found.tokens, found.bytes]

left = dict(scores={}, out=os.environ.pop("LAB_OUT"))
config = train_gpt.Config.from_env(os.environ)
runtime = train_gpt.Runtime(config, os.environ)
val = train_gpt.ValidationSet.load(config, train_gpt.load_token_bytes(config))
trainer = train_gpt.Trainer(config, runtime, val)
trainer.announce()
begin = time.monotonic()
trainer.run()
left["seconds"] = [trainer.seconds, time.monotonic() - begin]
sums = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
left["same_on_all_ranks"] = bool((runtime.comm.gather_rows(sums) == sums).all())

torch.manual_seed(1)
model = train_gpt.GPT(config)  # the same weights at every world size
with torch.no_grad():
    for param in model.parameters():
        param.add_(0.05 * torch.randn_like(param))
few = val.replaced(val.tokens[:2 * config.eval_seq_len + 1])
half = val.replaced(val.tokens[:10 * config.eval_seq_len + 1])
small_chunks = dict(ttt_chunk_tokens=64, ttt_lr=0.05)
score("roundtrip", model, val, stride=config.eval_seq_len)
score("sliding", model, val)
score("four_targets_per_window", model, few, stride=4)
score("two_windows", model, few, stride=config.eval_seq_len)
score("slot", model, few, slot="causal")
score("ttt", model, val, dict(ttt_lr=0.02), ttt=True)
score("ttt_two_epochs", model, few, dict(small_chunks, ttt_epochs=2), ttt=True)
score("ttt_small_chunks", model, half, small_chunks, ttt=True)
score("ttt_one_row_steps", model, half, dict(ttt_batch_seqs=1), ttt=True)
score("ttt_slot", model, few, dict(ttt_chunk_tokens=64), ttt=True, slot="causal")
if runtime.comm.world == 2:
    checks = train_gpt.audit(model, val, config, runtime)
    left["audit"] = [check["name"] for check in checks if not check["passed"]]
if runtime.is_main:
    train_gpt.save_tensors(left["out"] + ".pt", dict(trainer.model.state_dict()))
    train_gpt.write_json(left["out"] + ".json", left)
runtime.close()
"""
)
WORLDS = (1, 2, 4)
STEPS = dict(
    TINY,
    num_layers=2,
    xsa_last_n=1,
    iterations=20,
    warmdown_iters=8,
    dtype="float32",
    muon_row_norm=True,
)  # rows of wide and of tall matrices, wherever the slices begin


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
        labs[world] = SimpleNamespace(
            **read_json(f"{out}.json"),
            state=train_gpt.load_tensors(f"{out}.pt"),
            losses={e["step"]: e["train_loss"] for e in events(run_dir, "step")},
            stdout=stdout,
        )
    return labs


@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_and_parameters_agree_with_one_rank_over_twenty_steps(labs, world):
    one, many = labs[1], labs[world]
    assert sorted(many.losses) == list(range(1, 21))
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    assert one.losses[20] < one.losses[1] - 1
    torch.manual_seed(42)
    fresh = train_gpt.GPT(tiny_config(num_layers=2, xsa_last_n=1)).state_dict()
    for name, expected in one.state.items():
        assert (many.state[name] - expected).norm() <= 1e-4 * expected.norm(), name
        # Otherwise their agreement would say nothing.
        assert not torch.equal(many.state[name], fresh[name]), name
    assert many.same_on_all_ranks
    assert 0 < many.seconds[0] <= many.seconds[1], "the clock is one rank's"


@pytest.mark.parametrize("world", WORLDS[1:])
def test_scores_do_not_depend_on_the_ranks(labs, world):
    for name, expected in labs[1].scores.items():
        found = labs[world].scores[name]
        adapted = "ttt" in name or "slot" in name
        assert found[:2] == pytest.approx(expected[:2], rel=1e-4 if adapted else 1e-9), name
        assert found[2:] == expected[2:], name


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
        steps = re.findall(r"^step:(\d+)/20 train_loss", lab.stdout, re.M)
        assert steps == [str(s) for s in range(1, 21)]
        assert f"world_size:{world} grad_accum_steps:{2 if world == 1 else 1}" in lab.stdout


# ---- the whole program over ranks ----
@pytest.fixture(scope="module")
def stopped_by_one(children):
    """Directory of a run of two ranks that stopped at the same step when one got the signal.

    Twice at once, as a cluster and torchrun may both pass on the same wish.
    """
    run_dir = children.new("stopped_by_one")
    both = "os.kill(os.getpid(), 10), os.kill(os.getpid(), 15)"
    patch = at_step(6, f"self.runtime.comm.rank and ({both})")
    group = children.start(run_dir, ranks=2, patch=patch)
    assert group.wait() == [75, 75], group.stderr()
    assert re.findall(r"^stopped signal:(\w+)", group.stdout(), re.M) == ["another_rank"]
    assert events(run_dir)[-1]["event"] == "stopped" and (run_dir / "STOPPED").exists()
    return run_dir


@pytest.mark.parametrize("ranks", WORLDS)
def test_a_run_stopped_at_two_ranks_resumes_at_any_number(
    children, whole_two, stopped_by_one, ranks
):
    run_dir = children.copy(stopped_by_one)
    output = children.finish(run_dir, ranks).stdout()
    assert "resumed_from:" in output and f"world_size:{ranks} " in output
    if ranks == 2:
        assert outcome(run_dir) == outcome(whole_two)
        return
    paths = [folder / "final_model.pt" for folder in (run_dir, whole_two)]
    weights, expected = (train_gpt.load_tensors(path)["state_dict"] for path in paths)
    for name, value in expected.items():
        assert (weights[name] - value).norm() <= 1e-4 * value.norm(), name
    found, scores = (outcome(folder)["scores"] for folder in (run_dir, whole_two))
    assert found.keys() == scores.keys()
    for label, score in scores.items():
        assert found[label]["tokens"] == score["tokens"]
        assert found[label]["val_bpb"] == pytest.approx(score["val_bpb"], rel=1e-4)


def test_an_evaluation_killed_at_two_ranks_is_scored_the_same_at_two_and_at_one(
    children, whole_two
):
    """No target may be scored twice or lost, whether the saved state is used or not."""
    run_dir = children.unscored(whole_two)
    group = children.start(run_dir, ranks=2, patch=AT_WRITE, at="eval_legal_ttt 5 hold")
    assert group.until(Path(f"{run_dir}.held").exists)
    group.kill()
    group.wait()
    at_one = children.copy(run_dir)
    output = children.finish(run_dir, ranks=2).stdout()
    assert "resumed_evaluation legal_ttt item:5/" in output
    assert output.count("result legal_ttt") == 1
    assert outcome(run_dir) == outcome(whole_two)
    children.finish(at_one)
    found, expected = (outcome(d)["scores"]["legal_ttt"] for d in (at_one, whole_two))
    assert found["tokens"] == expected["tokens"] and found["bytes"] == expected["bytes"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


def test_a_checkpoint_that_one_of_two_ranks_needs_but_cannot_be_written_ends_both(children):
    run_dir = children.new("full")
    # A folder that is not empty cannot be replaced by a file.
    taken = 'os.makedirs(os.environ["RUN_DIR"] + "/checkpoint/step_00000004.pt/x", exist_ok=True)'
    stop = "self.runtime.comm.rank and os.kill(os.getpid(), 15)"
    group = children.start(run_dir, ranks=2, patch=at_step(3, f"{taken}, {stop}"))
    assert group.wait(60) == [7, 7], group.stderr()


def test_ranks_that_cannot_share_the_batch_are_refused(children):
    run_dir = children.new("three")
    group = children.start(run_dir, ranks=3)
    codes = group.wait()
    assert codes and codes[0] == 2 and all(codes)
    assert re.search(r"error: TRAIN_BATCH_TOKENS=512 is 8 sequences.*3 ranks", group.stderr())
    assert "Traceback" not in group.stderr()
