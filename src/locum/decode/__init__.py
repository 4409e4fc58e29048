"""Faster and controlled decoding: drafter x verifier x cache, constraints with weights, search under a value."""

from locum.decode.auto import Auto
from locum.decode.base import Context, Drafter, Rows, Tree, Verifier, check_pair
from locum.decode.chain import Chain
from locum.decode.dyspec import DySpec, RecursiveRejection
from locum.decode.engine import Generation, Step, generate
from locum.decode.graft import Graft
from locum.decode.lookup import Lookup
from locum.decode.plain import Plain
from locum.decode.spectr import KSEQ, SpecTr
from locum.decode.tokenrecycling import TokenRecycling, TokenTable
from locum.decode.verifiers import ChainRejection, Match

__all__ = [
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
    "SpecTr",
    "Step",
    "TokenRecycling",
    "TokenTable",
    "Tree",
    "Verifier",
    "check_pair",
    "generate",
]
