"""The controller: what it counts, what it promises, when it drafts; and the measured cost that it stands on."""

import numpy as np
import pytest

from locum.decode import Auto, Chain, Context, DySpec, Lookup, Plain, SpecTr, Tree, generate
from locum.decode.auto import _Arm, _first
from locum.decode.cost import ForwardCost, forward_cost
from locum.errors import UserError
from locum.models import tiny
from locum.tokens import Sampling

FREE = ForwardCost((1, 2, 64), (1.0, 1.0, 1.0))  # a larger forward costs nothing
DEAR = ForwardCost((1, 2, 64), (1.0, 3.0, 65.0))  # every token costs what one costs, and more


def arm(memory: float = 100.0) -> _Arm:
    return _Arm(Lookup(), None, memory)


def test_cost_between_and_beyond_the_sizes_measured():
    cost = ForwardCost((1, 4, 8), (1.0, 1.6, 2.0))
    assert cost(1) == 1.0
    assert cost(2) == pytest.approx(1.2)
    assert cost(6) == pytest.approx(1.8)
    assert cost(18) == pytest.approx(3.0)  # 0.1 a token, as at the end
    assert cost.ratio(np.array([4, 8])).tolist() == pytest.approx([1.6, 2.0])


def test_cost_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path))
    lm = tiny(vocab_size=12)
    first = forward_cost(lm)
    assert list(first.seconds) == sorted(first.seconds)
    assert first.seconds[0] > 0
    assert forward_cost(lm) == first  # measured times never repeat, so this one was read
    assert [p.suffix for p in (tmp_path / "forward-cost").iterdir()] == [".json"]
    forward_cost(tiny(vocab_size=12, layers=1))
    assert len(list((tmp_path / "forward-cost").iterdir())) == 2


def test_a_model_with_few_positions_is_measured_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path))
    lm = tiny(vocab_size=12)
    lm.model.config.max_position_embeddings = 20
    assert max(forward_cost(lm).sizes) < 10


def test_acceptance_by_hand():
    """Chains of two: both right, one right, none right. One doubt to begin with, so the means are over 4."""
    counted = arm()
    tree = Tree.chain(0, [5, 6], kind="k")
    for at, text in enumerate(([0, 5, 6], [0, 5, 9], [0, 8, 8])):
        counted.pending = [(1, tree)]
        counted.settle(text)
        assert counted.pending == [], at
    assert counted.right["k"][:3].tolist() == pytest.approx([2 / 4, 1 / 4, 0])
    size, promise = counted.best_size("k", 2, ForwardCost((1, 2, 3), (1.0, 1.1, 1.6)))
    assert (size, promise) == (1, pytest.approx(1.5 / 1.1))  # two would promise 1.75 / 1.6
    assert counted.best_size("unseen", 2, FREE) == (0, 0.0)


def test_a_draft_waits_until_the_text_tells():
    waiting = arm()
    waiting.pending = [(1, Tree.chain(0, [5, 6, 7], kind="k"))]
    waiting.settle([0, 5])  # right so far
    assert len(waiting.pending) == 1
    assert "k" not in waiting.right
    waiting.settle([0, 5, 6, 4])
    assert waiting.pending == []
    assert waiting.right["k"][:3].tolist() == [0.5, 0.5, 0.0]


def test_nodes_that_were_not_drafted_are_not_counted():
    counted = arm()
    for tokens, text in (([5, 6], [0, 5, 6]), ([5], [0, 5])):
        counted.pending = [(1, Tree.chain(0, tokens, kind="k"))]
        counted.settle(text)
    assert counted.right["k"][:2].tolist() == pytest.approx([2 / 3, 1 / 2])


def test_a_tree_cut_short_is_the_smaller_tree():
    lm = tiny(vocab_size=10)

    def draft(budget: int) -> Tree:
        drafter = DySpec(budget=budget)
        state = drafter.start(lm, lm)
        return drafter.propose(state, Context([1, 2, 3], 9, Sampling(), np.random.default_rng(7)))

    whole = draft(8)
    for size in range(1, 9):
        small, cut = draft(size), _first(whole, size)
        assert (small.tokens, small.parents) == (cut.tokens, cut.parents)
        assert all((small.laws[node] == cut.laws[node]).all() for node in small.laws)


@pytest.mark.parametrize(("cost", "drafts"), [(FREE, True), (DEAR, False)], ids=["free", "dear"])
def test_it_drafts_where_that_pays_and_only_there(monkeypatch, cost, drafts):
    monkeypatch.setattr("locum.decode.auto.forward_cost", lambda lm: cost)
    lm = tiny(vocab_size=6, layers=1, seed=1)  # soon repeats itself
    [plain] = generate(lm, [1, 2], max_new_tokens=80, drafter=Plain())
    [auto] = generate(lm, [1, 2], max_new_tokens=80, drafter=Auto())
    assert auto.ids == plain.ids
    assert any(step.drafted for step in auto.steps) == drafts
    assert (auto.forwards < 50) == drafts


def test_a_draft_model_is_used_where_it_is_good_and_cheap(monkeypatch):
    lm = tiny(vocab_size=16)
    monkeypatch.setattr("locum.decode.auto.forward_cost", lambda _: ForwardCost((1, 2, 64), (10.0, 10.0, 10.0)))
    [out] = generate(lm, [1, 2], drafter=Auto(drafters=(Chain(length=4),)), draft=lm, max_new_tokens=60)
    assert out.ids == generate(lm, [1, 2], max_new_tokens=60)[0].ids
    assert out.forwards < 30


def test_candidates_that_cannot_be_cut_are_refused():
    with pytest.raises(UserError, match=r"Auto\.drafters must be "):
        Auto(drafters=(SpecTr(),))
