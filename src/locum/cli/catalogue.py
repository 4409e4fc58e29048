"""``locum papers``, ``show`` and ``cite``."""

import importlib
import json as jsonlib
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from locum.cli.command import Command, console, emit, table
from locum.errors import UserError, unknown
from locum.method import parameters, to_yaml
from locum.paper import FAMILIES, Paper, catalogue, claims_folder, find

__all__ = ["Cite", "Papers", "Show"]

BASELINES = (
    "ppo",
    "reinforce",
    "rloo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
)  # recipes that are no paper of the catalogue


@dataclass(frozen=True)
class Papers(Command):
    """The catalogue: for every paper what is expensive, what stands in for it, how to check that, and what works here.

    Args:
        family: only the papers of one family.
        json: print one JSON document.
    """

    name: ClassVar[str] = "papers"
    family: str | None = None
    json: bool = False

    def run(self) -> int:
        if self.family is not None and self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES)
        papers = [p for p in catalogue() if self.family in (None, p.family)]
        if self.json:
            emit({"papers": [p.to_json() for p in papers]})
            return 0
        out = console()
        for family, what in FAMILIES.items():
            rows = [p for p in papers if p.family == family]
            if not rows:
                continue
            grid = table("paper", "expensive", "stands in", "check", title=f"{family}: {what}")
            grid.columns[0].no_wrap = True
            grid.columns[0].width = 17
            for p in rows:
                head = Text.assemble(p.slug, "\n", (f"{p.year} {state(p)}", "dim"))
                grid.add_row(head, Text(p.expensive), Text(p.stands_in), Text(p.check))
                grid.add_row()
            out.print(grid)
        count = {s: sum(p.state == s for p in papers) for s in ("verified", "coded", "planned")}
        out.print(
            f"{len(papers)} papers: " + ", ".join(f"{n} {s}" for s, n in count.items()) + ". More: locum show SLUG"
        )
        return 0


def state(paper: Paper) -> str:
    """Where a paper stands, in a word: planned, coded, or its claim's verdict."""
    return paper.claim.verdict if paper.claim else paper.state


@dataclass(frozen=True)
class Show(Command):
    """One method: what it does, its parameters, its citation, its last verified claim, an example.

    Args:
        slug: the paper's name in the catalogue; or a recipe of `locum reinforce`, e.g. "dapo + d3s", drawn as its pipeline.
        json: print one JSON document.
    """

    name: ClassVar[str] = "show"
    slug: Positional[str]
    json: bool = False

    def run(self) -> int:
        paper = find(self.slug, default=None)
        if paper is None and (recipe := self._recipe()) is not None:
            return self._show_recipe(recipe)
        paper = find(self.slug)
        fields = parameters(_main_class(paper)) if paper.state != "planned" else []
        claim = _claim(paper)
        if self.json:
            more = {"authors": list(paper.authors), "venue": paper.venue, "text": paper.text, "example": paper.example}
            drawn = _paper_recipe(paper)
            more |= {"pipeline": drawn.pipeline()} if drawn is not None else {}
            emit(paper.to_json() | more | {"parameters": fields, "verified": claim, "bibtex": paper.bibtex()})
            return 0
        out = console()
        out.print(f"[bold]{paper.title}[/bold]")
        out.print(f"{', '.join(paper.authors)}. {paper.venue}. arXiv {paper.arxiv}", markup=False)
        out.print(f"locum.{paper.family}, {paper.state}\n", markup=False)
        for head, text in (("Expensive", paper.expensive), ("Stands in", paper.stands_in), ("Check", paper.check)):
            out.print(Text.assemble((f"{head}: ", "bold"), text))
        if paper.text:
            out.print()
            out.print(_reflowed(paper.text), markup=False)
        drawn = _paper_recipe(paper)
        if drawn is not None:
            out.print(f"\n[bold]Pipeline[/bold] of the recipe {paper.slug}, on {drawn.host}")
            out.print(Padding(_pipeline(drawn), (0, 0, 0, 2)))
        if fields:
            grid = table("parameter", "type", "default", "")
            for f in fields:
                grid.add_row(*map(Text, (f["name"], f["type"], _default(f["default"]), f["help"])))
            out.print("\n[bold]Parameters[/bold]")
            out.print(Padding(grid, (0, 0, 0, 2)))
        if paper.example:
            out.print("\n[bold]Example[/bold]")
            out.print(Padding(Text(paper.example), (0, 0, 0, 2)))
        if claim:
            out.print(f"\n[bold]Claim[/bold] ({claim['verdict']}, {claim['date']})")
            for head in ("claim", "criterion", "measured"):
                out.print(f"  {head}: {claim[head]}", markup=False)
        elif paper.state != "planned":
            out.print(f"\nIts claim has no stored result: locum verify {paper.slug}")
        out.print(f"\nCitation: locum cite {paper.slug}")
        return 0

    def _recipe(self) -> Any:
        """The recipe of `reinforce` that was named instead of a paper: a baseline, or several terms; None if it is neither."""
        first = self.slug.split("+")[0].strip()
        if "+" not in self.slug and first not in BASELINES:
            return None
        from locum.reinforce import Recipe

        return Recipe.read(self.slug)

    def _show_recipe(self, recipe: Any) -> int:
        if self.json:
            emit({"recipe": str(recipe), "pipeline": recipe.pipeline(), "yaml": to_yaml(recipe)})
            return 0
        out = console()
        out.print(Text(f"{recipe}\n", "bold"))
        out.print(_pipeline(recipe))
        out.print(f"\nAs YAML, for locum reinforce --recipe FILE.yaml:\n\n{to_yaml(recipe)}", markup=False)
        return 0


def _default(value: Any) -> str:
    """A default in words; a method that is one as it is called."""
    if isinstance(value, dict) and "method" in value:
        fields = ", ".join(f"{k}={v}" for k, v in value.items() if k != "method")
        return f"{value['method'].rpartition('.')[2]}({fields})"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return ", ".join(map(_default, value))
    return "" if value is None else str(value)


def _main_class(paper: Paper) -> type:
    """The first name that a paper's file exports."""
    module = importlib.import_module(f"locum.{paper.family}.{paper.slug}")
    return getattr(module, module.__all__[0])


def _pipeline(recipe: Any) -> Table:
    """The stages of a recipe, one below the other; those of a minibatch stand apart."""
    grid = table("slot", "stage", "from")
    before = "batch"
    for row in recipe.pipeline():
        if row["each"] != before:
            grid.add_section()
            grid.add_row(Text("each minibatch", "dim"), "", "")
            before = row["each"]
        own = row["from"] != recipe.host
        grid.add_row(row["slot"], Text(row["stage"], "bold" if own else ""), Text(row["from"], "" if own else "dim"))
    return grid


def _paper_recipe(paper: Paper) -> Any:
    """What a paper of `reinforce` is as a recipe; None for those of other families."""
    if paper.family != "reinforce" or paper.state == "planned":
        return None
    from locum.reinforce.recipe import of

    return of(_main_class(paper)())


def _claim(paper: Paper) -> dict[str, Any] | None:
    if paper.claim is None:
        return None
    stored = jsonlib.loads((claims_folder() / "results" / f"{paper.slug}.json").read_text("utf-8"))
    keys = ("verdict", "date", "claim", "criterion", "measured", "seeds", "seconds", "machine")
    return {k: stored.get(k) for k in keys}


@dataclass(frozen=True)
class Cite(Command):
    """The citations of papers as BibTeX.

    Args:
        slugs: the papers' names in the catalogue.
    """

    name: ClassVar[str] = "cite"
    slugs: Positional[tuple[str, ...]]

    def run(self) -> int:
        if not self.slugs:
            raise UserError("locum cite needs the name of at least one paper, e.g. locum cite spectr")
        print("\n\n".join(find(s).bibtex() for s in dict.fromkeys(self.slugs)))
        return 0


def _reflowed(text: str) -> str:
    """Paragraphs as one line each, for a terminal of any width; indented lines are formulas and stay as they are."""
    return re.sub(r"(?<=\S)\n(?=\S)", lambda m: " " if _prose(text, m.start()) else "\n", text)


def _prose(text: str, end: int) -> bool:
    return not text[text.rfind("\n", 0, end) + 1].isspace()
