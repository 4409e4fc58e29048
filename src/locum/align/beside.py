"""Models that stand beside a policy, trained from the policy as it is now: a guide, teachers, models of right and wrong.

Of a PEFT model each is one more adapter on the one base; else it is a copy. Every one is trained in a folder of its own
and kept there, so a run that was stopped trains none of them twice.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from locum.align.base import Method
from locum.align.trainer import Trainer, align_arguments, last_checkpoint
from locum.errors import UserError

__all__ = ["train_beside"]

DONE = "trained.txt"  # written when a model is whole


def train_beside(
    model: Any, name: str, method: Method, rows: Any, args: Any = None, **settings: Any
) -> nn.Module | str:
    """Train a model from the policy; the policy stays as it is.

    Args:
        model: the policy.
        name: of the model; its folder in the output folder, and of a PEFT model its adapter.
        method: e.g. `DPO` or `SFT`.
        rows, settings: the data, and whatever else `Trainer` takes.
        args: training arguments of the policy's own training; the model takes them over.

    Returns: what `Trainer` takes among its `models`: the model, or the adapter's name.
    """
    own = copy.copy(args or align_arguments("align-output"))
    folder = Path(own.output_dir) / name
    own.output_dir = str(folder)
    known = (folder / DONE).exists()
    if hasattr(model, "peft_config"):
        with _another_adapter(model, name) as start:
            if known:
                _load_adapter(model, folder / name, name)
            else:
                _train(Trainer(model, method, own, rows, models=_reference(method, start), **settings), folder)
        return name
    if known:
        return type(model).from_pretrained(folder, dtype=model.dtype).to(model.device).eval().requires_grad_(False)
    trainer = Trainer(copy.deepcopy(model), method, own, rows, **settings)
    _train(trainer, folder)
    return trainer.accelerator.unwrap_model(trainer.model).eval().requires_grad_(False)


def _reference(method: Method, start: str) -> dict[str, Any]:
    return {"ref": start} if "ref" in method.frozen else {}


def _train(trainer: Trainer, folder: Path) -> None:
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        (folder / DONE).write_text(f"{trainer.state.global_step} steps\n", "utf-8")


def _load_adapter(model: Any, folder: Path, name: str) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    where = (
        folder if folder.is_dir() else folder.parent
    )  # PEFT keeps an adapter that is not the default in a folder of its name
    set_peft_model_state_dict(model, load_file(where / "adapter_model.safetensors"), adapter_name=name)


@contextmanager
def _another_adapter(model: Any, name: str) -> Iterator[str]:
    """A copy of a PEFT model's active adapter, trained in the block; gives the name of the one that was active."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if name in model.peft_config:
        raise UserError(f"the model has an adapter {name!r} already; give it as such, or delete it first")
    start = model.active_adapter
    trained = [(p, p.requires_grad) for p in model.parameters()]
    weights = get_peft_model_state_dict(model, adapter_name=start)
    model.add_adapter(name, copy.deepcopy(model.peft_config[start]))
    set_peft_model_state_dict(model, weights, adapter_name=name)
    model.set_adapter(name)
    try:
        yield start
    finally:
        model.set_adapter(start)
        for parameter, was in trained:
            parameter.requires_grad_(was)
