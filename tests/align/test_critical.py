"""Critical tokens by rollout: the rule on counts, Pass@k, and rollouts of toys whose every continuation is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align.critical import Rollouts, critical_index, pass_at_k
from locum.align.statistics import ModelScorer
from locum.errors import UserError
from locum.models import tiny

END = 9


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([9, 4, 0, 2, 1, 0], (2, False)),
        ([9, 0, 5, 0, 1], (3, False)),
        ([0, 9, 9], (0, True)),
        ([5, 6], (None, False)),
        ([0, 0, 3], (0, False)),  # 3 of 64 are below 5 %, 4 are not
        ([0, 4, 3], (0, True)),
        ([2, 3], (None, False)),
    ],
)
def test_the_rule_on_counts_of_64(counts, found):
    assert critical_index(torch.tensor(counts), n=64) == found


def test_exactly_the_share_can_still_be_saved():
    assert critical_index(torch.tensor([0, 7, 0]), n=140) == (2, False)
    assert critical_index(torch.tensor([0, 6, 0]), n=140) == (0, False)


def test_pass_at_k():
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == pytest.approx([0.25, 0.5, 1], abs=1e-12)
    assert pass_at_k(64, 0, 64) == 0
    assert pass_at_k(64, 64, 1) == 1
    draws = list(itertools.combinations([True] * 3 + [False] * 5, 4))
    assert pass_at_k(8, 3, 4) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    for n, c, k in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(UserError, match=r"c must be in 0\.\.n and k in 1\.\.n"):
            pass_at_k(n, c, k)


class Told:
    """Continuations that are right as often as it was told for the prefix's length: the i-th of n is right if i < count."""

    def __init__(self, counts, prompt):
        self.counts, self.prompt, self.asked = counts, prompt, []

    def rollout(self, texts):
        out = []
        for text, same in itertools.groupby(texts):
            t = len(text) - len(self.prompt) - 1
            self.asked.append(t)
            out += [[1 if i < self.counts[t] else 0, END] for i, _ in enumerate(same)]
        return out

    @staticmethod
    def correct(example, responses):
        return [y[-2] == 1 for y in responses]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.integers(1, 10))
def test_prefixes_are_asked_from_the_end_and_no_further_than_needed(counts, at_once):
    """Same answer as from all counts, for any number of prefixes at a time (n = 64: more than 3 right can be saved)."""
    told = Told(counts, prompt=[5, 5])
    found = Rollouts(told.rollout, told.correct, n=64, prefixes=at_once).critical(
        {"prompt_ids": [5, 5], "response_ids": list(range(100, 100 + len(counts)))}
    )
    assert (found.index, found.fallback) == critical_index(torch.tensor(counts), 64)
    assert found.counts.tolist() == counts[found.start :]
    assert sorted(told.asked) == list(range(found.start, len(counts)))
    if found.index is not None:
        needed = min(found.index, max((t for t, c in enumerate(counts) if c > 3), default=0))
        assert needed - at_once < found.start <= needed


def test_a_prefix_that_has_ended_is_judged_as_it_is():
    told = Told([3, 0, 99], prompt=[5])
    rollouts = Rollouts(told.rollout, told.correct, n=4, eos_ids=(END,))
    assert rollouts.count({"prompt_ids": [5]}, [[7], [7, 1], [7, 1, END], [7, 0, END]]).tolist() == [3, 0, 4, 0]
    assert told.asked == [0, 1]
    assert rollouts.count({"prompt_ids": [5]}, [[1, END]]).tolist() == [4]


def test_without_a_token_the_rest_of_the_law_is_drawn():
    """The removed token never comes, the others at their share; c is how many became right."""
    lm = tiny(vocab_size=8, seed=1, scale=0.5, dtype=torch.float64)
    example = {"prompt_ids": [1, 2], "rejected_ids": [3, 4, 5]}
    law = lm.model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1)
    seen = []

    def rollout(texts):
        seen.extend(texts)
        return [[END] for _ in texts]

    n, right = 20_000, int(law.argmax()) if int(law.argmax()) != 4 else 0
    rollouts = Rollouts(rollout, lambda example, responses: [y[1] == right for y in responses], n=n)
    found = rollouts.count_without(example, 1, ModelScorer(lm.model), "rejected", torch.Generator().manual_seed(0))
    assert all(text[:3] == [1, 2, 3] and len(text) == 4 and text[3] != 4 for text in seen)
    share = law[right].item() / (1 - law[4].item())
    assert found / n == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))
    assert found == sum(text[3] == right for text in seen)


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("share", 0.0), ("share", math.nan), ("prefixes", 0)])
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"^Rollouts\.{field} must be .*, got {value}"):
        Rollouts(list, lambda example, responses: [], **{field: value})


def test_a_response_without_tokens_is_refused():
    with pytest.raises(UserError, match="response_ids holds no token"):
        Rollouts(list, lambda example, responses: []).critical({"prompt_ids": [1], "response_ids": []})
