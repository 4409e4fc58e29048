"""TGDPO against DPO where reward and KL are exact: a good guide's rewards per token buy reward, shuffled ones do not.

A guide learns by DPO from 10,000 preference pairs of a table policy (`TableMDP.scored`); then policies learn from the
first 300 of them, by DPO and by TGDPO with the guide's rewards. Methods are compared at equal KL(pi || ref), which is
computed exactly at every fourth step. The control has the same rewards, shuffled over the tokens. A figure that the
criterion leaves alone is the honest limit: a guide that learned from no more than the same 300 pairs.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from locum.align import DPO, TGDPO
from locum.align.table import Curve, at_kl, fit
from locum.bench.measures import sign_test
from locum.bench.verify import Claim, Judgement
from locum.tasks.token_mdp import Pairs, TableMDP

LEVELS, GUIDE_PAIRS, GUIDE_STEPS, PAIRS, STEPS = (0.5, 1.0, 2.0), 10_000, 800, 300, 400
ALPHAS, BETA, CONVERGED = (0.5, 1.0, 2.0), 0.1, 0.3
GUIDED = [f"alpha {a:g}" for a in ALPHAS]


def rewards(mdp: TableMDP, guide: Tensor, pairs: Pairs) -> Tensor:
    """beta log guide/ref of each token, chosen responses first, [2N, H]."""
    gain = guide.log_softmax(-1) - mdp.ref_logits.log_softmax(-1)
    return BETA * torch.cat([mdp.along(gain, pairs.prompt, y) for y in (pairs.chosen, pairs.rejected)])


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, g = TableMDP.scored(seed), torch.Generator().manual_seed(1000 + seed)
    many = mdp.pairs(GUIDE_PAIRS, g)
    few = Pairs(many.prompt[:PAIRS], many.chosen[:PAIRS], many.rejected[:PAIRS])
    steps, guide_steps = (10, 10) if fast else (STEPS, GUIDE_STEPS)
    total = 2 + len(ALPHAS) + 3

    def guide(name: str, done: int, pairs: Pairs) -> Tensor:
        progress(name, done, total)
        curve = fit(DPO(BETA), mdp, pairs, steps=guide_steps, measure_every=guide_steps, seed=seed)
        return rewards(mdp, curve.logits, few)

    good, weak = guide("guide", 0, many), guide("guide of the same pairs", 1, few)
    shuffled = good.flatten()[torch.randperm(good.numel(), generator=g)].view_as(good)
    settings: dict[str, tuple[DPO | TGDPO, Tensor]] = {"DPO": (DPO(BETA), good)}
    settings |= {f"alpha {a:g}": (TGDPO(BETA, a), good) for a in ALPHAS}
    settings |= {"shuffled": (TGDPO(BETA, ALPHAS[-1]), shuffled), "same pairs": (TGDPO(BETA, ALPHAS[-1]), weak)}
    row: dict[str, Any] = {"fast": fast, "mean_abs_r": good.abs().mean().item()}
    for done, (name, (method, r)) in enumerate(settings.items(), 2):
        progress(name, done, total)
        with warnings.catch_warnings(action="ignore"):  # weights below 0 are the method's own; their share is a figure
            curve = fit(method, mdp, few, columns={"r_hat": r}, steps=steps, measure_every=4, seed=seed)
        row[name] = {
            "reward": at_kl(curve, LEVELS),
            "steps_to_loss": steps_to_loss(curve),
            "reward_at_end": curve.reward[-1],
            "kl_at_end": curve.kl[-1],
            "weights_not_positive": mean(log.get("weights/not_positive", 0.0) for log in curve.logs),
        }
    return row


def steps_to_loss(curve: Curve) -> int:
    """Steps until a batch's loss is first below `CONVERGED`; all of them if it never is."""
    return next((i for i, log in enumerate(curve.logs, 1) if log["loss"] < CONVERGED), len(curve.logs))


def ahead(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Reward minus DPO's at each level of KL, seed by seed; nan where one of the two never got there."""
    pairs = [list(zip(row[name]["reward"], row["DPO"]["reward"], strict=True)) for row in rows]
    return [
        [float("nan") if None in both else both[0] - both[1] for both in level] for level in zip(*pairs, strict=True)
    ]


def judge(rows: list[dict[str, Any]]) -> Judgement:
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    gaps = {name: ahead(rows, name) for name in names if name != "DPO"}
    p = {name: [sign_test(g) for g in levels] for name, levels in gaps.items()}
    figures: dict[str, Any] = {
        "p": p,
        "wins": {name: [sum(d > 0 for d in g) for g in levels] for name, levels in gaps.items()},
        "mean_abs_r": mean(row["mean_abs_r"] for row in rows),
    }
    for name in names:
        rewards = zip(*(row[name]["reward"] for row in rows), strict=True)
        figures[name] = {k: mean(row[name][k] for row in rows) for k in rows[0][name] if k != "reward"}
        figures[name]["reward"] = [None if None in x else mean(x) for x in rewards]
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before a policy has moved far enough to judge it", figures)
    speed = [figures[name]["steps_to_loss"] for name in ("DPO", *GUIDED)]
    checks = {
        "reward": all(x <= 0.02 for name in GUIDED for x in p[name]),
        "control": all(x > 0.02 for x in p["shuffled"]),
        "speed": all(a > b for a, b in pairwise(speed)),
    }

    def shown(name: str) -> str:
        won = f" ({'/'.join(map(str, figures['wins'][name]))} of {len(rows)} seeds ahead)" if name != "DPO" else ""
        return f"{name} {'/'.join('-' if x is None else f'{x:.3f}' for x in figures[name]['reward'])}{won}"

    failed = [name for name, ok in checks.items() if not ok]
    measured = (
        f"reward at KL {'/'.join(map(str, LEVELS))}: "
        + ", ".join(map(shown, names))
        + f"; steps to a batch loss under {CONVERGED}: "
        + ", ".join(f"{name} {figures[name]['steps_to_loss']:.0f}" for name in names)
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return Judgement("fails" if failed else "holds", measured, figures | {"checks": checks})


claim = Claim(
    slug="tgdpo",
    statement="With rewards per token from a good guide, TGDPO reaches more reward than DPO at the same KL from the "
    "reference and converges faster the larger alpha is; with the rewards shuffled over the tokens it gains nothing.",
    criterion="Holds if over 8 seeds (1) for alpha 0.5, 1 and 2 a paired one-sided sign test of the reward against DPO's "
    "gives p <= 0.02 at KL(pi || ref) 0.5, 1.0 and 2.0 each; (2) for alpha 2 with shuffled rewards it gives p > 0.02 at all "
    "three; (3) the mean number of steps to a batch loss under 0.3 falls from DPO over alpha 0.5 and 1 to 2. Fails "
    "otherwise; a KL that is never reached counts against it.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
