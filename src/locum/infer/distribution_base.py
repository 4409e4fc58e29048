"""What a distribution of a program is: a draw, a log-density, and what a gradient strategy may ask for beside them.

Arrays as parameters make a *vector site*: independent lanes, drawn at once, whose `log_prob` is the joint one, a single
number. What a distribution offers to strategies:

    smooth            whether `sample` is a differentiable function of the parameters (`implicit`: through the sampler)
    values, weights   where a lane has finitely many values: all of them, and their probabilities
    shaped            a draw made of standard normal noise, so that the noise of many sites can be drawn at once
    measure_valued    a draw, and per parameter the pairs of draws whose difference is the derivative of an expectation
    lanewise          the same for lanes with finitely many values, from the lane's exact probabilities

Python numbers out of range are refused at once; arrays are taken as they are, since their values are not known under jit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from locum.errors import UserError

__all__ = ["Branch", "Distribution", "Key", "Number", "check", "floating", "known"]

Key = Any  # a PRNG key of jax.random
Number = ArrayLike | list | tuple  # a parameter


@dataclass(frozen=True)
class Branch:
    """One term of a derivative: d E k / d parameter_i = E constant_i (k(.. plus_i ..) - k(.. minus_i ..)), lane by lane.

    Args:
        parameter: one number per lane.
        constant: likewise, without gradient.
        plus: the lane's value on the positive side; None: the draw itself.
        minus: on the negative side; None: the draw itself.
    """

    parameter: ArrayLike
    constant: ArrayLike
    plus: jax.Array | None
    minus: jax.Array | None


class Distribution(ABC):
    """What a site of a program draws from."""

    name: ClassVar[str]
    smooth: ClassVar[bool] = False
    implicit: ClassVar[bool] = False
    coupled: ClassVar[bool] = False  # whether it has `measure_valued`
    gaussian: ClassVar[bool] = False  # whether it has `shaped`

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]  # every distribution is a dataclass
            if isinstance(value := getattr(self, f.name), list | tuple):
                object.__setattr__(self, f.name, (np if known(value) else jnp).asarray(value, float))
        self.refuse()

    def refuse(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise for parameters that are known to be out of range."""

    @abstractmethod
    def sample(self, key: Key) -> jax.Array:
        """A draw; where `smooth`, with the gradient of the draw in the parameters."""

    @abstractmethod
    def log_prob(self, value: ArrayLike) -> jax.Array:
        """The log-density of all lanes together."""

    @property
    def values(self) -> np.ndarray | None:
        """All values of a lane, if they are finitely many."""
        return None

    @property
    def moving(self) -> bool:
        """Whether the ends of the support depend on parameters, so that the score alone is not the derivative."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a draw."""
        return ()

    @property
    def dtype(self) -> Any:
        """The type of normal noise that `shaped` takes."""
        raise NotImplementedError

    def shaped(self, noise: jax.Array) -> jax.Array:
        """The draw that standard normal noise of the draw's shape makes; `sample` is this with noise of its own."""
        raise NotImplementedError

    def weights(self) -> jax.Array:
        """The probabilities of `values`, along the last axis."""
        raise NotImplementedError

    def measure_valued(self, key: Key) -> tuple[jax.Array, list[Branch]]:
        """A draw and the branches of all parameters."""
        raise NotImplementedError

    def lanewise(self, key: Key) -> tuple[jax.Array, list[Branch]]:
        """A draw, and for each value of a lane what its probability is worth; for distributions with `values`."""
        assert self.values is not None
        draw, weights = self.sample(key), self.weights()
        return draw, [
            Branch(weights[..., i], 1.0, jnp.full_like(draw, v), None) for i, v in enumerate(self.values.tolist())
        ]


def known(number: object) -> bool:
    """Whether it is plain numbers, whose values can be looked at under jit too."""
    if isinstance(number, list | tuple):
        return all(known(each) for each in number)
    return isinstance(number, Real | np.ndarray | np.generic)


def check(name: str, ok: str, **numbers: Any) -> None:
    """Refuse numbers that are known now and out of range."""
    tests: dict[str, Callable[[np.ndarray], Any]] = {
        "> 0": lambda x: x > 0,
        "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
        "finite": np.isfinite,
    }
    for field, number in numbers.items():
        if known(number) and not np.all(tests[ok](np.asarray(number))):
            raise UserError(f"{name}: {field} must be {ok}, got {number!r}")


def floating(*numbers: Any) -> tuple[Any, tuple[int, ...]]:
    """The type and the shape of draws with these parameters."""
    return jnp.result_type(*numbers, 0.0), jnp.broadcast_shapes(*map(jnp.shape, numbers))
