"""What every training needs: adapters, and no dropout where two forwards of a model are compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from locum.errors import MissingExtra
from locum.method import require

__all__ = ["LoRA", "without_dropout"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on all linear layers but the head.

    Args:
        rank: >= 1.
        alpha: scale of what they add, over the rank; > 0.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        require(self, "rank", self.rank >= 1, ">= 1")
        require(self, "alpha", self.alpha > 0, "> 0")

    def on(self, model: Any, seed: int = 0) -> Any:
        """A PEFT model with fresh adapters; the same for the same seed."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise MissingExtra("LoRA", "align") from None
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return get_peft_model(model, config)

    @contextmanager
    def lent(self, model: Any, seed: int = 0) -> Iterator[Any]:
        """A PEFT model with fresh adapters; at the end the model is what it was."""
        wrapped = self.on(model, seed)
        try:
            yield wrapped
        finally:
            wrapped.unload()
            vars(model).pop("peft_config", None)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: two forwards of one model are then the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
