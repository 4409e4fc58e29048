"""How far a fit is, on the disk: one safetensors file with parameters, optimizer state and the objective's trace.

A JSON text in its header says what run it is of: the method, the names of the parameters, and a fingerprint of what went in.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from locum.errors import UserError
from locum.files import write_atomically
from locum.method import to_dict

__all__ = ["State", "digest", "read", "resume", "write"]


@dataclass(eq=False)
class State:
    """How far a run is."""

    about: dict[str, Any]
    params: Any
    optimizer: Any
    trace: list[np.ndarray]
    steps: int = 0
    seconds: float = 0.0
    ms_per_step: float = float("nan")


def digest(tree: Any) -> str:
    """A fingerprint of arrays and numbers, so that a checkpoint is not taken for another run's."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode())
        known = isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float)
        array = np.asarray(leaf) if known else None
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes() if array is not None else b"-")
    return found.hexdigest()[:16]


def write(path: Path, state: State, method: Any) -> None:
    tensors = {f"params.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state.params))}
    tensors |= {f"optimizer.{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state.optimizer))}
    tensors["trace"] = np.concatenate(state.trace) if state.trace else np.zeros(0, np.float32)
    ms = state.ms_per_step if np.isfinite(state.ms_per_step) else None
    about = state.about | {"method": to_dict(method), "steps": state.steps, "seconds": state.seconds, "ms_per_step": ms}
    write_atomically(
        path, save({name: np.asarray(x, order="C") for name, x in tensors.items()}, {"locum": json.dumps(about)})
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["locum"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} is no checkpoint of a fit: {' '.join(str(error).split())}") from None


def resume(state: State, path: Path, method: Any) -> None:
    about, tensors = read(path)
    theirs, mine = about["method"], to_dict(method)
    for field in mine.keys() - {"steps"}:
        if theirs.get(field) != mine[field]:
            raise UserError(
                f"{path} is of a fit with {field} {theirs.get(field)!r}, not {mine[field]!r}: name another file"
            )
    if about["leaves"] != state.about["leaves"] or about["input"] != state.about["input"]:
        raise UserError(f"{path} is of a fit with other starting parameters, data or args: name another file")
    if about["steps"] > method.steps:
        raise UserError(
            f"{path} is {about['steps']} steps on, ProgVI.steps is {method.steps}: ask for as many, or name another file"
        )

    def back(tree: Any, name: str) -> Any:
        leaves, kind = jax.tree.flatten(tree)
        return kind.unflatten([jnp.asarray(tensors[f"{name}.{i}"]) for i in range(len(leaves))])

    state.params, state.optimizer = back(state.params, "params"), back(state.optimizer, "optimizer")
    state.trace, state.steps, state.seconds = [tensors["trace"]], about["steps"], about["seconds"]
    state.ms_per_step = about["ms_per_step"] if about["ms_per_step"] is not None else float("nan")
