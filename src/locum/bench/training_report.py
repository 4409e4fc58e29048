"""What reports on trainings share: a colour per method, drawings group by group, distances from the baseline, time, samples.

A raw line of a training holds "curve": figures by name, each a list over checkpoints, the start first ("step" among them,
None where nothing is known); and "samples": prompts with what was said "before" and "after", and the "reward" of both.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from locum.bench.charts import Difference, Line, Spot, curves, differences
from locum.bench.report import Page, text
from locum.bench.store import Row

__all__ = [
    "Groups",
    "Members",
    "Spent",
    "colours",
    "distances",
    "groups_of",
    "key",
    "mean_curve",
    "panels",
    "per_group",
    "samples",
    "times",
]

Members = dict[str, list[Row]]  # method -> its lines, one per seed
Groups = dict[str, Members]
COLOURS = 12  # web/training.css has so many beside the baseline's


def groups_of(page: Page) -> Groups:
    """The lines that have figures, by group and method."""
    groups: Groups = {}
    for line in page.lines:
        if "raw" in line:
            groups.setdefault(line["group"], {}).setdefault(line["method"], []).append(line)
    return groups


def colours(methods: Sequence[str], baseline: str) -> dict[str, int]:
    """A colour's number per method, 0 for the baseline."""
    others = [m for m in methods if m != baseline]
    return {baseline: 0} | {m: 1 + i % COLOURS for i, m in enumerate(others)}


def key(colour: Mapping[str, int], methods: Iterable[str]) -> str:
    """The methods' names in their colours."""
    return "".join(f'<span class="key c{colour[m]}"><i></i>{text(m)}</span>' for m in methods)


def per_group(groups: Groups, draw: Callable[[Members], str], kind: str = "charts") -> str:
    """Drawings under each group's name; `draw` gives them as one <div> each."""
    return "".join(
        f'<h3>{text(name)}</h3><div class="{kind}">{draw(members)}</div>' for name, members in groups.items()
    )


def mean_curve(lines: Sequence[Row], name: str) -> list[float | None]:
    """A curve, mean over seeds; None where it was not measured."""
    table = [line["raw"]["curve"][name] for line in lines]
    return [None if None in column else float(np.mean(column)) for column in zip(*table, strict=True)]


def distances(page: Page, members: Members, colour: Mapping[str, int], baseline: str, of: str, title: str) -> str:
    """A measure's figures with their intervals, the best first: one that says how far a method is from the baseline.

    Args:
        of: the measure's key, among the ratios.
    """
    group = next(iter(members.values()))[0]["group"]
    measure = page.measure(of)
    rows = []
    for row in page.groups:
        value, found = (row["ratios"].get(k) for k in (measure.key, f"{measure.key}_interval"))
        limits = (found[0], found[1]) if found else None
        if row["group"] != group or row["method"] == baseline or value is None:
            continue
        said = f" ({measure.shown(limits[0])} to {measure.shown(limits[1])})" if limits else ""
        rows.append(Difference(row["method"], colour[row["method"]], value, limits, measure.shown(value) + said))
    rows.sort(key=lambda r: -r.value)
    return differences(rows, title)


def panels(members: Members, colour: Mapping[str, int], names: Mapping[str, str]) -> str:
    """Small drawings of what happens step by step: of each name that moved, under its title."""
    out = []
    for name, title in names.items():
        drawn = []
        for method, lines in members.items():
            curve = lines[0]["raw"]["curve"]
            if not curve.get(name):
                continue
            pairs = zip(curve["step"], mean_curve(lines, name), strict=True)
            spots = [Spot(s, y, None, f"{method}, step {s}: {y:.3f}") for s, y in pairs if y is not None]
            drawn.append(Line(method, colour[method], spots))
        moved = {s.y for line in drawn for s in line.spots}
        if len(moved) > 1 and max(len(line.spots) for line in drawn) > 2:
            out.append(f"<div>{curves(drawn, 'step', title, small=True)}</div>")
    return "".join(out)


@dataclass(frozen=True)
class Spent:
    """One method's time: its parts in order, each with the class that paints it, and what is said of it."""

    method: str
    parts: Sequence[tuple[str, float]]
    shown: str
    hint: str


def times(rows: Sequence[Spent], colour: Mapping[str, int]) -> str:
    """A bar per method."""
    top = max(sum(seconds for _, seconds in r.parts) for r in rows) or 1.0
    out = []
    for r in rows:
        lane = "".join(f'<i class="{kind}" style="width:{seconds / top:.2%}"></i>' for kind, seconds in r.parts)
        out.append(
            f'<div class="cost c{colour[r.method]}" title="{text(r.hint)}"><span class="name">{text(r.method)}</span>'
            f'<span class="lane">{lane}</span><span class="value">{text(r.shown)}</span></div>'
        )
    return "".join(out)


def samples(page: Page, groups: Groups, baseline: str, start: str) -> Row:
    """What web/samples.js shows: per group the prompts with the answers of the `start`, and per method its own, of the first seed."""
    out = []
    gaps = {(r["group"], r["method"]): r["ratios"].get(page.main) for r in page.groups}
    for name, members in groups.items():
        first = {m: min(lines, key=lambda line: line["seed"])["raw"]["samples"] for m, lines in members.items()}
        some = next(iter(first.values()))
        note = next((line["raw"].get("samples_note", "") for lines in members.values() for line in lines), "")
        before = [{"prompt": s["prompt"], "text": s["before"], "reward": (s["reward"] or [None])[0]} for s in some]
        after = {
            m: [{"text": s["after"], "reward": (s["reward"] or [None])[-1]} for s in rows] for m, rows in first.items()
        }
        others = [m for m in members if m != baseline] or list(members)
        shown = max(others, key=lambda m: -math.inf if (gap := gaps.get((name, m))) is None else gap)
        out.append({"name": name, "note": note, "shown": shown, "before": before, "after": after})
    return {"methods": [r["method"] for r in page.overall], "baseline": baseline, "start": start, "groups": out}
