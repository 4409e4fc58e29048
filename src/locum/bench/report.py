"""What came out of a comparison, shown: a table for the terminal and one HTML file that opens offline.

The page is the same for every family but for the sections in its middle, a `Part`. Nothing is measured or decided here.
All text of users and models is escaped, and the page loads nothing from anywhere.
"""

import html as escaping
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text as RichText

from locum.bench.measures import Measure
from locum.bench.store import Row

__all__ = ["Page", "Part", "cell", "html", "html_table", "shown_title", "table", "text"]

TERMINAL = 100  # columns


@dataclass(frozen=True)
class Page:
    """All that the table and the report show.

    Args:
        title: what was compared, on what.
        headline: which method to use, and by how much.
        measures: the figures, in the order of the report's columns.
        columns: keys of the measures that the terminal's table has room for.
        main: key of the ratio that decides.
        note: what is to be known of the figures.
        pooled: whether figures over several groups mean something; the table has a part for each group otherwise.
        overall, groups: figures by method, and by method and group.
        kinds: method -> whose it is.
        lines: raw lines, for the samples.
        items: the items' texts.
        facts: how it was run: name and value.
        sound: whether a row of figures may be marked as the best: not one whose promise is broken.
    """

    title: str
    headline: str
    measures: tuple[Measure, ...]
    columns: tuple[str, ...]
    main: str
    note: str
    pooled: bool
    overall: list[Row]
    groups: list[Row]
    kinds: dict[str, Literal["ours", "peer", "plain"]]
    lines: list[Row]
    items: list[str]
    facts: dict[str, str] = field(default_factory=dict)
    sound: Callable[[Row], bool] = lambda row: True

    def measure(self, key: str) -> Measure:
        return next(m for m in self.measures if m.key == key)

    @property
    def blocks(self) -> dict[str, list[Row]]:
        """The table's parts, by name: one without a name, or one per group."""
        if self.pooled:
            return {"": self.overall}
        names = list(dict.fromkeys(r["group"] for r in self.groups))
        return {name: [r for r in self.groups if r["group"] == name] for name in names}


@dataclass(frozen=True)
class Part:
    """A family's own sections of the page: web/<name>.html, with .css and .js files beside it.

    Args:
        name: of the HTML.
        fields: what is put for the $names in the HTML; escaped already.
        data: what the scripts read, as JSON.
        styles, scripts: names of .css and .js files, one after the other; the HTML's own name if None.
    """

    name: str
    fields: dict[str, str]
    data: Row = field(default_factory=dict)
    styles: tuple[str, ...] | None = None
    scripts: tuple[str, ...] | None = None


def cell(row: Row, measure: Measure, interval: bool = True) -> str:
    """A figure as it is shown; an en dash where there is none."""
    value = row[measure.section].get(measure.key)
    if value is None:
        return "failed" if "error" in row else "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    limits = row[measure.section].get(f"{measure.key}_interval") if interval else None
    if not limits or limits[0] == limits[1]:
        return measure.shown(value)
    low, high = map(measure.shown, limits)
    return f"{measure.shown(value)} ({low}{' to ' if measure.signed else '–'}{high})"


def table(page: Page) -> Table:
    """The table for a terminal of 100 columns: figures over all items, then the main ratio per group; or group by group."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    # Columns are as wide as their widest word or figure: a head is wrapped, a figure never, a long name is cut off.
    main = page.measure(page.main)
    wide = [page.measure(k) for k in page.columns]
    names = list(dict.fromkeys(r["group"] for r in page.groups))
    names = names if page.pooled and 1 < len(names) <= 4 else []  # more have no room; the report shows them
    with_interval = {m.key: 26 if m.signed else 16 for m in wide if m.key == page.main}
    heads = [(m.title, with_interval.get(m.key, _width(m.title))) for m in wide] + [
        (f"on {n}", _width(n)) for n in names
    ]
    room = TERMINAL - 2 - sum(1 + width for _, width in heads)
    shown.add_column("method", no_wrap=True, max_width=max(room, 12))
    for title, width in heads:
        shown.add_column(title, justify="right", width=width)
    for block, rows in page.blocks.items():
        if block:
            shown.add_section()
            shown.add_row(RichText(block, style="bold"))
        for row in rows:
            cells = [cell(row, m, interval=m.key == page.main) for m in wide]
            if names:
                by = {r["group"]: r for r in page.groups if r["method"] == row["method"]}
                cells += [cell(by[n], main, interval=False) if n in by else "–" for n in names]
            style = {"ours": "", "peer": "cyan", "plain": "dim"}[page.kinds[row["method"]]]
            shown.add_row(RichText(row["method"]), *cells, style=style)
    return shown


def _width(title: str) -> int:
    return min(9, max(5, *map(len, title.split())))


def html(page: Page, part: Part) -> str:
    """The report: one HTML document that needs nothing beside it."""
    blocks = [
        (f"<h3>{text(name)}</h3>" if name else "") + html_table(page, rows, [m for m in page.measures if not m.aside])
        for name, rows in page.blocks.items()
    ]
    return Template(_web("report.html")).substitute(
        title=text(page.title),
        headline=text(page.headline),
        note=text(page.note),
        table="\n".join(blocks),
        style="".join(_web(f"{name}.css") for name in part.styles or (part.name,)),
        sections=Template(_web(f"{part.name}.html")).substitute(part.fields),
        script="".join(_web(f"{name}.js") for name in part.scripts or (part.name,)),
        measures="".join(_definition(m) for m in page.measures),
        facts="".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in page.facts.items()),
        failures=_failures(page.overall),
        data=_script(part.data),
    )


def _web(name: str) -> str:
    return resources.files("locum").joinpath(f"web/{name}").read_text("utf-8")


def html_table(page: Page, rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    """A table of those of the measures that somebody has, a row per method; it scrolls where it is too wide."""
    shown = [m for m in measures if any(r[m.section].get(m.key) is not None for r in rows)]
    sound = [r for r in rows if page.sound(r)]
    best = {m.key: _best(sound, m) for m in shown}
    heads = "".join(f'<th scope="col" title="{text(m.how)}">{text(shown_title(m))}{_unit(m)}</th>' for m in shown)
    settings = {
        (line["method"], line["group"]): line["raw"].get("settings", "") for line in page.lines if "raw" in line
    }
    body = []
    for row in rows:
        cells = []
        for m in shown:
            first = row in sound and best[m.key] is not None and row[m.section].get(m.key) == best[m.key]
            mark = ' class="best"' if first else ""
            value, _, limits = cell(row, m).partition(" (")
            cells.append(
                f"<td{mark}>{text(value)}" + (f"<small>{text(limits.rstrip(')'))}</small>" if limits else "") + "</td>"
            )
        hint = next((s for (m, g), s in settings.items() if m == row["method"] and g == row.get("group", g)), "")
        name = f'<th scope="row" title="{text(hint)}">{text(row["method"])}</th>'
        kind = page.kinds[row["method"]] + ("" if row in sound else " unsound")
        body.append(f'<tr class="{kind}">{name}{"".join(cells)}</tr>')
    head = f'<thead><tr><th scope="col">method</th>{heads}</tr></thead>'
    return f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>'


def _best(rows: Sequence[Row], measure: Measure) -> float | None:
    values = [
        v for r in rows if isinstance(v := r[measure.section].get(measure.key), int | float) and not isinstance(v, bool)
    ]
    if not values or measure.better not in ("higher", "lower") or len(set(values)) == 1:
        return None
    return max(values) if measure.better == "higher" else min(values)


def _unit(measure: Measure) -> str:
    return f" <i>{text(measure.unit)}</i>" if measure.unit else ""


def shown_title(measure: Measure) -> str:
    """The column's head where there is room: the terminal's may be broken after a slash."""
    return measure.title.replace("/ ", "/").replace(" /", "/")


def _definition(measure: Measure) -> str:
    better = {"higher": "higher is better", "lower": "lower is better", "yes": "yes is better", "": ""}[measure.better]
    unit = f", in {measure.unit}" if measure.unit else ""
    ending = f"; {better}" if better else ""
    return f"<dt>{text(shown_title(measure) + unit)}</dt><dd>{text(measure.how + ending)}.</dd>"


def _failures(rows: Sequence[Row]) -> str:
    failed = "".join(f"<li><b>{text(r['method'])}</b>: {text(r['error'])}</li>" for r in rows if "error" in r)
    return f'<section class="failures"><h2>What failed</h2><ul>{failed}</ul></section>' if failed else ""


def _script(data: Any) -> str:
    """JSON that may stand inside a <script>: nothing in it can end the element or open a comment."""
    made = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return made.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def text(value: object) -> str:
    """A value as text that may stand anywhere in the page."""
    return escaping.escape(str(value), quote=True)
