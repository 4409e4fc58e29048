"""What a comparison against a baseline comes to, in one honest sentence: better only where the whole interval says so."""

from collections.abc import Sequence

from locum.bench.store import Row

__all__ = ["in_words", "verdict"]


def verdict(rows: Sequence[Row], of: str, on: str, beats: str, score: str, over: str, seeds: int) -> str:
    """The best method by a difference from the baseline, by how much, and whether that is more than chance.

    Args:
        rows: figures of the methods that are compared, the baseline left out; at least one.
        of: the difference's key among the ratios; its interval is beside it.
        on: the group.
        beats: the baseline, and where the two are compared: "DPO at equal KL".
        score: what is higher.
        over: what the interval is over.
        seeds: where there is no interval, of how many the figure is.
    """
    sure = [r for r in rows if (r["ratios"][f"{of}_interval"] or (0,))[0] > 0]
    best = max(sure or rows, key=lambda r: r["ratios"][of])
    value, limits = best["ratios"][of], best["ratios"][f"{of}_interval"]
    chance = (
        f"95 % interval {limits[0]:+.3f} to {limits[1]:+.3f} {over}" if limits else f"{in_words(seeds)}, so no interval"
    )
    if sure:
        more = [r["method"] for r in sure if r is not best]
        also = f"; so {'do' if len(more) > 1 else 'does'} {', '.join(more)}" if more else ""
        return f"On {on} {best['method']} beats {beats}: {score} {value:+.3f} ({chance}){also}."
    verb = "beats" if limits and limits[1] <= 0 else "surely beats"
    among = f", the best of {len(rows)}," if len(rows) > 1 else ""
    return f"On {on} no method {verb} {beats}: {best['method']}{among} has {score} {value:+.3f} ({chance})."


def in_words(seeds: int) -> str:
    """A number of seeds."""
    return f"{seeds} seeds" if seeds > 1 else "one seed"
