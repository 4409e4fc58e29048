"""Reinforcement learning from verifiable rewards: one pipeline, and papers as a few small pieces in it.

>>> from locum.reinforce import D3S, Recipe
>>> print(Recipe("dapo", (D3S(),)))
dapo + d3s
>>> print(D3S(tokens=(0.2, 1.0)))
D3S(rows=(0.25, 0.5), tokens=(0.2, 1.0), scope='batch', key='advantage', per='batch', row_stat='mean', shares=None)

`reinforce` trains a model on problems with checkable answers; `Trainer` is what it does it with. Both are imported when they
are first used.
"""

import importlib
from typing import Any

from locum.reinforce.advantages import GAE, BatchCentred, GroupCentred, GroupNormalised, LeaveOneOut
from locum.reinforce.base import Piece, Policy, Run, Stage
from locum.reinforce.collect import Finished, Flat, Informative, Overlong
from locum.reinforce.cot2 import MTS, CoT2, Dirichlet
from locum.reinforce.d3s import D3S
from locum.reinforce.gdpo import GDPO, DiffuGRPO
from locum.reinforce.hapo import HAPO, HAPOAdvantage, HAPOClip, HAPORedistribute, HAPOTemperature
from locum.reinforce.likelihood import Autoregressive
from locum.reinforce.losses import KL, Clip, Constant, SequenceMean, SequenceRatio, SequenceSum, TokenMean, TokenRatio
from locum.reinforce.plan import Plan
from locum.reinforce.recipe import HOSTS, Recipe
from locum.reinforce.segments import SPOChainSample, SPOTreeSample
from locum.reinforce.spo import SPOChain, SPOChainAdvantage, SPODrop, SPOMask, SPOTree, SPOTreeAdvantage, SPOWhiten
from locum.reinforce.thr import THR
from locum.reinforce.twgrpo import TWGRPO, SoftChoice

__all__ = [
    "D3S",
    "GAE",
    "GDPO",
    "HAPO",
    "HOSTS",
    "KL",
    "MTS",
    "THR",
    "TWGRPO",
    "Autoregressive",
    "BatchCentred",
    "Clip",
    "CoT2",
    "Constant",
    "DiffuGRPO",
    "Dirichlet",
    "Finished",
    "Flat",
    "GroupCentred",
    "GroupNormalised",
    "HAPOAdvantage",
    "HAPOClip",
    "HAPORedistribute",
    "HAPOTemperature",
    "Informative",
    "LeaveOneOut",
    "Overlong",
    "Piece",
    "Plan",
    "Policy",
    "Recipe",
    "Run",
    "SPOChain",
    "SPOChainAdvantage",
    "SPOChainSample",
    "SPODrop",
    "SPOMask",
    "SPOTree",
    "SPOTreeAdvantage",
    "SPOTreeSample",
    "SPOWhiten",
    "SequenceMean",
    "SequenceRatio",
    "SequenceSum",
    "SoftChoice",
    "Stage",
    "TokenMean",
    "TokenRatio",
]

_LAZY = {"Learner": "learner", "Trainer": "trainer", "reinforce": "run"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
