"""Masked diffusion language models: texts filled in from masks, and the probabilities of what is hidden.

Such a model sees a whole text, some tokens replaced by a mask token, and says at every hidden place what was there (LLaDA,
arXiv 2502.09992, or any bidirectional model with a mask token). The logits at a place are of the token at that place: a model
that keeps the shift of the causal one it was made from, as Dream does, needs a wrapper that shifts them back.

A completion begins as masks and is filled in block by block from the left, in S steps a block. In each step every hidden
place of the block draws a token from its own law; the n of which the model is surest stay, the others are hidden again:

    n = floor(m / S), and one more in the first (m mod S) steps      m hidden places of the block at its beginning
    sure: softmax(logits)[token], whatever the temperature it was drawn at
    guidance w: (1 + w) logits - w logits without the prompt         arXiv 2207.12598

Drawing by inverse CDF from softmax(logits/temperature) is the same law as the arg max of logits plus temperature times Gumbel
noise, with one number in the place of a vocabulary of them. A row's draws depend on its own numbers alone.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from locum.errors import UserError
from locum.method import require
from locum.models.scoring import stands_alone, unwrapped
from locum.models.training import without_dropout
from locum.tokens.rollouts import Generated, PerToken, Rollouts, pad_left, seeds, uniforms
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores, Tile, log_prob, over_tiles

__all__ = ["MaskedDiffusion"]

Places = Bool[Tensor, "rows tokens"]


@dataclass(eq=False)
class MaskedDiffusion:
    """A masked diffusion model as a policy: it fills in completions, and tells how likely their hidden tokens are.

    Args:
        model: called as ``model(ids, attention_mask=...)``; returns logits [rows, length, V], or something that has them as
            `.logits`. Positions of texts padded on the left are the model's own business. Its dropouts are set to 0.
        mask_id: the mask token. It is never drawn and has no probability.
        eos_ids: ids that end a completion; what is behind the first of them does not count. Without any a completion is as
            long as its room.
        block: tokens filled in at a time; None for all of a completion.
        steps: forwards for a block; None for one per token.
        remask: which tokens stay: those of most "confidence", or "random" ones.
        guidance: weight of the guidance, >= 0; 0 for none.
        batch_rows: rows that are filled in at once.
    """

    model: nn.Module = field(repr=False)
    mask_id: int
    eos_ids: Collection[int] = ()
    block: int | None = None
    steps: int | None = None
    remask: str = "confidence"
    guidance: float = 0.0
    batch_rows: int = 64

    def __post_init__(self) -> None:
        known = isinstance(self.mask_id, int) and self.mask_id >= 0
        require(self, "mask_id", known, "the id of the model's mask token")
        require(self, "eos_ids", self.mask_id not in self.eos_ids, "without the mask token")
        require(self, "block", self.block is None or self.block >= 1, ">= 1 or None")
        require(self, "steps", self.steps is None or self.steps >= 1, ">= 1 or None")
        require(self, "remask", self.remask in ("confidence", "random"), '"confidence" or "random"')
        require(self, "guidance", 0 <= self.guidance < float("inf"), "finite and >= 0")
        require(self, "batch_rows", self.batch_rows >= 1, ">= 1")
        without_dropout(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters(), torch.empty(0)).device

    def logits(
        self, ids: Int[Tensor, "rows length"], attention_mask: Bool[Tensor, "rows length"]
    ) -> Float[Tensor, "rows length V"]:
        """Of every place; masks stand in the ids."""
        return self._forward(ids, attention_mask)

    def _forward(self, ids: Tensor, real: Tensor) -> Tensor:
        # Without gradient past a wrapper that binds processes: their numbers of forwards differ there.
        model = self.model if torch.is_grad_enabled() else getattr(self.model, "module", self.model)
        out = model(ids, attention_mask=real.long())
        return out if isinstance(out, Tensor) else out.logits

    # What is hidden.

    def log_probs(self, rollouts: Rollouts, hidden: Places, prompt: Bool[Tensor, "rows _P"] | None = None) -> PerToken:
        """log p(token | all that is not hidden) at the hidden places of completions, with gradient; 0 elsewhere.

        Args:
            hidden: tokens of the completions that are replaced by the mask token.
            prompt: tokens of the prefixes that are replaced as well.

        Raises: UserError for a completion that holds the mask token.
        """
        if bool((rollouts.ids == self.mask_id)[rollouts.mask].any()):
            raise UserError(f"a completion holds the mask token {self.mask_id}, which no text can say")
        hidden = hidden & rollouts.mask
        unseen = torch.zeros_like(rollouts.prefix_mask) if prompt is None else prompt & rollouts.prefix_mask
        ids, real, _ = rollouts.texts()
        where = torch.cat([unseen, hidden], 1)
        asked = torch.cat([torch.zeros_like(unseen), hidden], 1)
        scores = self._scores(ids.masked_fill(where, self.mask_id), real, asked)

        def tile(z: Tile, ids: Tensor) -> Tensor:
            return log_prob(self._without_mask(z), ids)

        found = over_tiles(tile, [scores], rollouts.ids[hidden])[0]
        return torch.zeros(hidden.shape, dtype=found.dtype, device=found.device).masked_scatter(hidden, found)

    def _without_mask(self, z: Tile) -> Tile:
        ids = torch.arange(z.shape[-1], device=z.device)
        return z.masked_fill(ids == self.mask_id, -torch.inf)

    def _scores(self, ids: Tensor, real: Tensor, where: Tensor) -> Scores:
        """The scores at some places. Where a model's logits are its head's product, the head is given those places alone."""
        inner = unwrapped(self.model)
        head: Any = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if not stands_alone(head) or not getattr(inner, "_locum_plain_head", True):
            return Scores(self._forward(ids, real)[where])
        read: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
            if given[0].shape[:2] != where.shape:
                return None
            read.extend((given[0][where], given[0][:, :1]))
            return (read[1],)

        made: list[Tensor] = []
        hooks = [head.register_forward_pre_hook(keep), head.register_forward_hook(lambda *x: made.append(x[2]))]
        try:
            logits = self._forward(ids, real)
        finally:
            for hook in hooks:
                hook.remove()
        if not hasattr(inner, "_locum_plain_head"):
            inner._locum_plain_head = bool(read) and torch.equal(logits.detach(), made[0].detach().to(logits.dtype))
        if not read or not inner._locum_plain_head:
            return Scores((self._forward(ids, real) if read else logits)[where])
        kind = made[0].dtype  # what the head multiplies in, which a wrapper's autocast may have changed
        return Scores(read[0].to(kind), head.weight.to(kind), None if head.bias is None else head.bias.to(kind))

    # Filling in.

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        copies: int,
        room: Sequence[int],
        draws: Float[Tensor, "rows _T"],
        sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008 (frozen)
    ) -> Generated:
        """`copies` completions of each prefix, as adjacent rows; what a row says depends on its own draws and room.

        Args:
            room: tokens to fill in for each prefix; whole blocks.
            draws: a row's numbers, of which its further ones are made.

        Raises: UserError for a room that is not a number of whole blocks.
        """
        for i, n in enumerate(room):
            if n < 1 or n % (self.block or 1):
                raise UserError(f"the room of prefix {i} is {n} tokens; blocks of {self.block or 1} must fill it")
        rows = [(i, n) for i, n in enumerate(room) for _ in range(copies)]
        own, width = seeds(draws.to(self.device)), max(room, default=1)
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        for at in range(0, len(rows), self.batch_rows):
            here = rows[at : at + self.batch_rows]
            prefix, real = pad_left([prefixes[i] for i, _ in here], self.device)
            most = torch.tensor([n for _, n in here], device=self.device)
            filled = _Filling(self, prefix, real, most, own[at : at + self.batch_rows], sampling).run()
            ids[at : at + len(here), : filled.shape[1]] = filled
        inside = (
            torch.arange(width, device=self.device) < torch.tensor([n for _, n in rows], device=self.device)[:, None]
        )
        ends = inside & self.is_end(ids)
        mask = inside & (ends.cumsum(-1) - ends.long() == 0)
        long = int(mask.sum(-1).max()) if rows else 0
        ended = ends.any(-1) if self.eos_ids else torch.ones(len(rows), dtype=torch.bool, device=self.device)
        return Generated(torch.where(mask, ids, 0)[:, :long], mask[:, :long], ended)

    def is_end(self, ids: Shaped[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        """Where a completion ends."""
        return torch.isin(ids, torch.tensor(sorted(self.eos_ids), dtype=torch.long, device=ids.device))


class _Filling:
    """A batch of rows on their way: prefixes, and masks that become tokens."""

    def __init__(
        self, policy: MaskedDiffusion, prefix: Tensor, real: Tensor, most: Tensor, own: Tensor, sampling: Sampling
    ) -> None:
        self.policy, self.own, self.sampling = policy, own, sampling
        self.begin, self.width = prefix.shape[1], int(most.max())
        self.column = torch.arange(self.width, device=prefix.device)
        self.inside = self.column < most[:, None]
        self.real = torch.cat([real, self.inside], 1)
        self.ids = torch.cat([prefix, torch.where(self.inside, policy.mask_id, 0)], 1)

    def run(self) -> Int[Tensor, "rows tokens"]:
        """The completions. Rows that have ended are left as they are: later blocks never change earlier ones."""
        block = self.policy.block or self.width
        steps = min(self.policy.steps or block, block)
        ended = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for number, start in enumerate(range(0, self.width, block)):
            here = self.inside & (self.column >= start) & (self.column < start + block)
            live = (here.any(-1) & ~ended).nonzero()[:, 0]
            size = here[live].sum(-1)
            for step in range(steps if len(live) else 0):
                self._step(live, here[live], size // steps + (step < size % steps), number * steps + step)
            ended |= (here & self.policy.is_end(self.ids[:, self.begin :])).any(-1)
        return self.ids[:, self.begin :]

    def _step(self, live: Tensor, here: Tensor, take: Tensor, number: int) -> None:
        """Draw a token for every hidden place, and keep the surest `take` of each row."""
        if not bool(take.any()):
            return
        ids, real, policy = self.ids[live], self.real[live], self.policy
        hidden = here & (ids[:, self.begin :] == policy.mask_id)
        where = torch.cat([torch.zeros_like(ids[:, : self.begin], dtype=torch.bool), hidden], 1)
        scores = [policy._scores(ids, real, where)]
        if policy.guidance:
            asked = real.clone()
            asked[:, self.begin :] = False
            scores.append(policy._scores(ids.masked_fill(asked, policy.mask_id), real, where))
        u = uniforms(2 * number, self.own[live], self.width)
        token, sure = over_tiles(self._drawn, scores, u[hidden])
        if policy.remask == "random":
            sure = uniforms(2 * number + 1, self.own[live], self.width)[hidden].double()
        order = torch.full(hidden.shape, -torch.inf, dtype=sure.dtype, device=sure.device).masked_scatter(hidden, sure)
        rank = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        drawn = torch.zeros_like(ids[:, self.begin :]).masked_scatter(hidden, token)
        kept = hidden & (rank < take[:, None])
        self.ids[live, self.begin :] = torch.where(kept, drawn, ids[:, self.begin :])

    def _drawn(self, z: Tile, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """A token of each place, and how sure the model is of it."""
        if self.policy.guidance:
            z = torch.lerp(rest[0], z, 1 + self.policy.guidance)
        z = self.policy._without_mask(z).double()
        rising = self.sampling.law(z).cumsum(-1)
        token = (rising <= rest[-1][:, None]).sum(-1).clamp(max=z.shape[-1] - 1)
        return token, z.softmax(-1).gather(-1, token[:, None])[:, 0]
