"""Bring the generated parts of README.md up to date: the table of papers, and the output of the commands it shows.

python scripts/readme_table.py            rewrite README.md
python scripts/readme_table.py --check    say whether it is up to date, and exit with 1 if not
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from locum.cli import main as locum
from locum.paper import FAMILIES, ROOT, Paper, catalogue

HEAD = "| paper | expensive | stands in | check | state |"
README = Path(__file__).parent.parent / "README.md"
RESULTS = README.parent / "benchmarks" / "results"  # compare_<family>.txt: what `locum compare <family>` last printed


def row(paper: Paper) -> str:
    """One line of the table; the paper's name leads to its file, or to arXiv while it has none."""
    file = ROOT / paper.family / f"{paper.slug}.py"
    link = f"src/locum/{paper.family}/{paper.slug}.py" if file.exists() else f"https://arxiv.org/abs/{paper.arxiv}"
    state = f"claim {paper.claim.verdict} ({paper.claim.date})" if paper.claim else paper.state
    cells = (f"[{paper.slug}]({link})", paper.expensive, paper.stands_in, paper.check, state)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def table() -> str:
    """All papers, family by family."""
    lines = []
    for family, what in FAMILIES.items():
        lines += ["", f"**{family}**: {what}", "", HEAD, "|---|---|---|---|---|"]
        lines += [row(p) for p in catalogue() if p.family == family]
    return "\n".join(lines[1:])


def output(command: str) -> str:
    """What a ``locum ...`` command prints, without blanks at the ends of lines."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        locum(shlex.split(command)[1:])
    return "\n".join(line.rstrip() for line in said.getvalue().rstrip().splitlines())


def _compared(family: str) -> str:
    return (RESULTS / f"compare_{family}.txt").read_text("utf-8")


def updated(text: str) -> str:
    """The README with its generated parts made anew."""
    between = r"(<!-- papers -->\n).*?(<!-- /papers -->)"
    text = re.sub(between, lambda m: f"{m[1]}{table()}\n{m[2]}", text, flags=re.DOTALL)
    between = r"(<!-- compare (\w+) -->\n).*?(<!-- /compare -->)"
    text = re.sub(between, lambda m: f"{m[1]}```console\n{_compared(m[2])}```\n{m[3]}", text, flags=re.DOTALL)
    shown = r"^(```console\n\$ (locum [^\n]*)\n).*?^```$"
    return re.sub(shown, lambda m: f"{m[1]}{output(m[2])}\n```", text, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    before = README.read_text("utf-8")
    after = updated(before)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: python scripts/readme_table.py" if before != after else 0)
    README.write_text(after, "utf-8")
