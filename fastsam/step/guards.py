"""What is refused or warned of in a step, before it goes wrong in silence."""

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import compress

import torch

from .batch import Batch
from .flight import InFlight
from .rule import Descent, Group
from .spec import is_perturbed

#: The folders whose frames are not the user's: fastsam's and torch's.
INSIDE = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (os.path.dirname(__file__), torch.__file__)
)


def warn_user(message: str) -> None:
    """Warn at the caller's line, however many wrappers of torch's are in between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


class Warnings:
    """Warnings of which each is given once."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def once(self, of: str, message: str) -> None:
        """Give a warning; ``of`` is what it is of."""
        if of not in self.given:
            self.given.add(of)
            warn_user(message)


def check_replicas(name: str, descent: Descent | None, renormalize: bool,
                   groups: Sequence[Group]) -> None:  # fmt: skip
    """The update of replicas with first gradients of their own is the same for all.

    Raises:
        RuntimeError: If it would not be.
    """
    if descent is not None:
        raise RuntimeError(
            f"{name} mixes the first gradient into the update, so ascent_context must not skip its "
            "synchronisation: the replicas' weights would drift apart"
        )
    if renormalize and any(group["adaptive"] for group in groups):
        raise RuntimeError(
            f"{name} renormalizes adaptive groups by norms at each replica's own w + e, so "
            "ascent_context must not skip the synchronisation of gradients"
        )


#: Said where a closure has left none.
NO_GRADIENTS = (
    "the closure left no gradient in any parameter: it has to call backward() on the loss of the "
    "model whose parameters are optimized"
)
#: Said where a loop, or the closure's last call, has left none.
NO_SECOND_GRADIENTS = (
    "the second pass left no gradients, and the step changes nothing: call backward on the loss at "
    "the perturbed weights as well"
)
#: Said where replicas would drift apart if the context is one that keeps gradients apart.
UNKNOWN_CONTEXT = (
    "ascent_context is not known to skip the synchronisation of gradients. If it does, the "
    "replicas' weights drift apart, as the update depends on the norm of the first gradient: use "
    "ascent_context=fastsam.per_replica(model) instead"
)


def check_reduced(batch: Batch, flight: InFlight, groups: Sequence[Group]) -> None:
    """Sharded parameters that are perturbed and have a second gradient had a first one.

    Raises:
        RuntimeError: If not.
    """
    if flight.saw_shards or batch.shardings is None:
        return
    perturbed = [is_perturbed(groups[i]) for i in batch.groups]
    if any(compress(batch.shardings, perturbed)):
        raise RuntimeError(
            "sharded parameters got gradients in the second pass and none in the first: the first "
            "gradients were not reduced, and would be added to the second. A rank holds only its "
            "shard of the weights, and cannot perturb all of them along its own gradient. Leave "
            "the first pass synchronised; on a mesh with replicas use "
            "ascent_context=fastsam.per_replica(model)"
        )


def warn_of_stale_gradients(flight: InFlight, given: Warnings, call: str = "second_step") -> None:
    """Look at the first and the last parameter's gradient, where the first pass left them."""
    seen, flight.seen = flight.seen, []
    if not seen:
        return
    writes = {mark.writes for mark in seen}
    if writes <= {0}:
        what = "still those"
    elif writes <= {1}:
        what = "the sum of its own and those"
    else:
        return
    given.once(
        "stale gradients",
        f"{call}() seems to find gradients that are {what} of the first pass: zero "
        "them after first_step (its argument zero_grad=True does) and call backward again",
    )
