"""What a forward of several tokens costs, next to a forward of one: measured once per model and machine, then read from disk."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from locum.models import LM, cache_dir

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_ROUNDS = 5


@dataclass(frozen=True)
class ForwardCost:
    """Seconds of a forward by the number of tokens it is fed, interpolated; never falling with size."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: int | np.ndarray) -> float | np.ndarray:
        beyond = np.maximum(np.asarray(tokens) - self.sizes[-1], 0)
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
        return np.interp(tokens, self.sizes, self.seconds) + beyond * slope

    def ratio(self, tokens: int | np.ndarray) -> float | np.ndarray:
        """Cost in forwards of one token."""
        return self(tokens) / self.seconds[0]


def forward_cost(lm: LM, remeasure: bool = False) -> ForwardCost:
    """The cost of this model's forwards here; a second or two the first time, kept in the user's cache directory.

    Sizes are measured in turn, round by round, and the fastest round counts: what other programs do to the machine hits all alike.
    """
    path = cache_dir() / "forward-cost" / f"{_fingerprint(lm)}.json"
    if path.exists() and not remeasure:
        return _read(path)
    room = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or 4 * SIZES[-1]
    sizes = [n for n in SIZES if n < room // 2]
    session = lm.session(256)
    session.prefill([1] * min(2 * SIZES[-1], room - sizes[-1]))
    best = dict.fromkeys(sizes, float("inf"))
    for _ in range(_ROUNDS):
        for n in sizes:
            began = time.perf_counter()
            session.extend([1] * n, list(range(-1, n - 1)))[0, 0].item()
            best[n] = min(best[n], time.perf_counter() - began)
            session.commit([])
    seconds = np.maximum.accumulate([best[n] for n in sizes]).tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps({"model": lm.name, "sizes": sizes, "seconds": seconds}))
    scratch.replace(path)
    return _read(path)


def _read(path: Path) -> ForwardCost:
    kept = json.loads(path.read_text())
    return ForwardCost(tuple(kept["sizes"]), tuple(kept["seconds"]))


def _fingerprint(lm: LM) -> str:
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else _processor()
    what = [lm.model.config.to_json_string(), str(lm.dtype), device, torch.get_num_threads(), torch.__version__]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _processor() -> str:
    return torch.backends.cpu.get_cpu_capability()
