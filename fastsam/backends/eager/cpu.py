"""The torch backend on a CPU: every method through torch's fused and foreach operators.

What makes it fast: scratch memory instead of copies (``scratch.py``); chains of operators on blocks
that stay in the cache (``blocks.py``); torch's fused Adam and Adagrad also for LightSAM's averages;
and scalars that the host may read, which on a CPU costs nothing. A tensor that the operators do not
serve (16-bit, mixed dtypes or layouts, gaps) goes through the reference backend's equations.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar
from fastsam.step.batch import Batch
from fastsam.step.memory import alike
from fastsam.step.spec import StepSpec

from .. import reference, sums
from ..base import Pass, Stop
from ..choice import chosen
from ..equations import radius
from ..weights import at_weights, follow_parameters
from .ascents import along_gradient, path_of
from .blocks import dots
from .fused import Part, Update, update_of
from .norms import leaves_float32, norm, served, span_norms, total
from .scratch import WORTHWHILE, Memory, ScratchBackup, known_of


def split(
    batch: Batch, spec: StepSpec, known: dict[Any, Any], descends: bool
) -> tuple[list[Part], list[int]]:
    """The parts that the operators serve, and the other members."""
    key = ("parts", descends, spec.descent is None)
    found = known.get(key)
    if found is None or found[0] is not batch.prepared or not _fits(found, batch, spec, descends):
        found = batch.prepared, *_divide(batch, spec, descends)
        # with state of the ascent other tensors come every time
        if batch.prepared is not None if descends else batch.ascent is None:
            known[key] = found
    _, members, others = found
    parts = [
        Part(spec.groups[i], ks, fresh, mixed, spec.base_of(i))
        for (i, _, fresh, mixed), ks in members.items()
    ]
    return parts, others


def _fits(found: tuple[Any, ...], batch: Batch, spec: StepSpec, descends: bool) -> bool:
    """Whether first gradients, which are others every time, are served as those were."""
    if not descends or spec.descent is None:
        return True
    _, members, others = found
    if others or batch.firsts is None:
        return False
    for (*_, mixed), ks in members.items():
        for k in ks:
            first = batch.firsts[k]
            if (first is not None) != mixed or (mixed and not alike(batch.params[k], first)):
                return False
    return True


def _divide(batch: Batch, spec: StepSpec, descends: bool) -> tuple[dict[Any, list[int]], list[int]]:
    has_path = [not descends] * len(spec.groups)
    if descends:
        bases = map(spec.base_of, range(len(spec.groups)))
        has_path = [base is not None and update_of(base) is not None for base in bases]
        if not any(has_path):
            return {}, list(range(len(batch.params)))
    members: dict[Any, list[int]] = defaultdict(list)
    others = []
    for k, (param, i) in enumerate(zip(batch.params, batch.groups, strict=True)):
        streams = [param, batch.grads[k]]
        fresh = mixed = False
        if not has_path[i]:
            others.append(k)
            continue
        if descends:
            base = spec.base_of(i)
            assert base is not None and batch.states is not None
            streams += [batch.states[k][name] for name in base.states(spec.groups[i])]
            fresh = batch.fresh is not None and batch.fresh[k]
            if spec.descent is not None and batch.firsts is not None:
                first = batch.firsts[k]
                if first is not None:
                    streams.append(first)
                    mixed = True
        else:
            for tables in (batch.ascent, batch.next):
                streams += [] if tables is None else (tables[k] or {}).values()
            if batch.read is not None:
                read = batch.read[k]
                streams += [] if read is None else [read]
                fresh = read is None
        if served(streams):
            members[i, param.dtype, fresh, mixed].append(k)
        else:
            others.append(k)
    return members, others


def by_segment(parts: list[Part], batch: Batch) -> list[Part]:
    """Parts of one segment each."""
    found = []
    for part in parts:
        members = defaultdict(list)
        for k in part.members:
            assert batch.segments is not None
            members[batch.segments[k]].append(k)
        found += [replace(part, members=same) for same in members.values()]
    return found


# --- the ascent ------------------------------------------------------------------------------


def ascend(
    batch: Batch, spec: StepSpec, scalars: Tensor, memory: Memory, kept: ScratchBackup | None
) -> Pass[ScratchBackup]:
    """See ``Backend.ascend``."""
    batch = chosen(batch, spec, scalars)
    known, rule = known_of(batch), path_of(spec.ascent)
    parts, others = split(batch, spec, known, descends=False)
    follow_parameters(batch, None)
    weights = at_weights(batch)
    slow = {k: reference.advance_one(batch, k, spec, scalars) for k in others}
    directions = rule.directions(batch, parts, spec, slow, scalars)
    if spec.needs_ascent_norm:
        n = m = yield from norm(batch.grads, weights, spec, scalars[0], memory)
        along: Sequence[Tensor] = batch.grads
        if spec.ascent.norm == "direction":
            along = reference.measured_ones(directions, batch, spec, scalars)
            m = yield from norm(along, weights, spec, scalars[0], memory)
            if m.isnan() and n.isfinite():
                rule.starts_anew(batch, parts, spec)
                m = yield from norm(along, weights, spec, scalars[0], memory)
        if batch.squares is not None:
            m = yield from sums.squares_by_segment(along, weights.params, batch, spec, scalars[0])
            parts = by_segment(parts, batch)
        sums.finish_ascent(n, m, spec, scalars)
    backup = ScratchBackup(memory, known, spec.groups) if kept is None else kept
    try:
        # all copies come first: two parameters may be views of the same memory
        if kept is None:
            in_place = spec.has_unfused or spec.keeps_weights or not spec.scratch
            # owners of shards keep looking at their memory
            in_place = in_place or (batch.shardings is not None and any(batch.shardings))
            least = 1 if spec.scratch is True else WORTHWHILE
            targets = [backup.take(part.of(batch.params), in_place, least) for part in parts]
            with_master = [k for k in others if weights.params[k] is not batch.params[k]]
            backup.borrow({batch.params[k]: weights.params[k] for k in with_master})
            if others:
                rest = [batch.params[k] for k in others if k not in with_master]
                backup.take(rest, in_place=True)
        else:  # parameters are where they may be written to
            kept.keep(batch)
            targets = [part.of(batch.params) for part in parts]
        for part, target in zip(parts, targets, strict=True):
            seen = sums.scalars_of(batch, part.members[0], scalars)
            rule.perturb(batch, part, target, directions, spec, seen, memory)
            backup.move(part.of(batch.params), target)
        for k, direction in slow.items():
            reference.perturb_one(batch, k, direction, spec, scalars)
    except BaseException:
        backup.restore()
        raise
    return backup


# --- the descent -----------------------------------------------------------------------------


def descend(
    batch: Batch, backup: ScratchBackup | None, spec: StepSpec, scalars: Tensor, memory: Memory
) -> Pass[None]:
    """See ``Backend.descend``."""
    known = known_of(batch)
    parts, others = split(batch, spec, known, descends=True)
    updates: list[Update] = []
    slow: reference.Values = []
    with sums.undone_if_it_fails(scalars):
        if spec.needs_descent_norm:
            plain = measured = yield from norm(batch.grads, batch, spec, scalars[0])
            if spec.adaptive and spec.renormalize:
                measured = yield from norm(batch.grads, batch, spec, scalars[0], memory)
            found = yield from descent_sums(batch, parts, others, backup, spec, plain, scalars)
            adapts = reference.adapts_here(batch, spec)
            sums.finish_descent(plain, measured, found, spec, scalars, adapts)
        reference.keep_rejected(batch, spec, scalars)
        reference.leave_kept(batch, spec, scalars)
        follow_parameters(batch, backup)
        if backup is not None:
            backup.restore()
        if spec.base is None and spec.bases is None:
            reference.leave_final_gradient(batch, spec, scalars)
        elif not spec.skip_nonfinite or scalars[Scalar.ACCEPTED] != 0:
            # what may fail comes before the first update
            values = scalars.tolist()
            for part in parts:
                path = None if part.base is None else update_of(part.base)
                assert path is not None
                updates.append(path(batch, part, spec, values, memory, known))
            for k in others:
                if spec.base_of(batch.groups[k]) is not None:
                    slow += reference.update_one(batch, k, None, spec, scalars)
        yield None
    if spec.bases is not None and spec.has_unfused:
        reference.leave_final_gradient(batch, spec, scalars)
        yield Stop.UNFUSED
    for update in updates:
        update.run()
    reference.write(slow)


def descent_sums(
    batch: Batch,
    parts: list[Part],
    others: list[int],
    backup: ScratchBackup | None,
    spec: StepSpec,
    plain: Tensor,
    scalars: Tensor,
) -> Pass[dict[str, Tensor]]:
    """A descent rule's sums as in the reference backend, here from dot products of gradients."""
    if spec.descent is None:
        return {}
    is_part = batch.shardings is not None and any(batch.shardings)
    along = path_of(spec.ascent) is along_gradient
    apart = others or spec.adaptive or not along or is_part or batch.part is not None
    apart = apart or batch.squares is not None
    # of what an earlier step has left the norm is not known
    norms = (plain,) if spec.descent.reuses else (plain, scalars[Scalar.GRAD_NORM])
    if apart or any(leaves_float32(n.square()) for n in norms):
        return (yield from sums.descent_sums(batch, backup, spec, scalars))
    squared = torch.zeros_like(plain)  # of the first gradient
    product, sharpness, rise = squared, squared, squared
    by_radius: dict[float, list[int]] = defaultdict(list)
    for part in parts:
        if part.mixed:
            scale = float(radius(spec, part.group, scalars.tolist()))
            by_radius[scale] += part.members
    for scale, members in by_radius.items():
        assert batch.firsts is not None
        firsts = [cast(Tensor, batch.firsts[k]) for k in sorted(members)]
        if spec.keeps:  # as the product, which is to be equal where the gradients are
            own = total(chain.from_iterable(dots(g, g) for g in firsts), plain)
        elif len(by_radius) == 1 and backup is not None and len(backup.copies) == len(members):
            own = scalars[Scalar.GRAD_NORM].square()  # the ascent saw the same gradients
        else:
            ends, whole = span_norms(firsts)
            own = total((*ends.values(), *whole.values()), plain, squares=True)
        if spec.descent.reuses and leaves_float32(own):
            return (yield from sums.descent_sums(batch, backup, spec, scalars))
        squared = squared + own
        if spec.reuses_by_norm:  # nobody asks for products
            continue
        pairs = zip(firsts, [batch.grads[k] for k in sorted(members)], strict=True)
        cross = total(chain.from_iterable(dots(g, g_) for g, g_ in pairs), plain)
        product = product + cross
        sharpness = sharpness + scale * (own + cross) / 2
        rise = rise + scale * cross
    return {"first": squared, "product": product, "sharpness": sharpness, "rise": rise}
