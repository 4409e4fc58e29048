"""How a result of design-based supervised learning is laid out for people: three blocks of one width, and what is to be said."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from locum.errors import MissingExtra

if TYPE_CHECKING:
    from statsmodels.iolib.summary import Summary

__all__ = ["summary_of"]

WIDTH = 78  # of all blocks, where names are short
GAP = "  "


def summary_of(result: Any, alpha: float) -> "Summary":
    """The table that a regression's readers know, as text, LaTeX, HTML or CSV; simpler ways' estimates stand below it.

    Args:
        result: a `DSLResult`, which imports this.
        alpha: intervals cover with probability 1 - alpha.

    Raises:
        MissingExtra: without statsmodels, whose tables these are.
    """
    try:
        from statsmodels.iolib.summary import Summary
        from statsmodels.iolib.table import SimpleTable
    except ImportError:
        raise MissingExtra("DSLResult.summary", "infer") from None
    check = result.check()
    head, body, others = _head(result, check.figures), _coefficients(result, alpha), _simpler(result)
    total = max(WIDTH, *(_natural(block) for block in (head, body, others)))
    out = Summary()
    top = SimpleTable([row[1:2] for row in head], stubs=[row[0] for row in head], txt_fmt=_format(head, total))
    top.extend_right(SimpleTable([row[3:] for row in head], stubs=[row[2] for row in head]))
    top.title = "Design-based Supervised Learning"
    out.tables.append(top)
    for block, title in ((body, None), (others, "Without it (standard errors in parentheses)")):
        heads, *rows = block
        fmt = _format(block, total)
        out.tables.append(SimpleTable([r[1:] for r in rows], heads[1:], [r[0] for r in rows], title=title, txt_fmt=fmt))
    said = [check.text[:1].upper() + check.text[1:], *result.problem.notes]
    said += [f"{name}: {e.failed}" for name, e in result.fit.baselines.items() if e.failed]
    out.add_extra_txt([textwrap.fill(f"{text}.", total) for text in said])
    return out


def _head(result: Any, figures: Any) -> list[list[str]]:
    problem, worth = result.problem, figures["labels_worth"]
    left = {
        "Dep. Variable:": problem.outcome,
        "Model:": type(result.method.estimand).__name__,
        "Method:": "DSL",
        "Predicted:": ", ".join(problem.predicted),
        "Covariance Type:": "clustered" if problem.clusters is not None else "robust (HC0)",
    }
    right = {
        "No. Observations:": f"{result.nobs:,}",
        "Gold labels:": f"{result.ngold:,}",
        "Folds x splits:": f"{result.method.folds} x {len(result.fit.J)}" if result.fit.fits else "none fitted",
        "Design p-value:": f"{figures['design_p']:.3f}",
        "Worth of a label:": "" if worth is None else f"{worth:.2f}",
    }
    return [[*a, f"{GAP}{b[0]}", b[1]] for a, b in zip(left.items(), right.items(), strict=True)]


def _coefficients(result: Any, alpha: float) -> list[list[str]]:
    heads = ["", "coef", "std err", "z", "P>|z|", f"[{alpha / 2:g}", f"{1 - alpha / 2:g}]"]
    ends = result.conf_int(alpha)
    values = (result.params, result.bse, result.tvalues, result.pvalues, ends["lower"], ends["upper"])
    rows = [
        [str(name), _number(c, 4), _number(s, 3), f"{z:.3f}", f"{p:.3f}", _number(a, 3), _number(b, 3)]
        for name, c, s, z, p, a, b in zip(result.problem.names, *values, strict=True)
    ]
    return [heads, *rows]


def _simpler(result: Any) -> list[list[str]]:
    """A coefficient's estimates, and below each its standard error."""
    ways = result.fit.baselines
    block = [["", *ways]]
    for j, name in enumerate(result.problem.names):
        block.append([str(name), *("-" if e.failed else _number(e.theta[j], 4) for e in ways.values())])
        block.append(["", *("" if e.failed else f"({_number(e.se[j], 3)})" for e in ways.values())])
    return block


def _number(value: float, decimals: int) -> str:
    """Fixed decimals, but for what is very large or very small."""
    return f"{value:.{decimals}f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def _widths(block: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*block, strict=True)]


def _natural(block: Sequence[Sequence[str]]) -> int:
    widths = _widths(block)
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _format(block: Sequence[Sequence[str]], total: int) -> dict[str, Any]:
    """The block's form as text: what is left of the width goes to the columns that hold figures, or to the upper block's halves."""
    from statsmodels.iolib.tableformatting import fmt_params

    widths, left = _widths(block), total - _natural(block)
    grow = [1, 3] if block[0][0] else range(1, len(widths))
    for count, j in enumerate(grow):
        widths[j] += left // len(grow) + (count >= len(grow) - left % len(grow))
    return fmt_params | {"data_fmts": ["%s"], "colsep": GAP, "colwidths": widths}
