"""Distillation against policy gradients, all three climbing one objective that is known exactly.

Four prompts, eight tokens, twelve positions. DPO on 2000 preference pairs of the reference gives the reward
beta_0 log dpo/ref; the objective J is that reward minus beta KL(pi || ref), with beta below beta_0. From the reference, with
the same number of fresh responses per step, the same Adam and its same rate, J is climbed by the distribution (KL to
AlignDistil's teacher at each state), by the token (REINFORCE on rewards to go) and by the sentence (REINFORCE on the
response's total). J is computed exactly after every step, and its optimum by dynamic programming.

Figures that the criterion leaves alone: each climber at the best of three learning rates; hidden reward and
KL(teacher || ref) of AlignDistil's teachers; how often the contrastive reward and DPO's order new pairs rightly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locum.align.aligndistil import AlignDistil, OnlineAlignDistil, both_ways
from locum.align.base import Logs, Method, PairBatch, TokenStats
from locum.align.table import TableScorer, response_batch, train
from locum.bench.verify import Claim, Judgement
from locum.tasks.token_mdp import TableMDP
from locum.tokens.tiles import Tile, log_prob

BETA_0, BETA, PAIRS, DPO_STEPS, RESPONSES = 0.1, 0.08, 2000, 40, 64
STEPS, AT, RATE, RATES = 120, 40, 0.03, (0.01, 0.03, 0.1)
SHOWN = (5, 10, 20, 40, 80, 120)
TEACHERS = {
    "constant 1": AlignDistil(teacher="contrastive", beta=BETA_0),
    "constant 2": AlignDistil(teacher="contrastive", beta=BETA_0 / 2),
    "constant 5": AlignDistil(teacher="contrastive", beta=BETA_0 / 5),
    **{f"adaptive r {r}": AlignDistil(r=r) for r in (1, 2, 5, 20)},
}


@dataclass(frozen=True)
class PolicyGradient(Method):
    """REINFORCE on J's token terms: rewards to go, or the whole response's total on every token; whitened per batch."""

    whole: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"laws"})
    blocks: ClassVar[tuple[str, ...]] = ("response",)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("ref", "dpo")

    def per_token(self, z: Mapping[str, Tile], ids: Tensor) -> Logs:
        logp = log_prob(z["policy"], ids)
        with torch.no_grad():
            ref = log_prob(z["ref"], ids)
            gain = BETA_0 * (log_prob(z["dpo"], ids) - ref) - BETA * (logp - ref)
        return {"logp": logp, "gain": gain}

    def __call__(self, s: TokenStats) -> tuple[Float[Tensor, ""], Logs]:
        assert s.logp is not None
        gain = s.columns["gain"]
        earned = gain.sum(-1, keepdim=True).expand_as(gain) if self.whole else gain.flip(-1).cumsum(-1).flip(-1)
        advantage = earned - earned.mean(0)  # every response has every position
        return -(advantage / advantage.std() * s.logp).sum(-1).mean(), {}


CLIMBERS: dict[str, Method] = {
    "distribution": OnlineAlignDistil(teacher="dpo_ref", beta_0=BETA_0, beta=BETA),
    "token": PolicyGradient(),
    "sentence": PolicyGradient(whole=True),
}


def climb(method: Method, mdp: TableMDP, dpo: Tensor, rate: float, steps: int, seed: int) -> list[float]:
    """J after 0, 1, ... steps; `mdp` has DPO's reward."""
    g, prompt = torch.Generator().manual_seed(seed), torch.arange(mdp.prompts).repeat(RESPONSES // mdp.prompts)

    def batch(_: int, logits: Tensor) -> PairBatch:
        return response_batch(prompt, mdp.sample(logits, prompt, g))

    curve = train(method, mdp, batch, frozen={"dpo": TableScorer(dpo)}, tie=False, steps=steps, lr=rate)
    return [reward - BETA * kl for reward, kl in zip(curve.reward, curve.kl, strict=True)]


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, g = TableMDP.random(seed, prompts=4, vocab=8, length=12), torch.Generator().manual_seed(1000 + seed)
    pairs, new = mdp.pairs(PAIRS, g), mdp.pairs(PAIRS, g)
    models = both_ways(lambda _, given: mdp.fit_dpo(given, BETA_0, lr=0.05, steps=DPO_STEPS), pairs)
    laws = {name: z.log_softmax(-1) for name, z in (models | {"ref": mdp.ref_logits}).items()}

    # The objective, and who climbs it.
    own = TableMDP(mdp.ref_logits, BETA_0 * (laws["dpo"] - laws["ref"]))

    def J(logits: Tensor) -> float:
        reward, kl, _ = own.measure(logits)
        return float((reward - BETA * kl).mean())

    def teacher_of(method: AlignDistil) -> Tensor:
        flat = [laws[name].flatten(0, -2) for name in ("dpo", method.other)]
        return method.teach(*flat)[0].view_as(mdp.ref_logits)

    distribution = CLIMBERS["distribution"]
    assert isinstance(distribution, AlignDistil)
    row: dict[str, Any] = {
        "fast": fast,
        "optimum": float(own.solve(BETA)[1][:, 0, 0].mean()),
        "J_teacher": J(teacher_of(distribution)),
        "J_dpo": J(models["dpo"]),
        "J": {},
        "best_rate": {},
    }
    todo = [(name, rate) for name in CLIMBERS for rate in ((RATE,) if fast else RATES)]
    for done, (name, rate) in enumerate(todo):
        progress(f"{name} at {rate}", done, len(todo))
        found = climb(CLIMBERS[name], own, models["dpo"], rate, AT if fast else STEPS, seed=2000 + seed)
        if rate == RATE:
            row["J"][name] = found
        best = row["best_rate"].setdefault(name, {"rate": rate, "J": found})
        if found[AT] > best["J"][AT]:
            row["best_rate"][name] = {"rate": rate, "J": found}
    progress("teachers", len(todo), len(todo))

    # The teachers, and the rewards that they are made of.
    row["teachers"] = {}
    for name, table in {"DPO": laws["dpo"], **{n: teacher_of(m) for n, m in TEACHERS.items()}}.items():
        reward, kl, _ = mdp.measure(table)
        row["teachers"][name] = [float(reward.mean()), float(kl.mean())]

    def accuracy(other: str) -> float:
        gain = laws["dpo"] - laws[other]
        chosen, rejected = (mdp.along(gain, new.prompt, y).sum(-1) for y in (new.chosen, new.rejected))
        return float((chosen > rejected).double().mean())

    return row | {"accuracy_dpo": accuracy("ref"), "accuracy_contrastive": accuracy("reverse")}


def steps_to(curve: list[float], level: float) -> int | None:
    return next((step for step, value in enumerate(curve) if value >= level), None)


def in_order(J: Mapping[str, list[float]]) -> bool:
    return J["distribution"][AT] > J["token"][AT] > J["sentence"][AT]


def judge(rows: list[dict[str, Any]]) -> Judgement:
    n = len(rows)
    ordered = [in_order(row["J"]) for row in rows]
    if any(row["fast"] for row in rows):
        measured = (
            f"J after {AT} steps in order in {sum(ordered)} of {n} seeds; a fast run ends before speed can be judged"
        )
        return Judgement("inconclusive" if all(ordered) else "fails", measured, {"passed_order": sum(ordered)})
    J = {name: [mean(row["J"][name][step] for row in rows) for step in range(STEPS + 1)] for name in CLIMBERS}
    reached = [steps_to(row["J"]["distribution"], row["J"]["token"][STEPS]) for row in rows]
    fast_enough = [step is not None and 2 * step <= STEPS for step in reached]
    tuned = {name: mean(row["best_rate"][name]["J"][AT] for row in rows) for name in CLIMBERS}
    own = [in_order({name: row["best_rate"][name]["J"] for name in CLIMBERS}) for row in rows]
    teachers = {
        name: [mean(row["teachers"][name][i] for row in rows) for i in range(2)] for name in rows[0]["teachers"]
    }
    flat = {k: mean(row[k] for row in rows) for k, x in rows[0].items() if type(x) is float}
    figures: dict[str, Any] = flat | {
        "J": {name: {str(step): curve[step] for step in SHOWN} for name, curve in J.items()},
        "steps_to_token_scalar": reached,
        "J_at_best_rate": tuned,
        "ordered_at_best_rates": sum(own),
        "teachers_reward_and_kl": teachers,
        "contrastive_ahead": sum(row["accuracy_contrastive"] > row["accuracy_dpo"] for row in rows),
        "passed_order": sum(ordered),
        "passed_speed": sum(fast_enough),
    }
    curves = ", ".join(f"{name} {' '.join(f'{J[name][step]:.2f}' for step in SHOWN)}" for name in CLIMBERS)
    measured = (
        f"J after {'/'.join(map(str, SHOWN))} steps: {curves}; optimum {flat['optimum']:.3f}, teacher "
        f"{flat['J_teacher']:.3f}; in order in {sum(ordered)} of {n} seeds; token-scalar's J of step {STEPS} is reached by "
        f"distillation after {'/'.join(map(str, reached))} steps; each at its best rate, J after {AT} steps "
        + ", ".join(f"{name} {value:.2f}" for name, value in tuned.items())
        + f" (in order in {sum(own)} seeds). Teachers' hidden reward / KL: "
        + ", ".join(f"{name} {r:.2f}/{kl:.1f}" for name, (r, kl) in teachers.items())
        + f"; new pairs ordered rightly by DPO {flat['accuracy_dpo']:.1%}, contrastive {flat['accuracy_contrastive']:.1%} "
        f"(ahead in {figures['contrastive_ahead']} seeds)"
    )
    holds = all(ordered) and all(fast_enough)
    whole = n == len(claim.seeds)
    return Judgement("holds" if holds and whole else "inconclusive" if holds else "fails", measured, figures)


claim = Claim(
    slug="aligndistil",
    statement="On one and the same RLHF objective with DPO's reward, distillation towards the teacher climbs faster than "
    "policy gradients with token rewards, and these faster than policy gradients with one reward per sentence.",
    criterion=f"Holds if in each of 8 seeds the exact objective after {AT} steps of {RESPONSES} responses at Adam {RATE} is in "
    "the order distribution > token-scalar > sentence-level, and distillation reaches token-scalar's objective of step "
    f"{STEPS} in at most half as many steps. Fails if either does not hold in any seed.",
    seeds=tuple(range(8)),
    run=run,
    judge=judge,
)
