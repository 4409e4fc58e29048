"""``locum infer dsl``: a regression on labels that a model made, from a file to the tables of a paper."""

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.text import Text

from locum.cli.command import Command, console, emit, quiet_stdout, table, told
from locum.errors import MissingExtra, UserError, unknown
from locum.files import write_atomically
from locum.method import require

if TYPE_CHECKING:  # brings pandas
    from locum.infer import DSLResult

__all__ = ["Dsl"]


@dataclass(frozen=True)
class Dsl(Command):
    """Regress on labels that a model made: design-based supervised learning (arXiv 2306.04746).

    Args:
        data: one row per document: a .csv, .tsv, .parquet or .jsonl file.
        formula: as in R, with the gold columns' names: "y ~ x1 + C(x2)".
        gold: columns that hold an expert's label where there is one and are empty elsewhere: the outcome, or explanatory.
        predicted: the model's labels, a column for each gold one, in the same order; a+b for several models of one gold label.
        prob: the probability with which a document was drawn for the expert: a column, a number, or "estimate" (the guarantee
            then rests on a regression). When left out, all had the same.
        labelled: a column of 0 and 1: whether a document was drawn; when left out, where there are gold labels.
        model: the regression.
        learner: how gold labels are predicted from the model's; identity takes the model's as they are.
        folds: parts of the cross-fitting.
        splits: how often it is done anew.
        alpha: intervals cover with probability 1 - alpha.
        normalize_prob: scale probabilities so that their mean is the share of labelled documents.
        features: further columns to predict gold labels from.
        cluster: a column: errors are independent between its values only.
        fixed_effects: columns an effect for each of whose values is taken out (linear).
        power: numbers of gold labels: the standard errors to be expected of them.
        predict: a table for whose rows means are predicted, with intervals.
        predict_out: where that table goes with its means.
        out: write all figures to this JSON file.
        latex: write the tables to this LaTeX file.
        jobs: processes among which the splits are shared.
        seed: fixes every random choice.
        json: print one JSON document.
    """

    name: ClassVar[str] = "infer dsl"
    data: Path
    formula: str
    gold: tuple[str, ...]
    predicted: tuple[str, ...]
    prob: str | None = None
    labelled: str | None = None
    model: Literal["linear", "logistic", "multinomial", "poisson"] = "linear"
    learner: Literal["forest", "generalized", "identity"] = "forest"
    folds: int = 5
    splits: int = 10
    alpha: float = 0.05
    normalize_prob: bool = False
    features: tuple[str, ...] = ()
    cluster: str | None = None
    fixed_effects: tuple[str, ...] = ()
    power: tuple[int, ...] = ()
    predict: Path | None = None
    predict_out: Path | None = None
    out: Path | None = None
    latex: Path | None = None
    jobs: int = 1
    seed: int = 0
    json: bool = False

    def __post_init__(self) -> None:
        require(self, "jobs", self.jobs >= 1, ">= 1")
        require(self, "seed", self.seed >= 0, ">= 0")
        if len(self.gold) != len(self.predicted) or len(set(self.gold)) != len(self.gold):
            said = f"{' '.join(self.gold) or 'none'} and {' '.join(self.predicted) or 'none'}"
            raise UserError(f"--gold and --predicted go in pairs, each gold column once, got {said}")
        if (self.predict is None) != (self.predict_out is None):
            raise UserError("--predict FILE and --predict-out FILE go together")

    def run(self) -> int:
        with quiet_stdout(self.json), told():
            result = self._fit()
            document = result.to_dict() | {"power": self._power(result)}
            if self.out is not None:
                write_atomically(self.out, jsonlib.dumps(document, indent=1, ensure_ascii=False) + "\n")
            if self.latex is not None:
                summary = result.summary()
                summary.extra_txt = None  # sentences, which a reader of the paper gets in other words
                write_atomically(self.latex, summary.as_latex() + "\n")
            if self.predict is not None and self.predict_out is not None:
                _predict(result, self.predict, self.predict_out)
        if self.json:
            emit(document)
            return 0
        print(f"{result.summary()}\n")
        out = console()
        if self.power:
            grid = table("gold labels", *(f"{row['labels']:,}" for row in document["power"]["bse"]))
            for name in result.problem.names:
                grid.add_row(Text(name), *(f"{row['bse'][name]:.3g}" for row in document["power"]["bse"]))
            for column in grid.columns[1:]:
                column.justify = "right"
            out.print(grid)
        else:
            out.print(Text(_halving(result, document["power"]["labels_to_halve"])))
        out.print(Text(_read_so(result, self.prob)))
        if written := [str(p) for p in (self.out, self.latex, self.predict_out) if p is not None]:
            out.print(Text(f"written: {', '.join(written)}"), soft_wrap=True)
        return 0

    def _fit(self) -> "DSLResult":
        from locum.infer.tables import check_format, read_table

        try:
            import sklearn  # noqa: F401  # all of the extra, before any work is done
            import statsmodels  # noqa: F401

            from locum.infer import DSL
        except ModuleNotFoundError:
            raise MissingExtra("locum infer dsl", "infer") from None
        for given in (self.out, self.latex, self.predict_out):
            if given in (self.data, self.predict) and given is not None:
                raise UserError(f"{given} would be written over: name another file")
        if self.predict is not None and self.predict_out is not None:
            check_format(self.predict_out)
            read_table(self.predict)
        rows = read_table(self.data)
        most = len(rows)
        for count in self.power:
            if not 0 < count <= most:
                raise UserError(
                    f"--power takes numbers of gold labels from 1 to {most}, the number of rows, got {count}"
                )
        method: DSL = DSL(self.model, self.learner, self.folds, self.splits, self.alpha, self.normalize_prob, self.seed)
        return method.fit(
            rows,
            self.formula,
            {g: s if s in rows else s.split("+") for g, s in zip(self.gold, self.predicted, strict=True)},
            _probability(self.prob, rows),
            self.labelled,
            self.features,
            self.cluster,
            self.fixed_effects,
            jobs=self.jobs,
            progress=True,
        )

    def _power(self, result: "DSLResult") -> dict[str, Any]:
        """Standard errors of other numbers of gold labels, and how many labels halve those of now."""
        rows = result.power(self.power or None)
        bse = [{"labels": int(count), "bse": dict(row)} for count, row in rows.iterrows()]
        halve = {n: result.labels_needed(n, se=s / 2) if s > 0 else None for n, s in result.bse.items()}
        return {"bse": bse, "labels_to_halve": halve}


def _probability(given: str | None, rows: Any) -> str | float | None:
    """A column, "estimate", or a number."""
    if given is None or given in rows or given == "estimate":
        return given
    try:
        return float(given)
    except ValueError:
        raise unknown("column", given, map(str, rows.columns)) from None


def _predict(result: "DSLResult", source: Path, target: Path) -> None:
    from locum.infer.tables import read_table, write_with

    alpha = None if result.problem.levels else result.method.alpha
    rows = read_table(source)
    write_with(source, target, result.predict(rows, alpha).reindex(rows.index).rename(columns=str))


def _halving(result: "DSLResult", needed: Mapping[str, int | None]) -> str:
    """How many labels would halve the standard errors, in a sentence."""
    from locum.infer.problem import some

    can, cannot = {n: k for n, k in needed.items() if k is not None}, [n for n, k in needed.items() if k is None]
    if not can:
        return f"Gold labels for all {result.nobs:,} documents would not halve any standard error."
    said = f"would take about {max(can.values()):,} gold labels in all, instead of {result.ngold:,}"
    if not cannot:
        return f"To halve every standard error {said}."
    return f"To halve the standard error of {some(can)} {said}; of {some(cannot)} labels for all would not do."


def _read_so(result: "DSLResult", prob: str | None) -> str:
    """What the check means for the table, in a line."""
    from locum.infer.problem import some

    if not result.check():
        return (
            "Do not rely on these intervals: find out how the labelled documents were chosen, and say so with --prob."
        )
    given = {
        None: "if all documents were as likely to be drawn",
        "estimate": "if the estimated probabilities are right",
    }
    said = f"The intervals hold whatever errors the model makes, {given.get(prob, 'if documents were drawn as --prob says')}"
    naive = result.baselines().get("surrogate only")
    if naive is None or naive.failed:
        return f"{said}."
    ends = zip(result.problem.names, naive.theta, result.conf_int().to_numpy(), strict=True)
    outside = [name for name, theta, (low, high) in ends if not low <= theta <= high]
    if not outside:
        return f"{said}; estimates from its labels alone lie within all of them."
    return f"{said}; estimates from its labels alone lie outside those of {some(outside)}."
