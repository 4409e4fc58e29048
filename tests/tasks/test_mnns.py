"""Minimum non-negative sum: hand cases, and counting against listing all traces."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.errors import UserError
from locum.tasks.mnns import ARROW, BOS, EOS, FILLER, MNNS, small_model


def sums(task, row):
    """A law over tokens as sum -> share."""
    return {task.total(i): p for i, p in enumerate(row.tolist()) if p}


def listed(digits):
    """All traces, the first digit's sign changing last, + before -."""
    return [[sum(s * d for s, d in zip(signs[: t + 1], digits, strict=False)) for t in range(len(digits))]
            for signs in product((1, -1), repeat=len(digits))]  # fmt: skip


def test_three_digits_by_hand():
    task = MNNS(length=3)
    digits = torch.tensor([[2, 1, 4]])
    first, second, last = task.frontier(digits)[0]
    assert sums(task, first) == {2: 0.5, -2: 0.5}
    assert sums(task, second) == {3: 0.25, 1: 0.25, -1: 0.25, -3: 0.25}
    assert sums(task, last) == {1: 1.0}
    text = task.texts(digits)[0].tolist()
    assert text[:5] == [BOS, 5, 4, 7, ARROW]
    assert text[-1] == EOS
    assert [task.total(i) for i in text[5:-1]] == [-2, -3, 1]


def test_traces_that_meet_add_up():
    task = MNNS(length=2)
    first, last = task.frontier(torch.tensor([[1, 1]]))[0]
    assert sums(task, first) == {1: 0.5, -1: 0.5}
    assert sums(task, last) == {0: 1.0}
    second = MNNS(length=3).frontier(torch.tensor([[1, 1, 5]]))[0, 1]
    assert sums(MNNS(length=3), second) == {2: 0.25, 0: 0.5, -2: 0.25}


@settings(max_examples=30)
@given(st.lists(st.integers(-5, 9), min_size=1, max_size=6))
def test_counting_agrees_with_listing(row):
    task, digits = MNNS(length=len(row), low=-5), torch.tensor([row])
    traces = listed(row)
    assert [[task.total(i) for i in t] for t in task.traces(digits)[0].tolist()] == traces
    for t, law in enumerate(task.frontier(digits)[0, :-1]):
        said = [trace[t] for trace in traces]
        assert sums(task, law) == pytest.approx({s: said.count(s) / len(said) for s in said})
    least = min(t[-1] for t in traces if t[-1] >= 0)
    assert task.total(int(task.answers(digits))) == least
    assert task.frontier(digits).sum(-1).allclose(torch.ones(1, len(row)), atol=1e-6)
    for rank in ("beam", "beam_minabs"):
        best = task.best(digits, 1, rank)
        assert bool(best.kept.all())
        assert int(best.answers) == int(task.answers(digits))
        assert best.ids[0, 0].tolist() == next(t for t in task.traces(digits)[0].tolist() if t[-1] == best.answers)


def test_ranks():
    task, digits = MNNS(length=3), torch.tensor([[2, 1, 4]])  # finals 7 -1 5 -3 3 -5 1 -7
    beam = task.best(digits, 6)
    assert [task.total(t[-1]) for t in beam.ids[0].tolist()][:4] == [1, 3, 5, 7]
    assert beam.kept.tolist() == [[True] * 4 + [False] * 2]
    near = task.best(digits, 8, "beam_minabs")
    assert [task.total(t[-1]) for t in near.ids[0].tolist()] == [1, -1, 3, -3, 5, -5, 7, -7]
    assert bool(near.kept.all())
    assert task.total(int(near.answers)) == 1


def test_orders_of_the_same_digits_are_on_one_side():
    task = MNNS()
    seen, held = task.split(torch.Generator().manual_seed(0))
    assert len(seen) + len(held) == 9**4
    assert 0.75 < len(seen) / 9**4 < 0.85
    groups = [{tuple(r) for r in x.sort(-1).values.tolist()} for x in (seen, held)]
    assert not groups[0] & groups[1]
    assert [len(g) for g in groups] == [396, 99]
    again = task.split(torch.Generator().manual_seed(0))
    assert torch.equal(again[0], seen)
    assert torch.equal(again[1], held)


def test_ids_do_not_overlap():
    task = MNNS(length=2, low=-1, high=2)
    digits = {int(i) for i in task.prompts(torch.tensor([[-1, 0], [1, 2]]))[:, 1:].flatten()}
    totals = {task.token(s) for s in range(-task.span, task.span + 1)}
    assert len(digits | totals | {BOS, ARROW, EOS, FILLER}) == 4 + 4 + 9 == task.vocab_size
    assert task.total(ARROW) is None
    assert MNNS().vocab_size == 4 + 9 + 73


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MNNS(length=0), r"MNNS.length must be >= 1"),
        (lambda: MNNS(low=3, high=2), r"MNNS.high must be >= low"),
        (lambda: MNNS().prompts(torch.zeros(1, 0, dtype=torch.long)), "has 4 digits, got rows of 0"),
        (lambda: MNNS().answers(torch.tensor([[1, 2, 3, 10]])), r"digits must be in 1..9, got 1..10"),
        (lambda: MNNS().best(torch.tensor([[1, 2, 3, 4]]), 0), "many must be >= 1"),
        (lambda: MNNS().best(torch.tensor([[1, 2, 3, 4]]), 1, "worst"), "rank must be one of beam"),
        (lambda: MNNS().split(torch.Generator(), 1.0), r"share must be in \(0, 1\)"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_small_models_are_given_by_their_seed():
    task = MNNS(length=2)
    a, b, c = (small_model(task, 8, 1, 1, seed) for seed in (0, 0, 1))
    x = task.prompts(torch.tensor([[1, 2]]))
    assert torch.equal(a(x).logits, b(x).logits)
    assert not torch.equal(a(x).logits, c(x).logits)
    assert a(x).logits.shape == (1, 3, task.vocab_size)
