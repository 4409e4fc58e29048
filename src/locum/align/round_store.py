"""Rounds on the disk: what a round leaves for the next one, and for a process that goes on where a killed one was::

    <output_dir>/rounds.json                  what was asked
    <output_dir>/round-0/collected.json       what was measured while the examples were made
    <output_dir>/round-0/examples.jsonl       the round's examples: token ids, texts, and the method's numbers per token
    <output_dir>/round-0/training/            the trainer's checkpoints, gone when the round is finished
    <output_dir>/round-0/policy/              the policy after the round, as `from_pretrained` reads it
    <output_dir>/round-0/round.json           what was logged; written last, it marks the round as finished

Every file but the policy's is written beside its place and then renamed, so it is there whole or not at all.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locum.align.base import Example
from locum.errors import UserError
from locum.files import write_atomically

__all__ = ["RoundFolder", "RoundResult", "same_as_before"]

TRAINER_STATE = ("optimizer.pt", "scheduler.pt")  # in a policy's folder, for the next round alone


@dataclass(frozen=True)
class RoundResult:
    """A finished round.

    Args:
        index: its number, from 0.
        folder: where it is.
        logs: what was measured while its examples were made: "distinct", the share of different responses among those
            sampled, their mean "length" and the share "truncated"; "seconds/sampling", "seconds/labelling",
            "seconds/collecting" (all of it) and "seconds/training", "share/sampling"; and what the method adds.
        history: what the trainer logged, step by step.
        first_steps: how many steps the first round was trained for.
    """

    index: int
    folder: Path
    logs: dict[str, float]
    history: list[dict[str, Any]]
    first_steps: int | None = None

    @property
    def policy(self) -> Path:
        """The folder of the policy after the round."""
        return RoundFolder(self.folder.parent, self.index).policy

    def examples(self) -> list[dict[str, Any]]:
        """What the round was trained on."""
        return RoundFolder(self.folder.parent, self.index).examples()


@dataclass(frozen=True)
class RoundFolder:
    """The folder of one round."""

    out: Path
    index: int

    @property
    def path(self) -> Path:
        return self.out / f"round-{self.index}"

    @property
    def training(self) -> Path:
        return self.path / "training"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def is_collected(self) -> bool:
        return (self.path / "examples.jsonl").exists()

    def collect(self, examples: Sequence[Example], logs: Mapping[str, float]) -> None:
        """Keep the examples; tensors and arrays as lists, in which float32 numbers are still the same."""
        lines = (json.dumps(e, default=lambda values: values.tolist(), ensure_ascii=False) for e in examples)
        write_atomically(self.path / "collected.json", json.dumps(logs, indent=1))
        write_atomically(self.path / "examples.jsonl", "".join(f"{line}\n" for line in lines))

    def examples(self) -> list[dict[str, Any]]:
        with (self.path / "examples.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def logs(self) -> dict[str, float]:
        """What was measured while the examples were made."""
        return json.loads((self.path / "collected.json").read_text("utf-8"))

    def finish(self, logs: Mapping[str, float], history: list[dict[str, Any]], first_steps: int | None) -> None:
        """Mark the round as finished, and clear away what is not needed any more."""
        known = {"logs": logs, "history": history, "first_steps": first_steps}
        write_atomically(self.path / "round.json", json.dumps(known, indent=1))
        shutil.rmtree(self.training, ignore_errors=True)
        for name in TRAINER_STATE:
            (RoundFolder(self.out, self.index - 1).policy / name).unlink(missing_ok=True)

    def result(self) -> RoundResult | None:
        """What the round came to; None while it is not finished."""
        try:
            known = json.loads((self.path / "round.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        return RoundResult(self.index, self.path, **known)


def same_as_before(out: Path, asked: Mapping[str, Any]) -> None:
    """Write down what was asked.

    Raises: UserError for a folder in which something else was begun, naming it.
    """
    path, asked = out / "rounds.json", json.loads(json.dumps(asked))
    if not path.exists():
        write_atomically(path, json.dumps(asked, indent=1))
        return
    before = json.loads(path.read_text("utf-8"))
    if different := [k for k in asked if before.get(k) != asked[k]]:
        raise UserError(
            f"{str(out)!r} holds rounds that were begun with another value of {', '.join(different)}; go on as they were "
            "begun, or choose another folder"
        )
