"""``locum infer progvi``: fit a variational program that a user's Python file defines."""

import json as jsonlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text

from locum.cli.command import Command, console, emit, quiet_stdout, table, told
from locum.errors import UserError, unknown
from locum.files import write_atomically
from locum.method import settings
from locum.user_code import blamed, load_code

if TYPE_CHECKING:  # brings jax
    from locum.infer.vi import Objective, VIResult

__all__ = ["Progvi"]

FILE = "progvi.safetensors"  # of a checkpoint, where a folder is given
MOST = 6  # numbers of a parameter that are shown one by one


@dataclass(frozen=True)
class Progvi(Command):
    """Fit a variational program of your own: programmable variational inference (arXiv 2406.15742).

    Args:
        program: a file.py, or a module, that defines model, guide and params (where to start), and, as need be, data (the
            model's observed choices by address) and args. It is run.
        objective: what is maximised: elbo, iwelbo, renyi, waketheta, wakephi or sleep; settings may follow, as in
            "renyi(alpha=0.3)".
        particles: of an objective that has some; 5 when left out.
        per_datum: data and args hold many data along their first axis, and each draw takes one of them.
        steps: of the optimizer.
        samples: draws in each step.
        optimizer: sgd or adam.
        learning_rate: its step size.
        seed: fixes every random choice.
        checkpoint: a file, or a folder for it, that is written on the way.
        resume: go on from the checkpoint.
        baselines: also how noisy gradients are, beside those of REINFORCE at every site, and where the objective began.
        out: write all figures to this JSON file.
        json: print one JSON document.
    """

    name: ClassVar[str] = "infer progvi"
    program: str
    objective: str = "elbo"
    particles: int | None = None
    per_datum: bool = False
    steps: int = 5000
    samples: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 1e-3
    seed: int = 0
    checkpoint: Path | None = None
    resume: bool = False
    baselines: bool = False
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        with quiet_stdout(self.json), told():
            result = self._fit()
            with blamed(self.program, "the program", calls=True):
                document = self._document(result)
            if self.out is not None:
                write_atomically(self.out, jsonlib.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if self.json:
            emit(document)
        else:
            self._print(result, document)
        if not result.interrupted:
            return 0
        more = "" if self.checkpoint is None else ": --resume goes on"
        print(f"locum: stopped after {document['cost']['steps']:,} of {self.steps:,} steps{more}", file=sys.stderr)
        return 130

    def _fit(self) -> "VIResult":
        from locum.infer import vi

        method = vi.ProgVI(self._objective(), self.steps, self.samples, self.optimizer, self.learning_rate, self.seed)
        checkpoint = self._checkpoint()
        found = load_code(self.program, "the program")
        if absent := [name for name in ("model", "guide", "params") if not hasattr(found, name)]:
            raise UserError(f"the program {self.program} must define model, guide and params: there is no {absent[0]}")
        for name in ("model", "guide"):
            if not callable(getattr(found, name)) and not isinstance(getattr(found, name), vi.Density):
                kind = type(getattr(found, name)).__name__
                raise UserError(f"{name} of the program {self.program} must be a function or a density, got a {kind}")
        with blamed(self.program, "the program", calls=True):
            return method.fit(
                found.model,
                found.guide,
                found.params,
                getattr(found, "data", None),
                args=tuple(getattr(found, "args", ())),
                checkpoint=checkpoint,
            )

    def _objective(self) -> "Objective":
        from locum.infer import objectives

        known = {n.lower(): getattr(objectives, n) for n in objectives.__all__ if n not in ("Objective", "PerDatum")}
        name = self.objective.partition("(")[0].strip().lower()
        if name not in known:
            raise unknown("objective", name, known)
        given = settings(self.objective, known[name])
        if self.particles is not None:
            if "particles" not in known[name].__dataclass_fields__:
                many = [n for n, cls in sorted(known.items()) if "particles" in cls.__dataclass_fields__]
                raise UserError(f"--particles is for {', '.join(many)}, not for {name}")
            given["particles"] = self.particles
        objective = known[name](**given)
        return objectives.PerDatum(objective) if self.per_datum else objective

    def _checkpoint(self) -> Path | None:
        """The checkpoint's file, which is there if and only if the run goes on."""
        if self.checkpoint is None:
            if self.resume:
                raise UserError("--resume goes on from a checkpoint: it needs --checkpoint")
            return None
        folder = self.checkpoint.is_dir() or not self.checkpoint.suffix
        path = self.checkpoint / FILE if folder else self.checkpoint
        if path.exists() and not self.resume:
            raise UserError(f"{path} is there already: --resume goes on from it, or name another file")
        if self.resume and not path.exists():
            raise UserError(f"there is no checkpoint {path} to go on from")
        return path

    def _document(self, result: "VIResult") -> dict[str, Any]:
        check = result.check()
        more: dict[str, Any] = {"check": {"passed": check.passed, "text": check.text, "figures": dict(check.figures)}}
        if self.baselines:
            more["baselines"] = result.baselines()
        return _finite(result.to_json() | more)

    def _print(self, result: "VIResult", document: dict[str, Any]) -> None:
        import jax

        from locum.infer.vi_audit import leaf_names

        out = console()
        grid = table("parameter", "start", "fitted")
        leaves = zip(leaf_names(result.params), *map(jax.tree.leaves, (result.start, result.params)), strict=True)
        for name, *values in leaves:
            grid.add_row(*map(Text, (name, *map(_shown, values))))
        out.print(grid)
        cost, name = document["cost"], type(result.method.objective).__name__
        if self.baselines:
            known = document["baselines"]
            begun, own, other = known["at the start"], known["as written"], known["Reinforce at every site"]
            out.print(
                Text(f"{name} at the start: {_number(begun['value'])} (standard error {_number(begun['error'])})")
            )
        out.print(Text(f"{name}: {_number(document['objective'])} (standard error {_number(document['error'])})"))
        if self.baselines:
            sds = (_number(known["gradient_sd"]) for known in (own, other))
            out.print(
                Text("standard deviation of one draw's gradient: {}, with REINFORCE at every site {}".format(*sds))
            )
        said = document["check"]["text"]
        out.print(Text(f"{said[:1].upper()}{said[1:]}."))
        pace = "" if cost["ms_per_step"] is None else f", {cost['ms_per_step']:.3g} ms per step"
        out.print(Text(f"{cost['steps']:,} steps of {self.samples:,} samples in {cost['seconds']:.1f} s{pace}"))
        if self.out is not None:
            out.print(Text(f"written: {self.out}"), soft_wrap=True)


def _shown(value: Any) -> str:
    """A parameter's numbers, or of many what they are like."""
    import numpy as np

    numbers = np.asarray(value, dtype=float).ravel()
    if numbers.size <= MOST:
        return "  ".join(f"{x:.4g}" for x in numbers)
    shape = " x ".join(map(str, np.shape(value)))
    return (
        f"{shape}: mean {numbers.mean():.3g}, sd {numbers.std():.3g}, from {numbers.min():.3g} to {numbers.max():.3g}"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """Plain data without nan and infinity, for which JSON has no form: null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
