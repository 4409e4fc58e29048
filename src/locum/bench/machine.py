"""Where and with what something was measured. It goes into every row: a time without its machine says nothing."""

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PeakMemory", "environment", "machine", "now", "versions"]


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def machine() -> str:
    """This machine in one line: processor, usable cores, memory, accelerator, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_processor(), f"{cores} cores"]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not every system tells
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    torch = sys.modules.get("torch")  # if nobody has loaded it, nothing was measured on its device
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, platform.system()])


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a result."""
    found = {"python": platform.python_version()}
    for package in ("locum", "torch", "transformers", "tokenizers", "numpy", "scipy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def environment() -> dict[str, Any]:
    """Machine, versions and date of a measurement that ends now."""
    return {"machine": machine(), "versions": versions(), "date": now()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class PeakMemory:
    """How much memory the body of a ``with`` needed beyond what was in use when it began.

    On CUDA: the allocator's peak less what was allocated. On a CPU under Linux: the kernel's own high-water mark of this
    process' resident memory, reset at the start; memory that the process already held and used again does not count.
    Elsewhere it is not known. `megabytes` is the figure (None when not known), `how` says how it was measured.
    """

    megabytes: float | None = None
    how: str = "not measured on this system"

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        self._peak: Callable[[], float] | None = None
        self._before = 0.0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            self._peak, self.how = torch.cuda.max_memory_allocated, "CUDA allocator: peak less start"
            return self
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # give back what was freed, or the next to need it seems to need nothing
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see man 5 proc
            self._before = _resident("VmHWM")
            self._peak, self.how = lambda: _resident("VmHWM"), "resident memory of the process: peak less start"
        return self

    def __exit__(self, *_: object) -> None:
        if self._peak is not None:
            self.megabytes = max(0.0, self._peak() - self._before) / 1e6


def _resident(field: str) -> float:
    """A field of this process' memory status, in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise OSError(f"no {field}")
