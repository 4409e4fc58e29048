"""Stochastic densities keep both of their promises, and the objectives made of them are bounds with unbiased gradients."""

import itertools

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import vi  # noqa: E402
from locum.infer.vi_programs import (  # noqa: E402
    CONE_DATA,
    CONE_LOG_EVIDENCE,
    CONE_OBJECTIVES,
    cone_model,
    conjugate_guide,
    conjugate_model,
)

KEYS = jax.random.split(jax.random.key(0), 100_000)


def mean_is(got, exact):
    got = np.asarray(got, np.float64)
    se = got.std() / len(got) ** 0.5
    assert abs(got.mean() - exact) < 4 * se + 2e-6 * abs(exact), f"{got.mean()} +- {se}, exact {exact}"


def joint(sample, s):
    """u ~ N(0, 1), x ~ N(u, s): x is N(0, 1 + s^2)."""
    sample("x", vi.normal(sample("u", vi.normal(0.0, 1.0)), s))


S, X = 1.5, 0.7
EXACT = stats.norm(0, (1 + S**2) ** 0.5).pdf(X)


def posterior_of_u(sample, s, given, *args):
    return sample("u", vi.normal(given["x"] / (1 + s**2), s / jnp.sqrt(1 + s**2)))


def wide(sample, s, given):
    sample("u", vi.normal(0.3 * given["x"], 1.2))


def noisy(sample, s, given):
    """The wide proposal with an auxiliary that is forgotten: a random density as a proposal."""
    v = sample("v", vi.normal(0.0, 0.5))
    sample("u", vi.normal(0.3 * given["x"] + v, 1.1))


@pytest.mark.parametrize(
    "proposal", [None, wide, vi.marginal("u", noisy, vi.SIR(2))], ids=["own", "program", "marginal"]
)
@pytest.mark.parametrize("n", [1, 3])
def test_a_marginal_is_unbiased_both_ways(n, proposal):
    """E[zeta] = q(x). And E[1 / xi | x] = 1 / q(x): with x ~ q, E[g(x) / xi] is the integral of g, here of N(0, 1 / 4)."""
    q = vi.marginal("x", joint, vi.SIR(n, proposal))
    log_zeta = jax.jit(jax.vmap(lambda key: q.estimate_logpdf(key, {"x": X}, S)))(KEYS)
    mean_is(np.exp(log_zeta), EXACT)
    log_xi, choices = jax.jit(jax.vmap(lambda key: q.random_weighted(key, S)))(KEYS)
    assert list(choices) == ["x"]
    mean_is(stats.norm(0, 0.5).pdf(np.asarray(choices["x"])) * np.exp(-np.asarray(log_xi)), 1.0)


def test_more_particles_tighten_a_marginal():
    """log xi is too high on average, less so with more particles."""
    gaps = []
    for n in (1, 3, 10):
        q = vi.marginal("x", joint, vi.SIR(n))
        log_xi, choices = jax.jit(jax.vmap(lambda key, q=q: q.random_weighted(key, S)))(KEYS[:50_000])
        gap = np.asarray(log_xi) - stats.norm(0, (1 + S**2) ** 0.5).logpdf(np.asarray(choices["x"]))
        gaps.append((gap.mean(), gap.std() / len(gap) ** 0.5))
    for (more, e1), (less, e2) in itertools.pairwise(gaps):
        assert more - less > 4 * (e1**2 + e2**2) ** 0.5
    assert gaps[-1][0] > 0


def test_the_exact_posterior_as_proposal_leaves_no_variance():
    q = vi.marginal("x", joint, vi.SIR(3, posterior_of_u))
    log_zeta = jax.jit(jax.vmap(lambda key: q.estimate_logpdf(key, {"x": X}, S)))(KEYS[:100])
    log_xi, choices = jax.jit(jax.vmap(lambda key: q.random_weighted(key, S)))(KEYS[:100])
    assert np.asarray(log_zeta) == pytest.approx(np.full(100, np.log(EXACT)), abs=1e-5)
    assert np.asarray(log_xi) == pytest.approx(
        stats.norm(0, (1 + S**2) ** 0.5).logpdf(np.asarray(choices["x"])), abs=1e-5
    )


@pytest.mark.parametrize("n", [1, 4])
def test_a_normalised_density_is_unbiased_both_ways(n):
    """A random density r: E[g(u) / xi] is the integral of g; E zeta = r(u), so the integral of E zeta over u is 1."""
    r = vi.normalize(joint, vi.SIR(n, wide), {"x": X})
    log_xi, choices = jax.jit(jax.vmap(lambda key: r.random_weighted(key, S)))(KEYS)
    u = np.asarray(choices["u"])
    mean_is(stats.norm(0, 0.5).pdf(u) * np.exp(-np.asarray(log_xi)), 1.0)
    at = jnp.asarray(0.3 * X + 2.0 * jax.random.t(jax.random.key(9), 5.0, (len(KEYS),)))  # u by importance sampling
    log_zeta = jax.jit(jax.vmap(lambda key, u: r.estimate_logpdf(key, {"u": u}, S)))(KEYS, at)
    mean_is(np.exp(np.asarray(log_zeta)) / stats.t(5, 0.3 * X, 2.0).pdf(np.asarray(at)), 1.0)
    if n == 1:  # one particle is the proposal itself
        assert np.asarray(log_zeta) == pytest.approx(stats.norm(0.3 * X, 1.2).logpdf(np.asarray(at)), abs=1e-3)


def test_resampling_passes_the_gradient():
    """The mean of u under SIR of two particles moves with a parameter of the proposal: audit both strategies."""

    def mean_u(strategy):
        def proposal(sample, m, given):
            sample("u", vi.normal_reparam(m, 1.2))

        r = vi.normalize(lambda sample, m: joint(sample, S), vi.SIR(2, proposal, strategy), {"x": X})
        return vi.expectation(lambda sample, m: r.random_weighted(sample, m)[1]["u"])

    for strategy in (None, vi.Reinforce()):
        assert vi.audit(mean_u(strategy), jax.random.key(0), 1.5, samples=20_000, directions=1)


def test_a_program_that_is_its_own_proposal_must_be_a_program():
    q = vi.marginal("x", vi.marginal(("x", "u"), joint))
    with pytest.raises(UserError, match="SIR needs a proposal for a Marginal"):
        q.random_weighted(KEYS[0], S)


def test_bad_densities_are_named():
    with pytest.raises(UserError, match="no address 'y' to keep"):
        vi.marginal("y", joint).random_weighted(KEYS[0], S)
    with pytest.raises(UserError, match="marginal: it has the addresses x, got u"):
        vi.marginal("x", joint).estimate_logpdf(KEYS[0], {"u": 1.0}, S)
    with pytest.raises(UserError, match=r"SIR\.particles must be an integer >= 1, got 0"):
        vi.SIR(0)


# objectives

OBSERVED = 1.3
LOG_P = stats.norm(0, 2**0.5).logpdf(OBSERVED)


def expectation(objective, guide=conjugate_guide, model=conjugate_model, data=None):
    return vi.expectation(objective(model, guide, data or {"x": OBSERVED}))


def test_the_elbo_of_the_conjugate_normal():
    """Gradient (x - 2m, 1/s - 2s); at the posterior m = x/2, s^2 = 1/2 the value is log p(x) and the gradient has mean 0."""
    one = jax.jit(jax.vmap(expectation(vi.ELBO()).value_and_grad, in_axes=(0, None)))
    _, (m, s) = one(KEYS, (0.2, 0.9))
    mean_is(m, OBSERVED - 0.4)
    mean_is(s, 1 / 0.9 - 1.8)
    value, (m, s) = one(KEYS, (OBSERVED / 2, 0.5**0.5))
    assert np.asarray(value) == pytest.approx(np.full(len(KEYS), LOG_P), abs=1e-4)
    mean_is(m, 0.0)
    mean_is(s, 0.0)
    stuck = expectation(vi.ELBO(stick_the_landing=True))
    _, grads = jax.jit(jax.vmap(stuck.value_and_grad, in_axes=(0, None)))(KEYS[:100], (OBSERVED / 2, 0.5**0.5))
    assert max(float(jnp.abs(g).max()) for g in grads) < 1e-4  # no variance at the posterior
    with pytest.raises(UserError, match=r"ELBO\.stick_the_landing needs a guide with an exact density, got Marginal"):
        expectation(vi.ELBO(stick_the_landing=True), vi.marginal("z", conjugate_guide))


def test_one_particle_is_the_elbo_draw_by_draw():
    elbo, one = (expectation(o) for o in (vi.ELBO(), vi.IWELBO(1)))
    for a, b in zip(*(jax.tree.leaves(e.value_and_grad(KEYS[3], (0.2, 0.9))) for e in (elbo, one)), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)
    renyi, many = (expectation(o) for o in (vi.Renyi(0.0, 5), vi.IWELBO(5)))
    assert float(renyi.value(KEYS[3], (0.2, 0.9))) == pytest.approx(float(many.value(KEYS[3], (0.2, 0.9))), rel=1e-5)


def test_more_particles_tighten_the_bound():
    means = []
    for k in (1, 2, 8):
        values = np.asarray(
            jax.jit(lambda key, k=k: expectation(vi.IWELBO(k)).values(key, (0.2, 0.9), samples=50_000))(KEYS[0])
        )
        means.append((values.mean(), values.std() / len(values) ** 0.5))
    for (loose, e1), (tight, e2) in zip(means, [*means[1:], (LOG_P, 0.0)], strict=True):
        assert tight - loose > -3 * (e1**2 + e2**2) ** 0.5


@pytest.mark.parametrize("name", CONE_OBJECTIVES)
def test_every_bound_of_the_cone_lies_below_its_log_evidence(name):
    objective, guide, start = CONE_OBJECTIVES[name]
    e = expectation(objective, guide, cone_model, CONE_DATA)
    params = jnp.array([2.2, 0.0, -3.4, -1.3]) if len(start) == 4 else jnp.array([-2.5, -2.5])
    values = np.asarray(jax.jit(lambda key: e.values(key, params, samples=5000))(KEYS[1]))
    assert values.mean() + 3 * values.std() / 5000**0.5 < CONE_LOG_EVIDENCE


def test_the_multiplier_of_a_score_is_the_whole_bound():
    """IWELBO(3) with a REINFORCE guide has the gradient that REPARAM gives."""

    def scored(sample, params):
        sample("z", vi.normal_reinforce(params[0], params[1]))

    grads = []
    for guide in (conjugate_guide, scored):
        e = expectation(vi.IWELBO(3), guide)
        _, g = jax.jit(jax.vmap(e.value_and_grad, in_axes=(0, None)))(KEYS, (0.2, 0.9))
        grads.append([(float(x.mean()), float(x.std()) / len(KEYS) ** 0.5) for x in g])
    for (a, e1), (b, e2) in zip(*grads, strict=True):
        assert abs(a - b) < 4 * (e1**2 + e2**2) ** 0.5


def learnable(sample, params):
    z = sample("z", vi.normal(params["t"], 1.0))
    sample("x", vi.normal(z, 1.0))


def learnable_guide(sample, params):
    sample("z", vi.normal_reparam(params["m"], jnp.exp(params["log_s"])))


@pytest.mark.parametrize("objective", [vi.WakeTheta(4), vi.WakePhi(4), vi.Sleep(), vi.PerDatum(vi.Renyi(0.5, 2))])
def test_gradients_of_the_other_objectives(objective):
    params, data = {"t": 0.2, "m": 0.3, "log_s": -0.5}, {"x": OBSERVED}
    if isinstance(objective, vi.PerDatum):
        data = {"x": jnp.array([1.3, -0.4, 2.0])}
    e = expectation(objective, learnable_guide, learnable, data)
    assert vi.audit(e, jax.random.key(2), params, samples=10_000, directions=1)
    grad = e.estimate(jax.random.key(3), params)[1]
    still = {vi.WakeTheta: ("m", "log_s"), vi.WakePhi: ("t",), vi.Sleep: ("t",)}.get(type(objective), ())
    assert all(grad[name] == 0 for name in still)


def test_sleep_shows_the_guide_what_it_dreamt():
    def amortised(sample, params, x):
        sample("z", vi.normal_reparam(params["m"] * x, 0.7))

    def model(sample, params, *args):
        learnable(sample, {"t": 0.0})

    objective = vi.Sleep(guide_args=lambda seen: (seen["x"],))
    e = vi.expectation(objective(model, amortised, {"x": 0.0}))
    grad = jax.jit(lambda key: e.estimate(key, {"m": 0.5}, samples=50_000)[1]["m"])(KEYS[0])
    assert float(grad) == pytest.approx(0.0, abs=0.05)  # E[(z - m x) x] = 1 - 2m is 0 at the posterior's 1/2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vi.IWELBO(0), r"IWELBO\.particles must be >= 1, got 0"),
        (lambda: vi.Renyi(1.0), r"Renyi\.alpha must be finite and not 1, got 1\.0"),
        (lambda: expectation(vi.ELBO(), conjugate_model).value(KEYS[0], (0.0, 1.0)), "the guide draws the address 'x', which the data fix"),
        (lambda: expectation(vi.PerDatum()).value(KEYS[0], (0.0, 1.0)), "PerDatum: data and args must be arrays with as many data"),
    ],
)  # fmt: skip
def test_bad_objectives_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
