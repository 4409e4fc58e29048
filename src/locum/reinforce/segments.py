"""Samplers that go on from the middle of answers: from cut points of finished ones, or from every node of a tree.

Both say what a text is worth at a state by the mean reward of texts that go on from it; `locum.reinforce.spo` has the
method that they belong to. Draws depend on where a text stands in its prompt's answers or tree, not on what else is drawn.

Example:
    >>> import torch
    >>> from locum.reinforce.segments import cut_points
    >>> unsure = torch.tensor([[True, False, True, False, True, True]])  # tokens of probability below rho
    >>> cut_points(unsure, interval=2).long().tolist()  # every second of them begins a segment
    [[1, 0, 0, 0, 1, 0]]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locum.errors import UserError
from locum.method import require
from locum.reinforce.base import Asked, Composed, Mask, PerToken, Sample
from locum.reinforce.collect import Flat
from locum.tokens.rollouts import Rollouts

__all__ = ["SPOChainSample", "SPOTreeSample", "check", "cut_points", "unsure"]

PerRow = Float[Tensor, " rows"]
Texts = Sequence[Sequence[int]]
_Node = tuple[int, list[int]]  # the number of its prompt, the tokens said since


def unsure(logp: PerToken, mask: Mask, rho: float) -> Mask:
    """Tokens that were said with a probability below rho; at rho they are not."""
    return mask & (logp < log(rho))


def cut_points(candidates: Mask, interval: int) -> Mask:
    """Each row's first candidate and every `interval`-th after it: parts of equal counts, the last one may have fewer."""
    return candidates & ((candidates.cumsum(-1) - 1) % interval == 0)


@dataclass(frozen=True)
class _Continued(Sample):
    """What both samplers have in common."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"segments"})

    def refuses(self, recipe: Composed) -> str:
        shape = next((stage for stage in recipe.stages if stage.slot == "shape"), None)
        if shape is None:
            return ""
        return (
            f"values states by the rewards of texts that go on from them, and {type(shape).__name__} would change those "
            "of its rows alone: leave one of them out"
        )


@dataclass(frozen=True)
class SPOChainSample(_Continued):
    """Flat answers, and the value of the state before every cut point, from continuations of its own.

    The rows are the answers. Columns: "old_logp"; "cut", 1 on the first token of each segment; "cut_value", the value of the
    state before that token, nan where no continuation has a reward. States that are reached twice are valued once.

    Args:
        group_size: answers of a prompt, >= 1. Paper 8.
        rho: tokens of lower probability are candidates for a cut; in (0, 1]. Paper 0.9.
        interval: every so many candidates a segment begins, >= 1. Paper 5.
        n_mc: continuations of a state, >= 1. Paper 9, with larger models 4.
        unfinished_reward: of a text that ran into its limit; finite.
    """

    makes: ClassVar[frozenset[str]] = frozenset({"old_logp", "cut", "cut_value"})
    group_size: int = 8
    rho: float = 0.9
    interval: int = 5
    n_mc: int = 9
    unfinished_reward: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, ask: Asked, prompts: Texts) -> tuple[Rollouts, dict[str, float]]:
        rows, answers = Flat(self.group_size).answers(ask, prompts)
        logp = ask.columns(rows, frozenset({"logp"}))["logp"]
        cut = cut_points(unsure(logp, rows.mask, self.rho), self.interval)
        state, first = _distinct(cut, rows.group.tolist(), answers)
        owner, texts, ended = rows.group.tolist(), list(answers), rows.facts["ended"].cpu()
        more = 0
        if first:
            begun = [(owner[r], answers[r][:at]) for r, at in first]
            room = [ask.room - len(text) for _, text in begun]
            made = ask.generate([[*prompts[o], *text] for o, text in begun], self.n_mc, room, self._numbers(ask, first))
            begun = [one for one in begun for _ in range(self.n_mc)]
            owner += [o for o, _ in begun]
            texts += [[*text, *rest] for (_, text), rest in zip(begun, made.lists(), strict=True)]
            ended = torch.cat([ended, made.ended.cpu()])
            more = int(made.mask.sum())
        reward = _scored(ask, owner, texts, ended, self.unfinished_reward)
        values = reward[len(rows) :].double().view(-1, self.n_mc).nanmean(-1).to(reward.dtype).to(rows.device)
        value = torch.zeros(cut.shape, dtype=reward.dtype, device=rows.device)
        value[cut] = values[state.to(rows.device)]
        figures = {
            "sampled_tokens": float(rows.mask.sum()) + more,
            "spo/segments": float(len(state)),
            "spo/states": float(len(first)),
        }
        rows = rows.with_reward(reward[: len(rows)])
        return rows.with_columns(old_logp=logp, cut=cut.to(reward.dtype), cut_value=value), figures

    def _numbers(self, ask: Asked, first: Sequence[tuple[int, int]]) -> Int[Tensor, " rows"]:
        """Of the continuations' draws: negative, so that no answer has one of them; row, column and copy in one number."""
        row, at = torch.tensor(first).unbind(-1)
        row = ask.numbers[row // self.group_size] * self.group_size + row % self.group_size
        state = row * ask.room + at
        return -1 - (state[:, None] * self.n_mc + torch.arange(self.n_mc)).flatten()


@dataclass(frozen=True)
class SPOTreeSample(_Continued):
    """A tree of each prompt, one call of the sampler for each depth. A row is an edge: the segment that made a child.

    Its prefix is all that the parent stands for, its group the parent, its reward the child's value: a leaf's own reward, or
    the mean of the children's values. Fact "depth": 0 for a prompt's children.

    Args:
        branching: children of a node by depth, >= 2 each; the last may be 1 behind others. Paper (6, 6, 6).
        segment_tokens: most tokens of a segment, >= 1; at the last depth a text runs to its end. Paper 600 for long answers,
            30 for grade-school arithmetic.
        unfinished_reward: of a text that ran into its limit; finite.
    """

    makes: ClassVar[frozenset[str]] = frozenset({"depth"})
    branching: tuple[int, ...] = (6, 6, 6)
    segment_tokens: int = 600
    unfinished_reward: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, ask: Asked, prompts: Texts) -> tuple[Rollouts, dict[str, float]]:
        edges, levels, leaves = list[Rollouts](), list[_Level](), list[_Node]()
        nodes: list[_Node] = [(i, []) for i in range(len(prompts))]  # those that go on
        path, groups, depths = ask.numbers, 0, len(self.branching)
        figures = {f"spo/edges_{d + 1}": 0.0 for d in range(depths)}
        for d, b in enumerate(self.branching):
            left = torch.tensor([ask.room - len(text) for _, text in nodes])
            room = left if d == depths - 1 else left.clamp(max=self.segment_tokens)
            begun = [[*prompts[prompt], *text] for prompt, text in nodes]
            path = (path[:, None] * b + torch.arange(b)).flatten()
            made = ask.generate(begun, b, room.tolist(), path * depths + d)
            parent = torch.arange(len(nodes)).repeat_interleave(b)
            part = Rollouts.of([begun[i] for i in parent.tolist()], made, (groups + parent).to(made.ids.device))
            prompt = torch.tensor([prompt for prompt, _ in nodes])[parent].to(part.device)
            edges.append(part.with_facts(prompt=prompt, depth=torch.full_like(prompt, d)))
            # What stopped short of its room, and yet without an end, ran into a limit of the policy's own: a leaf.
            room, left, lengths = room[parent], left[parent], part.lengths.cpu()
            goes = ~made.ended.cpu() & (lengths == room) & (room < left)
            children = [(nodes[i][0], [*nodes[i][1], *s]) for i, s in zip(parent.tolist(), made.lists(), strict=True)]
            leaves += [children[i] for i in (~goes).nonzero()[:, 0].tolist()]
            levels.append(_Level(parent, goes))
            figures[f"spo/edges_{d + 1}"] = float(len(part))
            groups += len(nodes)
            nodes, path = [children[i] for i in goes.nonzero()[:, 0].tolist()], path[goes]
            if not nodes:
                break
        rows = Rollouts.join(edges)
        ended = rows.facts["ended"].cpu()[~torch.cat([level.goes for level in levels])]
        reward = _scored(ask, [p for p, _ in leaves], [text for _, text in leaves], ended, self.unfinished_reward)
        values, roots = _bottom_up(reward.double(), levels)
        figures |= {"sampled_tokens": float(rows.mask.sum()), "spo/values": float(roots.nansum())}
        return rows.with_reward(values.to(reward.dtype)), figures


@dataclass(frozen=True, eq=False)
class _Level:
    """The nodes of a depth: the parent of each, as a number among those of the depth above that go on, and which go on."""

    parent: Int[Tensor, " nodes"]
    goes: Bool[Tensor, " nodes"]


def _distinct(cut: Mask, owner: Sequence[int], answers: Texts) -> tuple[Int[Tensor, " cuts"], list[tuple[int, int]]]:
    """The state of each cut (row by row) as a number, and where each state comes first: row and column."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    first, state = list[tuple[int, int]](), list[int]()
    for row, at in cut.nonzero().tolist():
        n = known.setdefault((owner[row], tuple(answers[row][:at])), len(known))
        if n == len(first):
            first.append((row, at))
        state.append(n)
    return torch.tensor(state, dtype=torch.long), first


def _scored(ask: Asked, owner: Sequence[int], texts: Texts, ended: Bool[Tensor, " rows"], otherwise: float) -> PerRow:
    """Rewards of finished texts, in one call; another number for the unfinished."""
    done = ended.nonzero()[:, 0]
    if not len(done):
        return torch.full((len(texts),), otherwise)
    found = ask.reward([owner[i] for i in done.tolist()], [texts[i] for i in done.tolist()]).cpu()
    if found.isinf().any():
        raise UserError(f"a reward is {found[found.isinf()][0].item()}; rewards must be finite")
    return torch.full((len(texts),), otherwise, dtype=found.dtype).index_copy_(0, done, found)


def _bottom_up(leaf: Float[Tensor, " leaves"], levels: Sequence[_Level]) -> tuple[PerRow, Float[Tensor, " roots"]]:
    """Values of all nodes, depth by depth from the top, and of the roots: means of the children's, where those have any.

    Args:
        leaf: values of the leaves, in the same order.
    """
    values, below = list[Tensor](), leaf[:0]
    ends = leaf.split([int((~level.goes).sum()) for level in levels])
    for level, end in reversed(list(zip(levels, ends, strict=True))):
        value = torch.empty(len(level.goes), dtype=leaf.dtype)
        value[level.goes], value[~level.goes] = below, end
        known = ~value.isnan()
        sums = leaf.new_zeros(2, int(level.parent[-1]) + 1)
        total, count = sums.index_add_(1, level.parent, torch.stack([value.nan_to_num(0.0), known.to(leaf.dtype)]))
        below = total / count
        values.append(value)
    return torch.cat(values[::-1]), below


def _many(branching: Any) -> bool:
    """Whether these are numbers of children."""
    whole = isinstance(branching, tuple) and all(isinstance(b, int) for b in branching)
    return whole and min((*branching[:1], *branching[:-1]), default=0) >= 2 and branching[-1] >= 1


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "group_size": (lambda x: x >= 1, ">= 1"),
    "rho": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "interval": (lambda x: x >= 1, ">= 1"),
    "n_mc": (lambda x: x >= 1, ">= 1"),
    "segment_tokens": (lambda x: x >= 1, ">= 1"),
    "unfinished_reward": (isfinite, "finite"),
    "norm": (lambda x: x in ("none", "std", "loo"), "one of none, std, loo"),
    "branching": (_many, "a tuple of numbers >= 2, of which the last may be 1 behind others"),
}


def check(method: object) -> None:
    """Refuse fields that are out of range; a paper's main class has those of its parts."""
    for field, (ok, allowed) in LIMITS.items():
        if hasattr(method, field):
            require(method, field, ok(getattr(method, field)), allowed)
