"""What came out of a comparison, shown: a table for the terminal and one HTML file that opens offline.

Nothing is measured or decided here. All text of users and models is escaped, and the page loads nothing from anywhere.
"""

import html as escaping
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text as RichText

from locum.bench.charts import Bar, Point, bars, frontier
from locum.bench.measures import Measure
from locum.bench.store import Row

__all__ = ["Page", "cell", "html", "table"]


@dataclass(frozen=True)
class Page:
    """All that the table and the report show.

    Args:
        title: what was compared, on what.
        headline: which method to use, and by how much.
        measures: the figures, in the order of the report's columns.
        columns: keys of the measures that the terminal's table has room for.
        main: key of the ratio that decides; it is drawn per group.
        axes: keys of the frontier's two axes; `ideal` names the line on which both are equal, "" for none.
        overall, groups: figures by method, and by method and group.
        kinds: method -> whose it is.
        lines: raw lines, for the samples.
        items: the items' texts.
        facts: how it was run: name and value.
    """

    title: str
    headline: str
    measures: tuple[Measure, ...]
    columns: tuple[str, ...]
    main: str
    axes: tuple[str, str]
    ideal: str
    overall: list[Row]
    groups: list[Row]
    kinds: dict[str, Literal["ours", "peer", "plain"]]
    lines: list[Row]
    items: list[str]
    facts: dict[str, str] = field(default_factory=dict)

    def measure(self, key: str) -> Measure:
        return next(m for m in self.measures if m.key == key)


def cell(row: Row, measure: Measure, interval: bool = True) -> str:
    """A figure as it is shown; an en dash where there is none."""
    value = row[measure.section].get(measure.key)
    if value is None:
        return "failed" if "error" in row else "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    shown = f"{value * 100:.0f} %" if measure.unit == "%" else f"{value:.{measure.digits}f}"
    limits = row[measure.section].get(f"{measure.key}_interval") if interval else None
    if not limits or limits[0] == limits[1]:
        return shown
    return f"{shown} ({limits[0]:.{measure.digits}f}–{limits[1]:.{measure.digits}f})"


def table(page: Page) -> Table:
    """The table for a terminal of 100 columns: figures over all items, then the main ratio per group."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    shown.add_column("method", no_wrap=True)
    # Columns are as wide as their widest word or figure: a head is wrapped, a figure never.
    main = page.measure(page.main)
    wide = [page.measure(k) for k in page.columns]
    names = list(dict.fromkeys(r["group"] for r in page.groups))
    for measure in wide:
        shown.add_column(
            measure.title, justify="right", width=16 if measure.key == page.main else _width(measure.title)
        )
    names = names if 1 < len(names) <= 4 else []  # more have no room; the report shows them
    for name in names:
        shown.add_column(f"on {name}", justify="right", width=_width(name))
    for row in page.overall:
        cells = [cell(row, m, interval=m.key == page.main) for m in wide]
        if names:
            by = {r["group"]: r for r in page.groups if r["method"] == row["method"]}
            cells += [cell(by[n], main, interval=False) if n in by else "–" for n in names]
        style = {"ours": "", "peer": "cyan", "plain": "dim"}[page.kinds[row["method"]]]
        shown.add_row(RichText(row["method"]), *cells, style=style)
    return shown


def _width(title: str) -> int:
    return min(9, max(5, *map(len, title.split())))


def html(page: Page) -> str:
    """The report: one HTML document that needs nothing beside it."""
    template = Template(resources.files("locum").joinpath("web/report.html").read_text("utf-8"))
    return template.substitute(
        title=_text(page.title),
        headline=_text(page.headline),
        table=_html_table(page),
        frontier=_frontier(page),
        bars=_bars(page),
        main=_text(page.measure(page.main).title),
        measures="".join(_definition(m) for m in page.measures),
        facts="".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in page.facts.items()),
        failures=_failures(page.overall),
        samples=_script(_samples(page)),
    )


def _frontier(page: Page) -> str:
    x, y = (page.measure(k) for k in page.axes)
    found = ((r, r[x.section].get(x.key), r[y.section].get(y.key)) for r in page.overall)
    points = [Point(r["method"], page.kinds[r["method"]], a, b) for r, a, b in found if a is not None and b is not None]
    return frontier(points, _title(x), _title(y), page.ideal)


def _bars(page: Page) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in page.groups:
        value, limits = (row["ratios"].get(k) for k in (page.main, f"{page.main}_interval"))
        bar = Bar(row["method"], page.kinds[row["method"]], value, tuple(limits) if limits else None)
        groups.setdefault(row["group"], []).append(bar)
    return bars(groups, page.measure(page.main).title)


def _html_table(page: Page) -> str:
    shown = [m for m in page.measures if any(r[m.section].get(m.key) is not None for r in page.overall)]
    best = {m.key: _best(page.overall, m) for m in shown}
    heads = "".join(f'<th scope="col" title="{_text(m.how)}">{_text(_title(m))}{_unit(m)}</th>' for m in shown)
    settings = {line["method"]: line.get("raw", {}).get("settings", "") for line in page.lines}
    body = []
    for row in page.overall:
        cells = []
        for m in shown:
            mark = ' class="best"' if best[m.key] is not None and row[m.section].get(m.key) == best[m.key] else ""
            value, _, limits = cell(row, m).partition(" (")
            cells.append(
                f"<td{mark}>{_text(value)}"
                + (f"<small>{_text(limits.rstrip(')'))}</small>" if limits else "")
                + "</td>"
            )
        name = f'<th scope="row" title="{_text(settings.get(row["method"], ""))}">{_text(row["method"])}</th>'
        body.append(f'<tr class="{page.kinds[row["method"]]}">{name}{"".join(cells)}</tr>')
    return f'<table><thead><tr><th scope="col">method</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _best(rows: Sequence[Row], measure: Measure) -> float | None:
    values = [
        v for r in rows if isinstance(v := r[measure.section].get(measure.key), int | float) and not isinstance(v, bool)
    ]
    if not values or measure.better not in ("higher", "lower") or len(set(values)) == 1:
        return None
    return max(values) if measure.better == "higher" else min(values)


def _unit(measure: Measure) -> str:
    return f" <i>{_text(measure.unit)}</i>" if measure.unit else ""


def _title(measure: Measure) -> str:
    """The column's head where there is room: the terminal's may be broken after a slash."""
    return measure.title.replace("/ ", "/").replace(" /", "/")


def _definition(measure: Measure) -> str:
    better = {"higher": "higher is better", "lower": "lower is better", "yes": "yes is better", "": ""}[measure.better]
    unit = f", in {measure.unit}" if measure.unit else ""
    ending = f"; {better}" if better else ""
    return f"<dt>{_text(_title(measure) + unit)}</dt><dd>{_text(measure.how + ending)}.</dd>"


def _failures(rows: Sequence[Row]) -> str:
    failed = "".join(f"<li><b>{_text(r['method'])}</b>: {_text(r['error'])}</li>" for r in rows if "error" in r)
    return f'<section class="failures"><h2>What failed</h2><ul>{failed}</ul></section>' if failed else ""


def _samples(page: Page) -> Row:
    """Per method and item the text piece by piece: the forward pass it came from, its place among accepted drafts, the times."""
    samples: dict[str, dict[int, Row]] = {}
    for line in page.lines:
        if "sample" in line.get("raw", {}):
            samples.setdefault(line["method"], {}).setdefault(line["item"], line["raw"]["sample"])
    groups = {line["item"]: line["group"] for line in page.lines}
    items = [{"group": groups[i], "text": text} for i, text in enumerate(page.items) if i in groups]
    keys = [i for i in range(len(page.items)) if i in groups]
    return {"methods": list(samples), "kinds": page.kinds, "items": items, "keys": keys, "samples": samples}


def _script(data: Any) -> str:
    """JSON that may stand inside a <script>: nothing in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _text(text: object) -> str:
    return escaping.escape(str(text), quote=True)
