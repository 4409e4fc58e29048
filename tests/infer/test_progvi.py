"""Programmable variational inference: every strategy unbiased, exactly where it can be and by z-test elsewhere."""

import itertools

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from locum.infer import vi  # noqa: E402

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
