"""``compare infer``: ways to run a regression on a model's labels; the promise, who covers, a user's table, the report, bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from locum.bench import infer_methods
from locum.bench.compare import Comparison, compare
from locum.bench.compare_infer import InferTask
from locum.bench.engines import Unit
from locum.bench.infer_measures import MEASURES, binomial, covers, drawn
from locum.bench.infer_methods import METHODS, has_peer, way_of
from locum.bench.infer_runner import InferRunner
from locum.bench.infer_worlds import DATA, REGIMES, errors_of
from locum.bench.measures import summary
from locum.cli import main
from locum.errors import MissingExtra, UserError
from locum.infer.dsl import DSL
from locum.infer.moments import Logistic

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # ppi-python is compiled for longer than all of this takes
from fake import NASTY
from reading import Reader, assert_self_contained

FIGURES = {
    "quality": {"bias", "width", "rmse"},
    "cost": {"gold_labels", "seconds", "fits"},
    "fidelity": {"covers", "coverage", "coverage_interval", "worst", "worst_interval", "labels_worth", "failed"},
    "ratios": {"vs_gold", "vs_gold_interval", "width_vs_gold"},
}
QUICK = "dsl(splits=1, folds=2)"
OWN = {"formula": "y ~ age + C(kind)", "predicted": ("y_llm",), "gold": "y", "gold_labels": 60}
peer = pytest.mark.skipif(not has_peer(), reason="ppi-python is not installed")


def promised(result, asked):
    found = json.loads(json.dumps(result.json()))
    assert set(found) == {"family", "task", "model", "rows"}
    assert found["family"] == "infer"
    assert [(r["method"], r["group"], r["seed"]) for r in found["rows"]] == asked
    for row in found["rows"]:
        assert set(row) == {"method", "group", "seed", *FIGURES}, row.get("error")
        for section, keys in FIGURES.items():
            assert set(row[section]) == keys
    return found["rows"]


# The figures, on replications whose answer is known.


def raw(estimate, se, truth=(0.0,), **more):
    names = [f"b{j}" for j in range(len(truth))]
    cost = {"seconds": 0.5, "gold_labels": 100.0, "fits": 5}
    return {"names": names, "truth": list(truth), "estimate": estimate, "se": se, **cost, **more}


def line(mine, gold=None, method="dsl"):
    return {"method": method, "raw": mine, "refs": {} if gold is None else {"gold": gold}}


def figures(*lines):
    found = summary(list(lines), MEASURES)
    return {key: value for section in found.values() for key, value in section.items()}


def test_errors_are_in_units_of_gold_labels_own():
    # Squared errors 1, 1 and 4, 4 against 4, 4 and 4, 4: ratios 1/4 and 1, their mean 5/8.
    mine = raw([[1.0, 2.0], [-1.0, -2.0]], [[1.0, 1.0]] * 2, (0.0, 0.0))
    gold = raw([[2.0, 2.0], [-2.0, 2.0]], [[2.0, 2.0]] * 2, (0.0, 0.0))
    found = figures(line(mine, gold))
    assert found["vs_gold"] == pytest.approx((5 / 8) ** 0.5)
    assert found["width_vs_gold"] == pytest.approx(0.5)
    assert found["rmse"] == pytest.approx(2.5**0.5)
    assert found["width"] == pytest.approx(2 * 1.959964, abs=1e-5)
    assert found["bias"] == 0


def test_bias_is_the_largest_by_the_standard_error_that_is_claimed():
    found = figures(line(raw([[1.0, -1.0], [1.0, -3.0]], [[2.0, 2.0], [2.0, 6.0]], (0.0, 0.0))))
    assert found["bias"] == pytest.approx(0.5)  # 1 / 2, and 2 / 4
    assert found["vs_gold"] is None


def test_a_gold_label_is_worth_the_ratio_of_variances():
    n = 40
    wide = [[2.0 * (-1) ** i] for i in range(n)]
    narrow = [[1.0 * (-1) ** i] for i in range(n)]
    found = figures(line(raw(narrow, [[1.0]] * n), raw(wide, [[2.0]] * n)))
    assert (found["labels_worth"], found["covers"]) == (4, True)
    too_sure = figures(line(raw(narrow, [[0.1]] * n), raw(wide, [[2.0]] * n)))
    assert (too_sure["labels_worth"], too_sure["covers"], too_sure["coverage"]) == (None, False, 0)


def test_coverage_counts_what_has_no_result_as_a_miss():
    made = raw([[0.1], [0.5], None, [3.0]], [[1.0], [1.0], None, [1.0]])
    found = figures(line(made, made))
    assert (found["coverage"], found["worst"], found["failed"]) == (0.5, 0.5, 0.25)
    low, high = found["coverage_interval"]
    assert (low, high) == pytest.approx((0.0676, 0.9324), abs=1e-4)  # 2 of 4, Clopper-Pearson
    assert found["rmse"] == pytest.approx(((0.01 + 0.25 + 9) / 3) ** 0.5)


def test_binomial_intervals_are_exact():
    from scipy.stats import binomtest

    for hits, n, level in ((0, 20, 0.95), (20, 20, 0.95), (186, 200, 0.95), (7, 30, 0.99)):
        there = binomtest(hits, n).proportion_ci(level, method="exact")
        assert binomial(hits, n, level) == pytest.approx((there.low, there.high))


@pytest.mark.parametrize(
    ("hits", "n", "enough"),
    [
        (19, 20, True),
        (15, 20, False),
        (180, 200, False),  # its interval ends at 93.8 %
        (186, 200, True),
        (9300, 10_000, True),  # the interval lies below 95 %, and 93 % is near enough
        (9200, 10_000, False),
    ],
)
def test_who_covers(hits, n, enough):
    made = raw([[0.0]] * hits + [[9.0]] * (n - hits), [[1.0]] * n)
    assert covers(drawn([made])).tolist() == [enough]


def test_intervals_are_of_replications_drawn_together():
    r = np.random.default_rng(0)
    both = r.normal(size=(50, 2))
    mine, gold = (
        raw((0.5 * both).tolist(), np.ones((50, 2)).tolist(), (0.0, 0.0)),
        raw(both.tolist(), np.ones((50, 2)).tolist(), (0.0, 0.0)),
    )
    found = figures(line(mine, gold))
    assert found["vs_gold_interval"] == pytest.approx([0.5, 0.5])
    assert figures(line(gold, gold, "gold"))["vs_gold_interval"] is None


def test_how_a_surrogate_errs():
    gold, said = np.array([0, 0, 1, 1, 1.0, 1]), np.array([0, 1.0, 1, 1, 0, 0])
    rows = errors_of(gold, said, {"one": np.ones(6), "half": np.array([0.0, 0, 0, 1, 1, 1])})
    assert [r["part"] for r in rows] == ["all rows", "half = 0", "half = 1"]
    assert rows[0] == {"part": "all rows", "share": 1, "gold": 4 / 6, "invented": 0.5, "missed": 0.5, "right": 0.5}
    assert (rows[2]["invented"], rows[2]["missed"], rows[2]["right"]) == (
        None,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    [number] = errors_of(np.array([1.0, 2, 3]), np.array([2.0, 3, 4]), {})
    assert (number["bias"], number["spread"], number["r"]) == (1, 0, pytest.approx(1))
    [classes] = errors_of(np.eye(3), np.eye(3)[[0, 1, 1]], {})
    assert classes["right"] == pytest.approx(2 / 3)


# On the simulations.


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    task = InferTask(
        methods=(
            QUICK,
            *(p for p in infer_methods.PEERS if has_peer()),
            "weighting",
            f"predictions{QUICK[3:]}",
            "naive",
        ),
        regimes=("differential", "unequal"),
        rows=600,
        gold_labels=120,
        replications=3,
        seeds=2,
        jobs=1,
    )
    return compare(task, name="s", runs=tmp_path_factory.mktemp("runs"))


def test_the_simulations_give_the_promised_rows(simulated):
    methods, (first, second) = simulated.task.chosen, simulated.task.groups
    peers = set(infer_methods.PEERS)
    asked = [(m, g, s) for m in methods for s in range(2) for g in (first, second) if g == first or m not in peers]
    asked.sort(key=lambda a: (methods.index(a[0]), a[2]))
    rows = promised(simulated, asked)
    for row in rows:
        assert 0.05 < row["quality"]["rmse"] < 2
        assert row["cost"]["seconds"] > 0
        assert row["cost"]["gold_labels"] == (0 if row["method"] == "naive" else pytest.approx(120, rel=0.4))
        assert row["cost"]["fits"] == (2 if "(" in row["method"] else 0)
    there = {r["method"]: r for r in simulated.by("method", "group") if r["group"] == first}
    assert there[QUICK]["fidelity"]["covers"] is there["gold"]["fidelity"]["covers"] is True
    naive = there["naive"]
    assert naive["fidelity"]["covers"] is False
    assert naive["fidelity"]["labels_worth"] is None


def test_methods_see_the_same_data_and_give_what_dsl_gives(simulated):
    world = simulated.task.worlds["differential errors"]
    problem = world.problem(1, 2)
    fit = DSL(moment=Logistic(), learner="generalized", splits=1, folds=2).estimate(problem)
    lines = {r["method"]: r["raw"] for r in simulated.lines if r["group"] == "differential errors" and r["seed"] == 1}
    there = {QUICK: fit.dsl, "gold": fit.baselines["gold only"], "naive": fit.baselines["surrogate only"]}
    there["weighting"] = fit.baselines["weighting only"]
    for method, estimates in there.items():
        assert lines[method]["estimate"][2] == pytest.approx(estimates.theta, rel=1e-5)
        assert lines[method]["se"][2] == pytest.approx(estimates.se, rel=1e-5)
    assert lines["gold"]["truth"] == pytest.approx(world.truth)
    assert {r["part"] for r in lines["gold"]["surrogate"]} >= {"all rows"}


@peer
def test_ppi_agrees_with_dsl_on_the_surrogate_as_it_is():
    world = InferTask(regimes=("good",)).worlds["good surrogate"]
    problem = world.problem(0, 0)
    [ppi] = way_of("ppi").estimate(problem, world.moment).values()
    tuned = way_of("ppi++").estimate(problem, world.moment)["ppi++"]
    plain = DSL(moment=Logistic(), learner="identity").estimate(problem).dsl
    # The same estimator but for labelled rows, which are not among the unlabelled there.
    assert np.abs((ppi.theta - plain.theta) / plain.se).max() < 0.75
    assert ppi.se == pytest.approx(plain.se, rel=0.25)
    assert (tuned.se < ppi.se * 1.05).all()


def test_predictions_alone_come_out_of_the_same_fits(monkeypatch):
    task = InferTask(regimes=("good",), rows=400, gold_labels=80, replications=2)
    runner, counted = InferRunner(task.worlds, 2, 1), []
    estimate = DSL.estimate
    monkeypatch.setattr(DSL, "estimate", lambda self, problem: counted.append(1) or estimate(self, problem))
    group = "good surrogate"
    for method in ("dsl(splits=1)", "dsl(folds=2, splits=1)", "predictions(splits=1)"):
        runner(Unit(method, 0, 0, group))
    assert len(counted) == 4
    again = InferRunner(task.worlds, 2, 1)(Unit("predictions(splits=1)", 0, 0, group))
    assert len(counted) == 6
    first = InferRunner(task.worlds, 2, 1)
    first(Unit("dsl(splits=1)", 0, 0, group))
    assert first(Unit("predictions(splits=1)", 0, 0, group))["estimate"] == again["estimate"]


def test_a_run_goes_on_where_it_was(simulated, tmp_path):
    for name in ("config.yaml", "results.jsonl"):
        (tmp_path / "s").mkdir(exist_ok=True)
        text = (simulated.folder / name).read_text("utf-8")
        kept = "".join(text.splitlines(keepends=True)[:-4]) if name == "results.jsonl" else text
        (tmp_path / "s" / name).write_text(kept, "utf-8")
    result = compare(simulated.task, name="s", resume=True, runs=tmp_path)
    for a, b in zip(result.lines, simulated.lines, strict=True):
        assert (a["method"], a["raw"]["estimate"], a["raw"]["se"]) == (
            b["method"],
            b["raw"]["estimate"],
            b["raw"]["se"],
        )


def test_the_terminal_s_table_fits(simulated):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(simulated.table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"naive +no +0\.0 %", text)
    assert re.search(r"gold +yes", text)


# The headline.


def verdict(*rows, group="good surrogate"):
    made = [
        {
            "method": m,
            "group": group,
            "fidelity": {"covers": sound, "worst": worst},
            "ratios": {"vs_gold": value, "vs_gold_interval": limits},
        }
        for m, sound, worst, value, limits in [("gold", True, 0.95, 1.0, None), *rows]
    ]
    return InferTask(regimes=("good",)).headline([], made)


def test_a_method_that_does_not_cover_is_never_praised():
    naive, dsl = ("naive", False, 0.12, 0.3, (0.2, 0.4)), ("dsl", True, 0.94, 0.7, (0.6, 0.8))
    said = verdict(naive, dsl)
    assert said.startswith(
        "Good surrogate: dsl errs least of those that cover, 0.70× (0.60–0.80) the error of gold labels alone;"
    )
    assert "the truth is missed by naive (12 %)" in said
    assert verdict(naive).startswith(
        "Good surrogate: none is there to compare with gold labels alone; the truth is missed by naive"
    )


def test_the_headline_is_honest():
    equal = ("dsl", True, 0.94, 0.99, (0.9, 1.02))
    said = verdict(equal)
    assert "nothing that covers errs surely less than gold labels alone, the best being dsl at 0.99×" in said
    assert "every method covers" in said
    near = verdict(
        ("dsl", True, 0.94, 0.7, (0.6, 0.8)),
        ("ppi++", True, 0.95, 0.75, (0.6, 0.9)),
        ("ppi", True, 0.95, 0.9, (0.8, 1)),
    )
    assert "dsl errs least, 0.70× (0.60–0.80) the error of gold labels alone, ppi++ within that range;" in near
    assert "Over 200 replications" in near
    assert InferTask().headline([], []).startswith("Nothing to say yet")


# A user's own table.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    r = np.random.default_rng(0)
    N = 500
    kind, age = np.array(["blog", "mail", "news"])[r.integers(3, size=N)], r.normal(size=N).round(3)
    y = (r.random(N) < 1 / (1 + np.exp(0.3 - age))).astype(float)
    said = np.where(r.random(N) < np.where(kind == "news", 0.4, 0.05), 1 - y, y)
    y[:20] = np.nan
    path = tmp_path_factory.mktemp("data") / "docs.csv"
    columns = {"y": y, "y_llm": said, "age": age, "kind": kind, "author": r.integers(50, size=N), "n": age + said}
    pd.DataFrame(columns | {"name": kind}).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def own(table, tmp_path_factory):
    task = InferTask(data=table, **OWN, methods=(QUICK, "naive"), replications=5, seeds=2, jobs=2)
    return compare(task, name="o", runs=tmp_path_factory.mktemp("runs"))


def test_a_table_s_truth_is_what_all_its_gold_labels_give(own, table):
    import statsmodels.formula.api as smf

    everything = smf.logit("y ~ age + C(kind)", pd.read_csv(table).dropna()).fit(disp=0).params
    rows = promised(own, [(m, DATA, s) for m in ("gold", QUICK, "naive") for s in range(2)])
    [first, *_] = [r["raw"] for r in own.lines]
    assert first["truth"] == pytest.approx(
        everything[["Intercept", "C(kind)[T.mail]", "C(kind)[T.news]", "age"]].tolist(), rel=1e-4
    ) or (sorted(first["truth"]) == pytest.approx(sorted(everything), rel=1e-4))
    assert {r["cost"]["gold_labels"] for r in rows if r["method"] != "naive"} == {60}
    assert own.task.config()["data"]["rows"] == 480
    assert {r["part"] for r in first["surrogate"]} >= {"all rows", "C(kind)[T.news] = 1"}
    naive = [r["raw"] for r in own.lines if r["method"] == "naive"]
    assert len({tuple(e) for r in naive for e in r["estimate"]}) == 1  # it sees no gold label
    assert "The truth is what all gold labels of the table give" in own.report.read_text("utf-8")


def test_a_linear_regression_by_clusters_leaves_the_peers_out(table):
    task = InferTask(
        data=table,
        formula="n ~ age",
        predicted=("y_llm",),
        gold="n",
        cluster="author",
        features=("kind",),
        gold_labels=60,
    )
    assert type(task.worlds[DATA].moment).__name__ == "Linear"
    assert {u.method for u in task.units()} == {"gold", "dsl", "weighting", "predictions", "naive"}
    assert not has_peer() or "Left out on data: ppi and ppi++, for independent rows only." in task.remark()


def test_a_gold_label_may_be_an_explanatory_variable(table):
    task = InferTask(data=table, formula="age ~ y", predicted=("y_llm",), gold="y", gold_labels=60)
    assert type(task.worlds[DATA].moment).__name__ == "Linear"
    assert {u.method for u in task.units()} == {"gold", "dsl", "predictions", "naive"}
    problem = task.worlds[DATA].problem(0, 0)
    fit = DSL(learner="identity").estimate(problem)
    assert np.abs((fit.dsl.theta - task.worlds[DATA].truth) / fit.dsl.se).max() < 4
    assert task.worlds[DATA].surrogate(0) == []


# The report.


def test_the_report_shows_intervals_and_marks_nobody_who_misses(simulated):
    page = simulated.report.read_text("utf-8")
    assert_self_contained(page)
    data = json.loads(Reader(page).data["script application/json"])
    assert [g["name"] for g in data["groups"]] == ["differential errors", "unequal probabilities"]
    [naive] = [m for m in data["groups"][0]["methods"] if m["name"] == "naive"]
    assert [len(e) for e in naive["error"]] == [6] * 3
    assert naive["of"] == 6
    headings = set(re.findall(r"<h2>([^<]*)</h2>", page))
    assert {"Do the intervals hold the truth?", "Interval by interval", "How the surrogate errs"} <= headings
    rows = re.findall(r'<tr class="plain unsound"><th scope="row" title="[^"]*">naive</th>.*?</tr>', page)
    assert rows
    assert not any('class="best"' in row for row in rows)
    assert "plain misses" in page
    assert not has_peer() or "Left out on unequal probabilities: ppi and ppi++, for equal probabilities only." in page


def test_nothing_of_a_text_becomes_markup(own, tmp_path):
    rows = json.loads(json.dumps(own.rows))
    for row in rows:
        row["raw"]["settings"] = NASTY
        row["raw"]["names"] = [NASTY, *row["raw"]["names"][1:]]
        row["environment"]["machine"] = NASTY
        for part in row["raw"].get("surrogate", ()):
            part["part"] = NASTY
    rows[1] = {k: v for k, v in rows[1].items() if k != "raw"} | {"error": NASTY}
    page = Comparison(own.task, tmp_path, rows).html()
    assert_self_contained(page)
    assert json.loads(Reader(page).data["script application/json"])["groups"][0]["coefficients"][0] == NASTY


def test_a_run_with_nothing_in_it_still_has_a_report(simulated, tmp_path):
    page = Comparison(simulated.task, tmp_path, []).html()
    assert_self_contained(page)
    assert "Nothing to say yet" in page


def test_a_method_without_any_result_is_a_row_with_the_reason(own, monkeypatch, tmp_path):
    from locum.infer.equations import ConvergenceError

    def never(*args):
        raise ConvergenceError("no root")

    monkeypatch.setattr(DSL, "estimate", never)
    task = InferTask(data=own.task.data, **OWN, methods=("dsl",), replications=2, seeds=1, jobs=1)
    result = compare(task, name="f", runs=tmp_path)
    [failed] = [r for r in result.rows if "error" in r]
    assert failed["error"] == "UserError: none of 2 regressions has a result: no root"
    assert "What failed" in result.report.read_text("utf-8")


# What a user asks for.


def test_the_task_is_cheap_to_make_and_needs_no_torch():
    code = (
        "import sys; from locum.bench.compare_infer import InferTask as T; T(); "
        "assert not {'torch', 'pandas', 'sklearn', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_compared():
    usual = InferTask()
    assert usual.groups == tuple(REGIMES)
    assert usual.chosen == tuple(m for m in METHODS if has_peer() or m not in infer_methods.PEERS)
    assert json.loads(json.dumps(usual.config())) == usual.config()
    assert InferTask(methods=("naive", " dsl( folds=3 )", "gold", "naive")).chosen == (
        "gold",
        "naive",
        "dsl( folds=3 )",
    )
    assert InferTask(regimes=("good", "Useless surrogate", "good")).groups == ("good surrogate", "useless surrogate")
    learner = way_of("dsl(learner=forest, folds=3)").dsl
    assert (learner.learner, learner.folds, learner.splits) == ("forest", 3, DSL().splits)
    assert way_of("dsl").dsl.learner == "generalized"


def test_without_ppi_python_it_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr("locum.bench.compare_infer.has_peer", lambda: False)
    monkeypatch.setattr(infer_methods, "has_peer", lambda: False)
    task = InferTask()
    assert task.chosen == ("gold", "dsl", "weighting", "predictions", "naive")
    assert "ppi-python is not installed" in task.remark()
    with pytest.raises(MissingExtra, match=re.escape("the method ppi++ needs the extra 'peers'")):
        InferTask(methods=("ppi++",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("dls",)}, "unknown method of infer 'dls': did you mean 'dsl'"),
        ({"methods": ("dsl(learner=tree)",)}, "unknown learner 'tree'"),
        ({"methods": ("dsl(folds=1)",)}, "DSL.folds must be >= 2, got 1"),
        ({"methods": ("dsl(fold=3)",)}, "unknown field of DSL 'fold': did you mean 'folds'"),
        ({"methods": ("dsl(moment=linear)",)}, "unknown setting of dsl in a comparison 'moment'"),
        ({"methods": ("dsl(3)",)}, "write the settings of dsl by name"),
        ({"methods": ("dsl(folds=len(x))",)}, "cannot read the settings of 'dsl(folds=len(x))'"),
        ({"methods": ("dsl(folds=200)",)}, "dsl(folds=200) needs 400 gold labels or more, got 300"),
        ({"methods": ("naive(folds=3)",)}, "the method naive has no settings"),
        ({"regimes": ("better",)}, "unknown regime 'better'"),
        ({"gold_labels": 5}, "gold_labels must be >= 20, got 5"),
        ({"rows": 500}, "rows must be more than twice gold_labels (300), got 500"),
        ({"replications": 1}, "replications must be from 2 to 10000, got 1"),
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
        ({"formula": "y ~ x"}, "--formula is for a table of your own: give --data too"),
        ({"data": "a.csv", "regimes": ("good",)}, "give --data or --regimes, not both"),
        ({"data": "a.csv", "gold": "y", "formula": "y ~ x"}, "say --predicted of the table a.csv"),
        ({"data": "absent.csv", **OWN}, "absent.csv cannot be read"),
    ],
)
def test_bad_input_is_refused_when_the_task_is_made(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        InferTask(**settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gold": "z"}, "unknown column 'z'"),
        ({"predicted": ("q",)}, "unknown column 'q'"),
        ({"formula": "y ~ agee"}, "unknown column 'agee': did you mean 'age'"),
        ({"formula": "age ~ kind"}, "does not use the predicted variable y"),
        (
            {"gold_labels": 480},
            "must be more than 4, the coefficients, and less than 480, the rows that have one, got 480",
        ),
        ({"gold": "name", "formula": "name ~ age", "moment": "logistic"}, "the outcome name must be a number"),
        ({"methods": ("ppi",), "cluster": "author"}, "it takes independent rows only"),
        ({"features": ("nope",)}, "unknown column 'nope'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_when_the_task_is_made(table, changed, message):
    if changed.get("methods") == ("ppi",) and not has_peer():
        pytest.skip("ppi-python is not installed")
    with pytest.raises(UserError, match=re.escape(message)):
        InferTask(**{"data": table, **OWN, **changed})


def test_the_command_line(capsys, tmp_path):
    args = ["--methods", f"{QUICK};naive", "--regimes", "good", "--rows", "400", "--gold-labels", "80", "--seeds", "1"]
    assert (
        main(["compare", "infer", *args, "--replications", "2", "--jobs", "1", "--json", "--runs", str(tmp_path)]) == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["method"] for r in rows] == ["gold", QUICK, "naive"]
    for bad, said in ((["--seeds", "0"], "seeds must be"), (["--methods", "dls"], "dls")):
        assert main(["compare", "infer", *bad]) == 2
        err = capsys.readouterr().err
        assert err.startswith("locum: ")
        assert said in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "infer", "--help"])
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {
        "--methods",
        "--regimes",
        "--data",
        "--formula",
        "--predicted",
        "--gold",
        "--gold-labels",
        "--cluster",
    } <= words
