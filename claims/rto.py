"""PPO on a hidden dense reward: paid with a DPO model's token rewards, with their total at the end, or with neither.

Four prompts, eight tokens, 32 positions; the hidden reward is dense and random. 4000 preference pairs of the reference's
responses train a DPO model and, in the same number of steps, a reward model that sees whole responses. Then PPO with a
table critic, by RTO's own rounds and loss: 64 responses a round, four steps on each. "token" and "eos" pay the same in
total. The measure is the exact mean of the hidden reward after each of the first 30 rounds, averaged: how fast is
learnt, not where it ends; the level after 60 rounds is a figure beside it, and so is "shaped", which the criterion
leaves alone.
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
PLACEMENTS: tuple[Placement, ...] = ("token", "none", "eos", "shaped")


def curve_of(mdp: TableMDP, method: RTO, dpo: Tensor, scores: Tensor, rounds: int, seed: int) -> list[float]:
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
        lr=LR,
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
        row[placement] = curve_of(mdp, method, dpo, scores, rounds, seed)
    return row


def judge(rows: list[dict[str, Any]]) -> Judgement:
    early = {p: [mean(row[p][1 : EARLY + 1]) for row in rows] for p in PLACEMENTS}
    ahead = {p: [a - b for a, b in zip(early["token"], early[p], strict=True)] for p in PLACEMENTS[1:]}
    n = len(rows)
    figures: dict[str, Any] = {
        "early": {p: mean(x) for p, x in early.items()},
        "end": {p: mean(row[p][-1] for row in rows) for p in PLACEMENTS},
        "reference": mean(row["token"][0] for row in rows),
        "dpo": mean(row["dpo"] for row in rows),
        "score_vs_hidden": mean(row["score_vs_hidden"] for row in rows),
        "token_ahead_of": {
            p: {
                "mean": mean(x),
                "standard_error": stdev(x) / n**0.5 if n > 1 else None,
                "wins": sum(d > 0 for d in x),
                "p": sign_test(x),
            }
            for p, x in ahead.items()
        },
    }
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before anything is learnt", figures)
    found = figures["token_ahead_of"]
    holds = all(found[p]["p"] <= 0.04 for p in ("none", "eos"))
    measured = (
        f"mean hidden reward over rounds 1-{EARLY}: "
        + ", ".join(f"{p} {x:.2f}" for p, x in figures["early"].items())
        + f" (reference {figures['reference']:.2f}); token ahead of "
        + ", ".join(
            f"{p} by {x['mean']:+.2f} (s.e. {x['standard_error']:.2f}, {x['wins']} of {n} seeds)"
            for p, x in found.items()
        )
        + f"; after round {ROUNDS}: "
        + ", ".join(f"{p} {x:.2f}" for p, x in figures["end"].items())
        + f", the DPO model itself {figures['dpo']:.2f}; reward model's correlation with the hidden reward "
        f"{figures['score_vs_hidden']:.2f}"
    )
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="rto",
    statement="Paid at its own token, a DPO model's implicit reward makes PPO learn a hidden dense reward faster than PPO "
    "without it, and faster than PPO that is paid the same total at the end of the response.",
    criterion="Holds if over 8 seeds, paired, the exact hidden reward averaged over rounds 1-30 is higher for the placement "
    "token than for none, and than for eos, each in at least 7 of 8 (one-sided sign test p <= 0.04). Fails otherwise. "
    "Levels after 60 rounds and the placement shaped do not count.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
