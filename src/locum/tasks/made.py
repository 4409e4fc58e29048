"""Llamas trained on the spot: made once, then kept in the cache directory under a hash of everything that decides them."""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from locum.errors import UserError
from locum.models import cache_dir

__all__ = ["Batch", "Progress", "fit", "kept", "llama", "require_sizes"]

Progress = Callable[[str, int, int], None]
Batch = tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]


def llama(vocab_size: int, layers: int, width: int, head: int, seed: int, **config: Any) -> Any:
    """An untrained Llama; no global state is touched.

    Args:
        head: width of an attention head; it divides `width`.
        config: what else its configuration holds, such as eos_token_id.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        max_position_embeddings=4096,
        initializer_range=0.5 * width**-0.5,
        tie_word_embeddings=False,
        **(ends | config),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(settings)


def fit(
    model: Any, batches: Iterable[Batch], steps: int, learning_rate: float, name: str, progress: Progress | None = None
) -> Any:
    """Train with AdamW: 50 steps of warm-up, then a cosine down to 0. The model is returned in evaluation mode.

    Args:
        batches: one per step: ids, and what each position is to predict of the next one, -100 where nothing is.
        progress: called as progress(name, done, total) at every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    for step, (ids, labels) in zip(range(steps), batches, strict=False):
        rate = learning_rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(name, step + 1, steps)
    return model.eval()


def kept(kind: str, name: str, settings: Mapping[str, Any], make: Callable[[], Any], tokenizer: Any = None) -> Any:
    """The model that `make` makes, from the cache if it was made before with these settings.

    Args:
        kind, name: its folder in the cache directory, and how its own folder's name begins.
        settings: everything that decides the result, as plain data.
        tokenizer: kept beside it, so that the folder is a checkpoint like any other.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    where = cache_dir() / kind / f"{name}-{key}"
    if not (where / "config.json").exists():
        _keep(make(), tokenizer, settings, where)
    return _load(where)


def require_sizes(maker: str, head: int, **sizes: int) -> None:
    """Refuse sizes that are not positive, and a width that does not divide into heads."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{maker}: {name} must be at least 1, got {value}")
    if sizes["width"] % head:
        raise UserError(f"{maker}: width must be a multiple of {head}, got {sizes['width']}")


def _keep(model: Any, tokenizer: Any, settings: Mapping[str, Any], where: Path) -> None:
    """Write the model into the cache: all of it or nothing."""
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        with _without_bars():
            model.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        (made / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        try:
            made.replace(where)
        except OSError:
            if not (where / "config.json").exists():  # not simply another process that was faster
                raise


def _load(where: Path) -> Any:
    from transformers import LlamaForCausalLM

    with _without_bars():
        return LlamaForCausalLM.from_pretrained(where, dtype=torch.float32).eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Reading and writing so little needs no bar of its own."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
