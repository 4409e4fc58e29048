"""The documents say what is: generated parts are up to date, and the code in them runs."""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from locum.errors import UserError
from locum.paper import catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert load(ROOT / "scripts/readme_table.py", "readme_table").updated(README) == README


def test_the_table_has_every_paper_once_and_its_links_lead_somewhere():
    rows = dict(re.findall(r"^\| \[(\w+)\]\((\S+)\)", README, flags=re.MULTILINE))
    assert rows.keys() == {p.slug for p in catalogue()}
    assert all(link.startswith("https://arxiv.org/abs/") or (ROOT / link).is_file() for link in rows.values())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_local_links_lead_to_files(link):
    assert (ROOT / link).exists()


SNIPPETS = re.findall(r"<!-- snippet.*?```python\n(.*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(("code", "said"), SNIPPETS, ids=["decode", "dsl", "vi"])
def test_a_snippet_prints_what_it_says(code, said):
    """Numbers are not compared: they can differ where another processor rounds a near tie the other way."""
    from locum import models

    try:
        models.load("smollm2-135m-instruct") if "smollm2" in code else None
    except UserError as error:
        pytest.skip(f"the embedded model is not here: {error}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert _without_numbers(printed.getvalue()) == _without_numbers(said)


def _without_numbers(text):
    lines = (re.sub(r"[-\d.,]*\d", "N", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines]


def test_a_method_as_a_value_reads_as_shown():
    code = README.split("## A method is a value")[1].split("```python\n")[1].split("```")[0]
    *lines, last = code.strip().splitlines()
    exec(compile("\n".join(lines), "README.md", "exec"), names := {})
    call, said = last.split("  # UserError: ")
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        eval(call, names)


def test_what_the_alignment_example_imports_is_there():
    code = README.split("## Which alignment method pays")[1].split("```python\n")[1].split("```")[0]
    imports = [line for line in code.splitlines() if line.startswith(("from ", "import "))]
    assert len(imports) == 2
    exec(compile("\n".join(imports), "README.md", "exec"), {})


class TestADrafterInOneFile:
    CODE = re.search(
        r"## Add a drafter in one file.*?```python\n(.*?)```",
        (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
        flags=re.DOTALL,
    )[1]

    def test_it_is_short(self):
        assert len(self.CODE.splitlines()) < 40

    def test_it_drafts_and_the_text_stays_the_models_own(self, tmp_path):
        from locum.decode import Match, generate
        from locum.models import tiny
        from locum.tokens import Sampling

        (tmp_path / "favourite.py").write_text(self.CODE)
        favourite = load(tmp_path / "favourite.py", "favourite").Favourite
        lm, prompt = tiny(seed=3), [5, 6, 7, 5, 6, 7, 5, 6]
        [plain] = generate(lm, prompt, max_new_tokens=48)
        [fast] = generate(lm, prompt, max_new_tokens=48, drafter=favourite())
        assert fast.ids == plain.ids
        assert fast.forwards <= plain.forwards
        assert max(step.drafted for step in fast.steps) > 0
        [drawn] = generate(lm, prompt, max_new_tokens=16, drafter=favourite(), verifier=Match(), sampling=Sampling(1.0))
        assert len(drawn.ids) == 16 or drawn.finish == "eos"
        with pytest.raises(UserError, match=r"Favourite\.length must be >= 1, got 0"):
            favourite(length=0)

    def test_it_proposes_what_came_most_often(self, tmp_path):
        import numpy as np

        from locum.decode import Context
        from locum.tokens import Sampling

        (tmp_path / "favourite.py").write_text(self.CODE)
        drafter = load(tmp_path / "favourite.py", "favourite2").Favourite(length=3)
        # after 1 came 2 twice and 3 once; after 2 came 1; so from 1: 2 1 2
        context = Context([1, 2, 1, 2, 1, 3, 1], 8, Sampling(), np.random.default_rng(0))
        assert drafter.propose(None, context).tokens == [1, 2, 1, 2]
        assert len(drafter.propose(None, Context([9], 8, Sampling(), np.random.default_rng(0)))) == 0

    def test_the_command_line_knows_it_once_the_file_is_there(self, tmp_path):
        copy = tmp_path / "src" / "locum"
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / "src" / "locum", copy, ignore=ignore)
        (copy / "decode" / "favourite.py").write_text(self.CODE)
        done = subprocess.run(
            [sys.executable, "-m", "locum", "decode", "--method", "favourite", "--help"],
            env=os.environ | {"PYTHONPATH": str(copy.parent)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "--length INT" in done.stdout
