"""The command line: exact forms of its JSON, and one sentence for each mistake."""

import json
import subprocess
import sys

import pytest

from locum.cli import main
from locum.paper import catalogue


def run(capsys, *args):
    code = main(args)
    out, err = capsys.readouterr()
    return code, out, err


def test_papers_json_is_one_document(capsys):
    code, out, err = run(capsys, "papers", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["papers"]
    assert document["papers"] == [p.to_json() for p in catalogue()]


def test_papers_of_one_family_fit_100_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = run(capsys, "papers", "--family", "align")
    assert code == 0
    assert "tdpo" in out
    assert "spectr" not in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("paper", catalogue(), ids=lambda p: p.slug)
def test_every_paper_can_be_shown(capsys, paper):
    code, out, err = run(capsys, "show", paper.slug)
    assert (code, err) == (0, "")
    assert paper.arxiv in out
    code, out, err = run(capsys, "show", paper.slug, "--json")
    assert (code, err) == (0, "")
    shown = json.loads(out)
    assert {k: shown[k] for k in paper.to_json()} == paper.to_json()
    assert bool(shown["parameters"]) <= (paper.state != "planned")


def test_cite_prints_bibtex(capsys):
    code, out, _ = run(capsys, "cite", "spectr", "dyspec", "spectr")
    assert code == 0
    assert out.count("@article{") == 2
    assert "eprint        = {2310.15141}" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["shw"], "unknown command 'shw': did you mean 'show'?"),
        (["show", "spectre"], "unknown paper 'spectre': did you mean 'spectr'?"),
        (["show"], "missing"),
        (["cite"], "at least one paper"),
        (["cite", "nothing-like-it"], "unknown paper 'nothing-like-it'"),
        (["papers", "--family", "decod"], "unknown family 'decod': did you mean 'decode'?"),
        (["papers", "--familly", "decode"], "--familly"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, args, said):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("locum: ")
    assert said in err
    assert err.count("\n") == 1


def test_debug_shows_where_it_came_from():
    done = subprocess.run([sys.executable, "-m", "locum", "show", "spectre", "--debug"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_ctrl_c_is_130(capsys, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("locum.cli.catalogue.Papers.run", stop)
    assert run(capsys, "papers")[0] == 130


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"{sys.executable} -m locum papers | head -1", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_help_and_version(capsys):
    assert "usage: locum" in run(capsys)[1]
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert {"papers", "show", "cite", "verify", "compare", "decode"} <= set(out.split())
    assert run(capsys, "--version")[1].startswith("locum 0.")
