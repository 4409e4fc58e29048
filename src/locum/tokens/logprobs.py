"""Log-probabilities, entropies and divergences of whole tensors of logits, without a second copy of them.

A language model's logits [rows, length, V] are the largest tensor of a training step; a full softmax would be a second
tensor of the same size, and a float32 copy of bfloat16 logits a third. So everything here walks over the positions in
tiles (`locum.tokens.tiles`), in float32 (float64 if the logits are float64). Beside it: masks and masked sums.

All logarithms are natural. A token of probability 0 has log-probability -inf; nothing here raises or clips for it.
"""

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from locum.errors import UserError
from locum.tokens.tiles import Scores, divergence, log_prob, over_tiles, tile_entropy, wide


def log_sum_exp(logits: Float[Tensor, "*rows V"], chunk: int | None = None) -> Float[Tensor, "*rows"]:
    """log sum_a exp(logits[a]) per position, summed in float32 at least."""
    return over_tiles(lambda z: z.logsumexp(-1), [_rows(logits)], tile=chunk)[0].view(logits.shape[:-1])


def of_ids(
    logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "*rows"], chunk: int | None = None
) -> Float[Tensor, "*rows"]:
    """log softmax(logits)[ids], in nats: position by position, so shift them before the call (see `of_sequence`)."""
    if ids.numel() == 0:
        return wide(logits.new_zeros(ids.shape))
    return over_tiles(log_prob, [_rows(logits)], ids.reshape(-1), tile=chunk)[0].view(ids.shape)


def of_sequence(
    logits: Float[Tensor, "B L V"], ids: Int[Tensor, "B L"], chunk: int | None = None
) -> Float[Tensor, "B L"]:
    """log p(ids[b, t] | ids[b, :t]) at [b, t]; column 0 has no prediction and is 0."""
    return F.pad(of_ids(logits[:, :-1], ids[:, 1:], chunk), (1, 0))


def of_hidden(
    hidden: Float[Tensor, "*rows D"],
    head: Float[Tensor, "V D"],
    ids: Int[Tensor, "*rows"],
    bias: Float[Tensor, " V"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*rows"]:
    """`of_ids(hidden @ head.T + bias, ids)` with logits that exist for one tile of positions only, gradients included.

    For models whose logits are exactly that product (no soft cap, no logit scale).
    """
    if ids.numel() == 0:
        return wide(hidden.new_zeros(ids.shape))
    scores = Scores(hidden.reshape(-1, hidden.shape[-1]), head, bias)
    return over_tiles(log_prob, [scores], ids.reshape(-1), tile=chunk)[0].view(ids.shape)


def entropy(logits: Float[Tensor, "*rows V"], chunk: int | None = None) -> Float[Tensor, "*rows"]:
    """H(softmax(logits)) in nats, per position."""
    return over_tiles(tile_entropy, [_rows(logits)], tile=chunk)[0].view(logits.shape[:-1])


def kl(
    ref_logits: Float[Tensor, "... V_ref"], logits: Float[Tensor, "*rows V"], chunk: int | None = None
) -> Float[Tensor, "*rows"]:
    """KL(ref || pi) per position over the whole vocabulary, in nats: sum_a ref(a) (log ref(a) - log pi(a)).

    Exact, no sampling. A token that ref never says adds 0; one that ref says and pi never does makes it inf.
    """
    _same_shape(logits, ref_logits)
    found = over_tiles(divergence, [_rows(ref_logits), _rows(logits)], tile=chunk)
    return found[0].view(logits.shape[:-1])


def _rows(logits: Float[Tensor, "*rows V"]) -> Scores:
    return Scores(logits.reshape(-1, logits.shape[-1]))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"the policy has a vocabulary of {a.shape[-1]} tokens and the reference one of {b.shape[-1]}; "
            "both must be the same vocabulary"
        )
    if a.shape != b.shape:
        raise UserError(f"policy logits {list(a.shape)} and reference logits {list(b.shape)} must have one shape")


def log_ratio(logp: Float[Tensor, "*n"], logp_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log pi/ref of given tokens. A token that ref never says is +inf; one that pi never says is -inf, both or not."""
    return torch.where(logp == -torch.inf, logp, logp - logp_ref)


def masked_sum(x: Float[Tensor, "*n T"], mask: Bool[Tensor, "*n T"]) -> Float[Tensor, "*n"]:
    """Sum over the last axis where the mask is true; what lies outside, inf and nan too, does not count."""
    return torch.where(mask, x, 0.0).sum(-1)


def masked_mean(x: Float[Tensor, "*n T"], mask: Bool[Tensor, "*n T"]) -> Float[Tensor, "*n"]:
    """Mean over the last axis where the mask is true; 0 for a row without any."""
    return masked_sum(x, mask) / mask.sum(-1).clamp(min=1)


def positions(attention_mask: Shaped[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """0, 1, 2, ... over the real tokens of each row, whichever side is padded; 0 on padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def response_mask(
    attention_mask: Shaped[Tensor, "B L"],
    prompt_len: Int[Tensor, " B"],
    ids: Int[Tensor, "B L"] | None = None,
    eos_ids: Collection[int] = (),
) -> Bool[Tensor, "B L"]:
    """True on the response's tokens, from its first to its end-of-sequence token, under left or right padding.

    `prompt_len` counts the prompt's real tokens, per row. With `ids` and `eos_ids` what follows the first
    end-of-sequence token of the response is outside as well (padding that the attention mask does not mark).
    """
    real = attention_mask.bool()
    prompt_len = torch.as_tensor(prompt_len, device=real.device)
    mask = real & (real.long().cumsum(-1) > prompt_len[:, None])
    if ids is not None and eos_ids:
        ends = mask & torch.isin(ids, torch.tensor(sorted(eos_ids), device=ids.device))
        mask = mask & (ends.long().cumsum(-1) - ends.long() == 0)
    return mask


def dpo_loss(
    ratio: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"], beta: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " pairs"]]:
    """DPO's loss in token form, chosen rows first, and each pair's margin (arXiv 2404.12358, eq. 7).

    With d_t = log pi/ref of token t: margin = beta (sum_t d_t [chosen] - sum_t d_t [rejected]), loss = mean of
    -log sigmoid(margin).
    """
    chosen, rejected = (beta * masked_sum(ratio, mask)).chunk(2)
    margin = chosen - rejected
    return -F.logsigmoid(margin).mean(), margin
