"""Programmable variational inference: every strategy unbiased, exactly where it can be and by z-test elsewhere."""

import inspect
import itertools
import subprocess
import sys

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import progvi, vi  # noqa: E402

MANY = 100_000


def draws(program, params, n=MANY, seed=0, **kwargs):
    """Value and gradients of n single draws, one array [n] per parameter."""
    e = vi.Expectation(program, **kwargs)
    keys = jax.random.split(jax.random.key(seed), n)
    value, grad = jax.jit(jax.vmap(e.value_and_grad, in_axes=(0, None)))(keys, params)
    return value, jax.tree.leaves(grad)


def unbiased(got, exact):
    got = np.asarray(got, np.float64)
    se = got.std() / len(got) ** 0.5
    assert abs(got.mean() - exact) < 4 * se + 2e-6 * (1 + abs(exact)), f"{got.mean()} +- {se}, exact {exact}"


def coin(site):
    return lambda sample, theta: jnp.where(sample("b", site(theta)), 0.0, -theta / 2)


# 1. a flip: E = -theta (1 - theta) / 2, gradient theta - 1/2


@pytest.mark.parametrize(
    "site",
    [
        vi.flip_mvd,
        vi.flip_reinforce,
        lambda p: vi.flip_reinforce(p, baseline=-0.1),
        lambda p: vi.flip_reinforce(p, baseline=-p / 4),
    ],
)
def test_a_flip(site):
    value, (grad,) = draws(coin(site), 0.3)
    unbiased(value, -0.105)
    unbiased(grad, -0.2)


@pytest.mark.parametrize("vectorised", [False, True])
def test_enumeration_is_exact(vectorised):
    value, (grad,) = draws(coin(lambda p: vi.flip_enum(p, vectorised=vectorised)), 0.3, n=8)
    assert np.ptp(value) == np.ptp(grad) == 0
    assert value[0] == pytest.approx(-0.105, abs=1e-7)
    assert grad[0] == pytest.approx(-0.2, abs=1e-7)


def test_differentiating_the_draw_alone_is_wrong():
    def naive(theta, key):
        return jnp.where(jax.random.bernoulli(key, theta), 0.0, -theta / 2)

    got = jax.vmap(jax.grad(naive), in_axes=(None, 0))(0.3, jax.random.split(jax.random.key(0), 20_000))
    assert got.mean() == pytest.approx(-0.35, abs=0.01)  # -(1 - theta) / 2, not theta - 1/2


# 4. a mixed program, all combinations of strategies

NORMALS = {"reparam": vi.normal_reparam, "reinforce": vi.normal_reinforce, "mvd": vi.normal_mvd}
FLIPS = {"enum": vi.flip_enum, "mvd": vi.flip_mvd, "reinforce": vi.flip_reinforce}


@pytest.mark.parametrize(
    ("x", "b", "y"), [*itertools.product(("reparam", "reinforce"), FLIPS, ("reparam", "reinforce")), ("mvd",) * 3]
)
def test_strategies_mix(x, b, y):
    def program(sample, params):
        at = sample("x", NORMALS[x](params["mu"], 1.0))
        side = sample("b", FLIPS[b](jax.nn.sigmoid(at)))
        return sample("y", NORMALS[y](jnp.where(side, at, -at / 2), params["s"])) ** 2 + at

    _, (mu, s) = draws(program, {"mu": 0.4, "s": 0.7})
    unbiased(mu, 1.97)
    unbiased(s, 1.4)


# 2. and 3.


def test_a_rest_without_parameters():
    """MVD then has no variance, REINFORCE f1^2/p + f0^2/(1-p) - (f1-f0)^2."""

    def either(site):
        return lambda sample, p: jnp.where(sample(site(p)), 2.0, -1.0)

    _, (mvd,) = draws(either(vi.flip_mvd), 0.3, n=1000)
    assert np.ptp(mvd) == 0
    assert mvd[0] == pytest.approx(3.0, abs=1e-6)
    _, (score,) = draws(either(vi.flip_reinforce), 0.3)
    assert np.asarray(score).var() == pytest.approx(4 / 0.3 + 1 / 0.7 - 9, rel=0.02)


@pytest.mark.parametrize("strategy", NORMALS)
def test_the_second_moment_of_a_normal(strategy):
    _, (mu, s) = draws(lambda sample, p: sample(NORMALS[strategy](*p)) ** 2, (0.6, 0.8))
    unbiased(mu, 1.2)
    unbiased(s, 1.6)


# vector sites: lane by lane


def joint_gradient(f, weights, theta):
    """d/dtheta of sum over all combinations of lanes' values of prod_i weights[i, v_i] f(v), enumerated."""

    def mean(theta):
        w = weights(theta)
        cells = itertools.product(range(w.shape[1]), repeat=w.shape[0])
        return sum(jnp.prod(jnp.stack([w[i, v] for i, v in enumerate(c)])) * f(jnp.array(c), theta) for c in cells)

    return jax.grad(mean)(theta)


def lanes(b, theta):
    return jnp.sin(b @ jnp.array([1.0, 2.0, -1.5]) + theta) + b[0] * b[1] * theta


@pytest.mark.parametrize(
    ("site", "options"),
    [
        (vi.flip_enum, {}),
        (vi.flip_enum, {"vectorised": True}),
        (vi.flip_mvd, {"vectorised": True}),
        (vi.flip_reinforce, {}),
    ],
)
def test_flips_side_by_side(site, options):
    def p(theta):
        return jax.nn.sigmoid(theta * jnp.array([1.0, -0.5, 2.0]))

    def program(sample, theta):
        return lanes(sample(site(p(theta), **options)) * 1.0, theta)

    _, (grad,) = draws(program, 0.4)
    unbiased(grad, joint_gradient(lanes, lambda t: jnp.stack([1 - p(t), p(t)], -1), 0.4))


def test_categories_side_by_side():
    logits = jnp.array([[0.1, -0.3, 0.8], [0.5, 0.2, -1.0]])

    def f(v, theta):
        return jnp.cos(v[0] * 1.0 + 2.0 * v[1]) * theta

    _, (grad,) = draws(lambda sample, t: f(sample(vi.categorical_enum(t * logits)), t), 0.7)
    unbiased(grad, joint_gradient(f, lambda t: jax.nn.softmax(t * logits, -1), 0.7))


def test_normals_side_by_side():
    """E x_0 x_1 + x_0^2 with means theta and 2 theta, scale theta: 2 theta^2 + 2 theta^2."""

    def program(sample, theta):
        x = sample(vi.normal_mvd(theta * jnp.array([1.0, 2.0]), theta))
        return x[0] * x[1] + x[0] ** 2

    _, (grad,) = draws(program, 0.6)
    unbiased(grad, 8 * 0.6)


def test_counts_side_by_side():
    """E n_0 n_1 with rates theta and 2 theta."""

    def program(sample, theta):
        return jnp.prod(sample(vi.poisson_mvd(theta * jnp.array([1.0, 2.0]), vectorised=True)) * 1.0)

    _, (grad,) = draws(program, 0.6)
    unbiased(grad, 4 * 0.6)


# the engine


@pytest.mark.parametrize(("site", "runs"), [(vi.flip_mvd, 5 + 1), (vi.flip_enum, 2**5)])
def test_what_replayed_sites_cost(site, runs):
    """n MVD sites cost n + 1 runs of the whole, not 2^n; n flips enumerated cost 2^n."""
    ends = 0

    def program(sample, p):
        nonlocal ends
        total = sum(sample(site(p)) * 1.0 for _ in range(5))
        ends += 1
        return total**2

    jax.eval_shape(vi.expectation(program).surrogate, jax.random.key(0), 0.3)
    assert ends == runs


def test_many_replayed_sites_are_warned_of(monkeypatch):
    monkeypatch.setattr(progvi, "_MANY", 5)
    program = vi.expectation(lambda sample, p: sum(sample(vi.flip_mvd(p)) * 1.0 for _ in range(7)))
    with pytest.warns(UserWarning, match="more than 5 sites are run again"):
        jax.eval_shape(program.surrogate, jax.random.key(0), 0.3)


@pytest.mark.filterwarnings("ignore:more than")
def test_too_many_replayed_sites_are_refused():
    program = vi.expectation(lambda sample, p: sum(sample(vi.flip_enum(p)) * 1.0 for _ in range(1000)))
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack(0)) + 400)
        with pytest.raises(UserError, match="too many sites that are run again"):
            jax.eval_shape(program.surrogate, jax.random.key(0), 0.3)
    finally:
        sys.setrecursionlimit(limit)


def mixed(sample, params, shift):
    x = sample("x", vi.normal_reparam(params["mu"], jnp.exp(params["log_s"])))
    b = sample("b", vi.flip_mvd(jax.nn.sigmoid(x)))
    y = sample("y", vi.uniform_reparam(0.0, 1.0))
    return jnp.where(sample("c", vi.flip_enum(params["p"])), x * y, shift) * jnp.where(b, x, 1.0)


PARAMS = {"mu": 0.3, "log_s": -0.5, "p": 0.4}


def test_jit_changes_nothing_and_neither_does_vmap():
    e = vi.expectation(mixed)
    keys = jax.random.split(jax.random.key(3), 3)
    jitted = jax.jit(e.value_and_grad)
    together = jax.jit(jax.vmap(e.value_and_grad, in_axes=(0, None, None)))(keys, PARAMS, 0.7)
    expected = [jitted(key, PARAMS, 0.7) for key in keys]
    for i, one in enumerate(expected):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=2e-5, atol=2e-6)
    for a, b in zip(*map(jax.tree.leaves, (expected[0], e.value_and_grad(keys[0], PARAMS, 0.7))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_an_estimate_is_a_mean_over_draws():
    e = vi.expectation(mixed)
    value, grad = jax.jit(lambda key: e.estimate(key, PARAMS, 0.7, samples=20_000))(jax.random.key(4))
    values, grads = draws(lambda sample, params: mixed(sample, params, 0.7), PARAMS, n=20_000)
    for mean, each in zip((value, *jax.tree.leaves(grad)), (values, *grads), strict=True):
        each = np.asarray(each, np.float64)
        assert abs(float(mean) - each.mean()) < 6 * each.std() / 20_000**0.5
    assert e.values(jax.random.key(4), PARAMS, 0.7, samples=7).shape == (7,)


def smooth(sample, p):
    x = sample("x", vi.normal_reparam(p[0], p[1]))
    y = sample("y", vi.laplace_reparam(x, p[1] ** 2))
    return jnp.sin(x * y) + sample("z", vi.lognormal_reparam(0.1, p[1])) * y


@pytest.mark.parametrize("double", [False, True])
def test_finite_differences_of_a_reparameterised_program(double):
    with jax.enable_x64(double):
        key, e = jax.random.key(5), vi.expectation(smooth)
        p, h = jnp.array([0.4, 0.8]), 1e-5 if double else 4e-3
        value, grad = e.value_and_grad(key, p)
        assert value.dtype == grad.dtype == (jnp.float64 if double else jnp.float32)
        for i in range(2):
            step = h * jnp.eye(2)[i]
            slope = (e.value(key, p + step) - e.value(key, p - step)) / (2 * h)
            assert float(grad[i]) == pytest.approx(float(slope), abs=1e-6 if double else 1e-3)


TREES = [
    0.3,
    jnp.array([0.3]),
    {"a": {"b": (0.3, [jnp.ones(2)])}, "c": None},
    (np.float32(0.3), np.ones((2, 2))),
]


@pytest.mark.parametrize("params", TREES, ids=["number", "array", "nested", "numpy"])
def test_parameters_of_any_kind(params):
    def program(sample, params):
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(params))
        return sample(vi.normal_reinforce(mean, 1.0)) ** 2

    value, grad = jax.jit(vi.expectation(program).estimate)(jax.random.key(0), params)
    assert value.shape == ()
    assert jax.tree.map(jnp.shape, grad) == jax.tree.map(jnp.shape, params)


def test_the_strategy_of_every_site_can_be_replaced():
    _, (grad,) = draws(coin(vi.flip_enum), 0.3, strategy=vi.Reinforce())
    assert np.ptp(grad) > 0.2  # enumeration has none
    unbiased(grad, -0.2)


# particles


@pytest.mark.parametrize("site", [vi.normal_reparam, vi.normal_reinforce, vi.normal_mvd])
def test_particles_in_a_function_that_is_not_linear(site):
    """E (mean of three x)^2 = mu^2 + s^2/3: with the score, the multiplier must be the square, not each particle's share."""

    def program(sample, p):
        return jnp.mean(sample.iid(lambda sample: sample("x", site(p[0], p[1])), 3)) ** 2

    _, (mu, s) = draws(program, (0.6, 0.8))
    unbiased(mu, 1.2)
    unbiased(s, 1.6 / 3)


def test_particles_of_replayed_sites_are_sites_of_the_whole():
    """E (b1 + b2)^2 = 2p + 2p^2, exactly by enumeration, also inside particles of particles."""

    def program(sample, p):
        inner = sample.iid(lambda s: s.iid(lambda s: s(vi.flip_enum(p)) * 1.0, 2), 1)
        return jnp.sum(inner) ** 2

    value, (grad,) = draws(program, 0.3, n=4)
    assert np.asarray(value) == pytest.approx(np.full(4, 0.78), abs=1e-6)
    assert np.asarray(grad) == pytest.approx(np.full(4, 3.2), abs=1e-6)


def test_particles_of_replayed_sites_leak_no_tracer():
    def program(sample, p):
        return jnp.sum(sample.iid(lambda s: s(vi.normal_reparam(p, 1.0)) * s(vi.flip_mvd(jax.nn.sigmoid(p))), 2)) ** 2

    with jax.checking_leaks():
        jax.jit(vi.expectation(program).estimate)(jax.random.key(0), 0.3)


def test_particles_are_independent():
    def program(sample, p):
        x = sample.iid(lambda sample: (sample(vi.normal_reparam(p, 1.0)), sample(vi.uniform_reparam(p, 1.0))), 2)
        return x[0][0] * x[0][1] + x[1][0] * x[1][1]

    value, _ = draws(program, 0.0)
    unbiased(value, 0.25)


# what is refused


@pytest.mark.parametrize(
    "wrap",
    [
        lambda draw: jax.lax.scan(lambda c, _: (c + draw(), None), 0.0, None, length=3)[0],
        lambda draw: jax.lax.cond(True, draw, lambda: 0.0),
        lambda draw: jax.lax.while_loop(lambda c: c < 3, lambda c: c + draw(), 0.0),
        lambda draw: jnp.sum(jax.vmap(lambda _: draw())(jnp.arange(3))),
        lambda draw: jax.jit(draw)(),
    ],
    ids=["scan", "cond", "while", "vmap", "jit"],
)
@pytest.mark.parametrize("site", [vi.normal_reparam, vi.normal_reinforce, vi.normal_mvd])
def test_sites_inside_loops_are_refused(wrap, site):
    program = vi.expectation(lambda sample, p: wrap(lambda: sample("x", site(p, 1.0))))
    for run in (program.value_and_grad, program.value, jax.jit(program.value_and_grad)):
        with jax.checking_leaks(), pytest.raises(UserError, match=r"the site 'x' lies inside lax\.scan, cond"):
            run(jax.random.key(0), 0.3)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda sample, p: jnp.ones(2) * p, r"must return one real number, got shape \(2,\)"),
        (lambda sample, p: p + sample("x", 3.0), r"sample takes \(address, site\) or \(site\)"),
        (lambda sample, p: p + sample(), "sample takes"),
        (lambda sample, p: p + sample("x", vi.normal(p, 1.0), 1), "sample takes"),
    ],
)
def test_bad_programs_are_named(program, said):
    with pytest.raises(UserError, match=said):
        vi.expectation(program).value_and_grad(jax.random.key(0), 0.3)


# the audit


def test_the_audit_finds_a_reparameterised_draw_that_feeds_a_branch():
    def program(site):
        def f(sample, p):
            x = sample(site(p["mu"], 1.0))
            return jnp.where(x > 0, x + 1, 0.0)

        return vi.expectation(f)

    bad = vi.audit(program(vi.normal_reparam), jax.random.key(0), {"mu": 0.3}, samples=20_000)
    assert not bad.passed
    assert "does not agree" in bad.text
    good = vi.audit(program(vi.normal_mvd), jax.random.key(0), {"mu": 0.3}, samples=20_000, directions=1)
    assert good.passed
    assert len(good.figures["directions"]) == 1


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("directions", 0), ("step", 0.0)])
def test_an_audit_of_nothing_is_refused(name, value):
    with pytest.raises(UserError, match=f"audit: {name} must be .*> ?=? ?"):
        vi.audit(vi.expectation(coin(vi.flip_enum)), jax.random.key(0), 0.3, **{name: value})


def test_importing_the_family_loads_no_jax():
    code = "import sys, locum.infer; assert 'jax' not in sys.modules; from locum.infer import vi; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_jax_the_extra_is_named():
    code = "import sys; sys.modules['jax'] = None\ntry:\n from locum.infer import vi\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "locum.infer.vi needs the extra 'vi': pip install 'locum[vi]'"
