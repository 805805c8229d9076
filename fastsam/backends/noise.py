"""The random numbers of ``kernels/noise.py`` in torch."""

from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.bits import LOW, noise_key, tensor_key, uniform
from fastsam.step.spec import StepSpec


def drawn(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """A number in (-1, 1) for every element of parameter ``k``, in the dtype of the arithmetic."""
    return uniform(batch.params[k], key_of(batch, k, spec, scalars))


def key_of(batch: Batch, k: int, spec: StepSpec, scalars: Tensor) -> Tensor:
    """What the numbers of parameter ``k`` depend on in the present perturbation; 0-dim int64."""
    assert spec.seed is not None and batch.places is not None
    step, sample = (scalars[slot].long() & LOW for slot in (Scalar.NOISE_STEP, Scalar.SAMPLE))
    return noise_key(tensor_key(spec.seed, batch.places[k]), step, sample)
