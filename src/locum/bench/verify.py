"""A paper's claim, run here and now: seed by seed, judged by a criterion that was written down before.

A claim is a file ``claims/<slug>.py`` with ``claim = Claim(...)``: a small experiment that gives raw figures per seed, and a
judge that turns them into a verdict. Each seed's figures are on the disk when it ends, so a killed run goes on; they are used
again only while neither the claim nor the package's methods have changed. The result is ``claims/results/<slug>.json``.
"""

import ast
import hashlib
import importlib.util
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from locum.bench.machine import environment, machine
from locum.bench.store import Lines, Row
from locum.errors import UserError, unknown
from locum.files import write_atomically
from locum.paper import ROOT, claims_folder, find
from locum.progress import Bar

__all__ = ["Claim", "Judgement", "available", "load_claim", "run_claims"]

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Judgement:
    """What the criterion says of the figures: the verdict, one sentence with the figures, and the figures themselves."""

    verdict: Literal["holds", "fails", "inconclusive"]
    measured: str
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in ("holds", "fails", "inconclusive"):
            raise UserError(f"Judgement.verdict must be holds, fails or inconclusive, got {self.verdict!r}")


@dataclass(frozen=True)
class Claim:
    """One paper's claim as a program.

    Args:
        slug: the paper's.
        statement: what is claimed, in one or two sentences.
        criterion: when it holds and when it fails: test, threshold, seeds.
        seeds: run one after the other.
        run: ``run(seed, fast, progress)`` -> raw figures of a seed, JSON-able; ``progress(what, done, total)`` tells how far it is.
        judge: raw figures of all seeds, in order -> the judgement.
    """

    slug: str
    statement: str
    criterion: str
    seeds: tuple[int, ...]
    run: Callable[[int, bool, Tell], Row]
    judge: Callable[[list[Row]], Judgement]

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"Claim.seeds must be at least one seed, none twice, got {self.seeds!r}")


def available(claims: Path | None = None) -> list[str]:
    """The slugs that have a claim, in order."""
    return sorted(p.stem for p in (claims or claims_folder()).glob("*.py") if not p.stem.startswith("_"))


def load_claim(slug: str, claims: Path | None = None) -> Claim:
    """The claim of a paper.

    Raises:
        UserError: for a slug that is in no catalogue, or a paper without a claim.
    """
    folder = claims or claims_folder()
    path = folder / f"{slug}.py"
    if slug not in available(folder):
        if find(slug, default=None) is None:
            raise unknown("paper", slug, available(folder))
        raise UserError(
            f"{slug} has no claim that runs yet: `locum papers` shows which have (here: {_listed(available(folder))})"
        )
    spec = importlib.util.spec_from_file_location(f"locum_claims_{slug}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and pickle find what the file defines
    spec.loader.exec_module(module)
    claim = getattr(module, "claim", None)
    if not isinstance(claim, Claim) or claim.slug != slug:
        raise UserError(f"{path} must define claim = Claim(slug={slug!r}, ...)")
    return claim


def run_claims(
    slugs: Sequence[str] | None = None,
    fast: bool = False,
    claims: Path | None = None,
    runs: str | Path = "runs",
) -> dict[str, list[Row]]:
    """Run claims and store their results.

    Args:
        slugs: which; None for all that there are.
        fast: a subset that ends in well under a minute each; nothing is stored.
        claims: the folder of claims; by default the package's own.
        runs: raw rows of claims that are not done yet are kept in its ``verify/``.

    Returns:
        ``{"claims": [{"slug", "verdict", "claim", "measured", "criterion", "seeds", "seconds", "machine"}]}``; a claim that
        raised is inconclusive and has its error under "error", and the others run on.

    Raises:
        UserError: for a slug without a claim, before anything runs.
    """
    folder = claims or claims_folder()
    wanted = list(dict.fromkeys(slugs)) if slugs is not None else available(folder)
    for slug in wanted:
        if slug not in available(folder):
            load_claim(slug, folder)  # says why there is none
    return {"claims": [_run(slug, fast, folder, Path(runs)) for slug in wanted]}


def _run(slug: str, fast: bool, folder: Path, runs: Path) -> Row:
    claim, rows, seconds, code = None, [], 0.0, _code(folder / f"{slug}.py")
    raw = runs / "verify" / f"{slug}.jsonl"
    lines = None if fast else Lines(raw)
    try:
        claim = load_claim(slug, folder)
        with Bar(f"verify {slug}", len(claim.seeds)) as bar:
            for at, seed in enumerate(claim.seeds):
                line = _before(lines, code, seed) or _one(claim, seed, fast, code, bar, at)
                if lines is not None and line not in lines.rows:
                    lines.append(line)
                rows.append(line["row"])
                seconds += line["seconds"]
                bar.at(at + 1, f"seed {seed} done")
        judgement = claim.judge(rows)
        found: Row = {"verdict": judgement.verdict, "measured": judgement.measured}
    except Exception as error:
        judgement = None
        text = f"{type(error).__name__}: {error}"
        found = {"verdict": "inconclusive", "measured": f"nothing: the claim ended in an error ({text})", "error": text}
        found["traceback"] = traceback.format_exc()
    finally:
        if lines is not None:
            lines.close()
    shown = {
        "slug": slug,
        "verdict": found["verdict"],
        "claim": claim.statement if claim else "",
        "measured": found["measured"],
        "criterion": claim.criterion if claim else "",
        "seeds": list(claim.seeds) if claim else [],
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
    if judgement is None:
        return shown | {"error": found["error"], "traceback": found["traceback"]}
    if not fast:
        _store(folder, shown | {"figures": judgement.figures, "rows": rows, "code": code} | environment())
        raw.unlink()
    return shown


def _one(claim: Claim, seed: int, fast: bool, code: str, bar: Bar, at: int) -> Row:
    """Run one seed; the row as it is kept."""

    def tell(what: str, done: int, total: int) -> None:
        bar.at(at + min(done / max(total, 1), 0.999), f"seed {seed}, {what} {done}/{total}")

    began = time.perf_counter()
    figures = claim.run(seed, fast, tell)
    seconds = time.perf_counter() - began
    try:
        row = json.loads(json.dumps(figures, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"the figures of seed {seed} cannot be written as JSON: {error}") from None
    return {"code": code, "seed": seed, "seconds": seconds, "row": row} | environment()


def _before(lines: Lines | None, code: str, seed: int) -> Row | None:
    """The row of a seed that an earlier, unfinished run of the same code left."""
    found = (r for r in (lines.rows if lines is not None else []) if r.get("code") == code and r.get("seed") == seed)
    return next(found, None)


def _store(folder: Path, result: Row) -> None:
    path = folder / "results" / f"{result['slug']}.json"
    try:
        write_atomically(path, json.dumps(_finite(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        print(f"the result of {result['slug']} could not be kept in {path}: {error.strerror}", file=sys.stderr)


def _finite(value: Any) -> Any:
    """JSON knows no nan and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _code(claim: Path) -> str:
    """What the claim's outcome depends on: its own source and the package's, less its faces and this bench.

    Comments and layout do not count.
    """
    package = (
        p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in ("bench", "web", "cli", "claims")
    )
    return hashlib.sha256("\n".join(_syntax(p) for p in [claim, *package]).encode()).hexdigest()[:16]


def _syntax(path: Path) -> str:
    text = path.read_text("utf-8")
    try:
        return ast.dump(ast.parse(text))
    except SyntaxError:
        return text


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
