"""A point on a ring, seen through its squared distance from the origin; the guide is two independent normals."""

import jax.numpy as jnp

from locum.infer import vi


def model(sample, params):
    x, y = sample("x", vi.normal(0.0, 10.0)), sample("y", vi.normal(0.0, 10.0))
    r = x * x + y * y
    sample("z", vi.normal(r, 0.1 + r / 100))


def guide(sample, params):
    sample("x", vi.normal_reparam(params["mean"][0], jnp.exp(params["log_sd"][0])))
    sample("y", vi.normal_reparam(params["mean"][1], jnp.exp(params["log_sd"][1])))


params = {"mean": jnp.array([3.0, 0.0]), "log_sd": jnp.array([1.0, 1.0])}
data = {"z": 5.0}
