"""Small byte-level language models, trained on the spot on Python's standard library, and prompts from files held out.

Experiments on decoding need a target and a draft that really resemble each other and can be had on any machine: here a
target of 4 layers of width 128 and a draft of 1 layer of width 64, each a minute or two of training on two cores, made
once and kept in the cache directory under a hash of everything that decides the result (settings, text, versions).

    target, draft = train(layers=4, width=128), train(layers=1, width=64)
    for ids in stdlib_prompts(200, 64, seed=0): ...

With the defaults the two reach 1.49 and 1.76 nats per byte on the held-out files of Python 3.11 (0.92 and 0.09 million
parameters, 1.8 MB read).

A token is a byte, so the vocabulary is 256 and `LM.encode` and `LM.decode` need no tokenizer file. No token ends a text.
"""

import hashlib
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from locum.errors import UserError
from locum.models import LM
from locum.tasks.made import Progress, fit, kept, llama, require_sizes

__all__ = ["ByteTokenizer", "held_out_loss", "stdlib_prompts", "train"]

VOCABULARY = 256
HEAD = 32  # width of an attention head
CONTEXT = 160  # bytes a training window holds: prompts of 64, 64 new ones, and a deep draft tree
HELD_OUT = 10  # every tenth file is never trained on
_APART = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class ByteTokenizer:
    """Text as UTF-8 bytes, with the few methods that an `LM` asks a tokenizer for."""

    eos_token_id = None
    chat_template = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i:02x}>": i for i in range(VOCABULARY)}


def train(
    layers: int = 4,
    width: int = 128,
    steps: int = 700,
    seed: int = 0,
    *,
    batch: int = 16,
    learning_rate: float = 4e-3,
    progress: Progress | None = None,
) -> LM:
    """A Llama over bytes that has read `steps * batch` windows of standard-library source; from the cache if it was made before.

    Args:
        layers, width: its size; width is a multiple of 32 (heads of 32).
        steps, batch: optimiser steps (AdamW, cosine) and windows of 160 bytes per step.
        seed: of weights and of the order of windows.
        progress: called as progress("training 4x128", done, total) at every step.

    Raises: UserError for a size that is not positive or a width that does not divide into heads.
    """
    sizes = {"layers": layers, "width": width, "steps": steps, "batch": batch}
    require_sizes("charlm.train", HEAD, **sizes)
    text, _ = _library()
    settings = {
        **sizes,
        "seed": seed,
        "learning_rate": learning_rate,
        "text": hashlib.sha256(text).hexdigest(),
        "context": CONTEXT,
        "torch": torch.__version__,
        "recipe": 1,  # raised when the training below changes
    }

    def make() -> Any:
        return _fit(_fresh(layers, width, seed), text, steps, batch, seed, learning_rate, progress)

    return LM(kept("charlm", f"{layers}x{width}", settings, make), ByteTokenizer(), f"charlm-{layers}x{width}")


def stdlib_prompts(n: int, length: int, seed: int = 0) -> list[list[int]]:
    """n pieces of `length` bytes from files no model of this module was trained on, each beginning at the start of a line.

    Raises: UserError when the held-out files have no piece of that length.
    """
    _, files = _library()
    long = [file for file in files if len(file) > length]
    if n < 1 or length < 1 or not long:
        raise UserError(
            f"stdlib_prompts: n and length must be at least 1 and a held-out file longer, got {n} and {length}"
        )
    rng = random.Random(f"{seed}/prompts")
    pieces: list[list[int]] = []
    while len(pieces) < n:
        file = rng.choices(long, [len(file) for file in long])[0]
        start = file.rfind(b"\n", 0, rng.randrange(len(file) - length + 1)) + 1
        pieces.append(list(file[start : start + length]))
    return pieces


@torch.inference_mode()
def held_out_loss(lm: LM, windows: int = 64) -> float:
    """Mean nats per byte on windows of the held-out files, the first 32 bytes of a window not counted."""
    ids = torch.tensor(stdlib_prompts(windows, CONTEXT + 1, seed=0), device=lm.device)
    logits = lm.model(input_ids=ids[:, :-1]).logits[:, 32:].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 33:].flatten()).item()


@cache
def _library() -> tuple[bytes, tuple[bytes, ...]]:
    """The standard library's own source: text to train on, and the files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p.read_bytes() for p in _sources(root)]
    kept = tuple(file for i, file in enumerate(files) if i % HELD_OUT == 0)
    return b"\n".join(file for i, file in enumerate(files) if i % HELD_OUT), kept


def _sources(root: Path) -> Iterator[Path]:
    found = [p for p in root.rglob("*.py") if not _APART & set(p.relative_to(root).parts)]
    if not found:
        raise UserError(
            f"no Python source in {str(root)!r}: this Python ({sys.version.split()[0]}) comes without its library's text"
        )
    return iter(sorted(found, key=lambda p: p.relative_to(root).as_posix()))


def _fresh(layers: int, width: int, seed: int) -> Any:
    return llama(VOCABULARY, layers, width, HEAD, seed)


def _fit(
    model: Any, text: bytes, steps: int, batch: int, seed: int, learning_rate: float, progress: Progress | None
) -> Any:
    data, generator = torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.Generator().manual_seed(seed)
    windows = (_windows(data, batch, generator) for _ in range(steps))
    name = f"training {model.config.num_hidden_layers}x{model.config.hidden_size}"
    return fit(model, ((ids[:, :-1], ids[:, 1:]) for ids in windows), steps, learning_rate, name, progress)


def _windows(data: Tensor, batch: int, generator: torch.Generator) -> Int[Tensor, "batch context_and_one"]:
    starts = torch.randint(len(data) - CONTEXT, (batch, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)].long()
