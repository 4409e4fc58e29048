"""From r to Q*: Your Language Model is Secretly a Q-Function

Expensive: token-level value functions for credit assignment and for search: training a critic, running value-guided
    tree search.
Stands in: the log-probabilities of a DPO-trained policy and of its reference: beta log(pi/ref) of a token is its
    advantage, and the cumulative log-likelihood is the score to search by.
Check: on trees small enough to solve exactly, credit equals the advantage to 1e-8; on trained policies, its correlation
    with the true advantage, and the true reward of what beam search finds.

A text is a path in the token MDP: state s_t = prompt and tokens so far, action a_t = next token, value 0 at the end.
The best policy against a reference at temperature beta is pi*(a|s) = exp((Q(s, a) - V(s))/beta), where
Q(s, a) = r(s, a) + beta log ref(a|s) + V(s'). Read backwards: every policy is the best one for some reward, and its
logits are Q / beta up to a constant per state. For a policy that DPO fitted to preferences, with reference ref:

    credit    c_t = beta log pi(a_t|s_t)/ref(a_t|s_t) = r(s_t, a_t) + V(s_{t+1}) - V(s_t)                  (eq. 8)
    response  sum_t r_t = V(s_0) + sum_t c_t; V(s_0) cancels between two responses to one prompt           (eq. 6)
    search    sum_{t<=K} (r_t + beta log ref_t) + V(s_{K+1}) = V(s_0) + beta sum_{t<=K} log pi(a_t|s_t)    (eq. 9)
    guidance  pi(a|s) ~ base(a|s) (proxy(a|s)/ref(a|s))^kappa                                              (eq. 10)
    decline   E_{a ~ ref} c = -beta KL(ref || pi) <= 0                                                     (eq. 11)

By eq. 9 a search with reward and value ranks texts as plain likelihood under the policy does: beam search on raw sums
of log-probabilities. (The paper prints -V(s_0) there; the sign is a slip, and a constant does not move the arg max.) By
eq. 11 the mean credit of chosen responses must fall during DPO if the reference was first tuned on them, although the
margin grows: falling likelihoods alone are no fault.

Shapes: ids, credits and masks are [B, L] with column t about token ids[:, t]; prompts and padding hold 0. Units: nats
times beta. Cost: one forward of each model per batch, and one [rows, L, V] at a time; a step of the search is one
forward of `beams` tokens.

Traps. Credit is an advantage, not the reward: a good token that everybody would say has credit near 0, and credits
compare only within one (policy, ref, beta). Only raw log-probabilities obey the identities; temperature, top-k and a
length penalty break them. Wide beams over-optimise what DPO fitted: 2 to 5 help, more lowers the true reward; look at
the lengths as well. The paper's "1 beam" is sampling at temperature 1 with top-k 50, not greedy. kappa and beta are two
numbers. A token that the reference never says has credit +inf, one that the policy never says -inf; nothing raises.

Example:
    >>> import torch
    >>> from locum.decode.rtoq import RtoQ
    >>> from locum.models import tiny
    >>> policy, ref = tiny(seed=1), tiny(seed=2)
    >>> found = RtoQ(beams=3).search(policy, [5, 6, 7], max_new_tokens=4)
    >>> len(found), len(found[0].ids)
    (3, 4)
    >>> ids = torch.tensor([[5, 6, 7, *found[0].ids]])
    >>> RtoQ(beta=0.1).credit(policy, ref, ids, prompt_len=[3]).mask.tolist()
    [[False, False, False, True, True, True, True]]

Authors: Rafailov, Hejna, Park, Finn
Year: 2024
Venue: COLM 2024
arXiv: 2404.12358
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from locum.decode.beam import Hypothesis, beam_search
from locum.decode.guide import guide, require_vocabulary
from locum.errors import UserError
from locum.method import require
from locum.models import LM
from locum.tokens import logprobs as lp

__all__ = ["RtoQ", "credit", "dpo_diagnostics", "guide", "rerank"]

Ids = Int[Tensor, "B L"]
PerToken = Float[Tensor, "B L"]
Lengths = Sequence[int] | Int[Tensor, " B"]


@dataclass(frozen=True)
class RtoQ:
    """Token credit and beam search with a DPO-trained policy and its reference.

    Args:
        beams: width of the search, >= 1. Paper 5; 2 to 5 are sensible, 1 is greedy.
        length_penalty: texts rank by logp / length^length_penalty. 0 is eq. 9; other values leave the theory.
        beta: the temperature the policy was trained with, > 0. Paper 0.1.
    """

    beams: int = 5
    length_penalty: float = 0.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        require(self, "beams", self.beams >= 1, ">= 1")
        require(self, "length_penalty", -torch.inf < self.length_penalty < torch.inf, "finite")
        require(self, "beta", 0 < self.beta < torch.inf, "finite and > 0")

    def search(self, policy: LM, prompt: Sequence[int] | str, max_new_tokens: int = 128) -> list[Hypothesis]:
        """The policy's best continuations of one prompt, best first (`beam_search`). A string is a user's turn."""
        ids = policy.chat(prompt) if isinstance(prompt, str) else prompt
        return beam_search(
            policy.session(len(ids) + 2 * self.beams * max_new_tokens),
            ids,
            beams=self.beams,
            max_new_tokens=max_new_tokens,
            length_penalty=self.length_penalty,
            eos_ids=policy.eos_ids,
        )

    def credit(
        self, policy: LM, ref: LM, ids: Ids, prompt_len: Lengths, attention_mask: Shaped[Tensor, "B L"] | None = None
    ) -> "Credit":
        """`credit` with this beta."""
        return credit(policy, ref, ids, prompt_len, attention_mask, beta=self.beta)

    def rerank(self, policy: LM, ref: LM, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> "Ranking":
        """`rerank` by credit, with this beta."""
        return rerank(policy, ref, prompt, candidates, beta=self.beta)


@dataclass(frozen=True, eq=False)
class Credit:
    """What each token of each response contributed, by eq. 8.

    Args:
        tokens: c [B, L] in nats times beta; 0 outside the response.
        mask: true on the response's tokens, its end-of-sequence token included.
        logp, logp_ref: log-probabilities of the tokens under the policy and the reference.
    """

    tokens: PerToken
    mask: Bool[Tensor, "B L"]
    logp: PerToken
    logp_ref: PerToken

    @property
    def running(self) -> PerToken:
        """Sum of the credits up to each token: beta times the cumulative log-ratio; -inf from a token pi never says."""
        total = self.tokens.masked_fill(self.tokens.isinf(), 0.0).cumsum(-1)
        total = total.masked_fill((self.tokens == torch.inf).cumsum(-1) > 0, torch.inf)
        return total.masked_fill((self.tokens == -torch.inf).cumsum(-1) > 0, -torch.inf)

    @property
    def sums(self) -> Float[Tensor, " B"]:
        """Credit of each response: its fitted total reward less V(s_0), comparable between answers to one prompt."""
        return self.running[:, -1]

    @property
    def ranks(self) -> Int[Tensor, "B L"]:
        """Place of each response token among its own response's, 0 for the most harmful; -1 outside."""
        order = self.tokens.argsort(dim=-1, stable=True)
        order = order.gather(-1, (~self.mask.gather(-1, order)).long().argsort(dim=-1, stable=True))
        return order.argsort(-1).masked_fill(~self.mask, -1)

    @property
    def impossible(self) -> Bool[Tensor, "B L"]:
        """Response tokens with probability 0 under either model: their credit is infinite."""
        return self.tokens.isinf()


def credit(
    policy: LM,
    ref: LM,
    ids: Ids,
    prompt_len: Lengths,
    attention_mask: Shaped[Tensor, "B L"] | None = None,
    *,
    beta: float = 0.1,
    batch_size: int = 8,
) -> Credit:
    """Token credits of responses (eq. 8): one forward per model, without gradients.

    Args:
        ids: prompts with their responses, padded left or right.
        prompt_len: real tokens of each prompt, >= 1; what follows is the response.
        attention_mask: 0 on padding; None if there is none.
        batch_size: rows per forward; rows of like length go together.

    Raises: UserError for beta <= 0, models with different vocabularies, or a prompt_len that leaves no response.
    """
    if not beta > 0:
        raise UserError(f"beta must be > 0, got {beta}")
    stats = _compare(policy, ref, ids, prompt_len, attention_mask, batch_size, want_kl=False)
    tokens = (beta * lp.log_ratio(stats.logp, stats.logp_ref)).masked_fill(~stats.mask, 0.0)
    return Credit(tokens, stats.mask, stats.logp, stats.logp_ref)


@dataclass(frozen=True)
class Ranking:
    """Candidates in order, best first, and the score of each in the order given."""

    order: list[int]
    scores: list[float]


def rerank(
    policy: LM,
    ref: LM,
    prompt: Sequence[int],
    candidates: Sequence[Sequence[int]],
    *,
    by: str = "credit",  # or "likelihood"
    beta: float = 0.1,
) -> Ranking:
    """Order given responses to one prompt by their summed credit, or by their likelihood under the policy (raw sums).

    Raises: UserError if there is no candidate, an empty one, or `by` is something else.
    """
    if by not in ("credit", "likelihood"):
        raise UserError(f"by must be 'credit' or 'likelihood', got {by!r}")
    if not candidates or not all(len(c) for c in candidates):
        raise UserError("candidates must be one or more responses of at least one token each")
    texts = [[*prompt, *c] for c in candidates]
    width = max(map(len, texts))
    ids = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    attention = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    c = credit(policy, ref, ids, [len(prompt)] * len(texts), attention, beta=beta)
    scores = (c.sums if by == "credit" else lp.masked_sum(c.logp, c.mask)).tolist()
    return Ranking(sorted(range(len(scores)), key=lambda i: -scores[i]), scores)


@dataclass(frozen=True)
class Diagnostics:
    """How a DPO-trained policy stands to its reference on preference pairs; a reward is a summed credit.

    Args:
        chosen, rejected: mean implicit reward of the chosen and of the rejected responses.
        margin: their difference.
        accuracy: share of pairs whose chosen response has the larger one.
        loss: DPO's loss, in nats; log 2 at pi = ref.
        decline: -beta KL(ref || pi) at the chosen responses' states, summed over a response: by eq. 11 the implicit
            reward that a response of the reference itself is expected to get. Where the reference was tuned on the
            chosen responses, `chosen` near this number is expected; far below it, the policy moves away from the
            chosen ones in particular.
        decline_per_token: the same, averaged over tokens.
    """

    chosen: float
    rejected: float
    margin: float
    accuracy: float
    loss: float
    decline: float
    decline_per_token: float


def dpo_diagnostics(
    policy: LM,
    ref: LM,
    ids: Ids,
    prompt_len: Lengths,
    attention_mask: Shaped[Tensor, "B L"] | None = None,
    *,
    beta: float = 0.1,
    batch_size: int = 8,
) -> Diagnostics:
    """Implicit rewards, margin and the expected decline of preference pairs, from full distributions (no sampling).

    Args: as `credit`, chosen rows first: row i is preferred to row B/2 + i.

    Raises: UserError as `credit`, and for an odd number of rows.
    """
    if not beta > 0:
        raise UserError(f"beta must be > 0, got {beta}")
    if len(ids) % 2 or not len(ids):
        raise UserError(f"pairs need an even number of rows, chosen ones first, got {len(ids)}")
    half = len(ids) // 2
    stats = _compare(policy, ref, ids, prompt_len, attention_mask, batch_size, want_kl=True)
    ratio = lp.log_ratio(stats.logp, stats.logp_ref)
    loss, margin = lp.dpo_loss(ratio, stats.mask, beta)
    reward = beta * lp.masked_sum(ratio, stats.mask)
    decline = -beta * lp.masked_sum(stats.kl, stats.mask)[:half]
    return Diagnostics(
        chosen=reward[:half].mean().item(),
        rejected=reward[half:].mean().item(),
        margin=margin.mean().item(),
        accuracy=(margin > 0).double().mean().item(),
        loss=loss.item(),
        decline=decline.mean().item(),
        decline_per_token=(decline.sum() / stats.mask[:half].sum()).item(),
    )


@dataclass(frozen=True, eq=False)
class _Stats:
    logp: PerToken
    logp_ref: PerToken
    kl: PerToken
    mask: Bool[Tensor, "B L"]


@torch.inference_mode()
def _compare(
    policy: LM,
    ref: LM,
    ids: Ids,
    prompt_len: Lengths,
    attention_mask: Shaped[Tensor, "B L"] | None,
    batch_size: int,
    want_kl: bool,
) -> _Stats:
    """Both models' log-probabilities of the tokens, and KL(ref || pi) at their states if wanted; 0 elsewhere."""
    require_vocabulary(policy, ref)
    attention = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    lengths = torch.as_tensor(prompt_len)
    real = attention.sum(-1)
    for row in range(len(ids)):
        if not 1 <= lengths[row] < real[row]:
            raise UserError(
                f"prompt_len[{row}] must be >= 1 and below the row's {int(real[row])} tokens, got {int(lengths[row])}"
            )
    mask = lp.response_mask(attention, lengths.to(ids.device))
    dtype = torch.promote_types(policy.dtype, torch.float32)
    logp, logp_ref, kl = (torch.zeros(ids.shape, dtype=dtype) for _ in range(3))
    for rows in real.argsort().split(batch_size):
        columns = attention[rows].any(0).nonzero()[:, 0]
        low, high = int(columns[0]), int(columns[-1]) + 1
        first = int(mask[rows].any(0).nonzero()[0, 0])  # no row of the group has a response before this column
        text, real_text = ids[rows, low:high], attention[rows, low:high]
        outside = ~mask[rows, first:high].cpu()
        z = _logits(policy, text, real_text, high - first + 1)[:, :-1]
        took = ids[rows, first:high]

        def put(into: Tensor, values: Tensor) -> None:
            into[rows, first:high] = values.cpu().to(dtype).masked_fill(outside, 0.0)  # noqa: B023 - called in this pass

        put(logp, lp.of_ids(z, took.to(z.device)))
        if not want_kl:
            del z  # one model's logits at a time
        zr = _logits(ref, text, real_text, high - first + 1)[:, :-1]
        put(logp_ref, lp.of_ids(zr, took.to(zr.device)))
        if want_kl:
            put(kl, lp.kl(zr.to(z.device), z))
    return _Stats(logp, logp_ref, kl, mask.cpu())


def _logits(lm: LM, ids: Tensor, attention: Tensor, last: int) -> Float[Tensor, "B last V"]:
    """Logits of the last columns, the only ones computed where the model allows it."""
    forward: Callable[..., object] = lm.model.forward
    keep = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    # Models count positions from the first column unless told otherwise.
    places = {} if bool(attention[:, 0].all()) else {"position_ids": lp.positions(attention).to(lm.device)}
    out = lm.model(
        input_ids=ids.to(lm.device), attention_mask=attention.to(lm.device), use_cache=False, **keep, **places
    )
    return out.logits[:, -last:]
