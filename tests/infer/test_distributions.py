"""Distributions of programs: densities beside SciPy's, draws beside densities, and gradients of every kind that is offered."""

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import vi  # noqa: E402

X = np.array([0.2, 0.9])  # in every support
COV = np.array([[1.0, 0.0], [0.5, 0.7]])
DENSITIES = {
    "normal": (vi.normal(0.3, 0.7), X, stats.norm(0.3, 0.7).logpdf(X).sum()),
    "normal lanes": (vi.normal(X, X), 1 - X, stats.norm(X, X).logpdf(1 - X).sum()),
    "mv diagonal": (vi.mv_normal(np.zeros(2), X), X, stats.norm(0, X).logpdf(X).sum()),
    "mv": (vi.mv_normal(X, COV), 1 - X, stats.multivariate_normal(X, COV @ COV.T).logpdf(1 - X)),
    "uniform": (vi.uniform(-1.0, 2.0), X, stats.uniform(-1, 3).logpdf(X).sum()),
    "lognormal": (vi.lognormal(0.3, 0.7), X, stats.lognorm(0.7, scale=np.exp(0.3)).logpdf(X).sum()),
    "exponential": (vi.exponential(1.5), X, stats.expon(scale=1 / 1.5).logpdf(X).sum()),
    "laplace": (vi.laplace(0.3, 0.7), X, stats.laplace(0.3, 0.7).logpdf(X).sum()),
    "student_t": (vi.student_t(3.5, 0.3, 0.7), X, stats.t(3.5, 0.3, 0.7).logpdf(X).sum()),
    "gamma": (vi.gamma(2.5, 1.5), X, stats.gamma(2.5, scale=1 / 1.5).logpdf(X).sum()),
    "beta": (vi.beta(2.5, 1.5), X, stats.beta(2.5, 1.5).logpdf(X).sum()),
    "dirichlet": (vi.dirichlet([2.0, 3.0, 0.5]), [0.2, 0.3, 0.5], stats.dirichlet([2, 3, 0.5]).logpdf([0.2, 0.3, 0.5])),
    "flip": (vi.flip(0.3), [True, False], np.log(0.3 * 0.7)),
    "categorical": (vi.categorical(np.log([[1.0, 3.0], [2.0, 2.0]]) + 5), [1, 0], np.log(0.75 * 0.5)),
    "integers": (vi.integers(2, 6), 3, np.log(0.25)),
    "poisson": (vi.poisson(2.5), [0, 4], stats.poisson(2.5).logpmf([0, 4]).sum()),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name):
    law, value, expected = DENSITIES[name]
    got = law.log_prob(jnp.asarray(value))
    assert got.shape == ()
    assert float(got) == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize(
    ("law", "outside"),
    [
        (vi.uniform(0.0, 1.0), 1.5),
        (vi.lognormal(0.0, 1.0), -1.0),
        (vi.exponential(1.0), -1.0),
        (vi.gamma(2.0, 1.0), -1.0),
        (vi.beta(2.0, 2.0), 1.5),
        (vi.integers(0, 3), 3),
        (vi.poisson(2.0), -1),
    ],
)
def test_outside_the_support(law, outside):
    assert law.log_prob(outside) == -jnp.inf


def test_a_flip_keeps_away_from_certainty_in_its_logarithm_only():
    assert float(vi.flip(1.0).log_prob(False)) == pytest.approx(np.log(1e-7), abs=0.2)
    assert vi.flip(1.0).weights().tolist() == [0.0, 1.0]
    assert np.isfinite(jax.grad(lambda p: vi.flip(p).log_prob(True))(0.0))


# Gradients of E f beside those of a sum over the support: the density is checked above, and a grid knows no draws.

GRID = np.linspace(-14, 14, 8001)
POSITIVE = np.linspace(0, 40, 16001)[1:]
UNIT = np.linspace(0, 1, 8001)[1:-1]
COUNTS = np.arange(60)
LAWS = {
    "normal": ((0.4, 0.8), GRID),
    "lognormal": ((0.2, 0.5), POSITIVE),
    "exponential": ((1.3,), POSITIVE),
    "laplace": ((0.4, 0.8), GRID),
    "student_t": ((9.0, 0.4, 0.8), 10 * GRID),
    "gamma": ((2.5, 1.5), POSITIVE),
    "beta": ((2.5, 1.5), UNIT),
    "uniform": ((0.4, 1.8), None),
    "flip": ((0.3,), np.arange(2)),
    "poisson": ((2.5,), COUNTS),
    "categorical": ((np.array([0.1, -0.3, 0.8]),), np.arange(3)),
}
STRATEGIES = {
    "normal": ("reparam", "reinforce", "mvd"),
    "lognormal": ("reparam", "reinforce"),
    "exponential": ("reparam", "reinforce"),
    "laplace": ("reparam", "reinforce"),
    "student_t": ("reparam", "reinforce"),
    "gamma": ("implicit", "reinforce"),
    "beta": ("implicit", "reinforce"),
    "uniform": ("reparam",),
    "flip": ("enum", "mvd", "reinforce"),
    "poisson": ("mvd", "reinforce"),
    "categorical": ("enum", "reinforce"),
}


def smooth(x):
    return jnp.sin(x) + 0.3 * x


def exact(name):
    """The gradient of E smooth(x)."""
    numbers, grid = LAWS[name]
    if grid is None:
        a, b = numbers
        total = (np.cos(a) - np.cos(b)) + 0.15 * (b**2 - a**2)
        return ((-smooth(a) * (b - a) + total) / (b - a) ** 2, (smooth(b) * (b - a) - total) / (b - a) ** 2)

    def mean(p):
        return jnp.sum(smooth(grid) * jnp.exp(jax.vmap(getattr(vi, name)(*p).log_prob)(jnp.asarray(grid))))

    grads = jax.grad(mean)(tuple(map(jnp.asarray, numbers)))
    return jax.tree.map(lambda g: g * (grid[1] - grid[0]), grads)


@pytest.mark.parametrize(
    "names",
    [
        ("gamma",),
        ("beta",),
        ("student_t",),
        ("poisson",),
        tuple(n for n in LAWS if n not in ("gamma", "beta", "student_t", "poisson")),
    ],
    ids="-".join,
)
def test_gradients_are_unbiased(names):
    """In one compiled function: strategies of one law share its draws."""
    params = {name: tuple(map(jnp.asarray, LAWS[name][0])) for name in names}

    def one(key):
        found = {}
        for name, strategy in [(law, strategy) for law in names for strategy in STRATEGIES[law]]:
            site = getattr(vi, f"{name}_{strategy}")
            program = vi.expectation(lambda sample, p, site=site: smooth(sample(site(*p)) * 1.0))
            found[name, strategy] = program.value_and_grad(key, params[name])[1]
        return {" ".join(which): grad for which, grad in found.items()}

    grads = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 100_000))
    expected = {name: exact(name) for name in names}
    for which, grad in grads.items():
        for got, want in zip(grad, expected[which.split()[0]], strict=True):
            got = np.asarray(got, np.float64)
            se = got.std(0) / len(got) ** 0.5
            assert np.all(np.abs(got.mean(0) - np.asarray(want)) < 4 * se + 2e-5), (which, got.mean(0), want, se)


def test_gradients_of_vectors():
    """mv_normal: E |x|^2 = |m|^2 + |L|_F^2; dirichlet: E x_0 = a_0 / sum a."""
    low = jnp.asarray(COV, jnp.float32)
    keys = jax.random.split(jax.random.key(2), 20_000)

    def square(sample, p):
        return jnp.sum(sample(vi.mv_normal_reparam(p[0], p[1])) ** 2)

    mean, factor = jax.jit(jax.vmap(lambda k: vi.expectation(square).value_and_grad(k, (jnp.ones(2), low))[1]))(keys)
    assert np.asarray(mean).mean(0) == pytest.approx([2, 2], abs=0.07)
    assert np.asarray(factor).mean(0) == pytest.approx(2 * COV, abs=0.13)

    def first(sample, a):
        return sample(vi.dirichlet_implicit(a))[0]

    a = jnp.array([2.0, 3.0, 1.0])
    grad = np.asarray(jax.jit(jax.vmap(lambda k: vi.expectation(first).value_and_grad(k, a)[1]))(keys), np.float64)
    assert np.all(np.abs(grad.mean(0) - np.array([4, -2, -2]) / 36) < 4 * grad.std(0) / len(grad) ** 0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vi.normal(0.0, -1.0), r"normal: scale must be > 0, got -1\.0"),
        (lambda: vi.flip(1.5), r"flip: p must be in \[0, 1\], got 1\.5"),
        (lambda: vi.gamma(0.0, 1.0), "gamma: concentration must be > 0"),
        (lambda: vi.poisson(np.array([1.0, -1.0])), "poisson: rate must be > 0"),
        (lambda: vi.student_t(0.0), "student_t: df must be > 0"),
        (
            lambda: vi.mv_normal(np.zeros(2), np.ones(3)),
            r"mv_normal: mean must have shape \[d\].* got \(2,\) and \(3,\)",
        ),
        (lambda: vi.dirichlet(1.0), "dirichlet: concentration must be an array"),
        (lambda: vi.categorical(1.0), r"categorical: logits must be an array \[\.\.\., values\]"),
        (lambda: vi.integers(3, 3), "integers: high must be above low, got low 3 and high 3"),
        (lambda: vi.uniform(1.0, 1.0), r"uniform: high must be above low, got low 1\.0 and high 1\.0"),
    ],
)
def test_bad_parameters_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    ("law", "strategy", "why"),
    [
        (vi.flip(0.5), vi.Reparam(), "flip cannot take the strategy Reparam: its draw is no smooth function"),
        (vi.normal(0.0, 1.0), vi.Enum(), "normal cannot take the strategy Enum: it has infinitely many values"),
        (vi.gamma(1.0, 1.0), vi.MVD(), "gamma cannot take the strategy MVD: no coupled pair"),
        (vi.categorical(np.zeros(3)), vi.MVD(), "categorical cannot take the strategy MVD"),
        (vi.poisson(1.0), vi.Enum(), "poisson cannot take the strategy Enum"),
        (
            vi.uniform(jnp.zeros(()), 1.0),
            vi.Reinforce(),
            "uniform cannot take the strategy Reinforce: the ends of its support",
        ),
    ],
)
def test_impossible_pairs_are_refused_with_the_reason(law, strategy, why):
    with pytest.raises(UserError, match=why):
        vi.site(law, strategy)


def test_what_a_bare_distribution_gets():
    assert vi.default_strategy(vi.normal(0.0, 1.0)) == vi.Reparam()
    assert vi.default_strategy(vi.gamma(1.0, 1.0)) == vi.Reparam()
    assert vi.default_strategy(vi.flip(0.5)) == vi.Enum()
    assert vi.default_strategy(vi.categorical(np.zeros(16))) == vi.Enum()
    assert vi.default_strategy(vi.categorical(np.zeros(17))) == vi.Reinforce()
    assert vi.default_strategy(vi.poisson(2.0)) == vi.Reinforce()
