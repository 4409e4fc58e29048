"""Programs to try programmable variational inference on: the cone, a conjugate normal, and up to two objects on a small canvas.

Each gives a model, guides and starting parameters; `CONE_OBJECTIVES` are the five objectives of the paper's table.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from locum.infer import strategies as s
from locum.infer.densities import SIR, Density, marginal
from locum.infer.distributions import flip, normal
from locum.infer.objectives import ELBO, IWELBO, Objective
from locum.infer.programs import simulate

__all__ = [
    "CONE_DATA",
    "CONE_LOG_EVIDENCE",
    "CONE_OBJECTIVES",
    "air_guide",
    "air_images",
    "air_model",
    "air_start",
    "cone_expressive_guide",
    "cone_model",
    "cone_naive_guide",
    "conjugate_guide",
    "conjugate_model",
]

# The cone: x, y ~ N(0, 10), z ~ N(x^2 + y^2, 0.1 + (x^2 + y^2) / 100), z = 5 seen; the posterior is a ring.
CONE_DATA: Mapping[str, float] = {"z": 5.0}
CONE_LOG_EVIDENCE = -5.32323  # log p(z = 5), by numerical integration


def cone_model(sample: Any, params: Any) -> None:
    x = sample("x", normal(0.0, 10.0))
    y = sample("y", normal(0.0, 10.0))
    r = x * x + y * y
    sample("z", normal(r, 0.1 + r / 100))


def cone_naive_guide(sample: Any, params: Any) -> None:
    """Independent normals; params [4]: two means, two log standard deviations."""
    sample("x", s.site(normal(params[0], jnp.exp(params[2])), s.Reparam()))
    sample("y", s.site(normal(params[1], jnp.exp(params[3])), s.Reparam()))


def cone_expressive_guide(sample: Any, params: Any) -> None:
    """A point of the ring by an angle that is then forgotten, and a step off it; params [2]: two log standard deviations."""
    u = 2 * math.pi * sample("u", s.uniform_reparam(0.0, 1.0))
    sample("x", s.site(normal(math.sqrt(5.0) * jnp.cos(u), jnp.exp(params[0])), s.Reparam()))
    sample("y", s.site(normal(math.sqrt(5.0) * jnp.sin(u), jnp.exp(params[1])), s.Reparam()))


def _ring(particles: int) -> Density:
    return marginal(("x", "y"), cone_expressive_guide, SIR(particles))


# name: objective, guide, where the paper's experiments start
CONE_OBJECTIVES: dict[str, tuple[Objective, Any, tuple[float, ...]]] = {
    "ELBO": (ELBO(), cone_naive_guide, (3.0, 0.0, 1.0, 1.0)),
    "IWELBO(5)": (IWELBO(5), cone_naive_guide, (3.0, 0.0, 1.0, 1.0)),
    "HVI": (ELBO(), _ring(1), (1.0, 1.0)),
    "IWHVI(5)": (ELBO(), _ring(5), (1.0, 1.0)),
    "DIWHVI(5,5)": (IWELBO(5), _ring(5), (1.0, 1.0)),
}


def conjugate_model(sample: Any, params: Any) -> None:
    """z ~ N(0, 1), x ~ N(z, 1)."""
    sample("x", normal(sample("z", normal(0.0, 1.0)), 1.0))


def conjugate_guide(sample: Any, params: Any) -> None:
    """q(z) = N(m, s), params (m, s). The ELBO's gradient is (x - 2m, 1/s - 2s)."""
    sample("z", s.site(normal(params[0], params[1]), s.Reparam()))


# Attend, infer, repeat in small: each of two slots holds a bright spot or none; its place is a normal on an 8 x 8 canvas.
_SIDE, _SLOTS, _HIDDEN = 8, 2, 32


def _canvas(present: jax.Array, where: jax.Array) -> jax.Array:
    """The image [8, 8] of spots with presence [2] and place [2, 2], in units of two pixels from the middle."""
    pixels = jnp.arange(_SIDE, dtype=where.dtype)
    away = pixels - (_SIDE - 1) / 2 - 2 * where[..., None]  # [slot, axis, pixel]
    spot = jnp.exp(-0.5 * away**2)
    return jnp.einsum("s,si,sj->ij", present.astype(where.dtype), spot[:, 0], spot[:, 1])


def air_model(sample: Any, params: Any, image: Any = None) -> None:
    present = jnp.stack([jnp.asarray(sample(f"present {i}", flip(0.5))) for i in range(_SLOTS)])
    where = jnp.stack([sample(f"where {i}", normal(jnp.zeros(2), 1.0)) for i in range(_SLOTS)])
    sample("image", normal(_canvas(present, where), 0.3))


def air_guide(present: Callable[[Any], s.Site]) -> Callable[..., None]:
    """A guide that reads the image by a small network; `present` makes the presence sites, e.g. `flip_enum`."""

    def guide(sample: Any, params: Any, image: jax.Array) -> None:
        hidden = jnp.tanh(image.ravel() @ params["in"] + params["bias"])
        slots = (hidden @ params["out"]).reshape(_SLOTS, 5)  # logit of presence, two means, two log standard deviations
        for i, slot in enumerate(slots):
            there = jnp.asarray(sample(f"present {i}", present(jax.nn.sigmoid(slot[0]))))
            mean, scale = jnp.where(there, slot[1:3], 0.0), jnp.where(there, jnp.exp(slot[3:]), 1.0)
            sample(f"where {i}", s.site(normal(mean, scale), s.Reparam()))  # the prior where there is nothing

    return guide


def air_start(key: Any) -> dict[str, jax.Array]:
    """Small random weights."""
    first, second = random.split(key)
    return {
        "in": random.normal(first, (_SIDE * _SIDE, _HIDDEN)) / _SIDE,
        "bias": jnp.zeros(_HIDDEN),
        "out": 0.1 * random.normal(second, (_HIDDEN, 5 * _SLOTS)),
    }


def air_images(key: Any, n: int) -> jax.Array:
    """n images from the model."""
    return jax.vmap(lambda key: simulate(air_model, key, None).choices["image"])(random.split(key, n))
