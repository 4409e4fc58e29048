"""Programs are simulated and assessed: choices by address, each once."""

import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402

from locum.errors import UserError  # noqa: E402
from locum.infer import vi  # noqa: E402

KEY = jax.random.key(0)


def program(sample, params):
    z = sample("z", vi.normal_reinforce(params, 1.0))
    b = sample("b", vi.flip(0.3))
    return sample("x", vi.normal(jnp.where(b, z, 0.0), jnp.ones(3)))


def test_what_is_simulated_is_assessed_alike():
    trace = vi.simulate(program, KEY, 0.5)
    assert list(trace.choices) == ["z", "b", "x"]
    log_prob, value = vi.assess(program, trace.choices, 0.5)
    assert float(log_prob) == pytest.approx(float(trace.log_prob), abs=1e-6)
    assert (value == trace.value).all()
    assert trace.value.shape == (3,)
    again = vi.simulate(program, KEY, 0.5)
    assert (again.value == trace.value).all()


def test_a_guides_sites_are_sites_of_the_objective():
    """E z with z ~ N(theta, 1) by REINFORCE inside: the gradient's mean is 1, and a key instead gives none."""

    def inside(sample, theta):
        return vi.simulate(program, sample, theta).choices["z"]

    def outside(sample, theta):
        return vi.simulate(program, sample.fresh_key(), jax.lax.stop_gradient(theta)).choices["z"]

    keys = jax.random.split(KEY, 20_000)
    for f, expected in ((inside, 1.0), (outside, 0.0)):
        grads = jax.jit(jax.vmap(lambda key, f=f: vi.expectation(f).value_and_grad(key, 0.5)[1]))(keys)
        assert float(grads.mean()) == pytest.approx(expected, abs=5 * float(grads.std()) / 20_000**0.5 + 1e-6)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"z": 0.0, "b": True}, r"no value for the address 'x' \(given: 'z', 'b'\)"),
        ({}, r"no value for the address 'z' \(given: none\)"),
        (
            {"z": 0.0, "b": True, "x": jnp.ones(3), "y": 0.0},
            r"no site at the address 'y', which was given a value \(it has: 'z',",
        ),
    ],
)
def test_missing_and_extra_addresses_are_named(choices, said):
    with pytest.raises(UserError, match=said):
        vi.assess(program, choices, 0.5)


def test_an_address_is_used_once():
    def twice(sample):
        return sample("x", vi.normal(0.0, 1.0)) + sample("x", vi.normal(0.0, 1.0))

    for run in (lambda: vi.simulate(twice, KEY), lambda: vi.assess(twice, {"x": 1.0})):
        with pytest.raises(UserError, match="the address 'x' is used twice"):
            run()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda sample: sample(vi.normal(0.0, 1.0)), r"sample takes \(address, distribution or site\)"),
        (lambda sample: sample(3, vi.normal(0.0, 1.0)), "sample takes"),
        (lambda sample: sample("x", 3.0), "sample takes"),
        (lambda sample: sample.iid(lambda s: s("x", vi.normal(0.0, 1.0)), 3), "iid belongs to expectation programs"),
    ],
)
def test_bad_sites_of_a_program_are_named(bad, said):
    with pytest.raises(UserError, match=said):
        vi.simulate(bad, KEY)


def test_neither_key_nor_sampler():
    with pytest.raises(UserError, match="expected a PRNG key or the sampler"):
        vi.simulate(program, 3, 0.5)
