"""ESAM's choice in torch: the arithmetic of ``kernels/choice.py``."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import torch

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.bits import LOW, mix, tensor_key
from fastsam.step.rule import Group
from fastsam.step.spec import StepSpec

from .equations import columns_of

#: So that the choice is of other bits than what is rounded.
OTHER = 0x5BD1E995


def find_choices(batch: Batch, groups: Iterable[Group], seed: int) -> list[int]:
    """What each parameter's choice depends on; its shards are chosen together."""
    layout = batch.layout
    if layout is not None and layout.choices is not None and layout.choices[0] == seed:
        return layout.choices[1]
    everyone = chain.from_iterable(group["params"] for group in groups)
    place = {param: i for i, param in enumerate(dict.fromkeys(everyone))}
    found = [tensor_key(seed, place[param]) ^ OTHER for param in batch.owners]
    if layout is not None:
        layout.choices = seed, found
    return found


def chosen(batch: Batch, spec: StepSpec, scalars: torch.Tensor) -> Batch:
    """The batch with gradients of zeros where a parameter does not take part."""
    if not spec.ascent.chooses:
        return batch
    assert batch.choices is not None
    step, grads = scalars[Scalar.ROUNDING_STEP].long() & LOW, []
    shares = [next(iter(columns_of(spec, group).values())) for group in spec.groups]
    for key, grad, i in zip(batch.choices, batch.grads, batch.groups, strict=True):
        share = (mix(key ^ mix(step)) >> 8).float() * 2.0**-24
        takes_part = share < torch.tensor(shares[i], dtype=torch.float32)
        if scalars.device.type == "cpu":
            grads.append(grad if takes_part else torch.zeros_like(grad))
        else:
            grads.append(torch.where(takes_part, grad, 0.0))
    return replace(batch, grads=grads)
