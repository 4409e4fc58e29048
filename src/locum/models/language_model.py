"""A causal language model and its tokenizer, as every family takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from locum.errors import UserError
from locum.models.session import Session


@dataclass(frozen=True, eq=False)
class LM:
    """A Hugging Face causal language model, with its tokenizer where there is one.

    Args:
        model: the model, in evaluation mode and on its device.
        tokenizer: its tokenizer; None for models over plain ids.
        name: what messages and tables call it.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    name: str = "model"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @cached_property
    def vocab_size(self) -> int:
        """Width of the logits: it may exceed the tokenizer's vocabulary, which is often padded."""
        head = self.model.get_output_embeddings()
        return head.weight.shape[0] if head is not None else self.model.config.get_text_config().vocab_size

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text: those of the generation config, and the end of a chat turn where the tokenizer has one."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {configured} if isinstance(configured, int) else set(configured or ())
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)

    def session(self, capacity: int = 1024) -> Session:
        return Session(self.model, capacity, name=self.name)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer().encode(text))

    def chat(self, text: str) -> list[int]:
        """Ids of a user's turn and the opening of the answer; the text as it is where the tokenizer has no chat template."""
        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            return self.encode(text)
        turn = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer().decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UserError(f"model {self.name!r} has no tokenizer; pass token ids, or an LM with a tokenizer")
        return self.tokenizer


def require_same_vocabulary(target: LM, draft: LM, role: str = "draft") -> None:
    """Refuse a draft, or another model with a `role` beside the target, whose ids mean something else.

    Raises: UserError naming both models and the first difference.
    """
    sizes = target.vocab_size, draft.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{role} {draft.name!r} has {sizes[1]} tokens and model {target.name!r} has {sizes[0]}; they must share one vocabulary"
        )
    if target.tokenizer is None or draft.tokenizer is None or target.tokenizer is draft.tokenizer:
        return
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        token = next(t for t in sorted(ours.keys() | theirs.keys()) if ours.get(t) != theirs.get(t))
        raise UserError(
            f"{role} {draft.name!r} and model {target.name!r} must share one vocabulary, but token {token!r} is "
            f"{theirs.get(token)} in the one and {ours.get(token)} in the other"
        )


def tiny(
    vocab_size: int = 32,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    scale: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> LM:
    """A small random Llama over plain ids; equal seeds give equal weights. `scale` is the standard deviation of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return LM(model.to(dtype).eval(), name=f"tiny-{vocab_size}-{seed}")
