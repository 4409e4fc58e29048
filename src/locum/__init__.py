"""Locum: published methods that put something cheap in the place of something expensive.

Each family of methods is a module of its own, imported when it is first used (``locum.decode``, ``locum.models``, ...),
so that ``import locum`` is quick and loads no torch.
"""

import importlib
from types import ModuleType

from locum.paper import FAMILIES, Paper, catalogue, find

__version__ = "0.1.0"
__all__ = ["FAMILIES", "Paper", "__version__", "catalogue", "find"]

_GROUND = ("tokens", "models", "tasks", "bench")


def __getattr__(name: str) -> ModuleType:
    if name not in FAMILIES and name not in _GROUND:
        raise AttributeError(f"module 'locum' has no attribute {name!r}")
    try:
        return importlib.import_module(f"locum.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"locum.{name}":
            raise
        raise AttributeError(
            f"locum.{name} has no code yet: `locum papers --family {name}` shows what is planned"
        ) from None


def __dir__() -> list[str]:
    return sorted([*__all__, *_GROUND, *FAMILIES])
