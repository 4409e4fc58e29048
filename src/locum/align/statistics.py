"""From a batch and its models to `TokenStats`: each model is scored once, and only what the method declares is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from locum.align.base import Example, Method, PairBatch, Signal, TokenStats
from locum.errors import UserError
from locum.models.scoring import Reduce, adapter, score
from locum.tokens.tiles import Scores, log_prob, over_tiles

__all__ = ["BASE", "ModelScorer", "Scorer", "collate", "statistics", "token_log_probs", "token_signals", "token_values"]

LOGP_REF = "logp_ref"  # the column that holds the reference's log-probabilities where they were computed before
BASE = ""  # the adapter that is none


@runtime_checkable
class Scorer(Protocol):
    """A model as the family sees it: a batch in, scores at its response tokens out."""

    def __call__(self, batch: PairBatch, taps: Mapping[str, Reduce] | None = None) -> Scores: ...


@dataclass(frozen=True, eq=False)
class ModelScorer:
    """A Hugging Face model as a scorer.

    Args:
        model: the model, possibly wrapped.
        adapter: of a PEFT model: the adapter to switch on, `BASE` for none; None leaves the model as it is.
    """

    model: nn.Module
    adapter: str | None = None

    def __call__(self, batch: PairBatch, taps: Mapping[str, Reduce] | None = None) -> Scores:
        if self.adapter is None:
            return score(self.model, batch.ids, batch.attention_mask, batch.mask, taps)
        with adapter(self.model, self.adapter or None) as model:
            return score(model, batch.ids, batch.attention_mask, batch.mask, taps)


def statistics(
    method: Method,
    batch: PairBatch,
    policy: Scorer,
    frozen: Mapping[str, Scorer],
    signal: Signal | None = None,
) -> TokenStats:
    """What `method` sees of a batch.

    A method that needs nothing of the vocabulary gets the reference's log-probabilities from the column "logp_ref" where
    the batch has it, and the reference is not run.

    Args:
        policy: with gradient.
        frozen: the models that `method.frozen` names; those in `method.scored` are scored, without gradient.
        signal: what `method.signal` gave.

    Raises: UserError for a model or a column that the method needs and that is not there.
    """
    if missing := [c for c in method.columns if c not in batch.columns]:
        raise UserError(
            f"{type(method).__name__} needs the column {missing[0]!r} per response token; the data has none"
        )
    if missing := [m for m in method.scored if m not in frozen and not (m == "ref" and LOGP_REF in batch.columns)]:
        raise UserError(f"{type(method).__name__} needs the model {missing[0]!r} beside the policy; none was given")
    columns = dict(batch.columns)
    logp_ref = columns.pop(LOGP_REF, None) if not method.needs else None
    with torch.no_grad():
        beside = {
            name: frozen[name](batch, signal.taps if signal is not None and name == "ref" else None).detach()
            for name in method.scored
            if name != "ref" or logp_ref is None or signal is not None
        }
        if "ref" in beside and not method.needs and logp_ref is None:
            logp_ref = batch.spread(over_tiles(log_prob, [beside["ref"]], batch.targets)[0])
    if signal is not None:
        columns |= {name: batch.spread(values) for name, values in signal(beside["ref"], batch).items()}
    if not method.needs:
        beside.pop("ref", None)
    found = _per_token(method, batch, {"policy": policy(batch), **beside})
    logp = found.pop("logp")
    logp_ref = found.pop("logp_ref", logp_ref)
    return TokenStats(
        d=None if logp_ref is None else logp - logp_ref.to(logp.dtype),
        mask=batch.mask,
        k=found.pop("k", None),
        logp=logp,
        blocks=batch.blocks,
        columns=columns | found,
    )


def _per_token(method: Method, batch: PairBatch, scores: Mapping[str, Scores]) -> dict[str, Float[Tensor, "rows _"]]:
    names: list[str] = []

    def one(*parts: Tensor) -> tuple[Tensor, ...]:
        out = method.per_token(dict(zip(scores, parts, strict=False)), parts[-1])
        names[:] = out
        return tuple(out.values())

    values = over_tiles(one, list(scores.values()), batch.targets)
    return {name: batch.spread(x) for name, x in zip(names, values, strict=True)}


def collate(
    examples: Sequence[Example],
    blocks: Sequence[str] = ("chosen", "rejected"),
    columns: Sequence[str] = (),
    pad_id: int = 0,
    left: bool = False,
) -> PairBatch:
    """Examples as one batch: prompt and response of each block, padded to one width.

    Raises: UserError, naming the example, for something missing, an empty prompt or response, or a column whose length
        is not that of its response.
    """
    ids: list[Tensor] = []
    masks: list[Tensor] = []
    values: dict[str, list[Tensor]] = {c: [] for c in columns}
    for block in blocks:
        for number, example in enumerate(examples):
            _check(example, number, block, columns)
            prompt, response = list(example["prompt_ids"]), list(example[f"{block}_ids"])
            ids.append(torch.tensor(prompt + response, dtype=torch.long))
            masks.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
            for c in columns:
                row = torch.as_tensor(example[f"{block}_{c}"])
                row = row if row.is_floating_point() else row.float()
                head = row.new_zeros(len(prompt) - 1)
                values[c].append(torch.cat([head, row]))
    side = "left" if left else "right"
    attention = [torch.ones(len(x), dtype=torch.long) for x in ids]
    return PairBatch(
        ids=pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side),
        attention_mask=pad_sequence(attention, batch_first=True, padding_side=side),
        completion_mask=pad_sequence(masks, batch_first=True, padding_side=side),
        blocks=len(blocks),
        columns={c: pad_sequence(rows, batch_first=True, padding_side=side) for c, rows in values.items()},
    )


def _check(example: Example, number: int, block: str, columns: Sequence[str]) -> None:
    where = f"example {number} of the batch"
    names = [f"{block}_{name}" for name in ("ids", *columns)]
    if missing := [name for name in ("prompt_ids", *names) if name not in example]:
        raise UserError(f"{where} has no {missing[0]!r}, only {', '.join(example)}")
    if not len(example["prompt_ids"]):
        raise UserError(f"{where} has an empty prompt; a response needs a token before it")
    tokens = len(example[f"{block}_ids"])
    if not tokens:
        raise UserError(f"{where} has an empty {block} response")
    for name in names[1:]:
        if (shape := torch.as_tensor(example[name]).shape) != (tokens,):
            raise UserError(f"{where} has {shape.numel()} values of {name} for {tokens} response tokens")


def token_log_probs(
    scorer: Scorer,
    examples: Sequence[Example],
    block: str = "response",
    pad_id: int = 0,
    batch_size: int = 16,
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch,
) -> list[Float[Tensor, " _"]]:
    """log p of each response token of one block, one tensor per example; see `token_values`."""
    return token_values(log_prob, [scorer], examples, block, pad_id, batch_size, move)


@torch.no_grad()
def token_values(
    fn: Callable[..., Tensor],
    scorers: Sequence[Scorer],
    examples: Sequence[Example],
    block: str = "response",
    pad_id: int = 0,
    batch_size: int = 16,
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch,
) -> list[Float[Tensor, " _"]]:
    """``fn(logits_1, ..., logits_k, ids)``, a number per row of a tile [r, V], at each response token of one block.

    One tensor per example; batched by length, without gradient. `move` puts a batch on the models' device.
    """
    out: list[Tensor] = [torch.empty(0)] * len(examples)
    for rows, batch in _by_length(examples, block, pad_id, batch_size, move):
        (found,) = over_tiles(fn, [scorer(batch) for scorer in scorers], batch.targets)
        for i, values in zip(rows, found.cpu().split(batch.mask.sum(-1).tolist()), strict=True):
            out[i] = values
    return out


@torch.no_grad()
def token_signals(
    signal: Signal,
    ref: Scorer,
    examples: Sequence[Example],
    block: str = "response",
    pad_id: int = 0,
    batch_size: int = 16,
    move: Callable[[PairBatch], PairBatch] = lambda batch: batch,
) -> list[dict[str, Float[Tensor, " _"]]]:
    """What a signal says of each response token of one block, by column, one dict per example (masks, a critic's values).

    "logp_ref" too, the reference's log p of each token, since the reference is run for it. `move` puts a batch on the
    reference's device.
    """
    out: list[dict[str, Tensor]] = [{} for _ in examples]
    for rows, batch in _by_length(examples, block, pad_id, batch_size, move):
        scores = ref(batch, signal.taps)
        columns = signal(scores, batch) | {LOGP_REF: over_tiles(log_prob, [scores], batch.targets)[0]}
        for name, found in columns.items():
            for i, values in zip(rows, found.cpu().split(batch.mask.sum(-1).tolist()), strict=True):
                out[i][name] = values
    return out


def _by_length(
    examples: Sequence[Example], block: str, pad_id: int, batch_size: int, move: Callable[[PairBatch], PairBatch]
) -> Iterator[tuple[list[int], PairBatch]]:
    """Batches of examples of about one length, with their numbers."""
    order = sorted(
        range(len(examples)), key=lambda i: len(examples[i]["prompt_ids"]) + len(examples[i][f"{block}_ids"])
    )
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, move(collate([examples[i] for i in rows], (block,), pad_id=pad_id))
