"""The torch backend on a CPU: every method through torch's fused and foreach operators.

What makes it fast: scratch memory instead of copies (``scratch.py``); chains of operators on pieces
that stay in the cache (``pieces.py``); torch's fused Adam and Adagrad also for LightSAM's averages,
with the bias correction of an infinite step; and scalars that the host may read, which on a CPU
costs nothing. A tensor that the operators do not serve (16-bit, mixed dtypes or layouts, gaps) goes
through the reference backend's equations.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from fastsam.kernels.layout import Scalar

from ..bases import Group
from ..rules import Batch, Step
from . import equations, measures, reference
from .cpu_update import Part, Update, extremes, fused_adagrad, fused_adam
from .equations import radius
from .lockstep import Pass
from .measures import MixtureMeasure
from .norms import element_scales, norm, served, span_norms, total
from .pieces import LARGE, dots, pieces
from .scratch import Memory, ScratchBackup, known_of
from .weights import at_weights, follow_parameters


def split(
    batch: Batch, step: Step, known: dict[Any, Any], descends: bool
) -> tuple[list[Part], list[int]]:
    """The parts that the operators serve, and the other members."""
    key = ("parts", descends, step.mix is None)
    found = known.get(key)
    if found is None or found[0] is not batch.prepared:
        found = batch.prepared, *_divide(batch, step, descends)
        if descends:
            lasts = batch.prepared is not None and step.mix is None
        else:
            lasts = not any(step.ascent.states(group) for group in step.groups)
        if lasts:  # with state of the ascent, or first gradients, other tensors come every time
            known[key] = found
    _, members, others = found
    parts = [Part(step.groups[i], ks, fresh, mixed) for (i, _, fresh, mixed), ks in members.items()]
    return parts, others


def _divide(batch: Batch, step: Step, descends: bool) -> tuple[dict[Any, list[int]], list[int]]:
    members: dict[Any, list[int]] = defaultdict(list)
    others = []
    for k, (param, i) in enumerate(zip(batch.params, batch.groups, strict=True)):
        streams = [param, batch.grads[k]]
        fresh = mixed = False
        if descends:
            if step.base is not None:
                streams += [batch.states[k][name] for name in step.base.states(step.groups[i])]
                fresh = batch.fresh[k]
            first = batch.firsts[k] if step.mix is not None else None
            if first is not None:
                streams.append(first)
                mixed = True
        else:
            streams += [*batch.ascent[k].values(), *batch.next[k].values()]
        if served(streams):
            members[i, param.dtype, fresh, mixed].append(k)
        else:
            others.append(k)
    return members, others


# --- the ascent ------------------------------------------------------------------------------


def ascend(batch: Batch, step: Step, scalars: Tensor, memory: Memory) -> Pass[ScratchBackup]:
    """See ``Backend.ascend``."""
    known = known_of(batch)
    parts, others = split(batch, step, known, descends=False)
    follow_parameters(batch, None)
    weights = at_weights(batch)
    slow = {k: reference.advance_one(batch, k, step) for k in others}
    directions = batch.grads
    if step.ascent.name != "unified" and not any(batch.next):
        directions = [equations.direction(step.ascent.name, g, {}) for g in batch.grads]
    if step.ascent.name == "ema":
        average(batch, parts, starting=False)
        directions = [state["ema"] for state in batch.next]
    if step.needs_ascent_norm:
        n = m = yield from norm(batch.grads, weights, step, scalars[0], memory)
        if step.ascent.name == "ema":
            m = yield from norm(directions, weights, step, scalars[0], memory)
            if m.isnan() and n.isfinite():
                average(batch, parts, starting=True)
                m = yield from norm(directions, weights, step, scalars[0], memory)
        measures.finish_ascent(n, m, step, scalars)
    backup = ScratchBackup(memory, known)
    try:
        # all copies come first: two parameters may be views of the same memory
        in_place = step.base is None or step.keeps_weights
        in_place = in_place or any(batch.shardings)  # whose owners keep looking at their memory
        targets = [backup.take(part.of(batch.params), in_place) for part in parts]
        with_master = [k for k in others if weights.params[k] is not batch.params[k]]
        backup.borrow({batch.params[k]: weights.params[k] for k in with_master})
        backup.take([batch.params[k] for k in others if k not in with_master], in_place=True)
        for part, target in zip(parts, targets, strict=True):
            perturb(batch, part, target, directions, step, scalars, memory)
            backup.move(part.of(batch.params), target)
        for k, direction in slow.items():
            reference.perturb_one(batch, k, direction, step, scalars)
    except BaseException:
        backup.restore()
        raise
    return backup


def average(batch: Batch, parts: list[Part], starting: bool) -> None:
    """VaSSO's average; where it is ``starting`` it may be NaN, and begins with the gradient."""
    for part in parts:
        old, new = part.column(batch.ascent, "ema"), part.column(batch.next, "ema")
        for ema, g, result in zip(old, part.of(batch.grads), new, strict=True):
            if starting:
                result.copy_(equations.advance("ema", g, {"ema": ema}, part.group)["ema"])
            else:
                torch.lerp(ema, g, float(part.group["theta"]), out=result)


def add_into(targets: list[Tensor], weights: list[Tensor], xs: Sequence[Tensor], a: float) -> None:
    """``targets = weights + a * xs``; a target may be its weight."""
    in_place: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, w, x in zip(targets, weights, xs, strict=True):
        if target is w or same_memory(target, w):
            in_place[0].append(w)
            in_place[1].append(x)
        else:
            torch.add(w, x, alpha=a, out=target)
    if in_place[0]:
        torch._foreach_add_(*in_place, alpha=a)


def same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr()


def perturb(
    batch: Batch,
    part: Part,
    targets: list[Tensor],
    directions: Sequence[Tensor],
    step: Step,
    scalars: Tensor,
    memory: Memory,
) -> None:
    """Write ``w + e`` to the targets."""
    weights, group, rule = part.of(batch.params), part.group, step.ascent.name
    scale = float(radius(group, step, scalars.tolist()))
    if rule in ("adagrad", "adam"):
        names = list(step.ascent.states(group))
        streams = [part.column(batch.ascent, name) for name in names]
        streams += [part.column(batch.next, name) for name in names]
        for _, (w, g, x, *states) in pieces(weights, part.of(batch.grads), targets, *streams):
            perturb_by_averages(w, g, x, states, group, step, scalars, memory, scale)
        return
    if rule == "ema" and not scalars[Scalar.ASCENT_NORM].isfinite():
        torch._foreach_copy_(part.column(batch.next, "ema"), part.column(batch.ascent, "ema"))
    if scale == 0:  # the direction may hold infinities
        torch._foreach_copy_(targets, weights)
    elif group["adaptive"]:
        for _, (w, d, x) in pieces(weights, part.of(directions), targets):
            t = element_scales(w, group, memory)
            squares = t.whole.square_()
            if w[0].numel() >= LARGE:  # alone, and always so: it rounds differently
                torch.addcmul(w[0], squares, d[0], value=scale, out=x[0])
            else:
                torch._foreach_mul_(t.parts, d)
                add_into(x, w, t.parts, scale)
    else:
        add_into(targets, weights, part.of(directions), scale)


def usable(averages: list[Tensor], memory: Memory) -> bool:
    """Whether averages of squares are finite, and not so small that their root is not taken."""
    low, high = extremes(memory.room(averages).gather(averages))
    return low >= equations.SMALLEST and high < math.inf


def perturb_by_averages(
    weights: list[Tensor], grads: list[Tensor], targets: list[Tensor], states: list[list[Tensor]],
    group: Group, step: Step, scalars: Tensor, memory: Memory, rho: float,
) -> None:  # fmt: skip
    """One piece of LightSAM II's or III's perturbation, which is a step of Adagrad or Adam."""
    rule, names = step.ascent.name, list(step.ascent.states(group))
    old, new = states[: len(names)], states[len(names) :]
    for before, after in zip(old, new, strict=True):
        torch._foreach_copy_(after, before)
    perturbed = [w.clone() if same_memory(x, w) else x.copy_(w)
                 for x, w in zip(targets, weights, strict=True)]  # fmt: skip
    if rule == "adam":
        fused_adam(perturbed, grads, new, group["betas"], -rho)
    else:
        fused_adagrad(perturbed, grads, new[0], -rho)
    if not usable(new[-1], memory):
        for k, (w, g, x) in enumerate(zip(weights, grads, perturbed, strict=True)):
            if usable(new[-1][k : k + 1], memory):
                continue
            state = {name: column[k] for name, column in zip(names, old, strict=True)}
            advanced = equations.advance(rule, g, state, group)
            good = equations.usable(rule, advanced, scalars)
            d = equations.direction(rule, g, advanced)
            e = equations.perturbation(w, d, group, scalars.new_tensor(rho))
            x.copy_(w + torch.where(good, e, 0.0))
            for name, column in zip(names, new, strict=True):
                column[k].copy_(torch.where(good, advanced[name], state[name]))
    for x, target in zip(perturbed, targets, strict=True):
        if x is not target:
            target.copy_(x)


# --- the descent -----------------------------------------------------------------------------


def descend(
    batch: Batch, backup: ScratchBackup | None, step: Step, scalars: Tensor, memory: Memory
) -> Pass[None]:
    """See ``Backend.descend``."""
    known = known_of(batch)
    parts, others = split(batch, step, known, descends=True)
    updates: list[Update] = []
    slow: reference.Values = []
    with measures.undone_if_it_fails(scalars):
        if step.needs_descent_norm:
            plain = measured = yield from norm(batch.grads, batch, step, scalars[0])
            if step.adaptive and step.renormalize:
                measured = yield from norm(batch.grads, batch, step, scalars[0], memory)
            measure = measure_mixture(batch, parts, others, backup, step, plain, scalars)
            yield from measures.finish_descent(plain, measured, measure, step, scalars, batch.leads)
        reference.keep_rejected(batch, step, scalars)
        follow_parameters(batch, backup)
        if backup is not None:
            backup.restore()
        if step.base is None:
            reference.leave_final_gradient(batch, step, scalars)
        elif not step.skip_nonfinite or scalars[Scalar.ACCEPTED] != 0:
            # what may fail comes before the first update
            updates = [Update(batch, part, step, scalars, memory, known) for part in parts]
            for k in others:
                slow += reference.update_one(batch, k, None, step, scalars)
        yield None
    for update in updates:
        update.run()
    reference.write(slow)


def measure_mixture(
    batch: Batch,
    parts: list[Part],
    others: list[int],
    backup: ScratchBackup | None,
    step: Step,
    plain: Tensor,
    scalars: Tensor,
) -> MixtureMeasure:
    """SAMAR's measurements as in the reference backend, here from dot products of gradients."""
    is_part = any(batch.shardings) or batch.part is not None
    if others or step.adaptive or step.ascent.name != "unified" or is_part:
        return measures.measure_mixture(batch, backup, step, scalars)

    def measure(first: Tensor, coefficient: Tensor) -> Pass[tuple[Tensor, Tensor]]:
        yield from ()  # its sums are over everything
        squared = torch.zeros_like(plain)  # of the first gradient
        product, sharpness = squared, squared
        by_radius: dict[float, list[int]] = defaultdict(list)
        for part in parts:
            if part.mixed:
                scale = float(radius(part.group, step, scalars.tolist()))
                by_radius[scale] += part.members
        for scale, members in by_radius.items():
            firsts = [cast(Tensor, batch.firsts[k]) for k in sorted(members)]
            if len(by_radius) == 1 and backup is not None and len(backup.copies) == len(members):
                own = scalars[Scalar.GRAD_NORM].square()  # the ascent saw the same gradients
            else:
                ends, whole = span_norms(firsts)
                own = total((*ends.values(), *whole.values()), plain, squares=True)
            pairs = zip(firsts, [batch.grads[k] for k in sorted(members)], strict=True)
            cross = total(chain.from_iterable(dots(g, g_) for g, g_ in pairs), plain)
            squared, product = squared + own, product + cross
            sharpness = sharpness + scale * (own + cross) / 2
        if first == 0:
            return coefficient * plain, sharpness
        mixed = (coefficient * plain).square() + 2 * first * coefficient * product
        return (mixed + first.square() * squared).clamp(min=0).sqrt(), sharpness

    return measure
