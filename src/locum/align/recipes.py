"""What a method is given before it trains: the models that it stands on, and the columns that they write.

A method on preference pairs alone needs nothing. A guide, teachers, and models of right and wrong are trained from the
same pairs where the user has none (`locum.align.beside`); columns that the data does not bring are worked out by the
method's signal and kept on the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from locum.align.aligndistil import AlignDistil, swapped
from locum.align.base import Example, Method
from locum.align.cache import fingerprint, with_column
from locum.align.cdpo import CDPO, ContrastiveEstimation
from locum.align.dpo import DPO
from locum.align.rto import RTO
from locum.align.sft import SFT
from locum.align.signals import TokenSignal
from locum.align.statistics import Scorer
from locum.align.tgdpo import TGDPO, GuideReward
from locum.align.treg import TREG, RewriteReward
from locum.models import LM

__all__ = ["Ingredient", "annotated", "ingredients"]


class Ingredient(NamedTuple):
    """How a model beside the policy is trained from pairs: with what method, and on what the pairs become."""

    method: Method
    rows: Callable[[Sequence[Example]], list[dict[str, Any]]]


def ingredients(method: Method) -> dict[str, Ingredient]:
    """The models beside policy and reference that a method stands on, by name, and how each is made where there is none."""
    if isinstance(method, TGDPO):
        return {"guide": Ingredient(DPO(beta=method.beta), _pairs)}
    if isinstance(method, CDPO):
        return {
            name: Ingredient(SFT(), _only(block)) for name, block in (("positive", "chosen"), ("negative", "rejected"))
        }
    if isinstance(method, AlignDistil):
        made = {
            "dpo": Ingredient(DPO(beta=method.beta_0), _pairs),
            "reverse": Ingredient(DPO(beta=method.beta_0), swapped),
        }
        return {name: made[name] for name in method.frozen if name != "ref"}
    if isinstance(method, RTO) and method.placement != "none":
        return {"dpo": Ingredient(DPO(), _pairs)}
    return {}


def annotated(
    method: Method,
    examples: Sequence[Example],
    lm: LM,
    scorers: Mapping[str, Scorer],
    folder: Path,
    pad_id: int,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """The examples with the method's columns: as they are where the data has them, else worked out and kept in the folder.

    Args:
        lm: the policy at its start, with its tokenizer.
        scorers: "ref", and the method's ingredients.
    """
    missing = [c for c in method.columns if not all(f"{b}_{c}" in examples[0] for b in method.blocks)]
    signal = _signal(method, lm, scorers, pad_id, batch_size) if missing else None
    if signal is None:
        return [dict(e) for e in examples]
    models = [scorers[name] for name in ("ref", *ingredients(method))]
    made_from = fingerprint(repr(type(signal)), _settings(signal), *models)
    return with_column(signal.column, signal.values, examples, method.blocks, folder, made_from, batch_size)


def _signal(method: Method, lm: LM, scorers: Mapping[str, Scorer], pad_id: int, batch_size: int) -> TokenSignal | None:
    batches: dict[str, Any] = {"pad_id": pad_id, "batch_size": batch_size, "move": lambda batch: batch.to(lm.device)}
    if isinstance(method, TGDPO):
        return GuideReward(scorers["guide"], scorers["ref"], method.beta, **batches)
    if isinstance(method, CDPO):
        ends = tuple(sorted(lm.eos_ids))
        scores = scorers["positive"], scorers["negative"]
        return ContrastiveEstimation(*scores, chosen=method.weight_chosen, eos_ids=ends, **batches)
    if isinstance(method, TREG):
        return RewriteReward(lm, batch_size=batch_size)
    return None


def _settings(signal: TokenSignal) -> str:
    """What of a signal is plain data: its numbers and texts."""
    return repr({k: v for k, v in vars(signal).items() if isinstance(v, str | int | float | tuple)})


def _pairs(rows: Sequence[Example]) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def _only(block: str) -> Callable[[Sequence[Example]], list[dict[str, Any]]]:
    """One response of each pair, as what plain fine-tuning takes."""
    return lambda rows: [{"prompt_ids": row["prompt_ids"], "response_ids": row[f"{block}_ids"]} for row in rows]
