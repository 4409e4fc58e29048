"""Faster and controlled decoding: drafter x verifier x cache, constraints with weights, search under a value.

`AWRS` and its constraints are imported when they are first used, and so is `integrations`, which needs transformers' generation.
"""

import importlib
from typing import TYPE_CHECKING, Any

from locum.decode.auto import Auto
from locum.decode.base import Context, Drafter, Rows, Tree, Verifier, check_pair
from locum.decode.chain import Chain
from locum.decode.dyspec import DySpec, RecursiveRejection
from locum.decode.engine import Generation, Step, generate
from locum.decode.graft import Graft
from locum.decode.lookup import Lookup
from locum.decode.plain import Plain
from locum.decode.rtoq import RtoQ
from locum.decode.spectr import KSEQ, SpecTr
from locum.decode.tokenrecycling import TokenRecycling, TokenTable
from locum.decode.verifiers import ChainRejection, Match

if TYPE_CHECKING:
    from locum.decode.awrs import AWRS

__all__ = [
    "AWRS",
    "KSEQ",
    "Auto",
    "Chain",
    "ChainRejection",
    "Context",
    "Drafter",
    "DySpec",
    "Generation",
    "Graft",
    "Lookup",
    "Match",
    "Plain",
    "RecursiveRejection",
    "Rows",
    "RtoQ",
    "SpecTr",
    "Step",
    "TokenRecycling",
    "TokenTable",
    "Tree",
    "Verifier",
    "check_pair",
    "generate",
]

_LAZY = {"AWRS": "awrs", "constraints": None, "integrations": None}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name] or name}")
    return getattr(module, name) if _LAZY[name] else module
