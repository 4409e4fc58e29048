"""A forward of a Llama-shaped decoder without the module machinery around it.

In small batches a CPU step reads every weight once and computes little, so what can be won is the time between the matrix products and
the way they are called. The weights are the model's own, read at every call: nothing is copied, fused or quantised.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from locum.models.cache import TreeCache

_SHAPES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}  # same block: RMS norm, rotary GQA, gated MLP
_TORCH_PARTS = {nn.Linear, nn.Embedding, nn.SiLU, nn.ModuleList}
_STREAMED = 1 << 18  # numbers in a weight (1 MB) from which on it is read anew at every product

LeanForward = Callable[[Tensor, Tensor, Tensor | None, TreeCache, bool], Tensor]


def lean_forward(model: Any) -> LeanForward | None:
    """The lean forward of `model`, or None where its blocks are not exactly the known ones (adapters, hooks, other activations)."""
    config = model.config
    if type(model).__name__ not in _SHAPES or getattr(config, "hidden_act", None) != "silu":
        return None
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in {
        "default",
        "linear",
        "llama3",
    }:
        return None
    if not all(_plain(module) for module in model.modules()):
        return None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    decoder = model.model
    eps, width = config.rms_norm_eps, (config.hidden_size,)
    head_dim = decoder.layers[0].self_attn.head_dim
    rotation = _Rotation(decoder.rotary_emb, head_dim)

    def forward(
        ids: Int[Tensor, "batch nodes"],
        positions: Int[Tensor, "batch nodes"],
        mask: Shaped[Tensor, "#batch 1 #nodes entries"] | None,
        cache: TreeCache,
        last_only: bool,
    ) -> Float[Tensor, "rows vocab"]:
        b, n = ids.shape
        x = F.embedding(ids.flatten(), decoder.embed_tokens.weight)  # a row per token, text by text
        cos, sin = (y.unsqueeze(1) for y in rotation(positions, x))
        for index, block in enumerate(decoder.layers):
            attention, mlp = block.self_attn, block.mlp
            h = F.rms_norm(x, width, block.input_layernorm.weight, eps)
            q = _linear(h, attention.q_proj).view(b, n, heads, head_dim).transpose(1, 2)
            k = _linear(h, attention.k_proj).view(b, n, kv_heads, head_dim).transpose(1, 2)
            v = _linear(h, attention.v_proj).view(b, n, kv_heads, head_dim).transpose(1, 2)
            q, k = (y * cos + y.roll(head_dim // 2, -1) * sin for y in (q, k))
            keys, values = cache.layers[index].update(k, v)
            a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=heads != kv_heads)
            x = x + _linear(a.transpose(1, 2).reshape(b * n, heads * head_dim), attention.o_proj)
            h = F.rms_norm(x, width, block.post_attention_layernorm.weight, eps)
            x = x + _linear(F.silu(_linear(h, mlp.gate_proj)) * _linear(h, mlp.up_proj), mlp.down_proj)
        if last_only:
            x = x[n - 1 :: n]
        return _linear(F.rms_norm(x, width, decoder.norm.weight, eps), model.lm_head)

    return forward


def _plain(module: nn.Module) -> bool:
    """The module is what the model's class says: no adapter, wrapper or quantised layer, no hook, no forward of its own."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    return type(module) in _TORCH_PARTS or type(module).__module__.startswith("transformers.")


def _linear(x: Float[Tensor, "rows inputs"], layer: nn.Linear) -> Float[Tensor, "rows outputs"]:
    """`layer(x)`. For a few float32 rows on a CPU, weights times columns: the library then streams each weight once.

    Measured with MKL on an AVX2 machine, all products of a 135M model, 2 threads: 1, 2, 4, 8, 16 rows take 35, 64, 71, 80, 95 ms as
    rows times weights and 35, 23, 24, 42, 53 ms as weights times columns. A product with one vector uses one thread, so with more
    threads one row is computed as two equal columns. A weight that stays in the processor's cache is not streamed: there rows times
    weights take half to a third of the time (AMD EPYC, 1 thread, up to 256 x 256).
    """
    rows, few = x.shape[0], layer.weight.numel() < _STREAMED
    alone = rows == 1 and torch.get_num_threads() == 1
    if alone or few or rows > 64 or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, layer.weight, layer.bias)
    columns = x.expand(2, -1) if rows == 1 else x
    y = (layer.weight @ columns.contiguous().t()).t()[:rows].contiguous()
    return y if layer.bias is None else y + layer.bias


class _Rotation:
    """Cosines and signed sines for every position so far, made by the model's own rotary module and kept."""

    def __init__(self, rotary: nn.Module, head_dim: int):
        self.rotary, self.head_dim = rotary, head_dim
        self.cos = self.sin = torch.empty(0, head_dim)

    def __call__(self, positions: Int[Tensor, "batch nodes"], like: Tensor) -> tuple[Tensor, Tensor]:
        needed = int(positions.max()) + 1
        if needed > len(self.cos) or self.cos.dtype != like.dtype or self.cos.device != like.device:
            steps = torch.arange(max(needed, 2 * len(self.cos), 256), device=like.device)
            cos, sin = self.rotary(like[None], steps[None])
            sign = torch.ones(self.head_dim, dtype=like.dtype, device=like.device)
            sign[: self.head_dim // 2] = -1  # rotate_half: (-second half, first half), written as a roll
            self.cos, self.sin = cos[0], sin[0] * sign
        return self.cos[positions], self.sin[positions]
