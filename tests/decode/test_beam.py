"""Beam search equals brute force where it is exhaustive, transformers' elsewhere, and itself without a cache."""

import itertools

import pytest
import torch

from locum.decode.beam import beam_search
from locum.errors import UserError
from locum.models import LM, tiny
from locum.tasks.token_mdp import TableMDP

V, EOS = 7, 3


class Uncached:
    """A session that keeps texts and runs the whole model on each of them again."""

    def __init__(self, lm: LM):
        self.model, self.texts = lm.model, []

    @property
    def size(self):
        return len(self.texts)

    def prefill(self, ids):
        self.prefix = list(ids)
        return self.model(torch.tensor([self.prefix])).logits[0, -1]

    def extend(self, tokens, parents):
        texts = [(self.texts[p] if p >= 0 else self.prefix) + [t] for t, p in zip(tokens, parents, strict=True)]
        self.texts += texts
        return torch.stack([self.model(torch.tensor([t])).logits[0, -1] for t in texts])

    def keep(self, nodes):
        self.texts = [self.texts[n] for n in nodes]
        return {n: i for i, n in enumerate(nodes)}


@pytest.fixture(scope="module")
def lm():
    return tiny(vocab_size=V, seed=1, scale=0.5)


def transformers_beams(lm, prompt, k, steps, penalty=0.0):
    out = lm.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=k,
        num_return_sequences=k,
        do_sample=False,
        max_new_tokens=steps,
        length_penalty=penalty,
        early_stopping=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = []
    for row in out.sequences[:, len(prompt) :].tolist():
        texts.append(tuple(row[: row.index(EOS) + 1] if EOS in row else row))
    return texts, out.sequences_scores.tolist()


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_transformers(lm, k, penalty):
    for seed in range(4):
        prompt = torch.randint(V, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
        got = beam_search(lm.session(), prompt, beams=k, max_new_tokens=12, length_penalty=penalty, eos_ids={EOS})
        if k == 1:  # `generate` with one beam is greedy decoding and has no scores
            ids = lm.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=EOS)
            assert got[0].ids == tuple(ids[0, len(prompt) :].tolist())
            continue
        texts, scores = transformers_beams(lm, prompt, k, 12, penalty)
        assert [h.ids for h in got] == texts
        assert [h.score for h in got] == pytest.approx(scores, abs=1e-4)


def test_cached_equals_uncached(lm):
    for k in (1, 3, 6):
        cached = beam_search(lm.session(8), [1, 2, 4], beams=k, max_new_tokens=40, eos_ids={EOS})
        plain = beam_search(Uncached(lm), [1, 2, 4], beams=k, max_new_tokens=40, eos_ids={EOS})
        assert [h.ids for h in cached] == [h.ids for h in plain]
        assert [h.logp for h in cached] == pytest.approx([h.logp for h in plain], abs=1e-4)


def test_exhaustive_equals_brute_force(lm):
    H, prompt = 4, [5, 6]
    found = beam_search(lm.session(), prompt, beams=V ** (H - 1), max_new_tokens=H, eos_ids={EOS})
    scores = {}
    with torch.no_grad():
        texts = torch.tensor([[*prompt, *t] for t in itertools.product(range(V), repeat=H)])
        logp = lm.model(texts).logits.log_softmax(-1)[:, 1:-1].gather(-1, texts[:, 2:, None])[..., 0]
    for text, row in zip(texts[:, 2:].tolist(), logp.tolist(), strict=True):
        n = text.index(EOS) + 1 if EOS in text else H
        scores[tuple(text[:n])] = sum(row[:n])
    best = max(scores, key=lambda t: scores[t])
    assert found[0].ids == best
    assert found[0].logp == pytest.approx(scores[best], abs=1e-4)
    assert found[0].finished == (best[-1] == EOS)


def test_optimal_policy_over_a_uniform_reference_finds_the_largest_reward():
    for seed in range(3):
        mdp = TableMDP.random(seed, prompts=2, vocab=4, length=4, ref_std=0.0)
        logpi = mdp.solve(beta=0.5)[2]
        every = torch.cartesian_prod(*[torch.arange(4)] * 4)
        for prompt in range(2):
            rewards = mdp.along(mdp.reward, torch.full((256,), prompt), every).sum(-1)
            (best, *_) = beam_search(mdp.session(logpi), [prompt], beams=64, max_new_tokens=4)
            assert best.ids == tuple(every[rewards.argmax()].tolist())


def test_ties_go_to_the_lower_beam_then_the_lower_id():
    mdp = TableMDP.random(0, prompts=1, vocab=4, length=3)
    flat = torch.zeros_like(mdp.reward)
    found = beam_search(mdp.session(flat), [0], beams=3, max_new_tokens=3)
    assert [h.ids for h in found] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_more_beams_than_tokens_uses_them_all():
    mdp = TableMDP.random(0, prompts=1, vocab=3, length=2)
    assert len(beam_search(mdp.session(mdp.ref_logits), [0], beams=50, max_new_tokens=2)) == 9


def test_a_token_of_probability_zero_is_never_taken():
    mdp = TableMDP.random(0, prompts=1, vocab=3, length=2)
    logits = mdp.ref_logits.clone()
    logits[..., 1] = -torch.inf
    found = beam_search(mdp.session(logits), [0], beams=50, max_new_tokens=2)
    assert len(found) == 4
    assert all(1 not in h.ids for h in found)


@pytest.mark.parametrize(("field", "value"), [("beams", 0), ("max_new_tokens", 0)])
def test_bad_numbers_are_named(lm, field, value):
    with pytest.raises(UserError, match=f"{field} must be >= 1, got 0"):
        beam_search(lm.session(), [1], **{field: value})
