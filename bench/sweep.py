"""Compare launch configurations of the kernels, on tensors that nobody needs.

    python bench/sweep.py                       # on a GPU: prints and writes a table per kernel
    TRITON_INTERPRET=1 python bench/sweep.py    # anywhere: only that all of them give the same

The kernels are not tuned while a model trains: they change weights in place, so a tuner's trials
would each be a step. The configurations in ``kernels/layout.py`` (``Launches``) are fixed, and this
script shows what others would do: every kind of pass over 100 million parameters, by elements per
program and threads. Times are medians of Triton's ``do_bench``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import fastsam
from fastsam.backends.triton.backend import TritonBackend
from fastsam.kernels.layout import Launch, Launches

from common.outputs import align
from speed.contenders import uniform
from speed.measure import describe_hardware, versions

OUTPUT = Path(__file__).resolve().parent / "results" / "sweep"
PARAMETERS = 100_000_000
TENSORS = 150
CHUNKS = dict.fromkeys(("reduce", "reduce_scaled"), (2048, 4096, 8192, 16384, 32768))
OTHER_CHUNKS = (512, 1024, 2048, 4096)
LANES = (64, 128, 256, 512)

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
#: By kind of pass a step that contains it: only that pass differs from one trial to the next.
STEPS: dict[str, tuple[str, Factory]] = {
    "perturb": ("SAM + AdamW", lambda params: fastsam.SAM(
        params, torch.optim.AdamW, lr=1e-3, backend="triton")),
    "update": ("SAM + AdamW", lambda params: fastsam.SAM(
        params, torch.optim.AdamW, lr=1e-3, backend="triton")),
    "reduce": ("SSAM + SGD", lambda params: fastsam.SSAM(
        params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend="triton")),
    "reduce_scaled": ("ASAM + SGD", lambda params: fastsam.ASAM(
        params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend="triton")),
    "reduce_streams": ("VaSSO + SGD", lambda params: fastsam.VaSSO(
        params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend="triton")),
}  # fmt: skip


def tensors(parameters: int) -> int:
    """In how many tensors so many parameters come."""
    return max(1, min(TENSORS, parameters // 1000))


def configurations(kind: str) -> Iterator[Launches]:
    """All launch configurations of one kind of pass, the others as they are."""
    for chunk in CHUNKS.get(kind, OTHER_CHUNKS):
        for lanes in LANES:
            if chunk >= lanes:
                yield dataclasses.replace(Launches(), **{kind: Launch(chunk, lanes)})


class Trial:
    """One optimizer on scratch tensors, with one set of launch configurations."""

    def __init__(self, kind: str, launches: Launches, device: torch.device, parameters: int):
        generator = torch.Generator(device).manual_seed(0)
        self.params = []
        for shape in uniform(parameters, tensors(parameters)):
            param = nn.Parameter(torch.randn(shape, generator=generator, device=device))
            param.grad = torch.randn(shape, generator=generator, device=device)
            self.params.append(param)
        self.optimizer = STEPS[kind][1](self.params)
        backend = TritonBackend(launches)
        self.optimizer._passes.backends.use("triton", self.params[0].device, backend)

    def step(self) -> None:
        self.optimizer.first_step()
        self.optimizer.second_step()


def sweep(kind: str, device: torch.device, parameters: int) -> list[tuple[Launch, float, float]]:
    """Time a step under every configuration of one kind of pass.

    Returns:
        Configuration, milliseconds (NaN without a GPU), and by how much any weight differs after
        two steps from what the first configuration gave, relative to the largest weight: sums in
        another order make it other than 0.
    """
    results, expected = [], None
    for launches in tqdm(list(configurations(kind)), kind, unit="configuration", disable=None):
        trial = Trial(kind, launches, device, parameters)
        for _ in range(2):
            trial.step()
        weights = torch.cat([param.detach().flatten() for param in trial.params])
        expected = weights if expected is None else expected
        difference = float((weights - expected).abs().max() / expected.abs().max())
        milliseconds = float("nan")
        if device.type == "cuda":
            from triton.testing import do_bench

            milliseconds = do_bench(trial.step, return_mode="median")
        results.append((getattr(launches, kind), milliseconds, difference))
        del trial
    return results


def main(argv: list[str] | None = None) -> dict[str, list[tuple[Launch, float, float]]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--parameters", type=int, help=f"default: {PARAMETERS:,}; 5,000 without "
                        "a GPU")  # fmt: skip
    parser.add_argument("--output", type=Path, help=f"default: results/{OUTPUT.name} beside this "
                        "file, on a GPU")  # fmt: skip
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameters = args.parameters or (PARAMETERS if device.type == "cuda" else 5_000)
    hardware = describe_hardware(device)["name"]
    print(f"{parameters:,} parameters in {tensors(parameters)} tensors, float32, {hardware}, "
          + ", ".join(f"{name} {version}" for name, version in versions().items()))  # fmt: skip
    found = {}
    for kind in args.kinds:
        found[kind] = sorted(sweep(kind, device, parameters), key=lambda entry: entry[1])
        lines = [["elements", "threads", "ms", "difference", ""]]
        for launch, milliseconds, difference in found[kind]:
            used = "in use" if launch == getattr(Launches(), kind).on(False) else ""
            lines.append([str(launch.chunk), str(launch.lanes), f"{milliseconds:.4g}",
                          f"{difference:.1e}", used])  # fmt: skip
        print(f"\n{kind}: a step of {STEPS[kind][0]}\n{align(lines)}")
        output = args.output or (OUTPUT if device.type == "cuda" else None)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            with (output / f"{kind}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([[hardware, parameters], *lines])
    return found


if __name__ == "__main__":
    main()
