"""A run on the disk: weights, optimizer and stages' memory as safetensors, everything else as JSON; whole or not there.

<out>/log.jsonl               the figures of every step
<out>/checkpoint-<step>/      state.safetensors, state.json (written last)
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from locum.errors import UserError
from locum.files import write_atomically

__all__ = ["last", "load", "prune", "save"]

PREFIX, TENSORS, STATE = "checkpoint-", "state.safetensors", "state.json"


def save(
    out: Path, step: int, modules: Mapping[str, nn.Module], optimizer: Any, memory: Any, state: dict[str, Any]
) -> Path:
    """Write a checkpoint.

    Args:
        modules: what is trained, by name; parameters that are frozen are left out, buffers are not.
        memory: plain data and tensors, nested in dicts and lists.
        state: plain data.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": x for key, x in _trained(module).items()}
    packed = optimizer.state_dict()
    plain = {"optimizer": _strip(packed, "optimizer", tensors), "memory": _strip(memory, "memory", tensors)} | state
    folder = out / f"{PREFIX}{step}"
    shutil.rmtree(folder, ignore_errors=True)  # half of one, or of the same step: written again from the start
    folder.mkdir(parents=True)
    beside = folder / f".{TENSORS}.{os.getpid()}"
    save_file({key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}, beside)
    beside.replace(folder / TENSORS)
    write_atomically(folder / STATE, json.dumps(plain, indent=1))
    return folder


def load(folder: Path, modules: Mapping[str, nn.Module], optimizer: Any) -> tuple[Any, dict[str, Any]]:
    """Put modules and optimizer back as they were; the memory and the state.

    Raises: UserError where the checkpoint is of another model.
    """
    tensors = load_file(folder / TENSORS)
    plain = json.loads((folder / STATE).read_text("utf-8"))
    for name, module in modules.items():
        own = _trained(module)
        found = {key: tensors.get(f"{name}/{key}") for key in own}
        for key, x in own.items():
            y = found[key]
            if y is None or y.shape != x.shape:
                raise UserError(
                    f"the checkpoint {str(folder)!r} is of another model: it has no {key} of shape {list(x.shape)}"
                )
            with torch.no_grad():
                x.copy_(y)
    optimizer.load_state_dict(_fill(plain.pop("optimizer"), tensors))
    return _fill(plain.pop("memory"), tensors), plain


def last(out: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = sorted(out.glob(f"{PREFIX}*"), key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)
    return next((p for p in found if (p / STATE).exists() and (p / TENSORS).exists()), None)


def prune(out: Path, keep: int) -> None:
    """Leave the newest few."""
    found = sorted(out.glob(f"{PREFIX}*"), key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)
    for folder in found[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, and buffers that are kept."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: x for name, x in module.state_dict(keep_vars=True).items() if name not in frozen}


def _strip(value: Any, at: str, into: dict[str, Tensor]) -> Any:
    """Plain data, with tensors moved to where they have a name."""
    if torch.is_tensor(value):
        into[at] = value
        return {"tensor": at}
    if isinstance(value, dict):
        return {"items": [[_strip(k, f"{at}/k", into), _strip(v, f"{at}/{k}", into)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_strip(v, f"{at}/{i}", into) for i, v in enumerate(value)]
    return value


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {_fill(k, tensors): _fill(v, tensors) for k, v in value["items"]}
    if isinstance(value, list):
        return [_fill(v, tensors) for v in value]
    return value
