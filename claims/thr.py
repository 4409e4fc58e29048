"""THR's one knob on the digit chain: p > 0 is right more often and surer of itself, p < 0 keeps more alternatives.

A warmed-up policy is trained by the paper's recipe (host DAPO, clip 0.2, all tokens in the denominator, no mask) with
p = 0.2, 0 and -0.2 from the same start and with the same draws; pass@1 and entropy are exact figures of 400 prompts. Beside
the criterion, without a gate: how near the sum of the scores comes to what a step on the output layer does; Pass@16; and
Pass@64 of policies that begin as badly as this task allows. There a warm start on uniform digits is right with 0.10, since the
last digit alone decides: a start below 0.02, where Pass@64 would not be near 1, cannot be had.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from locum.bench.reinforce_chain import HELD_OUT, train
from locum.bench.verify import Claim, Judgement
from locum.reinforce import THR, Run
from locum.reinforce.advantages import GroupNormalised
from locum.reinforce.recipe import of
from locum.tasks.digit_chain import DigitChain, pass_at, pretrained
from locum.tokens.logprobs import of_hidden
from locum.tokens.rollouts import Rollouts, uniforms

EXPLOIT, PLAIN, EXPLORE = 0.2, 0.0, -0.2
AT = (15, 30, 60)  # steps
WINS = 9


def slope_error(seed: int, task: DigitChain, eta: float = 1e-6) -> float:
    """Relative difference between the sum of w THR and what a step of size eta on the head does, over 8 prompts."""
    policy, stage = pretrained(seed, task).double(), THR(EXPLOIT, mask=False)
    prompts = task.prompts(8, torch.Generator().manual_seed(seed)).tolist()
    made = policy.generate(prompts, 8, [task.limit] * 8, uniforms(seed, torch.arange(64), task.limit))
    rows = Rollouts.of([p for p in prompts for _ in range(8)], made, torch.arange(8).repeat_interleave(8))
    rows = rows.with_reward(task.reward(rows).double())
    scores, ids = policy.scores(rows).detach(), rows.targets
    assert scores.head is not None
    rows = rows.with_columns(**stage.observe(scores, rows))
    a = GroupNormalised(ddof=0, eps=0.0)(rows)
    weight = stage(rows, a, Run()).weight
    assert weight is not None
    said, moved = 0.0, 0.0
    for (
        group
    ) in rows.group.unique():  # a step along one prompt's gradient moves that prompt's answers as its scores say
        here = (rows.group == group)[:, None].expand_as(rows.mask)[rows.mask]
        h, y, w = scores.hidden[here], ids[here], (weight * a)[rows.mask][here]
        right = rows.columns["thr_correct"][rows.mask][here] > 0
        head = scores.head.clone().requires_grad_()
        (of_hidden(h, head, y) * w).sum().backward()
        assert head.grad is not None
        up, down = (float(of_hidden(h, scores.head + x * head.grad, y)[right].sum()) for x in (eta, -eta))
        moved += (up - down) / (2 * eta)
        said += float((w * rows.columns["thr_influence"][rows.mask][here]).sum())
    return abs(said - moved) / abs(said) if said else 0.0


def run(seed: int, fast: bool, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    hetero = replace(DigitChain.hetero(3), warm_steps=5) if fast else DigitChain.hetero()
    at = (1, 2, 3) if fast else AT
    held_out = hetero.prompts(HELD_OUT, torch.Generator().manual_seed(7))
    row: dict[str, Any] = {"fast": fast, "slope_error": slope_error(seed, hetero)}
    tasks = {"hetero": hetero} if fast else {"hetero": hetero, "bad": DigitChain(eps=0.9)}
    arms = [(name, task, p) for name, task in tasks.items() for p in (EXPLOIT, PLAIN, EXPLORE)]
    for done, (name, task, p) in enumerate(arms):
        progress(f"{name}, p = {p}", done, len(arms))
        curve, policy = train(of(THR(p, mask=False)), seed, task, steps=at[-1], every=at[0])
        points = [x for x in curve if x["step"] in (0, *at)]
        row[f"{name} {p:+g}"] = {
            "pass_at_1": [x["pass_at_1"] for x in points],
            "entropy": [x["entropy"] for x in points],
            "pass_at_k": {k: pass_at(policy, held_out, k) for k in (16, 64)},
        }
    return row


def judge(rows: list[dict[str, Any]]) -> Judgement:
    more, less, none = f"hetero {EXPLOIT:+g}", f"hetero {EXPLORE:+g}", f"hetero {PLAIN:+g}"
    signs = {"pass_at_1": 1, "entropy": -1}
    gaps = {
        what: [[sign * (r[more][what][i + 1] - r[less][what][i + 1]) for r in rows] for i in range(len(AT))]
        for what, sign in signs.items()
    }
    wins = {what: [sum(d > 0 for d in each) for each in levels] for what, levels in gaps.items()}
    figures: dict[str, Any] = {
        "wins": wins,
        "difference": {what: [signs[what] * mean(each) for each in levels] for what, levels in gaps.items()},
        "slope_error": max(r["slope_error"] for r in rows),
    }
    for arm in (k for k in rows[0] if isinstance(rows[0][k], dict)):
        figures[arm] = {
            what: [mean(x) for x in zip(*(r[arm][what] for r in rows), strict=True)]
            for what in ("pass_at_1", "entropy")
        }
        figures[arm]["pass_at_k"] = {k: mean(r[arm]["pass_at_k"][k] for r in rows) for k in rows[0][arm]["pass_at_k"]}
    if any(r["fast"] for r in rows):
        return Judgement("inconclusive", "a fast run is over before the arms have moved apart", figures)

    def shown(arms: tuple[str, ...], what: str) -> str:
        return ", ".join("/".join(f"{x:.3f}" for x in figures[arm][what][1:]) for arm in arms)

    def passes(name: str, k: str) -> str:
        return ", ".join(f"{figures[f'{name} {p:+g}']['pass_at_k'][k]:.4f}" for p in (EXPLOIT, PLAIN, EXPLORE))

    bad = f"bad {EXPLOIT:+g}"
    measured = (
        f"at steps {'/'.join(map(str, AT))}, p = 0.2, 0, -0.2: pass@1 {shown((more, none, less), 'pass_at_1')}; entropy "
        f"{shown((more, none, less), 'entropy')} nats; p = 0.2 ahead of -0.2 in pass@1 in "
        f"{'/'.join(map(str, wins['pass_at_1']))} of {len(rows)} seeds, surer in {'/'.join(map(str, wins['entropy']))}; "
        f"Pass@16 at the end {passes('hetero', '16')}; Pass@64 {passes('bad', '64')} from a start of "
        f"{figures[bad]['pass_at_1'][0]:.3f} (no gate); scores and a step on the head differ by at most "
        f"{figures['slope_error']:.1g} of their size"
    )
    holds = all(n >= WINS for each in wins.values() for n in each)
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="thr",
    statement="Weighing tokens by the sign of their effect on the right answers is one knob between sureness and variety: "
    "with p = 0.2 a policy is right more often, and has less entropy, than with p = -0.2.",
    criterion="Holds if on the digit chain (hetero, 16 prompts x 8, 2 updates per batch, Adam 1e-3, no mask), at each of steps "
    "15, 30 and 60 and in at least 9 of 10 seeds, pass@1 with p = 0.2 exceeds that with p = -0.2, and likewise in at least 9 of "
    "10 its entropy per token is lower. Fails otherwise.",
    seeds=tuple(range(10)),
    run=run,
    judge=judge,
)
