"""LETS: learns the radius from the gap between validation and training loss."""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastsam.bases import find_base
from fastsam.explicit import uncompiled
from fastsam.kernels import table
from fastsam.optimizer import SharpnessAwareOptimizer
from fastsam.step.arguments import Choice, Integer, shown
from fastsam.step.capture import refuse
from fastsam.step.checkpoint import SharedState, all_or_nothing
from fastsam.step.closures import check_closure, refuse_split
from fastsam.step.interrupts import uninterrupted
from fastsam.step.recording import Recording
from fastsam.step.rule import Base
from fastsam.step.settings import complete_settings, setting
from fastsam.step.spec import sign_of

from .lets_checks import check_learned, check_lets, check_loss, check_radius


class LETS(SharedState):
    r"""Learning to sharpen: any optimizer of the family, with a radius that is learned.

    The radius minimises :math:`\tfrac12 (L_{val}(w^*(\rho)) - L_{tr}(w^*(\rho)))^2`. After a step
    of the wrapped optimizer to :math:`w^+`, both losses and their gradients are computed there:

    .. math:: h = -lr\; a\, \langle \delta, H \hat e \rangle, \qquad
              a = L_{val}(w^+) - L_{tr}(w^+), \quad
              \delta = \nabla L_{val}(w^+) - \nabla L_{tr}(w^+), \quad e = \rho\, \hat e

    with :math:`H` the Hessian at :math:`w + e`, approximated by ``hessian``:

    - ``"diag"``, the paper's diagonal: :math:`H \hat e \approx \tilde g^2 \hat e`, element-wise;
    - ``"difference"``: :math:`H \hat e \approx (\tilde g - g) / \rho`, at no extra pass.

    Training small networks, ``"difference"`` was within 3 % of the exact hypergradient at the
    median with SAM, and had its sign in 99 % of the steps; ``"diag"`` was some 50 times too small,
    with the wrong sign in a fifth of the steps (``tests/methods/test_lets.py`` prints such
    figures). Adam hides the scale, not the sign.

    A scalar optimizer then moves :math:`\nu = \log \rho` against :math:`\rho h`, so that
    :math:`\rho` stays positive. The radius of the first group is learned, and groups with different
    radii keep their ratios.

    For :math:`h` the update is taken as :math:`w^+ = w - lr\, c\, \tilde g`, whatever else the base
    does. :math:`c` is the factor of :math:`\tilde g` by renormalisation, clipping or SAMAR, and is
    treated as a constant. This structure is the paper's; we are less sure of the diagonal form and
    of the parametrisation by :math:`\nu`.

    Cost: two forward and backward passes and one reduction over the four gradients (16 bytes per
    element in float32; with ``"diag"`` 4 more for the weights in adaptive groups, and for each of
    the ascent's state tensors) on every ``interval``-th step; other steps are those of the wrapped
    optimizer. The gradients of both its passes are held until then, and its copy of the weights if
    it is needed. The extra passes run at unperturbed weights, in the model's present mode and
    inside the wrapped optimizer's ``descent_context``; BatchNorm counts them too, unless that is
    ``frozen_batch_norm``. In distributed training the closures have to return losses averaged over
    the ranks, or the radii drift apart.

    Args:
        optimizer: A :class:`SAM`, :class:`ASAM`, :class:`UnifiedSAM` or another optimizer of
            fastsam, with a radius above 0. Do not call its own ``step``.
        rho_lr: Learning rate of the scalar optimizer, at least 0. Default 1e-2: with Adam, a change
            of about 1 % of the radius at a time.
        hessian: ``"diag"`` (default) or ``"difference"``. In a study on three data sets neither led
            to SAM's best radius, and the second was better on none of them
            (``bench/results/studies/lets.txt``).
        interval: Steps from one update of the radius to the next, at least 1. Default 1.
        rho_optimizer: Optimizer class for :math:`\nu`. Default :class:`torch.optim.Adam`.
        **rho_kwargs: Its other arguments.

    Raises:
        TypeError: If ``optimizer`` is not one of fastsam's, or ``rho_optimizer`` not a class of
            optimizers that step without a closure.
        ValueError: If another argument is out of range; if the first group's radius is 0, or a
            group has no ``lr``; if ``optimizer`` has master weights, which keep no old ones.

    Example:
        >>> sam = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> optimizer = fastsam.LETS(sam, hessian="difference")
        >>> def val_closure():  # the same with a batch that is not trained on
        ...     loss = loss_fn(model(val_inputs), val_labels)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure, val_closure)

    Reference: Wang, Jiang, Fu and Zhang, "Enhancing sharpness-aware minimization by learning
    perturbation radius", ECML-PKDD 2024, arXiv 2408.08222.
    """

    hessian: str = setting(Choice(("diag", "difference")))
    interval: int = setting(Integer(1))

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        rho_lr: float = 1e-2,
        hessian: str = "diag",
        interval: int = 1,
        rho_optimizer: type[Optimizer] = torch.optim.Adam,
        **rho_kwargs: Any,
    ):
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            hint = ""
            if isinstance(optimizer, Optimizer):
                hint = "; make one of it with fastsam.SAM.from_optimizer(optimizer)"
            raise TypeError(
                f"optimizer must be one of fastsam's with a radius, got {shown(optimizer)}{hint}"
            )
        if optimizer.master_weights:
            raise ValueError("optimizer must have master_weights=False to learn its radius")
        if optimizer.ascent_steps != 1:
            raise ValueError(
                f"optimizer must have ascent_steps=1 to learn its radius, got "
                f"{optimizer.ascent_steps}"
            )
        self.hessian = hessian
        self.interval = interval
        rho_lr = check_lets(rho_lr, rho_optimizer, optimizer.param_groups)
        self.optimizer = optimizer
        self._owner = SimpleNamespace()  # torch's constructor makes groups and state of its own
        super().__init__(optimizer.param_groups, {})
        self._share()
        self._begun = 0, 0, False
        self._measured: dict[str, Tensor] = {}
        params = (p for group in self.param_groups for p in group["params"])
        device = next((p.device for p in params), torch.device("cpu"))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._nu = torch.zeros((), dtype=dtype, device=device)
        self._ratios: list[float] = []
        self._adopt_rho()
        if device.type == "cuda" and "capturable" in inspect.signature(rho_optimizer).parameters:
            rho_kwargs.setdefault("capturable", True)  # its step count is on the device then
        arguments: dict[str, Any] = dict(lr=rho_lr, **rho_kwargs)
        self.rho_optimizer = rho_optimizer([self._nu], **arguments)
        self._write_rho()  # last, so that arguments it refuses leave the wrapped optimizer alone

    @classmethod
    def from_optimizer(cls, optimizer: Optimizer, *args: Any, **kwargs: Any) -> "LETS":
        """There is none: what is wrapped is one of fastsam's, which has it.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{cls.__name__} wraps one of fastsam's optimizers: make "
            f"{cls.__name__}(SAM.from_optimizer(optimizer)), with rho and the like as arguments of "
            "SAM.from_optimizer"
        )

    # --- the step ---

    @uncompiled
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        val_closure: Callable[[], Any] | None = None,
    ) -> Any:
        """Take one step of the wrapped optimizer, and one of the radius where it is due.

        Args:
            closure: Computes the training loss, calls ``backward`` and returns the loss; called
                twice for the step and once, at the updated weights, for the radius.
            val_closure: The same for the loss of a validation batch, preferably a new one in every
                step; called once when the radius is updated. Gradients are zeroed before every
                call.

        Returns:
            What the first call of ``closure`` returned.

        Raises:
            RuntimeError: Without one of the closures. An exception in the step leaves weights,
                state and radius as they were. After a later exception, as in ``val_closure``, the
                step is complete and only the radius is not updated. Both propagate.
        """
        if closure is None and val_closure is None and self.optimizer.creates_state_only:
            with torch.no_grad():
                self.optimizer.create_state()
            return None
        if closure is None or val_closure is None:
            missing = "closure" if closure is None else "val_closure"
            raise RuntimeError(
                f"LETS.step needs a closure and a val_closure, each of which computes a loss, "
                f"calls backward and returns the loss; {missing} is missing"
            )
        for one in (closure, val_closure):
            check_closure("LETS", one)
        refuse_split("LETS.step", (closure, val_closure))
        if table.is_capturing(self._nu.device):
            raise refuse("LETS", "it counts its steps on the host")
        self._follow_groups()
        perturbs = self.optimizer.perturbs_next
        due = perturbs and (self._steps + 1) % self.interval == 0
        self._begun = self._steps, self.optimizer.kept["t"], perturbs
        with self.optimizer.recording(self.hessian if due else None) as seen:
            loss = self.optimizer.step(closure)
            self._steps = self._steps  # settled
            if seen is not None and seen.happened:
                self._update_rho(seen, closure, val_closure)
        return loss

    @property
    def _steps(self) -> int:
        """How many sharpness-aware steps have been taken.

        The wrapped optimizer says whether the last one that began is complete: an exception may
        arrive just after it, before anything could be counted here.
        """
        before, t, perturbs = self._begun
        return before + (perturbs and self.optimizer.kept["t"] > t)

    @_steps.setter
    def _steps(self, steps: int) -> None:
        self._begun = steps, 0, False

    @torch.no_grad()
    def _update_rho(
        self, seen: Recording, closure: Callable[[], Any], val_closure: Callable[[], Any]
    ) -> None:
        found = seen.losses(closure, val_closure)
        losses = [
            check_loss(name, loss, like=self._nu)
            for name, loss in zip(("closure", "val_closure"), found, strict=True)
        ]
        gap = losses[1] - losses[0]
        total, measured = (x.to(self._nu.device) for x in seen.slope())
        slope = -gap * total.to(self._nu)  # rho h, the derivative by nu
        measured &= slope.isfinite()
        with uninterrupted():
            sign = sign_of(self.param_groups[0])  # the gap is that of what is minimised
            self._measured = {
                "hypergradient": slope / self._nu.exp(), "validation_gap": sign * gap
            }  # fmt: skip
            self._descend(slope, measured)
            self._write_rho()

    def _descend(self, slope: Tensor, measured: Tensor) -> None:
        """A step of the scalar optimizer.

        None where the device says that nothing was measured, or the radius would leave its range.
        """
        old = {key: value.clone() for key, value in self._tensors().items()}
        self._nu.grad = torch.where(measured, slope, 0.0)
        self.rho_optimizer.step()
        self._nu.grad = None
        rho = self._nu.exp()
        taken = measured & rho.isfinite() & (rho > 0)
        for key, value in self._tensors().items():
            # what this step has made of nothing: with a slope of 0 all but the count is as it began
            before = old.get(key, torch.zeros_like(value) if key == "step" else value)
            if value.device == taken.device:  # else the host would have to ask the device
                value.copy_(torch.where(taken, value, before))

    def _tensors(self) -> dict[str, Tensor]:
        """What a step of the scalar optimizer changes."""
        state = self.rho_optimizer.state.get(self._nu, {})
        return {"": self._nu} | {k: v for k, v in state.items() if isinstance(v, Tensor)}

    @property
    def perturbs_next(self) -> bool:
        """Whether the wrapped optimizer's next step is sharpness-aware."""
        return self.optimizer.perturbs_next

    @property
    def between_passes(self) -> bool:
        """Whether ``second_step`` is due: the model holds perturbed weights."""
        return self.optimizer.between_passes

    def unperturbed(self) -> AbstractContextManager[None]:
        """Have the weights ``w`` in the model inside the block, as the wrapped optimizer does."""
        return self.optimizer.unperturbed()

    def train(self) -> None:
        """As the wrapped optimizer's: schedule-free bases have a mode for training."""
        self.optimizer.train()

    def eval(self) -> None:
        """The other mode; raises as the wrapped optimizer's."""
        self.optimizer.eval()

    # --- the radius ---

    def _adopt_rho(self) -> None:
        """Start from the radii that the groups have."""
        radii = [group["rho"] for group in self.param_groups]
        first = float(radii[0])
        self._nu.fill_(first).log_()
        self._ratios = [float(rho) / first for rho in radii]

    def _follow_groups(self) -> None:
        """Take in groups that were added, here or to the wrapped optimizer."""
        new = self.param_groups[len(self._ratios) :]
        self._ratios += [float(group["rho"] / self._nu.exp()) for group in new]

    def _write_rho(self) -> None:
        for group, ratio in zip(self.param_groups, self._ratios, strict=True):
            group["rho"] = ratio * self._nu.exp()

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """The wrapped optimizer's, ``rho`` being the one of the next step; and of the last update
        of the radius ``hypergradient``, :math:`h`, and ``validation_gap``, :math:`a`."""
        values = dict(self.optimizer.metrics)
        return values | {name: value.clone() for name, value in self._measured.items()}

    # --- what torch.optim users rely on ---

    def _share(self) -> None:
        self._owner = self.optimizer
        self.defaults = self.optimizer.defaults
        for call in ("state_dict", "load_state_dict"):  # which the wrapped optimizer answers
            for when in ("pre", "post"):
                name = f"_optimizer_{call}_{when}_hooks"
                setattr(self, name, getattr(self.optimizer, name))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer; its radius keeps its ratio, too."""
        if self._owner is not self.optimizer:  # torch, in the constructor
            super().add_param_group(param_group)
            return
        with uninterrupted():
            self.optimizer.add_param_group(param_group)
            self._follow_groups()
            self._write_rho()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, and under ``"lets"`` what the radius needs."""
        own = {
            "log_rho": self._nu.detach(),
            "ratios": list(self._ratios),
            "steps": self._steps,
            "rho_optimizer": type(self.rho_optimizer).__name__,
            "optimizer": self.rho_optimizer.state_dict(),
        }
        return {**self.optimizer.state_dict(), "lets": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class; or of the wrapped optimizer, whose radius then counts.

        Raises:
            RuntimeError, ValueError: As the wrapped optimizer; ValueError also where the state
                dict is the wrapped optimizer's and the first group's radius 0, or what it has
                for the radius was made by another ``rho_optimizer``, is missing or out of range.
                Nothing has changed then.
        """
        own = state_dict.get("lets")
        if own is not None:
            check_learned(own, len(self.param_groups), self.rho_optimizer, self._rho_rule)
        else:
            check_radius(state_dict, self._nu.exp())
        with uninterrupted():
            nu = self._nu.clone()
            holders = self, self.rho_optimizer, self.optimizer, self.optimizer.base_optimizer
            try:
                with all_or_nothing(holders, self.optimizer.kept):
                    self._load(state_dict, own)
            except BaseException:
                self._nu.copy_(nu)
                raise

    def _load(self, state_dict: dict[str, Any], own: dict[str, Any] | None) -> None:
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "lets"})
        self._share()
        if own is None:
            self._adopt_rho()
        else:
            saved = copy.deepcopy(own["optimizer"])
            for new, old in zip(
                saved["param_groups"], self.rho_optimizer.param_groups, strict=True
            ):
                if "capturable" in old:  # what serves the device here, not that of the saved run
                    new["capturable"] = old["capturable"]
            self.rho_optimizer.load_state_dict(saved)
            self._ratios = [float(ratio) for ratio in own["ratios"]]
            self._steps = int(own["steps"])
            self._nu.fill_(float(own["log_rho"]))
        self._write_rho()

    @property
    def _rho_rule(self) -> Base | None:
        """The declaration of the scalar optimizer, which says what state it has."""
        return find_base(type(self.rho_optimizer))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        complete_settings(self)
        if "_begun" not in vars(self):  # as in older pickles
            self._steps = vars(self).pop("_steps", 0)
        self._share()
        # as in torch's constructor: a copy would warn about "capturable", which is meant
        self.rho_optimizer._warned_capturable_if_run_uncaptured = True
