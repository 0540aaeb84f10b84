"""What a row says about the machine and the code: processor, GPU, load, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or what a package is installed in."""

_GPU_FACTS = {
    "gpu": "name",
    "driver": "driver_version",
    "power_limit": "power.limit",
    "max_sm_clock": "clocks.max.sm",
    "max_memory_clock": "clocks.max.memory",
}
_RESULTS = "benchmarks/results"


def machine_facts(root: Path = ROOT) -> dict[str, Any]:
    """What a reader needs to know about the machine and the code; take it before anything else adds to the load.

    Args:
        root: The checkout. Elsewhere commit and changes are None.

    Returns:
        JSON-able facts. Those of the GPU are there where there is one.
    """
    is_checkout = (root / ".git").exists()
    # Results of the benchmark before this one do not make the code another.
    changes = ("status", "--porcelain", "--", ".", f":!{_RESULTS}")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        **(gpu_facts() if torch.cuda.is_available() else {}),
        "commit": _git(root, "rev-parse", "--short", "HEAD") if is_checkout else None,
        "dirty": bool(_git(root, *changes)) if is_checkout else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def gpu_facts() -> dict[str, Any]:
    """Name, driver, power limit and highest clocks of the first CUDA device, with units, and Triton's version."""
    device = torch.cuda.get_device_properties(0)
    query = (f"--id=GPU-{device.uuid}", f"--query-gpu={','.join(_GPU_FACTS.values())}", "--format=csv,noheader")
    answer = _output_of("nvidia-smi", *query)
    # Torch knows the name even where nvidia-smi is missing.
    facts = _parse_gpu_facts(answer) if answer else dict.fromkeys(_GPU_FACTS) | {"gpu": device.name}
    return facts | {"triton": _version("triton")}


def _parse_gpu_facts(answer: str) -> dict[str, Any]:
    """The facts in the line that nvidia-smi prints for one GPU."""
    return dict(zip(_GPU_FACTS, answer.split(", "), strict=True))


def _version(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    return _output_of("git", "-C", str(root), *arguments)


def _output_of(*command: str) -> str | None:
    """What a program prints; None if there is no such program or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
