"""What an estimator with a guarantee is: data in, and a result that can say how far it is to be trusted.

Every `Result` has four things: the `estimate`; a `check`, a certificate by which anyone can see whether the stand-in was good
enough; the `baselines`, what simpler ways say of the same data; and the `cost`.

`Moment` is the small interface of the estimands of design-based supervised learning: any parameter that makes the mean of a
function of the data zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["Check", "Columns", "Cost", "Estimator", "Moment", "Result"]

Columns = Mapping[str, np.ndarray]  # arrays of the same number of rows, by name


@dataclass(frozen=True)
class Check:
    """A certificate: whether a result's guarantee can be relied on, in one sentence, and the figures it rests on."""

    passed: bool
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.passed


@dataclass(frozen=True)
class Cost:
    """What a result has cost: seconds of wall time, and counts of what is expensive, by name."""

    seconds: float
    counts: Mapping[str, float] = field(default_factory=dict)


class Result(ABC):
    """What an estimator made of the data."""

    cost: Cost

    @property
    @abstractmethod
    def estimate(self) -> Any:
        """The numbers that were asked for."""

    @abstractmethod
    def check(self) -> Check:
        """Whether the guarantee holds here, as far as the data can tell."""

    @abstractmethod
    def baselines(self) -> Mapping[str, Any]:
        """What simpler ways say of the same data, by name."""


class Estimator(ABC):
    """A way to estimate: a frozen dataclass whose fields are the method's parameters."""

    @abstractmethod
    def fit(self, *args: Any, **kwargs: Any) -> Result:
        """The estimate, from data."""


class Moment(ABC):
    """An estimand: the theta that makes the mean of m(D_i; theta) over the rows zero.

    D is a mapping of arrays with one entry per row. The built-in moments read "y", the outcome, and "X" [rows, columns]; your
    own may read whatever you pass to `DSL.fit_arrays`.
    """

    @abstractmethod
    def m(self, theta: Float[np.ndarray, " p"], D: Columns) -> Float[np.ndarray, "rows p"]:
        """The moments, row by row."""

    @abstractmethod
    def jac(
        self, theta: Float[np.ndarray, " p"], D: Columns, weights: Float[np.ndarray, " rows"]
    ) -> Float[np.ndarray, "p p"]:
        """sum_i weights_i dm(D_i; theta) / dtheta', rows of the result being moments."""

    @abstractmethod
    def start(self, D: Columns) -> Float[np.ndarray, " p"]:
        """Where Newton's method begins; its length is the number of parameters."""
