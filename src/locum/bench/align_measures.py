"""What is said of a preference method: the one table of its measures, and the comparison at equal KL that decides.

A raw line holds "curve": per checkpoint, the reference first, the step, KL(policy || reference) of a response, its reward
(None where nobody gives one), the share of held-out pairs told right, entropy and length. "score" names what is compared:
"reward" where there is one, else "accuracy". "by_prompt" has KL and score of every held-out prompt per checkpoint, where
they were measured on samples.
"""

from collections.abc import Sequence

import numpy as np

from locum.bench.measures import PEAK_MEMORY, Measure, last, mean, mean_interval, median, paired_limits, ratio, raw
from locum.bench.store import Row

__all__ = ["BASELINE", "MEASURES", "along_kl", "at_levels", "score_limits"]

BASELINE = "dpo"
LEVELS = (0.25, 0.5, 0.75, 1.0)  # of the largest KL that both reached
DRAWS = 1000
MOVED = 1e-3  # nats: a policy that stays nearer than this to the reference is not compared
SEEN = 2.0  # DPO's gain is a yardstick if it is so many of its standard errors

Path = tuple[Sequence[float], Sequence[float]]  # KL and score along the training


def path(raw: Row, prompts: np.ndarray | None = None) -> Path:
    """KL and score at every checkpoint; over some of the held-out prompts if these are given."""
    if prompts is None:
        return raw["curve"]["kl"], raw["curve"][raw["score"]]
    kl, score = (np.asarray(raw["by_prompt"][name])[:, prompts].mean(-1) for name in ("kl", "score"))
    return kl.tolist(), score.tolist()


def at_levels(found: Path, levels: Sequence[float]) -> list[float | None]:
    """The score when KL first reached each level; None for a level that it never reached."""
    from locum.align.table import Curve, at_kl

    kl, score = found
    return at_kl(Curve(reward=list(score), kl=list(kl)), list(levels))


def common_kl(*paths: Path) -> float:
    """The largest KL that all of them reached."""
    return min(max(kl) for kl, _ in paths)


def _gains(line: Row, prompts: np.ndarray | None = None) -> tuple[float, float] | None:
    """Score gained over the reference by the method and by DPO, mean over KL levels that both reached."""
    beside = line["refs"].get(BASELINE)
    if beside is None:
        return None
    paths = path(line["raw"], prompts), path(beside, prompts)
    reached = common_kl(*paths)
    if not reached > MOVED:
        return None
    levels = [share * reached for share in LEVELS]
    mine, theirs = (np.mean([x for x in at_levels(p, levels) if x is not None]) - p[1][0] for p in paths)
    return float(mine), float(theirs)


def _difference(line: Row, prompts: np.ndarray | None = None) -> float | None:
    gains = _gains(line, prompts)
    return None if gains is None else gains[0] - gains[1]


def _limits(lines: Sequence[Row]) -> tuple[float, float] | None:
    return paired_limits(lines, _difference, BASELINE, DRAWS)


def along_kl(lines: Sequence[Row], levels: int = 24) -> list[tuple[float, float, tuple[float, float] | None]]:
    """At levels of KL that the method and DPO reached with every seed: the level, score less DPO's, interval over seeds."""
    pairs = [(path(line["raw"]), path(line["refs"][BASELINE])) for line in lines if line["refs"].get(BASELINE)]
    reached = min((common_kl(*pair) for pair in pairs), default=0.0)
    if not reached > MOVED:
        return []
    at = [reached * (i + 1) / levels for i in range(levels)]
    found = [[at_levels(p, at) for p in pair] for pair in pairs]
    rows = []
    for i, level in enumerate(at):
        both = [(mine[i], theirs[i]) for mine, theirs in found]
        gaps = [a - b for a, b in both if a is not None and b is not None]
        if gaps:
            limits = mean_interval(gaps, draws=DRAWS) if len(gaps) > 1 else None
            rows.append((level, float(np.mean(gaps)), limits))
    return rows


def score_limits(lines: Sequence[Row], at: int) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean score gained at one checkpoint, over seeds, or over prompts for a single seed."""
    raws = [line["raw"] for line in lines]
    if len(raws) == 1 and "by_prompt" in raws[0]:
        score = np.asarray(raws[0]["by_prompt"]["score"])
        gained = score[at] - score[0]
    else:
        gained = np.asarray([raw["curve"][raw["score"]][at] - raw["curve"][raw["score"]][0] for raw in raws])
    return mean_interval(gained, draws=DRAWS) if len(gained) > 1 and at else None


def _share_of_gain(lines: Sequence[Row]) -> float | None:
    """The gain at equal KL by DPO's; None where DPO's own gain is not clearly above 0."""
    gains = [g for line in lines if (g := _gains(line)) is not None]
    if not gains:
        return None
    mine, theirs = np.asarray(gains).mean(0)
    noise = 0.0
    if all("by_prompt" in line["refs"][BASELINE] for line in lines if line["refs"].get(BASELINE)):
        spread = [np.asarray(line["refs"][BASELINE]["by_prompt"]["score"]) for line in lines if line["refs"]]
        noise = float(np.mean([np.std(s[-1] - s[0]) / np.sqrt(s.shape[1]) for s in spread]))
    return float(mine / theirs) if theirs > max(1e-9, SEEN * noise) else None


def _gained(line: Row) -> float | None:
    values = line["raw"]["curve"].get("reward")
    return None if not values else values[-1] - values[0]


def _time_by_baseline(line: Row) -> float | None:
    beside = line["refs"].get(BASELINE)
    total = [sum(raw[k] for k in ("seconds", "preparation_seconds")) for raw in (line["raw"], beside) if raw]
    return total[0] / total[1] if len(total) == 2 and total[1] else None


MEASURES = (
    Measure(
        "reward", "quality", "reward", "", "higher",
        "mean reward of a response at the end of the training, mean over seeds: exact on the token MDP; on sentiment VADER's "
        "compound score, from -1 to 1, of one sampled response to each held-out prompt",
        mean(last("reward")),
    ),
    Measure(
        "gained", "quality", "gained", "", "higher", "reward at the end less that of the reference, mean over seeds",
        mean(_gained), signed=True,
    ),
    Measure(
        "kl", "fidelity", "KL", "nats", "",
        "KL(policy || reference) of a response at the end: how far the policy has moved; mean over seeds. Exact on the token MDP; "
        "elsewhere over the samples, exact at each of their tokens",
        mean(last("kl")),
    ),
    Measure(
        "vs_dpo", "ratios", "vs DPO at equal KL", "", "higher",
        "reward at equal KL less DPO's: both are read off along their training where KL reached a quarter, a half, three quarters "
        "and the whole of the largest KL that both reached, and the mean is taken (accuracy on held-out pairs stands for the reward "
        "where nobody gives one). Mean over seeds, with its 95 % bootstrap interval: over seeds, which are worlds of their own, on "
        "the token MDP; over held-out prompts, and seeds if there are several, elsewhere",
        mean(_difference), digits=3, limits=_limits, signed=True,
    ),
    Measure(
        "gain_vs_dpo", "ratios", "gain by DPO's", "×", "higher",
        "reward gained over the reference at equal KL, as above, by what DPO gained; left out where DPO's own gain is not clear",
        _share_of_gain,
    ),
    Measure(
        "accuracy", "fidelity", "held-out pairs", "%", "higher",
        "share of held-out pairs whose chosen response has the larger log-ratio to the reference, ties count half; mean over seeds",
        mean(last("accuracy")),
    ),
    Measure("entropy", "quality", "entropy", "nats", "", "entropy of a response at the end, mean over seeds", mean(last("entropy"))),
    Measure(
        "length", "quality", "length", "tokens", "", "tokens of a response at the end, mean over seeds",
        mean(last("length")), digits=1,
    ),
    Measure(
        "tokens_per_second", "cost", "tokens /s", "", "higher",
        "tokens of prompts and responses that were trained on, by seconds of training; measuring on the way does not count",
        ratio("tokens", "seconds"), digits=0,
    ),
    Measure(
        "seconds", "cost", "train", "s", "lower", "seconds of training, without measuring; median over seeds",
        median(raw("seconds")), digits=1,
    ),
    Measure(
        "preparation_seconds", "cost", "before", "s", "lower",
        "seconds spent before the training: guides, columns, the reference's log-probabilities; median over seeds. What a run shares "
        "with another (a guide that is DPO's own run) counts in full",
        median(raw("preparation_seconds")), digits=1,
    ),
    Measure(
        "time_vs_dpo", "ratios", "time by DPO's", "×", "lower",
        "seconds of training and of what comes before, by DPO's; median over seeds. Measured in one run, not beside each other",
        median(_time_by_baseline),
    ),
    PEAK_MEMORY,
)  # fmt: skip
