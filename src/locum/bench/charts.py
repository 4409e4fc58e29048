"""The report's drawings, as plain SVG and HTML: points and their frontier, bars per group, curves, differences from zero."""

import html as escaping
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Bar", "Difference", "Line", "Point", "Spot", "bars", "curves", "differences", "frontier"]

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


@dataclass(frozen=True)
class Spot:
    """One point of a curve, with its interval in y and what is said when one points at it."""

    x: float
    y: float
    limits: tuple[float, float] | None = None
    hint: str = ""


@dataclass(frozen=True)
class Line:
    """One method's curve; `colour` counts from 0, which is the baseline's."""

    name: str
    colour: int
    spots: Sequence[Spot]


@dataclass(frozen=True)
class Difference:
    """One method's distance from the baseline, with its interval, and how it is written."""

    name: str
    colour: int
    value: float
    limits: tuple[float, float] | None
    shown: str


class _Plane:
    """Two axes that hold the given values, and where a point of theirs lies in the drawing."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        width: int = WIDTH,
        height: int = HEIGHT,
        right: int = RIGHT,
        left: int = LEFT,
        room: float = 0.05,
    ) -> None:
        self.xs, self.ys = _ticks(min(xs), max(xs), room), _ticks(min(ys), max(ys), room)
        self.width, self.height, self.left, self.right, self.floor = width, height, left, width - right, height - BOTTOM

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (self.right - self.left)
        up = (y - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (self.floor - TOP)
        return self.left + across, self.floor - up

    def frame(self, x_title: str, y_title: str) -> list[str]:
        """The opening of the SVG, the grid and the titles."""
        label = f"{_text(y_title)} against {_text(x_title)}"
        parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">']
        for t in self.xs:
            x, _ = self.at(t, self.ys[0])
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{self.floor}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{self.floor + 16}" text-anchor="middle">{t:g}</text>')
        for t in self.ys:
            _, y = self.at(self.xs[0], t)
            parts.append(f'<path class="grid" d="M{self.left} {y:.1f}H{self.right}"/>')
            parts.append(f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{t:g}</text>')
        middle, below = (self.left + self.right) / 2, self.height - 8
        parts.append(f'<text class="axis" x="{middle}" y="{below}" text-anchor="middle">{_text(x_title)}</text>')
        turned = f"translate(12 {(TOP + self.floor) / 2}) rotate(-90)"
        parts.append(f'<text class="axis" transform="{turned}" text-anchor="middle">{_text(y_title)}</text>')
        return parts

    def labels(self, ends: Sequence[tuple[str, str, float, float]]) -> list[str]:
        """Names at the right, each tied to its point: (name, class, x, y), the highest first."""
        heights = _spread([self.at(x, y)[1] for _, _, x, y in ends], TOP + 8, self.floor)
        parts = []
        for (name, kind, x, y), label in zip(ends, heights, strict=True):
            across, up = self.at(x, y)
            parts.append(f'<path class="lead" d="M{across:.1f} {up:.1f}L{self.right + 6} {label:.1f}"/>')
            parts.append(f'<text class="label {kind}" x="{self.right + 10}" y="{label + 4:.1f}">{_text(name)}</text>')
        return parts

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "L".join("{:.1f} {:.1f}".format(*self.at(x, y)) for x, y in points)


def frontier(points: Sequence[Point], x_title: str, y_title: str, ideal: str = "") -> str:
    """Points, the line through those that none beats on both axes, and names at the right, each tied to its point.

    `ideal` names the dotted line y = x; "" leaves it out.
    """
    if not points:
        return '<p class="none">Nothing to draw: no method has both figures.</p>'
    plane = _Plane([p.x for p in points], [p.y for p in points])
    parts = plane.frame(x_title, y_title)
    if ideal:
        low, high = max(plane.xs[0], plane.ys[0]), min(plane.xs[-1], plane.ys[-1])
        if low < high:
            line = plane.path([(low, low), (high, high)])
            parts.append(f'<path class="ideal" d="M{line}"><title>{_text(ideal)}</title></path>')
    best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p.x)
    parts.append(f'<path class="frontier" d="M{plane.path([(p.x, p.y) for p in best])}"/>')
    placed = sorted(points, key=lambda p: -p.y)
    parts += plane.labels([(p.name, p.kind, p.x, p.y) for p in placed])
    for p in placed:
        x, y = plane.at(p.x, p.y)
        hint = f"{p.name}: {x_title} {p.x:.2f}, {y_title} {p.y:.2f}"
        parts.append(f'<circle class="{p.kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{_text(hint)}</title></circle>')
    return "".join([*parts, "</svg>"])


FEW = 8  # points of curves whose intervals are drawn one by one; of more, as a band


def curves(lines: Sequence[Line], x_title: str, y_title: str, *, small: bool = False, zero: bool = False) -> str:
    """A curve per method through its points, intervals around it, names at the right (not where it is `small`).

    `zero` draws the line at zero.
    """
    lines = [line for line in lines if line.spots]
    if not lines:
        return '<p class="none">Nothing to draw yet.</p>'
    spots = [s for line in lines for s in line.spots]
    ys = [y for s in spots for y in (s.y, *(s.limits or ()))] + ([0.0] if zero else [])
    named = max(RIGHT - 40, 8 * max(len(line.name) for line in lines) + 24)  # names stand right of the plane
    sizes = (400, 270, 14) if small else (WIDTH, HEIGHT, named)
    plane = _Plane([s.x for s in spots], ys, *sizes, left=LEFT + 12, room=0.0)
    few = max(len(line.spots) for line in lines) <= FEW
    parts = plane.frame(x_title, y_title)
    if zero:
        parts.append(f'<path class="zero" d="M{plane.path([(plane.xs[0], 0.0), (plane.xs[-1], 0.0)])}"/>')
    for line in lines:
        known = [(s, s.limits) for s in line.spots if s.limits]
        if known and not few:
            edge = [(s.x, high) for s, (_, high) in known] + [(s.x, low) for s, (low, _) in reversed(known)]
            parts.append(f'<path class="band c{line.colour}" d="M{plane.path(edge)}Z"/>')
        for s, (low, high) in known if few else ():
            parts.append(f'<path class="limits c{line.colour}" d="M{plane.path([(s.x, low), (s.x, high)])}"/>')
    for line in lines:
        parts.append(f'<path class="line c{line.colour}" d="M{plane.path([(s.x, s.y) for s in line.spots])}"/>')
    if not small:
        ends = sorted(((f"c{li.colour}", li.name, li.spots[-1]) for li in lines), key=lambda e: -e[2].y)
        parts += plane.labels([(name, colour, s.x, s.y) for colour, name, s in ends])
    for line in lines:
        kind = f"c{line.colour}" if few else "spot"  # of many only where one points at them
        for s in line.spots:
            x, y = plane.at(s.x, s.y)
            hint = f"<title>{_text(s.hint)}</title>" if s.hint else ""
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{hint}</circle>')
    return "".join([*parts, "</svg>"])


def differences(rows: Sequence[Difference], title: str) -> str:
    """A row per method: its distance from zero as a point, its interval as a whisker, both written beside it."""
    if not rows:
        return '<p class="none">Nothing to compare yet.</p>'
    values = [v for r in rows for v in (0.0, r.value, *(r.limits or ()))]
    ticks = _ticks(min(values), max(values), 0.01)
    left = max(144, 8 * max(len(r.name) for r in rows) + 20)  # names stand left of it
    right, floor = WIDTH - 206, 14 + 30 * len(rows)

    def at(x: float) -> float:
        return left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    parts = [f'<svg viewBox="0 0 {WIDTH} {floor + 44}" role="img" aria-label="{_text(title)}">']
    for t in ticks:
        kind = "zero" if t == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{at(t):.1f} 8V{floor}"/>')
        parts.append(f'<text class="tick" x="{at(t):.1f}" y="{floor + 16}" text-anchor="middle">{t:g}</text>')
    parts.append(
        f'<text class="axis" x="{(left + right) / 2}" y="{floor + 36}" text-anchor="middle">{_text(title)}</text>'
    )
    for i, r in enumerate(rows):
        y = 28 + 30 * i
        parts.append(
            f'<text class="label c{r.colour}" x="{left - 14}" y="{y + 4}" text-anchor="end">{_text(r.name)}</text>'
        )
        if r.limits:
            low, high = map(at, r.limits)
            parts.append(f'<path class="limits c{r.colour}" d="M{low:.1f} {y}H{high:.1f}"/>')
        parts.append(f'<circle class="c{r.colour}" cx="{at(r.value):.1f}" cy="{y}" r="5.5"/>')
        parts.append(f'<text class="figure" x="{right + 14}" y="{y + 4}">{_text(r.shown)}</text>')
    return "".join([*parts, "</svg>"])


def bars(groups: dict[str, list[Bar]], title: str, *, shortest: bool = False) -> str:
    """One panel per group: a bar per method, its interval as a whisker, and a line at 1 (the reference).

    The longest is first, or the `shortest`.
    """
    known = [v for g in groups.values() for b in g if b.value is not None for v in (b.value, *(b.limits or ()))]
    top = max([1.0, *known]) * 1.04
    panels = []
    for name, members in groups.items():
        rows = []
        for bar in sorted(
            members, key=lambda b: (b.value is None, b.value or 0) if shortest else (False, -(b.value or 0))
        ):
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


def _ticks(low: float, high: float, room: float = 0.05) -> list[float]:
    """Round values, about five, that enclose the range and some room on either side; zero is its own end."""
    span = max(high - low, 0.1 * max(abs(high), 1e-9), 1e-9)
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    edge = 0.0 if low == 0 else room * span
    first, last = math.floor((low - edge) / step + 1e-9), math.ceil((high + room * span) / step - 1e-9)
    last += first == last
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
