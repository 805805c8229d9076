"""What machine code says of speed: resident blocks, bytes in flight, fences. Nothing is timed.

A kernel that only moves memory is as fast as the memory if enough bytes are on their way at any
time: bandwidth times latency (Little's law). Of every thread those are the loads that the code
issues before it first uses what one of them brings, and a processor has as many threads at once as
their registers leave room for.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Processor:
    """One multiprocessor or compute unit, and the memory behind all of them.

    Attributes:
        registers: 32-bit registers.
        granule: Registers per thread come in multiples of this many.
        threads: Resident threads at most.
        blocks: Resident blocks at most.
        shared: Bytes of shared memory, and how many a block takes beyond its own.
        bandwidth: Bytes per second of all processors' memory.
        latency: Seconds from a load to its data under load; an assumption.
        count: Processors.
    """

    registers: int
    granule: int
    threads: int
    blocks: int
    shared: tuple[int, int]
    bandwidth: float
    latency: float
    count: int

    @property
    def needed(self) -> float:
        """Bytes in flight with which the memory is the limit."""
        return self.bandwidth * self.latency / self.count


#: A100 80 GB, H200 at what copies reach of it, B200, MI300X.
PROCESSORS = {
    "cuda:80": Processor(65536, 8, 2048, 32, (164 << 10, 1 << 10), 2.0e12, 600e-9, 108),
    "cuda:90": Processor(65536, 8, 2048, 32, (228 << 10, 1 << 10), 4.3e12, 600e-9, 132),
    "cuda:100": Processor(65536, 8, 2048, 32, (228 << 10, 1 << 10), 7.2e12, 600e-9, 148),
    # a wave's vector registers are those of its SIMD, of which there are four
    "hip:gfx942": Processor(4 * 512 * 64, 8, 2048, 40, (64 << 10, 0), 4.3e12, 800e-9, 304),
}


@dataclass(frozen=True)
class Flight:
    """How much of a kernel is on its way.

    Attributes:
        blocks: Resident per processor.
        occupancy: Their threads, as a part of those that a processor has room for.
        bytes: In flight per thread, on average over the places where it waits for a load; None
            where the code was not disassembled.
        headroom: All threads' bytes in flight over those that the memory needs.
        fences: Instructions that order memory across the GPU, or invalidate the first cache.
    """

    blocks: int
    occupancy: float
    bytes: float | None
    headroom: float | None
    fences: int | None

    def __str__(self) -> str:
        text = f"{self.blocks} blocks ({self.occupancy:.0%})"
        if self.bytes is not None:
            text += (f", {self.bytes:.0f} B in flight per thread ({self.headroom:.1f} times what "
                     f"the memory needs), {self.fences} fences")  # fmt: skip
        return text


def flight(
    compiled: Any, target: str, registers: int, threads: int, loaded: int, code: bool
) -> Flight:
    """See :class:`Flight`.

    Args:
        compiled: What Triton has compiled.
        target: A key of ``PROCESSORS``.
        registers: Per thread.
        threads: Per block.
        loaded: Bytes that a thread loads of its chunk: what it loads after these is another look at
            them, or something else.
        code: Whether to look at the instructions, which takes a second on NVIDIA's targets.
    """
    processor = PROCESSORS[target]
    per_thread = -(-registers // processor.granule) * processor.granule
    blocks = min(processor.blocks, processor.threads // threads,
                 processor.registers // (per_thread * threads))  # fmt: skip
    if compiled.metadata.shared:
        room, more = processor.shared
        blocks = min(blocks, room // (compiled.metadata.shared + more))
    occupancy = blocks * threads / processor.threads
    if not code:
        return Flight(blocks, occupancy, None, None, None)
    if target.startswith("cuda"):
        text = disassembled(compiled.asm["cubin"])
        waits, fences = list(_waits_of_sass(text)), len(re.findall(r"\b(?:MEMBAR|CCTL)", text))
    else:
        text = compiled.asm["amdgcn"]
        waits = list(_waits_of_amdgcn(text))
        fences = len(re.findall(r"\bbuffer_(?:wbl2|inv)\b", text))
    first = [0]
    for wait in waits:
        first.append(wait)
        if sum(first) >= loaded:
            break
    mean = sum(first) / max(1, len(first) - 1)
    return Flight(blocks, occupancy, mean, mean * blocks * threads / processor.needed, fences)


def disassembled(cubin: bytes) -> str:
    """Instructions of an NVIDIA GPU, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


#: "/*0640*/ @!P0 LDG.E.128 R8, desc[UR16][R24.64] ;": operation and operands.
SASS = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
#: Bytes by the suffix of a stream's load; narrower ones are not the vector path's.
WIDE = {"128": 16, "256": 32}


def _waits_of_sass(text: str) -> Iterator[int]:
    """Bytes on their way where a thread waits for the first of them."""
    pending: dict[int, int] = {}  # register -> bytes, at the first of those that a load writes
    for operation, operands in SASS.findall(text):
        parts = operation.split(".")
        width = next((WIDE[part] for part in parts if part in WIDE), 0)
        load = parts[0] == "LDG" and width > 0
        stores = parts[0].startswith("ST")
        # what is written comes first; a store has its address there
        read = operands if stores else operands.partition(",")[2]
        used = {int(x) for x in re.findall(r"\bR(\d+)", read)}
        if any(first <= x < first + size // 4 for x in used for first, size in pending.items()):
            yield sum(pending.values())
            pending = {}
        if load:
            pending[int(re.findall(r"\bR(\d+)", operands)[0])] = width
    if pending:
        yield sum(pending.values())


def _waits_of_amdgcn(text: str) -> Iterator[int]:
    """The same on AMD, where code says how many accesses may still be on their way."""
    queue: list[int] = []  # bytes of loads in order; 0 for what is no stream's, or was counted
    for line in text.splitlines():
        if match := re.match(r"\s+(?:global|flat|buffer)_(load|store|atomic)_\w*?(x4)?\s", line):
            queue.append(16 if match[1] == "load" and match[2] else 0)
        elif match := re.match(r"\s+s_waitcnt .*vmcnt\((\d+)\)", line):
            arrived = queue[: max(0, len(queue) - int(match[1]))]
            if sum(arrived):
                yield sum(queue)
                queue = [0] * (len(queue) - len(arrived))
            else:
                queue = queue[len(arrived) :]
