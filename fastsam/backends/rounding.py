"""Stochastic rounding to bfloat16 in torch: the arithmetic of ``kernels/rounding.py``, bit for bit.

In int64, because torch has few operators for unsigned integers.
"""

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.bits import LOW, SLICE, mix, rounding_key, tensor_key
from fastsam.step.spec import StepSpec

from .noise import key_of


def add_noise(x: Tensor, like: Tensor, key: Tensor) -> Tensor:
    """``x``, such that cutting off its lower 16 bits rounds it stochastically; they are cut off.

    Args:
        x: What is rounded, once it is float32.
        like: Has the layout in memory by which elements are counted.
        key: 0-dim int64: what the bits depend on.
    """
    result = torch.empty_like(like, dtype=torch.float32, requires_grad=False).copy_(x)
    start = 0
    for part in torch.split(result.as_strided((result.numel(),), (1,)), SLICE):
        index = torch.arange(start, start + part.numel(), device=like.device)
        noise = mix((index * 0x9E3779B1 + key) & LOW) & 0xFFFF
        bits = part.view(torch.int32).long() & LOW
        rounded = (bits + noise) & 0xFFFF0000
        signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded).int()
        part.copy_(torch.where(part.isfinite(), signed.view(torch.float32), part))
        start += part.numel()
    return result


def rounded(
    x: Tensor, batch: Batch, k: int, spec: StepSpec, scalars: Tensor, descends: bool
) -> Tensor:
    """``x``, such that parameter ``k`` takes it by ``copy_`` as the step rounds."""
    param = batch.params[k]
    if not spec.stochastic or param.dtype != torch.bfloat16:
        return x
    assert spec.seed is not None
    if spec.ascent.noise and not descends:
        return add_noise(x, param, rounding_key(key_of(batch, k, spec, scalars)))
    count = 2 * scalars[Scalar.ROUNDING_STEP].long() + descends
    assert batch.places is not None
    key = mix(tensor_key(spec.seed, batch.places[k]) ^ mix(count & LOW))
    return add_noise(x, param, key)
