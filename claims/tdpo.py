"""TDPO against DPO where reward and KL are exact: more reward at the same drift, and less drift on rejected responses.

A table policy learns from 3000 preference pairs of its reference on a task with one good and one bad group of tokens
(`TableMDP.scored`). Reward, KL(pi || ref) and entropy are computed exactly at every fourth step, so methods are compared
at equal KL, not at equal steps: at equal steps TDPO1 has drifted further than DPO. Figures that the criterion leaves
alone: TDPO1 against DPO at equal KL (a small effect), entropy, and what the sequential KL is on chosen responses.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from locum.align import DPO, TDPO1, TDPO2
from locum.align.base import Method
from locum.align.statistics import statistics
from locum.align.table import TableScorer, at_kl, fit, response_batch
from locum.bench.measures import sign_test
from locum.bench.verify import Claim, Judgement
from locum.tasks.token_mdp import Pairs, TableMDP

LEVELS, PAIRS, HELD_OUT, STEPS = (0.5, 1.0, 1.4), 3000, 1000, 400
METHODS: dict[str, Method] = {"DPO": DPO(), "TDPO1": TDPO1(), "TDPO2": TDPO2()}


def sequential_kl(mdp: TableMDP, logits: Tensor, pairs: Pairs) -> tuple[float, float]:
    """Mean KL(ref || pi), summed over the tokens of chosen and of rejected responses."""
    batch = response_batch(pairs.prompt, pairs.chosen, pairs.rejected)
    s = statistics(TDPO1(), batch, TableScorer(logits), {"ref": TableScorer(mdp.ref_logits)})
    assert s.k is not None
    chosen, rejected = s.sums(s.k)
    return chosen.mean().item(), rejected.mean().item()


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, g = TableMDP.scored(seed), torch.Generator().manual_seed(1000 + seed)
    pairs, held_out = mdp.pairs(PAIRS, g), mdp.pairs(HELD_OUT, g)
    row: dict[str, Any] = {"fast": fast}
    for done, (name, method) in enumerate(METHODS.items()):
        progress(name, done, len(METHODS))
        curve = fit(method, mdp, pairs, steps=30 if fast else STEPS, measure_every=4, seed=seed)
        chosen, rejected = sequential_kl(mdp, curve.logits, held_out)
        row[name] = {
            "reward": at_kl(curve, LEVELS),
            "entropy": at_kl(replace(curve, reward=curve.entropy), LEVELS),
            "reward_at_end": curve.reward[-1],
            "kl_at_end": curve.kl[-1],
            "seq_kl_chosen": chosen,
            "seq_kl_rejected": rejected,
        }
    return row


def gap(rows: list[dict[str, Any]], better: str, worse: str, level: int) -> list[float]:
    """Difference in reward at one level of KL, per seed; nan where one of the two never got there."""
    both = [(row[better]["reward"][level], row[worse]["reward"][level]) for row in rows]
    return [float("nan") if None in pair else pair[0] - pair[1] for pair in both]


def judge(rows: list[dict[str, Any]]) -> Judgement:
    gaps = {f"{m} - DPO": [gap(rows, m, "DPO", i) for i in range(len(LEVELS))] for m in ("TDPO1", "TDPO2")}
    kl = [[row[m]["seq_kl_rejected"] for m in METHODS] for row in rows]
    order = [min(dpo - tdpo1, tdpo1 - tdpo2) for dpo, tdpo1, tdpo2 in kl]
    p = [sign_test(g) for g in gaps["TDPO2 - DPO"]] + [sign_test(order)]
    figures: dict[str, Any] = {
        "p_reward": p[:-1],
        "p_order": p[-1],
        "wins": {name: [sum(d > 0 for d in g) for g in levels] for name, levels in gaps.items()},
        "wins_order": sum(d > 0 for d in order),
    }
    for name in METHODS:
        known = {k: [row[name][k] for row in rows] for k in rows[0][name]}
        figures[name] = {
            k: [mean(x) if None not in x else None for x in zip(*v, strict=True)] if isinstance(v[0], list) else mean(v)
            for k, v in known.items()
        }
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before a policy has moved far enough to judge it", figures)

    def shown(name: str, what: str) -> str:
        return "/".join("-" if x is None else f"{x:.3f}" for x in figures[name][what])

    wins = {name: "/".join(map(str, n)) for name, n in figures["wins"].items()}
    measured = (
        f"reward at KL {'/'.join(map(str, LEVELS))}: "
        + ", ".join(f"{name} {shown(name, 'reward')}" for name in METHODS)
        + f"; TDPO2 ahead of DPO in {wins['TDPO2 - DPO']} of {len(rows)} seeds, TDPO1 in {wins['TDPO1 - DPO']}; sequential KL "
        "on held-out rejected responses "
        + ", ".join(f"{name} {figures[name]['seq_kl_rejected']:.2f}" for name in METHODS)
        + f" (in this order in {figures['wins_order']} seeds); entropy at KL {LEVELS[-1]} "
        + ", ".join("-" if (e := figures[name]["entropy"][-1]) is None else f"{name} {e:.3f}" for name in METHODS)
        + "; KL after the last step "
        + ", ".join(f"{name} {figures[name]['kl_at_end']:.2f}" for name in METHODS)
    )
    return Judgement("holds" if all(x <= 0.04 for x in p) else "fails", measured, figures)


claim = Claim(
    slug="tdpo",
    statement="At the same KL from the reference, TDPO2 reaches more reward than DPO, and the sequential KL on rejected "
    "responses grows most under DPO, less under TDPO1 and least under TDPO2.",
    criterion="Holds if over 8 seeds a paired one-sided sign test gives p <= 0.04 (7 of 8) for each of: reward of TDPO2 "
    "above DPO's at KL(pi || ref) 0.5, 1.0 and 1.4; sequential KL on held-out rejected responses after 400 steps in the "
    "order DPO > TDPO1 > TDPO2. Fails otherwise; a KL that is never reached counts against it.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
