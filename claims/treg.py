"""T-REG against DPO where reward and KL are exact: noisy rewards per token buy reward and credit, shuffled ones do not.

A table policy learns from 2000 preference pairs of its reference (`TableMDP.scored`). For the two rewriting requests
stands a reward that knows half of each token's true score s and is noisy otherwise, with fixed noise per state and token:
r = sigmoid(2 (0.5 s + 0.3 noise)) - 1/2. Methods are compared at equal KL(pi || ref), computed exactly at every fourth
step, and by how well their own token reward log pi/ref, after the last step, tells good tokens from bad in held-out
chosen responses. The control has the same rewards, shuffled over the tokens.

Figures that the criterion leaves alone: the same with 200 pairs, where the regulariser with weight 1 for every pair is
compared too; and real requests to SmolLM2-135M-Instruct about short answers, right and wrong, which it sees (as in the
paper) or does not. Nothing is asked of so small a model but that its rewards repeat themselves and are bounded.
"""

import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from locum.align import DPO, TREG, RewriteReward
from locum.align.table import at_kl, fit
from locum.align.treg import UNSEEN
from locum.bench.measures import mean_interval, sign_test
from locum.bench.verify import Claim, Judgement
from locum.models import load
from locum.tasks.token_mdp import Pairs, TableMDP, tied

LEVELS, PAIRS, FEW, HELD_OUT, STEPS = (0.5, 1.0, 2.0), 2000, 200, 1000, 400
GUIDED = ("alpha 0.25", "alpha 0.5")
CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow, Egypt Cairo,
Greece Athens, Austria Vienna, Poland Warsaw, Norway Oslo, Sweden Stockholm, Finland Helsinki, Ireland Dublin, Cuba Havana,
Peru Lima, Canada Ottawa, Portugal Lisbon, Hungary Budapest"""
OPPOSITES = """hot cold, up down, big small, fast slow, early late, day night, rich poor, young old, happy sad, open closed,
light dark, wet dry, left right, strong weak, first last"""


def token_rewards(mdp: TableMDP, pairs: Pairs, g: torch.Generator) -> Tensor:
    """The stand-in's rewards of the pairs' tokens, chosen responses first, [2N, H]."""
    noise = torch.randn((mdp.prompts, mdp.vocab + 1, mdp.vocab), generator=g, dtype=torch.float64)
    table = torch.sigmoid(2 * (0.5 * mdp.reward + 0.3 * tied(noise, mdp.length))) - 0.5
    return torch.cat([mdp.along(table, pairs.prompt, y) for y in (pairs.chosen, pairs.rejected)])


def credit(mdp: TableMDP, logits: Tensor, pairs: Pairs) -> float:
    """Correlation of log pi/ref with the true score over the tokens of chosen responses."""
    gain = mdp.along(logits.log_softmax(-1) - mdp.ref_logits.log_softmax(-1), pairs.prompt, pairs.chosen)
    score = mdp.along(mdp.reward, pairs.prompt, pairs.chosen)
    return float(torch.corrcoef(torch.stack([gain.flatten(), score.flatten()]))[0, 1])


def triples() -> list[dict[str, str]]:
    """Questions with a right answer and a wrong one that looks like it: 20 capitals, 15 opposites, 15 sums."""
    rows = []
    for text, question, answer in (
        (CAPITALS, "What is the capital of {}?", "The capital of {} is {}."),
        (OPPOSITES, "What is the opposite of {}?", "The opposite of {} is {}."),
    ):
        known = [item.split() for item in text.replace("\n", " ").split(",")]
        for (what, right), (_, wrong) in zip(known, known[1:] + known[:1], strict=True):
            rows.append((question.format(what), answer.format(what, right), answer.format(what, wrong)))
    for a in range(2, 17):
        rows.append((f"What is {a} plus 5?", f"{a} plus 5 is {a + 5}.", f"{a} plus 5 is {a + 8}."))
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]


def real_rewards() -> dict[str, Any]:
    """Mean reward of a right answer's tokens minus that of the wrong one's, with its interval over the questions."""
    lm, began = load(), time.perf_counter()
    examples = [
        row | {f"{k}_ids": [*lm.encode(row[k]), lm.tokenizer.eos_token_id] for k in ("chosen", "rejected")}
        for row in triples()[::3]
    ]
    found: dict[str, Any] = {"questions": len(examples)}
    for name, signal in {"seen": RewriteReward(lm), "unseen": RewriteReward(lm, template=UNSEEN)}.items():
        right, wrong = (signal.values(examples, block) for block in ("chosen", "rejected"))
        again = signal.values(examples[:3], "chosen")
        difference = [float(a.mean() - b.mean()) for a, b in zip(right, wrong, strict=True)]
        found[name] = {
            "difference": mean(difference),
            "interval": mean_interval(difference),
            "right_higher": mean(d > 0 for d in difference),
            "repeats": all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, right, strict=False)),
            "bounded": all(bool((r.abs() <= 0.5).all()) for r in right + wrong),
        }
    return found | {"seconds": time.perf_counter() - began}


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, g = TableMDP.scored(seed), torch.Generator().manual_seed(1000 + seed)
    pairs, held_out = mdp.pairs(PAIRS, g), mdp.pairs(HELD_OUT, g)
    r = token_rewards(mdp, pairs, g)
    shuffled = r.flatten()[torch.randperm(r.numel(), generator=g)].view_as(r)
    few = Pairs(pairs.prompt[:FEW], pairs.chosen[:FEW], pairs.rejected[:FEW])
    few_r = torch.cat([half[:FEW] for half in r.chunk(2)])
    settings: dict[str, tuple[DPO | TREG, Pairs, Tensor]] = {
        "DPO": (DPO(), pairs, r),
        "alpha 0.25": (TREG(), pairs, r),
        "alpha 0.5": (TREG(alpha=0.5), pairs, r),
        "shuffled": (TREG(alpha=0.5), pairs, shuffled),
        "few: DPO": (DPO(), few, few_r),
        "few: alpha 0.25": (TREG(), few, few_r),
        "few: weight 1": (TREG(weight="one"), few, few_r),
    }
    row: dict[str, Any] = {"fast": fast}
    for done, (name, (method, data, rewards)) in enumerate(settings.items()):
        progress(name, done, len(settings) + 1)
        steps = 10 if fast else STEPS
        curve = fit(method, mdp, data, columns={"r_hat": rewards}, steps=steps, measure_every=4, seed=seed)
        row[name] = {"reward": at_kl(curve, LEVELS), "credit": credit(mdp, curve.logits, held_out), "kl": curve.kl[-1]}
    if seed == 0 and not fast:
        progress("requests to a real model", len(settings), len(settings) + 1)
        row["real"] = real_rewards()
    return row


def ahead(rows: list[dict[str, Any]], name: str) -> list[list[float]]:
    """Differences from DPO, seed by seed: reward at each level of KL (nan where one never got there), then credit."""
    gaps = []
    for row in rows:
        mine, base = row[name], row["DPO"]
        pairs = [*zip(mine["reward"], base["reward"], strict=True), (mine["credit"], base["credit"])]
        gaps.append([float("nan") if a is None or b is None else a - b for a, b in pairs])
    return [list(level) for level in zip(*gaps, strict=True)]


def judge(rows: list[dict[str, Any]]) -> Judgement:
    gaps = {name: ahead(rows, name) for name in (*GUIDED, "shuffled")}
    p = {name: [sign_test(g) for g in levels] for name, levels in gaps.items()}
    wins = {name: [sum(d > 0 for d in g) for g in levels] for name, levels in gaps.items()}
    figures: dict[str, Any] = {"p": p, "wins": wins, "real": rows[0].get("real")}
    names = [name for name in rows[0] if isinstance(rows[0][name], dict) and name != "real"]
    for name in names:
        levels = zip(*(row[name]["reward"] for row in rows), strict=True)
        figures[name] = {
            "reward": [None if None in x else mean(x) for x in levels],
            "credit": mean(row[name]["credit"] for row in rows),
            "kl": mean(row[name]["kl"] for row in rows),
        }
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before a policy has moved far enough to judge it", figures)
    gain = all(x <= 0.04 for name in GUIDED for x in p[name])
    control = all(x > 0.04 for x in p["shuffled"])

    def shown(name: str) -> str:
        reward = "/".join("-" if x is None else f"{x:.3f}" for x in figures[name]["reward"])
        won = f" (ahead in {'/'.join(map(str, wins[name]))} of {len(rows)} seeds)" if name in wins else ""
        return f"{name} {reward}, correlation {figures[name]['credit']:.3f}{won}"

    measured = f"reward at KL {'/'.join(map(str, LEVELS))}, and correlation of token rewards with the truth: "
    measured += "; ".join(map(shown, names))
    if real := figures["real"]:
        shares = (
            f"answer {name} {real[name]['difference']:+.4f} [{real[name]['interval'][0]:+.4f}, {real[name]['interval'][1]:+.4f}]"
            for name in ("seen", "unseen")
        )
        measured += f"; SmolLM2-135M-Instruct on {real['questions']} questions, right minus wrong: " + ", ".join(shares)
    return Judgement("holds" if gain and control else "fails", measured, figures | {"gain": gain, "control": control})


claim = Claim(
    slug="treg",
    statement="With noisy but informative rewards per token, T-REG reaches more reward than DPO at the same KL from the "
    "reference and credits tokens better; with the rewards shuffled over the tokens it does neither.",
    criterion="Holds if over 8 seeds, for alpha 0.25 and 0.5, a paired one-sided sign test against DPO gives p <= 0.04 (7 of "
    "8) for the reward at KL(pi || ref) 0.5, 1.0 and 2.0 each and for the correlation of log pi/ref with the true score of "
    "held-out chosen tokens; and, for alpha 0.5 with shuffled rewards, p > 0.04 for each of these. Fails otherwise; a KL "
    "that is never reached counts against it.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
