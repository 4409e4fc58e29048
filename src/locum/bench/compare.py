"""Methods side by side: a task is measured, unit by unit, into a run's folder, and shown as a table, a report and JSON.

>>> from locum.bench.compare import compare
>>> from locum.bench.compare_decode import DecodeTask
>>> compare(DecodeTask(methods=("lookup", "auto")))  # doctest: +SKIP
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.table import Table

from locum.bench.engines import Engine, Runner, Unit
from locum.bench.engines import engine as engine_named
from locum.bench.measures import Measure, aggregate
from locum.bench.report import Page, Part, html, table
from locum.bench.store import Row, Store, latest
from locum.errors import UserError
from locum.files import write_atomically
from locum.progress import Bar

Kind = Literal["ours", "peer", "plain"]

__all__ = ["Comparison", "Task", "compare"]


class Task(ABC):
    """Some methods of a family on some items: a frozen dataclass of plain values, so that it can be sent to a worker.

    `measures` are the figures made of raw lines; `references` are what the others are measured against, and `main` is the
    ratio that decides. `timed`: a reference is compared with what ran beside it, so that one that is missing runs again;
    otherwise, where results are the same whenever they are made, it runs once per seed and item. `pooled`: whether figures
    over several groups mean something. `note` says what is to be known of the figures. `cores` and `gpus` are what a unit
    takes.
    """

    family: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    references: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[str]
    timed: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    note: ClassVar[str] = ""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Keys of the measures that a terminal has room for."""

    @property
    def cores(self) -> int:
        return 1

    @property
    def gpus(self) -> int:
        return 0

    @abstractmethod
    def config(self) -> Row:
        """What is asked, as plain data: it must be equal for a run to go on. Has "model", "task" and "methods"."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """All that is to be measured, in order."""

    @abstractmethod
    def open(self) -> Runner:
        """Load what is needed, once per process.

        Raises:
            UserError: when the models do not fit together.
        """

    @abstractmethod
    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        """One sentence: which method to use, and by how much. Rows are figures by method, and by method and group."""

    @abstractmethod
    def part(self, page: Page) -> Part:
        """The family's own sections of the report."""

    def weight(self, unit: Unit) -> float:
        """How long a unit takes, as far as can be told before, in any measure of time that all of them share."""
        return 1.0

    def sound(self, row: Row) -> bool:
        """Whether figures may be marked as the best: not those of a method that has broken its promise there."""
        return True

    def remark(self) -> str:
        """What is to be known of this run's figures besides the note."""
        return ""

    def told(self, row: Row) -> str:
        """What the progress says of a row."""
        return f"{row['method']} on {row['group']} {row['item'] + 1}"

    def items(self) -> list[str]:
        """The items' texts, for the report; empty when they have none."""
        return []

    def kind(self, method: str) -> Kind:
        """Whose a method is."""
        return "plain" if method in self.references else "ours"


@dataclass(frozen=True)
class Comparison:
    """What came out so far; `interrupted` when it was stopped before its end."""

    task: Task
    folder: Path
    rows: list[Row]
    interrupted: bool = False

    @property
    def lines(self) -> list[Row]:
        """The raw lines of the units asked for, in the task's order, each with its references beside it as "refs"."""
        refs: dict[Any, dict[str, Row]] = {}
        for row in self.rows:
            if row["method"] in self.task.references and "raw" in row:
                refs.setdefault(self._beside(row), {})[row["method"]] = row["raw"]
        latest_row = {(r["method"], r["seed"], r["item"]): r for r in self.rows if r["role"] == "unit"}
        found = [latest_row[u.key] for u in self._units() if u.key in latest_row]
        return [row | {"refs": refs.get(self._beside(row), {})} for row in found]

    def _beside(self, row: Row) -> Any:
        """What a row shares with its references."""
        return row["pass"] if self.task.timed else (row["seed"], row["item"])

    def _units(self) -> list[Unit]:
        order = {m: i for i, m in enumerate(self.task.config()["methods"])}
        return sorted(self.task.units(), key=lambda u: (order[u.method], u.seed, u.item))

    def by(self, *columns: str) -> list[Row]:
        """Figures per combination of columns, e.g. ``by("method", "group")``."""
        return aggregate(self.lines, self.task.measures, columns)

    def json(self) -> Row:
        """The promised form of ``locum compare --json``: one row per method, group and seed."""
        config = self.task.config()
        head = {"family": self.task.family, "task": config["task"], "model": config["model"]}
        return head | {"rows": self.by("method", "group", "seed")}

    @property
    def headline(self) -> str:
        return self.task.headline(self.by("method"), self.by("method", "group"))

    def table(self) -> Table:
        """The table for a terminal of 100 columns, as a rich renderable."""
        return table(self.page())

    def page(self) -> Page:
        """What the table and the report show."""
        task, config = self.task, self.task.config()
        whole = len(task.units())
        facts = {
            "model": str(config["model"]),
            "task": str(config["task"]),
            "measured": f"{len(self.lines)} of {whole} units",
        }
        if self.rows:
            where = self.rows[-1]["environment"]
            facts |= {
                k: ", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v, dict) else str(v)
                for k, v in where.items()
            }
        overall = self.by("method")
        return Page(
            title=f"{task.family} on {config['model']}",
            headline=self.headline,
            measures=task.measures,
            columns=task.columns,
            main=task.main,
            note=f"{task.note} {task.remark()}".strip(),
            pooled=task.pooled,
            overall=overall,
            groups=self.by("method", "group"),
            kinds={r["method"]: task.kind(r["method"]) for r in overall},
            lines=self.lines,
            items=task.items(),
            facts=facts,
            sound=task.sound,
        )

    def html(self) -> str:
        """The report."""
        page = self.page()
        return html(page, self.task.part(page))

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def how_to_resume(self) -> str:
        done = len({(r["method"], r["seed"], r["item"]) for r in self.rows if r["role"] == "unit"})
        kept = f"stopped with {done} of {len(self.task.units())} measured and kept"
        return f"{kept}; go on with the same command and --resume --name {self.folder.name}"


def compare(
    task: Task, name: str | None = None, resume: bool = False, engine: str = "local", runs: str | Path = "runs"
) -> Comparison:
    """Measure what is not measured yet, write the report, and return what came out.

    Args:
        task: what to compare.
        name: the run's folder in `runs`; by default the family and the time, with `resume` the run of the family begun last.
        resume: go on with a run that exists: only what is missing or failed is measured.
        engine: "local" or "ray".
        runs: where runs are kept.

    Ctrl-C does not raise: the comparison that is returned says `interrupted`, and everything that ended is kept.

    Raises:
        UserError: for a run that exists (without `resume`), one with another config, or models that do not fit.
    """
    where = engine_named(engine)
    folder = Path(runs)
    if name is None:
        name = latest(folder, f"{task.family}-") if resume else f"{task.family}-{time.strftime('%Y%m%d-%H%M%S')}"
        if name is None:
            raise UserError(f"there is no run of {task.family} in {folder}/ to resume: leave out --resume")
    with Store(folder, name, task.config(), resume=resume) as store:
        interrupted = _measure(task, store, where)
        result = Comparison(task, store.folder, list(store.rows), interrupted)
    write_atomically(result.report, result.html())
    return result


def _measure(task: Task, store: Store, where: Engine) -> bool:
    """Add the missing rows to the store; true when stopped by Ctrl-C."""
    done = {(r["method"], r["seed"], r["item"]) for r in store.rows if r["role"] == "unit" and "raw" in r}
    units = task.units()
    missing = [u for u in units if u.key not in done]
    if done and missing:
        print(f"going on with {store.folder}: {len(done)} of {len(units)} done", file=sys.stderr)
    whole = sum(map(task.weight, units)) or 1.0
    share = {u.key: task.weight(u) * len(units) / whole for u in units}  # 1 each where all take as long
    with Bar(f"compare {task.family}", len(units), percent=len(set(share.values())) > 1) as bar:
        bar.step("measured before", sum(share[key] for key in done if key in share))
        bar.say("loading")
        ended = bar.done

        def tell(unit: Unit, part: float, text: str) -> None:
            bar.at(ended + part * share[unit.key], f"{unit.method} on {unit.group}: {text}")

        rows = where.run(task, missing, tell)
        try:
            for row in rows:
                store.append(row)
                ended += share[row["method"], row["seed"], row["item"]] if row["role"] == "unit" else 0
                bar.at(ended, task.told(row))
        except KeyboardInterrupt:
            return True
        finally:
            rows.close()
    return False
