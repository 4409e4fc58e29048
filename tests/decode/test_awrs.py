"""AWRS (arXiv 2504.05410): estimators enumerated exactly, and the method on the toy and on a tiny model."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from locum.decode.awrs import AWRS, Chance, geometric, paper, recursive, unweighted
from locum.errors import UserError


class Scripted(Chance):
    """Chance that follows a script of choices and notes how likely each was; beyond the script it takes the first."""

    def __init__(self, script: tuple[int, ...], cap: int) -> None:
        self.script, self.cap, self.probability = script, cap, 1.0
        self.taken: list[int] = []
        self.widths: list[int] = []

    def choose(self, masses: np.ndarray) -> int:
        at = len(self.taken)
        k = self.script[at] if at < len(self.script) else 0
        self.taken.append(k)
        self.widths.append(len(masses))
        self.probability *= masses[k] / masses.sum()
        return k

    def order(self, logp: np.ndarray) -> Iterator[int]:
        left = np.exp(logp)
        while left.any():
            tokens = np.flatnonzero(left)
            token = int(tokens[self.choose(left[tokens])])
            yield token
            left[token] = 0.0

    def skipped(self, rest: float) -> float:
        # 0, 1, ..., cap - 1, or more: a limit of `cap` rejections tells no more apart.
        k = np.arange(self.cap)
        return float(self.choose(np.append(rest * (1 - rest) ** k, (1 - rest) ** self.cap)))


def traces(run, cap: int = 1) -> Iterator[tuple[float, object]]:
    """(probability, result) of every way that `run(chance)` can go."""
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        chance = Scripted(scripts.pop(), cap)
        result = run(chance)
        yield chance.probability, result
        for i in range(len(chance.script), len(chance.taken)):
            scripts += [(*chance.taken[:i], k) for k in range(1, chance.widths[i])]


def moments(run, cap: int = 1) -> dict[str, object]:
    """Exact mean and standard deviation of the weight, mean checks, and the mass E[w 1{x}] and law P(x) of each token."""
    total = mean = square = checks = 0.0
    mass: dict[int, float] = {}
    law: dict[int, float] = {}
    for p, draw in traces(run, cap):
        w = math.exp(draw.log_weight)
        total, mean, square, checks = total + p, mean + p * w, square + p * w * w, checks + p * draw.checks
        if draw.token is not None:
            mass[draw.token] = mass.get(draw.token, 0.0) + p * w
            law[draw.token] = law.get(draw.token, 0.0) + p
    sd = math.sqrt(max(square - mean**2, 0.0))
    return {"total": total, "mean": mean, "sd": sd, "checks": checks, "mass": mass, "law": law}


# p, allowed, Z, then standard deviation and mean checks of `paper` and of `recursive`
TABLE = [
    ((0.5, 0.5), {0}, 0.5, 0.30619, 1.75, 0.0, 2.0),
    ((0.5, 0.3, 0.2), {0}, 0.5, 0.30614, 2.0992, 0.0, 2.5),
    ((0.5, 0.3, 0.2), {1}, 0.3, 0.25421, 2.4994, 0.0, 2.7),
    ((0.5, 0.3, 0.2), {0, 2}, 0.7, 0.29875, 1.9182, 0.24495, 2.3),
    ((0.7, 0.1, 0.1, 0.1), {1, 2}, 0.2, 0.20941, 3.0062, 0.14907, 3.1111),
]


@pytest.mark.parametrize(("p", "allowed", "z", "sd_paper", "checks_paper", "sd_recursive", "checks_recursive"), TABLE)
def test_table_of_exact_deviations_and_checks(p, allowed, z, sd_paper, checks_paper, sd_recursive, checks_recursive):
    for estimator, sd, checks in ((paper, sd_paper, checks_paper), (recursive, sd_recursive, checks_recursive)):
        m = moments(lambda c, e=estimator: e(np.log(p), allowed.__contains__, c))
        assert m["total"] == pytest.approx(1, abs=1e-12)
        assert m["mean"] == pytest.approx(z, abs=1e-10)
        assert m["mass"] == pytest.approx({a: p[a] for a in allowed}, abs=1e-10)
        assert m["law"] == pytest.approx({a: p[a] / z for a in allowed}, abs=1e-10)
        assert m["sd"] == pytest.approx(sd, abs=6e-6 if sd else 1e-7)
        assert m["checks"] == pytest.approx(checks, abs=6e-5)


def test_first_row_by_hand():
    """Allowed first (1/2): w = 1 or 1/2; rejected first (1/2): (1 - .5) / 2."""
    found: dict[float, float] = {}
    for probability, draw in traces(lambda c: paper(np.log([0.5, 0.5]), {0}.__contains__, c)):
        w = round(math.exp(draw.log_weight), 12)
        found[w] = found.get(w, 0.0) + probability
    assert found == pytest.approx({1.0: 0.25, 0.5: 0.25, 0.25: 0.5})


laws = st.lists(st.floats(0.01, 1), min_size=1, max_size=5).map(lambda x: np.array(x) / sum(x))


@settings(deadline=None, max_examples=40)
@given(p=laws, allowed=st.sets(st.integers(0, 4)))
def test_every_estimator_is_properly_weighted(p, allowed):
    want = {a: p[a] for a in allowed if a < len(p)}
    for estimator in (paper, recursive):
        m = moments(lambda c, e=estimator: e(np.log(p), allowed.__contains__, c))
        assert m["mass"] == pytest.approx(want, abs=1e-10)
        assert m["law"] == pytest.approx({a: v / sum(want.values()) for a, v in want.items()}, abs=1e-10)


@pytest.mark.parametrize("accepts", [2, 3])
@pytest.mark.parametrize("rejects", [1, 2, 3, 4, 5])
def test_geometric_with_a_cap_is_exact(accepts, rejects):
    p, allowed = (0.5, 0.3, 0.2), {1}
    m = moments(lambda c: geometric(np.log(p), allowed.__contains__, c, accepts, rejects), cap=rejects)
    assert m["total"] == pytest.approx(1, abs=1e-12)
    assert m["mass"] == pytest.approx({1: 0.3}, abs=1e-10)


@pytest.mark.parametrize("rejects", [1, 2, 3, 4])
@pytest.mark.parametrize(("p", "allowed"), [row[:2] for row in TABLE])
def test_recursive_with_a_cap_is_exact(p, allowed, rejects):
    m = moments(lambda c: recursive(np.log(p), allowed.__contains__, c, rejects))
    assert m["mass"] == pytest.approx({a: p[a] for a in allowed if m["mass"].get(a)}, abs=1e-10)
    assert m["mean"] == pytest.approx(sum(p[a] for a in allowed), abs=1e-10)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.slow
@pytest.mark.parametrize(("accepts", "sd"), [(2, 0.254), (4, 0.151)])
def test_geometric_without_a_cap(accepts, sd):
    rng, logp, n = np.random.default_rng(0), np.log([0.5, 0.3, 0.2]), 10_000
    chance = Chance(rng)
    w = np.exp([geometric(logp, {1}.__contains__, chance, accepts).log_weight for _ in range(n)])
    assert abs(w.mean() - 0.3) < 4 * w.std() / math.sqrt(n)
    assert w.std() == pytest.approx(sd, abs=0.005)


@pytest.mark.parametrize("estimator", [paper, recursive, geometric, unweighted])
def test_all_none_or_one_allowed(estimator):
    rng, logp = np.random.default_rng(1), np.log([0.4, 0.3, 0.2, 0.1])
    for _ in range(50):
        assert estimator(logp, lambda t: True, Chance(rng)).log_weight == pytest.approx(0, abs=1e-12)
        dead = estimator(logp, lambda t: False, Chance(rng))
        assert dead.token is None
        assert dead.log_weight == -math.inf
        assert dead.checks == 4
    # A mass of 1e-12 hidden behind 299 likelier tokens is found, and what remains of it keeps its digits.
    p = np.full(300, (1 - 1e-12) / 299)
    p[137] = 1e-12
    draw = estimator(np.log(p), {137}.__contains__, Chance(rng))
    assert draw.token == 137
    if estimator is recursive:
        assert draw.log_weight == pytest.approx(math.log(1e-12), rel=1e-6)


def test_more_than_one_extra_loop_is_biased():
    """(1 - psi0) L / (n + L) with L extra loops: right for L = 1, 13/24 instead of 1/2 for L = 2."""

    def loops(chance, extra):
        rejected, n, first, psi0 = [], 0, None, 0.0
        p = np.array([0.5, 0.5])
        for _ in range(extra + 1):
            left = np.where(np.isin([0, 1], rejected), -np.inf, np.log(p))
            for token in chance.order(left):
                if token == 0:
                    break
                rejected.append(token)
                n += 1
            if first is None:
                first, psi0 = 0, p[rejected].sum()
        return (1 - psi0) * extra / (n + extra)

    assert sum(p * w for p, w in traces(lambda c: loops(c, 1))) == pytest.approx(1 / 2, abs=1e-12)
    assert sum(p * w for p, w in traces(lambda c: loops(c, 2))) == pytest.approx(13 / 24, abs=1e-12)


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_weighted_rejection_with_replacement_is_unbiased(extra):
    """Definition 1, the step before: the mean of L / (n + L) is Z, n rejections in L + 1 independent loops."""
    z = Fraction(3, 10)
    terms = (
        math.comb(n + extra, extra) * z ** (extra + 1) * (1 - z) ** n * Fraction(extra, n + extra) for n in range(150)
    )
    assert float(sum(terms)) == pytest.approx(float(z), abs=1e-12)


@pytest.mark.parametrize("estimator", [paper, recursive, geometric, unweighted])
def test_law_of_the_token_when_the_order_is_lazy(estimator):
    """300 tokens, more than are put in order at once; most of the mass is rejected."""
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.full(300, 0.5))
    allowed = np.sort(rng.choice(300, 6, replace=False))
    logp, chance, known = np.log(p), Chance(rng), set(allowed.tolist())
    counts = np.zeros(300)
    for _ in range(1500):
        counts[estimator(logp, known.__contains__, chance).token] += 1
    share = p[allowed] / p[allowed].sum()
    big = share > 0.005  # cells of at least five
    expected = np.append(share[big], share[~big].sum()) * 1500
    observed = np.append(counts[allowed][big], counts[allowed][~big].sum())
    assert counts.sum() == observed.sum()
    keep = expected > 0
    assert chisquare(observed[keep], expected[keep]).pvalue > 1e-3


def test_weights_that_do_not_sum_to_one_carry_their_sum():
    logp = np.log([0.5, 0.3, 0.2]) + math.log(0.01)
    for estimator in ("paper", "recursive", "geometric", "auto"):
        draw = AWRS(estimator=estimator).draw(logp, lambda t: True, np.random.default_rng(0))
        assert draw.log_weight == pytest.approx(math.log(0.01))
    nothing = AWRS().draw(np.full(3, -np.inf), lambda t: True, np.random.default_rng(0))
    assert (nothing.token, nothing.log_weight, nothing.checks) == (None, -math.inf, 0)


def test_auto_takes_geometric_for_a_peaked_law():
    """Rule: geometric if max p >= 2/3 or L > 2, else recursive; told apart by their weights where one token is allowed."""
    rng = np.random.default_rng(3)

    def weights(p, **fields):
        method = AWRS(estimator="auto", **fields)
        return {round(math.exp(method.draw(np.log(p), {0}.__contains__, rng).log_weight), 9) for _ in range(60)}

    assert weights([0.5, 0.5]) == {0.5}
    assert len(weights([0.7, 0.3])) > 1
    assert len(weights([0.5, 0.5], max_accepts=4)) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_particles": 0}, "n_particles must be >= 1, got 0"),
        ({"tau": -0.1}, r"tau must be in \[0, 1\], got -0.1"),
        ({"tau": 1.5}, r"tau must be in \[0, 1\], got 1.5"),
        ({"tau": math.nan}, r"tau must be in \[0, 1\], got nan"),
        ({"estimator": "best"}, "estimator must be one of paper, recursive, geometric, auto, got 'best'"),
        ({"estimator": "geometric", "max_accepts": 1}, "max_accepts must be >= 2, got 1"),
        ({"max_accepts": 3}, "max_accepts must be 2 with the estimator 'paper', got 3"),
        ({"max_rejects": 5}, "max_rejects must be None with 'paper', got 5"),
        ({"estimator": "auto", "max_rejects": 0}, "max_rejects must be >= 1 or None, got 0"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(UserError, match=rf"AWRS\.{message}"):
        AWRS(**fields)
