"""Claims: verdicts, failures, resume, and what is stored."""

import json

import pytest

from locum.bench.verify import Claim, Judgement, available, run_claims
from locum.errors import UserError

PROMISED = {"slug", "verdict", "claim", "measured", "criterion", "seeds", "seconds", "machine"}
SOURCE = """
from pathlib import Path
from locum.bench.verify import Claim, Judgement

def run(seed, fast, progress):
    with Path({log!r}).open("a") as file:
        file.write(f"{slug} {{seed}}\\n")
    for step in range(3):
        progress("step", step + 1, 3)
    {body}
    return {{"seed": seed, "fast": fast, "x": seed * 0.5}}

def judge(rows):
    mean = sum(r["x"] for r in rows) / len(rows)
    return Judgement("holds" if mean > 0.4 else "fails", f"mean {{mean}}", {{"mean": mean}})

claim = Claim(slug="{slug}", statement="x is large", criterion="mean > 0.4", seeds={seeds}, run=run, judge=judge)
"""


@pytest.fixture
def make(tmp_path):
    def write(slug, body="pass", seeds="(0, 1, 2)"):
        folder = tmp_path / "claims"
        folder.mkdir(exist_ok=True)
        log = tmp_path / "log"
        log.write_text("", "utf-8")
        (folder / f"{slug}.py").write_text(SOURCE.format(slug=slug, log=str(log), body=body, seeds=seeds), "utf-8")
        return folder

    return write


def go(folder, slugs=None, **kwargs):
    return run_claims(slugs, claims=folder, runs=folder.parent / "runs", **kwargs)["claims"]


def ran(folder):
    return (folder.parent / "log").read_text("utf-8").split("\n")[:-1]


def test_the_promised_form_and_what_is_stored(make):
    folder = make("one")
    [row] = go(folder)
    assert set(row) == PROMISED
    assert (row["verdict"], row["measured"], row["seeds"]) == ("holds", "mean 0.5", [0, 1, 2])
    stored = json.loads((folder / "results" / "one.json").read_text("utf-8"))
    assert set(stored) >= PROMISED | {"figures", "rows", "versions", "date"}
    assert stored["figures"] == {"mean": 0.5}
    assert stored["rows"] == [{"seed": s, "fast": False, "x": s * 0.5} for s in range(3)]
    assert not (folder.parent / "runs" / "verify" / "one.jsonl").exists()


def test_a_claim_that_fails_is_shown_as_failing(make):
    [row] = go(make("one", seeds="(0,)"))
    assert row["verdict"] == "fails"


def test_fast_stores_nothing(make):
    folder = make("one")
    [row] = go(folder, fast=True)
    assert row["verdict"] == "holds"
    assert not (folder / "results").exists()
    assert not (folder.parent / "runs").exists()


def test_one_that_raises_does_not_stop_the_others(make):
    make("bad", body="raise RuntimeError('no disk')")
    make("broken")
    folder = make("good")
    (folder / "broken.py").write_text("def (", "utf-8")
    rows = {r["slug"]: r for r in go(folder)}
    assert rows["bad"]["verdict"] == "inconclusive"
    assert rows["bad"]["error"] == "RuntimeError: no disk"
    assert "SyntaxError" in rows["broken"]["error"]
    assert rows["good"]["verdict"] == "holds"
    assert sorted(p.name for p in (folder / "results").iterdir()) == ["good.json"]


def test_a_stopped_run_goes_on_with_the_seeds_that_are_missing(make):
    folder = make("one", body="if seed == 2 and not Path(__file__).with_name('on').exists(): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        go(folder)
    assert ran(folder) == ["one 0", "one 1", "one 2"]
    (folder / "on").touch()
    [row] = go(folder)
    assert ran(folder) == ["one 0", "one 1", "one 2", "one 2"]
    assert row["verdict"] == "holds"


def test_a_claim_that_changed_begins_anew_and_comments_do_not_count(make):
    body = "if seed == 2: raise KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt):
        go(make("one", body=body))
    folder = make("one", body=body + "  # a remark")
    with pytest.raises(KeyboardInterrupt):
        go(folder)
    assert ran(folder) == ["one 2"]
    folder = make("one", body="seed = seed + 0")
    go(folder)
    assert ran(folder) == ["one 0", "one 1", "one 2"]


def test_a_finished_claim_runs_again(make):
    folder = make("one")
    go(folder)
    go(folder)
    assert len(ran(folder)) == 6


def test_figures_that_are_not_json_are_an_error(make):
    [row] = go(make("one", body="return {'x': float('nan')}"))
    assert "cannot be written as JSON" in row["error"]


def test_unknown_and_unclaimed_slugs_are_refused_before_anything_runs(make):
    folder = make("one")
    with pytest.raises(UserError, match="unknown paper 'noone'"):
        go(folder, ["one", "noone"])
    with pytest.raises(UserError, match="tdpo has no claim that runs yet"):
        go(folder, ["one", "tdpo"])
    assert ran(folder) == []
    assert available(folder) == ["one"]


def test_a_claim_and_a_judgement_are_checked():
    with pytest.raises(UserError, match="at least one seed, none twice"):
        Claim("a", "s", "c", (), run=lambda *_: {}, judge=lambda _: Judgement("holds", ""))
    with pytest.raises(UserError, match="at least one seed, none twice"):
        Claim("a", "s", "c", (1, 1), run=lambda *_: {}, judge=lambda _: Judgement("holds", ""))
