"""Texts of a causal language model, many at once, each token picked by a number given beforehand.

A training loop asks for several completions of one prompt, and for completions of texts that were begun before. So every
distinct prefix is read once, whoever asks for it and however often; its entries in the cache are then repeated, a row per
completion. A step is one forward over all rows and writes in place. Rows that have come to their end leave the batch.

What a row says depends on its prefix, its room and its draws alone: not on the rows beside it, nor on when these leave.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from locum.errors import UserError
from locum.models.caller import Caller
from locum.models.scoring import unwrapped
from locum.tokens.rollouts import Generated
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import wide

__all__ = ["generate", "require_room"]

Heat = Callable[[Float[Tensor, "r V"]], Float[Tensor, " r"]]


@torch.no_grad()  # not inference mode: what a forward may keep in the model must serve training afterwards
def generate(
    model: nn.Module,
    prefixes: Sequence[Sequence[int]],
    copies: int,
    room: Sequence[int],
    draws: Float[Tensor, "rows _T"] | None,
    *,
    eos_ids: Collection[int],
    heat: Heat | None = None,
    sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008 (frozen)
    batch_rows: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """`copies` completions of each prefix, as adjacent rows, on the model's device.

    Args:
        model: a Hugging Face causal language model, possibly wrapped by PEFT or DDP, in any mode; it comes back in it.
        prefixes: token ids, at least one each. Equal ones are read once.
        room: most new tokens of each prefix.
        draws: the uniform number in [0, 1) that picks token t of row r: the first id whose cumulated probability exceeds
            it. At least as many columns as the largest room; None where the sampling is greedy.
        eos_ids: ids that end a row; they belong to it.
        heat: temperatures from the logits about to be sampled, of the rows that still run; the logits are divided by
            them, and then `sampling` is done to them.
        batch_rows: rows that run at once.
        progress: ``progress(done, total)`` in rows, after every batch.

    Raises: UserError for an empty prefix, one without room or too long for the model's positions, draws that do not fit,
        logits that no law can be made of, and models whose cache is not known here.
    """
    require_room(model, prefixes, room)
    _check(prefixes, copies, room, draws, sampling, batch_rows)
    caller = Caller(model)
    device = caller.inner.device
    total = len(prefixes) * copies
    rooms = torch.tensor(list(room), dtype=torch.long, device=device).repeat_interleave(copies)
    ids = torch.zeros(total, max(room, default=0), dtype=torch.long, device=device)
    numbers = None if sampling.greedy or draws is None else draws.to(device)
    job = _Job(caller, ids, rooms, numbers, copies, eos_ids, sampling, heat)
    done = 0
    with _evaluating(model):
        for texts, rows in _batches(prefixes, copies, batch_rows, caller.alike):
            for part in job.batch(texts, rows, batch_rows):
                done += part
                if progress is not None:
                    progress(done, total)
    return job.result()


def _batches(
    prefixes: Sequence[Sequence[int]], copies: int, most: int, alike: bool
) -> Iterator[tuple[list[tuple[int, ...]], list[list[int]]]]:
    """Distinct prefixes, the longest ones first, and the numbers of each one's rows: at most `most`, or one prefix with more.

    A prefix much shorter than the longest begins another batch, where it is not padded so far; with `alike` any shorter one.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prefix in enumerate(prefixes):
        rows.setdefault(tuple(prefix), []).extend(range(i * copies, (i + 1) * copies))
    batch: list[tuple[int, ...]] = []
    held = 0
    for text in sorted(rows, key=len, reverse=True):
        shorter = len(batch[0]) - len(text) if batch else 0
        if batch and (held + len(rows[text]) > most or shorter > (0 if alike else 32 + len(text))):
            yield batch, [rows[t] for t in batch]
            batch, held = [], 0
        batch.append(text)
        held += len(rows[text])
    if batch:
        yield batch, [rows[t] for t in batch]


@dataclass(frozen=True, eq=False)
class _Job:
    """One call of `generate`: where its tokens go, and how they are picked."""

    caller: Caller
    ids: Int[Tensor, "rows width"]
    rooms: Int[Tensor, " rows"]
    draws: Float[Tensor, "rows _T"] | None  # None where the likeliest token is taken
    copies: int
    eos_ids: Collection[int]
    sampling: Sampling
    heat: Heat | None

    def batch(self, texts: list[tuple[int, ...]], rows: list[list[int]], most: int) -> Iterator[int]:
        """Read the texts, then write their rows, at most `most` at once. Yields how many are done."""
        device = self.ids.device
        numbers = torch.tensor([n for own in rows for n in own], device=device)
        which = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in rows])).to(device)
        width = int(self.rooms[numbers].max())
        logits, cache, real = self.caller.read(texts, width)
        parts = -(-len(numbers) // most)
        for part, of in zip(numbers.tensor_split(parts), which.tensor_split(parts), strict=True):
            own = cache if parts == 1 else copy.deepcopy(cache)
            if len(part) != len(texts) or parts > 1:  # not a row per text already
                own.reorder_cache(of)
            self._write(part, logits[of], own, real[of], width)
            yield len(part)

    def _write(self, rows: Tensor, logits: Tensor, cache: Any, real: Bool[Tensor, "r P"], width: int) -> None:
        """Go on with rows whose prefixes are in the cache until all of them are done."""
        past, position, left = real.shape[1], real.sum(-1), self.rooms[rows]
        seen = None if bool(real.all()) else F.pad(real, (0, width), value=True)
        ends = torch.zeros(logits.shape[-1], dtype=torch.bool, device=rows.device)
        ends[[i for i in self.eos_ids if 0 <= i < len(ends)]] = True
        done = torch.zeros_like(rows, dtype=torch.bool)
        for t in range(width):
            token, wrong = self._pick(logits, rows, t)
            self.ids[rows, t] = token
            done = done | ends[token] | (left == t + 1)
            running, bad = torch.stack([(~done).sum(), wrong.sum()]).tolist()  # the one time that the host waits
            if bad:
                self._refuse(logits, rows, wrong, t)
            if not running:
                return
            if 4 * running <= 3 * len(done):
                keep = (~done).nonzero()[:, 0]
                cache.reorder_cache(keep)
                rows, left, token, position, done = (x[keep] for x in (rows, left, token, position, done))
                seen = None if seen is None else seen[keep]
            mask = None if seen is None else seen[:, : past + t + 1]
            logits = self.caller.step(token, position, mask, cache)
            position = position + ~done  # rows that are done wait where they are, within the model's positions

    def _pick(self, logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """A token per row; and which rows have logits that none can be picked from."""
        z = wide(logits)
        if self.draws is None:
            best, token = z.max(-1)
            return token, ~best.isfinite()
        cold = None
        if self.heat is not None:
            heat = self.heat(z)
            z, cold = z / heat[:, None], ~(heat > 0)
        law = self.sampling
        if law.top_k is None and law.top_p is None and law.min_p is None:
            rising = (z if law.temperature == 1 else z / law.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        else:
            lawless = ~z.amax(-1).isfinite()
            rising = law.law(z.masked_fill(lawless[:, None], 0.0)).cumsum(-1)
            rising = rising.masked_fill(lawless[:, None], torch.nan)
        whole = rising[:, -1:]
        token = torch.searchsorted(rising, self.draws[rows, t, None] * whole, right=True)[:, 0]
        wrong = whole[:, 0].isnan()
        return token.clamp(max=z.shape[-1] - 1), wrong if cold is None else wrong | cold

    def _refuse(self, logits: Tensor, rows: Tensor, wrong: Tensor, t: int) -> None:
        first = int(wrong.long().argmax())
        where = f"after {t} tokens of a completion of prefix {int(rows[first]) // self.copies}"
        if self.heat is not None and bool(wide(logits)[first].amax().isfinite()):
            raise UserError(f"heat must give temperatures > 0, got {float(self.heat(wide(logits))[first])} {where}")
        raise UserError(
            f"the model's logits hold NaN, +inf or no finite value {where}; no token can be drawn from them"
        )

    def result(self) -> Generated:
        """All rows, each up to its end."""
        stop = torch.tensor(sorted(self.eos_ids), dtype=torch.long, device=self.ids.device)
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        first = torch.where(torch.isin(self.ids, stop), columns, len(columns)).amin(-1) if len(columns) else self.rooms
        ended = first < self.rooms
        lengths = torch.where(ended, first + 1, self.rooms)
        mask = columns < lengths[:, None]
        width = int(lengths.max()) if len(lengths) else 0
        return Generated(self.ids.masked_fill(~mask, 0)[:, :width], mask[:, :width], ended)


def require_room(model: nn.Module, texts: Sequence[Sequence[int]], room: Sequence[int], what: str = "prefix") -> None:
    """Refuse texts that the model cannot go on from.

    Raises: UserError naming the text's number: it is empty, or too long for the model's positions.
    """
    inner = unwrapped(model)
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    for number, (text, new) in enumerate(zip(texts, room, strict=False)):
        if not len(text):
            raise UserError(f"{what} {number} has no tokens; a completion needs at least one to go on from")
        if limit is not None and len(text) + new > limit:
            raise UserError(
                f"{what} {number} of {len(text)} tokens and {new} new ones exceed the {limit} positions "
                f"of {type(inner).__name__}"
            )


def _check(
    prefixes: Sequence[Sequence[int]],
    copies: int,
    room: Sequence[int],
    draws: Tensor | None,
    sampling: Sampling,
    batch_rows: int,
) -> None:
    for name, value in (("copies", copies), ("batch_rows", batch_rows)):
        if value < 1:
            raise UserError(f"{name} must be >= 1, got {value}")
    if len(room) != len(prefixes):
        raise UserError(f"room must be one number per prefix, got {len(room)} for {len(prefixes)} prefixes")
    for number, value in enumerate(room):
        if value < 1:
            raise UserError(f"room must be >= 1, got {value} for prefix {number}")
    if sampling.greedy:
        return
    rows, width = len(prefixes) * copies, max(room, default=0)
    if draws is None or draws.shape[0] != rows or draws.shape[1] < width:
        got = "none" if draws is None else list(draws.shape)
        raise UserError(f"draws must have {rows} rows and at least {width} columns, got {got}")
    if not bool(((draws >= 0) & (draws < 1)).all()):
        raise UserError("draws must lie in [0, 1); some do not")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the block lasts; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
