"""What is asked of vLLM, by way of a stand-in that records it and answers as vLLM would; and weights as it would read them."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from locum.errors import MissingExtra, UserError
from locum.models import tiny
from locum.models.vllm import vllm_engine, vllm_generate, vllm_update
from locum.tokens.sampling import Sampling


@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    seed: int
    ignore_eos: bool
    stop_token_ids: list[int]
    detokenize: bool

    def __post_init__(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")


@dataclass
class Engine:
    """Copy i of a prompt says its last token i + 1 times, then its first, unless the limit comes before."""

    settings: dict
    calls: list = field(default_factory=list)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        self.calls.append((prompts, sampling_params, use_tqdm))
        return [
            SimpleNamespace(outputs=[self._say(p["prompt_token_ids"], i, asked) for i in range(asked.n)])
            for p, asked in zip(prompts, sampling_params, strict=True)
        ]

    def _say(self, prompt, copy, asked):
        ids = ([prompt[-1]] * (copy + 1) + [prompt[0]])[: asked.max_tokens]
        return SimpleNamespace(
            token_ids=tuple(ids), finish_reason="stop" if ids[-1] in asked.stop_token_ids else "length"
        )

    def collective_rpc(self, method, kwargs):
        folder = kwargs["weights_path"]
        self.calls.append((method, AutoModelForCausalLM.from_pretrained(folder), folder))

    def reset_prefix_cache(self):
        self.calls.append("reset")


@pytest.fixture
def engine(monkeypatch):
    fake = ModuleType("vllm")
    fake.LLM = lambda **settings: Engine(settings)
    fake.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return vllm_engine("mine", dtype="bfloat16")


def test_an_engine_shares_prefixes(engine):
    assert engine.settings == {"model": "mine", "enable_prefix_caching": True, "dtype": "bfloat16"}


def test_copies_of_each_prefix_are_adjacent_rows(engine):
    made = vllm_generate(engine, [[7, 1], [8, 2, 3]], 3, [9, 2], Sampling(0.5), [0, 5], {7, 11})
    assert made.lists() == [[1, 7], [1, 1, 7], [1, 1, 1, 7], [3, 8], [3, 3], [3, 3]]
    assert made.ended.tolist() == [True] * 3 + [False] * 3
    assert (made.ids[~made.mask] == 0).all()
    [(prompts, asked, bar)] = engine.calls
    assert prompts == [{"prompt_token_ids": [7, 1]}, {"prompt_token_ids": [8, 2, 3]}]
    assert not bar
    assert asked == [
        SamplingParams(3, 0.5, -1, 1.0, 0.0, room, seed, ignore_eos=True, stop_token_ids=[7, 11], detokenize=False)
        for room, seed in ((9, 0), (2, 15))
    ]


def test_every_filter_is_passed_on(engine):
    law = Sampling(1.0, top_k=5, top_p=0.9, min_p=0.1)
    vllm_generate(engine, [[1]], 1, [1], law, [0], ())
    [(_, [asked], _)] = engine.calls
    assert (asked.temperature, asked.top_k, asked.top_p, asked.min_p) == (1.0, 5, 0.9, 0.1)
    assert asked.stop_token_ids == []


def test_greedy_copies_are_drawn_once(engine):
    made = vllm_generate(engine, [[7, 1], [8, 2]], 2, [9, 9], Sampling(0.0), [1, 2], [7])
    assert made.lists() == [[1, 7], [1, 7], [2, 8], [2, 8]]
    assert vllm_generate(engine, [], 2, [], Sampling(1.0), [], [7]).ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], []], 1, [1, 1], Sampling(1.0), [0, 0], ()), "prefix 1 has no tokens"),
        (([[1]], 1, [0], Sampling(1.0), [0], ()), "room must be >= 1, got 0 for prefix 0"),
        (([[1]], 0, [1], Sampling(1.0), [0], ()), "copies must be >= 1, got 0"),
        (([[1]], 1, [1, 2], Sampling(1.0), [0], ()), "one room and one seed per prefix, got 2 and 1 for 1"),
    ],
)
def test_bad_input_ends_in_one_sentence(engine, arguments, message):
    with pytest.raises(UserError, match=message):
        vllm_generate(engine, *arguments)


def test_weights_are_read_as_a_checkpoint_and_what_was_cached_is_forgotten(engine):
    lm = tiny(vocab_size=16, seed=1, tie_word_embeddings=True)
    vllm_update(engine, lm.model)
    (method, read, folder), reset = engine.calls
    assert (method, reset) == ("reload_weights", "reset")
    assert not Path(folder).exists()
    for name, p in lm.model.named_parameters():
        assert torch.equal(read.get_parameter(name), p)


def test_adapters_are_merged_and_come_off_without_a_trace(engine):
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[1, 2, 3]])
    model = peft.get_peft_model(
        tiny(vocab_size=16, seed=1).model,
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    vllm_update(engine, model)
    read = engine.calls[0][1]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert not any("lora" in name or "base_layer" in name for name in dict(read.named_parameters()))


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"sampling with vLLM needs the extra 'vllm': pip install 'locum\[vllm\]'"):
        vllm_engine("mine")
