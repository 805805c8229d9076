"""A step that is looked at once more when it is complete: what LETS measures at its weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.replicas import average

from .batch import Batch
from .flight import Backup
from .gradients import put_back, set_aside, take_over
from .spec import StepSpec


@dataclass
class Recording:
    """What a step saw, and how to measure more.

    Attributes:
        hessian: The approximation that it is for, ``"diag"`` or ``"difference"``.
        run: Calls a closure as the second pass does: gradients zeroed, in its context.
        collect: Gives the batch of the present gradients.
        hypergradient: The backend's, of the batch, the backup, the approximation and the spec.
        clear: Zeroes all gradients, as the step does between its passes.
        cleared: Whether that sets them to None.
    """

    hessian: str
    run: Callable[[Callable[[], Any]], Any]
    collect: Callable[[], Batch]
    hypergradient: Callable[[Batch, Backup | None, str, StepSpec], Tensor]
    clear: Callable[[], None]
    cleared: bool
    batch: Batch | None = None
    backup: Backup | None = None
    spec: StepSpec | None = None
    replicas: Any = None

    def take(self, batch: Batch, backup: Backup | None, spec: StepSpec, replicas: Any) -> None:
        """Take in a step that is complete, of which only what the approximation reads."""
        diag = self.hessian == "diag"
        old = batch.ascent if diag and spec.ascent.from_old else None
        self.batch = replace(batch, ascent=old, held=None, next=batch.next if diag else None)
        self.backup = backup if diag and spec.adaptive else None
        self.spec, self.replicas = spec, replicas

    @property
    def happened(self) -> bool:
        """Whether something was perturbed and updated."""
        return self.batch is not None

    def losses(self, *closures: Callable[[], Any]) -> list[Any]:
        """What each closure returns at the present weights; the batch gets their gradients.

        There are two: the training loss's and the validation loss's. The gradients that the step
        left are there again afterwards.
        """
        assert self.batch is not None
        batch = self.batch
        left = set_aside(self.collect(), self.cleared, ours=batch.grads)
        batch.grads = take_over(batch, self.cleared, ours=left.values())
        results, grads = [], []
        try:
            for closure in closures:
                results.append(self.run(closure))
                present = self.collect()
                taken = take_over(present, self.cleared)
                kept = dict(zip(present.owners, taken, strict=True))
                grads.append([kept.get(param) for param in batch.owners])
        finally:
            self.clear()
            put_back(left)
        batch.training, batch.validation = grads
        return results

    def slope(self) -> tuple[Tensor, Tensor]:
        """The sum of ``lr * coefficient * (validation - training) * H e``, and whether it counts.

        0-dim tensors on the device.
        """
        assert self.batch is not None and self.spec is not None
        scalars = self.hypergradient(self.batch, self.backup, self.hessian, self.spec)
        if self.replicas is not None:  # each has perturbed along its own gradient
            average(scalars[Scalar.HYPERGRADIENT], self.replicas)
        slope = scalars[Scalar.HYPERGRADIENT].clone()
        measured = slope.isfinite()
        if self.spec.needs_ascent_norm:  # else nothing was perturbed
            measured &= scalars[Scalar.GRAD_NORM].isfinite()
        if self.spec.skip_nonfinite:
            measured &= scalars[Scalar.ACCEPTED] != 0
        return slope, measured
