"""The buffer cache: written in place, cut back by a number; and the models whose cache cannot be cut back."""

import pytest
import torch
from families import _SIZES, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from locum.errors import UserError
from locum.models import LM, tiny
from locum.models.cache import BufferLayer, TreeCache, require_tree_cache


def entries(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1, 1).expand(1, 2, -1, 3).contiguous()


def held(layer: BufferLayer) -> list[int]:
    assert layer.get_seq_length() == layer.used
    assert torch.equal(layer.values[:, :, : layer.used], -layer.keys[:, :, : layer.used])
    return layer.keys[0, 0, : layer.used, 0].int().tolist()


actions = st.lists(
    st.one_of(st.integers(1, 5), st.lists(st.integers(0, 30), max_size=5, unique=True), st.floats(0, 1)), max_size=12
)


@given(capacity=st.integers(1, 6), actions=actions)
def test_a_layer_is_a_list(capacity, actions):
    """Append (an int), gather (a list of entries), cut (a share): what a plain list would hold, whatever the capacity."""
    cache, model, number = TreeCache(1, capacity), [], 0
    for act in [1, *actions]:
        if isinstance(act, int):
            new = list(range(number, number + act))
            number += act
            keys, values = cache.layers[0].update(entries(new), -entries(new))
            model += new
            assert keys.shape == values.shape == (1, 2, len(model), 3)
        elif isinstance(act, list):
            start = len(model) // 2
            chosen = [start + e for e in act if start + e < len(model)]
            cache.gather(start, chosen)
            model = model[:start] + [model[e] for e in chosen]
        else:
            cache.cut(int(act * len(model)))
            model = model[: int(act * len(model))]
        assert held(cache.layers[0]) == model
        assert cache.used == cache.get_seq_length() == len(model)


def test_writing_is_in_place_until_the_buffer_is_full():
    layer = BufferLayer(4)
    layer.update(entries([1, 2]), -entries([1, 2]))
    where = layer.keys.data_ptr()
    layer.update(entries([3, 4]), -entries([3, 4]))
    assert layer.keys.data_ptr() == where
    layer.update(entries([5]), -entries([5]))
    assert layer.keys.data_ptr() != where
    assert layer.keys.shape[2] == 8
    assert held(layer) == [1, 2, 3, 4, 5]


def test_a_commit_whose_source_and_target_overlap():
    cache = TreeCache(1, 8)
    cache.layers[0].update(entries([0, 1, 2, 3, 4, 5]), -entries([0, 1, 2, 3, 4, 5]))
    cache.gather(1, [2, 3, 5])
    assert held(cache.layers[0]) == [0, 2, 3, 5]


def test_rows_are_repeated_and_dropped():
    """The entries in use move; the capacity stays, so that what follows is still written in place."""
    layer = BufferLayer(4)
    keys = torch.arange(24.0).view(3, 2, 2, 2)
    layer.update(keys, -keys)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.used == 2
    assert layer.keys.shape == (3, 2, 4, 2)
    new = torch.zeros(3, 2, 1, 2)
    where = layer.keys.data_ptr()
    held, values = layer.update(new, new)
    assert layer.keys.data_ptr() == where
    assert torch.equal(held, torch.cat([keys[[2, 0, 0]], new], 2))
    assert torch.equal(values, -held)
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.keys[:, :, :3], held[1:2])
    BufferLayer(4).reorder_cache(torch.tensor([0]))  # nothing held yet: nothing to do


def test_it_serves_as_any_cache_of_transformers():
    """The model's own one-token loop on this cache and on transformers' own: equal logits."""
    lm, ids = tiny(vocab_size=VOCAB), [1, 2, 3, 4]
    ours, theirs = TreeCache(2, 1), DynamicCache()
    with torch.inference_mode():
        for token in ids:
            a, b = (lm.model(input_ids=torch.tensor([[token]]), past_key_values=c).logits for c in (ours, theirs))
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert ours.get_seq_length() == theirs.get_seq_length() == 4


def model_of(config) -> LM:
    return LM(AutoModelForCausalLM.from_config(config).eval(), name="mine")


REFUSED = {
    "sliding window": (lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=16), "sliding_attention"),
    "some layers slide": (
        lambda: Qwen2Config(
            **_SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "sliding_attention",
    ),
    "every other layer slides": (
        lambda: Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8, sliding_window=16),
        "sliding_attention",
    ),
    "recurrent": (
        lambda: MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1),
        "a recurrent state|linear_attention|mamba",
    ),
}


@pytest.mark.parametrize(("config", "what"), REFUSED.values(), ids=REFUSED.keys())
def test_a_cache_that_cannot_be_cut_back_is_refused(config, what):
    lm = model_of(config())
    with pytest.raises(UserError, match=rf"model 'mine' keeps ({what}).* in its cache, which cannot be cut back"):
        lm.session()


@pytest.mark.parametrize(
    "config",
    [
        lambda: LlamaConfig(**_SIZES),
        lambda: MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=None),
        lambda: Qwen2Config(**_SIZES, num_key_value_heads=2, use_sliding_window=False, sliding_window=8),
        lambda: GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2),
    ],
    ids=["llama", "mistral", "qwen2", "gpt2"],
)
def test_full_attention_is_accepted(config):
    require_tree_cache(model_of(config()).model, "mine")
