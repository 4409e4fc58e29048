"""cDPO on running sums: does contrastive estimation find the slip, and does weighing by it beat DPO?

A GRU learns running sums modulo 7 from solutions with systematic slips, so that its worst errors are likely tokens. Its own
samples, checked, give the data to fine-tune a positive and a negative model and preference pairs. Policies then learn from
the pairs for 150 steps, by DPO and by cDPO, at one rate for both and each at its own best of six rates (chosen on other
problems). Reported beside it: cDPO with each response's scores permuted over its tokens, maximum likelihood on the chosen
responses, what 64 rollouts per prefix say of a few rejected responses, and a variant with a long easy beginning, one
critical digit near the end, and a fifth of the steps.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locum.align import CDPO, DPO, SFT
from locum.align.base import Example, Method, PairBatch
from locum.align.cdpo import ContrastiveEstimation, Sampled, build_ce_data
from locum.align.critical import Rollouts, pass_at_k
from locum.align.statistics import statistics
from locum.bench.verify import Claim, Judgement
from locum.tasks.running_sums import END, RunningSums, Solver
from locum.tokens.tiles import Scores, log_prob, over_tiles

BETAS, RATE, RATES = (0.1, 1.0), 2e-3, (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
BATCH, TUNE_RATE = 64, 3e-3  # pairs per step; rate of the two fine-tunes
NEED = 4  # of 5 seeds

Tell = Callable[[str, int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    base_steps: int = 600
    problems: int = 1500
    samples: int = 16
    tune_steps: int = 60
    steps: int = 150
    tested: int = 4000
    rates: tuple[float, ...] = RATES
    rolled_out: int = 30
    n: int = 64


FULL, LATE = Sizes(), Sizes(steps=30, rates=(RATE,), rolled_out=0)
FAST = Sizes(25, 40, 8, 3, 3, 100, (RATE,), 1, 8)
FAST_LATE = Sizes(25, 40, 8, 3, 2, 100, (RATE,), 0, 8)


@dataclass(frozen=True, eq=False)
class Policy:
    """A solver as a scorer: the first `length` tokens of a text are its problem."""

    solver: Solver
    length: int

    def __call__(self, batch: PairBatch, taps: Mapping[str, Any] | None = None) -> Scores:
        hidden = self.solver(batch.ids[:, : self.length], batch.ids[:, self.length :])
        return Scores(hidden[batch.mask[:, self.length - 1 :]], self.solver.head.weight, self.solver.head.bias)


def batch_of(digits: Tensor, blocks: Sequence[Tensor], columns: Mapping[str, Tensor] | None = None) -> PairBatch:
    """Solutions of one length as a batch, block by block; columns are [rows, tokens of a solution]."""
    ids = torch.cat([torch.cat([digits, y], 1) for y in blocks])
    ours = torch.ones_like(ids, dtype=torch.bool)
    ours[:, : digits.shape[1]] = False
    put = {name: F.pad(x, (digits.shape[1] - 1, 0)) for name, x in (columns or {}).items()}
    return PairBatch(ids, torch.ones_like(ids), ours, len(blocks), put)


def learn(
    method: Method,
    start: Solver,
    digits: Tensor,
    blocks: Sequence[Tensor],
    rate: float,
    steps: int,
    seed: int,
    columns: Mapping[str, Sequence[Tensor]] | None = None,
) -> Solver:
    """A copy of a solver trained with Adam on batches in an order that the seed decides."""
    g, solver = torch.Generator().manual_seed(seed), copy.deepcopy(start)
    adam, order = torch.optim.Adam(solver.parameters(), lr=rate), torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(BATCH, len(digits)):
            order = torch.randperm(len(digits), generator=g)
        rows, order = order[:BATCH], order[BATCH:]
        own = {name: torch.cat([x[rows] for x in parts]) for name, parts in (columns or {}).items()}
        batch = batch_of(digits[rows], [y[rows] for y in blocks], own)
        loss, _ = method(statistics(method, batch, Policy(solver, digits.shape[1]), {}))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return solver


def first_policy(task: RunningSums, draw: Callable[[int], Tensor], steps: int, g: torch.Generator, seed: int) -> Solver:
    """A solver trained on slipped solutions, fresh ones at every step; the rate falls to 0 over the second half."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        solver = Solver()
    adam = torch.optim.Adam(solver.parameters(), lr=1e-2)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        digits = draw(2 * BATCH)
        y = task.solutions(digits, g)
        loss = F.cross_entropy(solver.head(solver(digits, y)).flatten(0, 1), y.flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    return solver


def log_probs(solver: Solver, digits: Tensor, y: Tensor) -> Tensor:
    batch = batch_of(digits, [y])
    with torch.no_grad():
        return over_tiles(log_prob, [Policy(solver, digits.shape[1])(batch)], batch.targets)[0].view_as(y)


def experiment(task: RunningSums, late: bool, size: Sizes, seed: int, tell: Callable[[str], None]) -> Row:
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return task.late_problems(n, g) if late else task.problems(n, g)

    tell("first policy")
    base = first_policy(task, draw, size.base_steps, g, seed)
    chosen_on, tested_on = draw(size.tested // 2), draw(size.tested)

    def accuracy(solver: Solver, digits: Tensor = tested_on) -> float:
        written = solver.sample(digits, torch.Generator().manual_seed(seed))
        return float(task.correct(digits, written).double().mean())

    tell("samples")
    data = build_ce_data(sampled(task, base, draw(size.problems), size.samples, g), generator=g)
    tell("positive and negative model")
    models = []
    for examples in (data.positive, data.negative):
        x, y = columns_of(examples, "prompt_ids", "response_ids")
        models.append(learn(SFT(), base, x, [y], TUNE_RATE, size.tune_steps, seed))
    digits, chosen, rejected = columns_of(data.pairs, "prompt_ids", "chosen_ids", "rejected_ids")
    positive, negative = (Policy(model, task.length) for model in models)
    raw = torch.stack(ContrastiveEstimation(positive, negative, batch_size=512).values(data.pairs, "rejected"))
    whole = ContrastiveEstimation(positive, negative, batch_size=512, eos_ids=(END,)).annotate(data.pairs)
    ce_chosen, ce = (torch.tensor([example[f"{block}_ce"] for example in whole]) for block in ("chosen", "rejected"))
    permuted = torch.stack([row[torch.randperm(len(row), generator=g)] for row in ce])
    before = [log_probs(base, digits, y) for y in (chosen, rejected)]
    slip = task.first_wrong(digits, rejected)
    row: Row = {
        "accuracy_base": accuracy(base),
        "accuracy_positive": accuracy(models[0]),
        "accuracy_negative": accuracy(models[1]),
        "pairs": len(data.pairs),
        "tokens_that_count": float((1 - ce).sum(1).mean()),
        "hit_score": hit(raw, slip),
        "hit_base": hit(before[1], slip),
        "auc_score": auc(raw, slip),
        "auc_base": auc(before[1], slip),
    }
    if size.rolled_out:
        tell("rollouts")
        row["rollouts"] = by_rollout(task, base, data.pairs[: size.rolled_out], raw, slip, size.n, g)

    def measured(method: Method, blocks: Sequence[Tensor], columns: Mapping[str, Sequence[Tensor]], rate: float) -> Row:
        solver = learn(method, base, digits, blocks, rate, size.steps, seed, columns)
        after = [log_probs(solver, digits, y) for y in (chosen, rejected)]
        ratio = [float((a - b).sum(1).mean()) for a, b in zip(after, before, strict=True)]
        found = {"accuracy": accuracy(solver), "accuracy_elsewhere": accuracy(solver, chosen_on)}
        return found | {"chosen": ratio[0], "rejected": ratio[1]}

    for beta in BETAS:
        settings: dict[str, tuple[Method, Tensor]] = {
            "DPO": (DPO(beta), ce),
            "cDPO": (CDPO(beta), ce),
            "permuted": (CDPO(beta), permuted),
        }
        for name, (method, s) in settings.items():
            tell(f"{name}, beta {beta}")
            both = {"ce": (ce_chosen, s), "logp_ref": before}
            runs = {f"{rate:g}": measured(method, [chosen, rejected], both, rate) for rate in size.rates}
            row[f"{name} {beta:g}"] = runs
    tell("SFT")
    row["SFT"] = {f"{rate:g}": measured(SFT(), [chosen], {}, rate) for rate in size.rates}
    return row


def sampled(task: RunningSums, solver: Solver, digits: Tensor, samples: int, g: torch.Generator) -> list[Sampled]:
    """Problems with the solver's solutions, their answers and whether these are right."""
    many = digits.repeat_interleave(samples, 0)
    y = solver.sample(many, g)
    texts = ["" if answer < 0 else str(answer) for answer in task.answers(y).tolist()]
    right, written, step = task.correct(many, y).tolist(), y.tolist(), samples
    parts = [slice(start, start + step) for start in range(0, len(texts), step)]
    return [Sampled(x, written[p], texts[p], right[p]) for x, p in zip(digits.tolist(), parts, strict=True)]


def columns_of(examples: Sequence[Example], *names: str) -> list[Tensor]:
    return [torch.tensor([example[name] for example in examples]) for name in names]


def hit(score: Tensor, slip: Tensor) -> float:
    """How often the lowest score of a response is that of its first wrong token."""
    return float((score.argmin(1) == slip).double().mean())


def auc(score: Tensor, slip: Tensor) -> float:
    """P(a first wrong token scores lower than another token of any rejected response), ties half."""
    is_slip = torch.zeros_like(score, dtype=torch.bool).scatter_(1, slip[:, None], True)
    others, slips = score[~is_slip].sort().values, score[is_slip]
    below = torch.searchsorted(others, slips) + torch.searchsorted(others, slips, right=True)
    return 1 - float((below / 2 / len(others)).mean())


def by_rollout(
    task: RunningSums, base: Solver, pairs: Sequence[Example], raw: Tensor, slip: Tensor, n: int, g: torch.Generator
) -> Row:
    """The critical token by rollout of some rejected responses, beside their slip and their lowest score."""

    def go_on(texts: Sequence[list[int]]) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in texts]
        for size in {len(text) for text in texts}:
            rows = [i for i, text in enumerate(texts) if len(text) == size]
            both = torch.tensor([texts[i] for i in rows])
            x, y = both[:, : task.length], both[:, task.length :]
            for i, written in zip(rows, base.sample(x, g, y)[:, y.shape[1] :].tolist(), strict=True):
                out[i] = written
        return out

    def correct(example: Example, written: Sequence[list[int]]) -> list[bool]:
        digits, whole = torch.tensor([example["prompt_ids"]] * len(written)), 2 * task.length + 1
        return task.correct(digits, torch.tensor([y + [END] * (whole - len(y)) for y in written])).tolist()

    rollouts = Rollouts(go_on, correct, n=n, eos_ids=(END,), prefixes=2 * task.length + 1)
    found = [rollouts.critical(pair, "rejected") for pair in pairs]
    saved = [
        rollouts.count_without(pair, c.index, Policy(base, task.length), "rejected", g)
        for pair, c in zip(pairs, found, strict=True)
        if c.index is not None
    ]
    index = torch.tensor([-1 if c.index is None else c.index for c in found])
    return {
        "slip": float((index == slip[: len(index)]).double().mean()),
        "lowest_score": float((index == raw[: len(index)].argmin(1)).double().mean()),
        "pass_1_without": mean(pass_at_k(n, c, 1) for c in saved),
        "pass_n_without": mean(pass_at_k(n, c, n) for c in saved),
    }


def run(seed: int, fast: bool, progress: Tell) -> Row:
    done, total = 0, 21

    def tell(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    row = experiment(RunningSums(), False, FAST if fast else FULL, seed, tell)
    late = experiment(RunningSums(length=10), True, FAST_LATE if fast else LATE, seed, tell)
    return row | {"late": late, "fast": fast}


def one_rate(row: Row, name: str, what: str = "accuracy") -> float:
    return row[name][f"{RATE:g}"][what]


def own_rate(row: Row, name: str, what: str = "accuracy") -> float:
    """The figure at the rate that is best on other problems."""
    return max(row[name].values(), key=lambda found: found["accuracy_elsewhere"])[what]


def checks(row: Row) -> dict[str, bool]:
    return {
        "slip": row["hit_score"] > row["hit_base"],
        "accuracy": all(one_rate(row, f"cDPO {b:g}") > one_rate(row, f"DPO {b:g}") for b in BETAS),
        "chosen": all(one_rate(row, f"cDPO {b:g}", "chosen") > 0 for b in BETAS)
        and one_rate(row, f"DPO {BETAS[0]:g}", "chosen") < 0,
        "own_rates": all(own_rate(row, f"cDPO {b:g}") > own_rate(row, f"DPO {b:g}") for b in BETAS),
    }


def judge(rows: list[Row]) -> Judgement:
    passed = {name: sum(checks(row)[name] for row in rows) for name in checks(rows[0])}
    names = [f"{name} {b:g}" for b in BETAS for name in ("DPO", "cDPO", "permuted")] + ["SFT"]
    figures: Row = {f"passed_{name}": n for name, n in passed.items()}
    for part, some in (("", rows), ("late_", [row["late"] for row in rows])):
        figures |= {
            f"{part}{k}": mean(row[k] for row in some) for k, v in some[0].items() if isinstance(v, int | float)
        }
        for what in ("accuracy", "chosen"):
            figures[f"{part}{what}_one_rate"] = {k: mean(one_rate(row, k, what) for row in some) for k in names}
            figures[f"{part}{what}_own_rate"] = {k: mean(own_rate(row, k, what) for row in some) for k in names}
    figures["rollouts"] = {k: mean(row["rollouts"][k] for row in rows) for k in rows[0]["rollouts"]}
    if any(row["fast"] for row in rows):
        return Judgement("inconclusive", "a fast run ends before the models have learned enough to judge", figures)

    def shown(what: str, form: str) -> str:
        return ", ".join(
            f"beta {b:g} "
            + " / ".join(format(figures[what][f"{name} {b:g}"], form) for name in ("DPO", "cDPO", "permuted"))
            for b in BETAS
        )

    f, r = figures, figures["rollouts"]
    measured = (
        f"slip/accuracy/chosen/own-rate checks pass in {'/'.join(map(str, passed.values()))} of {len(rows)} seeds; lowest "
        f"score is the slip in {f['hit_score']:.0%} (base likelihood {f['hit_base']:.0%}), AUC {f['auc_score']:.3f} "
        f"({f['auc_base']:.3f}); accuracy from {f['accuracy_base']:.2f}, DPO / cDPO / permuted scores: at rate {RATE:g} "
        f"{shown('accuracy_one_rate', '.3f')}, each at its own best rate {shown('accuracy_own_rate', '.3f')}, SFT on the chosen "
        f"{f['accuracy_own_rate']['SFT']:.3f}; chosen log-ratio at rate {RATE:g} {shown('chosen_one_rate', '+.2f')}, at own rates "
        f"{shown('chosen_own_rate', '+.2f')}; late slip, 30 steps, accuracy {shown('late_accuracy_one_rate', '.3f')}, SFT "
        f"{f['late_accuracy_one_rate']['SFT']:.3f}; rollouts name the slip in {r['slip']:.0%} and the lowest score in "
        f"{r['lowest_score']:.0%}, replacing their token gives pass@1 {r['pass_1_without']:.0%}, pass@64 {r['pass_n_without']:.0%}"
    )
    as_stated = all(passed[name] >= NEED for name in ("slip", "accuracy", "chosen"))
    if not as_stated:
        return Judgement("fails", measured, figures)
    return Judgement("holds" if passed["own_rates"] >= NEED else "inconclusive", measured, figures)


claim = Claim(
    slug="cdpo",
    statement="Where wrong tokens are likely ones, the lowest contrastive score of a rejected response is its first wrong "
    "token; cDPO then gets further than DPO from the same pairs, and does not lower the chosen responses.",
    criterion=f"In at least {NEED} of 5 seeds each: the lowest score hits the first wrong token more often than the lowest base "
    f"likelihood; after 150 steps at rate {RATE:g} cDPO is more accurate than DPO at beta 0.1 and 1; there the chosen log-ratio is "
    "> 0 under cDPO at both and < 0 under DPO at beta 0.1. Fails if one of these does not. Inconclusive if they do, but cDPO is not "
    "the more accurate at both beta in 4 seeds with each method at its own best rate. The permuted scores, SFT and the late "
    "variant are controls without a criterion.",
    seeds=tuple(range(5)),
    run=run,
    judge=judge,
)
