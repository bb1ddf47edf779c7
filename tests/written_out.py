"""Parts of the model as composed operations and with hand-written gradients, for bench.py.

train_gpt.py keeps the written-out form only where it earns about a tenth of a training step on a
CPU.
"""

import torch
import torch.nn.functional as F

import train_gpt as golf


def composed_norm(x, gain=None, cos=None, sin=None):
    """What RMSNorm computes, by operations that PyTorch differentiates."""
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + golf.NORM_EPS)
    if gain is not None:
        value = value * gain
    if cos is not None:
        half = cos.size(-1)
        a, b, rest = value[..., :half], value[..., half : 2 * half], value[..., 2 * half :]
        value = torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
    return value.to(x.dtype)


class ComposedNorm:
    apply = staticmethod(composed_norm)


class LeakySquare(torch.autograd.Function):
    """leaky_relu(x, 0.5)^2, which needs only x for its gradient 2 leaky_relu(x, 0.25)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.5).square_()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return F.leaky_relu(x, 0.25).mul_(grad).mul_(2)


class ResidualMix(torch.autograd.Function):
    """mix[0] * x + mix[1] * x0 per channel, with the sums over tokens as products."""

    @staticmethod
    def forward(ctx, x, x0, mix):
        m = mix.to(x.dtype)
        ctx.save_for_backward(x, x0, m, mix)
        return torch.addcmul(x * m[0], x0, m[1])

    @staticmethod
    def backward(ctx, grad):
        x, x0, m, mix = ctx.saved_tensors
        ones = grad.new_ones(1, grad.shape[:-1].numel())
        rows = [ones @ (grad * stream).flatten(0, -2) for stream in (x, x0)]
        return grad * m[0], grad * m[1], torch.cat(rows).to(mix.dtype)


class ExclusiveAttention(torch.autograd.Function):
    """XSA by unit vectors that the backward takes from the forward."""

    @staticmethod
    def forward(ctx, y, v):
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=1e-12)
        unit = v / norm  # (B, T, K, d)
        grouped = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, d)
        along = (grouped * unit[:, :, :, None]).sum(-1, keepdim=True)
        ctx.save_for_backward(grouped, unit, norm, along)
        return torch.addcmul(grouped, along, unit[:, :, :, None], value=-1).flatten(2, 3)

    @staticmethod
    def backward(ctx, grad):
        grouped, unit, norm, along = ctx.saved_tensors
        grad = grad.unflatten(2, (unit.size(2), -1))
        wide = unit[:, :, :, None]
        dot = (grad * wide).sum(-1, keepdim=True)
        dunit = torch.addcmul(grad * along, grouped, dot).sum(3)  # with a minus sign
        inside = (dunit * unit).sum(-1, keepdim=True)
        dv = torch.addcmul(dunit, inside, unit, value=-1) / -norm
        return torch.addcmul(grad, dot, wide, value=-1).flatten(2, 3), dv


# (part, its name in train_gpt, composed, written out)
PARTS = (
    ("RMSNorm with gain and rotation", "RMSNorm", ComposedNorm, golf.RMSNorm),
    ("causal attention", "cpu_attention", golf.sdpa_attention, golf.cpu_attention),
    (
        "exclusive attention",
        "exclusive_attention",
        golf.exclusive_attention,
        ExclusiveAttention.apply,
    ),
    ("squared leaky ReLU", "leaky_square", golf.leaky_square, LeakySquare.apply),
    ("residual mix", "residual_mix", golf.residual_mix, ResidualMix.apply),
)
