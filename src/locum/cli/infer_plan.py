"""``locum infer plan``: which documents an expert is to label."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text

from locum.cli.command import Command, console, emit, table
from locum.errors import UserError
from locum.method import require

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan(Command):
    """Draw the documents that an expert is to label, with known probabilities, for locum infer dsl.

    Args:
        data: one row per document: a .csv, .tsv, .parquet or .jsonl file.
        labels: how many documents are to be labelled.
        out: the same table with two columns more, prob and labelled, in the format that its name says.
        strata: a column: of each of its values as many as its share of the documents.
        size: a column of numbers: probabilities in proportion, e.g. how unsure the model is.
        floor: with --size: no probability is below this share of the mean one.
        equal: with --strata: as many of each value, not in proportion.
        force: write over a file that is there.
        seed: fixes the draw.
        json: print one JSON document.
    """

    name: ClassVar[str] = "infer plan"
    data: Path
    labels: int
    out: Path
    strata: str | None = None
    size: str | None = None
    floor: float = 0.1
    equal: bool = False
    force: bool = False
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        require(self, "labels", self.labels >= 1, ">= 1")
        require(self, "seed", self.seed >= 0, ">= 0")

    def run(self) -> int:
        from locum.infer.tables import check_format, write_with

        check_format(self.out)
        if self.out.exists() and not self.force:
            raise UserError(f"{self.out} is there already: name another file, or --force to write over it")
        from locum.infer import draw_labels

        drawn = draw_labels(self.data, self.labels, self.strata, self.size, self.floor, self.equal, self.seed)
        write_with(self.data, self.out, drawn[["prob", "labelled"]])
        whole = _range(drawn["prob"])
        groups = [("all", drawn)] if self.strata is None else drawn.groupby(self.strata, dropna=False)
        strata: list[dict[str, Any]] = [
            {
                "stratum": "missing" if name != name else str(name),
                "documents": len(rows),
                "labels": int(rows["labelled"].sum()),
            }
            | _range(rows["prob"])
            for name, rows in groups
        ]
        if self.json:
            emit({"out": str(self.out), "documents": len(drawn), "labels": self.labels, **whole, "strata": strata})
            return 0
        out = console()
        grid = table(self.strata or "", "documents", "to label", "probability")
        for row in strata:
            grid.add_row(Text(row["stratum"]), f"{row['documents']:,}", f"{row['labels']:,}", _shown(row))
        for column in grid.columns[1:]:
            column.justify = "right"
        out.print(grid)
        out.print(
            Text(
                f"{self.labels:,} of {len(drawn):,} documents to label, drawn with probability {_shown(whole)}: {self.out}"
            ),
            soft_wrap=True,
        )
        out.print(
            "An expert's label goes into a new column where labelled is 1; then locum infer dsl "
            f"--data {self.out} --prob prob --labelled labelled ...",
            markup=False,
            soft_wrap=True,
        )
        return 0


def _range(prob: Any) -> dict[str, float]:
    return {"least_prob": float(prob.min()), "greatest_prob": float(prob.max())}


def _shown(row: dict[str, Any]) -> str:
    low, high = (f"{row[k]:.3g}" for k in ("least_prob", "greatest_prob"))
    return low if low == high else f"{low} to {high}"
