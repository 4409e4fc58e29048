"""The report's two drawings, as plain SVG and HTML: the frontier, and bars per group."""

import html as escaping
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bar", "Point", "bars", "frontier"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 46, 190, 14, 44
GAP = 19  # between two labels' baselines


@dataclass(frozen=True)
class Point:
    """One method on the frontier's plane; higher is better on both axes."""

    name: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Bar:
    """One method's ratio in a group, with its interval; None when it failed there."""

    name: str
    kind: str
    value: float | None
    limits: tuple[float, float] | None


def frontier(points: Sequence[Point], x_title: str, y_title: str, ideal: str = "") -> str:
    """Points, the line through those that none beats on both axes, and names at the right, each tied to its point.

    `ideal` names the dotted line y = x; "" leaves it out.
    """
    if not points:
        return '<p class="none">Nothing to draw: no method has both figures.</p>'
    x_ticks = _ticks(min(p.x for p in points), max(p.x for p in points))
    y_ticks = _ticks(min(p.y for p in points), max(p.y for p in points))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(y_title)} against {_text(x_title)}">']
    for t in x_ticks:
        x, _ = at(t, y_ticks[0])
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{t:g}</text>')
    for t in y_ticks:
        _, y = at(x_ticks[0], t)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{t:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_text(x_title)}</text>'
    )
    turned = f"translate(12 {(TOP + floor) / 2}) rotate(-90)"
    parts.append(f'<text class="axis" transform="{turned}" text-anchor="middle">{_text(y_title)}</text>')
    if ideal:
        low, high = max(x_ticks[0], y_ticks[0]), min(x_ticks[-1], y_ticks[-1])
        if low < high:
            (x0, y0), (x1, y1) = at(low, low), at(high, high)
            parts.append(
                f'<path class="ideal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"><title>{_text(ideal)}</title></path>'
            )
    best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p.x)
    path = "L".join("{:.1f} {:.1f}".format(*at(p.x, p.y)) for p in best)
    parts.append(f'<path class="frontier" d="M{path}"/>')
    placed = sorted(points, key=lambda p: -p.y)
    heights = _spread([at(p.x, p.y)[1] for p in placed], TOP + 8, floor)
    for p, label in zip(placed, heights, strict=True):
        x, y = at(p.x, p.y)
        parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{right + 6} {label:.1f}"/>')
        parts.append(f'<text class="label {p.kind}" x="{right + 10}" y="{label + 4:.1f}">{_text(p.name)}</text>')
    for p in placed:
        x, y = at(p.x, p.y)
        hint = f"{p.name}: {x_title} {p.x:.2f}, {y_title} {p.y:.2f}"
        parts.append(f'<circle class="{p.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{_text(hint)}</title></circle>')
    return "".join([*parts, "</svg>"])


def bars(groups: dict[str, list[Bar]], title: str) -> str:
    """One panel per group: a bar per method, its interval as a whisker, and a line at 1 (the reference)."""
    known = [v for g in groups.values() for b in g if b.value is not None for v in (b.value, *(b.limits or ()))]
    top = max([1.0, *known]) * 1.04
    panels = []
    for name, members in groups.items():
        rows = []
        for bar in sorted(members, key=lambda b: -(b.value or 0)):
            if bar.value is None:
                rows.append(
                    f'<div class="bar"><span class="name">{_text(bar.name)}</span><span class="lane">failed</span></div>'
                )
                continue
            whisker = ""
            if bar.limits:
                low, high = bar.limits
                whisker = f'<span class="whisker" style="left:{low / top:.2%};width:{(high - low) / top:.2%}"></span>'
            rows.append(
                f'<div class="bar"><span class="name">{_text(bar.name)}</span><span class="lane" style="--one:{1 / top:.2%}">'
                f'<span class="fill {bar.kind}" style="width:{bar.value / top:.2%}"></span>{whisker}</span>'
                f'<span class="value">{bar.value:.2f}×</span></div>'
            )
        panels.append(f'<div class="panel"><h3>{_text(name)}</h3>{"".join(rows)}</div>')
    return f'<div class="panels" aria-label="{_text(title)}">{"".join(panels)}</div>'


def _beats(q: Point, p: Point) -> bool:
    return q.x >= p.x and q.y >= p.y and (q.x > p.x or q.y > p.y)


def _ticks(low: float, high: float) -> list[float]:
    """Round values, about five, that enclose the range."""
    span = max(high - low, 0.1 * max(abs(high), 1e-9), 1e-9)
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first, last = math.floor((low - 0.05 * span) / step), math.ceil((high + 0.05 * span) / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Heights as near as they can be to the wanted ones (which ascend), `GAP` apart and within the limits."""
    heights: list[float] = []
    for y in wanted:
        heights.append(max(y, low, heights[-1] + GAP if heights else low))
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], high if i == len(heights) - 1 else heights[i + 1] - GAP)
    return heights


def _text(text: object) -> str:
    return escaping.escape(str(text), quote=True)
