"""The comparison over a family without models: rows, ratios, JSON, resume, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from locum.bench.compare import compare
from locum.bench.engines import Unit, passes
from locum.errors import MissingExtra, UserError

sys.path.insert(0, str(Path(__file__).parent))  # a Ray worker and the killed process import `fake` too
from fake import FakeTask

PROMISED = {"method", "group", "seed", "quality", "cost", "fidelity", "ratios"}


def test_rows_have_the_promised_form_and_ratios_are_paired(tmp_path):
    found = compare(FakeTask(seeds=2), name="a", runs=tmp_path).json()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"family", "task", "model", "rows"}
    assert len(found["rows"]) == 4 * 2 * 2  # methods x groups x seeds
    for row in found["rows"]:
        assert set(row) - {"error"} == PROMISED
        assert ("error" in row) == (row["method"] == "broken")
    ratios = {(r["method"], r["group"]): r["ratios"]["vs_plain"] for r in found["rows"]}
    # Items differ in speed by up to 30 %, yet every pair is 2 : 1.
    assert ratios["twice", "calm"] == ratios["twice", "rough"] == pytest.approx(2.0, abs=1e-12)
    assert ratios["plain", "calm"] == 1.0
    assert ratios["broken", "calm"] is None


def test_a_run_on_disk_is_complete(tmp_path):
    result = compare(FakeTask(), name="a", runs=tmp_path)
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text("utf-8"))
    assert config == json.loads(json.dumps(FakeTask().config()))
    rows = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 16
    assert {"machine", "versions", "date", "dtype"} <= set(rows[0]["environment"])
    broken = [r for r in rows if r["method"] == "broken"]
    assert all(r["error"].startswith("RuntimeError: broken on") and "raw" not in r for r in broken)
    assert result.report.is_file()


def test_table_fits_a_terminal_of_100_columns(tmp_path):
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(compare(FakeTask(), name="a", runs=tmp_path).table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "twice" in text
    assert "failed" in text
    assert "2.00" in text


def test_order_alternates_and_references_run_beside():
    units = [Unit(m, 0, i, "g") for i in range(3) for m in "abc"]
    orders = ["".join(u.method for u in p.units) for p in passes(units, ["a"])]
    assert orders == ["abc", "acb", "cab"]  # rotated by the pass, every other one backwards
    [alone] = passes([Unit("c", 0, 0, "g")], ["a", "b"])
    assert [u.method for u in alone.units] == ["a", "b", "c"]
    assert alone.wanted == {("c", 0, 0)}


def test_what_does_not_depend_on_the_moment_needs_its_reference_once():
    units = [Unit(m, 0, i, "g") for i in range(2) for m in "cab"]
    assert ["".join(u.method for u in p.units) for p in passes(units, ["a"], timed=False)] == ["cab", "cab"]
    [alone] = passes([Unit("c", 0, 0, "g")], ["a"], timed=False)
    assert [u.method for u in alone.units] == ["c"]


def test_interrupted_then_resumed_recomputes_nothing(tmp_path):
    log = tmp_path / "log"
    first = compare(FakeTask(log=str(log), interrupt_at=5), name="a", runs=tmp_path)
    assert first.interrupted
    assert len(first.rows) == 5
    assert "5 of 16" in first.how_to_resume
    assert "--resume --name a" in first.how_to_resume
    assert first.report.is_file()
    log.unlink()
    second = compare(FakeTask(log=str(log)), name="a", resume=True, runs=tmp_path)
    assert not second.interrupted
    again = [line.split() for line in log.read_text("utf-8").splitlines()]
    done = {(r["method"], str(r["seed"]), str(r["item"])) for r in first.rows if "raw" in r}
    assert {
        tuple(a) for a in again if a[0] != "plain"
    } & done == set()  # plain runs beside what was missing, to pair with
    keys = [(r["method"], r["seed"], r["item"]) for r in second.rows if r["role"] == "unit" and "raw" in r]
    assert len(keys) == len(set(keys)) == 12
    pure = compare(FakeTask(), name="b", runs=tmp_path)
    assert second.json() == pure.json()


def test_a_finished_run_resumed_runs_nothing(tmp_path):
    whole = FakeTask(methods=("plain", "twice"))
    before = compare(whole, name="a", runs=tmp_path).rows
    assert compare(whole, name="a", resume=True, runs=tmp_path).rows == before


def test_what_failed_is_tried_again(tmp_path):
    before = compare(FakeTask(), name="a", runs=tmp_path).rows
    after = compare(FakeTask(), name="a", resume=True, runs=tmp_path).rows
    assert [r["method"] for r in after[len(before) :] if r["role"] == "unit"] == ["broken"] * 4


KILLED = """
import sys
sys.path.insert(0, {folder!r})
from fake import FakeTask
from locum.bench.compare import compare
compare(FakeTask(methods=("plain", "twice"), per_group=10, delay=0.05, log={log!r}), name="a", runs={runs!r})
"""


def test_killed_then_resumed_recomputes_nothing(tmp_path):
    log = tmp_path / "log"
    code = KILLED.format(folder=str(Path(__file__).parent), log=str(log), runs=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    results = tmp_path / "a" / "results.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (results.exists() and results.read_bytes().count(b"\n") >= 7):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = results.read_bytes().count(b"\n")
    assert 7 <= kept < 40
    with results.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"method": "twi')
    log.write_text("", "utf-8")
    task = FakeTask(methods=("plain", "twice"), per_group=10, log=str(log))
    result = compare(task, name="a", resume=True, runs=tmp_path)
    assert len(result.lines) == 40
    missing = 40 - kept
    ran = log.read_text("utf-8").splitlines()
    assert len([r for r in result.rows if r["role"] == "unit"]) == 40
    assert missing <= len(ran) <= missing + 1  # one more at most: the reference of the pass that was cut in two


def test_another_config_is_refused(tmp_path):
    compare(FakeTask(), name="a", runs=tmp_path)
    with pytest.raises(UserError, match=r"begun with another seeds: it was 1, now 2"):
        compare(FakeTask(seeds=2), name="a", resume=True, runs=tmp_path)
    with pytest.raises(UserError, match=r"exists: add --resume"):
        compare(FakeTask(), name="a", runs=tmp_path)


def test_resume_without_a_name_takes_the_last_run(tmp_path):
    with pytest.raises(UserError, match="no run of fake"):
        compare(FakeTask(), resume=True, runs=tmp_path)
    first = compare(FakeTask(methods=("plain",)), runs=tmp_path)
    assert compare(FakeTask(methods=("plain",)), resume=True, runs=tmp_path).folder == first.folder


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b"])
def test_a_name_is_a_plain_folder_name(tmp_path, name):
    with pytest.raises(UserError, match="a run's name"):
        compare(FakeTask(), name=name, runs=tmp_path)


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown engine 'rya': did you mean 'ray'"):
        compare(FakeTask(), name="a", engine="rya", runs=tmp_path)


def test_ray_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--engine ray needs the extra 'ray'"):
        compare(FakeTask(), name="a", engine="ray", runs=tmp_path)


@pytest.mark.slow
def test_ray_gives_the_same_rows(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    task = FakeTask(seeds=2)
    here, there = (compare(task, name=e, engine=e, runs=tmp_path) for e in ("local", "ray"))
    assert here.json() == there.json()
    units = [sorted((r["method"], r["seed"], r["item"]) for r in c.rows if r["role"] == "unit") for c in (here, there)]
    assert units[0] == units[1]
