"""The sections of a comparison of reinforcement recipes: what tokens buy, GRPO beside each, what it stands on, pipelines, samples."""

from collections.abc import Mapping, Sequence

import numpy as np

from locum.bench.charts import Line, Spot, curves
from locum.bench.reinforce_measures import AXES, BASELINE, along
from locum.bench.report import Page, Part, html_table, text
from locum.bench.store import Row
from locum.bench.training_report import (
    Members,
    Spent,
    colours,
    distances,
    groups_of,
    key,
    panels,
    per_group,
    samples,
    times,
)

__all__ = ["reinforce_part"]

LONG = 24  # letters of a name that a drawing has room for
STANDS_ON = ("level_groups", "kept_rows", "kept_tokens", "clipped", "drift", "kl", "entropy", "length")
COSTS = (
    "sampled_tokens",
    "sampled_vs_grpo",
    "trained_tokens",
    "trained_vs_grpo",
    "rollout_seconds",
    "old_policy_seconds",
    "update_seconds",
    "seconds",
    "time_vs_grpo",
    "peak_memory_mb",
)
ALONG = {  # what is drawn against the steps, and how it is called
    "entropy": "entropy, nats per token",
    "length": "tokens of an answer",
    "kl": "KL to the start, nats",
    "best": "best of k",
    "level_groups": "share of level groups",
    "kept_tokens": "share of tokens kept",
    "clipped": "share of tokens clipped",
}


def reinforce_part(page: Page) -> Part:
    """The sections of web/reinforce.html."""
    groups = groups_of(page)
    methods = [r["method"] for r in page.overall]
    colour = colours(methods, BASELINE)

    def against(members: Members) -> str:
        both = {page.main: "sampled", "vs_grpo_trained": "trained"}
        drawn = (
            distances(page, members, colour, BASELINE, of, f"reward at equal {axis} tokens, less GRPO's")
            for of, axis in both.items()
        )
        return "".join(f"<div>{chart}</div>" for chart in drawn)

    def figures(keys: Sequence[str]) -> str:
        measures = [page.measure(k) for k in keys]
        return "".join(
            f"<h3>{text(name)}</h3>" + html_table(page, [r for r in page.groups if r["group"] == name], measures)
            for name in groups
        )

    fields = {
        "key": key(colour, methods),
        "overview": per_group(groups, lambda members: _overview(members, colour)),
        "differences": per_group(groups, against),
        "beside": per_group(groups, lambda members: _beside(members, colour), kind="small"),
        "stands_on": figures(STANDS_ON),
        "along": per_group(groups, lambda members: panels(_windows(members), colour, ALONG), kind="small"),
        "costs": figures(COSTS),
        "time": per_group(groups, lambda members: f"<div>{_time(members, colour)}</div>"),
        "pipelines": _pipelines(page, methods, colour),
    }
    data = samples(page, groups, BASELINE, "before training")
    return Part("reinforce", fields, data, styles=("training", "reinforce"), scripts=("samples", "reinforce"))


def _line(method: str, lines: Sequence[Row], axis: str, colour: int, limits: bool) -> Line:
    """The held-out reward against what was spent; tokens in thousands."""
    unit = 1 if axis == "step" else 1000
    spots = []
    for x, y, found in along(lines, axis):
        said = f" ({found[0]:.3f}–{found[1]:.3f})" if found else ""
        hint = f"{method}, {AXES[axis]} {x:,.0f}: {y:.3f}{said}"
        spots.append(Spot(x / unit, y, found if limits else None, hint))
    return Line(method if len(method) <= LONG else f"{method[: LONG - 1]}…", colour, spots)


def _title(axis: str) -> str:
    return AXES[axis] if axis == "step" else f"{AXES[axis]}, thousands"


def _overview(members: Members, colour: Mapping[str, int]) -> str:
    """All recipes against each kind of spending."""
    drawn = []
    for axis in AXES:
        lines = [_line(m, lines, axis, colour[m], limits=False) for m, lines in members.items()]
        drawn.append(f"<div>{curves(lines, _title(axis), 'held-out reward')}</div>")
    return "".join(drawn)


def _beside(members: Members, colour: Mapping[str, int]) -> str:
    """Each recipe with GRPO beside it, with intervals, against sampled tokens."""
    out = []
    for method, lines in members.items():
        if method == BASELINE or BASELINE not in members:
            continue
        pair = [
            _line(BASELINE, members[BASELINE], "sampled", 0, limits=True),
            _line(method, lines, "sampled", colour[method], limits=True),
        ]
        chart = curves(pair, _title("sampled"), "held-out reward", small=True)
        name = f'<span class="key c{colour[method]}"><i></i>{text(method)}</span>'
        out.append(f"<div>{name}{chart}</div>")
    return "".join(out)


def _windows(members: Members) -> Members:
    """The lines with the figures of the steps as curves too: means over the steps that led to each checkpoint."""
    return {
        m: [line | {"raw": line["raw"] | {"curve": _curve(line["raw"])}} for line in lines]
        for m, lines in members.items()
    }


def _curve(made: Row) -> Row:
    curve, log = made["curve"], made["log"]
    clipped = [
        None if None in pair else sum(pair) for pair in zip(log["clipped_low"], log["clipped_high"], strict=True)
    ]
    found = {}
    for name, values in {
        "level_groups": log["level_groups"],
        "kept_tokens": log["kept_tokens"],
        "clipped": clipped,
    }.items():
        spans = zip(curve["step"], curve["step"][1:], strict=False)
        known = [[v for v in values[a:b] if v is not None] for a, b in spans]
        found[name] = [None, *(float(np.mean(span)) if span else None for span in known)]
    return curve | found


def _time(members: Members, colour: Mapping[str, int]) -> str:
    """Seconds by phase, median over seeds."""
    rows = []
    for method, lines in members.items():
        phases = [line["raw"]["phases"] for line in lines]
        rollout, old, update = (float(np.median([p[k] for p in phases])) for k in ("rollout", "old_policy", "update"))
        said = f"{rollout:.1f} + {old:.1f} + {update:.1f} s"
        hint = f"{method}: {rollout:.2f} s of sampling and rewards, {old:.2f} s of the old policy's pass, {update:.2f} s of updates"
        rows.append(Spent(method, (("before", rollout), ("between", old), ("", update)), said, hint))
    return times(rows, colour)


def _pipelines(page: Page, methods: Sequence[str], colour: Mapping[str, int]) -> str:
    """Each recipe as a row of boxes, and its YAML."""
    made = {line["method"]: line["raw"] for line in page.lines if "raw" in line}
    plain = [s["stage"] for s in made[BASELINE]["recipe"]["pipeline"]] if BASELINE in made else []
    out = []
    for method in (m for m in methods if m in made):
        whole, stages = made[method]["settings"], made[method]["recipe"]["pipeline"]
        host = whole.split(" + ")[0]
        boxes: dict[str, str] = {"batch": "", "minibatch": ""}
        for s in stages:
            kind = "own" if s["from"] != host else "other" if s["stage"] not in plain else ""
            boxes[s["each"]] += (
                f'<div class="stage {kind}" title="from {text(s["from"])}"><small>{text(s["slot"])}</small>'
                f"<span>{text(s['stage'])}</span></div>"
            )
        said = f"<code>{text(whole)}</code>" if whole != method else ""
        out.append(
            f'<div class="recipe c{colour[method]}"><h3>{text(method)}</h3>{said}<div class="pipe">{boxes["batch"]}'
            f'<div class="each"><small>every minibatch</small>{boxes["minibatch"]}</div></div>'
            f"<details><summary>as YAML</summary><pre>{text(made[method]['recipe']['yaml'])}</pre></details></div>"
        )
    return "".join(out)
