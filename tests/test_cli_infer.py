"""`locum infer`: from a file of documents to a table that people can read, and one sentence for each mistake."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from locum.cli import main
from locum.infer import DSL

SPEECHES = Path(__file__).parent / "examples" / "speeches.csv"
FAST = ("--learner", "generalized", "--splits", "2", "--folds", "2")
MODEL = ("--formula", "y ~ x", "--gold", "y", "--predicted", "y_llm", "--prob", "p", *FAST)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def run(capsys, *args):
    code = main(["infer", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def strict(text):
    """JSON that has no NaN in it."""
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def dsl(capsys, *more, data=SPEECHES, model=MODEL):
    """The JSON document of a fit."""
    code, out, err = run(capsys, "dsl", "--data", data, *model, *more, "--json")
    assert code == 0, err
    return strict(out)


def test_help_says_what_the_methods_are(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["infer", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"  {method} " in said for method in ("dsl", "plan", "progvi"))


@pytest.mark.parametrize("method", ["dsl", "plan", "progvi"])
def test_help_of_a_method_brings_nothing_heavy(method):
    import subprocess

    code = f"import sys\nfrom locum.cli import main\ntry:\n    main(['infer', '{method}', '--help'])\nexcept SystemExit:\n    pass\n"
    code += "print('MODULES', *{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, loaded = done.stdout.split("MODULES")
    assert "--out" in said
    assert not {"torch", "numpy", "pandas", "scipy", "sklearn", "jax"} & set(loaded.split())


@pytest.fixture(scope="module")
def plain():
    """What `DSL` says itself."""
    return (
        DSL(learner="generalized", splits=2, folds=2)
        .fit(SPEECHES, "y ~ x", predicted={"y": "y_llm"}, prob="p")
        .to_dict()
    )


class TestDsl:
    def test_what_people_see(self, capsys):
        code, out, err = run(capsys, "dsl", "--data", SPEECHES, *MODEL)
        assert code == 0
        assert "dsl: 2/2" in err
        for text in (
            "Gold labels:",
            "Covariance Type:",
            "std err",
            "surrogate only",
            "gold only",
            "would not halve any",
            "The intervals hold",
        ):
            assert text in out
        assert max(map(len, out.splitlines())) <= 100
        lines = out.splitlines()
        rules = {len(line) for line in lines if set(line) in ({"="}, {"-"})}
        assert rules == {78}

    def test_the_json_document(self, capsys, plain):
        made = dsl(capsys)
        assert made["params"] == pytest.approx(plain["params"], abs=1e-12)
        assert made["bse"] == pytest.approx(plain["bse"], abs=1e-12)
        assert list(made) == [
            "model", "names", "params", "bse", "pvalues", "conf_int", "alpha", "cov_params", "nobs", "ngold",
            "baselines", "check", "notes", "seconds", "power",
        ]  # fmt: skip
        assert made["names"] == ["Intercept", "x"]
        assert list(made["power"]) == ["bse", "labels_to_halve"]
        assert [list(row) for row in made["power"]["bse"]] == [["labels", "bse"]] * len(made["power"]["bse"])
        assert list(made["power"]["labels_to_halve"]) == ["Intercept", "x"]
        assert set(made["baselines"]) == {"surrogate only", "gold only", "predictions only", "weighting only"}

    def test_defaults_are_those_of_the_class(self):
        from locum.cli.infer_dsl import Dsl

        ours, theirs = Dsl(Path("a.csv"), "y ~ x", ("y",), ("q",)), DSL()
        for name in ("learner", "folds", "splits", "alpha", "normalize_prob", "seed"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.model == theirs.moment

    @pytest.mark.parametrize(
        "more",
        [
            ["--model", "logistic"],
            ["--model", "poisson"],
            ["--learner", "identity"],
            ["--folds", "4"],
            ["--splits", "3"],
            ["--seed", "1"],
            ["--alpha", "0.2"],
            ["--normalize-prob"],
            ["--prob", "0.3"],
            ["--prob", "estimate"],
            ["--features", "author", "party"],
            ["--cluster", "author"],
            ["--fixed-effects", "party", "country"],
            ["--predicted", "y_llm+y_llm2"],
        ],
        ids=" ".join,
    )
    def test_every_flag_changes_the_figures(self, more, capsys, plain):
        after = dsl(capsys, *more)
        ends = [np.ravel(list(made["conf_int"].values())).tolist() for made in (after, plain)]
        assert ends[0] != pytest.approx(ends[1])

    def test_a_column_named_with_a_plus_is_one_surrogate(self, capsys, plain):
        pd.read_csv(SPEECHES).rename(columns={"y_llm": "a+b"}).to_csv("plus.csv", index=False)
        assert dsl(capsys, "--predicted", "a+b", data="plus.csv")["params"] == pytest.approx(plain["params"])

    def test_the_mark_of_drawn_rows_is_read(self, capsys, plain):
        assert dsl(capsys, "--labelled", "drawn")["params"] == pytest.approx(plain["params"])
        table = pd.read_csv(SPEECHES)
        table.assign(drawn=1).to_csv("all.csv", index=False)
        code, _, err = run(capsys, "dsl", "--data", "all.csv", *MODEL, "--labelled", "drawn")
        assert code == 2
        assert "were sampled for a gold label and have none in y" in err

    def test_several_predicted_variables(self, capsys):
        model = ("--formula", "y ~ x + z", "--gold", "z", "y", "--predicted", "z_llm", "y_llm", "--prob", "p", *FAST)
        made = dsl(capsys, model=model)
        assert made["names"] == ["Intercept", "x", "z"]
        assert {"explained y", "explained z"} <= set(made["check"]["figures"])
        result = DSL(learner="generalized", splits=2, folds=2).fit(
            SPEECHES, "y ~ x + z", predicted={"y": "y_llm", "z": "z_llm"}, prob="p"
        )
        assert made["params"] == pytest.approx(dict(result.params), abs=1e-6)

    def test_classes(self, capsys):
        model = ("--formula", "kind ~ x", "--gold", "kind", "--predicted", "kind_llm", "--model", "multinomial", *FAST)
        made = dsl(capsys, "--predict", SPEECHES, "--predict-out", "means.csv", model=model)
        assert made["names"] == ["other: Intercept", "other: x", "praise: Intercept", "praise: x"]
        means = pd.read_csv("means.csv")
        assert means[["blame", "other", "praise"]].sum(axis=1).to_numpy() == pytest.approx(1)

    @pytest.mark.parametrize("suffix", [".tsv", ".parquet", ".jsonl"])
    def test_files_of_each_format(self, suffix, capsys, plain):
        table, path = pd.read_csv(SPEECHES), f"speeches{suffix}"
        if suffix == ".tsv":
            table.to_csv(path, sep="\t", index=False)
        elif suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.to_json(path, orient="records", lines=True)
        assert dsl(capsys, data=path)["params"] == pytest.approx(plain["params"], abs=1e-9)

    def test_power(self, capsys):
        made = dsl(capsys, "--power", "60", "240", "400")
        rows = made["power"]["bse"]
        assert [row["labels"] for row in rows] == [60, 240, 400]
        assert rows[0]["bse"]["x"] > rows[1]["bse"]["x"] > rows[2]["bse"]["x"]
        _, out, _ = run(capsys, "dsl", "--data", SPEECHES, *MODEL, "--power", "60", "240")
        [line] = [line for line in out.splitlines() if line.startswith("gold labels ")]
        assert line.split() == ["gold", "labels", "60", "240"]
        assert "halve" not in out

    def test_how_many_labels_would_halve_the_errors(self, capsys):
        table = pd.read_csv(SPEECHES)
        table["y"] = table["truth"].where(table.index % 8 == 0)
        table.to_csv("few.csv", index=False)
        model = [m for m in MODEL if m not in ("--prob", "p")]
        _, out, _ = run(capsys, "dsl", "--data", "few.csv", *model)
        needed = dsl(capsys, data="few.csv", model=model)["power"]["labels_to_halve"].values()
        assert f"To halve every standard error would take about {max(needed)} gold labels in all, instead of 50." in out

    def test_files_that_are_written(self, capsys):
        pd.DataFrame({"x": [0.0, 1.0, None], "id": ["007", "008", "009"]}).to_csv("new.csv", index=False)
        files = (
            "--out",
            "kept/result.json",
            "--latex",
            "table.tex",
            "--predict",
            "new.csv",
            "--predict-out",
            "out.csv",
        )
        made = dsl(capsys, *files)
        kept = strict(Path("kept/result.json").read_text("utf-8"))
        assert {k: v for k, v in kept.items() if k != "seconds"} == {k: v for k, v in made.items() if k != "seconds"}
        tex = Path("table.tex").read_text("utf-8")
        assert tex.startswith("\\begin{center}")
        assert tex.endswith("\\end{center}\n")
        assert tex.count("\\begin{tabular}") == 3
        out = pd.read_csv("out.csv", dtype={"id": str})
        assert list(out) == ["x", "id", "mean", "lower", "upper"]
        assert list(out["id"]) == ["007", "008", "009"]
        assert out["mean"][1] - out["mean"][0] == pytest.approx(made["params"]["x"])
        assert (out["lower"] < out["mean"])[:2].all()
        assert out["mean"].isna().tolist() == [False, False, True]
        _, said, _ = run(capsys, "dsl", "--data", SPEECHES, *MODEL, *files)
        assert said.splitlines()[-1] == "written: kept/result.json, table.tex, out.csv"

    def test_splits_are_shared_among_workers(self, capsys, monkeypatch, plain):
        import joblib

        made, parallel = [], joblib.Parallel
        monkeypatch.setattr(joblib, "Parallel", lambda jobs, **more: made.append(jobs) or parallel(jobs, **more))
        with joblib.parallel_config(backend="threading"):  # processes take seconds to start
            shared = dsl(capsys, "--jobs", "2")
        assert made == [2]
        assert shared["params"] == pytest.approx(plain["params"], abs=1e-12)

    def test_labels_that_were_at_hand_are_found_out(self, capsys):
        table = pd.read_csv(SPEECHES)
        easy = table["x"] > 0.3
        table.assign(y=table["truth"].where(easy)).to_csv("easy.csv", index=False)
        code, out, _ = run(capsys, "dsl", "--data", "easy.csv", *MODEL, "--prob", easy.mean())
        assert code == 0
        assert "Do not rely on these intervals" in out

    def test_warnings_are_a_line_on_stderr(self, capsys):
        code, out, err = run(capsys, "dsl", "--data", SPEECHES, *MODEL, "--prob", "0.9", "--json")
        assert code == 0
        strict(out)
        [said] = [line for line in err.splitlines() if "were to be expected" in line]
        assert said.startswith("locum: ")
        assert "Warning" not in err

    @pytest.mark.parametrize("prob", [None, "estimate"])
    def test_what_the_intervals_rest_on_is_said(self, prob, capsys):
        model = [m for m in MODEL if m not in ("--prob", "p")]
        _, out, _ = run(capsys, "dsl", "--data", SPEECHES, *model, *(["--prob", prob] if prob else []))
        assert ("if the estimated probabilities are right" if prob else "if all documents were as likely") in out


BAD = [
    (["--prob", "pp"], "unknown column 'pp': did you mean 'p'?"),
    (["--prob", "1.5"], "sampling probabilities must be in (0, 1]"),
    (["--prob", "nan"], "sampling probabilities must be in (0, 1]"),
    (["--predicted", "y_lm"], "unknown column 'y_lm': did you mean 'y_llm'?"),
    (["--predicted", "y_llm+nothing"], "unknown column 'nothing'"),
    (["--predicted", "y_llm", "y_llm2"], "--gold and --predicted go in pairs"),
    (["--gold", "y", "y", "--predicted", "y_llm", "y_llm"], "each gold column once"),
    (["--gold", "z", "--predicted", "z_llm"], "does not use the predicted variable z"),
    (["--formula", "y ~ x +"], "the formula 'y ~ x +'"),
    (["--formula", "y"], "must be 'outcome ~ columns'"),
    (["--formula", "y ~ nothing"], "unknown column 'nothing'"),
    (["--model", "logit"], "logit"),
    (["--learner", "tree"], "tree"),
    (["--folds", "1"], "DSL.folds must be >= 2, got 1"),
    (["--splits", "0"], "DSL.splits must be >= 1, got 0"),
    (["--alpha", "1"], "DSL.alpha must be in (0, 1), got 1"),
    (["--jobs", "0"], "jobs must be >= 1, got 0"),
    (["--seed", "-1"], "seed must be >= 0, got -1"),
    (["--power", "0"], "--power takes numbers of gold labels from 1 to 400"),
    (["--power", "401"], "got 401"),
    (["--fixed-effects", "party", "--model", "logistic"], "fixed effects are for a linear regression"),
    (["--cluster", "nobody"], "unknown column 'nobody'"),
    (["--data", "none.csv"], "none.csv cannot be read"),
    (["--data", "none.xlsx"], "must be a .csv, .tsv, .parquet, .jsonl file"),
    (["--predict", "new.csv"], "--predict FILE and --predict-out FILE go together"),
    (["--predict", "new.csv", "--predict-out", "out.csv"], "new.csv cannot be read"),
    (["--predict", str(SPEECHES), "--predict-out", "out.xls"], "out.xls must be a"),
    (["--out", str(SPEECHES)], "would be written over"),
    (["--sead", "1"], "--sead"),
]


@pytest.mark.parametrize(("more", "said"), BAD, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_mistake_is_one_sentence(more, said, capsys):
    code, out, err = run(capsys, "dsl", "--data", SPEECHES, *MODEL, *more)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("locum: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "say which method of infer: dsl, plan, progvi"),
        (["dls"], "unknown method of infer 'dls': did you mean 'dsl'?"),
        (["dsl"], "--data"),
        (["plan"], "--data"),
    ],
)
def test_a_mistake_before_any_method(args, said, capsys):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


class TestPlan:
    def test_from_a_plan_to_an_estimate(self, capsys):
        """The expert fills in a column of the rows that were drawn; the estimate then meets the one from all labels."""
        code, out, err = run(
            capsys, "plan", "--data", SPEECHES, "--labels", "150", "--strata", "party", "--out", "todo.csv"
        )
        assert code == 0, err
        assert "150 of 400 documents to label" in out
        planned = pd.read_csv("todo.csv")
        assert planned["labelled"].sum() == 150
        expert = planned["truth"].where(planned["labelled"] == 1)
        planned.drop(columns=["y", "truth"]).assign(expert=expert).to_csv("done.csv", index=False)
        model = (
            "--formula",
            "expert ~ x",
            "--gold",
            "expert",
            "--predicted",
            "y_llm",
            "--prob",
            "prob",
            "--labelled",
            "labelled",
        )
        made = dsl(capsys, data="done.csv", model=(*model, *FAST))
        assert made["check"]["passed"]
        assert made["ngold"] == 150
        X = np.column_stack([np.ones(400), planned["x"]])
        all_labels = np.linalg.lstsq(X, planned["truth"], rcond=None)[0]
        assert abs(made["params"]["x"] - all_labels[1]) < 3 * made["bse"]["x"]

    def test_the_json_document(self, capsys):
        code, out, _ = run(
            capsys,
            "plan",
            "--data",
            SPEECHES,
            "--labels",
            "90",
            "--out",
            "a.csv",
            "--strata",
            "party",
            "--equal",
            "--json",
        )
        made = strict(out)
        assert code == 0
        assert list(made) == ["out", "documents", "labels", "least_prob", "greatest_prob", "strata"]
        assert [(s["stratum"], s["labels"]) for s in made["strata"]] == [("centre", 30), ("left", 30), ("right", 30)]
        assert list(made["strata"][0]) == ["stratum", "documents", "labels", "least_prob", "greatest_prob"]
        planned = pd.read_csv("a.csv")
        assert made["least_prob"] == pytest.approx(planned["prob"].min())
        assert made["greatest_prob"] == pytest.approx(planned["prob"].max())

    def test_documents_without_a_stratum_are_one(self, capsys):
        pd.DataFrame({"party": ["a", "a", None, None]}).to_csv("gaps.csv", index=False)
        _, out, _ = run(
            capsys, "plan", "--data", "gaps.csv", "--labels", "2", "--strata", "party", "--out", "a.csv", "--json"
        )
        assert [(s["stratum"], s["labels"]) for s in strict(out)["strata"]] == [("a", 1), ("missing", 1)]

    def test_in_proportion_to_a_size(self, capsys):
        made = {}
        for name, more in {"floored": ["--floor", "1"], "free": [], "seeded": ["--seed", "1"]}.items():
            code, out, _ = run(
                capsys, "plan", "--data", SPEECHES, "--labels", "40", "--size", "unsure", "--out", f"{name}.csv", *more
            )
            assert code == 0
            made[name] = pd.read_csv(f"{name}.csv")
            assert made[name]["labelled"].sum() == 40
            assert ("probability 0.1:" in out) == (name == "floored")
        assert made["free"]["prob"].corr(made["free"]["unsure"]) == pytest.approx(1)
        assert (made["free"]["prob"] == made["seeded"]["prob"]).all()
        assert (made["free"]["labelled"] != made["seeded"]["labelled"]).any()

    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
    def test_the_table_is_kept_as_it_is(self, suffix, capsys):
        assert run(capsys, "plan", "--data", SPEECHES, "--labels", "50", "--out", f"a{suffix}")[0] == 0
        again = ("plan", "--data", f"a{suffix}", "--labels", "20", "--out", f"b{suffix}")
        assert "has a column prob already" in run(capsys, *again)[2]
        read = {
            ".csv": lambda p: pd.read_csv(p, dtype=str, keep_default_na=False),
            ".tsv": lambda p: pd.read_csv(p, dtype=str, keep_default_na=False, sep="\t"),
            ".jsonl": lambda p: pd.read_json(p, lines=True),
            ".parquet": pd.read_parquet,
        }[suffix]
        made, source = read(f"a{suffix}"), pd.read_csv(SPEECHES, dtype=str, keep_default_na=False)
        assert list(made) == [*source, "prob", "labelled"]
        if suffix in (".csv", ".tsv"):  # 007 stays 007, and the country NA is not a gap
            pd.testing.assert_frame_equal(made[list(source)], source)
        assert made["labelled"].astype(int).sum() == 50
        assert made["x"].astype(float).tolist() == pytest.approx(source["x"].astype(float).tolist())

    def test_lines_of_json_keep_what_they_hold(self, capsys):
        rows = [{"id": f"{i:03d}", "when": "2024-05-01", "tags": ["a", i]} for i in range(10)]
        Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        assert run(capsys, "plan", "--data", "in.jsonl", "--labels", "4", "--out", "out.jsonl")[0] == 0
        made = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
        assert [{k: v for k, v in row.items() if k not in ("prob", "labelled")} for row in made] == rows
        assert all(row["prob"] == 0.4 for row in made)

    def test_a_file_is_not_written_over(self, capsys):
        plan = ("plan", "--data", SPEECHES, "--labels", "50", "--out", "a.csv")
        assert run(capsys, *plan)[0] == 0
        before = Path("a.csv").read_text("utf-8")
        code, out, err = run(capsys, *plan, "--seed", "1")
        assert (code, out) == (2, "")
        assert "a.csv is there already" in err
        assert Path("a.csv").read_text("utf-8") == before
        assert run(capsys, *plan, "--seed", "1", "--force")[0] == 0
        assert Path("a.csv").read_text("utf-8") != before

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--labels", "0"], "labels must be >= 1, got 0"),
            (["--labels", "401"], "from 1 to 400"),
            (["--strata", "paty"], "unknown column 'paty': did you mean 'party'?"),
            (["--strata", "party", "--size", "unsure"], "not both"),
            (["--equal"], "strata"),
            (["--size", "party"], "must hold numbers"),
            (["--floor", "0"], "floor must be in (0, 1], got 0"),
            (["--seed", "-1"], "seed must be >= 0, got -1"),
            (["--out", "a.xls"], "a.xls must be a"),
            (["--data", "no.csv"], "no.csv cannot be read"),
        ],
        ids=lambda x: x if isinstance(x, str) else " ".join(x),
    )
    def test_a_mistake_is_one_sentence(self, more, said, capsys):
        code, out, err = run(capsys, "plan", "--data", SPEECHES, "--labels", "50", "--out", "a.csv", *more)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1
        assert not Path("a.csv").exists()


@pytest.mark.parametrize("package", ["pandas", "formulaic", "sklearn", "statsmodels"])
def test_without_the_extra_one_sentence_names_it(package, capsys, monkeypatch):
    for name in [m for m in sys.modules if m.startswith("locum.infer.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run(capsys, "dsl", "--data", SPEECHES, *MODEL)
    assert (code, out) == (2, "")
    assert "needs the extra 'infer': pip install 'locum[infer]'" in err
    assert err.count("\n") == 1


CONE = Path(__file__).parent / "examples" / "cone.py"
NORMAL = """
import jax.numpy as jnp
from locum.infer import vi


def model(sample, params, *args):
    sample("x", vi.normal(sample("z", vi.normal(0.0, 1.0)), 1.0))


def guide(sample, params, *args):
    sample("z", vi.normal_reparam(params["m"], jnp.exp(params["s"])))


params = {"m": 0.5, "s": -0.3}
data = {"x": 2.0}
"""
QUICK = ("--steps", "40", "--samples", "8", "--learning-rate", "0.05")


@pytest.fixture
def normal():
    Path("normal.py").write_text(NORMAL)
    return ("progvi", "--program", "normal.py", *QUICK)


class TestProgvi:
    def test_what_people_see_and_what_is_kept(self, capsys, monkeypatch):
        from locum.infer import vi

        own, other = (
            {"gradient_sd": 2.0, "value_sd": 1.0, "value": -9.0},
            {"gradient_sd": 30.0, "value_sd": 1.0, "value": -9.0},
        )
        known = {"as written": own, "Reinforce at every site": other, "at the start": {"value": -1308.0, "error": 7.5}}
        monkeypatch.setattr(vi.VIResult, "baselines", lambda self: known)  # they compile for seconds
        code, out, err = run(
            capsys, "progvi", "--program", CONE, *QUICK, "--optimizer", "adam", "--baselines", "--out", "kept.json"
        )
        assert code == 0
        assert "fit ELBO: 40/40" in err
        for text in (
            "params['mean']    3  0",
            "ELBO at the start: -1308 (standard error 7.5)",
            "ELBO: -",
            "standard deviation of one draw's gradient: 2, with REINFORCE at every site 30",
            "The gradient agrees with finite differences",
            "40 steps of 8 samples in",
            " ms per step",
            "written: kept.json",
        ):
            assert text in out
        assert max(map(len, out.splitlines())) <= 100
        made = strict(Path("kept.json").read_text("utf-8"))
        keys = ["method", "params", "objective", "error", "trace", "interrupted", "cost", "check", "baselines"]
        assert list(made) == keys
        assert list(made["cost"]) == ["seconds", "steps", "samples", "ms_per_step"]
        assert made["baselines"] == known
        assert made["method"] == {
            "method": "infer.progvi",
            "objective": {"method": "locum.infer.objectives.ELBO", "stick_the_landing": False},
            "steps": 40,
            "samples": 8,
            "optimizer": "adam",
            "learning_rate": 0.05,
            "seed": 0,
        }
        assert list(made["params"]) == ["params['log_sd']", "params['mean']"]
        assert len(made["trace"]) == 40
        assert -1308 < made["objective"] < -5.32323  # log p(z = 5)
        assert made["check"]["passed"]
        assert not made["interrupted"]

    def test_a_stopped_run_goes_on_where_it_was(self, normal, capsys, monkeypatch, tmp_path):
        from locum.infer import vi_fit
        from locum.infer.base import Check

        # What is not looked at here compiles longer than all else takes.
        monkeypatch.setattr(vi_fit.VIResult, "check", lambda self: Check(True, "not looked at"))
        monkeypatch.setattr(vi_fit.VIResult, "value", lambda self: (float("nan"), 0.0))
        advance, calls = vi_fit._advance, []

        def twice(*args):
            calls.append(args)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return advance(*args)

        with monkeypatch.context() as patch:
            patch.setattr(vi_fit, "_advance", twice)
            code, out, err = run(capsys, *normal, "--checkpoint", "kept")
        assert code == 130
        assert "10 steps of 8 samples" in out
        assert "locum: stopped after 10 of 40 steps: --resume goes on" in err
        assert Path("kept/progvi.safetensors").exists()

        code, out, err = run(capsys, *normal, "--checkpoint", "kept")
        assert (code, out) == (2, "")
        assert "is there already: --resume goes on from it" in err
        assert (
            "of a fit with seed 0, not 1" in run(capsys, *normal, "--checkpoint", "kept", "--resume", "--seed", "1")[2]
        )

        resumed = strict(run(capsys, *normal, "--checkpoint", "kept", "--resume", "--json")[1])
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "normal", raising=False)
        whole = strict(run(capsys, *("normal" if a == "normal.py" else a for a in normal), "--json")[1])
        assert resumed["params"] == whole["params"]
        assert resumed["trace"] == whole["trace"]
        assert whole["params"]["params['m']"] == pytest.approx(1.0, abs=0.3)  # the posterior's mean
        assert list(whole)[-1] == "check"
        assert whole["objective"] is None  # JSON has no nan

    @pytest.mark.parametrize(
        ("given", "made"),
        [
            ({}, "ELBO()"),
            ({"objective": "elbo(stick_the_landing=True)"}, "ELBO(stick_the_landing=True)"),
            ({"objective": "IWELBO", "particles": 2}, "IWELBO(particles=2)"),
            ({"objective": "renyi(alpha=0.3)", "per_datum": True}, "PerDatum(Renyi(alpha=0.3, particles=5))"),
            ({"objective": "waketheta(particles=3)"}, "WakeTheta(particles=3)"),
            ({"objective": "wakephi"}, "WakePhi()"),
            ({"objective": "sleep"}, "Sleep()"),
        ],
    )
    def test_objectives(self, given, made):
        from locum.cli.infer_progvi import Progvi
        from locum.infer import vi

        assert Progvi("normal.py", **given)._objective() == eval(made, vars(vi))

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--program", "no.py"], "file 'no.py' of the program does not exist"),
            (["--program", "no_such_module"], "module 'no_such_module' of the program is not installed"),
            (["--objective", "elbow"], "unknown objective 'elbow': did you mean 'elbo'?"),
            (["--objective", "renyi(alfa=1)"], "unknown field of Renyi 'alfa': did you mean 'alpha'?"),
            (["--objective", "renyi(alpha=1.0)"], "Renyi.alpha must be finite and not 1, got 1.0"),
            (["--particles", "3"], "--particles is for iwelbo, renyi, wakephi, waketheta, not for elbo"),
            (["--steps", "0"], "ProgVI.steps must be an integer >= 1, got 0"),
            (["--samples", "0"], "ProgVI.samples must be an integer >= 1, got 0"),
            (["--optimizer", "sdg"], "ProgVI.optimizer must be 'sgd' or 'adam', got 'sdg'"),
            (["--learning-rate", "0"], "ProgVI.learning_rate must be finite and > 0, got 0"),
            (["--seed", "-1"], "ProgVI.seed must be an integer in [0, 2^32), got -1"),
            (["--resume"], "it needs --checkpoint"),
            (["--resume", "--checkpoint", "none"], "there is no checkpoint none/progvi.safetensors"),
        ],
        ids=lambda x: x if isinstance(x, str) else " ".join(x),
    )
    def test_a_mistake_is_one_sentence(self, more, said, normal, capsys):
        code, out, err = run(capsys, *normal, *more)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("def guide", "def gide"), "must define model, guide and params: there is no guide"),
            (
                ("def guide", "guide = 3\n\n\ndef gide"),
                "guide of the program normal.py must be a function or a density",
            ),
            (("def guide(", "def guide[("), "the program fails (normal.py, line 10): SyntaxError"),
            (("import jax.numpy as jnp", "import no_such_thing"), "(normal.py, line 2): ModuleNotFoundError"),
            (('params["m"]', 'params["mu"]'), "the program fails (normal.py, line 11): KeyError: 'mu'"),
            (('"m": 0.5', '"m": 1'), "params['m'] must be a floating-point number or array"),
            (('sample("z", vi.normal_reparam', 'sample("w", vi.normal_reparam'), "'z'"),
            (('data = {"x"', 'data = {"y"'), "'x'"),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, tuple) else None,
    )
    def test_a_program_that_is_wrong_is_named_with_its_line(self, change, said, normal, capsys):
        Path("normal.py").write_text(NORMAL.replace(*change))
        code, out, err = run(capsys, *normal)
        assert (code, out) == (2, "")
        assert said in err
        assert err.startswith("locum: ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("package", ["jax", "optax"])
    def test_without_the_extra_one_sentence_names_it(self, package, normal, capsys, monkeypatch):
        import locum.infer
        import locum.infer.vi  # so that it is not looked for, and found, below

        for name in [m for m in sys.modules if m.startswith("locum.infer.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(locum.infer, "vi", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        code, out, err = run(capsys, *normal)
        assert (code, out) == (2, "")
        assert "needs the extra 'vi': pip install 'locum[vi]'" in err
        assert err.count("\n") == 1
        if package == "jax":
            assert main(["show", "progvi"]) == 2
