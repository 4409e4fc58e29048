"""Tiny random models of several architectures, for the tests of sessions and of the lean forward."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from locum.models import LM

VOCAB = 40
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LEAN: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=4),
    "llama-gqa": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2),
    "llama-tied-wide-heads": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True
    ),
    "llama-biases": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-linear-rope": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama-llama3-rope": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, rope_parameters=_LLAMA3),
    "mistral": lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
}
MODULE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-dynamic-rope": lambda: LlamaConfig(
        **_SIZES, num_key_value_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-gelu": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, hidden_act="gelu"),
    "gpt2": lambda: GPT2Config(**_GPT2, bos_token_id=None, eos_token_id=None),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES),
}


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> LM:
    """A random model in evaluation mode; biases and norms are made random too, so that a forgotten one is seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                torch.nn.init.normal_(p, mean=float("norm" in name or "ln" in name), std=0.1)
    return LM(model.to(dtype).eval(), name=config.model_type)


def family(name: str, **kwargs) -> LM:
    return build((LEAN | MODULE)[name](), **kwargs)
