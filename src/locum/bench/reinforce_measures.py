"""What is said of a reinforcement recipe: the one table of its measures, and rewards at equal tokens.

A raw line holds "curve": per checkpoint, the start first, the step, the tokens "sampled" and "trained" on until then, the
held-out "reward", "best" of k answers (None for one answer), "entropy", "kl" to the start, "length"; and "log": figures of
every step, None where a step has none. "by_prompt" has the reward of every held-out prompt per checkpoint, where it was
measured on samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from locum.bench.measures import (
    PEAK_MEMORY,
    Measure,
    last,
    mean,
    mean_interval,
    median,
    paired,
    paired_limits,
    raw,
    sign_test,
)
from locum.bench.store import Row

__all__ = ["AXES", "BASELINE", "MEASURES", "along", "reward_at"]

BASELINE = "grpo"
AXES = {"sampled": "sampled tokens", "trained": "trained tokens", "step": "steps"}
LEVELS = (0.25, 0.5, 0.75, 1.0)  # of the tokens that both spent

Curve = list[tuple[float, float, tuple[float, float] | None]]  # where, the mean, its interval


def reward_at(made: Row, axis: str, at: Sequence[float] | np.ndarray, prompts: np.ndarray | None = None) -> np.ndarray:
    """The held-out reward when so much had been spent, on the straight line between checkpoints; over some prompts if given."""
    rewards = made["curve"]["reward"]
    if prompts is not None and "by_prompt" in made:
        rewards = np.asarray(made["by_prompt"]["reward"])[:, prompts].mean(-1)
    return np.interp(at, made["curve"][axis], rewards)


def _gap(line: Row, prompts: np.ndarray | None = None, *, axis: str) -> float | None:
    """Reward less the baseline's at equal spending: mean over levels of what both spent; at the end alone for steps."""
    beside = line["refs"].get(BASELINE)
    if beside is None:
        return None
    spent = min(made["curve"][axis][-1] for made in (line["raw"], beside))
    if not spent > 0:
        return None
    levels = [spent] if axis == "step" else [share * spent for share in LEVELS]
    mine, theirs = (reward_at(made, axis, levels, prompts).mean() for made in (line["raw"], beside))
    return float(mine - theirs)


_GAPS = {axis: partial(_gap, axis=axis) for axis in AXES}
_LIMITS = {axis: partial(paired_limits, difference=gap, reference=BASELINE) for axis, gap in _GAPS.items()}


def _chance(lines: Sequence[Row]) -> float | None:
    """One-sided P of the sign test over seeds."""
    gaps = [gap for line in lines if (gap := _GAPS["sampled"](line)) is not None]
    return sign_test(gaps) if len(gaps) > 1 and lines[0]["method"] != BASELINE else None


def _area(line: Row) -> float | None:
    """The mean of the held-out reward over the training's steps."""
    steps, rewards = (np.asarray(line["raw"]["curve"][name]) for name in ("step", "reward"))
    return float(np.trapezoid(rewards, steps) / steps[-1]) if steps[-1] > 0 else None


def _logged(*names: str) -> Callable[[Row], float | None]:
    """The sum of some figures of a step, mean over the steps that have them."""

    def each(line: Row) -> float | None:
        table = [line["raw"]["log"].get(name, ()) for name in names]
        known = [sum(values) for values in zip(*table, strict=True) if None not in values]
        return float(np.mean(known)) if known else None

    return each


def _phase(name: str) -> Callable[[Row], float | None]:
    return lambda line: line["raw"]["phases"].get(name)


def along(lines: Sequence[Row], axis: str, points: int = 24) -> Curve:
    """The held-out reward against what was spent, as far as all seeds went: mean over seeds, and an interval around it.

    The interval is that of the distance from the baseline of the same seed, as far as both went: 95 % bootstrap over seeds.
    Seeds are worlds of their own, and what they differ in by themselves says nothing of a recipe.
    """
    curves = [line["raw"]["curve"] for line in lines]
    top = min(curve[axis][-1] for curve in curves)
    same = all(curve[axis] == curves[0][axis] for curve in curves)
    at = np.asarray(curves[0][axis] if same else np.linspace(0.0, top, points))
    mine = np.stack([reward_at(line["raw"], axis, at) for line in lines])
    limits: list[tuple[float, float] | None] = [None] * len(at)
    besides = [line["refs"].get(BASELINE) for line in lines]
    if len(lines) > 1 and None not in besides and lines[0]["method"] != BASELINE:
        gaps = mine - np.stack([reward_at(made, axis, at) for made in besides])
        both = min(made["curve"][axis][-1] for made in besides)
        for i in np.flatnonzero(at <= both):
            low, high = mean_interval(gaps[:, i], draws=1000)
            middle = mine[:, i].mean() - gaps[:, i].mean()
            limits[i] = float(middle + low), float(middle + high)
    return list(zip(at.tolist(), mine.mean(0).tolist(), limits, strict=True))


_EQUAL = (
    "both are read off along their training at a quarter, a half, three quarters and the whole of the {} that both had spent, "
    "and the mean is taken. Mean over seeds, with its 95 % bootstrap interval over seeds; where rewards are of samples over "
    "held-out prompts too"
)

MEASURES = (
    Measure(
        "reward", "quality", "reward", "", "higher",
        "mean reward of an answer to a held-out prompt at the end of the training, mean over seeds: exact on the digit chain "
        "(pass@1), on samples at temperature 1 elsewhere",
        mean(last("reward")), digits=3,
    ),
    Measure(
        "area", "quality", "area", "", "higher",
        "the held-out reward, mean over the whole training by steps: who learns sooner has more; mean over seeds", mean(_area), digits=3,
    ),
    Measure(
        "best", "quality", "best of k", "", "higher",
        "expected best reward of k answers to a held-out prompt at the end, mean over seeds: pass@k where rewards are 0 and 1. k is "
        "8 on the digit chain, exactly, and otherwise the number of answers that are sampled",
        mean(last("best")), digits=3,
    ),
    Measure(
        "vs_grpo", "ratios", "vs GRPO at equal sampled tokens", "", "higher",
        "held-out reward less GRPO's of the same seed: " + _EQUAL.format("sampled tokens"),
        mean(_GAPS["sampled"]), digits=3, limits=_LIMITS["sampled"], signed=True,
    ),
    Measure(
        "vs_grpo_trained", "ratios", "at equal trained tokens", "", "higher",
        "held-out reward less GRPO's of the same seed: " + _EQUAL.format("trained tokens"),
        mean(_GAPS["trained"]), digits=3, limits=_LIMITS["trained"], signed=True,
    ),
    Measure(
        "vs_grpo_end", "ratios", "at the end", "", "higher",
        "held-out reward at the end of the training less GRPO's of the same seed, whatever either has spent; intervals as above",
        mean(_GAPS["step"]), digits=3, limits=_LIMITS["step"], signed=True,
    ),
    Measure(
        "sign_p", "ratios", "sign test", "P", "lower",
        "how likely it is that coin tosses win over GRPO at equal sampled tokens with as many seeds; one-sided. With n seeds it "
        "cannot be less than 1/2^n, and it knows nothing of how many recipes were tried",
        _chance, digits=3,
    ),
    Measure(
        "sampled_tokens", "cost", "sampled tokens", "", "lower", "tokens of all completions sampled in a training, mean over seeds",
        mean(raw("sampled_tokens")), digits=0,
    ),
    Measure(
        "trained_tokens", "cost", "trained tokens", "", "lower",
        "tokens that entered the loss, counted in every epoch, mean over seeds", mean(raw("trained_tokens")), digits=0,
    ),
    Measure(
        "seconds", "cost", "seconds", "s", "lower", "seconds of a training, without measuring; median over seeds",
        median(raw("seconds")), digits=1,
    ),
    Measure(
        "time_vs_grpo", "ratios", "time by GRPO's", "×", "lower",
        "seconds by GRPO's of the same seed, median over seeds. Measured in one run, not beside each other",
        median(paired("seconds", BASELINE)), aside=True,
    ),
    Measure(
        "sampled_vs_grpo", "ratios", "sampled by GRPO's", "×", "lower", "sampled tokens by GRPO's of the same seed, median over seeds",
        median(paired("sampled_tokens", BASELINE)), aside=True,
    ),
    Measure(
        "trained_vs_grpo", "ratios", "trained by GRPO's", "×", "lower", "trained tokens by GRPO's of the same seed, median over seeds",
        median(paired("trained_tokens", BASELINE)), aside=True,
    ),
    Measure(
        "rollout_seconds", "cost", "sampling", "s", "lower", "seconds of sampling and of rewards, median over seeds",
        median(_phase("rollout")), digits=1, aside=True,
    ),
    Measure(
        "old_policy_seconds", "cost", "old policy", "s", "lower",
        "seconds of the pass without gradient and of all stages that see the whole batch, median over seeds",
        median(_phase("old_policy")), digits=1, aside=True,
    ),
    Measure(
        "update_seconds", "cost", "updates", "s", "lower", "seconds of updates, median over seeds",
        median(_phase("update")), digits=1, aside=True,
    ),
    replace(PEAK_MEMORY, aside=True),
    Measure(
        "level_groups", "fidelity", "level groups", "%", "",
        "share of sampled rows whose group has one reward alone, so that it teaches nothing by itself; this and the next four are means "
        "over steps and seeds",
        mean(_logged("level_groups")), aside=True,
    ),
    Measure(
        "kept_rows", "fidelity", "kept rows", "%", "", "share of the batch's rows of which at least one token enters the loss",
        mean(_logged("kept_rows")), aside=True,
    ),
    Measure(
        "kept_tokens", "fidelity", "kept tokens", "%", "", "share of the batch's tokens that enter the loss",
        mean(_logged("kept_tokens")), aside=True,
    ),
    Measure(
        "clipped", "fidelity", "clipped", "%", "",
        "share of the tokens in the loss whose ratio was clipped, at either bound, over all epochs",
        mean(_logged("clipped_low", "clipped_high")), digits=4, aside=True,
    ),
    Measure(
        "drift", "fidelity", "drift in a step", "nats", "",
        "approximate KL(old policy || policy) per token while a batch is learnt from: mean of ratio - 1 - log ratio",
        mean(_logged("kl")), digits=5, aside=True,
    ),
    Measure(
        "kl", "fidelity", "KL to the start", "nats", "",
        "KL(policy || start) of a completion at the end: how far the policy has moved; mean over seeds. Exact on the digit chain; "
        "elsewhere over the samples, exact at each of their tokens",
        mean(last("kl")), aside=True,
    ),
    Measure(
        "entropy", "fidelity", "entropy", "nats", "", "entropy per token of the policy's own answers at the end, mean over seeds",
        mean(last("entropy")), digits=3, aside=True,
    ),
    Measure(
        "length", "fidelity", "length", "tokens", "", "tokens of an answer at the end, mean over seeds",
        mean(last("length")), digits=1, aside=True,
    ),
)  # fmt: skip
