"""A causal language model called step by step with its cache: many texts at once, whatever it is wrapped in.

Models with full attention in every layer write into preallocated buffers; those with sliding windows or recurrent states
keep transformers' own cache. Models whose blocks are known are stepped without the module machinery around them.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from locum.errors import UserError
from locum.models.cache import TreeCache, require_tree_cache
from locum.models.lean import lean_forward
from locum.models.scoring import unwrapped
from locum.tokens import logprobs as lp
from locum.tokens.rollouts import pad_left

__all__ = ["Caller"]


class Caller:
    """How a model is called: with which arguments, cache and masks. Call it in evaluation mode and without gradients.

    `alike` is true where texts that are read together must have one length: padding would enter a recurrent state.

    Raises: UserError for models that keep their past where its rows cannot be repeated, and adapters with virtual tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = getattr(model, "module", model)  # DDP's own forward waits for other processes
        self.inner = inner = unwrapped(model)
        name = type(inner).__name__
        if any(getattr(c, "is_prompt_learning", False) for c in getattr(self.model, "peft_config", {}).values()):
            raise UserError(
                "adapters that put virtual tokens before a text cannot be sampled from here; use LoRA or its like"
            )
        self.known = inspect.signature(type(inner).forward).parameters
        self.holder = next((n for n in ("past_key_values", "cache_params") if n in self.known), "")
        if not self.holder or not getattr(inner, "_supports_default_dynamic_cache", lambda: True)():
            raise UserError(f"{name} keeps its past in a cache of its own kind, whose rows cannot be repeated here")
        config = inner.config.get_text_config()
        try:
            require_tree_cache(inner, name)
            self.layers = config.num_hidden_layers
        except UserError:
            self.layers = 0  # transformers' own cache: windows slide, states recur
        kinds = set(getattr(config, "layer_types", None) or [])
        self.alike = bool(getattr(inner, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention"})
        plain = self.layers and "position_ids" in self.known and not getattr(config, "alibi", False)
        self.ready = plain and getattr(inner.config, "_attn_implementation", None) == "sdpa"  # takes a mask as it is
        calm = inner.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        self.lean = lean_forward(inner) if plain and calm and self.model is inner else None

    def read(self, texts: list[tuple[int, ...]], width: int) -> tuple[Tensor, Any, Bool[Tensor, "texts P"]]:
        """The logits behind the texts, their cache with room for `width` tokens more, and true on real tokens."""
        from transformers import DynamicCache

        ids, real = pad_left(texts, self.inner.device)
        length = ids.shape[1]
        cache = TreeCache(self.layers, length + width) if self.layers else DynamicCache(config=self.inner.config)
        mask = None if len(texts[-1]) == length else real.long()  # the last is the shortest
        return self._call(ids, lp.positions(real), mask, cache), cache, real

    def step(
        self, token: Int[Tensor, " r"], position: Int[Tensor, " r"], mask: Bool[Tensor, "r entries"] | None, cache: Any
    ) -> Float[Tensor, "r V"]:
        """The logits behind one token more per row."""
        whole = None if mask is None else mask[:, None, None] if self.ready or self.lean else mask.long()
        if self.lean is not None:
            return self.lean(token[:, None], position[:, None], whole, cache, True)
        return self._call(token[:, None], position[:, None], whole, cache)

    def _call(self, ids: Tensor, positions: Tensor, mask: Shaped[Tensor, "r ..."] | None, cache: Any) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask, self.holder: cache, "use_cache": True}
        if "position_ids" in self.known:
            given["position_ids"] = positions
        if "logits_to_keep" in self.known:
            given["logits_to_keep"] = 1
        return self.model(**given).logits[:, -1]
