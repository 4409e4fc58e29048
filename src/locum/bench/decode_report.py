"""The decoders' sections of the report: the frontier, the speed by group of prompts, and the text token by token."""

from locum.bench.charts import Bar, Point, bars, frontier
from locum.bench.report import Page, Part, shown_title, text
from locum.bench.store import Row

__all__ = ["decode_part"]


def decode_part(page: Page, axes: tuple[str, str], ideal: str = "") -> Part:
    """The sections of web/decode.html.

    Args:
        page: the whole page.
        axes: keys of the frontier's two axes.
        ideal: names the line on which both are equal; "" for none.
    """
    fields = {
        "frontier": _frontier(page, axes, ideal),
        "bars": _bars(page),
        "main": text(page.measure(page.main).title),
    }
    return Part("decode", fields, _samples(page))


def _frontier(page: Page, axes: tuple[str, str], ideal: str) -> str:
    x, y = (page.measure(k) for k in axes)
    found = ((r, r[x.section].get(x.key), r[y.section].get(y.key)) for r in page.overall)
    points = [Point(r["method"], page.kinds[r["method"]], a, b) for r, a, b in found if a is not None and b is not None]
    return frontier(points, shown_title(x), shown_title(y), ideal)


def _bars(page: Page) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in page.groups:
        value, limits = (row["ratios"].get(k) for k in (page.main, f"{page.main}_interval"))
        bar = Bar(row["method"], page.kinds[row["method"]], value, tuple(limits) if limits else None)
        groups.setdefault(row["group"], []).append(bar)
    return bars(groups, page.measure(page.main).title)


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
