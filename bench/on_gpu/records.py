"""What a stage leaves behind: one JSON file, which says on what machine and how far it came."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from speed.measure import versions

ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, TIMED_OUT, RUNNING = STATUSES = ("done", "failed", "timed out", "running")
#: What results have to agree in to be kept beside new ones.
SAME = ("gpu", "driver", "torch", "triton")
MACHINE = (*SAME, "platform", "Python", "memory", "processors", "commit", "date")


@dataclass
class Record:
    """One stage's results.

    Attributes:
        stage: Its name.
        machine: What it ran on, and when.
        rehearsal: Whether the sizes were those of a rehearsal, so that no number means anything.
        status: ``done``, ``failed``, ``timed out`` or, while it runs, ``running``.
        seconds: How long it took.
        error: The last line of what it said when it failed.
        results: Lines of what it found, each a dict; what was found before a failure stays.
    """

    stage: str
    machine: dict[str, Any]
    rehearsal: bool = False
    status: str = RUNNING
    seconds: float = 0.0
    error: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it whole or not at all: the process may be ended at any time."""
        path = folder / f"{self.stage}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read one.

        Raises:
            ValueError: If the file is something else.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            record = cls(**fields)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is no record of a stage: {error}") from None
        if problem := record.problem():
            raise ValueError(f"{path.name} is no record of a stage: {problem}")
        return record

    def problem(self) -> str:
        """What is wrong with it; empty where nothing is."""
        if not (isinstance(self.stage, str) and isinstance(self.machine, Mapping)):
            return "stage must be a string, and machine an object"
        if missing := [key for key in MACHINE if key not in self.machine]:
            return f"machine has no {missing[0]!r}"
        if self.status not in STATUSES:
            return f"status must be one of {', '.join(STATUSES)}, got {self.status!r}"
        if not (isinstance(self.results, list) and all(isinstance(x, dict) for x in self.results)):
            return "results must be a list of objects"
        return ""

    def fits(self, machine: Mapping[str, Any]) -> bool:
        """Whether it comes from the same GPU, driver and versions."""
        return all(self.machine.get(key) == machine.get(key) for key in SAME)

    def of(self, **what: Any) -> list[dict[str, Any]]:
        """The results with these values."""
        return [x for x in self.results if all(x.get(k) == v for k, v in what.items())]


def load_all(folder: Path) -> dict[str, Record]:
    """Every record in a folder, by stage.

    Raises:
        ValueError: If one of the files is something else.
    """
    records = map(Record.load, sorted(folder.glob("*.json")))
    return {record.stage: record for record in records}


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as every record has it."""
    properties = torch.cuda.get_device_properties(device)
    found = versions()
    toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": found["torch"],
        "triton": found.get("triton", "not installed"),
        "platform": toolkit,
        "Python": platform.python_version(),
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "peers": {k: v for k, v in found.items() if k in ("pytorch-optimizer", "unifiedsam")},
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "date": str(datetime.date.today()),
    }


def _driver() -> str:
    amd = Path("/sys/module/amdgpu/version")
    if torch.version.hip:
        return amd.read_text().strip() if amd.exists() else "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return _output(query) or "unknown"


def _output(command: Sequence[str]) -> str:
    """What a command prints, or nothing where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def slug(name: str) -> str:
    """A GPU's name as part of a folder's: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
