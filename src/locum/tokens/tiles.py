"""What is made of next-token logits, tile by tile: nothing of size tokens x vocabulary is ever held.

A language model's logits are a product of hidden states and a head (`Scores`). `over_tiles` walks over the positions,
makes the logits of a few of them in float32 (float64 if they are), and hands them to a function of one tile: the
log-probability of the token that came, a divergence between two models, a distance to a teacher. Gradients make a tile
again instead of keeping it; those of this file's own functions are written out, so that they need one more tile at most.

All logarithms are natural. A token of probability 0 has log-probability -inf; nothing here raises or clips for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from locum.errors import UserError

TILE = 1 << 22  # elements of one model's logits that exist at a time: 16 MiB in float32

Tile = Float[Tensor, "r V"]


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's next-token logits at n positions: the logits themselves, or what they are a product of.

    Args:
        hidden: the logits [n, V]; with a head, the last hidden states [n, D].
        head, bias: logits = hidden @ head.T + bias. For models whose logits are exactly that.
        taps: what was picked up inside the model on the way, by name: a list over layers of tensors with n rows.
    """

    hidden: Float[Tensor, "n D"]
    head: Float[Tensor, "V D"] | None = None
    bias: Float[Tensor, " V"] | None = None
    taps: dict[str, list[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def vocab_size(self) -> int:
        return self.hidden.shape[-1] if self.head is None else self.head.shape[0]

    def project(self, hidden: Float[Tensor, "r D"]) -> Tile:
        """Logits of some of the positions, in the model's type."""
        return hidden if self.head is None else F.linear(hidden, self.head, self.bias)

    def logits(self, hidden: Float[Tensor, "r D"]) -> Tile:
        """Logits of some of the positions, at least float32."""
        return wide(self.project(hidden))

    def detach(self) -> "Scores":
        head, bias = (t if t is None else t.detach() for t in (self.head, self.bias))
        return Scores(self.hidden.detach(), head, bias, self.taps)


def over_tiles(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    scores: Sequence[Scores],
    *columns: Shaped[Tensor, "n ..."],
    tile: int | None = None,
) -> tuple[Tensor, ...]:
    """``fn(logits_1, ..., logits_k, *columns)`` over tiles of rows, its results (one number per row, each) concatenated.

    With gradients a tile is made again in the backward pass, so one tile is all that ever exists of the vocabulary.

    Args:
        fn: takes one tile [r, V] per model, then the columns' rows; returns one tensor [r] or several. Gradients flow to the
            tiles only, once (no second derivatives).
        scores: the models', all with one vocabulary and the same n positions.
        columns: what else belongs to the positions.
        tile: rows at a time.

    Raises: UserError when vocabularies differ.
    """
    widths = {s.vocab_size for s in scores}
    if len(widths) > 1:
        raise UserError(
            f"all models must have the same vocabulary; their logits have {', '.join(map(str, sorted(widths)))} entries"
        )
    rows = tile or max(1, TILE // widths.pop())

    def tupled(*parts: Tensor) -> tuple[Tensor, ...]:
        out = fn(*parts)
        return out if isinstance(out, tuple) else (out,)

    # A Function tracks tensors among its arguments only, so the scores' parts are laid out flat.
    flat = [t for s in scores for t in (s.hidden, s.head, s.bias)]
    return _OverTiles.apply(tupled, rows, len(scores), *flat, *columns)


class _OverTiles(torch.autograd.Function):
    """Forward without a graph; backward makes each tile again, differentiates it, and adds up the head's gradient in place."""

    @staticmethod
    def forward(ctx: Any, fn: Callable[..., tuple[Tensor, ...]], rows: int, k: int, *tensors: Tensor | None) -> Any:
        ctx.fn, ctx.rows, ctx.k = fn, rows, k
        ctx.save_for_backward(*tensors)
        device = _rowwise(tensors, k)[0].device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        scores = _scores(tensors, k)
        pieces = zip(*(p.split(rows) for p in _rowwise(tensors, k)), strict=True)
        done = [fn(*(s.logits(h) for s, h in zip(scores, p, strict=False)), *p[k:]) for p in pieces]
        return tuple(torch.cat(column) for column in zip(*done, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        fn, rows, k, tensors = ctx.fn, ctx.rows, ctx.k, ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        scores = _scores(tensors, k)
        pieces = zip(*(p.split(rows) for p in (*_rowwise(tensors, k), *upstream)), strict=True)
        with torch.autocast(ctx.cast[0], ctx.cast[1], enabled=ctx.cast[2]):
            for number, piece in enumerate(pieces):
                here = slice(number * rows, number * rows + len(piece[0]))
                _tile_backward(fn, scores, wanted, piece, len(upstream), grads, here)
        return (None, None, None, *grads)


def _tile_backward(
    fn: Callable[..., tuple[Tensor, ...]],
    scores: Sequence[Scores],
    wanted: Sequence[bool],
    piece: Sequence[Tensor],
    outputs: int,
    into: list[Tensor | None],
    here: slice,
) -> None:
    """One tile of the backward pass; a function of its own, so that nothing of a tile lives beside the next one.

    Args:
        piece: the tile's rows of hidden states, columns, and gradients of the `outputs` results.
        wanted, into: per hidden states, head and bias of each model, whether a gradient is wanted, and where it is added up.
        here: the tile's rows.
    """
    k = len(scores)
    with torch.no_grad():
        tiles = [s.logits(h) for s, h in zip(scores, piece, strict=False)]
    live = [i for i in range(k) if any(wanted[3 * i : 3 * i + 3])]
    for i in live:
        tiles[i] = tiles[i].detach().requires_grad_()
    with torch.enable_grad():
        out = fn(*tiles, *piece[k : len(piece) - outputs])
    pairs = [(o, u) for o, u in zip(out, piece[len(piece) - outputs :], strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs], [tiles[i] for i in live], [u for _, u in pairs], allow_unused=True
    )
    del out, pairs, tiles
    for i, dz in zip(live, found, strict=True):
        if dz is not None:
            _add(into[3 * i : 3 * i + 3], scores[i], piece[i], dz, here)


def _add(into: list[Tensor | None], score: Scores, hidden: Tensor, dz: Tensor, here: slice) -> None:
    """Add what a tile's gradient [r, V] is to hidden states, head and bias."""
    to_hidden, to_head, to_bias = into
    if score.head is None:
        assert to_hidden is not None
        to_hidden[here] = dz
        return
    # The product that made the tile may have run in another type (autocast): so do its gradients.
    kind = score.project(hidden[:0]).dtype
    dz = dz.to(kind)
    if to_hidden is not None:
        to_hidden[here] = dz @ score.head.to(kind)
    if to_head is not None:
        if to_head.dtype == kind:
            to_head.addmm_(dz.T, hidden.to(kind))
        else:
            to_head += dz.T @ hidden.to(kind)
    if to_bias is not None:
        to_bias += dz.sum(0)


def _scores(tensors: Sequence[Any], k: int) -> list[Scores]:
    return [Scores(tensors[3 * i], tensors[3 * i + 1], tensors[3 * i + 2]) for i in range(k)]


def _rowwise(tensors: Sequence[Any], k: int) -> list[Tensor]:
    """The tensors that have a row per position: hidden states, then columns."""
    return [*tensors[: 3 * k : 3], *tensors[3 * k :]]


# What one tile gives.


class _LogProb(torch.autograd.Function):
    """log softmax(z)[ids]; the gradient onehot - softmax(z) is made in one tile of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, ids: Tensor) -> Tensor:
        lse = _log_sum_exp(z)
        ctx.save_for_backward(z, ids, lse)
        return z.gather(-1, ids[:, None])[:, 0] - lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, ids, lse = ctx.saved_tensors
        dz = torch.sub(z, lse[:, None]).exp_().mul_(-grad[:, None])
        return dz.scatter_add_(-1, ids[:, None], grad[:, None]), None


def log_prob(z: Tile, ids: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
    """log softmax(z)[ids]."""
    return _LogProb.apply(z, ids)


def kl_of(logp: Tile, logq: Tile) -> Float[Tensor, " r"]:
    """KL(p || q) of two laws given as log-probabilities. What p never says adds 0; if q never says it and p does, inf."""
    return (logp.exp() * torch.where(logp == -torch.inf, 0.0, logp - logq)).sum(-1)


class _Divergence(torch.autograd.Function):
    """KL(p || q) for p = softmax(z), q = softmax(other); gradients p (log p/q - KL) in z and q - p in other."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, other: Tensor) -> Tensor:
        lse, lse_other = _log_sum_exp(z), _log_sum_exp(other)
        p = torch.sub(z, lse[:, None]).exp_()
        gap = torch.sub(z, other).masked_fill_(p == 0, 0.0)
        found = torch.linalg.vecdot(p, gap) + (lse_other - lse)
        ctx.save_for_backward(z, other, lse, lse_other, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, other, lse, lse_other, found = ctx.saved_tensors
        p = torch.sub(z, lse[:, None]).exp_()
        dz = dother = None
        if ctx.needs_input_grad[0]:
            dz = torch.sub(z, other).masked_fill_(p == 0, 0.0).add_((lse_other - lse - found)[:, None])
            dz.mul_(p).mul_(grad[:, None])
        if ctx.needs_input_grad[1]:
            dother = torch.sub(other, lse_other[:, None]).exp_().sub_(p).mul_(grad[:, None])
        return dz, dother


def divergence(z: Tile, other: Tile) -> Float[Tensor, " r"]:
    """KL(softmax(z) || softmax(other)), in nats, with gradient into both. Mind the direction: what is averaged over comes first.

    A token that the first never says adds 0; one that it says and the second never does makes it inf.
    """
    return _Divergence.apply(z, other)


def _log_sum_exp(z: Tile) -> Float[Tensor, " r"]:
    """logsumexp with one tile beside z, not two; a row of nothing but -inf is nan, as a law of nothing should be."""
    top = z.amax(-1)
    return torch.sub(z, top[:, None]).exp_().sum(-1).log_().add_(top)


class _Distilled(torch.autograd.Function):
    """KL(p || q) for p = softmax(z). The gradient in z is p (log p/q - KL), so two tiles are kept; autograd keeps three and a mask."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, logq: Tensor) -> Tensor:
        logp = z.log_softmax(-1)
        p = logp.exp()
        gap = logp.sub_(logq).masked_fill_(p == 0, 0.0)
        found = (p * gap).sum(-1)
        ctx.save_for_backward(p, gap, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, gap, found = ctx.saved_tensors
        return (gap - found[:, None]).mul_(p).mul_(grad[:, None]), None


def distilled(z: Tile, logq: Tile) -> Float[Tensor, " r"]:
    """KL(softmax(z) || q), the student first, q given as log-probabilities: `kl_of` with gradient into z alone.

    What the student never says adds 0 and gets no gradient; what it says and q does not makes it inf.
    """
    return _Distilled.apply(z, logq)


def extrapolated(z: Tile, to: Tile, away: Tile, strength: Float[Tensor, " r"]) -> Tile:
    """log softmax(z + strength (to - away)) of logits or log-probabilities; what `to` or `away` rule out stays ruled out."""
    never = torch.isneginf(to) | torch.isneginf(away)
    return torch.addcmul(z, strength[:, None], to - away).masked_fill(never, -torch.inf).log_softmax(-1)


def tile_entropy(z: Tile) -> Float[Tensor, " r"]:
    """H(softmax(z)) in nats."""
    return torch.special.entr(z.softmax(-1)).sum(-1)


def distillation(student: Scores, teacher: Scores, tile: int | None = None) -> Float[Tensor, " n"]:
    """KL(student || teacher) at each of their positions, in nats, with gradient into the student's hidden states and head.

    Logits exist for one tile of positions, gradients included.
    """
    return over_tiles(lambda z, q: distilled(z, q.log_softmax(-1)), [student, teacher.detach()], tile=tile)[0]


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
