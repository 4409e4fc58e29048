"""The methods on the token MDP's tables, where reward, KL and entropy are known exactly: what each method is given there.

What a method needs beyond the pairs (a guide, contrastive models, features) its recipe makes, from the same pairs, and
the time for it is counted.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from locum.align import DPO
from locum.align.base import Example, PairBatch
from locum.align.critics import TableCritic
from locum.align.statistics import LOGP_REF, Scorer, collate, token_log_probs
from locum.align.table import TableScorer, response_batch, table_round
from locum.bench.align_world import PAIRS, POINTS, Setup, World
from locum.bench.store import Row
from locum.models.scoring import Reduce
from locum.tasks.token_mdp import tied
from locum.tokens.tiles import Scores

__all__ = ["RECIPES", "run_table"]

ROUNDS, EPOCHS = 4, 4  # of the methods that sample: rounds of SELM, steps on RTO's one batch
ROWS = 1000  # scored at a time
LAYERS, WIDTH = 4, 24  # of the random features that stand for hidden states

Table = Float64[Tensor, "P H V V"]


def _sft(world: World) -> Setup:
    return Setup(world.make("sft"), "imitates the chosen responses", batch_of=world.responses(world.pairs.chosen))


def _tgdpo(world: World) -> Setup:
    from locum.align.tgdpo import GuideReward

    guide = GuideReward(world.scorer(DPO(world.beta)), world.reference, world.beta, batch_size=ROWS)
    return Setup(world.make("tgdpo"), "its guide is DPO, trained on the same pairs before", world.column(guide))


def _treg(world: World) -> Setup:
    from locum.align.treg import squashed

    dpo, ref = world.scorer(DPO(world.beta)), world.reference
    rows = []
    for block in ("chosen", "rejected"):
        better, worse = (torch.stack(token_log_probs(m, world.examples, block, 0, ROWS)) for m in (dpo, ref))
        rows.append(torch.stack([squashed(a, b) for a, b in zip(better, worse, strict=True)]))
    note = (
        "its token rewards come from DPO, trained before (an ablation of the paper): a table cannot be asked to rewrite"
    )
    return Setup(world.make("treg"), note, {"r_hat": torch.cat(rows)})


def _sparsepo(world: World) -> Setup:
    method, mdp, g = world.make("sparsepo", mask_init="torch"), world.mdp, torch.Generator().manual_seed(world.seed)
    rows = [torch.randn(mdp.prompts, mdp.vocab + 1, WIDTH, generator=g, dtype=torch.float64) for _ in range(LAYERS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        signal = method.signal(LAYERS, WIDTH)
    assert signal is not None
    note = f"its masks read {LAYERS} layers of {WIDTH} random features per state, where a model has hidden states"
    return Setup(method, note, signal=signal.double(), features=tuple(tied(f, mdp.length) for f in rows))


def _cdpo(world: World) -> Setup:
    from locum.align.cdpo import ContrastiveEstimation

    sft, pairs = world.make("sft"), world.pairs
    right, wrong = (TableScorer(world.train(sft, world.responses(y)).logits) for y in (pairs.chosen, pairs.rejected))
    note = "its positive and negative models are fitted to the chosen and the rejected responses before"
    return Setup(world.make("cdpo"), note, world.column(ContrastiveEstimation(right, wrong, batch_size=ROWS)))


def _teachers(world: World) -> dict[str, Scorer]:
    from locum.align.aligndistil import swapped

    models = {"dpo": world.pairs, "reverse": swapped(world.pairs)}
    return {name: world.scorer(DPO(world.beta), pairs=pairs) for name, pairs in models.items()}


def _aligndistil(world: World) -> Setup:
    method = world.make("aligndistil", beta_0=world.beta)
    note = "its teachers are DPO on the pairs and on the pairs exchanged, trained before"
    return Setup(method, note, frozen=_teachers(world), batch_of=world.responses(world.pairs.chosen))


def _onlinealigndistil(world: World) -> Setup:
    g = torch.Generator().manual_seed(world.seed)

    def batch_of(step: int, logits: Tensor) -> PairBatch:
        prompt = torch.randint(world.mdp.prompts, (world.batch_size,), generator=g)
        return response_batch(prompt, world.mdp.sample(logits, prompt, g))

    method = world.make("onlinealigndistil", beta_0=world.beta)
    note = "its teachers are DPO on the pairs and on the pairs exchanged, trained before; it samples its own responses"
    return Setup(method, note, frozen=_teachers(world), batch_of=batch_of)


class _Renewed:
    """A reference that is another policy in every round."""

    now: Scorer

    def __call__(self, batch: PairBatch, taps: Mapping[str, Reduce] | None = None) -> Scores:
        return self.now(batch, taps)


def _selm(world: World) -> Setup:
    method: Any = world.make("selm", temperature=1.0)
    mdp, g, ref = world.mdp, torch.Generator().manual_seed(world.seed), _Renewed()
    every, rows = -(-world.steps // ROUNDS), -(-PAIRS // ROUNDS)
    made: list[Tensor] = []

    def label(examples: Sequence[Example]) -> list[float]:
        noise = -torch.empty(len(examples), dtype=torch.float64).exponential_(generator=g).log()
        scores = torch.tensor(world.label(examples), dtype=torch.float64)
        return (scores + noise).tolist()  # the better of two wins as often as in the pairs

    def batch_of(step: int, logits: Tensor) -> PairBatch:
        index = step // every
        if step % every == 0:
            ref.now = TableScorer(logits.clone())
            round = table_round(mdp, logits, g, label, index=index, frozen={"ref": ref.now})
            examples = method.collect(round, world.examples[index * rows : (index + 1) * rows])
            names = ("prompt_ids", *(f"{block}_ids" for block in method.blocks))
            made[:] = [torch.tensor([e[name] for e in examples]) for name in names]
        prompt, *blocks = made
        chosen = torch.randint(len(prompt), (world.batch_size,), generator=g)
        return response_batch(prompt[chosen, 0], *(y[chosen] for y in blocks))

    note = f"in {ROUNDS} rounds it samples a response to every pair's prompt and has all three labelled anew: more samples and labels"
    return Setup(method, note, frozen={"ref": ref}, batch_of=batch_of)


def _rto(world: World) -> Setup:
    mdp, g = world.mdp, torch.Generator().manual_seed(world.seed)
    seen = world.rewards(mdp.sample(mdp.ref_logits, prompt := torch.arange(mdp.prompts).repeat(250), g), prompt)
    method: Any = world.make("rto", reward_mean=float(seen.mean()), reward_std=float(seen.std()))
    critic, frozen = TableCritic(mdp.prompts, mdp.length, mdp.vocab), {"dpo": world.scorer(DPO(world.beta))}
    prompts: list[Example] = [{"prompt_ids": [i % mdp.prompts]} for i in range(world.batch_size)]
    current: list[PairBatch] = []

    def batch_of(step: int, logits: Tensor) -> PairBatch:
        if step % EPOCHS == 0:
            round = table_round(mdp, logits, g, world.label, index=step // EPOCHS, frozen=frozen, signal=critic)
            examples = method.collect(replace(round, batch_size=len(prompts)), prompts)
            current[:] = [collate(examples, method.blocks, (*method.columns, LOGP_REF))]
        return current[0]

    note = (
        f"it samples its own responses, one batch for {EPOCHS} steps, and has each scored by the true reward beside DPO's token "
        "rewards: more samples and labels"
    )
    return Setup(method, note, frozen=frozen, signal=critic, batch_of=batch_of)


#: name -> what it is given; every other method is trained on the pairs as it is
RECIPES: dict[str, Callable[[World], Setup]] = {
    "sft": _sft,
    "tgdpo": _tgdpo,
    "treg": _treg,
    "sparsepo": _sparsepo,
    "cdpo": _cdpo,
    "aligndistil": _aligndistil,
    "onlinealigndistil": _onlinealigndistil,
    "selm": _selm,
    "rto": _rto,
}


def run_table(name: str, world: World) -> Row:
    """One method's training on one world, as a raw row."""
    began = time.perf_counter()
    setup = RECIPES[name](world) if name in RECIPES else Setup(world.make(name))
    ready = time.perf_counter()
    common: dict[str, Any] = {"frozen": setup.frozen, "signal": setup.signal, "features": setup.features}
    if setup.batch_of is None:
        curve = world.fit(setup.method, columns=setup.columns, **common)
    else:
        curve = world.train(setup.method, setup.batch_of, **common)
    seconds = time.perf_counter() - ready
    every = max(1, world.steps // POINTS)
    steps = [*range(0, world.steps, every), world.steps]
    length = world.mdp.length
    rows = world.batch_size * len(setup.method.blocks)
    return {
        "settings": f"{setup.method}" + (f"; {setup.note}" if setup.note else ""),
        "score": "reward",
        "curve": {
            "step": steps,
            "reward": curve.reward,
            "kl": curve.kl,
            "entropy": curve.entropy,
            "accuracy": [0.5, *[None] * (len(steps) - 2), _accuracy(world, curve.logits)],
            "length": [float(length)] * len(steps),
        },
        "tokens": world.steps * rows * (length + 1),
        "seconds": seconds,
        "preparation_seconds": ready - began,
        "samples": _samples(world, curve.logits),
        "samples_note": "Each sign is a token and what it scores: + for 1, − for −1, · for 0.",
    }


def _accuracy(world: World, logits: Table) -> float:
    """Share of held-out pairs whose chosen response has the larger log-ratio to the reference; ties count half."""
    mdp, pairs = world.mdp, world.held_out
    gap = logits.log_softmax(-1) - mdp.ref_logits.log_softmax(-1)
    margin = mdp.along(gap, pairs.prompt, pairs.chosen).sum(-1) - mdp.along(gap, pairs.prompt, pairs.rejected).sum(-1)
    return float(0.5 + 0.5 * margin.sign().mean())


def _samples(world: World, logits: Table) -> list[Row]:
    """Responses of the reference and of the trained policy, as the scores of their tokens: +, - and a dot for none."""
    mdp, prompts = world.mdp, torch.arange(world.mdp.prompts).repeat_interleave(2)

    def say(table: Table) -> tuple[list[str], list[float]]:
        y = mdp.sample(table, prompts, torch.Generator().manual_seed(world.seed))
        scores = mdp.along(mdp.reward, prompts, y)
        signs = [" ".join("+" if x > 0 else "−" if x < 0 else "·" for x in row) for row in scores.tolist()]
        return signs, scores.sum(-1).tolist()

    (before, low), (after, high) = say(mdp.ref_logits), say(logits)
    return [
        {
            "prompt": f"prompt {p + 1} of {mdp.prompts}",
            "before": before[i],
            "after": after[i],
            "reward": [low[i], high[i]],
        }
        for i, p in enumerate(prompts.tolist())
    ]
