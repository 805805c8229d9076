"""Random numbers for perturbations that follow from no gradient: the arithmetic of
``kernels/noise.py`` in torch, bit for bit."""

import torch
from torch import Tensor

from fastsam.arithmetic import wide_dtype
from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.spec import StepSpec

from .rounding import LOW, SLICE, mix, tensor_key


def drawn(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """A number in (-1, 1) for every element of parameter ``k``, in the dtype of the arithmetic."""
    assert spec.seed is not None and batch.places is not None
    step, sample = (scalars[slot].long() & LOW for slot in (Scalar.NOISE_STEP, Scalar.SAMPLE))
    key = mix(mix(tensor_key(spec.seed, batch.places[k]) ^ mix(step)) ^ mix(sample ^ 0x80000000))
    like = batch.params[k]
    result = torch.empty_like(like, dtype=wide_dtype(like), requires_grad=False)
    start = 0
    # the integers in between take more memory than the result
    for part in torch.split(result.as_strided((result.numel(),), (1,)), SLICE):
        index = torch.arange(start, start + part.numel(), device=like.device)
        bits = mix((index * 0x9E3779B1 + key.to(like.device)) & LOW)
        part.copy_(2 * (bits >> 8) - 0xFFFFFF).mul_(2.0**-24)
        start += part.numel()
    return result
