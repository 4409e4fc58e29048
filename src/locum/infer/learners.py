"""Predictors g of a gold label from surrogates and features: what they are changes the variance, never what is estimated.

A learner is fitted on gold rows of the other folds and predicts rows it has not seen. Whatever it predicts is used as it is,
also outside [0, 1]: nothing is clipped.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Shaped

from locum.errors import UserError
from locum.method import require

__all__ = ["Fold", "Forest", "Generalized", "Identity", "Kind", "Learner", "Sklearn", "learner_of"]

Array = np.ndarray
Kind = Literal["number", "binary", "classes"]  # what a gold label is: a number, 0 or 1, or indicators [rows, classes]


@dataclass(frozen=True, eq=False)
class Fold:
    """What a learner is asked: to predict the rows of a fold from gold rows of the others.

    Args:
        features: of the gold rows; the surrogate first, as many columns as there are classes.
        labels: of the gold rows, [gold] or indicators [gold, classes].
        asked: features of the rows to be predicted.
        kind: what a label is.
        seed: of what is random.
    """

    features: Float[Array, "gold f"]
    labels: Shaped[Array, "gold *classes"]
    asked: Float[Array, "rows f"]
    kind: Kind
    seed: int


class Learner(ABC):
    """How gold labels are predicted."""

    def check(self, kind: Kind, name: str, surrogates: int) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse, before any work, what this learner cannot predict."""

    @abstractmethod
    def predict(self, fold: Fold) -> Float[Array, "rows *classes"]:
        """Predictions of the rows that are asked for, in the form of the labels."""


class _Fitted(Learner):
    """A scikit-learn estimator, fitted anew for each fold."""

    @abstractmethod
    def make(self, kind: Kind, seed: int) -> Any:
        """The estimator, not fitted."""

    def predict(self, fold: Fold) -> Float[Array, "rows *classes"]:
        features, labels, asked, kind = fold.features, fold.labels, fold.asked, fold.kind
        if (labels == labels[0]).all():  # a fold without the other class has nothing to learn from
            return np.broadcast_to(labels[0].astype(float), (len(asked), *labels.shape[1:])).copy()
        model = self.make(kind, fold.seed)
        if not hasattr(model, "predict_proba"):
            return np.asarray(model.fit(features, labels.astype(float)).predict(asked), dtype=float)
        classes = labels.argmax(1) if kind == "classes" else labels
        probabilities = model.fit(features, classes).predict_proba(asked)
        if kind == "binary":
            return probabilities[:, list(model.classes_).index(1)]
        out = np.zeros((len(asked), labels.shape[1]))
        out[:, model.classes_.astype(int)] = probabilities  # a class that these folds lack has none
        return out


@dataclass(frozen=True)
class Identity(Learner):
    """The surrogate as it is: nothing is fitted, so no gold label is spent on it."""

    def check(self, kind: Kind, name: str, surrogates: int) -> None:
        if surrogates != 1:
            raise UserError(
                f"the learner identity takes one surrogate of {name}, got {surrogates}: give another learner"
            )

    def predict(self, fold: Fold) -> Float[Array, "rows *classes"]:
        return fold.asked[:, : fold.labels.shape[1]] if fold.labels.ndim == 2 else fold.asked[:, 0]


@dataclass(frozen=True)
class Forest(_Fitted):
    """A random forest: the paper's choice, for surrogates whose errors depend on the features in unknown ways.

    Args:
        trees: how many.
        min_samples_leaf: gold rows in a leaf, at least.
    """

    trees: int = 100
    min_samples_leaf: int = 5

    def __post_init__(self) -> None:
        require(self, "trees", self.trees >= 1, ">= 1")
        require(self, "min_samples_leaf", self.min_samples_leaf >= 1, ">= 1")

    def make(self, kind: Kind, seed: int) -> Any:
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor(self.trees, min_samples_leaf=self.min_samples_leaf, random_state=seed)


@dataclass(frozen=True)
class Generalized(_Fitted):
    """A (generalized) linear model on standardised features: ridge for a number, logistic regression for classes. Quick.

    Args:
        penalty: weight of the squared coefficients; > 0.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        require(self, "penalty", 0 < self.penalty < float("inf"), "finite and > 0")

    def make(self, kind: Kind, seed: int) -> Any:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = Ridge(self.penalty) if kind == "number" else LogisticRegression(C=1 / self.penalty, max_iter=1000)
        return make_pipeline(StandardScaler(), model)


@dataclass(frozen=True)
class Sklearn(_Fitted):
    """Any scikit-learn regressor, or classifier with `predict_proba`.

    Args:
        estimator: cloned for each fold; its `random_state`, where it has one, is set.
    """

    estimator: Any

    def check(self, kind: Kind, name: str, surrogates: int) -> None:
        if not (hasattr(self.estimator, "fit") and hasattr(self.estimator, "predict")):
            raise UserError(f"a learner must be a scikit-learn estimator with fit and predict, got {self.estimator!r}")
        from sklearn.base import is_classifier

        if not is_classifier(self.estimator):
            return
        called = type(self.estimator).__name__
        if kind == "number":
            raise UserError(
                f"the learner {called} is a classifier, and the gold label {name} is a number: give a regressor"
            )
        if not hasattr(self.estimator, "predict_proba"):
            raise UserError(f"the learner {called} must have predict_proba, to predict {name}")

    def make(self, kind: Kind, seed: int) -> Any:
        from sklearn.base import clone, is_classifier
        from sklearn.multioutput import MultiOutputRegressor

        made = clone(self.estimator)
        seeds = [name for name in made.get_params() if name == "random_state" or name.endswith("__random_state")]
        made = made.set_params(**dict.fromkeys(seeds, seed))
        return MultiOutputRegressor(made) if kind == "classes" and not is_classifier(made) else made


def learner_of(value: Any) -> Learner:
    """A learner, or a scikit-learn estimator as one."""
    return value if isinstance(value, Learner) else Sklearn(value)
