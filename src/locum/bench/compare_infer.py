"""``locum compare infer``: ways to run a regression on labels that a model made, where the truth is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from locum.bench.compare import Kind, Task
from locum.bench.engines import Runner, Unit
from locum.bench.infer_measures import MEASURES
from locum.bench.infer_methods import BASELINE, METHODS, PEERS, Way, has_peer, way_of
from locum.bench.infer_report import infer_part
from locum.bench.infer_worlds import DATA, MANY, REGIMES, OwnTable, Simulated, World
from locum.bench.measures import Measure
from locum.bench.report import Page, Part
from locum.bench.store import Row
from locum.errors import UserError, unknown
from locum.method import require

__all__ = ["InferTask"]

OWN = ("formula", "predicted", "gold", "moment", "features", "cluster")  # what is for a table of one's own


@dataclass(frozen=True)
class InferTask(Task):
    """Regressions on labels that a model made: do the intervals hold the truth, and how large are the errors?

    Args:
        methods: which to compare: gold (gold labels alone), dsl, ppi and ppi++ (ppi-python), weighting, predictions, naive (the model's
            labels as if they were true); all when left out. dsl and predictions take settings: "dsl(learner=forest, folds=3)",
            learner generalized when left out. gold always runs: the others are measured against it.
        regimes: what is simulated: "differential errors", "unequal probabilities", "useless surrogate", "good surrogate", or the first
            word of one; all when left out.
        data: your own table in place of them, .csv, .tsv, .parquet or .jsonl: of its gold labels few are shown, again and again.
        formula: of your regression, with the gold column's name: "y ~ x1 + C(x2)".
        predicted: the column with the model's labels, or several such columns.
        gold: the column with gold labels; rows without one are left out.
        moment: the regression on your table; when left out logistic where it is of gold labels that are 0 and 1, linear otherwise.
        features: further columns of it to predict gold labels from.
        cluster: a column of it: errors are independent between its values only.
        gold_labels: labels that are shown, >= 20. With unequal probabilities a tenth of the rows have one, and three tenths where x2 is 1.
        rows: rows of a simulation.
        replications: of each seed, >= 2.
        seeds: blocks of replications, >= 1: a block is what a run that was stopped goes on with, and one task on a cluster.
        jobs: processes that share the replications of a method that is cross-fitted, >= 1.
    """

    family: ClassVar[str] = "infer"
    measures: ClassVar[tuple[Measure, ...]] = MEASURES
    references: ClassVar[tuple[str, ...]] = (BASELINE,)
    main: ClassVar[str] = "vs_gold"
    timed: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    note: ClassVar[str] = (
        "Read the column “covers” first. A method whose intervals miss the truth too often has no result to rely on, and a small error "
        "or a narrow interval of it is nothing in its favour: no figure of it is marked as the best. Among methods that cover, the "
        "smaller error is the better one. All methods see the same replications. Point at a column's head to see how it is computed."
    )

    methods: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ()
    data: str | None = None
    formula: str | None = None
    predicted: tuple[str, ...] = ()
    gold: str | None = None
    moment: Literal["linear", "logistic", "poisson", "multinomial"] | None = None
    features: tuple[str, ...] = ()
    cluster: str | None = None
    gold_labels: int = 300
    rows: int = 2000
    replications: int = 20
    seeds: int = 10
    jobs: int = 2

    def __post_init__(self) -> None:
        require(self, "gold_labels", self.gold_labels >= 20, ">= 20")
        require(self, "rows", self.rows > 2 * self.gold_labels, f"more than twice gold_labels ({self.gold_labels})")
        require(self, "replications", 2 <= self.replications <= MANY, f"from 2 to {MANY}")
        require(self, "seeds", self.seeds >= 1, ">= 1")
        require(self, "jobs", self.jobs >= 1, ">= 1")
        given = [name for name in OWN if getattr(self, name)]
        if self.data is None and given:
            raise UserError(f"--{given[0]} is for a table of your own: give --data too")
        if self.data is not None and self.regimes:
            raise UserError("give --data or --regimes, not both: your own table takes the simulations' place")
        for name in ("formula", "predicted", "gold") if self.data is not None else ():
            if not getattr(self, name):
                raise UserError(f"say --{name} of the table {self.data}: --formula, --predicted and --gold are needed")
        asked = [way_of(text) for text in self.methods]
        for way in asked:
            if way.given and way.dsl.folds * 2 > self.gold_labels:
                raise UserError(f"{way.text} needs {way.dsl.folds * 2} gold labels or more, got {self.gold_labels}")
        _ = self.groups
        if self.data is not None:
            _ = self.worlds[DATA].truth  # read now, so that a bad file is refused now, and sent along to a worker
            for way in asked:
                if reason := self.left_out(way, DATA):
                    raise UserError(f"{way.text} cannot be used on {self.data}: it takes {reason} only")

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """What the methods are compared on."""
        if self.data is not None:
            return (DATA,)
        chosen = []
        for text in self.regimes:
            found = [name for name in REGIMES if text.strip().lower() in (name, name.split()[0])]
            if not found:
                raise unknown("regime", text, REGIMES)
            chosen += found
        return tuple(dict.fromkeys(chosen)) or tuple(REGIMES)

    @cached_property
    def worlds(self) -> dict[str, World]:
        """Where each group's replications come from."""
        if self.data is None:
            return {name: Simulated(name, self.rows, self.gold_labels) for name in self.groups}
        from locum.infer.dsl import MOMENTS
        from locum.infer.tables import read_table

        assert self.gold is not None
        assert self.formula is not None
        table = read_table(self.data)
        if self.gold not in table:
            raise unknown("column", self.gold, map(str, table.columns))
        table = table[table[self.gold].notna()]
        if not len(table):
            raise UserError(f"no row of {self.data} has a gold label in {self.gold}")
        of_gold = self.formula.partition("~")[0].strip() == self.gold
        moment = self.moment or ("logistic" if of_gold and set(table[self.gold]) <= {0, 1} else "linear")
        own = OwnTable(
            table,
            self.formula,
            self.gold,
            self.predicted,
            self.features,
            self.cluster,
            self.gold_labels,
            MOMENTS[moment](),
        )
        return {DATA: own}

    @cached_property
    def chosen(self) -> tuple[str, ...]:
        """The methods that run, in the order of the table."""
        asked = [way_of(text).text for text in self.methods]
        asked = asked or [name for name in METHODS if name not in PEERS or has_peer()]
        return tuple(dict.fromkeys((BASELINE, *asked)))

    def left_out(self, way: Way, group: str) -> str:
        """What alone a method takes that does not run on a group; "" when it does."""
        world = self.worlds[group]
        return way.unfit(world.problem(0, 0), world.moment, world.alike)

    @property
    def columns(self) -> tuple[str, ...]:
        return "covers", "worst", "coverage", "vs_gold", "bias", "width_vs_gold", "labels_worth", "seconds"

    @property
    def cores(self) -> int:
        return self.jobs

    def config(self) -> Row:
        whole = self.seeds * self.replications
        size = f"{self.rows} rows, " if self.data is None else ""
        model = "logistic" if self.data is None else type(self.worlds[DATA].moment).__name__.lower()
        return {
            "family": self.family,
            "task": f"{whole} replications of {' and '.join(self.groups)}: {size}{self.gold_labels} gold labels",
            "model": f"a {model} regression" if self.data is None else f"{model}: {self.formula}",
            "methods": list(self.chosen),
            "groups": list(self.groups),
            "rows": self.rows,
            "gold_labels": self.gold_labels,
            "replications": self.replications,
            "seeds": self.seeds,
            "data": None if self.data is None else self._fingerprint(),
            **{name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in OWN},
        }

    def _fingerprint(self) -> Row:
        """What a run keeps of a user's table: where it came from, how much of it, and a hash of all."""
        import hashlib

        world = self.worlds[DATA]
        assert isinstance(world, OwnTable)
        sha256 = hashlib.sha256(world.table.to_csv(index=False).encode()).hexdigest()
        return {"file": self.data, "rows": len(world.table), "sha256": sha256}

    def units(self) -> list[Unit]:
        run = {(m, g) for g in self.groups for m in self.chosen if not self.left_out(way_of(m), g)}
        return [
            Unit(method, seed, item, group)
            for item, group in enumerate(self.groups)
            for seed in range(self.seeds)
            for method in self.chosen
            if (method, group) in run
        ]

    def weight(self, unit: Unit) -> float:
        """Tenths of a second, about; what comes out of another method's fits takes none."""
        way = way_of(unit.method)
        if way.name not in ("dsl", "predictions"):
            return 0.1
        if way.name == "predictions" and any(
            way_of(m).name == "dsl" and way_of(m).given == way.given for m in self.chosen
        ):
            return 0.0
        return way.dsl.splits * way.dsl.folds * (2.0 if way.dsl.learner == "forest" else 0.05)

    def open(self) -> Runner:
        from locum.bench.infer_runner import InferRunner

        return InferRunner(self.worlds, self.replications, self.jobs)

    def part(self, page: Page) -> Part:
        return infer_part(page)

    def kind(self, method: str) -> Kind:
        return way_of(method).kind

    def sound(self, row: Row) -> bool:
        return row["fidelity"].get("covers") is not False

    def remark(self) -> str:
        """Who is left out, and what is to be known of a table of one's own."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for group in self.groups:
            for method in self.chosen:
                if reason := self.left_out(way_of(method), group):
                    reasons.setdefault((group, reason), []).append(method)
        said = [f"Left out on {group}: {_listed(m)}, for {reason} only." for (group, reason), m in reasons.items()]
        if not has_peer():
            said.append("ppi-python is not installed, so it is not compared.")
        if self.data is not None:
            said.append(
                "The truth is what all gold labels of the table give. The methods' intervals are for the population that its rows are "
                "from, so here they may hold the truth more often than 95 % of the time."
            )
        return " ".join(said)

    def headline(self, overall: Sequence[Row], groups: Sequence[Row]) -> str:
        """Group by group: of the methods that cover the one that errs least, against gold labels alone; and who misses the truth."""
        said = []
        for group in self.groups:
            known = [r for r in groups if r["group"] == group and r["fidelity"]["covers"] is not None]
            if known:
                said.append(f"{group[0].upper()}{group[1:]}: {_verdict(known)}.")
        if not said:
            return "Nothing to say yet: no regression has been run."
        whole = self.seeds * self.replications
        how = "ranges are 95 % intervals, percentages how often the worst coefficient is covered"
        return "\n".join([*said, f"Over {whole} replications; {how}."])

    def told(self, row: Row) -> str:
        return f"{row['method']} on {row['group']}, replications {row['seed'] * self.replications + 1} and on"


def _verdict(rows: Sequence[Row]) -> str:
    """What a group's figures come to. A method that does not cover is never a candidate."""
    sound = [r for r in rows if r["fidelity"]["covers"]]
    missing = [f"{r['method']} ({100 * r['fidelity']['worst']:.0f} %)" for r in rows if not r["fidelity"]["covers"]]
    end = f"; the truth is missed by {_listed(missing)}" if missing else "; every method covers"
    rivals = [r for r in sound if r["method"] != BASELINE and r["ratios"]["vs_gold"] is not None]
    if not rivals:
        return ("none is there to compare with gold labels alone" if sound else "no method covers") + end
    best = min(rivals, key=lambda r: r["ratios"]["vs_gold"])
    value, limits = best["ratios"]["vs_gold"], best["ratios"]["vs_gold_interval"]
    shown = f"{value:.2f}×" + (f" ({limits[0]:.2f}–{limits[1]:.2f})" if limits else "")
    if not limits or limits[1] >= 1:
        return f"nothing that covers errs surely less than gold labels alone, the best being {best['method']} at {shown}{end}"
    near = [r["method"] for r in rivals if r is not best and r["ratios"]["vs_gold"] <= limits[1]]
    also = f", {_listed(near)} within that range" if near else ""
    return f"{best['method']} errs least{' of those that cover' if missing else ''}, {shown} the error of gold labels alone{also}{end}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
