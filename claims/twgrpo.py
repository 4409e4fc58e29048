"""TW-GRPO in its two halves: partial credit where all-or-nothing gives no signal, and what weights by disagreement look like.

Subset choice (ten options, which are true?): a policy that tosses coins is trained with partial credit or with the binary
reward, alpha 1 or 1.7. All laws of a question are shared there, so alpha must change nothing (those arms run 60 steps).
The digit chain: weights of the batches that a run with alpha 1.7 is trained on. The first column's laws are shared, those
of the following ones are not. A last column that one row alone reaches is the artefact: with scope "all" it may get the
largest weight. It was expected to in every group; how often it does is among the figures. Accuracies have no gate on the chain,
nor at the end of the runs on subset choice, where both rewards arrive at the same.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from locum.bench.reinforce_chain import HELD_OUT, learner
from locum.bench.verify import Claim, Judgement
from locum.reinforce import TWGRPO, Run, SoftChoice
from locum.reinforce.learner import Learner, Problem, Settings
from locum.reinforce.recipe import of
from locum.tasks.digit_chain import ChainPolicy, DigitChain, pass_at_1
from locum.tasks.subset_choice import SubsetChoice, strict_accuracy, warmed_up
from locum.tokens.groups import members
from locum.tokens.rollouts import Rollouts

ALPHA, ALPHAS = 1.7, (1.0, 1.7, 4.0)
EARLY, STEPS, CHAIN_STEPS, LOOK = 60, 200, 60, 5
SUBSET_SEEDS, CHAIN_SEEDS = 5, 8
REWARDS = {"soft": SoftChoice(), "binary": SoftChoice(partial=False)}
Tell = Callable[[str, int, int], None]


def subset(seed: int, reward: str, alpha: float, steps: int, task: SubsetChoice, warm_steps: int) -> dict[str, Any]:
    """Train on 16 questions x 8 a step, one update each; strict accuracy is exact, of 400 questions that are held out."""
    policy, score = warmed_up(seed, task, warm_steps), REWARDS[reward]

    def graded(problems: Any, completions: Any) -> torch.Tensor:
        texts, right = [task.named(c) for c in completions], [task.letters(p.ids[0]) for p in problems]
        return torch.tensor(score([""] * len(texts), texts, answer=right))

    settings = Settings(rows_per_forward=128, rows_per_pass=128, max_grad_norm=None)
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    run = Run(total=steps, room=task.length)
    student = Learner(of(TWGRPO(alpha)), policy, optimizer, graded, run, seed, settings=settings)
    seen = task.bank * 9 // 10
    held_out, g = torch.arange(seen, task.bank)[:HELD_OUT], torch.Generator().manual_seed(1000 + seed)
    accuracy, level = [], []
    for _ in range(steps):
        accuracy.append(strict_accuracy(policy, held_out))
        figures = student.step([Problem([i]) for i in torch.randint(seen, (16,), generator=g).tolist()])
        level.append(figures["level_groups"])
    return {
        "early_accuracy": mean(accuracy[:EARLY]),
        "early_level_groups": mean(level[:EARLY]),
        "at_end": strict_accuracy(policy, held_out),
        "at": [accuracy[i] for i in range(0, min(steps, EARLY), 10)],
    }


def weights(policy: ChainPolicy, rollouts: Rollouts) -> dict[str, Any]:
    """What the two scopes give a batch: column 0, columns 3..7, and last columns that one row alone reaches."""
    found: dict[str, Any] = {}
    for scope in ("all", "valid"):
        stage = TWGRPO(ALPHA, scope=scope)
        rows = rollouts.with_columns(**stage.observe(policy.scores(rollouts), rollouts))
        weight = stage(rows, torch.zeros_like(rows.columns["twgrpo_divergence"]), Run()).weight
        assert weight is not None
        lone = []
        for at in members(rows.group):
            reach = rows.mask[at].sum(0)
            last = int(reach.count_nonzero()) - 1
            lone += [float(weight[at, last].max())] if reach[last] == 1 else []
        middle = weight[:, 3:8][rows.mask[:, 3:8]]
        found[scope] = {"first": float((weight[:, 0] - 1).abs().max()), "middle": middle.tolist(), "lone": lone}
    return found


def chain(seed: int, alpha: float, steps: int, task: DigitChain) -> dict[str, Any]:
    """Train on 16 prompts x 8 a step, one update each; with alpha 1.7 look at every fifth batch's weights."""
    student = learner(of(TWGRPO(alpha)), seed, task, steps, epochs=1)
    asked, looks = torch.Generator().manual_seed(1000 + seed), []
    for step in range(steps):
        problems = [Problem(p) for p in task.prompts(16, asked).tolist()]
        rollouts, _ = student.collect(lambda batch, problems=problems: problems)  # type: ignore[misc]
        assert rollouts is not None
        if alpha == ALPHA and step % LOOK == 0:
            looks.append(weights(student.policy, rollouts))
        student.learn(rollouts)
        student.run.step += 1
    held_out = task.prompts(HELD_OUT, torch.Generator().manual_seed(7))
    row: dict[str, Any] = {"pass_at_1": pass_at_1(student.policy, held_out)}
    for scope in ("all", "valid") if looks else ():
        lone = [w for look in looks for w in look[scope]["lone"]]
        row[scope] = {
            "first": max(look[scope]["first"] for look in looks),
            "middle": mean(w for look in looks for w in look[scope]["middle"]),
            "lone": len(lone),
            "lone_at_alpha": sum(w > ALPHA - 1e-6 for w in lone),
            "lone_most": max(lone, default=1.0),
        }
    return row


def run(seed: int, fast: bool, progress: Tell) -> dict[str, Any]:
    options = SubsetChoice(4, bank=64, seed=seed) if fast else SubsetChoice(seed=seed)
    digits = replace(DigitChain.hetero(3), warm_steps=5) if fast else DigitChain.hetero()
    arms = [(reward, alpha) for alpha in (1.0, ALPHA) for reward in REWARDS] if seed < SUBSET_SEEDS else []
    row: dict[str, Any] = {"fast": fast}
    for done, (reward, alpha) in enumerate(arms):
        progress(f"{reward} reward, alpha {alpha}", done, len(arms) + len(ALPHAS))
        steps = 3 if fast else STEPS if alpha == 1 else EARLY
        row[f"{reward} {alpha:g}"] = subset(seed, reward, alpha, steps, options, 5 if fast else 200)
    for done, alpha in enumerate(ALPHAS):
        progress(f"digit chain, alpha {alpha}", len(arms) + done, len(arms) + len(ALPHAS))
        row[f"chain {alpha:g}"] = chain(seed, alpha, 2 if fast else CHAIN_STEPS, digits)
    return row


def judge(rows: list[dict[str, Any]]) -> Judgement:
    early = [r for r in rows if "soft 1" in r]
    level = {name: [r[f"{name} 1"]["early_level_groups"] for r in early] for name in REWARDS}
    accuracy = {name: [r[f"{name} 1"]["early_accuracy"] for r in early] for name in REWARDS}
    looks = {scope: [r[f"chain {ALPHA:g}"][scope] for r in rows] for scope in ("all", "valid")}
    artefact = looks["all"]
    figures: dict[str, Any] = {
        "level_groups": level,
        "early_accuracy": accuracy,
        "accuracy_at_end": {name: [r[f"{name} 1"]["at_end"] for r in early] for name in REWARDS},
        "effect_of_alpha": max(
            abs(a - b)
            for r in early
            for name in REWARDS
            for a, b in zip(r[f"{name} 1"]["at"], r[f"{name} 1.7"]["at"], strict=True)
        ),
        "weights": {scope: {k: [x[k] for x in each] for k in each[0]} for scope, each in looks.items()},
        "chain_pass_at_1": {f"{a:g}": [r[f"chain {a:g}"]["pass_at_1"] for r in rows] for a in ALPHAS},
        "lone_at_alpha": sum(x["lone_at_alpha"] for x in artefact) / max(1, sum(x["lone"] for x in artefact)),
    }
    if any(r["fast"] for r in rows):
        return Judgement("inconclusive", "a fast run is over before anything is learnt", figures)
    ratios = [s / b for s, b in zip(accuracy["soft"], accuracy["binary"], strict=True)]
    holds = (
        all(x < 0.2 for x in level["soft"])
        and all(x > 0.8 for x in level["binary"])
        and all(x >= 3 for x in ratios)
        and all(x["first"] == 0 for each in looks.values() for x in each)
        and all(x["middle"] > 1.1 for x in artefact)
        and all(x["lone_at_alpha"] > 0 for x in artefact)
        and all(x["lone_most"] == 1 for x in looks["valid"])
    )

    def shown(what: dict[str, list[float]], digits: int = 3) -> str:
        return ", ".join(f"{name} {mean(x):.{digits}f}" for name, x in what.items())

    weights = figures["weights"]["all"]
    measured = (
        f"subset choice, first {EARLY} steps: groups without variance {shown(level)} (soft at most {max(level['soft']):.3f}, binary "
        f"at least {min(level['binary']):.3f}); strict accuracy {shown(accuracy, 4)}, ratios {min(ratios):.1f} to {max(ratios):.1f}; "
        f"after {STEPS} steps {shown(figures['accuracy_at_end'])}; alpha changes accuracy by {figures['effect_of_alpha']:.1g}. Digit "
        f"chain: weights of column 0 differ from 1 by {max(weights['first']):g}, of columns 3..7 they are {mean(weights['middle']):.3f} "
        f"(at least {min(weights['middle']):.3f}); {figures['lone_at_alpha']:.0%} of last columns that one row alone reaches get "
        f"{ALPHA} with scope all, and at most {max(figures['weights']['valid']['lone_most']):g} with scope valid; pass@1 after "
        f"{CHAIN_STEPS} steps by alpha (no gate): {shown(figures['chain_pass_at_1'])}"
    )
    return Judgement("holds" if holds else "fails", measured, figures)


claim = Claim(
    slug="twgrpo",
    statement="Partial credit makes groups without variance rare and strict accuracy rise earlier on questions with several "
    "answers; weights by a group's disagreement are 1 where it agrees and larger where it does not.",
    criterion="Holds if on subset choice, in each of seeds 0 to 4 and over the first 60 steps, groups without variance are below 0.2 "
    "with partial credit and above 0.8 with the binary reward, and strict accuracy is at least 3 times as high with partial credit; "
    "and if on the digit chain (hetero), in each of 8 seeds, weights (code, alpha 1.7) of column 0 are exactly 1, those of columns "
    "3 to 7 are above 1.1 on average, and the last column, where one row alone reaches it, gets 1.7 with scope all (where nothing "
    "exceeds it) and 1 with scope valid. Fails otherwise.",
    seeds=tuple(range(CHAIN_SEEDS)),
    run=run,
    judge=judge,
)
