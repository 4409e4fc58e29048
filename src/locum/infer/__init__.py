"""Estimates with guarantees: regressions on labels that a model made, and variational inference by unbiased gradients.

Everything is imported when it is first used: `DSL` needs the extra ``infer``, `locum.infer.vi` the extra ``vi``.
"""

import importlib
from typing import Any

from locum.infer.base import Check, Cost, Estimator, Moment, Result

__all__ = ["Check", "Cost", "Estimator", "Moment", "Result"]

_LAZY = {
    "DSL": "dsl",
    "DSLResult": "dsl_result",
    "by_unit": "labels",
    "draw_labels": "labels",
    "Linear": "moments",
    "Logistic": "moments",
    "Multinomial": "moments",
    "Poisson": "moments",
    "Forest": "learners",
    "Generalized": "learners",
    "Identity": "learners",
    "Sklearn": "learners",
}


def __getattr__(name: str) -> Any:
    if name == "vi":
        return importlib.import_module("locum.infer.vi")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
