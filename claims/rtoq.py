"""A DPO-trained policy as a Q-function, where the truth is known: credit, search, and the decline of chosen rewards.

Four prompts, six tokens, eight positions; the hidden reward is dense and random, preference pairs come from the
reference. DPO sees the pairs only. The exact solution of the MDP then says how good its credits are, and the hidden
reward how good its search is. Baselines: shuffled credit, the log-probabilities of the reference and of the policy
alone, sampling (its exact expectation), greedy decoding. A seed takes a second, so there is no shorter form.
"""

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from locum.bench.verify import Claim, Judgement
from locum.decode.beam import beam_search
from locum.tasks.token_mdp import TableMDP
from locum.tokens.logprobs import dpo_loss

BETA, PAIRS, RESPONSES = 1.0, 2000, 2000
OVERTRAINED_BETA, OVERTRAINED_STEPS, WIDTHS = 0.1, 200, (1, 2, 5, 10)


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def searched(mdp: TableMDP, logits: Tensor, beams: int) -> float:
    """Mean hidden reward of the best text that the search finds, over the prompts."""
    found = [
        beam_search(mdp.session(logits), [p], beams=beams, max_new_tokens=mdp.length)[0].ids for p in range(mdp.prompts)
    ]
    return float(mdp.along(mdp.reward, torch.arange(mdp.prompts), torch.tensor(found)).sum(-1).mean())


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, g = TableMDP.random(seed), torch.Generator().manual_seed(1000 + seed)
    pairs = mdp.pairs(PAIRS, g)
    logref, best = mdp.ref_logits.log_softmax(-1), mdp.solve(BETA)[2]
    progress("DPO", 0, 4)
    dpo = mdp.fit_dpo(pairs, BETA)
    logp = dpo.log_softmax(-1)

    progress("credit", 1, 4)
    prompt = torch.arange(mdp.prompts).repeat(RESPONSES // mdp.prompts)
    y = mdp.sample(mdp.ref_logits, prompt, g)
    credit = BETA * mdp.along(logp - logref, prompt, y)
    advantage = BETA * mdp.along(best - logref, prompt, y)  # exact: r + V(s') - V(s)
    shuffled = credit.flatten()[torch.randperm(credit.numel(), generator=g)]

    def planted(speaker: Tensor) -> Callable[[Tensor], float]:
        """Responses with one token replaced by the worst one; how often the lowest entry of a table is that token."""
        text, at = mdp.sample(speaker, prompt, g), torch.randint(mdp.length, (len(prompt), 1), generator=g)
        previous = torch.where(at > 0, text.gather(1, (at - 1).clamp(min=0)), 0)[:, 0]
        bad = text.scatter(1, at, mdp.reward[prompt, at[:, 0], previous].argmin(-1, keepdim=True))
        return lambda table: float((mdp.along(table, prompt, bad).argmin(-1) == at[:, 0]).double().mean())

    hit, hit_in_reference = planted(dpo), planted(mdp.ref_logits)

    progress("search", 2, 4)
    over = mdp.fit_dpo(pairs, OVERTRAINED_BETA, steps=OVERTRAINED_STEPS)

    progress("decline", 3, 4)
    sft = mdp.fit_sft(pairs)
    after = mdp.fit_dpo(pairs, BETA, ref_logits=sft)
    gain = (after.log_softmax(-1) - sft.log_softmax(-1)).detach()
    both = torch.cat([pairs.chosen, pairs.rejected])
    ratio = mdp.along(gain, pairs.prompt.repeat(2), both)
    _, margin = dpo_loss(ratio, torch.ones_like(both, dtype=torch.bool), BETA)
    progress("decline", 4, 4)
    return {
        "credit_vs_advantage": pearson(credit, advantage),
        "shuffled_vs_advantage": pearson(shuffled, advantage),
        "credit_vs_reward": pearson(credit, mdp.along(mdp.reward, prompt, y)),
        "hit_credit": hit(logp - logref),
        "hit_reference": hit(logref),
        "hit_policy": hit(logp),
        "hit_chance": 1 / mdp.length,
        "hit_credit_in_reference_text": hit_in_reference(logp - logref),
        "hit_reference_in_reference_text": hit_in_reference(logref),
        "reward_reference": float(mdp.value(mdp.ref_logits).mean()),
        "reward_sampling": float(mdp.value(dpo).mean()),
        "reward_beams": {str(k): searched(mdp, dpo, k) for k in WIDTHS},
        "reward_beams_overtrained": {str(k): searched(mdp, over, k) for k in WIDTHS},
        "chosen_after_sft": float(BETA * ratio[: len(pairs.chosen)].sum(-1).mean()),
        "margin_after_sft": float(margin.mean()),
    }


def checks(row: dict[str, Any]) -> dict[str, bool]:
    return {
        "credit": row["credit_vs_advantage"] > 0.4 and row["credit_vs_advantage"] > row["shuffled_vs_advantage"],
        "error": row["hit_credit"] > row["hit_reference"] and row["hit_credit"] > row["hit_chance"],
        "search": row["reward_beams"]["5"] > row["reward_sampling"],
        "decline": row["chosen_after_sft"] < 0 < row["margin_after_sft"],
    }


def judge(rows: list[dict[str, Any]]) -> Judgement:
    passed = {name: sum(checks(row)[name] for row in rows) for name in checks(rows[0])}
    whole = len(rows) == len(claim.seeds)
    holds = all(n == len(rows) for n in passed.values())
    flat = [k for k in rows[0] if not isinstance(rows[0][k], dict)]
    figures: dict[str, Any] = {k: mean(row[k] for row in rows) for k in flat}
    for k in ("reward_beams", "reward_beams_overtrained"):
        figures[k] = {width: mean(row[k][width] for row in rows) for width in rows[0][k]}
    figures |= {f"passed_{name}": n for name, n in passed.items()}
    f, width = figures, "/".join(map(str, WIDTHS))
    curves = [", ".join(f"{v:.2f}" for v in f[k].values()) for k in ("reward_beams", "reward_beams_overtrained")]
    measured = (
        f"checks 1-4 pass in {', '.join(map(str, passed.values()))} of {len(rows)} seeds: correlation with the "
        f"advantage {f['credit_vs_advantage']:.2f} (shuffled {f['shuffled_vs_advantage']:.2f}); planted error found "
        f"in {f['hit_credit']:.0%} (reference log-prob {f['hit_reference']:.0%}, policy's own {f['hit_policy']:.0%}, "
        f"chance {f['hit_chance']:.1%}; in the reference's texts {f['hit_credit_in_reference_text']:.0%} against "
        f"{f['hit_reference_in_reference_text']:.0%}); hidden reward sampled {f['reward_sampling']:.2f}, reference "
        f"{f['reward_reference']:.2f}, {width} beams {curves[0]}, over-trained {curves[1]}; after SFT chosen "
        f"{f['chosen_after_sft']:.2f}, margin {f['margin_after_sft']:.2f}"
    )
    return Judgement("holds" if holds and whole else "inconclusive" if holds else "fails", measured, figures)


claim = Claim(
    slug="rtoq",
    statement="The log-ratio of a DPO-trained policy to its reference is a token-level advantage: it credits tokens, "
    "finds a planted error, makes beam search a search for reward, and falls on chosen responses after SFT.",
    criterion="Holds if in each of 8 seeds: (1) Pearson correlation of credit with the exact optimal advantage > 0.4 "
    "and above that of shuffled credits; (2) in the policy's samples the lowest credit hits a planted worst-reward "
    "token more often than the lowest reference log-probability and than chance; (3) mean hidden reward of 5-beam "
    "search > the policy's expected one when sampling; (4) after SFT on chosen, DPO leaves their mean implicit reward "
    "< 0 and the margin > 0. Fails if any check fails in any seed.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
