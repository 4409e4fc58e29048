"""``locum compare`` and ``locum verify``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.text import Text
from tyro.conf import Positional

from locum.bench.compare import compare
from locum.bench.compare_align import AlignTask
from locum.bench.compare_decode import DecodeTask
from locum.bench.compare_infer import InferTask
from locum.bench.compare_reinforce import ReinforceTask
from locum.bench.verify import available, run_claims
from locum.cli.command import Command, console, emit, quiet_stdout, read, table
from locum.errors import UserError, unknown
from locum.method import outside
from locum.paper import FAMILIES, catalogue

__all__ = ["Compare", "Verify"]

TASKS = {"align": AlignTask, "decode": DecodeTask, "infer": InferTask, "reinforce": ReinforceTask}
VERDICTS = {"holds": "green", "fails": "red", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Run:
    """How a comparison is run and kept.

    Args:
        name: the run's folder under runs/; by default the family and the time.
        resume: go on with a run that was stopped: only what is missing is measured.
        engine: where the work is done, in this process or as tasks of a Ray cluster.
        runs: the folder in which runs are kept.
        json: print one JSON document.
    """

    name: str | None = None
    resume: bool = False
    engine: Literal["local", "ray"] = "local"
    runs: Path = Path("runs")
    json: bool = False


@dataclass(frozen=True)
class Compare(Command):
    """Methods of a family side by side. The first argument is the family; the others are its task's.

    Args:
        task: what is compared.
        how: how it is run and kept.
    """

    name: ClassVar[str] = "compare"
    task: Any
    how: Run

    @classmethod
    def read(cls, args: Sequence[str]) -> "Compare":
        if not args:
            raise UserError(f"say which family to compare: {', '.join(TASKS)}")
        if args[0] in ("-h", "--help"):
            print(
                f"usage: locum compare FAMILY ... (families: {', '.join(TASKS)}; locum compare FAMILY --help says more)"
            )
            raise SystemExit(0)
        family, *rest = args
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
        if family not in TASKS:
            raise UserError(f"nothing of the family {family} can be compared yet: its papers are planned")
        return cls(*read(_pair(TASKS[family]), f"compare {family}", _commas(rest, "--methods")))

    def run(self) -> int:
        how = self.how
        with quiet_stdout(how.json):
            result = compare(self.task, name=how.name, resume=how.resume, engine=how.engine, runs=how.runs)
        if how.json:
            emit(result.json())
        else:
            out = console()
            out.print(result.table())
            out.print(Text(result.headline))
            out.print(Text(f"report: {result.report}"), soft_wrap=True)
        if result.interrupted:
            print(f"locum: {result.how_to_resume}", file=sys.stderr)
            return 130
        return 0


def _pair(task: type) -> Any:
    """A task and how to run it, as one type whose fields are all flags."""

    def both(task: task, run: Run) -> tuple[Any, Run]:  # type: ignore[valid-type]
        return task, run

    both.__doc__ = f"{(task.__doc__ or '').splitlines()[0]}"
    return both


def _commas(args: Sequence[str], flag: str) -> list[str]:
    """``--methods a,b`` and ``--methods=a,b`` as ``--methods a b``; a semicolon does what a comma does, neither does in brackets."""
    out: list[str] = []
    for arg in args:
        if arg.startswith(f"{flag}="):
            out += [flag, *outside(arg.removeprefix(f"{flag}="), ",;")]
        elif out and out[-1] == flag:
            out += [a for a in outside(arg, ",;") if a]
        else:
            out.append(arg)
    return out


@dataclass(frozen=True)
class Verify(Command):
    """Run papers' claims here and now, by the criterion that was written down before.

    Args:
        slugs: the papers' names in the catalogue.
        all: every paper that has a claim.
        fast: a part of each claim that ends in well under a minute; its verdict is not kept.
        json: print one JSON document.
    """

    name: ClassVar[str] = "verify"
    slugs: Positional[tuple[str, ...]] = ()
    all: bool = False
    fast: bool = False
    json: bool = False

    def run(self) -> int:
        if not self.slugs and not self.all:
            raise UserError(f"say which claims: locum verify SLUG..., or --all (there are: {', '.join(available())})")
        for slug in self.slugs:
            if slug not in {p.slug for p in catalogue()}:
                raise unknown("paper", slug, [p.slug for p in catalogue()])
        with quiet_stdout(self.json):
            rows = run_claims(None if self.all else self.slugs, fast=self.fast)["claims"]
        keys = ("slug", "verdict", "claim", "measured", "criterion", "seeds", "seconds", "machine")
        for row in rows:
            if "traceback" in row:
                print(row["traceback"], file=sys.stderr)
        if self.json:
            emit({"claims": [{k: row[k] for k in keys} for row in rows]})
        else:
            grid = table("paper", "verdict", "claimed", "measured", "time")
            for row in rows:
                verdict = Text(row["verdict"], style=VERDICTS[row["verdict"]])
                grid.add_row(row["slug"], verdict, Text(row["claim"]), Text(row["measured"]), f"{row['seconds']:.0f} s")
                grid.add_row()
            console().print(grid)
        return 1 if any("error" in row for row in rows) else 0
