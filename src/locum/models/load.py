"""Loading a causal language model by name: the embedded default, the tiny draft, a directory, or a name on a hub."""

import sys
from pathlib import Path
from typing import Any

import torch

from locum.errors import UserError
from locum.models import smollm2
from locum.models.language_model import LM

DRAFT = "smollm2-draft"
_DRAFT_DIR = Path(__file__).with_name("draft")


def load(
    name: str = smollm2.NAME,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    progress: smollm2.Progress | None = None,
) -> LM:
    """Load a model and its tokenizer.

    Args:
        name: "smollm2-135m-instruct" (made ready on first use), "smollm2-draft" (ships with Locum, same tokenizer), a directory that
            `from_pretrained` reads, or a hub name.
        dtype: torch dtype or its name; default float32 on a CPU, else bfloat16.
        device: default the first CUDA device if there is one, else the CPU.
        progress: receives a line about each step that takes long; default standard error.

    Raises: UserError if there is no such model here and none can be had, or it is no causal language model.
    """
    device = _device(device)
    dtype = _dtype(dtype) if dtype is not None else (torch.float32 if device.type == "cpu" else torch.bfloat16)
    say = progress or (lambda line: print(f"locum: {line}", file=sys.stderr, flush=True))
    where, tokenizer = str(name), None
    if name == smollm2.NAME:
        where = str(smollm2.ensure(say))
    elif name == DRAFT:
        where = str(_DRAFT_DIR)
        tokenizer = str(smollm2.ensure(say))  # one vocabulary for both
    elif not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"no model {name!r}: give {smollm2.NAME!r}, {DRAFT!r}, an existing directory or a hub name like 'owner/name'"
        )
    return _from_pretrained(where, tokenizer or where, name, dtype, device)


def _from_pretrained(where: str, tokenizer: str, name: str, dtype: torch.dtype, device: torch.device) -> LM:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        text = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load model {name!r}: {first}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return LM(model.to(device).eval(), text, name)


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device must be one that torch knows, like cpu or cuda:0, got {device!r}") from None


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise UserError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    return known[dtype]
