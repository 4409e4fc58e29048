"""Responses in batches are what one prompt alone gives, drawn from the law asked for, and leave nothing changed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from locum.errors import UserError
from locum.models import LM, tiny
from locum.models.sampling import Response, sample_responses
from locum.tokens.sampling import Sampling

V, EOS = 16, 3
GREEDY = Sampling(temperature=0.0)


def ending(seed=0, eos=(EOS,), **how):
    """A tiny model that has ends of sequence."""
    lm = tiny(vocab_size=V, seed=seed, dtype=torch.float64, **how)
    lm.model.generation_config.eos_token_id = list(eos)
    return lm


@pytest.fixture(scope="module")
def lm():
    return ending(seed=1)


def alone(lm, prompt, limit):
    """Greedy decoding without cache, batch and padding."""
    ids, stop = list(prompt), lm.eos_ids
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            return Response(ids[len(prompt) :], False)
    return Response(ids[len(prompt) :], True)


@settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=6), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_greedy_responses_in_batches_are_those_of_each_prompt_alone(prompts, batch_size, limit):
    lm = ending(seed=1, eos=(EOS, 5))
    found = sample_responses(lm, prompts, GREEDY, max_new_tokens=limit, batch_size=batch_size)
    assert found == [alone(lm, p, limit) for p in prompts]


def test_the_end_of_sequence_stays_and_what_follows_goes():
    """Both kinds occur; an end at the very limit is an end."""
    lm = ending(seed=1, eos=(EOS, 5))
    prompts = [[i, j] for i in range(8) for j in range(8)]
    found = sample_responses(lm, prompts, max_new_tokens=6, generator=torch.Generator().manual_seed(0))
    ended = [r for r in found if not r.truncated]
    assert 0 < len(ended) < len(found)
    assert all(r.ids[-1] in (EOS, 5) and not {EOS, 5} & set(r.ids[:-1]) for r in ended)
    assert all(len(r.ids) == 6 and not {EOS, 5} & set(r.ids) for r in found if r.truncated)
    assert any(len(r.ids) == 6 for r in ended)
    never = sample_responses(tiny(vocab_size=V), prompts[:3], max_new_tokens=4)
    assert [(len(r.ids), r.truncated) for r in never] == [(4, True)] * 3


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.5, top_p=0.7), Sampling(1.0, top_k=4)])
def test_first_tokens_follow_the_law(lm, sampling):
    """Chi-square test against the exact law, at the 0.1 % level; a prompt of another length pads half of the batch."""
    n = 3000
    with torch.no_grad():
        p = sampling.law(lm.model(torch.tensor([[1, 2]])).logits[0, -1])
    prompts = [[1, 2], [4, 5, 6, 7]] * n
    found = sample_responses(
        lm, prompts, sampling, max_new_tokens=1, generator=torch.Generator().manual_seed(0), batch_size=1500
    )
    counts = torch.bincount(torch.tensor([r.ids[0] for r in found[::2]]), minlength=V)
    assert (counts[p == 0] == 0).all()
    some = p > 0
    assert stats.chisquare(counts[some].numpy(), (n * p[some]).numpy()).pvalue > 1e-3


def test_the_models_own_generation_config_has_no_say(lm):
    loud = ending(seed=1)
    loud.model.generation_config.update(repetition_penalty=50.0, top_k=1, min_new_tokens=8, num_beams=3)
    config = loud.model.generation_config
    prompts = [[1, 2, 3], [4]]
    for sampling in (GREEDY, Sampling(1.0)):
        a, b = (
            sample_responses(m, prompts, sampling, max_new_tokens=8, generator=torch.Generator().manual_seed(3))
            for m in (lm, loud)
        )
        assert a == b
    assert loud.model.generation_config is config


def test_a_seed_repeats_a_call_and_the_process_draws_on_undisturbed(lm):
    prompts = [[i] for i in range(10)]

    def draw(seed):
        return sample_responses(lm, prompts, max_new_tokens=5, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    first = draw(0)
    assert torch.equal(torch.rand(3), want)
    assert draw(0) == first
    assert draw(1) != first
    g = torch.Generator().manual_seed(0)
    assert sample_responses(lm, prompts, max_new_tokens=5, generator=g) == first
    assert sample_responses(lm, prompts, max_new_tokens=5, generator=g) != first  # a generator goes on
    torch.manual_seed(7)
    from_process = sample_responses(lm, prompts, max_new_tokens=5)
    assert sample_responses(lm, prompts, max_new_tokens=5) != from_process


def test_modes_come_back_module_by_module():
    lm = ending(attention_dropout=0.9)
    lm.model.train()
    lm.model.model.layers[0].eval()
    before = [m.training for m in lm.model.modules()]
    assert sample_responses(lm, [[1, 2]], GREEDY, max_new_tokens=6) == sample_responses(
        ending(), [[1, 2]], GREEDY, max_new_tokens=6
    )
    assert [m.training for m in lm.model.modules()] == before
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


def test_an_adapter_is_sampled_with_and_stays_trainable():
    peft = pytest.importorskip("peft")
    lm = ending(seed=1)
    prompts = [[1, 2, 3], [4], [9, 9]]
    plain = sample_responses(lm, prompts, GREEDY, max_new_tokens=8)
    wrapped = peft.get_peft_model(lm.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    policy = LM(wrapped)
    assert sample_responses(policy, prompts, GREEDY, max_new_tokens=8) == plain  # an untrained adapter adds nothing
    torch.manual_seed(0)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.5)
    wrapped.train()
    found = sample_responses(policy, prompts, GREEDY, max_new_tokens=8)
    wrapped.eval()
    assert found == [alone(policy, p, 8) for p in prompts] != plain
    assert sum(p.requires_grad for p in wrapped.parameters()) == 2 * 3 * 2
    with wrapped.disable_adapter():
        assert sample_responses(policy, prompts, GREEDY, max_new_tokens=8) == plain


def test_progress_is_told(lm):
    said = []
    sample_responses(lm, [[1]] * 5, max_new_tokens=1, batch_size=2, progress=lambda *at: said.append(at))
    assert said == [(2, 5), (4, 5), (5, 5)]
    assert sample_responses(lm, []) == []


def test_bad_input_ends_in_one_sentence(lm):
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        sample_responses(lm, [[1], []])
    with pytest.raises(UserError, match=r"prompt 0 of 4090 tokens and 7 new ones exceed the 4096 positions"):
        sample_responses(lm, [[1] * 4090], max_new_tokens=7)
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(UserError, match=f"{name} must be >= 1, got 0"):
            sample_responses(lm, [[1]], **{name: 0})
    with pytest.raises(UserError, match=r"Sampling\.temperature must be finite and >= 0, got nan"):
        sample_responses(lm, [[1]], Sampling(math.nan))
