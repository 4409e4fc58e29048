"""What a paper is, and the catalogue of all of them.

A paper with code is read off the docstring of its file, ``src/locum/<family>/<slug>.py``, without importing it; a paper
without code stands in ``planned.toml``. The docstring begins with the title and holds named entries::

    Expensive: what one would do if it were free
    Stands in: what is done instead
    Check: how anyone can see that the stand-in is good enough

and, at its end, ``Authors:``, ``Year:``, ``Venue:``, ``arXiv:``. An entry ends at a blank line or at the next entry.
"""

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locum.errors import unknown

__all__ = ["FAMILIES", "ROOT", "ClaimState", "Paper", "catalogue", "claims_folder", "find", "module_paths", "parse"]

ROOT = Path(__file__).resolve().parent
FAMILIES = {
    "align": "preference optimisation",
    "reinforce": "reinforcement learning from verifiable rewards",
    "decode": "faster and controlled decoding",
    "search": "optimisation through surrogates",
    "route": "experts and adaptive compute",
    "reduce": "fewer tokens",
    "adapt": "move a model",
    "infer": "estimates with guarantees",
    "probe": "what a model can be made to do",
    "synthesize": "data with known answers",
}
_ENTRIES = ("Expensive", "Stands in", "Check", "Authors", "Year", "Venue", "arXiv")
_HEAD = re.compile(rf"^({'|'.join(_ENTRIES)}):[ \t]*")
_REQUIRED = object()


@dataclass(frozen=True)
class ClaimState:
    """The last stored run of a paper's claim: its verdict and the day it was run."""

    verdict: str
    date: str


@dataclass(frozen=True)
class Paper:
    """One published method: what is expensive, what stands in for it, and how to check the stand-in."""

    slug: str
    title: str
    arxiv: str
    year: int
    family: str
    expensive: str
    stands_in: str
    check: str
    authors: tuple[str, ...]
    venue: str
    state: Literal["planned", "coded", "verified"] = "planned"
    claim: ClaimState | None = None
    text: str = ""  # the docstring's free part: equations, symbols, shapes, traps
    example: str = ""  # lines that run offline, with prompts

    def to_json(self) -> dict[str, Any]:
        """The promised form of one entry of ``locum papers --json``."""
        keys = ("slug", "title", "arxiv", "year", "family", "expensive", "stands_in", "check", "state")
        return {k: getattr(self, k) for k in keys} | {"claim": dataclasses.asdict(self.claim) if self.claim else None}

    def bibtex(self) -> str:
        """The citation as BibTeX."""
        rows = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            "note": self.venue if not self.venue.startswith("arXiv") else "",
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{self.arxiv}",
        }
        body = ",\n".join(f"  {k:<13} = {{{v}}}" for k, v in rows.items() if v)
        return f"@article{{{self.slug},\n{body}\n}}"


def module_paths(family: str) -> list[Path]:
    """The source files of a family, in order of name, private ones and ``__init__`` left out."""
    return sorted(p for p in (ROOT / family).glob("*.py") if not p.stem.startswith("_"))


def claims_folder() -> Path:
    """Where the runnable claims lie: inside an installed package, or at the top of the source tree."""
    inside = ROOT / "claims"
    return inside if inside.is_dir() else ROOT.parent.parent / "claims"


def parse(docstring: str, slug: str, family: str) -> Paper | None:
    """The paper that a module's docstring describes; None when it describes none (it has no ``Expensive:`` entry).

    Raises:
        ValueError: when it has some of the entries but not all, or a year that is no number.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    entries: dict[str, str] = {}
    free: list[str] = []
    current = ""
    for line in lines[1:]:
        if head := _HEAD.match(line):
            current = head[1]
            entries[current] = line[head.end() :].strip()
        elif not line.strip():
            current = ""
            free.append("")
        elif current:
            entries[current] += " " + line.strip()
        else:
            free.append(line)
    if "Expensive" not in entries:
        return None
    if absent := [e for e in _ENTRIES if not entries.get(e)]:
        raise ValueError(f"{family}/{slug}.py: its docstring lacks the entries {', '.join(absent)}")
    text, _, example = "\n".join(free).partition("Example:\n")
    return Paper(
        slug=slug,
        title=lines[0].strip(),
        arxiv=entries["arXiv"],
        year=int(entries["Year"]),
        family=family,
        expensive=_sentence(entries["Expensive"]),
        stands_in=_sentence(entries["Stands in"]),
        check=_sentence(entries["Check"]),
        authors=tuple(a.strip() for a in entries["Authors"].split(",")),
        venue=entries["Venue"],
        state="coded",
        text=re.sub(r"\n{3,}", "\n\n", text).strip(),
        example=textwrap.dedent(example).strip(),
    )


@functools.cache
def catalogue() -> tuple[Paper, ...]:
    """All papers, family by family and in order of slug within one; code comes before a planned entry."""
    papers = [p for family in FAMILIES for path in module_paths(family) if (p := _read(path, family))]
    coded = {p.slug for p in papers}
    with (ROOT / "planned.toml").open("rb") as file:
        planned = tomllib.load(file)
    papers += [Paper(slug=s, **e | {"authors": tuple(e["authors"])}) for s, e in planned.items() if s not in coded]
    order = list(FAMILIES)
    return tuple(sorted((_with_claim(p) for p in papers), key=lambda p: (order.index(p.family), p.slug)))


def find(slug: str, default: Any = _REQUIRED) -> Any:
    """The paper of a slug, or `default` when given and there is none.

    Raises:
        UserError: for a slug that is not in the catalogue, with the nearest that is.
    """
    papers = {p.slug: p for p in catalogue()}
    if slug.lower() in papers:
        return papers[slug.lower()]
    if default is _REQUIRED:
        raise unknown("paper", slug, papers)
    return default


def _sentence(entry: str) -> str:
    """As it stands in the table: a capital first, no full stop last."""
    return entry[:1].upper() + entry[1:].removesuffix(".")


def _read(path: Path, family: str) -> Paper | None:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"), str(path)))
    return parse(docstring, path.stem, family) if docstring else None


def _with_claim(paper: Paper) -> Paper:
    stored = claims_folder() / "results" / f"{paper.slug}.json"
    if paper.state == "planned" or not stored.is_file():
        return paper
    result = json.loads(stored.read_text("utf-8"))
    return dataclasses.replace(paper, state="verified", claim=ClaimState(result["verdict"], result["date"][:10]))
