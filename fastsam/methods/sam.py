"""SAM and its closest relatives: one ascent rule with two switches, and SSAM's descent rule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.arithmetic import EPS, gives_direction, where
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import FLAG, Choice, Context, Policy, as_float, refuse, unified_lam
from fastsam.step.checks import check_lam
from fastsam.step.rule import Ascent, Columns, Group
from fastsam.step.settings import setting
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
            may have their own ``rho``, ``adaptive`` and ``eta``. A group with ``perturb=False`` is
            updated but not perturbed, and does not count in the norm. The first pass neither reads
            nor writes it, and it has no state of the ascent. ``renormalize`` refuses it.
        base_optimizer: Optimizer class for the update. :class:`torch.optim.SGD`,
            :class:`~torch.optim.Adam`, :class:`~torch.optim.AdamW`, :class:`~torch.optim.Adagrad`
            and :class:`AdaGradNorm` run fused with the rest of the step. For any other class
            fastsam calls its ``step``, with the final gradient in ``.grad``. A group may have
            another class under the key ``base_optimizer``, with the arguments of that class as its
            other keys. The class given here, with ``base_kwargs``, is for groups without that key.
        rho: Radius of the perturbation, at least 0; a 0-dim tensor stays on its device. Default
            0.05. A group whose ``rho`` is 0 still counts in the norm, so the others are perturbed
            by less than their ``rho``; use ``perturb=False`` to avoid that. If it is 0 in every
            group, ``step`` is a step of the base optimizer and calls the closure once.
        adaptive: ASAM's element-wise scale. Default False.
        eta: Added to ``|w|`` in the adaptive scale, at least 0. Default 0.
        renormalize: SSAM's rescaling of the second gradient, see :class:`SSAM`. Default False.
        max_grad_norm: Clip the final gradient to this global norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does: a norm that is NaN makes every weight NaN,
            an infinite one those whose gradient is (``skip_nonfinite`` prevents both). Default
            None.
        skip_nonfinite: If the norm of the second gradient is not finite, restore the weights and do
            not change the state. Default False. With a base optimizer that is not fused, this
            synchronises with the device once a step.
        norm: What the norm of the perturbation is taken over: ``"global"``, all elements;
            ``"group"``, each parameter group, as for the members of an ensemble; or ``"layer"``,
            each parameter. Each of these is then perturbed by its own ``rho``, and not at all if
            its norm is not finite. With ``"layer"`` the whole perturbation has a norm of about
            ``rho`` times the root of the number of parameters, so ``rho`` has to be smaller. Cost:
            one more launch, which reads no gradients. ``metrics["grad_norm"]`` and ``renormalize``
            stay global. Default ``"global"``.
        perturb_every, start, stop: Steps are counted from 0. Steps ``start``,
            ``start + perturb_every`` ... below ``stop`` are sharpness-aware. The others are steps
            of the base optimizer, with one pass. The count is saved with the state; ``kept["t"]``
            is one more. Default 1, 0 and None: all steps.
        perturb_when: A function ``(step, metrics)`` that decides whether a step that is due by
            these three is sharpness-aware. ``step`` counts from 0. ``metrics`` has ``"lr"`` and
            ``"rho"`` of the first group if they are numbers, and nothing that the host would have
            to wait for. All ranks have to decide alike. Default None: every step that is due.
        amplify: Let a step with a perturbation make up for those without, as in factor-SAM. Its
            authors' aim is a best ``rho`` that does not depend on :math:`k`, which is
            ``perturb_every``:

            .. math:: u = g + \alpha k\, (\tilde g - g)

            True is :math:`\alpha = 1`: :math:`k` steps then have as much of the sharpness's
            gradient as :math:`k` steps of SAM, and with :math:`k = 1` it is SAM. A number above 0
            is :math:`\alpha`. The cost is that of :class:`WSAM` with ``decouple=False``: 44 bytes
            instead of 40. Classes whose update already combines both gradients refuse it, and so
            does ``ascent_steps`` above 1. If the norm of the first gradient is not finite, or a
            parameter has no first gradient, :math:`u = \tilde g`. Default False.
        master_weights: Keep a float32 copy of every float16 and bfloat16 parameter, perturb and
            update the copy, and round the result into the parameter. The copy is in the state,
            under ``master_weight``. If the parameter has been written to since, the copy follows.
            The base's state is then in float32, and nothing is copied between the passes. With SGD
            and momentum a step moves 32 bytes per element, where plain bfloat16 moves 20. Needs a
            fused base. Default False.
        rounding: ``"nearest"`` (the default), or ``"stochastic"``: when ``w + e`` and the updated
            weight are stored, bfloat16 parameters are rounded up or down at random, without bias.
            The base's state, and updates by a base that is not fused, are rounded to nearest.
        seed: Seed of the random bits, in [0, 2^32). They depend only on the seed, the step, the
            pass, the place of the parameter in the optimizer and the place of the element in the
            parameter. Default 0.
        ascent_steps: Number :math:`k` of first passes, at least 1. Above 1 each of them moves the
            weights by a share of the radius, along the gradient at the point that the one before
            has reached. The update uses the gradient at the last point:

            .. math:: w_{j+1} = w_j + \frac{\rho}{k}\,
                      \frac{T_j^2 g_j}{\|T_j g_j\| + 10^{-12}}, \qquad
                      g_j = \nabla L(w_j), \quad w_0 = w, \quad \tilde g = \nabla L(w_k)

            with :math:`T_j` that of :math:`w_j`. For :math:`T = 1` the last point is within
            :math:`\rho` of :math:`w`. The closure is called :math:`k + 1` times. There is still one
            copy of the weights, and each further first pass moves 16 bytes per element in float32
            (20 if adaptive) in two launches. ``grad_norm`` and ``renormalize`` use :math:`\|g_0\|`.
            A gradient :math:`g_j` that is not finite moves nothing. In ``step``, passes between the
            first and the last are inside both contexts. Not with state in the ascent
            (:class:`VaSSO`, :class:`LightSAM`), :class:`SAMAR`, :class:`LETS`, ``master_weights``
            or stochastic rounding. Default 1.
        repeat_random: Let all calls of the closure draw the same random numbers (dropout's masks,
            augmentation on the device). For that it resets the states of torch's default
            generators: the CPU's and those of the devices that hold parameters. Afterwards they are
            in the state in which the first call left them, also if the second call failed. It sets
            no seed and waits for no device. Other generators, Python's and numpy's are not reset.
            Refused in a CUDA graph. Default False: new numbers.
        ascent_context, descent_context: Functions without arguments that return a context manager.
            ``step`` enters it for its first or second call of the closure, as in
            ``descent_context=lambda: fastsam.frozen_batch_norm(model)``. Default None.
        set_to_none: How a step zeroes gradients, as in ``zero_grad``. Default True. With False they
            keep their memory, for flat buffers of which every ``.grad`` is a part. A parameter that
            the loss does not depend on then has a gradient of zeros and is updated with it.
        scratch: Whether a parameter may point to scratch memory between the passes. The scratch
            memory holds ``w + e``; ``w`` stays where it was and is not copied. On the triton
            backend that saves one store: 36 bytes per element with SGD and momentum, 44 with AdamW.
            True: every parameter whose memory no other tensor uses (it is no view or shard, and no
            view of it exists), if its base is fused and it has no master weights. All others are
            copied and perturbed in place, and with False all are. With True a CUDA graph of a part
            of the step, as by :func:`torch.cuda.make_graphed_callables`, would use the address
            that it has recorded; if one is known to have been captured, parameters stay in place,
            as they do in ``fastsam.graphed``. A capture by hand refuses True. A view taken between
            the passes keeps following its parameter. Code that has kept only the address, as other
            libraries may, reads ``w`` there. The scratch memory, as large as the parameters, is
            kept from step to step. The host needs some microseconds more per parameter and step.
            ``"auto"``: on a CPU, with torch, parameters of 16,384 elements and more; with triton
            none, as no GPU has been timed yet. Default ``"auto"``.
        backend: ``"triton"``, ``"torch"``, ``"reference"`` or ``"auto"`` (the default: triton on a
            GPU that it supports, else torch).
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

    To first order the loss rises most along this :math:`e`, among all with
    :math:`\|T^{-1} e\|_p \le \rho` for :math:`p = 2`. With ``p=inf`` it is

    .. math:: e = \rho\, T \operatorname{sign}(g), \qquad \operatorname{sign}(0) = 0

    Each weight is then moved by the share :math:`\rho` of its size, and no norm is taken, so
    ``rho`` has to be far smaller. An element whose gradient is not finite is not perturbed.

    With ``form="layerwise"`` every element of a parameter :math:`w_l` has the scale
    :math:`T = \|w_l\|\,(1 + \eta)`, with either ``p``. The group key ``layerwise=False`` sets
    :math:`T = 1`, as ``adaptive=False`` does for the element-wise form. This form is meant for few
    weights, as those of :func:`normalization_groups`: torch computes the norms (of shards over all
    ranks), and the scale is stored for every element. :class:`LETS` needs ``hessian="difference"``
    with it.

    :class:`SAM` with ``adaptive=True`` and the paper's defaults. The authors take :math:`T = 1` for
    every parameter whose name lacks "weight": put those into a group with ``adaptive=False``.
    ``SAM(..., adaptive=True)``, with ``eta=0`` on every parameter, is the other definition in use.

    Args:
        params, base_optimizer: As in :class:`SAM`.
        rho: Radius, at least 0. Default 0.5: ten times SAM's, since :math:`T` is small.
        eta: Added to ``|w|``, at least 0. Default 0.01.
        p: The norm that bounds the perturbation, 2 (the default) or inf. Cost with inf: two
            launches and 36 bytes per element with SGD and momentum. ``norm`` has to be ``"global"``
            then, and ``metrics`` has no ``grad_norm`` unless something else needs it.
        form: The form of :math:`T`, ``"elementwise"`` (the default) or ``"layerwise"``. Cost of the
            latter with ``p=2``, per perturbed element: 48 bytes with SGD and momentum, and 8 by
            torch.
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

    All groups have the same :math:`\gamma`. In adaptive groups both norms include :math:`T`, the
    second at the perturbed weights: :math:`\gamma = \|T(w) g\| / \|T(w + e)\, \tilde g\|`. Other
    classes have the same descent rule with ``renormalize=True``. ``lam=0`` is USAM with this rule,
    as in the paper's runs.

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
