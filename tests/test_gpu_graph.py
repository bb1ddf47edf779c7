"""What the code would do on a GPU, checked without one: graphs, products, launches, the attention
order."""

import collections
import types

import pytest
import torch
from helpers import SEQ, run_main, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt

CPU = torch.device("cpu")


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel; views and bookkeeping launch none."""

    FREE = (
        "view",
        "detach",
        "slice",
        "select",
        "split",
        "expand",
        "transpose",
        "unsqueeze",
        "alias",
        "empty",
    )

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].strip("_")
        if not name.startswith(self.FREE) and name not in ("t", "unsafe_view", "permute"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


# attention order ----------------------------------------------------------------------------------
FAMILIES = {
    (8, 0): ["flash", "cudnn", "mem_efficient", "math"],
    (9, 0): ["flash_attention_3", "cudnn", "flash", "mem_efficient", "math"],
    (10, 0): ["cudnn", "flash", "mem_efficient", "math"],
}


@pytest.mark.parametrize("capability", FAMILIES)
def test_the_order_of_attention_backends_follows_the_architecture(capability):
    assert [name for name, _ in train_gpt.attention_order(capability)] == FAMILIES[capability]


@pytest.fixture
def gpu(monkeypatch):
    """pick(capability, *unusable backends, compiling) -> (AttentionChoice, backends tried), no GPU
    needed."""

    def pick(capability, *unusable, compiling=False):
        tried = []

        def trial(attend, device, dtype, compiled):
            tried.append((names[attend], compiled))
            if names[attend] in unusable:
                raise RuntimeError("not here")

        names = {}
        original = train_gpt.attention_backend

        def named(backend, **options):
            attend = original(backend, **options)
            names[attend] = backend
            return attend

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(train_gpt, "attention_backend", named)
        monkeypatch.setattr(train_gpt, "try_attention", trial)
        train_gpt.pick_attention.cache_clear()
        try:
            choice = train_gpt.pick_attention(torch.device("cuda:0"), torch.bfloat16, compiling)
        finally:
            train_gpt.pick_attention.cache_clear()
            monkeypatch.setattr(train_gpt, "attention_backend", original)
        return choice, tried

    return pick


@pytest.mark.parametrize("capability", FAMILIES)
def test_the_first_backend_that_runs_is_taken_and_the_log_says_why(capability, gpu):
    choice, tried = gpu(capability)
    first = FAMILIES[capability][0]
    assert [name for name, _ in tried] == [first]
    assert choice.reason.startswith(f"{first}: ")
    assert f"sm{capability[0]}{capability[1]}" in choice.reason


def test_without_flash_attention_3_hopper_takes_cudnn_and_names_what_failed(gpu):
    choice, tried = gpu((9, 0), "flash_attention_3")
    assert [name for name, _ in tried] == ["flash_attention_3", "cudnn"]
    assert choice.reason.startswith("cudnn: ")
    assert "flash_attention_3 (RuntimeError)" in choice.reason


@pytest.mark.parametrize("compiling", [False, True])
def test_the_trial_is_compiled_where_the_model_will_be(compiling, gpu):
    assert gpu((9, 0), compiling=compiling)[1] == [("flash_attention_3", compiling)]


def test_without_any_backend_the_error_names_them_all(gpu):
    with pytest.raises(train_gpt.ConfigError, match="tried flash.*cudnn.*mem_efficient.*math"):
        gpu((8, 0), *FAMILIES[8, 0])


def enabled_backends(monkeypatch, backend, fallback=True):
    """SDPA's backends in order of priority while `backend` attends."""
    seen = []

    def look(q, k, v):
        seen.extend(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return q

    monkeypatch.setattr(train_gpt, "sdpa_attention", look)
    train_gpt.attention_backend(backend, fallback)(*torch.zeros(3, 1, 4, 2, 8))
    return [b.name for b in seen]


def test_flash_stays_behind_cudnn_for_deterministic_mode(monkeypatch):
    assert enabled_backends(monkeypatch, "cudnn") == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    # The trial is cuDNN's alone: flash must not pass it in cuDNN's name.
    assert enabled_backends(monkeypatch, "cudnn", fallback=False) == ["CUDNN_ATTENTION"]


@pytest.mark.parametrize("backend, name", [("flash", "FLASH_ATTENTION"), ("math", "MATH")])
def test_another_backend_is_alone(backend, name, monkeypatch):
    assert enabled_backends(monkeypatch, backend) == [name]


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_3_repeats_its_digits_when_asked_to(deterministic, monkeypatch):
    import sys
    import types

    seen = {}

    def flash_attn_func(q, k, v, **options):
        seen.update(options)
        return q, "log-sum-exp"

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    q = torch.zeros(1, 4, 2, 8)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert train_gpt.flash_attention_3(q, q, q) is q
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {"causal": True, "deterministic": deterministic}


def test_a_backend_chosen_by_priority_compiles_to_one_graph():
    attend = train_gpt.attention_backend("math")
    q, k = torch.randn(1, 8, 2, 8), torch.randn(1, 8, 1, 8)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(compiled(q, k, k), attend(q, k, k))


# graphs -------------------------------------------------------------------------------------------
def captured(function, *arguments):
    """Operations of the one graph of `function` by name, after functionalisation (its forward
    part)."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep)
    )
    compiled(*arguments)
    assert len(graphs) == 1, "a second graph"
    nodes = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    return collections.Counter(str(n.target).removeprefix("aten.").split(".")[0] for n in nodes)


def small_model(**changes):
    config = tiny_config(**changes)
    ids = torch.randint(2, config.vocab_size, (2, 64))
    return config, train_gpt.GPT(config, train_gpt.sdpa_attention), ids


def test_the_trunk_has_no_trigonometry():
    _, model, ids = small_model(nfm_enabled=False)
    with torch.no_grad():
        operations = captured(model.hidden, ids)
    assert not {"sin", "cos"} & set(operations)


def test_the_flow_matcher_adds_the_trigonometry_of_one_row():
    _, model, ids = small_model()
    with torch.no_grad():
        operations = captured(model.eval().hidden, ids)
    assert (operations["sin"], operations["cos"]) == (1, 1)


def test_training_draws_its_noise_without_a_generator_or_trigonometry():
    """The sines and cosines left embed times: one row of the Euler step, one per token of the
    loss."""
    _, model, ids = small_model()
    with torch.no_grad():
        operations = captured(model.train(), ids, ids, torch.arange(len(ids)))
    assert (operations["sin"], operations["cos"]) == (2, 2)
    assert not [name for name in operations if "rand" in name or "normal" in name]


@pytest.mark.parametrize("gated", [False, True])
def test_a_block_takes_four_products(gated):
    """One for q, k, v and the gate, one out of attention, two in the MLP."""
    counts = {}
    for layers in (2, 3):
        _, model, ids = small_model(num_layers=layers, nfm_enabled=False, gated_attention=gated)
        with torch.no_grad():
            counts[layers] = captured(model.hidden, ids)
    products = [counts[n]["mm"] + counts[n]["addmm"] for n in (2, 3)]
    assert products[1] - products[0] == 4


def test_separate_weights_reach_the_fused_product():
    """Each of the four parameters keeps its own gradient and its own name."""
    _, model, ids = small_model(nfm_enabled=False)
    model(ids, ids).backward()
    attention = model.blocks[0].attn
    for layer in (attention.c_q, attention.c_k, attention.c_v, attention.attn_gate):
        assert layer.weight.grad.shape == layer.weight.shape


# exclusive attention's type -----------------------------------------------------------------------
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


# rounding in training -----------------------------------------------------------------------------
def qat_launches(blends, preset="slot_11l"):
    """Launches of set_qat for each of `blends` in turn, at the preset's real shapes, without
    memory."""
    settings = {**train_gpt.PRESETS[preset], "preset": preset}
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**settings))
    totals = []
    for blend in blends:
        with Launches() as launches:
            model.set_qat(blend)
        totals.append(sum(launches.counts.values()))
    return totals


@pytest.mark.parametrize("preset", ["slot_11l", "ttt_linear_10l", "ttt_linear_11l"])
def test_late_qat_launches_little_while_on_and_nothing_while_off(preset):
    off, on, still_on = qat_launches([0.0, 1.0, 1.0], preset)
    assert off == 0
    assert 0 < still_on <= on <= 100


def test_batched_scales_are_those_of_the_artifact():
    config = tiny_config(late_qat_threshold=0.15, model_dim=64, num_layers=2, nfm_hidden_dim=128)
    model = train_gpt.GPT(config)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    model.set_qat(1.0)
    rounded = [module for _, module in model.quantizable() if module.bits]
    assert len({module.weight.shape for module in rounded}) > 2
    for module in rounded:
        _, scales = train_gpt.quantize_rows(module.weight, module.bits)
        assert torch.equal(module.qat_scale, scales.float())
        assert module.qat_blend == 1


# products at full size ----------------------------------------------------------------------------
def products(config, length=32):
    """Matrix products of one forward and backward pass at the real widths, without memory."""
    with FakeTensorMode():
        model = train_gpt.GPT(config, lambda q, k, v: q).train()
        ids = torch.zeros(2, length, dtype=torch.long)
        keys = torch.zeros(2, dtype=torch.long)
        with Launches() as launches:
            model(ids, ids, keys).backward()
    return sum(launches.counts[name] for name in ("mm", "addmm", "bmm"))


@pytest.mark.parametrize(
    "preset, budget",
    [
        # (11 x 4, bigram, head, 6 of the matcher) x 3, less 3 inputs without gradient.
        ("nfm_7k", 153),
        ("base_7k", 138),
    ],
)
def test_the_products_of_a_step_stay_within_their_budget(preset, budget):
    config = train_gpt.Config(**{**train_gpt.PRESETS[preset], "preset": preset})
    assert products(config) == budget


def test_looped_layers_cost_their_own_products_and_no_more():
    loops = dict(preset="base_7k", nfm_enabled=False, eval_seq_len=2048, num_loops=2)
    assert products(train_gpt.Config(**loops)) == 138 + 6 * 4 * 3


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def test_four_graphs_serve_the_whole_life_of_a_run(case, monkeypatch):
    """Training; scoring of all positions and of the last ones; a step of test-time training.

    Later evaluations, spot checks and the audit bring no other.
    """
    graphs, options = [], []
    compile = torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(function, dynamic, fullgraph, options=None):
        seen_options.append(options)
        return compile(function, dynamic=dynamic, fullgraph=fullgraph, backend=count)

    seen_options = options
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counted)
    case = case(800, compile="1", ttt_lr=0.05, eval_batch_seqs=3, nfm_loss_weight=0.0)
    model = case.model()
    ids = torch.randint(2, 384, (4, SEQ))
    case.runtime.compiled(model)(ids, ids).backward()
    model.zero_grad()
    assert len(graphs) == 1 and options == [None]
    for _ in range(2):
        for job in train_gpt.evaluation_jobs(case.config):
            case.run(model, stride=job.stride, ttt=job.ttt, label=job.label, spot_checks=0.5)
    train_gpt.audit(model, case.stream, case.config, case.runtime)
    assert len(graphs) == 4
    assert all(made == {"deterministic": True} for made in options[1:])


@pytest.mark.parametrize(
    "ranks, wish, captured", [(1, "auto", 0), (8, "auto", 1), (8, "0", 0), (1, "1", 1)]
)
def test_a_step_of_test_time_training_is_a_cuda_graph_where_it_is_small(ranks, wish, captured):
    made = []
    gpu = types.SimpleNamespace(
        compiling=True, device=torch.device("cuda"), comm=train_gpt.Comm(0, ranks)
    )
    gpu.compiled = lambda function, options=None: made.append(options) or function
    gpu.cuda_graphs = lambda wish: train_gpt.Runtime.cuda_graphs(gpu, wish)
    config = tiny_config(ttt_cuda_graph=wish)
    model = train_gpt.GPT(config)
    train_gpt.Evaluation.compile_functions(
        types.SimpleNamespace(runtime=gpu, model=model, config=config)
    )
    scoring, step, *captures = made
    assert scoring == step == {"deterministic": True}
    assert captures == captured * [{"deterministic": True, "triton.cudagraphs": True}]


@pytest.mark.slow
def test_looping_compiles_one_graph_more(tiny_data, tmp_path, monkeypatch):
    """The training loss in both orders of the layers; all that follows is looped."""
    loops = dict(num_loops=1, loop_start=1, loop_end=1, loop_at=0.5)
    graphs, compile_ = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counting(function, options=None, **arguments):
        return compile_(function, backend=keep, **arguments)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", counting)
    settings = {**tiny_data.settings, **loops, "compile": 1, "warmup_steps": 1}
    settings["val_loss_every"] = 3
    result = run_main(tmp_path / "run", **settings)
    assert result.code == 0, result.err
    assert len(graphs) == 5
