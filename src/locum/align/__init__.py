"""Preference optimisation: one formula, and signals that feed it.

>>> from locum.align import DPO, TDPO2
>>> TDPO2(beta=0.1, alpha=0.5)
TDPO2(beta=0.1, alpha=0.5)

`align` trains a model from a file of pairs; `Trainer` and `run_rounds` are what it does it with. All three are imported when
they are first used, because they bring transformers' trainer.
"""

import importlib
from typing import Any

from locum.align.aligndistil import AlignDistil, OnlineAlignDistil
from locum.align.base import AlignLoss, Method, PairBatch, TokenStats
from locum.align.cdpo import CDPO, ContrastiveEstimation
from locum.align.data import encode, read_pairs
from locum.align.dpo import DPO
from locum.align.rto import RTO
from locum.align.selm import SELM
from locum.align.sft import SFT
from locum.align.sparsepo import SparsePO
from locum.align.tdpo import TDPO1, TDPO2
from locum.align.tgdpo import TGDPO, GuideReward, OnlineTGDPO
from locum.align.treg import TREG, RewriteReward, SimPOReg

__all__ = [
    "CDPO",
    "DPO",
    "RTO",
    "SELM",
    "SFT",
    "TDPO1",
    "TDPO2",
    "TGDPO",
    "TREG",
    "AlignDistil",
    "AlignLoss",
    "ContrastiveEstimation",
    "GuideReward",
    "Method",
    "OnlineAlignDistil",
    "OnlineTGDPO",
    "PairBatch",
    "RewriteReward",
    "SimPOReg",
    "SparsePO",
    "TokenStats",
    "encode",
    "read_pairs",
]

_LAZY = {"LoRA": "run", "Trainer": "trainer", "align": "run", "align_arguments": "trainer", "run_rounds": "driver"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
