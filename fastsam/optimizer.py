"""The two-pass protocol that every method shares: groups, state, and the contract of a step."""

import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer, ParamsT

from fastsam.kernels.layout import Scalar

from . import backends
from .checks import check_base, check_group, check_max_grad_norm, check_tensors
from .rules import BASES, Batch, Step


class SharpnessAwareOptimizer(Optimizer):
    """Base class of fastsam's optimizers; use one of its subclasses.

    A step is two passes. The first gradient ``g`` decides the perturbation: ``w <- w + e``. The
    second, ``g~``, is taken there; then the weights are restored bit for bit and the base
    optimizer takes its step with it. Either give :meth:`step` a closure, or alternate
    :meth:`first_step` and :meth:`second_step`. Between the two passes ``model.state_dict()``
    holds perturbed weights; ``state_dict()`` of the optimizer is allowed there and complete.

    Where the second gradient of a parameter is missing it is only restored; where its first is
    missing it is updated but not perturbed. A first gradient whose norm is zero or not finite
    perturbs nothing.
    """

    #: Group keys that belong to fastsam, not to the base optimizer.
    _own_keys = ("rho", "adaptive", "eta")

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        *,
        rho: float | Tensor,
        adaptive: bool = False,
        eta: float = 0.0,
        renormalize: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        **base_kwargs: Any,
    ):
        check_base(base_optimizer, not_below=SharpnessAwareOptimizer)
        check_max_grad_norm(max_grad_norm)
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        check_group(own)
        self.renormalize = renormalize
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.backend = backend
        super().__init__(params, own)
        self._check_groups()
        # The base validates its own arguments and completes the groups, which it then shares.
        # A fused base is never stepped; its mathematics runs in the update pass.
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self._base = BASES.get(base_optimizer)
        self.defaults.update(self.base_optimizer.defaults)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        if self._base is not None:
            for group in self.param_groups:
                if group.get("differentiable"):
                    raise ValueError("differentiable must be False with a fused base optimizer")
        self._start()
        params_ = [p for group in self.param_groups for p in group["params"]]
        backends.resolve(backend, params_[0].device if params_ else torch.device("cpu"))
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in params_):
            warnings.warn(
                "some parameters are float16 or bfloat16: a perturbation of norm rho is mostly "
                "below their resolution and is rounded away; keep parameters in float32 and use "
                "torch.autocast instead",
                stacklevel=3,
            )

    #: What ``_start`` sets.
    _transient = ("_backup", "_between_passes", "_inside_step", "_perturbs", "_lam", "_scalars",
                  "_backends")  # fmt: skip

    def _start(self) -> None:
        """Set what lives only as long as this process: nothing here is saved."""
        self._backup: backends.Backup | None = None
        self._between_passes = False
        self._inside_step = False
        self._scalars: Tensor | None = None
        self._perturbs = True  # whether the present step, or the last, has two passes
        self._lam = 1.0
        self._backends: dict[str, backends.Backend] = {}

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one sharpness-aware step.

        Args:
            closure: Computes the loss, calls ``backward`` and returns the loss (the contract of
                ``torch.optim.LBFGS``). It is called twice, or once where every ``rho`` is 0;
                gradients are zeroed before each call.

        Returns:
            What the first call returned: the loss at ``w``.

        Raises:
            RuntimeError: Without a closure; between ``first_step`` and ``second_step``; for
                gradients that are sparse or complex. An exception in the closure leaves weights
                and state as they were before the step, and propagates.
        """
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__}.step needs a closure that computes the loss and calls "
                "backward; without one, alternate first_step and second_step"
            )
        self._expect("first_step")
        self._check_groups()
        closure = torch.enable_grad()(closure)
        self._inside_step = True
        try:
            self.zero_grad()
            loss = closure()
            if all(_is_zero(group["rho"]) for group in self.param_groups):
                self._perturbs = False
                self._descend(self._collect())
                return loss
            self.first_step(zero_grad=True)
            try:
                closure()
            except BaseException:
                self.restore()
                raise
            self.second_step()
        finally:
            self._inside_step = False
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights along the present gradients: ``w <- w + e``.

        Args:
            zero_grad: Zero the gradients afterwards.

        Raises:
            RuntimeError: If ``second_step`` is due; if a gradient is sparse or complex, or the
                parameters lie on several devices. Nothing has changed then.
            ValueError: If a group's hyper-parameter has been set out of range.
        """
        self._expect("first_step")
        self._run_hooks("pre")
        self._check_groups()
        batch = self._collect()
        self._perturbs = True
        self._lam = self._next_lam()
        scalars = self._scalars_for(batch)
        if batch.params:
            self._backup = self._backend_for(batch).ascend(batch, self._describe(), scalars)
        else:
            scalars[Scalar.GRAD_NORM].zero_()
        self._between_passes = True
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them with the gradients taken at ``w + e``.

        Args:
            zero_grad: Zero the gradients afterwards.

        Raises:
            RuntimeError: If ``first_step`` is due; if a gradient is sparse or complex. The weights
                have been restored then, and the step is over without an update.
        """
        self._expect("second_step")
        try:
            self._descend(self._collect())
        except BaseException:
            self.restore()
            raise
        self._opt_called = True  # what LR schedulers look at, to warn where no step came first
        if zero_grad:
            self.zero_grad()
        self._run_hooks("post")

    @torch.no_grad()
    def restore(self) -> None:
        """Undo ``first_step``: for a loop whose second pass failed. Does nothing otherwise."""
        if self._backup is not None:
            self._backup.restore()
        self._backup = None
        self._between_passes = False

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """What the last step measured, as 0-dim tensors on the parameters' device.

        ``grad_norm`` is the norm that the perturbation was divided by (of ``T g`` in adaptive
        groups) and ``rho`` the first group's radius. ``perturbed_grad_norm``, the second
        gradient's norm, is there where the step needs it; with ``renormalize`` so is
        ``renormalization`` (gamma, and both norms are then of ``T g``), with ``skip_nonfinite``
        so is ``skipped``, the number of steps skipped so far. Reading a value synchronises with
        the device; making the mapping does not. Empty before the first step.
        """
        if self._scalars is None:
            return {}
        step = self._describe()
        names = {"grad_norm": Scalar.GRAD_NORM} if self._perturbs else {}
        if step.needs_descent_norm:
            names["perturbed_grad_norm"] = Scalar.PERTURBED_GRAD_NORM
        if step.renormalize:
            names["renormalization"] = Scalar.RENORMALIZATION
        if self.skip_nonfinite:
            names["skipped"] = Scalar.SKIPPED
        values = {name: self._scalars[slot].clone() for name, slot in names.items()}
        rho = self.param_groups[0]["rho"]
        like = self._scalars[0]
        values["rho"] = rho.to(like) if isinstance(rho, Tensor) else torch.full_like(like, rho)
        return values

    # --- what subclasses may refine ---

    def _next_lam(self) -> float:
        """Unified SAM's weight of normalisation in the step that begins; 1 is SAM."""
        return 1.0

    def _finish_step(self) -> None:
        """Called when a step has been completed."""

    # --- parts of the step ---

    def _expect(self, call: str) -> None:
        due = "second_step" if self._between_passes else "first_step"
        if call != due:
            raise RuntimeError(
                f"expected {due}, which has to come before another {call}: first_step and "
                "second_step alternate"
            )

    def _check_groups(self) -> None:
        for group in self.param_groups:
            check_group(group)

    def _describe(self) -> Step:
        return Step(
            groups=self.param_groups,
            base=self._base,
            lam=self._lam,
            renormalize=self.renormalize and self._perturbs,
            max_grad_norm=self.max_grad_norm,
            skip_nonfinite=self.skip_nonfinite,
        )

    def _collect(self) -> Batch:
        """The parameters that have a gradient, each once, checked."""
        batch = Batch([], [], [], [], [])
        seen: set[Tensor] = set()
        for i, group in enumerate(self.param_groups):
            for param in group["params"]:
                grad = param.grad
                if grad is None or param in seen:
                    continue
                seen.add(param)
                check_tensors(param, grad, batch.params, type(self).__name__)
                batch.params.append(param)
                batch.grads.append(grad)
                batch.groups.append(i)
        return batch

    def _backend_for(self, batch: Batch) -> backends.Backend:
        name = backends.resolve(self.backend, batch.params[0].device)
        if name not in self._backends:
            self._backends[name] = backends.create(name)
        return self._backends[name]

    def _scalars_for(self, batch: Batch) -> Tensor:
        """The device scalars; AdaGradNorm's accumulator in its group is a view of them."""
        if batch.params:
            device = batch.params[0].device
        else:
            device = torch.device("cpu") if self._scalars is None else self._scalars.device
        if self._scalars is None or self._scalars.device != device:
            self._scalars = backends.new_scalars(device)
        if self._base is not None and self._base.needs_norm:
            slot = self._scalars[Scalar.SQUARED_NORMS]
            held = self.param_groups[0]["squared_norms"]
            if not (isinstance(held, Tensor) and held.data_ptr() == slot.data_ptr()):
                slot.copy_(torch.as_tensor(held))
                self.param_groups[0]["squared_norms"] = slot
        return self._scalars

    def _descend(self, batch: Batch) -> None:
        step = self._describe()
        if batch.params:
            scalars = self._scalars_for(batch)
            if step.base is not None:
                for param, grad, i in zip(batch.params, batch.grads, batch.groups, strict=True):
                    state = self.state[param]
                    batch.states.append(state)
                    batch.fresh.append(step.base.prepare(state, param, grad, step.groups[i]))
            self._backend_for(batch).descend(batch, self._backup, step, scalars)
            self._backup = None
            # a foreign optimizer cannot skip on the device: the one branch on a device value
            if step.base is None and (not step.skip_nonfinite or bool(scalars[Scalar.ACCEPTED])):
                self.base_optimizer.step()
        self.restore()  # nothing is left to restore, unless no gradient came
        self._finish_step()

    def _run_hooks(self, when: str) -> None:
        """Run torch's step hooks around explicit passes; inside ``step`` torch runs them."""
        if self._inside_step:
            return
        own = getattr(self, f"_optimizer_step_{when}_hooks")
        everyone = getattr(torch_optimizer, f"_global_optimizer_{when}_hooks")
        for hook in chain(own.values(), everyone.values()):
            hook(self, (), {})

    # --- torch.optim's interface ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; its missing keys take the defaults."""
        own = {key: param_group.get(key, self.defaults[key]) for key in self._own_keys}
        check_group(own)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of the ``torch.optim`` base on its own.

        State tensors keep the dtype in which they were saved, so that a resumed run goes on
        exactly; group keys that the saved groups lack keep their present values.

        Raises:
            RuntimeError: Between ``first_step`` and ``second_step``.
            ValueError: If the groups do not match.
        """
        if self._between_passes:
            raise RuntimeError("expected second_step: load_state_dict cannot come between passes")
        before = self.param_groups
        super().load_state_dict(state_dict)
        for old, new in zip(before, self.param_groups, strict=True):
            for key, value in old.items():
                new.setdefault(key, value)
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                held = self.state[param][key]
                if isinstance(value, Tensor) and held.dtype != value.dtype:
                    self.state[param][key] = value.to(held.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        if self._between_passes:
            raise RuntimeError(
                "expected second_step: an optimizer cannot be copied or pickled between passes"
            )
        # hooks stay behind as in torch, and so does the wrapper that an LR scheduler puts on step
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in (*self._transient, "step") and not key.endswith("_hooks")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_backends" not in self.__dict__:  # a copy, not load_state_dict
            self._start()
        # the base goes on sharing both, and completes groups that older versions of torch saved
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})


def _is_zero(rho: float | Tensor) -> bool:
    return not isinstance(rho, Tensor) and rho == 0
