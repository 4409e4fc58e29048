"""SparsePO's learned masks where the critical states are known, and what the masks are worth in reward at equal KL.

A table task: tokens 0-3 score +1 and 4-7 score -1, the reference says them rarely, except right after one of three trigger
tokens, where it says little else, and the bad ones more. So a preference is decided after triggers. The mask network reads
fixed random features of the state, which know nothing of reward. Asked is whether learned masks are larger after triggers;
whether L1 makes them sparse; and, as a control, whether a network whose features are dealt to the wrong tokens anew in
every batch, in training only, finds the critical states all the same (it must not; how often a state is met it still
sees). Reward at equal KL is reported beside TDPO1's and DPO's and decides nothing: at one beta a larger mean mask is a
larger beta. Seeds below 16 were looked at while this was written; the claim is judged on others, and on sixteen, since a
network can be dead from its start (every mask 0), which counts against the claim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from locum.align import DPO, TDPO1, SparsePO
from locum.align.base import Method, PairBatch, Signal
from locum.align.masks import LearnedMask
from locum.align.statistics import Scorer
from locum.align.table import TableScorer, at_kl, fit
from locum.bench.measures import sign_test
from locum.bench.verify import Claim, Judgement
from locum.models.scoring import Reduce
from locum.tasks.token_mdp import Pairs, TableMDP, tied
from locum.tokens.tiles import Scores

PROMPTS, VOCAB, LENGTH, LAYERS, FEATURES = 4, 16, 8, 4, 24
TRIGGERS, PAIRS, STEPS, LEVELS = slice(8, 11), 2000, 300, (0.5, 1.0, 2.0)
LAMBDAS = {"common": 0.0, "common, lambda 0.001": 0.001, "common, lambda 0.005": 0.005}
SHUFFLED = "common, shuffled features"
COMMON = SparsePO(beta=0.1, mask_init="torch", mask_weight_decay=0.0, dead_after=0)  # a dead mask is a result here
METHODS: dict[str, Method] = {
    **{name: replace(COMMON, lambda_u=x, lambda_d=x) for name, x in LAMBDAS.items()},
    SHUFFLED: COMMON,
    "independent": replace(COMMON, mask="independent"),
    "MaPO": replace(COMMON, mask="mapo"),
    "TDPO1": TDPO1(beta=0.1),
    "DPO": DPO(beta=0.1),
}


@dataclass(frozen=True, eq=False)
class Shuffled:
    """A scorer whose features belong to other tokens of the batch, the same ones in every layer."""

    scorer: Scorer
    generator: torch.Generator

    def __call__(self, batch: PairBatch, taps: Mapping[str, Reduce] | None = None) -> Scores:
        s = self.scorer(batch, taps)
        order = torch.randperm(len(s), generator=self.generator)
        return replace(s, taps={kind: [x[order] for x in layers] for kind, layers in s.taps.items()})


def bed(seed: int) -> tuple[TableMDP, Pairs, list[Tensor]]:
    """The task, pairs of its reference, and features [P, V + 1, F] of the states per layer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    rows = 0.5 * normal(PROMPTS, VOCAB + 1, VOCAB)
    rows[..., :8] -= 3
    rows[:, TRIGGERS, :8] += 5
    rows[:, TRIGGERS, :4] -= 1
    score = torch.zeros(VOCAB, dtype=torch.float64)
    score[:4], score[4:8] = 1, -1
    mdp = TableMDP(tied(rows, LENGTH), score.expand(PROMPTS, LENGTH, VOCAB, VOCAB).clone())
    shape = (VOCAB + 1, FEATURES)
    features = [0.3 * normal(PROMPTS, *shape) + normal(*shape) for _ in range(LAYERS)]
    return mdp, mdp.pairs(PAIRS, g), features


def looked_at(signal: LearnedMask, features: list[Tensor]) -> dict[str, float]:
    """The reward mask on all states: after a trigger, elsewhere, how well it tells them apart, and how often it is 0."""
    with torch.no_grad():
        m = signal.reward([f.flatten(0, 1) for f in features]).view(PROMPTS, VOCAB + 1)
    critical = torch.zeros(VOCAB + 1, dtype=torch.bool)
    critical[TRIGGERS] = True
    a, b = m[:, critical].flatten(), m[:, ~critical].flatten()
    above = (a[:, None] > b).double() + (a[:, None] == b).double() / 2
    return {
        "critical": a.mean().item(),
        "other": b.mean().item(),
        "auc": above.mean().item(),
        "zeros": (m == 0).double().mean().item(),
    }


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    mdp, pairs, features = bed(seed)
    whole = tuple(tied(f, LENGTH) for f in features)
    row: dict[str, Any] = {"fast": fast}
    for done, (name, method) in enumerate(METHODS.items()):
        progress(name, done, len(METHODS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)
            signal: Signal | None = method.signal(LAYERS, FEATURES)
        if signal is not None:
            signal.double()
        frozen: dict[str, Scorer] = {}
        if name == SHUFFLED:
            g = torch.Generator().manual_seed(2000 + seed)
            frozen["ref"] = Shuffled(TableScorer(mdp.ref_logits, whole), g)
        curve = fit(
            method,
            mdp,
            pairs,
            frozen=frozen,
            signal=signal,
            features=whole,
            steps=2 if fast else STEPS,
            measure_every=5,
            seed=seed,
        )
        row[name] = {"reward": at_kl(curve, LEVELS), "reward_at_end": curve.reward[-1], "kl_at_end": curve.kl[-1]}
        if signal is not None:
            row[name]["mean_mask"] = mean(curve.logs[-1][f"mask/mean_u/{b}"] for b in ("chosen", "rejected"))
        if isinstance(signal, LearnedMask):
            row[name] |= looked_at(signal, features)
    return row


def judge(rows: list[dict[str, Any]]) -> Judgement:
    figures: dict[str, Any] = {}
    for name in METHODS:
        known = {k: [row[name][k] for row in rows] for k in rows[0][name]}
        figures[name] = {k: mean(v) for k, v in known.items() if k != "reward"}
        levels = [[x for x in level if x is not None] for level in zip(*known["reward"], strict=True)]
        figures[name] |= {"reward": [mean(x) if x else None for x in levels], "reached": [len(x) for x in levels]}
        if "critical" in known:
            gaps = [a - b for a, b in zip(known["critical"], known["other"], strict=True)]
            dead = sum(z == 1 for z in known["zeros"])
            figures[name] |= {"wins": sum(d > 0 for d in gaps), "p": sign_test(gaps), "dead": dead}
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before the masks have learned anything", figures)

    def finds(name: str) -> bool:
        return figures[name]["p"] <= 0.04 and figures[name]["auc"] > 0.5

    zeros = [figures[name]["zeros"] for name in LAMBDAS]
    checks = {"i": finds("common"), "ii": zeros == sorted(zeros) and zeros[0] < zeros[-1], "iii": not finds(SHUFFLED)}
    gaps = [[row[name]["critical"] - row[name]["other"] for row in rows] for name in ("common", SHUFFLED)]
    ahead = sum(a > b for a, b in zip(*gaps, strict=True))
    figures |= {"passed": checks, "gap_above_control": ahead}

    def shown(name: str) -> str:
        f = figures[name]
        wins = f"larger in {f['wins']} of {len(rows)} seeds" + (f", all 0 in {f['dead']}" if f["dead"] else "")
        return f"{f['critical']:.2f} against {f['other']:.2f} ({wins}, AUC {f['auc']:.2f})"

    def frontier(name: str) -> str:
        f = figures[name]
        rewards = "/".join("-" if x is None else f"{x:.2f}" for x in f["reward"])
        notes = [f"mean mask {f['mean_mask']:.1f}"] if "mean_mask" in f else []
        notes += [f"{min(f['reached'])} seeds"] if min(f["reached"]) < len(rows) else []
        return f"{name} {rewards}" + (f" ({', '.join(notes)})" if notes else "")

    measured = (
        ", ".join(f"({name}) {'passes' if ok else 'fails'}" for name, ok in checks.items())
        + ": mean m_u after a trigger against elsewhere: "
        + "; ".join(f"{name} {shown(name)}" for name in (*LAMBDAS, SHUFFLED, "independent"))
        + f"; the difference is larger than the control's in {ahead} of {len(rows)} seeds; share of zeros "
        f"{'/'.join(f'{z:.2f}' for z in zeros)} at lambda {'/'.join(map(str, LAMBDAS.values()))}; reward at KL "
        f"{'/'.join(map(str, LEVELS))}, all at beta 0.1: "
        + ", ".join(frontier(name) for name in METHODS if name != SHUFFLED)
    )
    return Judgement("holds" if all(checks.values()) else "fails", measured, figures)


claim = Claim(
    slug="sparsepo",
    statement="A mask learned from hidden states alone is larger where preferences are decided, and an L1 norm makes it "
    "sparse.",
    criterion="Holds if over 16 seeds (i) the mean reward mask of the common network, at the default lambda 0, is larger on "
    "states after a trigger than on the others, one-sided paired sign test p <= 0.04 (12 of 16), with a mean AUC above 0.5; "
    "(ii) the mean share of states with mask 0 does not fall from lambda 0 to 0.001 to 0.005 and rises over all; (iii) the "
    "control, trained on shuffled features, does not pass (i). Fails otherwise. Reward at equal KL is reported, not judged.",
    seeds=tuple(range(16, 32)),
    run=run,
    judge=judge,
)
