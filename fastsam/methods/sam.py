"""SAM and its closest relatives: one ascent rule with two switches, and SSAM's descent rule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import (
    FLAG,
    Choice,
    Context,
    Policy,
    as_float,
    refuse,
    setting,
    unified_lam,
)
from fastsam.step.checks import check_lam
from fastsam.step.spec import Ascent, Columns, Group
from fastsam.unified import UNIFIED


class SAM(SharpnessAwareOptimizer):
    r"""Sharpness-aware minimization.

    .. math:: e = \rho\, \frac{T^2 g}{\|T g\| + 10^{-12}}, \qquad
              w \leftarrow \mathrm{base}(w, \tilde g), \quad \tilde g = \nabla L(w + e)

    with :math:`T = 1`, or :math:`T = |w| + \eta` element-wise in adaptive groups; :math:`g` is the
    gradient at :math:`w`. The norm is global: over every element of every group.

    Cost: two forward and backward passes, one copy of the weights between them, and with SGD and
    momentum 40 bytes per element in float32 (reduce 4, perturb 16, update 20; 44 if adaptive),
    three launches.

    Args:
        params: Parameters, named parameters or parameter groups, as in :mod:`torch.optim`. Groups
            may set ``rho``, ``adaptive`` and ``eta`` for themselves. One with ``perturb=False`` is
            not perturbed and not part of the norm, only updated; it costs nothing in the first
            pass, and has no state of the ascent. ``renormalize`` refuses it.
        base_optimizer: Optimizer class for the update. :class:`torch.optim.SGD`,
            :class:`~torch.optim.Adam`, :class:`~torch.optim.AdamW`, :class:`~torch.optim.Adagrad`
            and :class:`AdaGradNorm` run fused with the rest of the step; any other class is stepped
            by itself, with the final gradient in ``.grad``. A group may have another class under
            the key ``base_optimizer``, and that one's arguments as its other keys; the class given
            here, with ``base_kwargs``, is for the groups without.
        rho: Radius of the perturbation, at least 0; a 0-dim tensor stays on its device.
            Default 0.05. A group whose ``rho`` is 0 stays part of the norm, so that the others
            are perturbed by less than theirs; ``perturb=False`` is the way out. Where it is 0 in
            every group, ``step`` is the base optimizer's and calls the closure once.
        adaptive: ASAM's element-wise scale. Default False.
        eta: Added to ``|w|`` in the adaptive scale, at least 0. Default 0.
        renormalize: SSAM's rescaling of the second gradient, see :class:`SSAM`. Default False.
        max_grad_norm: Clip the final gradient to this global norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does: a norm that is NaN makes every weight NaN,
            an infinite one those whose gradient is (``skip_nonfinite`` prevents both). Default
            None.
        skip_nonfinite: Where the second gradient's norm is not finite, restore the weights and
            leave the state alone. Default False. With a base optimizer that is not fused, this
            synchronises with the device once a step.
        norm: Over what the perturbation's norm is: ``"global"``, all elements; ``"group"``, those
            of each parameter group, as for the members of an ensemble; or ``"layer"``, those of
            each parameter. Each segment moves by its own ``rho`` then, and one whose norm is not
            finite by nothing. With ``"layer"`` the whole perturbation is about ``rho`` times the
            root of the number of parameters, so ``rho`` has to be smaller. One more launch, of no
            gradients. ``metrics["grad_norm"]`` stays global, and so does ``renormalize``. Default
            ``"global"``.
        perturb_every, start, stop: Of the steps, counted from 0, those numbered ``start``,
            ``start + perturb_every`` ... below ``stop`` are sharpness-aware; the others are the
            base optimizer's, at the cost of one pass. The count is saved with the state;
            ``kept["t"]`` is one more. Default 1, 0 and None: all of them.
        perturb_when: A function ``(step, metrics)`` that says whether a step that is due by these
            three is sharpness-aware. ``step`` counts from 0; ``metrics`` has
            ``"lr"`` and ``"rho"`` of the first group where they are numbers, and nothing that the
            host would have to wait for. All ranks have to answer alike. Default None: it is.
        amplify: Let a step with a perturbation stand for those without, as factor-SAM does, so that
            the best ``rho`` does not depend on :math:`k`, which is ``perturb_every``:

            .. math:: u = g + \alpha k\, (\tilde g - g)

            True is :math:`\alpha = 1`: in :math:`k` steps as much of the sharpness's gradient as
            SAM has in :math:`k` steps, and with :math:`k = 1` SAM itself. A number above 0 is
            :math:`\alpha`. The other steps are the base optimizer's as before. Costs what
            :class:`WSAM` does with ``decouple=False``: 44 bytes instead of 40. Not with classes
            whose update is made of both gradients already, nor ``ascent_steps`` above 1; where
            the first gradient's norm is not finite, :math:`u = \tilde g`, and so it is for a
            parameter without a first gradient. Default False.
        master_weights: Keep a float32 copy behind every float16 and bfloat16 parameter, perturb
            and update that, and round the result. It is in the state, under ``master_weight``;
            where somebody has written to a parameter since, that counts. The base's state is in
            float32 then, nothing is copied between the passes, and with SGD and momentum a step
            moves 32 bytes per element, where plain bfloat16 moves 20. Needs a fused base. Default
            False.
        rounding: ``"nearest"`` (the default), or ``"stochastic"``: bfloat16 parameters are rounded
            up or down at random, right on average, where ``w + e`` and the updated weight are
            stored. The base's state, and what a base that is not fused updates, is rounded to
            nearest.
        seed: Of the random bits, in [0, 2^32). They depend on it, the step, the pass, the place of
            the parameter in the optimizer and of the element in the parameter, and on nothing
            else. Default 0.
        ascent_steps: Number :math:`k` of first passes, at least 1. Above 1 each goes a share of the
            radius further, along the gradient where the one before has led, and the update takes
            the gradient at the end of that way:

            .. math:: w_{j+1} = w_j + \frac{\rho}{k}\,
                      \frac{T_j^2 g_j}{\|T_j g_j\| + 10^{-12}}, \qquad
                      g_j = \nabla L(w_j), \quad w_0 = w, \quad \tilde g = \nabla L(w_k)

            with :math:`T_j` that of :math:`w_j`. For :math:`T = 1` it ends within :math:`\rho` of
            :math:`w`. The closure is called :math:`k + 1` times; there is still one copy of the
            weights, and a further first pass moves 16 bytes per element in float32 (20 if
            adaptive) in two launches. ``grad_norm``, and what ``renormalize`` takes, is
            :math:`\|g_0\|`. A gradient in between that is not finite moves nothing. Where
            ``step`` calls the closure both contexts are around the passes in between. Not with
            state in the ascent (:class:`VaSSO`, :class:`LightSAM`), :class:`SAMAR`, :class:`LETS`,
            ``master_weights`` or stochastic rounding. Default 1.
        repeat_random: Let all calls of the closure draw the same random numbers (dropout's masks,
            augmentation on the device), by putting the states of torch's default generators back:
            the CPU's and those of the devices that hold parameters. Afterwards they stand where
            the first call has left them, also where the second fails, as if there had been one
            pass. Nothing is seeded and no device waited for; generators of one's own, and those of
            Python and numpy, go on. Refused in a CUDA graph. Default False: new numbers.
        ascent_context, descent_context: Functions without arguments that give a context manager:
            ``step`` enters it for its first or second call of the closure, as
            ``descent_context=lambda: fastsam.frozen_batch_norm(model)``. Default None.
        set_to_none: How a step zeroes gradients, as in ``zero_grad``. Default True. With False
            they keep their memory, for flat buffers of which every ``.grad`` is a part; a
            parameter that the loss does not depend on then has a gradient of zeros, with which it
            is updated.
        scratch: Whether a parameter may point at scratch memory between the passes, which holds
            ``w + e``, while ``w`` stays where it was and is not copied. With triton that is a store
            less: 36 bytes per element with SGD and momentum, 44 with AdamW. True: every parameter
            that owns its memory, alone (one of which no view is held, and that is neither a view
            nor a shard), if its base is fused and it has no master weights. All others are copied
            and perturbed in place, and False lets all be. With True a CUDA graph of a part of the
            step, as by :func:`torch.cuda.make_graphed_callables`, would go on with the address that
            it has recorded; where one is known to have been captured, parameters stay in place, as
            they do in ``fastsam.graphed``. A capture by hand refuses True. A view taken between the
            passes goes on following its parameter; what has noted the address alone, as other
            libraries may, reads ``w`` there. The scratch memory, as large as the parameters, is
            kept from step to step. On the host each parameter takes some microseconds more per
            step. ``"auto"``: on a CPU, with torch, parameters of 16,384 elements and more; with
            triton none, since the gain has been timed on no GPU yet. Default ``"auto"``.
        backend: ``"triton"``, ``"torch"``, ``"reference"`` or ``"auto"`` (the default: triton on
            a GPU it serves, else torch).
        **base_kwargs: Arguments of the base optimizer: ``lr=0.1, momentum=0.9`` ...

    Raises:
        TypeError: If ``base_optimizer`` is not an optimizer class, needs a closure itself, or has
            a group key of fastsam's, as :class:`torch.optim.Adadelta` has its own ``rho``.
        ValueError: If a hyper-parameter is out of range or ``backend`` is unknown; with several
            bases also for two of one name, for ``AdaGradNorm`` among them, and for master weights
            where one is not fused.
        ImportError: If ``backend="triton"`` and Triton is not installed.
        RuntimeError: If ``backend="triton"`` and the parameters are not on a GPU.

    Example:
        >>> optimizer = fastsam.SAM(model.parameters(), torch.optim.AdamW, rho=0.2, lr=1e-3)
        >>> loss = optimizer.step(closure)

    Reference: Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-aware minimization for efficiently
    improving generalization", ICLR 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        norm: str = "global",
        perturb_every: int = 1,
        start: int = 0,
        stop: int | None = None,
        perturb_when: Policy | None = None,
        amplify: bool | float = False,
        master_weights: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        repeat_random: bool = False,
        ascent_steps: int = 1,
        ascent_context: Context | None = None,
        descent_context: Context | None = None,
        set_to_none: bool = True,
        scratch: bool | str = "auto",
        backend: str = "auto",
        **base_kwargs: Any,
    ):
        super().__init__(
            params, base_optimizer, rho=rho, adaptive=adaptive, eta=eta, renormalize=renormalize,
            max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite, norm=norm,
            perturb_every=perturb_every, start=start, stop=stop, perturb_when=perturb_when,
            amplify=amplify, master_weights=master_weights, rounding=rounding, seed=seed,
            repeat_random=repeat_random, ascent_steps=ascent_steps, ascent_context=ascent_context,
            descent_context=descent_context, set_to_none=set_to_none, scratch=scratch,
            backend=backend, **base_kwargs,
        )  # fmt: skip


def _sign(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return torch.where(g.isfinite(), g.sign(), 0.0)


def _constant(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return torch.ones_like(norm) * rho if isinstance(norm, Tensor) else rho


def _layer_scale(norm: Tensor, group: Group) -> Any:
    return norm * (1 + group["eta"]) if group["layerwise"] else torch.ones_like(norm)


def _scaled(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["layer_scale"] * g


def _scaled_twice(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["layer_scale"] * (state["layer_scale"] * g)


def _scaled_sign(g: Tensor, state: dict[str, Tensor], h: Columns) -> Tensor:
    return state["layer_scale"] * _sign(g, state, h)


def _radius(rho: Any, norm: Any, total: Any, h: Columns) -> Any:
    return where(gives_direction(norm), rho / (norm + EPS))


#: Of the ball that the maximum norm makes.
SIGN = Ascent(
    name="sign", kernel="fastsam.kernels.ascent.sign", direction=_sign, radius=_constant,
    norm=None, scales_once=True,
)  # fmt: skip
#: The same two with one scale for each parameter.
LAYERWISE = Ascent(
    name="layerwise", kernel="fastsam.kernels.ascent.diagonal_constraint", direction=_scaled_twice,
    measured=_scaled, radius=_radius, base_state="layer_scale", layer_scale=_layer_scale,
    norm="direction", scales=False, arguments={"layerwise": FLAG},
)  # fmt: skip
LAYERWISE_SIGN = Ascent(
    name="layer_sign", kernel="fastsam.kernels.ascent.layer_sign", direction=_scaled_sign,
    radius=_constant, base_state="layer_scale", layer_scale=_layer_scale, norm=None, scales=False,
    arguments={"layerwise": FLAG},
)  # fmt: skip
FORMS = {
    ("elementwise", 2.0): UNIFIED, ("elementwise", math.inf): SIGN,
    ("layerwise", 2.0): LAYERWISE, ("layerwise", math.inf): LAYERWISE_SIGN,
}  # fmt: skip


class ASAM(SAM):
    r"""Adaptive SAM: a perturbation that does not change when weights are rescaled.

    .. math:: e = \rho\, \frac{T^2 g}{\|T g\| + 10^{-12}}, \qquad T = |w| + \eta

    That is the largest rise, to first order, with :math:`\|T^{-1} e\|_p \le \rho` for
    :math:`p = 2`. With ``p=inf`` it is

    .. math:: e = \rho\, T \operatorname{sign}(g), \qquad \operatorname{sign}(0) = 0

    where each weight moves by the share :math:`\rho` of itself and no norm is taken: ``rho`` has to
    be far smaller. An element whose gradient is not finite is not perturbed.

    With ``form="layerwise"`` every element of a parameter :math:`w_l` has the scale
    :math:`T = \|w_l\|\,(1 + \eta)`, with either ``p``. A group key ``layerwise=False`` is
    :math:`T = 1` then, as ``adaptive=False`` is for the element-wise form. It is meant for few
    weights, as those of :func:`normalization_groups`: the norms are taken by torch, of shards over
    all ranks, and the scale is written out for every element, into memory that is kept.
    :class:`LETS` needs ``hessian="difference"`` with it.

    :class:`SAM` with ``adaptive=True`` and the paper's defaults. The authors take :math:`T = 1` for
    every parameter whose name lacks "weight": put those into a group with ``adaptive=False``.
    ``SAM(..., adaptive=True)``, with ``eta=0`` on every parameter, is the other definition in use.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Radius, at least 0. Default 0.5: ten times SAM's, since :math:`T` is small.
        eta: Added to ``|w|``, at least 0. Default 0.01.
        p: Of the norm that bounds the perturbation, 2 (the default) or inf. Cost with inf: two
            launches and 36 bytes per element with SGD and momentum; ``norm`` has to be
            ``"global"``, and ``metrics`` has no ``grad_norm`` unless something else needs it.
        form: Of :math:`T`, ``"elementwise"`` (the default) or ``"layerwise"``. Cost of the latter
            with ``p=2``, of what is perturbed: 48 bytes with SGD and momentum, and 8 by torch.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for
            another ``p`` or ``form``, and for ``adaptive=True`` in a group with the layer-wise one.

    Example:
        >>> optimizer = fastsam.ASAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Kwon, Kim, Park and Choi, "ASAM: adaptive sharpness-aware minimization for
    scale-invariant learning of deep neural networks", ICML 2021.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.5,
        eta: float = 0.01,
        p: float = 2,
        form: str = "elementwise",
        **kwargs: Any,
    ):
        self._p, self._form = as_float(p), Choice(("elementwise", "layerwise"))("form", form)
        if self._p not in (2.0, math.inf):
            raise refuse("p", "2 or inf", p)
        self.ascent = FORMS[self._form, self._p]
        layerwise = self._form == "layerwise"
        if layerwise:
            kwargs["own"] = {"layerwise": True}
        super().__init__(params, base_optimizer, rho, adaptive=not layerwise, eta=eta, **kwargs)

    @property
    def p(self) -> float:
        """Which norm bounds the perturbation, 2 or inf."""
        p: float = vars(self).get("_p", 2.0)  # one that was pickled before there was another
        return p

    @property
    def form(self) -> str:
        """Which scale it has, ``"elementwise"`` or ``"layerwise"``."""
        form: str = vars(self).get("_form", "elementwise")
        return form


class UnifiedSAM(SharpnessAwareOptimizer):
    r"""Unified SAM: between the normalised ascent of SAM and the plain one of USAM.

    .. math:: e = \rho \left(1 - \lambda_t + \frac{\lambda_t}{\|g\| + 10^{-12}}\right) g

    ``lam = 1`` is SAM and ``lam = 0`` is USAM, bit for bit. With ``adaptive`` groups :math:`g`
    becomes :math:`T^2 g` and its norm :math:`\|T g\|`, as in :class:`SAM`.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Radius, at least 0. Default 0.05.
        lam: A number in [0, 1]; ``"1/t"`` (from SAM to USAM) or ``"1-1/t"`` (from USAM to SAM); or
            a callable that takes :math:`t` and gives a number in [0, 1]. :math:`t` counts steps
            from 1, is saved with the state, and is in ``kept["t"]``. Default 0.5.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`; ValueError also for a
            ``lam`` that is out of range or gives a value that is.

    Example:
        >>> optimizer = fastsam.UnifiedSAM(model.parameters(), torch.optim.SGD, lam="1/t", lr=0.1)
        >>> loss = optimizer.step(closure)  # the first step is SAM's, as t = 1

    Reference: Oikonomou and Loizou, "Sharpness-aware minimization: general analysis and improved
    rates", ICLR 2025, arXiv 2503.02225.
    """

    lam: Any = setting(unified_lam)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        lam: float | str | Callable[[int], float] = 0.5,
        **kwargs: Any,
    ):
        self.lam = lam
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    @property
    def _is_static(self) -> bool:
        return super()._is_static and not (isinstance(self.lam, str) or callable(self.lam))

    def _next_lam(self) -> float:
        t: int = self.kept["t"]
        if self.lam == "1/t":
            return 1 / t
        if self.lam == "1-1/t":
            return 1 - 1 / t
        return check_lam(self.lam(t)) if callable(self.lam) else self.lam

    @property
    def metrics(self) -> dict[str, Tensor]:
        values = dict(super().metrics)
        if values and self._last is not None:
            values["lam"] = values["rho"].new_full((), self._last.lam)
        return values


class USAM(UnifiedSAM):
    r"""Unnormalised SAM: the perturbation is proportional to the gradient.

    .. math:: e = \rho\, g

    :class:`UnifiedSAM` with ``lam=0``. A gradient whose norm is not finite perturbs nothing.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Ascent step size, at least 0. Default 0.05.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`.

    Example:
        >>> optimizer = fastsam.USAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Andriushchenko and Flammarion, "Towards understanding sharpness-aware
    minimization", ICML 2022.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho, lam=0.0, **kwargs)


class SSAM(UnifiedSAM):
    r"""Stable SAM: the second gradient is rescaled to the norm of the first.

    .. math:: u = \gamma\, \tilde g, \qquad \gamma = \frac{\|g\|}{\|\tilde g\| + 10^{-12}}

    One :math:`\gamma` for all groups. In adaptive groups both norms carry :math:`T`, the second
    with the perturbed weights: :math:`\gamma = \|T(w) g\| / \|T(w + e)\, \tilde g\|`. The same
    descent rule is ``renormalize=True`` on every other class; ``lam=0`` gives it to USAM, as in
    the paper's runs.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Radius, at least 0. Default 0.05.
        lam: As in :class:`UnifiedSAM`. Default 1: SAM's ascent.
        adaptive: ASAM's element-wise scale. Default False.
        **kwargs: The other arguments of :class:`SAM`, and the base optimizer's.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: As :class:`SAM`.

    Example:
        >>> optimizer = fastsam.SSAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> loss = optimizer.step(closure)

    Reference: Tan, Zhang, Liu and Gong, "Stabilizing sharpness-aware minimization through a simple
    renormalization strategy", JMLR 2025, arXiv 2401.07250.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | Tensor = 0.05,
        lam: float | str | Callable[[int], float] = 1.0,
        adaptive: bool = False,
        **kwargs: Any,
    ):
        kwargs.setdefault("renormalize", True)
        super().__init__(params, base_optimizer, rho, lam, adaptive=adaptive, **kwargs)
