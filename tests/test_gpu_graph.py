"""The code's graphs, types and CUDA graphs on a GPU, checked without one."""

import types

import pytest
import torch
from helpers import SEQ, random_batch, randomised, tiny_config

import train_gpt


@pytest.fixture
def compiled(monkeypatch):
    """(graphs compiled, options of torch.compile in the order of its calls); they run eagerly."""
    graphs, options_seen, compile_ = [], [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(function, dynamic, fullgraph, options=None):
        options_seen.append(options)
        return compile_(function, dynamic=dynamic, fullgraph=fullgraph, backend=keep)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counted)
    return graphs, options_seen


def test_few_graphs_serve_the_whole_life_of_a_run(case, compiled):
    """One for training, the rest for the first evaluations: later ones and the audit bring none."""
    graphs, options = compiled
    case = case(800, compile="1", ttt_lr=0.05, eval_batch_seqs=3, nfm_loss_weight=0.0)
    model = case.model()
    graphs.clear()  # the trial of attention has one of its own
    options.clear()
    ids = torch.randint(2, 384, (4, SEQ))
    case.runtime.compiled(model)(ids, ids).backward()
    model.zero_grad()
    assert len(graphs) == 1 and options == [None]
    counts = []
    for _ in range(2):
        for job in train_gpt.evaluation_jobs(case.config):
            case.run(model, stride=job.stride, ttt=job.ttt, label=job.label, spot_checks=0.5)
        counts.append(len(graphs))
    train_gpt.audit(model, case.stream, case.config, case.runtime)
    assert counts[0] == counts[1] == len(graphs) <= 4
    assert all(made == {"deterministic": True} for made in options[1:])


def test_late_rounding_compiles_nothing_and_looped_layers_one_graph_more(compiled):
    graphs, _ = compiled
    loops = dict(num_layers=4, num_loops=2, loop_start=1, loop_end=2)
    config = tiny_config(**loops, late_qat_threshold=0.15)
    model = randomised(train_gpt.GPT(config)).train()
    ids, targets = random_batch(config, 12)
    keys = torch.arange(len(ids))
    loss = torch.compile(model, dynamic=False, fullgraph=True)
    seen = set()
    for looped, blend in [(False, 0.0), (True, 0.0), (False, 1.0), (True, 1.0)] * 2:
        model.looped = looped
        model.set_qat(blend)
        value = loss(ids, targets, keys).item()
        assert value == pytest.approx(model(ids, targets, keys).item(), abs=1e-6)
        seen.add(value)
    assert len(graphs) == 2
    assert len(seen) == 4, "both switches must act on the compiled model"


@pytest.mark.parametrize("small, captured", [(False, 0), (True, 1)])
def test_a_step_of_test_time_training_is_a_cuda_graph_where_it_is_small(small, captured):
    made = []
    gpu = types.SimpleNamespace(cuda_graphs=small)
    gpu.compiled = lambda function, options=None: made.append(options) or function
    config = tiny_config()
    evaluation = types.SimpleNamespace(runtime=gpu, model=train_gpt.GPT(config), config=config)
    train_gpt.Evaluation.compile_functions(evaluation)
    assert all(options["deterministic"] for options in made)
    assert sum(options.get("triton.cudagraphs", False) for options in made) == captured


# ---- types ----
def cuda_sum(x, dim=None, keepdim=False, dtype=None):
    """CUDA's autocast carries sums out in float32 and leaves them so."""
    return torch.ops.aten.sum.dim_IntList(x, [dim], keepdim, dtype=torch.float32)


@pytest.mark.parametrize("policy", ["cpu", "cuda"])
def test_exclusive_attention_keeps_the_autocast_type(policy, monkeypatch):
    if policy == "cuda":
        monkeypatch.setattr(torch.Tensor, "sum", cuda_sum)
    y = torch.randn(2, 5, 4, 8).bfloat16()
    v = torch.randn(2, 5, 2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = train_gpt.exclusive_attention(y, v)
    assert out.dtype == torch.bfloat16
    value = v.float().repeat_interleave(2, 2)
    unit = value / value.norm(dim=-1, keepdim=True)
    exact = y.float() - (y.float() * unit).sum(-1, keepdim=True) * unit
    assert (out.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("function", ["plain", "rotated"])
def test_a_norm_is_computed_in_float32(function):
    """The result must be the exact one rounded once; a rounded 1/rms would shift whole rows."""
    x = (3 * torch.randn(2, 16, 4, 8)).bfloat16()
    arguments = ()
    if function == "rotated":
        cos, sin = train_gpt.rotary_tables(
            tiny_config(train_seq_len=16, eval_seq_len=16, eval_stride=8)
        )
        arguments = (torch.full((4, 1), 1.7), cos, sin)
    exact = train_gpt.RMSNorm.apply(x.double(), *(a.double() for a in arguments))
    assert torch.equal(train_gpt.RMSNorm.apply(x, *arguments), exact.bfloat16())
