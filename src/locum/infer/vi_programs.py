"""Programs to try programmable variational inference on: the cone and a conjugate normal.

Each gives a model, guides and starting parameters; `CONE_OBJECTIVES` are the five objectives of the paper's table.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from locum.infer import strategies as s
from locum.infer.densities import SIR, Density, marginal
from locum.infer.distributions import normal
from locum.infer.objectives import ELBO, IWELBO, Objective

__all__ = [
    "CONE_DATA",
    "CONE_LOG_EVIDENCE",
    "CONE_OBJECTIVES",
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
    u = 2 * math.pi * sample("u", s.uniform_reparam(0.0, 1.0))  # type: ignore[attr-defined]
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
