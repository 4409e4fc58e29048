"""What all tests share: one thread per process, reproducible examples, and GPU tests only where there is a GPU."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("locum", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("locum")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if "gpu" in item.keywords]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models on disk, as a user would have them: a target, its draft, one with other tokens, and two whose caches
    cannot be cut back (a sliding window, a recurrent state). Their tokens are bytes.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
    )

    root = tmp_path_factory.mktemp("models")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 256, "bos_token_id": None}
    llama = size | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    llama |= {"max_position_embeddings": 512, "initializer_range": 0.3}
    made = {
        "target": (LlamaForCausalLM, LlamaConfig(**llama), letters),
        "draft": (LlamaForCausalLM, LlamaConfig(**llama), letters),
        "foreign": (LlamaForCausalLM, LlamaConfig(**llama), letters[::-1]),
        "sliding": (MistralForCausalLM, MistralConfig(**llama, sliding_window=16), letters),
        "recurrent": (MambaForCausalLM, MambaConfig(**size, state_size=4, pad_token_id=None), letters),
    }
    for seed, (name, (cls, config, alphabet)) in enumerate(made.items()):
        vocabulary = {letter: i for i, letter in enumerate(alphabet)} | {"<end>": 256}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(root / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cls(config).save_pretrained(root / name)
    return {name: str(root / name) for name in made}
