"""Kernels that one optimiser step launches at the real shapes, counted on tensors without data."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt

# Operations that reserve memory or rename it: the device has nothing to do.
WITHOUT_A_KERNEL = {
    "alias", "detach", "device", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided", "_record_function_enter_new", "_record_function_exit", "_unsafe_view",
}  # fmt: skip


def is_view(operation):
    """Whether everything that it returns is another view of an argument."""
    returned = operation._schema.returns
    aliases = [value.alias_info for value in returned]
    return bool(returned) and all(a is not None and not a.is_write for a in aliases)


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if not is_view(operation) and name not in WITHOUT_A_KERNEL:
            self.by_name[name] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.by_name.values())


def optimiser_step(preset, **changes):
    """Launches of one reduce_clip_step of a preset at its real shapes."""
    config = train_gpt.Config(**{**train_gpt.PRESETS[preset], "preset": preset, **changes})
    with FakeTensorMode():
        model = train_gpt.GPT(config)
        muon, adamw = train_gpt.build_optimizers(model, config)
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        step = (muon, adamw, train_gpt.Comm(), config.grad_clip_norm)
        train_gpt.reduce_clip_step(*step)  # the first one also makes AdamW's state
        with Launches() as launches:
            train_gpt.reduce_clip_step(*step)
    return launches


# Three stacks of 5 Newton-Schulz steps are 45 products; most of the rest is per stack, nothing is
# per matrix but what a foreach operation does in one launch.
@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("preset", ["nfm_7k", "base_20k", "slot_11l", "ttt_linear_11l"])
def test_an_optimiser_step_stays_within_its_budget_of_launches(preset, row_norm):
    launches = optimiser_step(preset, muon_row_norm=row_norm)
    assert launches.total <= 120, launches.by_name.most_common()


def test_the_launches_do_not_grow_with_the_layers():
    assert optimiser_step("nfm_7k", num_layers=3).total == optimiser_step("nfm_7k").total


def test_every_product_of_newton_schulz_is_counted():
    launches = optimiser_step("nfm_7k").by_name
    assert launches["bmm"] == 3 * 5  # x x^T
    assert launches["baddbmm"] == 3 * 5 * 2  # the polynomial, and its product with x
