"""A causal language model that thinks in mixtures: what it says is fed back as an average of embeddings, not as one token.

A chain has m outputs, m - 1 thoughts and an answer. alpha_t, the law of output t, is read at the last position of
(prompt, z_1 .. z_{t-1}); the thought z_t, made of it in one of the ways of `locum.models.thoughts`, stands where the next
token's embedding would; z_m is never fed; the answer is one token of alpha_m.

Any model that takes `inputs_embeds` will do. Mixtures are made by its *input* table, the way the model itself embeds tokens
(some scale), whatever its head is. Prompts are padded on the left, so that thoughts follow the last real token.

A chain of known thoughts takes one forward of prompt + m - 1 positions (`ContinuousPolicy.forward`). A chain that feeds itself
reads each prompt once, repeats its cache for the copies, and goes on by single steps. The model's mode is left as it is:
without dropout two forwards of one chain agree.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from locum.errors import UserError
from locum.models import thoughts
from locum.models.scoring import unwrapped
from locum.models.thoughts import Mode, Thought
from locum.tokens import logprobs as lp
from locum.tokens.rollouts import Generated, Rollouts, pad_left, seeds, uniforms
from locum.tokens.sampling import Sampling
from locum.tokens.tiles import Scores, wide

__all__ = ["Chain", "ContinuousPolicy"]

Heat = Callable[[Float[Tensor, "r V"]], Float[Tensor, " r"]]
Draws = Float[Tensor, "rows _T"]
Prefixes = Sequence[Sequence[int]]
PLAIN = Sampling(temperature=1.0)
FAR = 1 << 32  # more outputs than a chain has


@dataclass(frozen=True, eq=False)
class Chain:
    """Chains as they were thought, row by row.

    Args:
        ids: a token that stands for each thought, and the answer in the last column.
        facts: what the thoughts are mixtures of: token "thoughts" and their "weights", [rows, m - 1, S] each. Without weights
            all count the same; without tokens the weights are over the whole vocabulary.
        laws: alpha_t of each output; None where they were not asked for.
    """

    ids: Int[Tensor, "rows steps"]
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    laws: Float[Tensor, "rows steps V"] | None = None

    @property
    def answers(self) -> Int[Tensor, " rows"]:
        """The tokens that answer."""
        return self.ids[:, -1]


@dataclass(frozen=True, eq=False)
class _Asked:
    """How chains are to be thought: see `ContinuousPolicy.think`."""

    mode: Mode
    copies: int
    draws: Draws | None
    heat: Heat | None
    sampling: Sampling
    laws: bool

    def numbers(self, t: int, n: int, part: int = 0) -> Float[Tensor, "rows n"]:
        """n numbers per row for output t: the row's draw itself, and more that depend on the row's draws; in parts behind the
        first the latter only.
        """
        assert self.draws is not None
        own = self.draws[:, t, None][:, : part == 0]
        more = uniforms(t + part * FAR, seeds(self.draws), n - own.shape[1]).to(own.dtype)
        return torch.cat([own, more], -1)

    def answer(self, z: Float[Tensor, "rows V"], t: int) -> Int[Tensor, " rows"]:
        law = self.sampling.law(z)
        return law.argmax(-1) if self.draws is None else thoughts.picked(law, self.numbers(t, 1))[:, 0]

    def thought(self, z: Float[Tensor, "rows V"], t: int) -> Thought:
        made = self.mode(self.sampling.law(z / self.mode.temperature), lambda n, part=0: self.numbers(t, n, part))
        return made if made.weights is None else replace(made, weights=made.weights.to(z.dtype))


class ContinuousPolicy(nn.Module):
    """A causal language model as a policy whose completions are chains of m outputs.

    Args:
        model: a Hugging Face causal language model, possibly wrapped; anything that has `get_input_embeddings` and maps
            `inputs_embeds` to `logits`, with `past_key_values` for chains that feed themselves.
        steps: m, outputs of a chain: thoughts and one answer; >= 1.
        batch_rows: chains that run at once.
    """

    def __init__(self, model: nn.Module, steps: int, batch_rows: int = 1024) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("batch_rows", batch_rows)):
            if not value >= 1:
                raise UserError(f"ContinuousPolicy.{name} must be >= 1, got {value!r}")
        self.model, self.steps, self.batch_rows = model, steps, batch_rows
        self._known = inspect.signature(type(unwrapped(model)).forward).parameters

    # From tokens and weights to embeddings.

    def embed(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """The embeddings that the model itself gives these tokens."""
        return unwrapped(self.model).get_input_embeddings()(ids)

    def mix(
        self, weights: Float[Tensor, "*n S"] | None, ids: Int[Tensor, "*n S"] | None = None
    ) -> Float[Tensor, "*n D"]:
        """sum_s weights[s] e_{ids[s]}, with gradient into the weights and the table.

        Args:
            weights: None for equal ones.
            ids: None for the whole vocabulary, in order.
        """
        if weights is None:
            assert ids is not None
            return self.embed(ids).mean(-2)
        table = self._table()
        if ids is not None:
            weights = weights.new_zeros(*ids.shape[:-1], len(table)).scatter_add(-1, ids, weights)
        if weights.shape[-1] > len(table):
            raise UserError(f"laws are over {weights.shape[-1]} tokens, and the model embeds {len(table)}")
        return weights.to(table.dtype) @ table[: weights.shape[-1]]

    def _table(self) -> Float[Tensor, "V D"]:
        """All embeddings; by way of the module where it does more than look them up."""
        module = unwrapped(self.model).get_input_embeddings()
        if type(module) is nn.Embedding:
            return module.weight
        return module(torch.arange(module.weight.shape[0], device=module.weight.device))

    # Chains.

    def forward(
        self,
        prefix: Int[Tensor, "rows P"],
        prefix_mask: Bool[Tensor, "rows P"],
        thoughts: Float[Tensor, "rows T D"] | None = None,
    ) -> Float[Tensor, "rows _m V"]:
        """Logits of all outputs, with gradient.

        Args:
            prefix, prefix_mask: prompts, padded on the left; true on real tokens.
            thoughts: embeddings of the m - 1 thoughts: one forward. None for the model's own mixtures, step by step, with
                gradient through the whole chain.
        """
        if not bool(prefix_mask[:, -1].all()):
            raise UserError("prompts must be padded on the left: thoughts follow the last real token")
        if thoughts is None:
            found: list[Tensor] = []

            def feed(logits: Tensor, t: int) -> Tensor:
                found.append(logits)
                return self.mix(wide(logits).softmax(-1))

            self._unroll(prefix, prefix_mask, 1, feed)
            return torch.stack(found, 1)
        many = thoughts.shape[1]
        embeds = torch.cat([self.embed(prefix), thoughts], 1)
        real = torch.cat([prefix_mask, prefix_mask.new_ones(len(prefix), many)], 1)
        return self._call(embeds, real, 1 + many).logits[:, -1 - many :]

    def scores(self, rollouts: Rollouts) -> Scores:
        """The scores of all outputs of chains with these thoughts. Embeddings are the current ones, with gradient."""
        if rollouts.ids.shape[1] != self.steps or not bool(rollouts.mask.all()):
            raise UserError(f"a chain has {self.steps} outputs; these completions are not chains of this policy")
        ids, weights = rollouts.facts.get("thoughts"), rollouts.facts.get("weights")
        if ids is None and weights is None:
            ids = rollouts.ids[:, :-1, None]  # texts of plain tokens
        return Scores(self(rollouts.prefix, rollouts.prefix_mask, self.mix(weights, ids)).flatten(0, 1))

    def think(
        self,
        prefixes: Prefixes,
        mode: str | Mode = "base",
        copies: int = 1,
        draws: Draws | None = None,
        heat: Heat | None = None,
        sampling: Sampling = PLAIN,
        laws: bool = True,
    ) -> Chain:
        """Chains that feed themselves. Without draws the answer is the likeliest token, otherwise it is drawn.

        Args:
            prefixes: token ids, at least one each.
            mode: "base", "mts", "dirichlet" or "discrete" with that mode's defaults, or a mode of `locum.models.thoughts`.
            copies: chains per prefix, adjacent rows.
            draws: numbers in [0, 1), m or more per row; what output t draws depends on its row's numbers alone, and its
                first token is picked by that of column t.
            heat: temperatures from the logits of an output.
            sampling: what is done to logits before they are a law to mix, or to draw from.
            laws: whether to keep alpha_t, [rows, m, V]: what the logits say before the sampling has its way with them.

        Raises: UserError for draws that are missing or do not fit, an empty prefix, an unknown mode; ValueError for logits that
            no law can be made of.
        """
        rows, mode = len(prefixes) * copies, thoughts.mode(mode)
        if draws is None and mode.draws:
            raise UserError(f"{type(mode).__name__} draws its thoughts and needs draws: {self.steps} numbers per row")
        if draws is not None and (draws.shape[0] != rows or draws.shape[1] < self.steps):
            raise UserError(f"draws must have {rows} rows and at least {self.steps} columns, got {list(draws.shape)}")
        if not (rows and all(len(p) for p in prefixes)):
            raise UserError("chains need a prefix, of one token at least each, and one copy or more")
        asked = _Asked(mode, copies, draws, heat, sampling, laws)
        parts = []
        each = max(1, self.batch_rows // copies)
        for i in range(0, len(prefixes), each):
            own = draws if draws is None else draws[i * copies : (i + each) * copies]
            parts.append(self._think(prefixes[i : i + each], replace(asked, draws=own)))
        return Chain(
            torch.cat([p.ids for p in parts]),
            {name: torch.cat([p.facts[name] for p in parts]) for name in parts[0].facts},
            torch.cat([p.laws for p in parts if p.laws is not None]) if laws else None,
        )

    def generate(
        self,
        prefixes: Prefixes,
        copies: int = 1,
        room: Sequence[int] | None = None,
        draws: Draws | None = None,
        heat: Heat | None = None,
        sampling: Sampling = PLAIN,
        mode: str | Mode = "mts",
    ) -> Generated:
        """`think` as rollouts are made of it: the thoughts travel as facts of their rows. One token each unless told otherwise."""
        if short := [n for n in room or () if n < self.steps]:
            raise UserError(f"a chain has {self.steps} outputs, and there is room for {short[0]} tokens")
        chain = self.think(prefixes, mode, copies, draws, heat, sampling, laws=False)
        whole = torch.ones_like(chain.ids, dtype=torch.bool)
        return Generated(chain.ids, whole, whole[:, 0], chain.facts)

    @torch.no_grad()
    def _think(self, prefixes: Prefixes, asked: _Asked) -> Chain:
        prefix, real = pad_left(prefixes, next(self.model.parameters()).device)
        if asked.draws is not None:
            asked = replace(asked, draws=asked.draws.to(prefix.device))
        mixed: list[Thought] = []
        said: list[Tensor] = []
        laws: list[Tensor] = []

        def feed(logits: Tensor, t: int) -> Tensor | None:
            z = wide(logits)
            if asked.laws:
                laws.append(z.softmax(-1))
            z = z if asked.heat is None else z / asked.heat(z)[:, None]
            if t == self.steps - 1:
                said.append(asked.answer(z, t))
                return None
            thought = asked.thought(z, t)
            mixed.append(thought)
            said.append(thought.first)
            return self.mix(thought.weights, thought.ids)

        self._unroll(prefix, real, asked.copies, feed)
        facts = {
            name: torch.stack([getattr(x, of) for x in mixed], 1)
            for name, of in (("thoughts", "ids"), ("weights", "weights"))
            if mixed and getattr(mixed[0], of) is not None
        }
        return Chain(torch.stack(said, 1), facts, torch.stack(laws, 1) if asked.laws else None)

    def _unroll(
        self,
        prefix: Int[Tensor, "prompts P"],
        real: Bool[Tensor, "prompts P"],
        copies: int,
        feed: Callable[[Tensor, int], Tensor | None],
    ) -> None:
        """Ask `feed` for the embedding that follows, given the logits of each output of every row in turn."""
        out = self._call(self.embed(prefix), real, 1, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None and self.steps > 1:
            raise UserError(
                f"{type(unwrapped(self.model)).__name__} gives no cache of keys and values, which chains that feed themselves "
                "go on from (gradient checkpointing switches it off)"
            )
        if copies > 1 and cache is not None:
            cache.batch_repeat_interleave(copies)
        logits, real = (x.repeat_interleave(copies, 0) for x in (out.logits[:, -1], real))
        for t in range(self.steps):
            z = feed(logits, t)
            if z is None or t == self.steps - 1:
                return
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
            logits = self._call(z[:, None], real, 1, use_cache=True, past_key_values=cache).logits[:, -1]

    def _call(self, embeds: Float[Tensor, "rows L D"], real: Bool[Tensor, "rows _W"], keep: int, **given: Any) -> Any:
        """The model on embeddings that end a text whose real tokens are given; logits of the last `keep` at least."""
        given.setdefault("use_cache", False)
        if not bool(real.all()):
            given["attention_mask"] = real.long()
            if "position_ids" in self._known:
                given["position_ids"] = lp.positions(real)[:, -embeds.shape[1] :]
        if "logits_to_keep" in self._known:
            given["logits_to_keep"] = keep
        return self.model(inputs_embeds=embeds, **given)
