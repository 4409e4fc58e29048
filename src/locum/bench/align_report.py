"""The sections of a comparison of preference methods: reward against KL, DPO at equal KL, the way there, the cost, samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from locum.bench.align_measures import BASELINE, along_kl, score_limits
from locum.bench.charts import FEW, Line, Spot, curves
from locum.bench.report import Page, Part
from locum.bench.store import Row
from locum.bench.training_report import (
    Members,
    Spent,
    colours,
    distances,
    groups_of,
    key,
    mean_curve,
    panels,
    per_group,
    samples,
    times,
)

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
    groups = groups_of(page)
    methods = [r["method"] for r in page.overall]
    colour = colours(methods, BASELINE)

    def against(members: Members) -> str:
        title = f"{_score(next(iter(members.values())))} at equal KL, less DPO's"
        gaps = distances(page, members, colour, BASELINE, page.main, title)
        return f"<div>{gaps}</div><div>{_along_kl(members, colour)}</div>"

    fields = {
        "frontier": per_group(groups, lambda members: _frontier(members, colour)),
        "differences": per_group(groups, against),
        "along": per_group(groups, lambda members: panels(members, colour, ALONG), kind="small"),
        "cost": per_group(groups, lambda members: f"<div>{_cost(members, colour)}</div>"),
        "key": key(colour, methods),
    }
    data = samples(page, groups, BASELINE, "the reference")
    return Part("align", fields, data, styles=("training",), scripts=("samples",))


def _score(lines: Sequence[Row]) -> str:
    return str(lines[0]["raw"]["score"])


def _frontier(members: Members, colours: dict[str, int]) -> str:
    """Score gained against KL, a curve per method, a point per checkpoint."""
    name = _score(next(iter(members.values())))
    drawn = []
    for method, lines in members.items():
        steps = lines[0]["raw"]["curve"]["step"]
        score, kl = mean_curve(lines, name), mean_curve(lines, "kl")
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


def _along_kl(members: Members, colours: dict[str, int]) -> str:
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


def _cost(members: Members, colours: dict[str, int]) -> str:
    """Seconds before and in the training, median over seeds, with tokens per second and memory written beside them."""
    rows = []
    for method, lines in members.items():
        raws = [line["raw"] for line in lines]
        before, train = (float(np.median([raw[k] for raw in raws])) for k in ("preparation_seconds", "seconds"))
        speed = sum(raw["tokens"] for raw in raws) / sum(raw["seconds"] for raw in raws)
        memory = [raw["peak_memory_mb"] for raw in raws if raw.get("peak_memory_mb") is not None]
        said = f"{before + train:.1f} s, {speed:,.0f} tokens/s" + (f", {max(memory):,.0f} MB" if memory else "")
        hint = f"{method}: {before:.1f} s before the training, {train:.1f} s in it"
        rows.append(Spent(method, (("before", before), ("", train)), said, hint))
    return times(rows, colours)
