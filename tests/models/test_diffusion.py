"""Filling in from masks: how many, where and when; the law that tokens are drawn from; and what is told of hidden tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from locum.errors import UserError
from locum.models.diffusion import MaskedDiffusion
from locum.tasks.permutations import Bidirectional
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.sampling import Sampling

MASK = 9


class Places(nn.Module):
    """The same logits at a place of the completion, whatever the text; remembers what it was shown."""

    def __init__(self, logits, begin=1):
        super().__init__()
        self.table, self.begin, self.seen = nn.Parameter(torch.as_tensor(logits)), begin, []

    def forward(self, ids, attention_mask):
        self.seen.append(ids[:, self.begin :].clone())
        table = self.table[: ids.shape[1] - self.begin]
        return torch.cat([table.new_zeros(self.begin, table.shape[1]), table]).expand(len(ids), -1, -1)


def mixed(seed=0, vocab=10, says=10):
    torch.manual_seed(seed)
    model = Bidirectional(vocab, says, 32, width=16, heads=2)
    with torch.no_grad():
        model.head.weight *= 4
    return model


def fill(policy, prefixes, copies, room, seed=0, **options):
    draws = uniforms(seed, torch.arange(len(prefixes) * copies), 4)
    return policy.generate(prefixes, copies, room, draws, **options)


def rollouts(prefixes, completions):
    width = max(map(len, completions))
    ids = torch.tensor([[*c] + [0] * (width - len(c)) for c in completions])
    mask = torch.arange(width) < torch.tensor([len(c) for c in completions])[:, None]
    made = Generated(ids, mask, torch.ones(len(ids), dtype=torch.bool))
    return Rollouts.of(prefixes, made, torch.zeros(len(ids), dtype=torch.long))


@pytest.mark.parametrize(
    ("room", "block", "steps", "counts"),
    [
        (6, None, None, [1] * 6),
        (8, 4, None, [1] * 8),
        (10, 5, 3, [2, 2, 1] * 2),  # floor(5/3) and one more in the first two steps
        (6, 3, 1, [3, 3]),
        (4, 2, 5, [1] * 4),  # no more steps than places
    ],
)
@pytest.mark.parametrize("remask", ["confidence", "random"])
def test_so_many_a_step_block_by_block_and_none_twice(room, block, steps, counts, remask):
    torch.manual_seed(0)
    model = Places(torch.randn(room, 8))
    made = fill(MaskedDiffusion(model, MASK, block=block, steps=steps, remask=remask), [[1]], 5, [room])
    seen = [*model.seen, made.ids]
    assert len(model.seen) == len(counts)
    assert not (made.ids == MASK).any()
    assert made.mask.all()
    assert made.ended.all()
    for before, after, n in zip(seen[:-1], seen[1:], counts, strict=True):
        was_set = before != MASK
        assert torch.equal(before[was_set], after[was_set])
        assert ((after != MASK).sum(-1) - was_set.sum(-1)).tolist() == [n] * 5
        size = block or room
        blocks = (after != MASK).unflatten(-1, (-1, size)).sum(-1)
        assert (blocks[:, 1:].eq(0) | blocks[:, :-1].eq(size)).all()  # none is begun before the one on its left is full


def test_the_surest_place_comes_first():
    logits = torch.zeros(3, 4)
    logits[0, 2], logits[1, 3], logits[2, 1] = 1.0, 3.0, 2.0
    model = Places(logits)
    made = fill(MaskedDiffusion(model, MASK), [[1]], 1, [3], sampling=Sampling())
    assert made.ids.tolist() == [[2, 3, 1]]
    assert [x.tolist()[0] for x in model.seen] == [[MASK] * 3, [MASK, 3, MASK], [MASK, 3, 1]]


def test_the_law_of_a_token_is_the_softmax_over_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
    made = fill(
        MaskedDiffusion(Places(logits), MASK, steps=1, batch_rows=20_000),
        [[1]],
        20_000,
        [2],
        sampling=Sampling(temperature=0.7),
    )
    share = torch.stack([(made.ids == v).double().mean(0) for v in range(3)], -1)
    p = (logits.double() / 0.7).softmax(-1)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


def test_greedy_takes_no_notice_of_the_draws_and_sampling_does():
    policy = MaskedDiffusion(mixed(), MASK)
    for sampling, same in ((Sampling(), True), (Sampling(temperature=1.0), False)):
        a, b = (fill(policy, [[1, 2]], 6, [5], seed=s, sampling=sampling).ids for s in (0, 1))
        assert torch.equal(a, b) == same


@pytest.mark.parametrize(("rows", "block"), [(1, None), (4, 2)])
def test_a_row_is_the_same_whatever_stands_beside_it(rows, block):
    prefixes, room = [[1], [3, 4, 5], [2, 2]], [4, 6, 2]
    whole = fill(MaskedDiffusion(mixed(), MASK, block=block), prefixes, 2, room)
    apart = fill(MaskedDiffusion(mixed(), MASK, block=block, batch_rows=rows), prefixes, 2, room)
    assert torch.equal(whole.ids, apart.ids)
    assert whole.mask.sum(-1).tolist() == [4, 4, 6, 6, 2, 2]
    assert not whole.ids[~whole.mask].any()


def test_the_first_end_ends_a_completion_and_spares_the_blocks_behind_it():
    logits = torch.zeros(6, 8)
    for place, token in enumerate((1, 7, 2, 7, 3, 4)):
        logits[place, token] = 5.0
    for eos, length, ended, forwards in ((7, 2, True, 2), (3, 5, True, 6), (6, 6, False, 6)):
        model = Places(logits)
        made = fill(MaskedDiffusion(model, MASK, (eos,), block=2), [[1]], 1, [6], sampling=Sampling())
        assert made.lists() == [[1, 7, 2, 7, 3, 4][:length]]
        assert made.ended.tolist() == [ended]
        assert len(model.seen) == forwards


def test_guidance_goes_away_from_what_is_said_without_the_prompt():
    class Asked(nn.Module):
        def forward(self, ids, attention_mask):
            with_prompt, without = torch.tensor([1.0, 0.9, 0.0]), torch.tensor([1.0, 0.0, 0.0])
            logits = torch.where((ids[:, :1] == MASK)[..., None], without, with_prompt)
            return logits.expand(-1, ids.shape[1], -1)

    # (1 + w) (1, .9, 0) - w (1, 0, 0) = (1, .9 (1 + w), 0): the second token wins where w > 1/9.
    for w, token in ((0.0, 0), (0.1, 0), (0.2, 1)):
        made = fill(MaskedDiffusion(Asked(), MASK, guidance=w), [[1]], 1, [2], sampling=Sampling())
        assert made.ids.tolist() == [[token] * 2]


def test_the_mask_token_is_never_drawn_and_has_no_probability():
    logits = torch.zeros(3, 4)
    logits[:, 3] = 50.0
    policy = MaskedDiffusion(Places(logits), 3)
    assert (fill(policy, [[1]], 50, [3]).ids < 3).all()
    told = policy.log_probs(rollouts([[1]], [[0, 1, 2]]), torch.tensor([[True, False, True]]))
    assert told.tolist() == [pytest.approx([-(torch.tensor(3.0).log().item()), 0.0, -(torch.tensor(3.0).log().item())])]


def test_log_probs_are_of_the_hidden_places_in_a_text_without_them():
    policy = MaskedDiffusion(mixed(), MASK)
    batch = rollouts([[1, 2], [3]], [[4, 5, 6], [7, 8]])
    hidden = torch.tensor([[True, False, True], [False, True, True]])  # the last is no token
    told = policy.log_probs(batch, hidden, torch.tensor([[False, True], [True, False]]))  # nor is that a prompt's
    for row, (text, places) in enumerate([([1, MASK, MASK, 5, MASK], (2, 4)), ([3, 7, MASK], (2,))]):
        logits = policy.logits(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool))[0]
        logp = logits[:, :MASK].log_softmax(-1)
        begin = 2 - row
        for at in places:
            assert told[row, at - begin].item() == pytest.approx(logp[at, batch.ids[row, at - begin]].item(), abs=1e-5)
    assert told.count_nonzero() == 3


@settings(max_examples=12)
@given(left=st.integers(0, 3), right=st.integers(0, 3), junk=st.integers(0, 8))
def test_padding_and_what_lies_in_it_change_nothing(left, right, junk):
    policy = MaskedDiffusion(mixed(), MASK)
    plain = rollouts([[1, 2]], [[4, 5, 6]])
    pad = nn.functional.pad
    wide = Rollouts(
        pad(plain.prefix, (left, 0), value=junk),
        pad(plain.prefix_mask, (left, 0)),
        pad(plain.ids, (0, right), value=junk),
        pad(plain.mask, (0, right)),
        plain.group,
        plain.reward,
    )
    hidden = torch.tensor([[True, False, True]])
    a = policy.log_probs(plain, hidden)
    b = policy.log_probs(wide, pad(hidden, (0, right), value=True))
    assert torch.allclose(a, b[:, :3], atol=1e-6)
    assert not b[:, 3:].any()


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=12, max_position_embeddings=32, **sizes)).train()


class Scaled(BertForMaskedLM):
    """Logits that are more than what the head makes."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


@pytest.mark.parametrize(("kind", "plain"), [(BertForMaskedLM, True), (Scaled, False)])
def test_a_hub_models_head_sees_the_hidden_places_alone(kind, plain):
    model = bert()
    model.__class__ = kind
    policy = MaskedDiffusion(model, 3)
    batch = rollouts([[1, 2], [5, 6]], [[4, 5, 6], [7, 8, 10]])
    hidden = torch.tensor([[True, False, True], [False, True, False]])
    ids = torch.cat([batch.prefix, batch.ids.masked_fill(hidden, 3)], 1)
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, 2:].clone()
    logits[..., 3] = -torch.inf
    want = logits.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0] * hidden
    expected = torch.autograd.grad(want.sum(), model.parameters(), allow_unused=True)
    for _ in range(2):  # the first call finds out whether the head is all there is
        widths = []  # of what the whole model gives, call by call
        hook = model.register_forward_hook(lambda _m, _i, out: widths.append(out.logits.shape[1]))  # noqa: B023
        told = policy.log_probs(batch, hidden)
        hook.remove()
        found = torch.autograd.grad(told.sum(), model.parameters(), allow_unused=True)
        assert torch.allclose(told, want, atol=1e-6)
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, atol=1e-6)
    assert widths == [1 if plain else 5]
    assert fill(policy, [[1, 2]], 3, [4]).ids.shape == (3, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_id", -1),
        ("eos_ids", (MASK,)),
        ("block", 0),
        ("steps", 0),
        ("remask", "best"),
        ("guidance", float("nan")),
        ("batch_rows", 0),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"MaskedDiffusion\.{field} must be .*, got "):
        MaskedDiffusion(**{"model": Places(torch.zeros(2, 4)), "mask_id": MASK} | {field: value})


def test_bad_rooms_and_texts_are_named():
    policy = MaskedDiffusion(Places(torch.zeros(6, 4)), MASK, block=4)
    with pytest.raises(UserError, match="the room of prefix 1 is 6 tokens; blocks of 4 must fill it"):
        fill(policy, [[1], [1]], 1, [4, 6])
    with pytest.raises(UserError, match="a completion holds the mask token 9"):
        policy.log_probs(rollouts([[1]], [[0, MASK]]), torch.ones(1, 2, dtype=torch.bool))
