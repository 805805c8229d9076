"""Master weights: 16-bit parameters that are perturbed and updated as if they were float32.

Between two steps the weights are float32 and the parameters are these, rounded. The oracle is given
float32 storage, and gradients taken at what the parameters hold.
"""

import pytest
import torch

import fastsam

from registry import (
    BASES,
    DEVICE,
    METHODS,
    OWN_UPDATES,
    base_of,
    build,
)
from trajectories import check_master_trajectory

STEPS = 6
SHAPES = [(301,), (6, 7), (), (1,), (0,)]
GROUPS = [
    {"params": [0, 3]},
    {"params": [1, 4], "rho": 0.1, "lr": 0.03},
    {"params": [2], "adaptive": False, "lr": 0.01},
]
#: A dtype per tensor; the kernels take those that are alike together.
STORED = {
    "bf16": ["bf16"] * 5,
    "fp16": ["fp16"] * 5,
    "bf16-fp32": ["bf16-fp32"] * 5,
    "mixed": ["bf16", "fp32", "fp16", "bf16-fp32", "bf16"],
}
CASES = [
    *((method, "sgd-momentum", "bf16") for method in METHODS),
    *(("sam", base, "fp16") for base in BASES),
    *(("ssam-adaptive-clip", base, "bf16-fp32") for base in BASES),
    ("asam", "adagrad", "mixed"), ("vasso-all", "adamw", "mixed"),
    ("samar-all", "adam-amsgrad", "mixed"), ("lightsam-3-all", "", "mixed"),
]  # fmt: skip
#: The variants of the kernels; the rest differs on the host only.
ON_TRITON = [
    ("sam", "sgd-nesterov", "fp16"), ("asam", "adamw", "mixed"), ("vasso-all", "adagrad", "bf16"),
    ("ssam-adaptive-clip", "adagrad_norm", "bf16-fp32"), ("samar-all", "adam-amsgrad", "bf16"),
    ("lightsam-1", "", "bf16"), ("lightsam-2", "", "bf16"), ("lightsam-3-all", "", "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "base", "stored", "backend"),
    [(*case, backend) for case in CASES for backend in ("reference", "torch")]
    + [(*case, "triton") for case in (CASES if DEVICE == "cuda" else ON_TRITON)],
)
def test_trajectory(method, base, stored, backend):
    steps = 2 if backend == "triton" and DEVICE == "cpu" else STEPS
    check_master_trajectory(method, base, STORED[stored], backend, SHAPES, GROUPS, steps)


TORCH_BASES = ["sgd", "sgd-momentum", "sgd-nesterov", "sgd-dampening", "adam-amsgrad", "adamw",
               "adagrad"]  # fmt: skip


def check_torchs(what, ours, theirs, exact):
    """Equal bits, but where torch's operators divide in another order, as on a GPU."""
    ours = ours.to(theirs)
    if exact:
        assert torch.equal(ours, theirs), what
    else:
        torch.testing.assert_close(ours, theirs, rtol=8 * 2.0**-23, atol=2.0**-23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", TORCH_BASES)
def test_loop_in_plain_torch(base, dtype):
    """USAM with a radius of a power of two rounds as the equations do: equal bit for bit on a CPU.

    Plain torch has an optimizer over float32 copies, and the gradients are of their roundings.
    """
    cls, kwargs, rho = BASES[base].cls, dict(BASES[base].kwargs), 2.0**-5
    if base == "adagrad":  # torch makes this state at once, and in the parameter's dtype
        kwargs["initial_accumulator_value"] = 0.125
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in ((257,), (3, 5), ())]
    params = [torch.nn.Parameter(w.clone()) for w in starts]
    optimizer = fastsam.USAM(params, cls, rho, backend="reference", master_weights=True, **kwargs)
    copies = [torch.nn.Parameter(w.float()) for w in starts]
    plain = cls(copies, foreach=False, **kwargs)
    away = -rho if kwargs.get("maximize") else rho  # to worse points
    lost, exact = 0, DEVICE == "cpu" or cls is torch.optim.SGD
    for _ in range(8):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.sin(3 * p.detach())
            half()
        for w in copies:
            g = torch.sin(3 * w.detach().to(dtype))
            perturbed = (w.detach() + away * g.float()).to(dtype)
            lost += int((perturbed != (w.detach().to(dtype) + away * g.float()).to(dtype)).sum())
            w.grad = torch.sin(3 * perturbed).float()
        plain.step()
        for p, w in zip(params, copies, strict=True):
            master = optimizer.state[p]["master_weight"]
            check_torchs("master", master, w, exact)
            assert torch.equal(p, master.to(dtype))
            w.data.copy_(master)  # else one rounding may become a unit of the parameter
    assert lost  # rounding the perturbed parameter, not the perturbed master, is something else
    for p, w in zip(params, copies, strict=True):
        for name, value in plain.state[w].items():
            check_torchs(name, optimizer.state[p][name], value, exact)
            assert name == "step" or optimizer.state[p][name].dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("kind", ["column-major", "strided", "misaligned"])
def test_layouts(kind, backend):
    """Bit for bit as in contiguous memory, as no norm is taken."""
    torch.manual_seed(0)
    start = torch.randn(9, 13, device=DEVICE).bfloat16()
    views = {
        "column-major": torch.empty(13, 9, device=DEVICE, dtype=torch.bfloat16).t(),
        "strided": torch.empty(9, 26, device=DEVICE, dtype=torch.bfloat16)[:, ::2],
        "misaligned": torch.empty(118, device=DEVICE, dtype=torch.bfloat16)[1:].view(9, 13),
    }
    results = []
    for memory in (torch.empty_like(start), views[kind]):
        param = torch.nn.Parameter(memory.copy_(start))
        optimizer = fastsam.USAM(
            [param], torch.optim.AdamW, 0.05, lr=0.1, eps=1e-3, backend=backend, master_weights=True
        )
        for _ in range(2):
            for half in (optimizer.first_step, optimizer.second_step):
                param.grad = torch.sin(3 * param.detach().contiguous())
                half()
        assert param.stride() == memory.stride() and param.data_ptr() == memory.data_ptr()
        results.append((param.detach(), optimizer.state[param]["master_weight"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], start)


@pytest.mark.parametrize("method", METHODS)
def test_steps_on_a_device_that_is_no_cpu(method):
    """Where every parameter has a master there is nothing to copy: no operator gets an empty list.

    torch's meta device takes the way of a GPU, and computes nothing.
    """
    shapes = [(5,), (), (3, 4)]
    params = [torch.nn.Parameter(torch.ones(s, device="meta", dtype=torch.half)) for s in shapes]
    optimizer = build(METHODS[method], base_of(method, "adamw"), params, None, "torch",
                      master_weights=True)  # fmt: skip
    for _ in range(2):
        for half in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.ones_like(p)
            half()
    assert all(optimizer.state[p]["master_weight"].is_meta for p in params)


def test_every_update_is_covered():
    """A new base or method of the registry comes into the cases by itself."""
    assert {base for _, base, _ in CASES} >= BASES.keys()
    assert {method for method, _, _ in CASES} == METHODS.keys()
    assert {METHODS[m].bases[0] for m, _, _ in CASES} >= OWN_UPDATES.keys()
