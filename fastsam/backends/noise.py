"""The random numbers of ``kernels/noise.py`` in torch."""

from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.bits import LOW, noise_key, tensor_key, uniform
from fastsam.step.spec import StepSpec


def drawn(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """A number in (-1, 1) for every element of parameter ``k``, in the dtype of the arithmetic."""
    assert spec.seed is not None and batch.places is not None
    step, sample = (scalars[slot].long() & LOW for slot in (Scalar.NOISE_STEP, Scalar.SAMPLE))
    key = noise_key(tensor_key(spec.seed, batch.places[k]), step, sample)
    return uniform(batch.params[k], key)
