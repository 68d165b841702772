"""What `fedtune doctor` looks at on the machine: Python, packages, devices, cores, memory, disk."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OK: Literal["ok"] = "ok"
WARN: Literal["warn"] = "warn"
FAIL: Literal["fail"] = "fail"
_LOW_DISK, _LOW_MEMORY = 2e9, 4e9


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: `mend` says what to do when `state` is not ok."""

    state: Literal["ok", "warn", "fail"]
    name: str
    said: str
    mend: str = ""


def machine_checks() -> Iterator[Check]:
    """Python, packages, devices, cores, memory and disk."""
    yield _python()
    for package, wanted in (("grpcio", FAIL), ("torch", WARN), ("transformers", WARN), ("peft", WARN)):
        yield _package(package, wanted)
    yield _device()
    yield Check(OK, "cores", str(os.cpu_count()))
    yield _memory()
    yield _disk(Path.cwd())
    yield _cache()


def nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    found = folder.absolute()
    while not found.exists():
        found = found.parent
    return found


def _python() -> Check:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    return Check(OK if good else FAIL, "python", version, "" if good else "fedtune needs Python 3.11 or newer")


def _package(name: str, otherwise: str) -> Check:
    try:
        return Check(OK, name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        mend = "pip install 'fedtune[client]'; a coordinator does without"
        return Check(FAIL if otherwise == FAIL else WARN, name, "not installed", mend)


def _device() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check(OK, "device", "no torch, so none is needed")
    import torch

    if torch.cuda.is_available():
        return Check(OK, "device", f"cuda: {torch.cuda.get_device_name()}")
    return Check(OK, "device", f"cpu, {torch.get_num_threads()} threads; small models only")


def _memory() -> Check:
    try:
        free = _meminfo()["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return Check(OK, "memory", "unknown on this system")
    mend = "" if free > _LOW_MEMORY else "Fewer simulation.concurrency, a smaller batch_size, or training.checkpointing"
    return Check(WARN if mend else OK, "memory", f"{free / 1e9:.1f} GB free", mend)


def _meminfo() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {line[0].rstrip(":"): float(line[1]) * 1024 for line in lines}


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    mend = "" if free > _LOW_DISK else "Free some space: the demo model takes 0.6 GB, each round an adapter"
    return Check(WARN if mend else OK, "disk", f"{free / 1e9:.1f} GB free in {folder}", mend)


def _cache() -> Check:
    from fedtune.locate import cache_folder

    folder = nearest(cache_folder())
    if os.access(folder, os.W_OK):
        return Check(OK, "cache", str(cache_folder()))
    return Check(FAIL, "cache", f"{cache_folder()} cannot be written", "Set FEDTUNE_CACHE to another folder")
