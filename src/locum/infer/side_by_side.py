"""Many runs of a program under vmap, with the normal noise of all their sites drawn in one go."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from locum.infer.distribution_base import Distribution, Key

__all__ = ["Wanted", "side_by_side", "survey"]


class Wanted:
    """What a run draws: normal noise, by site; whether anything else that needs a key; and whether a site wants to be replayed."""

    def __init__(self) -> None:
        self.noise: dict[int, tuple[int, ...]] = {}
        self.keys = self.replays = False

    def note(self, index: int, law: Distribution) -> None:
        if law.gaussian and law.dtype == jnp.result_type(0.0):
            self.noise[index] = law.shape
        else:
            self.keys = True


Runs = Callable[
    [Key, Mapping[int, Any]], tuple[Any, Any, Wanted]
]  # a key and noise by site -> values, scores, what it wanted


def survey(one: Runs, key: Key) -> Wanted:
    """What the runs will want: an abstract one tells."""
    wanted = Wanted()

    def tell(key: Key) -> Any:
        nonlocal wanted
        values, scores, wanted = one(key, {})
        return values, scores

    jax.eval_shape(tell, key)
    return wanted


def side_by_side(one: Runs, key: Key, n: int, wanted: Wanted) -> tuple[Any, Any]:
    """n runs under vmap, the normal noise of all their sites drawn at once: small draws cost more than what is done with them."""
    sizes = {i: math.prod(shape) for i, shape in wanted.noise.items()}
    noise_key, keys = (random.fold_in(key, 0), random.split(random.fold_in(key, 1), n)) if wanted.keys else (key, None)
    block = random.normal(noise_key, (sum(sizes.values()), n)) if sizes else jnp.zeros((0, n))
    block = lax.optimization_barrier(block)  # else the compiler computes the noise anew for each of its uses

    def each(block: jax.Array, own: Key | None) -> tuple[Any, Any]:
        ends = list(itertools.accumulate(sizes.values()))
        noise = {i: block[end - sizes[i] : end].reshape(wanted.noise[i]) for i, end in zip(sizes, ends, strict=True)}
        return one(key if own is None else own, noise)[:2]

    return jax.vmap(each, in_axes=(1, None if keys is None else 0))(block, keys)
