"""Tensors of more than 2^31 elements, and of more than 2^32 bytes: are the right elements reached?

    tests/standin/run python -m standin.large_tensors

The tensors are as large as that, on memory that is only reserved. A step over all of it would take
days, so each launch gets the chunks that hold some elements at the start, in the middle and at the
end. There the result is compared with SAM's equations.
"""

import warnings

import numpy as np
import torch

import fastsam
from fastsam.kernels import table

from standin import driver
from standin.operators import Operators, alias

ELEMENTS = 3_000_000_005
PLACES = [0, 5, ELEMENTS // 2, 2**31 - 1, 2**31, ELEMENTS - 1500, ELEMENTS - 1]
LR, RHO = 0.1, 0.5
ZEROED = 2**20  # the stand-in poisons the start of its memory

cut = table.chunk_table


def some_chunks(sizes, groups, aligned, chunk):
    """The chunks of one tensor in which the places lie."""
    return cut(sizes, groups, aligned, chunk)[np.unique(np.array(PLACES) // chunk)]


def put(x, values):
    """Write values to the places of a tensor, and zeros to its start."""
    memory = alias(x.detach())
    memory[:ZEROED] = 0
    memory[PLACES] = values
    return memory[PLACES]


def look(x):
    return alias(x.detach())[PLACES].double()


def step(dtype):
    """One step of SAM on SGD with momentum; the largest error relative to the dtype's."""
    draw = torch.Generator().manual_seed(0)
    weights, first, second = (torch.randn(len(PLACES), generator=draw).to(dtype) for _ in range(3))
    param = torch.nn.Parameter(torch.empty(ELEMENTS, dtype=dtype, device="cuda"))
    param.grad = torch.empty_like(param)
    optimizer = fastsam.SAM([param], torch.optim.SGD, lr=LR, rho=RHO, momentum=0.9)
    buffer = torch.empty_like(param, requires_grad=False)  # a new one would be filled with zeros
    optimizer.state[param]["momentum_buffer"] = buffer
    put(param, weights)
    put(buffer, torch.zeros_like(weights))

    put(param.grad, first)
    optimizer.first_step(zero_grad=True)
    w, g, u = (x.double() for x in (weights, first, second))
    errors = [look(param) - (w + RHO * g / g.norm())]

    param.grad = torch.empty_like(param)
    put(param.grad, second)
    optimizer.second_step()
    errors += [look(param) - (w - LR * u), look(buffer) - u]
    return max(float(x.abs().max()) for x in errors) / torch.finfo(dtype).eps


def main():
    warnings.simplefilter("ignore")
    table.chunk_table = some_chunks
    driver.execute()
    failed = False
    with Operators():
        for dtype in (torch.bfloat16, torch.float32):
            error = step(dtype)
            found = driver.faults()
            failed |= error > 4 or bool(found)
            print(f"{ELEMENTS:,} elements of {dtype}: off by {error:.1f} eps. {found}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
