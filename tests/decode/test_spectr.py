"""SpecTr (arXiv 2310.15141): the rule against brute force, whole blocks enumerated, and text against the target's law."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from exhaustive import Chance, TextLM, TextSession, chi_square, law_of_outcomes, markov
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from locum.decode import Chain, ChainRejection, Context, Plain, Rows, SpecTr, Tree, generate, spectr
from locum.decode.spectr import KSEQ, kseq, otm_acceptance
from locum.errors import UserError
from locum.models import LM, tiny
from locum.tokens import Sampling

SAMPLED = Sampling(1.0)


@pytest.fixture
def remembered_laws(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """The laws of the few texts there are, made by the real code once each."""
    law, select = Sampling.law, spectr.kseq
    laws: dict = {}
    rules: dict = {}

    def remembered(self: Sampling, logits: torch.Tensor) -> torch.Tensor:
        key = (self, logits.numpy().tobytes())
        if key not in laws:
            laws[key] = law(self, logits)
        return laws[key]

    def rule(p: np.ndarray, q: np.ndarray, k: int) -> spectr.Selection:
        key = (p.tobytes(), q.tobytes(), k)
        if key not in rules:
            rules[key] = select(p, q, k)
        return rules[key]

    monkeypatch.setattr(Sampling, "law", remembered)
    monkeypatch.setattr(spectr, "kseq", rule)


@st.composite
def laws(draw: st.DrawFn, most: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Two laws over one vocabulary: zeros, equal entries and masses down to 1e-9 included."""
    size = draw(st.integers(1, most))
    mass = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.floats(0, 1), st.integers(-9, 0).map(lambda e: 10.0**e))
    p, q = (np.array(draw(st.lists(mass, min_size=size, max_size=size))) for _ in "pq")
    assume(p.sum() > 1e-12 and q.sum() > 1e-12)
    return p / p.sum(), q / q.sum()


HAND = [  # p, q, k, rho*, beta, p_acc, alpha_k
    ((0.5, 0.5), (1, 0), 2, 1.5, 0.5, 0.75, 0.75),
    ((0.7, 0.3), (0.4, 0.6), 1, 1, 0.7, 0.7, 0.7),
    ((0.7, 0.3), (0.4, 0.6), 2, 1.417891, 0.582109, 0.825367, 0.91),
    ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 2, 1.584429, 0.415571, 0.658443, 0.69),
    ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 3, 2.100031, 0.338092, 0.710003, 0.771),
    ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 8, 3.789150, 0.231956, 0.878915, 1.0),
]


# Row 1 by hand: beta = min(.5, 1/rho) = .5 for rho <= 2, and 1 - .25 = .75 = rho * .5 gives rho = 1.5.
@pytest.mark.parametrize(("p", "q", "k", "rho", "beta", "p_acc", "alpha"), HAND)
def test_hand_cases(p: tuple, q: tuple, k: int, rho: float, beta: float, p_acc: float, alpha: float) -> None:
    p, q = np.array(p, float), np.array(q, float)
    rule = kseq(p, q, k)
    assert (rule.rho, rule.beta, rule.p_acc) == pytest.approx((rho, beta, p_acc), abs=1e-6)
    assert otm_acceptance(p, q, k) == pytest.approx(alpha, abs=1e-6)


@given(laws(), st.integers(1, 16))
def test_the_rule_is_a_coupling_and_near_the_optimum(pq: tuple[np.ndarray, np.ndarray], k: int) -> None:
    p, q = pq
    rule = kseq(p, q, k)
    accepted = np.minimum(p, q / rule.rho) * (rule.p_acc / rule.beta if rule.beta else 0.0)
    assert (q - accepted).min() >= -1e-9  # the residual before it is scaled, and before rounding is cut off
    assert rule.residual.min() >= -1e-9
    assert rule.residual.sum() == pytest.approx(1, abs=1e-9)
    assert accepted + (1 - rule.p_acc) * rule.residual == pytest.approx(q, abs=1e-9)
    alpha = otm_acceptance(p, q, k)
    assert (1 - (1 - 1 / k) ** k) * alpha - 1e-9 <= rule.p_acc <= alpha + 1e-9
    assert 1 <= rule.rho <= k


@given(laws(), st.integers(2, 16))
def test_the_factor_is_the_least_valid_one(pq: tuple[np.ndarray, np.ndarray], k: int) -> None:
    p, q = pq
    rule = kseq(p, q, k)
    rho = rule.rho * (1 - 1e-5)
    beta = np.minimum(p, q / rho).sum()
    below = -math.expm1(k * math.log1p(-beta)) - rho * beta if beta < 1 else 1 - rho * beta
    assert rule.p_acc - rule.rho * rule.beta <= 1e-9  # valid
    assert rho < 1 or below >= -1e-9  # a smaller one is not


@given(laws(), st.integers(1, 6))
def test_the_optimum_by_prefixes_is_that_over_all_subsets(pq: tuple[np.ndarray, np.ndarray], k: int) -> None:
    p, q = pq
    subsets = np.array(list(product([0.0, 1.0], repeat=len(p))))
    brute = (2 - subsets @ q - (1 - subsets @ p).clip(0) ** k).min()
    assert otm_acceptance(p, q, k) == pytest.approx(brute, abs=1e-9)


def transport(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """alpha_k as what it is: the largest flow from tuples of drafts to tokens that lie in them."""
    tuples = list(product(range(len(p)), repeat=k))
    edges = [(i, y) for i, x in enumerate(tuples) for y in set(x)]
    leaving, arriving = np.zeros((len(tuples), len(edges))), np.zeros((len(p), len(edges)))
    for column, (i, y) in enumerate(edges):
        leaving[i, column] = arriving[y, column] = 1
    bound = [*(math.prod(p[y] for y in x) for x in tuples), *q]
    return -linprog(-np.ones(len(edges)), A_ub=np.vstack([leaving, arriving]), b_ub=bound).fun


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_optimum_by_prefixes_is_the_linear_program(size: int, k: int) -> None:
    rng = np.random.default_rng([size, k])
    for concentration in (0.3, 1.0, 5.0):
        p, q = rng.dirichlet([concentration] * size, 2)
        assert otm_acceptance(p, q, k) == pytest.approx(transport(p, q, k), abs=1e-6)


@given(laws())
def test_one_draft_is_ordinary_speculative_sampling(pq: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pq
    rule = kseq(p, q, 1)
    overlap = np.minimum(p, q).sum()
    assert rule.rho == 1
    assert (rule.p_acc, otm_acceptance(p, q, 1)) == pytest.approx((overlap, overlap), abs=1e-9)
    if overlap < 1 - 1e-6:
        assert rule.residual == pytest.approx(np.maximum(q - p, 0) / (1 - overlap), abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_equal_laws_are_always_accepted(k: int) -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])
    rule = kseq(p, p, k)
    assert (rule.rho, rule.p_acc) == (1, 1)
    sequences = [[1, 0]] * k
    tree = Tree.merge(0, sequences, draws="iid", laws={0: p, 1: p})
    rows = Rows(torch.tensor(p).log().expand(3, 4), SAMPLED)
    emitted = law_of_outcomes(lambda chance: len(KSEQ().walk(tree, rows, chance)[0]))
    assert emitted == pytest.approx({2: 1.0})


@pytest.mark.parametrize("k", [1, 2, 8])
def test_disjoint_laws_are_never_accepted(k: int) -> None:
    p, q = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.3, 0.7])
    rule = kseq(p, q, k)
    assert (rule.beta, rule.p_acc) == (0, 0)
    assert rule.residual.tolist() == q.tolist()


BLOCKS = {
    (1, 1): 1.7,
    (1, 2): 2.19,
    (2, 1): 1.825367,
    (2, 2): 2.453944,
    (3, 2): 2.626164,
    (4, 2): 2.736289,
    (1, 3): 2.533,
    (2, 3): 2.914549,
}


@pytest.mark.usefixtures("remembered_laws")
@pytest.mark.parametrize(("K", "L"), BLOCKS)
def test_a_whole_block_enumerated(K: int, L: int) -> None:
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])

    def block(chance: Chance) -> tuple[int, ...]:
        tree = SpecTr(K, L).propose(TextSession(markov(np.stack([p, p]))), Context([0], L, SAMPLED, chance))
        path, last = KSEQ().select(tree, Rows(torch.tensor(q).log().expand(len(tree.tokens), 2), SAMPLED), chance)
        return (*(tree.tokens[n] for n in path), last)

    law = law_of_outcomes(block)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    first = [sum(law[x] for x in law if x[0] == token) for token in (0, 1)]
    # A block of one token is followed by the first token of the next.
    joint = {
        (a, b): law.get((a,), 0) * first[b] + sum(law[x] for x in law if x[:2] == (a, b))
        for a in (0, 1)
        for b in (0, 1)
    }
    assert list(joint.values()) == pytest.approx([0.16, 0.24, 0.24, 0.36], abs=1e-9)
    assert sum(law[x] * len(x) for x in law) == pytest.approx(BLOCKS[K, L], abs=1e-6)


@pytest.mark.usefixtures("remembered_laws")
def test_a_block_enumerated_where_the_laws_depend_on_the_text() -> None:
    rng = np.random.default_rng(3)
    P, Q = rng.dirichlet([0.7] * 3, (2, 3))

    def block(state: int) -> dict[tuple[int, ...], float]:
        def run(chance: Chance) -> tuple[int, ...]:
            tree = SpecTr(2, 2).propose(TextSession(markov(P)), Context([state], 2, SAMPLED, chance))
            path, last = KSEQ().select(tree, Rows(torch.tensor(Q).log()[tree.tokens], SAMPLED), chance)
            return (*(tree.tokens[n] for n in path), last)

        return law_of_outcomes(run)

    for state in range(3):
        law = block(state)
        for a, b in product(range(3), repeat=2):
            goes_on = sum(law[x] for x in law if x[:2] == (a, b)) + law.get((a,), 0) * Q[a, b]
            assert goes_on == pytest.approx(Q[state, a] * Q[a, b], abs=1e-9)


def test_at_temperature_0_a_draft_is_accepted_if_it_is_the_best_token() -> None:
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.0, 0.0, 1.0])
    rows = Rows(torch.tensor(q).log().expand(4, 3), SAMPLED)
    for drafts, accepted in (([0, 1, 2], 1), ([0, 0, 1], 0), ([2, 2, 2], 1)):
        tree = Tree.merge(0, [[x] for x in drafts], draws="iid", laws={0: p})
        # The verifier's own rule on a one-hot law, without the short cut that `select` takes at temperature 0.
        emitted = law_of_outcomes(
            lambda chance, tree=tree: (len((kept := KSEQ().walk(tree, rows, chance))[0]), kept[1])
        )
        assert emitted == pytest.approx({(accepted, 2): 1.0})
        greedy = Rows(torch.tensor(q).log().expand(4, 3), Sampling(0.0))
        path, token = KSEQ().select(tree, greedy, np.random.default_rng(0))
        assert (len(path), token) == (accepted, 2)


@pytest.mark.usefixtures("unchecked")
def test_one_sequence_is_ordinary_speculative_sampling_token_by_token() -> None:
    target, draft, sampling = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, seed=1), Sampling(2.0)
    accepted = 0
    for seed in range(30):
        ids = np.random.default_rng(seed).integers(12, size=5).tolist()
        session = target.session()
        session.prefill(ids[:-1])
        # One of Chain's trees and one of SpecTr's, through both rules with the same random numbers.
        for drafter in (Chain(4), SpecTr(K=1, L=4)):
            tree = drafter.propose(draft.session(), Context(ids, 4, sampling, np.random.default_rng(seed)))
            rows = Rows(session.extend(tree.tokens, tree.parents), sampling)
            session.rewind(len(ids) - 1)
            kept = KSEQ().walk(tree, rows, _OneDraft(seed))
            assert ChainRejection().walk(tree, rows, np.random.default_rng(seed)) == kept
            accepted += len(kept[0])
    assert accepted > 30


class _OneDraft(np.random.Generator):
    """The stream of a seed, less what ordering a single draft would take from it."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))

    def permutation(self, x: np.ndarray) -> np.ndarray:
        assert len(x) == 1
        return x


def test_no_draft_is_plain_sampling_token_by_token() -> None:
    target, draft = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, seed=1)
    run = {"sampling": SAMPLED, "max_new_tokens": 30, "seed": 4}
    plain = generate(target, [[1, 2]], drafter=Plain(), **run)[0]
    none = generate(target, [[1, 2]], drafter=SpecTr(8, 0), draft=draft, **run)[0]
    assert (none.ids, none.forwards) == (plain.ids, 30)


def joint_law(lm: TextLM, prompt: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """The law of the next `length` tokens, every text tried."""
    law = {(): 1.0}
    for _ in range(length):
        law = {
            (*x, t): w * p
            for x, w in law.items()
            for t, p in enumerate(lm.whole(prompt + x).double().softmax(-1).tolist())
        }
    return law


@pytest.mark.usefixtures("remembered_laws")
def test_texts_of_two_transformers_have_the_targets_law() -> None:
    target = TextLM(tiny(vocab_size=8, hidden_size=16, seed=3, scale=0.4).model, remember=True)
    draft = TextLM(tiny(vocab_size=8, hidden_size=16, layers=1, seed=4, scale=0.4).model, remember=True)
    drafter, rng, prompt, n = SpecTr(2, 2), np.random.default_rng(1), [1, 5], 10_000
    texts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    session, small = target.session(), draft.session()
    for _ in range(n):
        text = list(prompt)
        while len(text) < 5:
            tree = drafter.propose(small, Context(text, 2, SAMPLED, rng))
            session.rewind(0)
            session.prefill(text[:-1])
            path, last = KSEQ().select(tree, Rows(session.extend(tree.tokens, tree.parents), SAMPLED), rng)
            text += [*(tree.tokens[node] for node in path), last]
            accepted += len(path)
        texts[tuple(text[2:5])] += 1
    assert accepted > 0.5 * n  # there is something to be wrong about
    assert chi_square(texts, joint_law(target, (1, 5), 3)) > 1e-3


def test_scoring_the_trie_is_scoring_every_sequence() -> None:
    lm = tiny(vocab_size=4, seed=2)
    prompt, sequences = [1, 2, 3, 0], np.random.default_rng(0).integers(4, size=(8, 6)).tolist()
    tree = Tree.merge(prompt[-1], sequences, draws="iid")
    assert len(tree) < 8 * 6
    assert tree.counts[0] == 8
    session = lm.session()
    session.prefill(prompt[:-1])
    together = session.extend(tree.tokens, tree.parents)
    with torch.inference_mode():
        alone = lm.model(input_ids=torch.tensor([prompt + x for x in sequences])).logits[:, len(prompt) - 1 :]
    for x, logits in zip(sequences, alone, strict=True):
        assert (together[[0, *tree.follow(x)]] - logits).abs().max() < 1e-4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(0.7, top_k=5), Sampling(1.2, top_p=0.8)])
def test_caches_change_nothing(sampling: Sampling) -> None:
    target, draft = tiny(vocab_size=12, seed=0), tiny(vocab_size=12, layers=1, seed=1)
    run = {"drafter": SpecTr(4, 4), "sampling": sampling, "max_new_tokens": 24}
    cached = generate(target, [[1, 2, 3], [7]], draft=draft, **run)
    uncached = generate(TextLM(target.model), [[1, 2, 3], [7]], draft=TextLM(draft.model), **run)
    assert [g.ids for g in cached] == [g.ids for g in uncached]
    assert any("draft" in g.sources for g in cached)


def test_the_text_ends_with_the_first_end_token_inside_an_accepted_path() -> None:
    model = tiny(vocab_size=12, seed=0)
    run = {"drafter": SpecTr(4, 4), "draft": model, "sampling": SAMPLED, "max_new_tokens": 40}
    whole = generate(model, [[1, 2]], **run)[0]
    at = next(
        i for i, source in enumerate(whole.sources) if i > 4 and source == "draft" and whole.ids[i] not in whole.ids[:i]
    )
    ending = tiny(vocab_size=12, seed=0)
    ending.model.generation_config.eos_token_id = whole.ids[at]
    cut = generate(ending, [[1, 2]], **run)[0]
    assert (cut.ids, cut.finish) == (whole.ids[: at + 1], "eos")


@pytest.mark.parametrize(("field", "value"), [("K", 0), ("K", -3), ("L", -1)])
def test_a_bad_value_is_named(field: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"SpecTr\.{field} must be >= \d, got {value}"):
        SpecTr(**{field: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rule", [kseq, otm_acceptance])
def test_laws_that_are_none_are_refused(rule) -> None:
    p = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        rule(p, p, 0)
    with pytest.raises(ValueError, match="p and q must have one vocabulary, got 2 and 3 tokens"):
        rule(p, np.array([0.5, 0.25, 0.25]), 2)
    for wrong in ([math.nan, 1.0], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="q must be a law"):
            rule(p, np.array(wrong), 2)
        with pytest.raises(ValueError, match="p must be a law"):
            rule(np.array(wrong), p, 2)


def test_models_that_do_not_fit_are_refused() -> None:
    target = tiny(vocab_size=12)
    with pytest.raises(UserError, match=r"draft .* has 13 tokens and model .* has 12"):
        generate(target, [[1]], drafter=SpecTr(), draft=tiny(vocab_size=13), sampling=SAMPLED)
    with pytest.raises(UserError, match="SpecTr needs a draft model"):
        generate(target, [[1]], drafter=SpecTr(), sampling=SAMPLED)
    broken: LM = tiny(vocab_size=12, seed=1)
    broken.model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="logits hold NaN"):
        generate(target, [[1]], drafter=SpecTr(), draft=broken, sampling=SAMPLED)


@pytest.mark.parametrize("draws", ["fixed", "without replacement"])
def test_trees_that_were_drawn_otherwise_are_refused(draws: str) -> None:
    tree = Tree([0, 1], [-1, 0], draws=draws, laws={0: np.array([0.5, 0.5])})
    rows = Rows(torch.zeros(2, 2), SAMPLED)
    with pytest.raises(UserError, match=r"verifier KSEQ is exact only for drafts that are 'chain' .*; this draft is"):
        KSEQ().select(tree, rows, np.random.default_rng(0))
