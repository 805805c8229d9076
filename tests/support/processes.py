"""Several processes that run test cases together, connected by gloo (nccl on GPUs).

A test gives :func:`run` a function of its module; each process calls it, with its rank and the
number of processes first, and the test gets what they returned. The processes are started once and
then wait for more: starting them would take longer than the cases.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam import meetings

#: Seconds for one case, of which one process may take the rest where another has failed.
TIMEOUT, GRACE = 300.0, 3.0
#: Seconds in which a process is gone once its pipe is closed, on a machine that has much to do.
GONE = 60.0

# Children are forked from a process that has imported all this and done nothing with it.
_PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict",
              "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
              "fastsam"]  # fmt: skip


class Failed(AssertionError):
    """What went wrong in which process."""


@dataclass
class Member:
    process: Any
    pipe: Connection


class Team:
    """Processes that are connected with each other."""

    def __init__(self, size: int, backend: str) -> None:
        context = multiprocessing.get_context("forkserver")
        preloaded = _PRELOADED + ["fastsam.backends.triton.backend"] * (
            "TRITON_INTERPRET" in os.environ
        )
        context.set_forkserver_preload(preloaded)
        self._directory = tempfile.TemporaryDirectory()
        self.members = []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, backend, self._directory.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.members.append(Member(process, pipe))

    def run(self, function: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        """What each process returns.

        Raises:
            Failed: With the traceback of every process that failed, and who did not come to an end.
        """
        task = pickle.dumps((function, args))
        for member in self.members:
            member.pipe.send_bytes(task)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < len(self.members):
            waiting = {
                member.pipe: rank
                for rank, member in enumerate(self.members)
                if rank not in results and rank not in failures
            }
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures |= dict.fromkeys(waiting.values(), "it had not come to an end")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    good, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.members[rank].process.join(GONE)
                    code = self.members[rank].process.exitcode
                    good, result = False, f"it ended with exit code {code}"
                (results if good else failures)[rank] = result
                if not good:  # the others may be waiting for it
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures:
            raise Failed("".join(f"\nrank {rank}: {failures[rank]}" for rank in sorted(failures)))
        return [results[rank] for rank in range(len(self.members))]

    def end(self, grace: float = GRACE) -> None:
        """End the processes, by force where they do not answer."""
        for member in self.members:
            member.pipe.close()  # what they take for the end
        for member in self.members:
            member.process.join(grace)
            if member.process.is_alive():
                member.process.kill()
            member.process.join()
            member.process.close()
        self._directory.cleanup()


def _interpreter() -> AbstractContextManager[Any]:
    if "TRITON_INTERPRET" not in os.environ:
        return nullcontext()
    import quick_interpreter

    return quick_interpreter.quick()


def _serve(rank: int, size: int, backend: str, directory: str, pipe: Connection) -> None:
    """The life of one process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent that a user interrupts
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{directory}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    warnings.simplefilter("ignore")
    meetings.PATIENCE = TIMEOUT  # a rank that the machine keeps waiting is not late
    gc.freeze()  # what has been imported need not be gone through to find DDP models
    with contextlib.suppress(EOFError), _interpreter():  # the parent has closed its end
        while True:
            task = pipe.recv_bytes()
            torch.manual_seed(0)
            try:
                function, args = pickle.loads(task)
                answer = pickle.dumps((True, function(rank, size, *args)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)
    dist.destroy_process_group()


_teams: dict[tuple[int, str], Team] = {}


def run(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    timeout: float = TIMEOUT,
) -> list[Any]:
    """Let ``size`` processes call ``function(rank, size, *args)``, and return their results."""
    team = _teams.get((size, backend))
    if team is None:
        team = _teams[size, backend] = Team(size, backend)
    try:
        return team.run(function, *args, timeout=timeout)
    except BaseException:  # the others may be in the middle of something
        _teams.pop((size, backend)).end(grace=0)
        raise


def run_command(
    command: Sequence[str], env: dict[str, str], timeout: float = TIMEOUT
) -> tuple[int, str, str]:
    """A command's exit status, output and errors; nothing that it has started outlives it."""
    with subprocess.Popen(
        command, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def close() -> None:
    """End all processes: for the end of a test module."""
    while _teams:
        _teams.popitem()[1].end()


# --- something to train ---------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """33 and 5 rows divide unevenly, and one has no shard for most ranks."""
    torch.manual_seed(seed)
    layers = (
        nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)
    )  # fmt: skip
    return nn.Sequential(*layers).to(dtype)


def data(rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """One rank's share of a batch of 16."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 7, generator=generator), torch.randn(16, 1, generator=generator)
    return x.chunk(size)[rank].to(dtype), y.chunk(size)[rank].to(dtype)


def small_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """For many steps."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)).to(dtype)


class Fleet(nn.Module):
    """Networks in one module, each for an optimizer of its own: they communicate together."""

    def __init__(self, count: int, make: Callable[[], nn.Module] = network) -> None:
        super().__init__()
        self.networks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = [(one(x) - y).square().mean() for one in self.networks]
        return torch.stack(losses).sum()


def train(
    fleet: nn.Module,
    optimizers: Sequence[Any],
    batch: tuple[Tensor, Tensor],
    steps: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Steps of all optimizers in turn, on the gradients of one backward pass of the fleet."""
    for _ in range(steps):
        with context():
            fleet(*batch).backward()
        for optimizer in optimizers:
            optimizer.first_step(zero_grad=True)
        fleet(*batch).backward()
        for optimizer in optimizers:
            optimizer.second_step(zero_grad=True)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest between elements of the tensors."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((x - y).abs().max()) for x, y in pairs if x.numel())


def are_equal_everywhere(tensors: Sequence[Tensor]) -> bool:
    """Whether every rank has the same bits."""
    mine = pickle.dumps([(x.dtype, x.reshape(-1).view(torch.uint8).tolist()) for x in tensors])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return all(theirs == mine for theirs in everyone)
