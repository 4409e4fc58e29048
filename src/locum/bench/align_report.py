"""The sections of a comparison of preference methods: reward against KL, DPO at equal KL, the way there, the cost, samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from locum.bench.align_measures import BASELINE, along_kl, score_limits
from locum.bench.charts import FEW, Difference, Line, Spot, curves, differences
from locum.bench.report import Page, Part, text
from locum.bench.store import Row

__all__ = ["align_part"]

FAR = 1.3  # a method that goes so much further than DPO makes a second, nearer drawing worth while
ALONG = {  # what is drawn against the steps, and how it is called
    "reward": "reward",
    "kl": "KL to the reference, nats",
    "accuracy": "held-out pairs told right",
    "entropy": "entropy, nats",
    "length": "tokens of a response",
}


def align_part(page: Page) -> Part:
    """The sections of web/align.html."""
    groups: dict[str, dict[str, list[Row]]] = {}  # group -> method -> its lines, one per seed
    for line in page.lines:
        if "raw" in line:
            groups.setdefault(line["group"], {}).setdefault(line["method"], []).append(line)
    methods = [r["method"] for r in page.overall]
    others = [m for m in methods if m != BASELINE]
    colours = {BASELINE: 0} | {m: i + 1 for i, m in enumerate(others)}
    key = "".join(f'<span class="key c{colours[m]}"><i></i>{text(m)}</span>' for m in methods)
    fields = {
        "frontier": _per_group(groups, lambda members: _frontier(members, colours)),
        "differences": _per_group(
            groups,
            lambda members: (
                f"<div>{_differences(page, members, colours)}</div><div>{_along_kl(members, colours)}</div>"
            ),
        ),
        "along": _per_group(groups, lambda members: _along(members, colours), kind="small"),
        "cost": _per_group(groups, lambda members: f"<div>{_cost(members, colours)}</div>"),
        "key": key,
    }
    return Part("align", fields, _samples(page, groups, methods))


def _per_group(
    groups: dict[str, dict[str, list[Row]]], draw: Callable[[dict[str, list[Row]]], str], kind: str = "charts"
) -> str:
    """Drawings under each group's name; `draw` gives them as one <div> each."""
    return "".join(
        f'<h3>{text(name)}</h3><div class="{kind}">{draw(members)}</div>' for name, members in groups.items()
    )


def _score(lines: Sequence[Row]) -> str:
    return str(lines[0]["raw"]["score"])


def _mean(lines: Sequence[Row], name: str) -> list[float | None]:
    """A curve, mean over seeds; None where it was not measured."""
    table = [line["raw"]["curve"][name] for line in lines]
    return [None if None in column else float(np.mean(column)) for column in zip(*table, strict=True)]


def _frontier(members: dict[str, list[Row]], colours: dict[str, int]) -> str:
    """Score gained against KL, a curve per method, a point per checkpoint."""
    name = _score(next(iter(members.values())))
    drawn = []
    for method, lines in members.items():
        steps = lines[0]["raw"]["curve"]["step"]
        score, kl = _mean(lines, name), _mean(lines, "kl")
        spots = []
        for i, step in enumerate(steps):
            x, y, first = kl[i], score[i], score[0]
            if x is None or y is None or first is None:
                continue
            limits = score_limits(lines, i)
            said = f" ({limits[0]:+.3f} to {limits[1]:+.3f})" if limits else ""
            spots.append(
                Spot(x, y - first, limits, f"{method}, step {step}: KL {x:.2f}, {name} {y - first:+.3f}{said}")
            )
        drawn.append(Line(method, colours[method], spots))
    titles = "KL from the reference, nats", f"{name} gained"
    reached = max((s.x for line in drawn if line.colour == 0 for s in line.spots), default=0.0)
    near = [replace(line, spots=[s for s in line.spots if s.x <= reached]) for line in drawn]
    whole = curves(drawn, *titles)
    if max((s.x for line in drawn for s in line.spots), default=0.0) < FAR * reached or len(drawn[0].spots) <= FEW:
        return f"<div>{whole}</div>"
    return f'<div>{whole}</div><div><p class="none">As far as DPO went:</p>{curves(near, *titles)}</div>'


def _differences(page: Page, members: dict[str, list[Row]], colours: dict[str, int]) -> str:
    group = next(iter(members.values()))[0]["group"]
    measure = page.measure(page.main)
    rows = []
    for row in page.groups:
        value, found = (row["ratios"].get(k) for k in (measure.key, f"{measure.key}_interval"))
        limits = (found[0], found[1]) if found else None
        if row["group"] != group or row["method"] == BASELINE or value is None:
            continue
        said = f" ({measure.shown(limits[0])} to {measure.shown(limits[1])})" if limits else ""
        shown = measure.shown(value) + said
        rows.append(Difference(row["method"], colours[row["method"]], value, limits, shown))
    rows.sort(key=lambda r: -r.value)
    return differences(rows, f"{_score(next(iter(members.values())))} at equal KL, less DPO's")


def _along_kl(members: dict[str, list[Row]], colours: dict[str, int]) -> str:
    """The distance from DPO's curve, level by level of KL."""
    name, drawn = _score(next(iter(members.values()))), []
    for method, lines in members.items():
        if method == BASELINE:
            continue
        spots = [Spot(0.0, 0.0)]
        for kl, gap, limits in along_kl(lines):
            said = f" ({limits[0]:+.3f} to {limits[1]:+.3f})" if limits else ""
            spots.append(Spot(kl, gap, limits, f"{method} at KL {kl:.2f}: {gap:+.3f}{said}"))
        drawn.append(Line(method, colours[method], spots))
    return curves(drawn, "KL from the reference, nats", f"{name} less DPO's at equal KL", zero=True)


def _along(members: dict[str, list[Row]], colours: dict[str, int]) -> str:
    """Small drawings of what happens step by step."""
    panels = []
    for name, title in ALONG.items():
        drawn = []
        for method, lines in members.items():
            curve = lines[0]["raw"]["curve"]
            if not curve.get(name):
                continue
            pairs = zip(curve["step"], _mean(lines, name), strict=True)
            spots = [Spot(s, y, None, f"{method}, step {s}: {y:.3f}") for s, y in pairs if y is not None]
            drawn.append(Line(method, colours[method], spots))
        moved = {s.y for line in drawn for s in line.spots}
        if len(moved) > 1 and max(len(line.spots) for line in drawn) > 2:
            panels.append(f"<div>{curves(drawn, 'step', title, small=True)}</div>")
    return "".join(panels)


def _cost(members: dict[str, list[Row]], colours: dict[str, int]) -> str:
    """Seconds before and in the training, median over seeds, with tokens per second and memory written beside them."""
    rows = []
    for method, lines in members.items():
        raws = [line["raw"] for line in lines]
        before, train = (float(np.median([raw[k] for raw in raws])) for k in ("preparation_seconds", "seconds"))
        speed = sum(raw["tokens"] for raw in raws) / sum(raw["seconds"] for raw in raws)
        memory = [raw["peak_memory_mb"] for raw in raws if raw.get("peak_memory_mb") is not None]
        rows.append((method, before, train, speed, max(memory) if memory else None))
    top = max(before + train for _, before, train, _, _ in rows) or 1.0
    out = []
    for method, before, train, speed, peak in rows:
        said = f"{before + train:.1f} s, {speed:,.0f} tokens/s" + (f", {peak:,.0f} MB" if peak is not None else "")
        hint = f"{method}: {before:.1f} s before the training, {train:.1f} s in it"
        out.append(
            f'<div class="cost c{colours[method]}" title="{text(hint)}"><span class="name">{text(method)}</span>'
            f'<span class="lane"><i class="before" style="width:{before / top:.2%}"></i>'
            f'<i style="width:{train / top:.2%}"></i></span><span class="value">{text(said)}</span></div>'
        )
    return "".join(out)


def _samples(page: Page, groups: dict[str, dict[str, list[Row]]], methods: Sequence[str]) -> Row:
    """Per group the prompts with the reference's answer, and per method its own, of the first seed; and whom to show first."""
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
        others = [m for m in members if m != BASELINE] or list(members)
        shown = max(others, key=lambda m: -math.inf if (gap := gaps.get((name, m))) is None else gap)
        out.append({"name": name, "note": note, "shown": shown, "before": before, "after": after})
    return {"methods": list(methods), "baseline": BASELINE, "groups": out}
