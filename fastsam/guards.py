"""What is refused or warned of in a step, before it goes wrong in silence."""

from typing import Any

from .gather import GatheringOptimizer
from .replicas import is_distributed
from .rules import Batch, LamRule


class GuardedOptimizer(GatheringOptimizer):
    """Knows in what order the passes come, and what they must find."""

    _mix: LamRule | None = None  # SAMAR's
    ascent_context: Any
    renormalize: bool

    def _expect(self, due: str, call: str = "") -> None:
        call = call or due
        if self._inside_closure:
            raise RuntimeError(f"{call} cannot be called from inside a closure given to step")
        if (due == "second_step") != self._between_passes:
            due = "second_step" if self._between_passes else "first_step"
            raise RuntimeError(
                f"expected {due}, which has to come before another {call}: first_step and "
                "second_step alternate"
            )

    def _check_replicas(self) -> None:
        """The update of replicas with first gradients of their own is the same for all."""
        name = type(self).__name__
        if self._mix is not None:
            raise RuntimeError(
                f"{name} mixes the first gradient into the update, so ascent_context cannot leave "
                "the replicas' gradients apart: their weights would be different from then on"
            )
        if self.renormalize and any(group["adaptive"] for group in self.param_groups):
            raise RuntimeError(
                f"{name} renormalizes, in adaptive groups, by norms that depend on each replica's "
                "own w + e, so ascent_context cannot leave the replicas' gradients apart"
            )

    def _warn_of_unknown_context(self) -> None:
        """Say, once, that replicas would drift apart if this is one that keeps gradients apart."""
        matters = self.renormalize or self._mix is not None or self._is_scaled
        if matters and is_distributed():
            self._warn_once(
                "unknown context",
                "ascent_context is none that is known to keep gradients apart. If it does, the "
                "replicas' weights drift apart, as the update takes more of the first gradient "
                "than its direction: give ascent_context=fastsam.per_replica(model) instead",
            )

    def _check_reduced(self, batch: Batch) -> None:
        """Sharded parameters that have a second gradient had a first one."""
        if any(batch.shardings) and not self._saw_shards:
            raise RuntimeError(
                "the first pass left no gradients in sharded parameters and the second did: where "
                "they are not reduced they are kept back, and added to the second ones. A rank "
                "holds only its shard of the weights, and cannot perturb all of them along a "
                "gradient of its own; on a mesh with replicas, "
                "ascent_context=fastsam.per_replica(model) perturbs each replica along its own"
            )

    def _warn_of_stale_gradients(self) -> None:
        """Look at the first and the last parameter's gradient, where the first pass left them."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        present = [(param.grad, old(), version) for param, old, version in seen]
        if all(grad is not None and grad is old for grad, old, _ in present):
            writes = {old._version - version for _, old, version in present if old is not None}
            if writes <= {0}:
                what = "still those"
            elif writes <= {1}:
                what = "the sum of its own and those"
            else:
                return
            self._warn_once(
                "stale gradients",
                f"second_step() seems to find gradients that are {what} of the first pass: zero "
                "them after first_step (its argument zero_grad=True does) and call backward again",
            )
