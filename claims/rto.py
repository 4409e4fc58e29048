"""PPO on a hidden dense reward: paid with a DPO model's token rewards, with their total at the end, or with neither.

Four prompts, eight tokens, 32 positions; the hidden reward is dense and random. 4000 preference pairs of the reference's
responses train a DPO model and, in the same number of steps, a reward model that sees whole responses. Then PPO with a
table critic, by RTO's own rounds and loss: 64 responses a round, four steps on each. "token" and "eos" pay the same in
total. The measure is the exact mean of the hidden reward after each of the first 30 rounds, averaged: how fast is
learnt, not where it ends. Figures that the criterion leaves alone: the level after 60 rounds, "shaped", and the same
measure at other learning rates, of which each placement then takes the one that serves it best.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from locum.align import RTO, PairBatch
from locum.align.base import Example
from locum.align.critics import TableCritic
from locum.align.rto import Placement
from locum.align.statistics import LOGP_REF, collate
from locum.align.table import TableScorer, table_round, train
from locum.bench.measures import sign_test
from locum.bench.verify import Claim, Judgement
from locum.tasks.token_mdp import TableMDP

PAIRS, STEPS, SAMPLES, BETA = (
    4000,
    200,
    2000,
    0.1,
)  # of DPO and of the reward model; responses that standardise its scores
ROUNDS, EARLY, RESPONSES, EPOCHS, LR, CRITIC_LR = 60, 30, 64, 4, 0.05, 0.1
OTHER_LRS, COMPARED = (
    (0.1, 0.2, 0.4),
    ("token", "none", "eos"),
)  # on average of four seeds 0.8 and 1.6 were worse for each
PLACEMENTS: tuple[Placement, ...] = ("token", "none", "eos", "shaped")


def curve_of(mdp: TableMDP, method: RTO, dpo: Tensor, scores: Tensor, rounds: int, lr: float, seed: int) -> list[float]:
    """Exact mean hidden reward after each round, the reference's first."""
    g, critic = torch.Generator().manual_seed(2000 + seed), TableCritic(mdp.prompts, mdp.length, mdp.vocab, CRITIC_LR)
    frozen = {"dpo": TableScorer(dpo)}
    prompts: list[Example] = [{"prompt_ids": [i % mdp.prompts]} for i in range(RESPONSES)]
    current: list[PairBatch] = []

    def label(examples: Sequence[Example]) -> list[float]:
        prompt = torch.tensor([e["prompt_ids"][0] for e in examples])
        return mdp.along(scores, prompt, torch.tensor([e["response_ids"] for e in examples])).sum(-1).tolist()

    def batch_of(step: int, logits: Tensor) -> PairBatch:
        if step % EPOCHS == 0:
            round = table_round(mdp, logits, g, label, index=step // EPOCHS, frozen=frozen, signal=critic)
            examples = method.collect(replace(round, batch_size=RESPONSES), prompts)
            current[:] = [collate(examples, method.blocks, (*method.columns, LOGP_REF))]
        return current[0]

    return train(
        method,
        mdp,
        batch_of,
        frozen=frozen,
        signal=critic,
        tie=False,
        steps=rounds * EPOCHS,
        lr=lr,
        measure_every=EPOCHS,
    ).reward


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    rounds, steps, pairs = (2, 5, 200) if fast else (ROUNDS, STEPS, PAIRS)
    mdp, g = TableMDP.random(seed, prompts=4, vocab=8, length=32), torch.Generator().manual_seed(1000 + seed)
    known = mdp.pairs(pairs, g)
    progress("DPO and reward model", 0, 1 + len(PLACEMENTS))
    dpo, scores = mdp.fit_dpo(known, BETA, steps=steps), mdp.fit_reward(known, steps=steps)
    prompt = torch.arange(mdp.prompts).repeat(SAMPLES // mdp.prompts)
    y = mdp.sample(mdp.ref_logits, prompt, g)
    seen = mdp.along(scores, prompt, y).sum(-1)
    row: dict[str, Any] = {
        "fast": fast,
        "dpo": float(mdp.value(dpo).mean()),
        "score_vs_hidden": float(torch.corrcoef(torch.stack([seen, mdp.along(mdp.reward, prompt, y).sum(-1)]))[0, 1]),
    }
    for done, placement in enumerate(PLACEMENTS, 1):
        progress(placement, done, 1 + len(PLACEMENTS))
        method = RTO(placement, reward_mean=float(seen.mean()), reward_std=float(seen.std()))
        row[placement] = curve_of(mdp, method, dpo, scores, rounds, LR, seed)
        for lr in OTHER_LRS if placement in COMPARED and not fast else ():
            row[f"{placement} at {lr}"] = curve_of(mdp, method, dpo, scores, EARLY, lr, seed)
    return row


def tuned(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The learning rate that serves each placement best over all seeds, and the measure at it per seed."""
    best, found = {}, {}
    for p in COMPARED:
        at = {LR: [mean(row[p][1 : EARLY + 1]) for row in rows]}
        at |= {lr: [mean(row[f"{p} at {lr}"][1:]) for row in rows] for lr in OTHER_LRS}
        best[p] = max(at, key=lambda lr: mean(at[lr]))
        found[p] = at[best[p]]
    return best, found


def against(ahead: list[float], behind: list[float]) -> dict[str, Any]:
    gaps = [a - b for a, b in zip(ahead, behind, strict=True)]
    error = stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
    return {"mean": mean(gaps), "standard_error": error, "wins": sum(d > 0 for d in gaps), "p": sign_test(gaps)}


def judge(rows: list[dict[str, Any]]) -> Judgement:
    early = {p: [mean(row[p][1 : EARLY + 1]) for row in rows] for p in PLACEMENTS}
    figures: dict[str, Any] = {
        "early": {p: mean(x) for p, x in early.items()},
        "end": {p: mean(row[p][-1] for row in rows) for p in PLACEMENTS},
        "reference": mean(row["token"][0] for row in rows),
        "dpo": mean(row["dpo"] for row in rows),
        "score_vs_hidden": mean(row["score_vs_hidden"] for row in rows),
        "token_ahead_of": {p: against(early["token"], early[p]) for p in PLACEMENTS[1:]},
    }
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before anything is learnt", figures)
    best, at_best = tuned(rows)
    figures["best_lr"], figures["early_at_best_lr"] = best, {p: mean(x) for p, x in at_best.items()}
    figures["token_ahead_of_at_best_lr"] = {p: against(at_best["token"], at_best[p]) for p in COMPARED[1:]}
    holds = all(figures["token_ahead_of"][p]["p"] <= 0.04 for p in ("none", "eos"))

    def levels(what: str) -> str:
        return ", ".join(f"{p} {x:.2f}" for p, x in figures[what].items())

    def ahead(what: str) -> str:
        found = figures[what].items()
        shown = [f"{p} by {x['mean']:+.2f} (s.e. {x['standard_error']:.2f}, {x['wins']} seeds)" for p, x in found]
        return f"token ahead of {', '.join(shown)}"

    measured = (
        f"mean hidden reward over rounds 1-{EARLY}: {levels('early')} (reference {figures['reference']:.2f}); of "
        f"{len(rows)} seeds {ahead('token_ahead_of')}; after round {ROUNDS}: {levels('end')}, the DPO model itself "
        f"{figures['dpo']:.2f}; reward model's correlation with the hidden reward {figures['score_vs_hidden']:.2f}; each at "
        f"its best learning rate ({', '.join(f'{p} {lr}' for p, lr in best.items())}): {levels('early_at_best_lr')}; "
        f"{ahead('token_ahead_of_at_best_lr')}"
    )
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="rto",
    statement="At one learning rate for all, PPO learns a hidden dense reward faster when a DPO model's implicit reward is "
    "paid at its own token than without it, and than when the same total is paid at the end of the response.",
    criterion="Holds if over 8 seeds, paired, the exact hidden reward averaged over rounds 1-30 is higher for the placement "
    "token than for none, and than for eos, each in at least 7 of 8 (one-sided sign test p <= 0.04). Fails otherwise. "
    "Levels after 60 rounds, the placement shaped and other learning rates do not count.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
