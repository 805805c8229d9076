"""What compiles when, how often a step launches, and what the host reads, for many methods.

    tests/standin/run python -m standin.recompilations [part of a name]

Every case goes through phases that a training run may have: other hyper-parameters, gradients
elsewhere and misaligned, a missing gradient, another group, a state dict. Nothing may compile after
the first step, and the host may read nothing and wait for nothing in a step. It may where a group
is added and a state dict loaded.
"""

import gc
import sys
import warnings

import torch
import triton

import fastsam

from standin import driver
from standin.operators import Operators

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
SIZES = (1000, 5000, 3, 40000, 17, 0, 16 * 1024)
#: By name: the class, what it is given besides parameters, and how parameters are stored.
CASES = {
    "SAM + SGD": (fastsam.SAM, (SGD,), {"lr": 0.1}),
    "SAM + SGD, momentum": (fastsam.SAM, (SGD,), MOMENTUM | {"weight_decay": 5e-4}),
    "SAM + AdamW": (fastsam.SAM, (ADAMW,), {}),
    "SAM + AdamW, amsgrad": (fastsam.SAM, (ADAMW,), {"amsgrad": True}),
    "SAM + Adagrad": (fastsam.SAM, (torch.optim.Adagrad,), {}),
    "SAM + AdaGradNorm": (fastsam.SAM, (fastsam.AdaGradNorm,), {"lr": 0.1}),
    "SAM + RMSprop, not fused": (fastsam.SAM, (torch.optim.RMSprop,), {}),
    "SAM, clipped": (fastsam.SAM, (ADAMW,), {"max_grad_norm": 1.0}),
    "SAM, skipping": (fastsam.SAM, (ADAMW,), {"skip_nonfinite": True}),
    "ASAM": (fastsam.ASAM, (SGD,), MOMENTUM | {"rho": 0.5}),
    "SSAM": (fastsam.SSAM, (ADAMW,), {}),
    "SSAM, adaptive, clipped, skipping": (
        fastsam.SSAM, (SGD,),
        MOMENTUM | {"adaptive": True, "max_grad_norm": 1.0, "skip_nonfinite": True},
    ),
    "Unified SAM, 1/t": (fastsam.UnifiedSAM, (SGD,), MOMENTUM | {"lam": "1/t"}),
    "VaSSO": (fastsam.VaSSO, (SGD,), MOMENTUM),
    "VaSSO, skipping": (fastsam.VaSSO, (ADAMW,), {"skip_nonfinite": True}),
    "LightSAM I": (fastsam.LightSAM, (), {"lr": 0.1, "rho": 0.05, "rule": "adagrad_norm"}),
    "LightSAM II": (fastsam.LightSAM, (), {"lr": 0.1, "rho": 0.05, "rule": "adagrad"}),
    "LightSAM III": (fastsam.LightSAM, (), {"lr": 0.1, "rho": 0.05, "rule": "adam"}),
    "AdaSAM": (fastsam.AdaSAM, (), {"lr": 1e-3, "rho": 0.05}),
    "SAMAR": (fastsam.SAMAR, (SGD,), MOMENTUM),
    "SAMAR, clipped": (fastsam.SAMAR, (ADAMW,), {"max_grad_norm": 1.0}),
    "bfloat16": (fastsam.SAM, (ADAMW,), {}),
    "bfloat16, masters": (fastsam.SAM, (ADAMW,), {"master_weights": True}),
    "bfloat16, stochastic": (fastsam.SAM, (ADAMW,), {"rounding": "stochastic"}),
    "bfloat16 and float32": (fastsam.SAM, (ADAMW,), {}),
    "two groups, tensors for lr and rho": (fastsam.SAM, (ADAMW,), {}),
    "LETS": (fastsam.SAM, (SGD,), MOMENTUM),
    "LETS, by difference": (fastsam.SAM, (ADAMW,), {}),
}  # fmt: skip


class Run:
    """A case, from phase to phase."""

    def __init__(self, name):
        method, bases, kwargs = CASES[name]
        low = [name.startswith("bfloat16") and (i % 2 == 0 or "float32" not in name)
               for i in range(len(SIZES))]  # fmt: skip
        self.params = [
            torch.nn.Parameter(torch.randn(n, device="cuda").to(torch.bfloat16 if x else None))
            for n, x in zip(SIZES, low, strict=True)
        ]
        groups = self.params
        if name.startswith("two groups"):
            ours = {key: torch.tensor(0.1, device="cuda") for key in ("lr", "rho")}
            groups = [{"params": groups[:2]} | ours, {"params": groups[2:], "weight_decay": 0.1}]
        self.optimizer = method(groups, *bases, **kwargs)
        self.is_lets = name.startswith("LETS")
        if self.is_lets:
            kind = "difference" if name.endswith("difference") else "diag"
            self.optimizer = fastsam.LETS(self.optimizer, hessian=kind)
        self.held = []  # so that new gradients lie elsewhere

    def gradients(self, move=False, offset=0):
        for p in self.params:
            n = p.numel() + offset
            new = torch.randn(n, device="cuda").to(p.dtype)[offset:].view_as(p)
            if move:
                self.held.append(torch.empty(1000, device="cuda"))
            if p.grad is None or move or offset:
                p.grad = new
            else:
                p.grad.copy_(new)

    def step(self, **how):
        if self.is_lets:
            closure = self.closure
            return self.optimizer.step(closure, closure)
        for half in (self.optimizer.first_step, self.optimizer.second_step):
            self.gradients(**how)
            half(zero_grad=True)

    def closure(self):
        for p in self.params:
            p.grad = torch.randn_like(p)
        return torch.rand((), device="cuda")

    # --- phases ---

    def set(self, key, value):
        for group in self.optimizer.param_groups:
            if key in group and not isinstance(group[key], torch.Tensor):
                group[key] = value
        self.step()

    def miss_one(self):
        for half in (self.optimizer.first_step, self.optimizer.second_step):
            self.gradients()
            self.params[1].grad = None
            half(zero_grad=True)

    def add_group(self):
        self.params.append(torch.nn.Parameter(torch.randn_like(self.params[0])[:100].clone()))
        self.optimizer.add_param_group({"params": self.params[-1:]})
        self.step()

    def load(self):
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        self.step()

    def many(self):
        for _ in range(14):
            self.step()

    def phases(self):
        yield "step 2", self.step
        yield "step 3", self.step
        yield "lr = 1", lambda: self.set("lr", 1.0)
        yield "lr = 0.016", lambda: self.set("lr", 0.016)
        yield "weight decay = 16", lambda: self.set("weight_decay", 16.0)
        yield "gradients elsewhere", lambda: self.step(move=True)
        yield "and elsewhere again", lambda: self.step(move=True)
        yield "gradients misaligned", lambda: self.step(offset=1)
        yield "aligned again", self.step
        yield "14 steps", self.many
        if not self.is_lets:
            yield "rho = 1", lambda: self.set("rho", 1.0)
            yield "a gradient missing", self.miss_one
        yield "none missing", self.step
        yield "another group", self.add_group
        if not self.is_lets:
            yield "a state dict", self.load


def examine(name, operators):
    """A line about a case, and whether something is wrong with it."""
    run, wrong = Run(name), []
    run.step()
    driver.faults()
    compiled, launches = len(driver.compiled), []
    for phase, take in run.phases():
        before = [len(driver.compiled), driver.counter("launches"), operators.reads,
                  driver.counter("synchronizations")]  # fmt: skip
        take()
        launches.append(driver.counter("launches") - before[1])
        if new := driver.compiled[before[0] :]:
            wrong.append(f"{phase}: compiles {', '.join(name for name, _ in new)}")
        may_read = phase in ("another group", "a state dict")
        if operators.reads > before[2] and not may_read:
            wrong.append(f"{phase}: the host reads {operators.reads - before[2]} values")
        if driver.counter("synchronizations") > before[3] and not may_read:
            wrong.append(f"{phase}: the host waits for the device")
        if found := driver.faults():
            wrong.append(f"{phase}: {found}")
    print(f"{name:35} {launches[1]} launches a step; {'; '.join(wrong) or 'all compiled at first'}",
          f"({compiled} so far)", flush=True)  # fmt: skip
    return bool(wrong)


def main(part=""):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    driver.execute()
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    with Operators() as operators:
        wrong = 0
        for name in CASES:
            if part in name:
                wrong += examine(name, operators)
                gc.collect()
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
