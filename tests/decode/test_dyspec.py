"""DySpec (arXiv 2410.11744): how the tree grows, by hand and by brute force, and the law of what its verifier emits."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from exhaustive import Chance, TextSession, chi_square, law_of_outcomes, markov, without_replacement
from hypothesis import assume, given
from hypothesis import strategies as st

from locum.decode import Chain, ChainRejection, Context, DySpec, Plain, RecursiveRejection, Rows, Tree, generate
from locum.decode.dyspec import Growth, grow, succession
from locum.errors import UserError
from locum.models import tiny
from locum.tokens import Sampling

SAMPLED = Sampling(1.0)
Branch = tuple[int, ...]  # the tokens from the root to a node


def branch(growth: Growth, node: int) -> Branch:
    return (*branch(growth, growth.parents[node]), growth.tokens[node]) if node else ()


def chances(law: np.ndarray, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """An order of children and the chance of each under what is left of the law."""
    left = [law.sum() - sum(law[y] for y in order[:i]) for i in range(len(order))]
    return np.array(order), np.minimum(law[list(order)] / left, 1.0)


def grown(
    law: Callable[[Branch], np.ndarray],
    order: Callable[[Branch], Sequence[int]],
    budget: int,
    depth: int = 99,
    threshold: float | None = None,
) -> Growth:
    """A tree whose laws and orders of children are functions of the branch."""
    growth = Growth(0)
    grow(
        growth,
        lambda nodes: [law(branch(growth, n)) for n in nodes],
        lambda n, d, most: chances(d, order(branch(growth, n))),
        budget,
        depth,
        threshold,
    )
    return growth


def streams(seed: int, size: int, concentration: float = 0.5) -> tuple[Callable, Callable]:
    """A random law at every branch, and its whole order of draws, each from the branch's own random stream."""

    def law(at: Branch) -> np.ndarray:
        return np.random.default_rng([seed, 0, len(at), *at]).dirichlet([concentration] * size)

    def order(at: Branch) -> list[int]:
        return succession(law(at), np.random.default_rng([seed, 1, len(at), *at]), size)[0].tolist()

    return law, order


# ---- the law of the text


def step(P: np.ndarray, Q: np.ndarray, state: int, budget: int, rng: np.random.Generator) -> tuple[int, ...]:
    """What one step emits, draft and target being Markov chains."""
    growth = Growth(state)
    grow(
        growth,
        lambda nodes: [P[growth.tokens[n]] for n in nodes],
        lambda n, law, most: succession(law, rng, most),
        budget,
        99,
    )
    tree = Tree(growth.tokens, growth.parents, draws="without replacement", laws=growth.laws)
    rows = Rows(torch.zeros(1, P.shape[1]), SAMPLED)
    rows._laws = {n: Q[token] for n, token in enumerate(tree.tokens)}
    path, last = RecursiveRejection().walk(tree, rows, rng)
    return (*(tree.tokens[n] for n in path), last)


@pytest.mark.usefixtures("unchecked")
def test_first_tokens_of_60000_steps_have_the_targets_law() -> None:
    rng = np.random.default_rng(0)
    P, Q = rng.dirichlet([1.0] * 8, (2, 8))
    state, seen, visits, emitted = 0, Counter(), Counter(), 0
    for _ in range(60_000):
        text = step(P, Q, state, 12, rng)
        seen[state, text[0]] += 1
        visits[state] += 1
        emitted += len(text)
        state = text[-1]
    assert emitted > 1.5 * 60_000  # drafts were accepted
    assert chi_square(seen, {(s, t): visits[s] / 60_000 * Q[s, t] for s, t in product(range(8), repeat=2)}) > 1e-3


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("drafter", [DySpec(3, draft_temperature=1.0), DySpec(3, 0.2, draft_temperature=1.0)])
def test_whole_steps_enumerated(drafter: DySpec) -> None:
    rng = np.random.default_rng(1)
    P, Q = rng.dirichlet([1.0] * 3, (2, 3))
    P[2] = [0.8, 0.2, 0.0]  # a token that the draft never says

    def emitted(state: int) -> dict[tuple[int, ...], float]:
        def run(chance: Chance) -> tuple[int, ...]:
            tree = drafter.propose(TextSession(markov(P)), Context([state], 9, SAMPLED, chance))
            path, last = RecursiveRejection().select(tree, Rows(torch.tensor(Q).log()[tree.tokens], SAMPLED), chance)
            return (*(tree.tokens[n] for n in path), last)

        return law_of_outcomes(run)

    for state in range(3):
        law = emitted(state)
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        assert max(map(len, law)) > 2
        for a, b in product(range(3), repeat=2):
            # A step of one token is followed by the first token of the next.
            joint = law.get((a,), 0) * Q[a, b] + sum(law[x] for x in law if x[:2] == (a, b))
            assert joint == pytest.approx(Q[state, a] * Q[a, b], abs=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_at_temperature_0_the_text_is_the_greedy_one(threshold: float | None) -> None:
    target, draft = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, layers=1, seed=1)
    prompts = np.random.default_rng(0).integers(12, size=(20, 4)).tolist()
    plain = generate(target, prompts, drafter=Plain(), max_new_tokens=16)
    tree = generate(target, prompts, drafter=DySpec(12, threshold), draft=draft, max_new_tokens=16)
    assert [g.ids for g in tree] == [g.ids for g in plain]
    assert sum(g.forwards for g in tree) < 0.95 * sum(g.forwards for g in plain)


# ---- how the tree grows


def test_succession_is_drawing_without_replacement() -> None:
    law = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    rng, n = np.random.default_rng(2), 20_000
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(n):
        tokens, found = succession(law, rng, 3)
        seen[tuple(tokens.tolist())] += 1
        assert found.tolist() == pytest.approx(chances(law, tokens.tolist())[1].tolist(), abs=1e-12)
    assert chi_square(seen, {o: without_replacement(law, o) for o in permutations([0, 2, 3, 4], 3)}) > 1e-3


def test_what_is_left_to_rounding_is_not_drawn() -> None:
    law = np.array([1 - 1e-15, 1e-15, 0.0])
    for seed in range(20):
        assert succession(law, np.random.default_rng(seed), 3)[0].tolist() == [0]


def product_formula(growth: Growth, node: int) -> float:
    """v by its definition, the residual laws made by zeroing and scaling."""
    value, last = 1.0, node
    while node:
        parent = growth.parents[node]
        left = growth.laws[parent].copy()
        for sibling in (s for s in range(node) if growth.parents[s] == parent):
            left /= left.sum()
            value *= 1 - left[growth.tokens[sibling]]
            left[growth.tokens[sibling]] = 0
        if node != last:  # an ancestor
            value *= left[growth.tokens[node]] / left.sum()
        node = parent
    return value


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 20))
def test_values_fall_and_are_the_product_formula(seed: int, size: int, budget: int) -> None:
    growth = grown(*streams(seed, size, 2.0), budget)
    values = growth.values[1:]
    assert len(values) == budget
    assert all(a >= b for a, b in pairwise(values))
    for node in range(1, budget + 1):
        assert growth.values[node] == pytest.approx(product_formula(growth, node), abs=1e-12)


def best_sum(law: Callable, order: Callable, budget: int, depth: int) -> float:
    """The largest sum of v over all sets of `budget` nodes that hold, with a node, its parent and its earlier siblings."""

    def value(node: Branch) -> float:
        v = 1.0
        for i in range(len(node)):
            at, turn = node[:i], order(node[:i]).index(node[i])
            found = chances(law(at), order(at))[1]
            v *= math.prod(1 - found[:turn]) * (found[turn] if i + 1 < len(node) else 1)
        return v

    def after(node: Branch) -> list[Branch]:
        turns = order(node[:-1])
        at = turns.index(node[-1])
        sibling = [(*node[:-1], turns[at + 1])] if at + 1 < len(turns) else []
        return sibling + ([(*node, order(node)[0])] if len(node) < depth else [])

    level = {frozenset([(order(())[0],)])}
    for _ in range(budget - 1):
        level = {nodes | {new} for nodes in level for node in nodes for new in after(node) if new not in nodes}
    values = {node: value(node) for nodes in level for node in nodes}
    assert all(value(new) <= v + 1e-12 for node, v in values.items() for new in after(node))  # v falls along every edge
    return max(sum(values[node] for node in nodes) for nodes in level)


@pytest.mark.parametrize("budget", range(1, 7))
@pytest.mark.parametrize("seed", range(4))
def test_the_heap_takes_the_largest_sum_of_values(seed: int, budget: int) -> None:
    law, order = streams(seed, 3, 0.7)
    growth = grown(law, order, budget, depth=3)
    assert sum(growth.values[1:]) == pytest.approx(best_sum(law, order, budget, 3), abs=1e-12)


def test_hand_case_of_the_heap() -> None:
    laws = {(): np.array([0.6, 0.3, 0.1]), (0,): np.array([0.3, 0.5, 0.2])}
    orders = {(): [0, 1, 2], (0,): [1, 0, 2]}
    growth = grown(lambda at: laws.get(at, np.array([0.8, 0.1, 0.1])), lambda at: orders.get(at, [0, 1, 2]), 7)
    # 1: root draws 0, leaving .4 (R = 0, .75, .25) and a child at .6; 2: the child draws 1 of .5, leaving .3 and .3;
    # 3: the root at .4 draws 1, leaving .4 * .25 = .1 for a third and .4 * .75 = .3 for its child; then the three at .3.
    assert growth.values[1:4] == pytest.approx([1, 0.6, 0.4], abs=1e-12)
    assert [branch(growth, n) for n in (1, 2, 3)] == [(0,), (0, 1), (1,)]
    assert growth.values[4:7] == pytest.approx([0.3] * 3, abs=1e-12)
    assert {branch(growth, n) for n in (4, 5, 6)} == {(0, 0), (0, 1, 0), (1, 0)}
    third = grown(lambda at: laws.get(at, np.array([1.0])), lambda at: orders.get(at, [0]), 40, depth=2)
    at = {branch(third, n): third.values[n] for n in range(1, len(third.tokens))}
    assert at[(2,)] == pytest.approx(0.1, abs=1e-12)
    assert at[(1, 0)] == pytest.approx(0.3, abs=1e-12)


def test_equal_values_come_in_the_order_of_insertion() -> None:
    growth = grown(lambda at: np.array([0.5, 0.25, 0.25]), lambda at: [0, 1, 2], 3)
    assert [branch(growth, n) for n in (1, 2, 3)] == [
        (0,),
        (1,),
        (0, 0),
    ]  # sibling and child at .5: the sibling was first


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 15))
def test_the_threshold_form_is_the_heap_form(seed: int, size: int, budget: int) -> None:
    law, order = streams(seed, size, 2.0)
    heap, further = grown(law, order, budget, depth=6), grown(law, order, budget + 1, depth=6)
    assume(further.values[-1] < heap.values[-1])  # nodes of one value are all above a threshold, or none is
    layers = grown(law, order, 10_000, depth=6, threshold=heap.values[-1])
    assert {branch(layers, n) for n in range(len(layers.tokens))} == {branch(heap, n) for n in range(len(heap.tokens))}


def test_the_threshold_form_asks_once_per_layer_and_stops_before_a_draw() -> None:
    law, order = streams(1, 5, 2.0)
    growth, asked = Growth(0), []

    def laws(nodes: Sequence[int]) -> list[np.ndarray]:
        asked.append({growth.depths[n] for n in nodes})
        return [law(branch(growth, n)) for n in nodes]

    grow(growth, laws, lambda n, d, most: chances(d, order(branch(growth, n))), 1000, 99, 0.01)
    assert asked == [{depth} for depth in range(max(growth.depths))] or asked == [
        {d} for d in range(max(growth.depths) + 1)
    ]
    capped = grown(law, order, 7, threshold=0.01)
    assert capped.tokens == growth.tokens[:8]


# ---- verification


def tree_of(law: np.ndarray, children: Sequence[int]) -> Tree:
    return Tree([0, *children], [-1] + [0] * len(children), draws="without replacement", laws={0: law})


def verified(tree: Tree, target: np.ndarray) -> dict[tuple[bool, int], float]:
    """(whether a child was accepted, the first token that is emitted) -> probability; the target's law is the same everywhere."""
    rows = Rows(torch.zeros(len(tree.tokens), len(target)), SAMPLED)
    rows._laws = dict.fromkeys(range(len(tree.tokens)), target)

    def run(chance: Chance) -> tuple[bool, int]:
        path, last = RecursiveRejection().walk(tree, rows, chance)
        return bool(path), tree.tokens[path[0]] if path else last

    return law_of_outcomes(run)


def test_hand_case_of_the_verifier() -> None:
    T, D = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.3, 0.1])
    # Token 0 is accepted with .2 / .6; then R = norm(0, 0, .4), so token 1 is rejected surely and 2 comes out.
    assert verified(tree_of(D, [0, 1]), T) == pytest.approx({(True, 0): 1 / 3, (False, 2): 2 / 3}, abs=1e-12)
    assert verified(tree_of(T, [1, 0]), T) == pytest.approx({(True, 1): 1.0}, abs=1e-12)


def test_laws_that_differ_by_rounding_are_equal() -> None:
    D, T = np.array([0.5, 0.5]), np.array([np.nextafter(0.5, 0), 0.5])
    law = verified(tree_of(D, [0, 1]), T)
    assert {(True, 0), *law} == {
        (True, 0),
        (False, 0),
        (False, 1),
    }  # after a rejection that was rounding: a token from T
    assert law[True, 0] == pytest.approx(1, abs=1e-12)


def test_a_draft_of_one_token_leaves_nothing_after_it() -> None:
    D, T = np.array([1.0, 0.0, 0.0]), np.array([0.25, 0.25, 0.5])
    assert verified(tree_of(D, [0]), T) == pytest.approx(
        {(True, 0): 0.25, (False, 1): 0.25, (False, 2): 0.5}, abs=1e-12
    )


# ---- reductions


@pytest.mark.parametrize("length", [1, 5])
def test_a_chain_is_ordinary_speculative_sampling_token_by_token(length: int) -> None:
    rng = np.random.default_rng(length)
    accepted = 0
    for seed in range(200):
        P, Q = rng.dirichlet([1.0] * 6, (2, 6))
        growth = grown(lambda at, P=P: P[at[-1] if at else 0], lambda at, rng=rng: [int(rng.integers(6))], length)
        tree = Tree(growth.tokens, growth.parents, draws="chain", laws=growth.laws)
        assert tree.parents == list(range(-1, length))  # a child only: the order ends after the first
        rows = Rows(torch.tensor(Q).log()[tree.tokens], SAMPLED)
        ours = RecursiveRejection().walk(tree, rows, np.random.default_rng(seed))
        assert ours == ChainRejection().walk(tree, rows, np.random.default_rng(seed))
        accepted += len(ours[0])
    assert accepted > 50


def test_chains_of_a_draft_model_are_verified_alike() -> None:
    target, draft = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, seed=1)
    run = {"drafter": Chain(4), "draft": draft, "sampling": Sampling(2.0), "max_new_tokens": 60}
    ours = generate(target, [[1, 2]], verifier=RecursiveRejection(), **run)[0]
    theirs = generate(target, [[1, 2]], verifier=ChainRejection(), **run)[0]
    assert (ours.ids, ours.sources) == (theirs.ids, theirs.sources)
    assert "draft" in ours.sources


def test_a_budget_of_one_is_single_token_speculative_sampling() -> None:
    rng = np.random.default_rng(0)
    P, Q = rng.dirichlet([1.0] * 3, (2, 3))
    logits = torch.tensor(Q).log()

    def emitted(chance: Chance) -> tuple[bool, int]:
        tree = DySpec(1, draft_temperature=1.0).propose(TextSession(markov(P)), Context([0], 9, SAMPLED, chance))
        assert len(tree) == 1
        path, last = RecursiveRejection().select(tree, Rows(logits[tree.tokens], SAMPLED), chance)
        return bool(path), tree.tokens[path[0]] if path else last

    law = law_of_outcomes(emitted)
    both = np.minimum(P[0], Q[0])
    for token in range(3):
        assert law.get((True, token), 0) == pytest.approx(both[token], abs=1e-12)
        assert law.get((False, token), 0) == pytest.approx(Q[0, token] - both[token], abs=1e-12)


@pytest.mark.parametrize("threshold", [None, 0.03])
def test_where_draft_and_target_agree_every_first_child_is_accepted(threshold: float | None) -> None:
    model = tiny(vocab_size=12, seed=0)
    small = model.session()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tree = DySpec(12, threshold, draft_temperature=0.8).propose(
            small, Context([1, 2, seed % 12], 50, Sampling(0.8), rng)
        )
        session = model.session()
        session.prefill([1, 2])
        rows = Rows(session.extend(tree.tokens, tree.parents), Sampling(0.8))
        path, _ = RecursiveRejection().select(tree, rows, rng)
        node, firsts = 0, []
        while tree.children[node]:
            node = tree.children[node][0]
            firsts.append(node)
        assert path == firsts


# ---- budgets and bad input


def test_a_budget_of_0_is_plain_decoding() -> None:
    target, draft = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, seed=1)
    run = {"sampling": SAMPLED, "max_new_tokens": 20, "seed": 3}
    plain = generate(target, [[1, 2]], drafter=Plain(), **run)[0]
    for threshold in (None, 0.1):
        none = generate(target, [[1, 2]], drafter=DySpec(0, threshold), draft=draft, **run)[0]
        assert (none.ids, none.forwards) == (plain.ids, 20)


@pytest.mark.parametrize("threshold", [None, 1e-9])
def test_a_budget_beyond_all_nodes_ends(threshold: float | None) -> None:
    growth = grown(*streams(0, 3, 2.0), 10_000, depth=3, threshold=threshold)
    assert len(growth.tokens) - 1 == 3 + 9 + 27
    assert sorted(branch(growth, n) for n in range(1, 40)) == sorted(
        x for d in (1, 2, 3) for x in product(range(3), repeat=d)
    )


def test_no_draft_is_deeper_than_the_tokens_left() -> None:
    draft = tiny(vocab_size=3, seed=1)
    for limit in range(4):
        tree = DySpec(1000).propose(draft.session(), Context([1, 2], limit, SAMPLED, np.random.default_rng(0)))
        assert len(tree) == sum(3**d for d in range(1, limit + 1))


def test_the_draft_model_runs_only_for_inner_nodes() -> None:
    draft = tiny(vocab_size=12, seed=1)
    session = draft.session()
    tree = DySpec(20).propose(session, Context([1, 2], 99, SAMPLED, np.random.default_rng(0)))
    assert session.forwards == sum(bool(below) for below in tree.children) == len(tree.laws) < 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", -1),
        *(("threshold", x) for x in (0.0, 1.0, -0.5, math.nan)),
        *(("draft_temperature", x) for x in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_a_bad_value_is_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"DySpec\.{field} must be .*, got {value}"):
        DySpec(**{field: value})


def test_models_that_do_not_fit_are_refused() -> None:
    target = tiny(vocab_size=12)
    with pytest.raises(UserError, match=r"draft .* has 13 tokens and model .* has 12"):
        generate(target, [[1]], drafter=DySpec(), draft=tiny(vocab_size=13))
    with pytest.raises(UserError, match="DySpec needs a draft model"):
        generate(target, [[1]], drafter=DySpec())


@pytest.mark.parametrize("draws", ["fixed", "iid"])
def test_trees_that_were_drawn_otherwise_are_refused(draws: str) -> None:
    tree = Tree([0, 1], [-1, 0], draws=draws, laws={0: np.array([0.5, 0.5])})
    with pytest.raises(UserError, match=r"RecursiveRejection is exact only for drafts that are .*; this draft is"):
        RecursiveRejection().select(tree, Rows(torch.zeros(2, 2), SAMPLED), np.random.default_rng(0))
