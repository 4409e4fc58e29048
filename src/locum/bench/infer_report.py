"""The sections of a comparison of regressions: who covers, how large errors are, interval by interval, how the surrogate errs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from locum.bench.charts import Bar, bars
from locum.bench.infer_measures import NOMINAL, Drawn, beside, binomial, covers, drawn, versus
from locum.bench.infer_methods import BASELINE, Way
from locum.bench.report import Page, Part, html_table, text
from locum.bench.store import Row
from locum.bench.training_report import Groups, groups_of

__all__ = ["infer_part"]

COSTS = ("gold_labels", "seconds", "fits", "failed", "width", "rmse")
BIAS_TO = 4.0  # standard errors at which a dot of the bias leaves its lane
ABREAST = 4  # coefficients of which a lane has room for its figure beside it
MOST = 400  # replications that are drawn one by one


def _share(x: float) -> str:
    return f"{100 * x:.1f} %"


@dataclass(frozen=True)
class _Dot:
    """A figure of one coefficient on its lane: where it lies and its interval, from 0 to 1, what is written, whether it is bad."""

    at: float
    limits: tuple[float, float] | None
    shown: str
    hint: str
    bad: bool = False


def infer_part(page: Page) -> Part:
    """The sections of web/infer.html."""
    groups = groups_of(page)
    fields = {
        "coverage": _grids(page, groups, _coverage, NOMINAL),
        "errors": _bars(page),
        "bias": _grids(page, groups, _bias, 0.5, " level"),
        "against": _grids(page, groups, _against, 0.5, " level"),
        "surrogate": _surrogate(groups),
        "costs": "".join(
            f"<h3>{text(name)}</h3>{html_table(page, rows, [page.measure(k) for k in COSTS])}"
            for name, rows in page.blocks.items()
        ),
    }
    return Part("infer", fields, _intervals(page, groups))


def _drawn(lines: Sequence[Row]) -> Drawn:
    return drawn([line["raw"] for line in lines])


def _grids(page: Page, groups: Groups, dots: Callable[[Sequence[Row]], list[_Dot]], line: float, kind: str = "") -> str:
    """A table per group: a row per method, a column per coefficient, in each a dot on a lane.

    Args:
        dots: those of one method's lines, one per coefficient.
        line: where the lanes' mark is, from 0 to 1.
        kind: " level" where a dot that is not bad need not be good.
    """
    out = []
    for group, members in groups.items():
        made = {method: dots(lines) for method, lines in members.items()}
        names = next(iter(members.values()))[0]["raw"]["names"]
        heads = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
        rows = "".join(
            f'<tr class="{page.kinds[method]}"><th scope="row" title="{text(method)}">{text(method)}</th>{"".join(map(_cell, found))}</tr>'
            for method, found in made.items()
            if found
        )
        head = f'<thead><tr><th scope="col"></th>{heads}</tr></thead>'
        many = " many" if len(names) > ABREAST else ""
        table = f'<table class="lanes{kind}{many}" style="--line:{line:.1%}">{head}<tbody>{rows}</tbody></table>'
        out.append(f'<h3>{text(group)}</h3><div class="scroll">{table}</div>')
    return "".join(out) or '<p class="none">Nothing to show yet.</p>'


def _cell(dot: _Dot) -> str:
    whisker = ""
    if dot.limits:
        low, high = dot.limits
        whisker = f'<i class="whisker" style="left:{low:.2%};width:{max(high - low, 0):.2%}"></i>'
    return (
        f'<td class="{"bad" if dot.bad else "good"}" title="{text(dot.hint)}"><span class="lane">{whisker}'
        f'<i class="dot" style="left:{dot.at:.2%}"></i></span><span class="value">{text(dot.shown)}</span></td>'
    )


def _coverage(lines: Sequence[Row]) -> list[_Dot]:
    """Share of the intervals that hold the truth, with its binomial interval; red where the coefficient alone does not cover."""
    found, out = _drawn(lines), list[_Dot]()
    n, enough = len(found.error), covers(found)
    for j, name in enumerate(found.names):
        hits = int(found.covered[:, j].sum())
        low, high = binomial(hits, n)
        hint = f"{name}: {hits} of {n} intervals hold the truth, {_share(low)} to {_share(high)}"
        out.append(_Dot(hits / n, (low, high), _share(hits / n), hint, not bool(enough[j])))
    return out


def _bias(lines: Sequence[Row]) -> list[_Dot]:
    """Mean error in standard errors that the method claims, with what chance leaves open; red where more than chance."""
    whole = _drawn(lines)
    found, out = Drawn(whole.names, whole.error[whole.known], whole.se[whole.known]), list[_Dot]()
    if not len(found.error):
        return out
    for j, name in enumerate(found.names):
        unit = found.se[:, j].mean()
        value = found.error[:, j].mean() / unit
        reach = Way.z * found.error[:, j].std() / unit / np.sqrt(len(found.error))
        low, middle, high = (float(np.clip(0.5 + x / BIAS_TO / 2, 0, 1)) for x in (value - reach, value, value + reach))
        hint = f"{name}: mean error {found.error[:, j].mean():+.4f}, mean standard error {unit:.4f}"
        out.append(_Dot(middle, (low, high), f"{value:+.2f}", hint, bool(abs(value) - reach > 0.25)))
    return out


def _against(lines: Sequence[Row]) -> list[_Dot]:
    """Root mean square error by that of gold labels alone, from none to twice as much."""
    pair, out = beside(lines), list[_Dot]()
    if pair is None:
        return out
    sound = bool(covers(_drawn(lines)).all())
    for j, name in enumerate(pair[0].names):
        mine, gold = (Drawn((name,), d.error[:, [j]], d.se[:, [j]]) for d in pair)
        value = float(versus(mine, gold, np.ones(len(mine.error))))
        square, theirs = (float((d.error**2).mean()) for d in (mine, gold))
        hint = f"{name}: RMSE {square**0.5:.4f}, of gold labels alone {theirs**0.5:.4f}"
        out.append(_Dot(min(value / 2, 1.0), None, f"{value:.2f}×", hint, not sound))
    return out


def _bars(page: Page) -> str:
    """The error of every method by gold labels' own; those that do not cover are hatched."""
    groups: dict[str, list[Bar]] = {}
    for row in page.groups:
        value, limits = (row["ratios"].get(k) for k in (page.main, f"{page.main}_interval"))
        kind = page.kinds[row["method"]] + ("" if page.sound(row) else " misses")
        groups.setdefault(row["group"], []).append(Bar(row["method"], kind, value, tuple(limits) if limits else None))
    return bars(groups, page.measure(page.main).title, shortest=True)


def _surrogate(groups: Groups) -> str:
    """How the surrogate errs, in parts of the rows: means over the seeds."""
    heads = {
        "share": ("share of rows", _share),
        "gold": ("gold says 1", _share),
        "invented": ("says 1 for 0", _share),
        "missed": ("says 0 for 1", _share),
        "right": ("right", _share),
        "bias": ("mean error", "{:+.3f}".format),
        "spread": ("its spread", "{:.3f}".format),
        "r": ("correlation", "{:.3f}".format),
    }
    out = []
    for group, members in groups.items():
        tables = [line["raw"]["surrogate"] for line in members.get(BASELINE, ()) if line["raw"]["surrogate"]]
        if not tables:
            continue
        shown = {k: v for k, v in heads.items() if any(k in row for table in tables for row in table)}
        body = []
        for part in dict.fromkeys(row["part"] for table in tables for row in table):
            rows = [row for table in tables for row in table if row["part"] == part]
            cells = "".join(f"<td>{text(_mean_of(rows, key, write))}</td>" for key, (_, write) in shown.items())
            body.append(f'<tr><th scope="row">{text(part)}</th>{cells}</tr>')
        head = "".join(f'<th scope="col">{text(title)}</th>' for title, _ in shown.values())
        out.append(
            f'<div class="panel"><h3>{text(group)}</h3><div class="scroll"><table><thead><tr><th scope="col"></th>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div></div>"
        )
    return f'<div class="surrogates">{"".join(out)}</div>' if out else '<p class="none">Nothing to show.</p>'


def _mean_of(rows: Sequence[Row], key: str, write: Callable[[float], str]) -> str:
    known = [v for row in rows if (v := row.get(key)) is not None]
    return write(float(np.mean(known))) if known else "–"


def _intervals(page: Page, groups: Groups) -> Row:
    """What web/infer.js draws: errors and standard errors of every replication, nan left out, per group, method and coefficient."""
    out = []
    for name, members in groups.items():
        first = next(iter(members.values()))[0]["raw"]
        methods = []
        for method, lines in members.items():
            found = _drawn(lines)
            some = np.flatnonzero(found.known)[:MOST]
            methods.append(
                {
                    "name": method,
                    "kind": page.kinds[method],
                    "held": found.covered.sum(0).tolist(),
                    "of": len(found.error),
                    "error": [[_four(x) for x in found.error[some, j]] for j in range(len(found.names))],
                    "se": [[_four(x) for x in found.se[some, j]] for j in range(len(found.names))],
                }
            )
        out.append({"name": name, "coefficients": first["names"], "truth": first["truth"], "methods": methods})
    return {"z": Way.z, "nominal": NOMINAL, "baseline": BASELINE, "groups": out}


def _four(x: float) -> float:
    """Four digits: more than a drawing shows."""
    return float(f"{x:.4g}")
