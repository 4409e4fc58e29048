"""cDPO by hand and against DPO, its closed-form gradient, both aggregations, contrastive scores, and the choice of data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from locum.align import CDPO, DPO, SFT, ContrastiveEstimation, TokenStats
from locum.align.cdpo import Sampled, build_ce_data, contrastive
from locum.align.statistics import ModelScorer, collate, statistics, token_log_probs
from locum.errors import UserError
from locum.models import tiny
from locum.tokens import tiles

F64 = torch.float64
V = 16
PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [9], "chosen_ids": [1, 2, 3, 4], "rejected_ids": [5]},
    {"prompt_ids": [3, 3], "chosen_ids": [0], "rejected_ids": [5, 2]},
]


def stats(d, ce, mask=None):
    d = torch.as_tensor(d, dtype=F64).clone().requires_grad_()
    ce = torch.as_tensor(ce, dtype=F64)
    whole = torch.ones(d.shape, dtype=torch.bool)
    return TokenStats(d, whole if mask is None else torch.as_tensor(mask), columns={"ce": ce})


HAND = [[0.1, 0.2], [0.2, -0.4]], [[0.0, 0.0], [1 / 9, 8 / 9]]


@pytest.fixture(scope="module")
def models():
    return [ModelScorer(tiny(vocab_size=V, seed=seed, dtype=F64).model) for seed in range(4)]


def random_stats(seed, pairs=3, width=5):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(2 * pairs, width, generator=g) < 0.7
    mask[:, 0] = True
    d, ce = torch.randn(2 * pairs, width, generator=g, dtype=F64), torch.rand(2 * pairs, width, generator=g, dtype=F64)
    return d, ce, mask


# The score.


def test_scores_by_hand():
    """p = (2/3, 1/3), n = (1/3, 2/3): p^2/n = (4/3, 1/6), normalised (8/9, 1/9); logits or log-probabilities."""
    p, n = (torch.tensor([x, x], dtype=F64) for x in ([math.log(2), 0.0], [0.0, math.log(2)]))
    both = torch.tensor([0, 1])
    for make in (lambda z: z, lambda z: z.log_softmax(-1), lambda z: z + 5):
        assert contrastive(make(p), make(n), both).tolist() == pytest.approx([8 / 9, 1 / 9], abs=1e-12)
    assert contrastive(p, n, both, b=0.0).tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-12)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.floats(0, 5))
def test_equal_models_score_their_own_probability_and_rows_sum_to_one(seed, b):
    g = torch.Generator().manual_seed(seed)
    p, n = torch.randn(2, V, generator=g)
    every = torch.arange(V)
    torch.testing.assert_close(contrastive(p.expand(V, -1), p.expand(V, -1), every, b), p.softmax(-1))
    s = contrastive(p.expand(V, -1), n.expand(V, -1), every, b)
    assert s.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((s >= 0) & (s <= 1)).all()


@pytest.mark.parametrize("b", [0.0, 1.0, 2.5])
def test_of_two_gaussians_it_is_one_further_on(b):
    """N(mu_p, 1), N(mu_n, 1) on a grid: mean mu_p + b (mu_p - mu_n), the variance unchanged."""
    x = torch.linspace(-12, 12, 4001, dtype=F64)
    p, n = ((-((x - mu) ** 2) / 2).expand(len(x), -1) for mu in (0.7, 0.2))
    s = contrastive(p, n, torch.arange(len(x)), b)
    mean = (s * x).sum()
    assert mean.item() == pytest.approx(0.7 + b * 0.5, abs=1e-3)
    assert (s * (x - mean) ** 2).sum().item() == pytest.approx(1, abs=1e-3)


def test_the_column_is_the_softmax_of_whole_logits(models, monkeypatch):
    """Token t is scored by the logits before it; prompts of other lengths in the batch change nothing."""
    signal = ContrastiveEstimation(models[0], models[1], b=0.5, batch_size=2)
    found = signal.annotate(PAIRS)
    for example, row in zip(PAIRS, found, strict=True):
        assert row["chosen_ce"] == [0.0] * len(example["chosen_ids"])  # not scored unless asked for
        text = torch.tensor([example["prompt_ids"] + example["rejected_ids"]])
        p, n = (m.model(text).logits[0, :-1] for m in models[:2])
        s = (1.5 * p - 0.5 * n).softmax(-1).gather(-1, text[0, 1:, None])[len(example["prompt_ids"]) - 1 :, 0]
        assert row["rejected_ce"] == pytest.approx(s.tolist(), abs=1e-10)
    both = ContrastiveEstimation(models[0], models[1], chosen=True, eos_ids=(4, 8)).annotate(PAIRS)
    assert both[0]["rejected_ce"][-1] == 0.0  # an end of sequence counts whole on either side
    assert both[1]["chosen_ce"][-1] == 1.0
    assert 0 < both[0]["chosen_ce"][-1] < 1
    assert "rejected_ce" not in PAIRS[0]
    monkeypatch.setattr(tiles, "TILE", 2 * V)  # logits of two positions at a time
    for row, again in zip(found, signal.annotate(PAIRS), strict=True):
        assert row["rejected_ce"] == pytest.approx(again["rejected_ce"], abs=1e-12)


def test_two_adapters_of_one_model_serve():
    peft = pytest.importorskip("peft")
    base = tiny(vocab_size=V, dtype=F64).model
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="positive")
    model.add_adapter("negative", config)
    values = ContrastiveEstimation(ModelScorer(model, "positive"), ModelScorer(model, "negative")).values
    found = torch.cat(values(PAIRS, "rejected"))
    swapped = ContrastiveEstimation(ModelScorer(model, "negative"), ModelScorer(model, "positive")).values
    assert not torch.allclose(found, torch.cat(swapped(PAIRS, "rejected")))
    model.set_adapter("positive")
    p = torch.cat(token_log_probs(ModelScorer(model), PAIRS, "rejected")).exp()
    equal = ContrastiveEstimation(ModelScorer(model, "positive"), ModelScorer(model, "positive")).values(
        PAIRS, "rejected"
    )
    torch.testing.assert_close(torch.cat(equal), p)


# The loss.


@pytest.mark.parametrize(("beta", "loss", "dpo"), [(1.0, 0.6132821, 0.4740770), (0.1, 0.6848486, None)])
def test_hand_case(beta, loss, dpo):
    """phi = .3, weighted rejected sum 8/9 .2 - 1/9 .4 = .1333333, margin .1666667."""
    found, logs = CDPO(beta=beta)(stats(*HAND))
    assert found.item() == pytest.approx(loss, abs=1e-7)
    assert logs["rewards/margins"].item() == pytest.approx(beta / 6, abs=1e-12)
    if dpo is not None:
        assert CDPO(beta=beta)(stats(HAND[0], [[0.0, 0.0]] * 2))[0].item() == pytest.approx(dpo, abs=1e-7)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([0.1, 1.0]))
def test_scores_of_zero_are_dpo(seed, beta):
    d, ce, mask = random_stats(seed)
    ours, dpo = stats(d, 0 * ce, mask), stats(d, ce, mask)
    a, b = CDPO(beta=beta)(ours)[0], DPO(beta=beta)(dpo)[0]
    assert a.item() == pytest.approx(b.item(), abs=1e-7)
    torch.testing.assert_close(torch.autograd.grad(a, ours.d)[0], torch.autograd.grad(b, dpo.d)[0], atol=1e-7, rtol=0)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_scores_of_one_leave_the_rejected_response_alone(aggregation):
    d, ce, mask = random_stats(1)
    s = stats(d, torch.ones_like(ce), mask)
    loss = CDPO(beta=0.5, aggregation=aggregation)(s)[0]
    assert (torch.autograd.grad(loss, s.d)[0][3:] == 0).all()
    if aggregation == "sequence":
        phi = 0.5 * (d * mask).sum(-1)[:3]
        assert loss.item() == pytest.approx(-F.logsigmoid(phi).mean().item(), abs=1e-12)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_at_the_reference_the_loss_is_log_2(models, aggregation):
    method = CDPO(aggregation=aggregation)
    batch = collate(ContrastiveEstimation(*models[:2]).annotate(PAIRS), columns=("ce",))
    found = method(statistics(method, batch, models[2], {"ref": models[2]}))[0]
    assert found.item() == pytest.approx(math.log(2), abs=1e-12)


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_gradient_in_closed_form_and_by_differences(seed):
    beta, e = 0.7, 1e-5
    d, ce, mask = random_stats(seed)
    s = stats(d, ce, mask)
    loss, _ = CDPO(beta=beta)(s)
    grad = torch.autograd.grad(loss, s.d)[0]
    w, lo = (x.chunk(2) for x in (d * mask, 1 - ce))
    m = beta * (w[0].sum(-1) - (w[1] * lo[1]).sum(-1))
    pull = (beta * torch.sigmoid(-m) / 3)[:, None]
    want = torch.cat([-pull * mask[:3], pull * lo[1] * mask[3:]])
    torch.testing.assert_close(grad, want, atol=1e-6, rtol=0)
    i = tuple(mask.nonzero()[seed % int(mask.sum())].tolist())
    shift = torch.zeros_like(d)
    shift[i] = e
    up, down = (CDPO(beta=beta)(stats(d + sign * shift, ce, mask))[0].item() for sign in (1, -1))
    assert grad[i].item() == pytest.approx((up - down) / (2 * e), rel=1e-4)


def test_no_gradient_reaches_the_scores_and_none_the_prompt():
    d, ce, mask = random_stats(3)
    d = torch.where(mask, d, torch.nan).requires_grad_()  # what stands outside the responses does not count
    ce = torch.where(mask, ce, 7.0).requires_grad_()
    loss = CDPO(label_smoothing=0.1)(TokenStats(d, mask, columns={"ce": ce}))[0]
    (grad,) = torch.autograd.grad(loss, d, retain_graph=True)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).all()
    assert torch.autograd.grad(loss, ce, allow_unused=True)[0] is None


@settings(max_examples=8)
@given(left=st.booleans(), turn=st.permutations(range(3)), longer=st.integers(0, 3))
def test_padding_and_order_change_nothing_for_sequences(models, left, turn, longer):
    method = CDPO(beta=1.0, label_smoothing=0.1)
    examples = ContrastiveEstimation(*models[:2]).annotate(PAIRS)
    extra = [examples[0] | {"prompt_ids": [2] * (3 + longer)}] if longer else []

    def per_pair(some, side=False):
        batch = collate(some, columns=("ce",), left=side)
        s = statistics(method, batch, models[2], {"ref": models[3]})
        n, ce = len(some), s.columns["ce"]
        rows = [TokenStats(s.d[i::n], s.mask[i::n], columns={"ce": ce[i::n]}) for i in range(n)]
        assert method(s)[0].item() == pytest.approx(sum(method(r)[0].item() for r in rows) / len(rows), abs=1e-10)
        return [method(r)[0].item() for r in rows]

    alone = [per_pair([example])[0] for example in examples]
    assert per_pair([examples[i] for i in turn] + extra, left)[:3] == pytest.approx([alone[i] for i in turn], abs=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_token_aggregation_is_a_loop_over_positions_and_knows_padding(smoothing):
    beta, e = 0.5, smoothing
    d, ce, mask = random_stats(5)
    method = CDPO(beta=beta, aggregation="token", label_smoothing=e)
    total = 0.0
    for i in range(3):
        for t in range(5):
            up = d[i, t].item() if mask[i, t] else 0.0
            down = (1 - ce[3 + i, t].item()) * d[3 + i, t].item() if mask[3 + i, t] else 0.0
            z = beta * (up - down)
            total += (1 - e) * math.log1p(math.exp(-z)) + e * math.log1p(math.exp(z))
    found = method(stats(d, ce, mask))[0].item()
    assert found == pytest.approx(total / 15, abs=1e-12)
    wide = [F.pad(x, (0, 3)) for x in (d, ce, mask)]
    assert method(stats(*wide))[0].item() == pytest.approx((5 * found + 3 * math.log(2)) / 8, abs=1e-12)


def test_smoothing_mixes_both_ways_round_and_chosen_tokens_can_be_weighed():
    e, m = 0.3, 1 / 6
    found = CDPO(beta=1.0, label_smoothing=e)(stats(*HAND))[0].item()
    assert found == pytest.approx((1 - e) * math.log1p(math.exp(-m)) + e * math.log1p(math.exp(m)), abs=1e-12)
    ce = [[0.5, 0.25], HAND[1][1]]
    z = 0.5 * 0.1 + 0.25 * 0.2 - 2 / 15
    found = CDPO(beta=1.0, weight_chosen=True)(stats(HAND[0], ce))[0].item()
    assert found == pytest.approx(math.log1p(math.exp(-z)), abs=1e-12)


def test_presets():
    assert CDPO.paper() == CDPO(beta=1.0, aggregation="sequence")
    assert CDPO.code() == CDPO(beta=0.1, aggregation="token")


# The data.


def problem(right, wrong, empty=0, prompt=(1,)):
    """Answers as a text: one letter per response."""
    answers = [*right, *wrong, *[""] * empty]
    ids = [[ord(a or "-"), i] for i, a in enumerate(answers)]
    return Sampled(list(prompt), ids, answers, [a in right for a in answers])


def letters(examples, block="response"):
    return [chr(example[f"{block}_ids"][0]) for example in examples]


@pytest.mark.parametrize(
    ("wrong", "taken"),
    [
        ("aaabbcdefg", "ab"),  # 10 wrong, 5 needed: 3 + 2
        ("aaacdefg", "a"),  # 4 needed, but beyond the first only answers that came twice
        ("abcd", "a"),
        ("aaaab", "a"),
        ("aabbccdd", "ab"),
        ("baabb", "b"),
    ],
)
def test_wrong_answers_are_taken_until_half_is_covered(wrong, taken):
    assert letters(build_ce_data([problem("zz", wrong)]).negative) == list(taken)


def test_pairs_take_the_most_frequent_answers_and_answers_are_needed():
    data = build_ce_data([problem("yzz", "abb", empty=9)])
    (pair,) = data.pairs
    assert pair["prompt_ids"] == [1]
    assert letters([pair], "chosen") + letters([pair], "rejected") + letters(data.positive) == ["z", "b", "z"]


def test_which_response_of_an_answer_is_drawn():
    def drawn(seed):
        data = build_ce_data([problem("zzzzzzzz", "aaaaaaaa")], generator=torch.Generator().manual_seed(seed))
        return data.pairs[0]["chosen_ids"][1], data.pairs[0]["rejected_ids"][1] - 8, data.positive[0]["response_ids"][1]

    assert drawn(3) == drawn(3)
    for which in zip(*map(drawn, range(60)), strict=True):
        assert set(which) == set(range(8))


def test_problems_without_a_pair_are_counted_and_still_train_one_model():
    data = build_ce_data([problem("zz", ""), problem("", "aab"), problem("", "", empty=2), problem("z", "b")])
    assert (len(data.pairs), data.without_right, data.without_wrong) == (1, 2, 1)
    assert letters(data.positive) == ["z", "z"]
    assert letters(data.negative) == ["a", "b"]


# What cannot be.


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta", 0.0), ("aggregation", "mean"), ("label_smoothing", 0.5), ("label_smoothing", math.nan)],
)
def test_a_bad_value_is_named(field, value):
    method = CDPO()
    object.__setattr__(method, field, value)  # past the type check that tests put before it
    with pytest.raises(UserError, match=rf"^CDPO\.{field} must be .*, got {value!r}"):
        method.__post_init__()


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_scores_out_of_range_are_refused(value):
    with pytest.raises(UserError, match=r"'ce' must lie in \[0, 1\]; row 1 of the batch has .* at 1"):
        CDPO()(stats(HAND[0], [[0.0, 0.0], [0.5, value]]))


def test_bad_data_is_named(models):
    with pytest.raises(UserError, match="needs scores of the chosen responses"):
        CDPO(weight_chosen=True)(stats(*HAND))
    short = {"chosen_ce": [0.0, 0.0], "rejected_ce": [0.5]}
    with pytest.raises(UserError, match="example 0 of the batch has 1 values of rejected_ce for 3 response tokens"):
        collate([PAIRS[0] | short], columns=("ce",))
    signal = ContrastiveEstimation(*models[:2])
    with pytest.raises(UserError, match="empty rejected response"):
        signal.annotate([PAIRS[0] | {"rejected_ids": []}])
    with pytest.raises(UserError, match="same vocabulary"):
        ContrastiveEstimation(models[0], ModelScorer(tiny(vocab_size=V + 1, dtype=F64).model)).annotate(PAIRS)
    with pytest.raises(UserError, match=r"ContrastiveEstimation\.b must be finite and >= 0, got nan"):
        ContrastiveEstimation(*models[:2], b=math.nan)
    with pytest.raises(UserError, match="no pairs: of 2 problems 1 have no right response and 1 no wrong one"):
        build_ce_data([problem("zz", ""), problem("", "aab")])
    with pytest.raises(UserError, match="problem 0 has 1 responses, 2 answers and 1 verdicts"):
        build_ce_data([Sampled([1], [[2]], ["a", "b"], [True])])
    with pytest.raises(UserError, match=r"share must be in \(0, 1\], got 0"):
        build_ce_data([problem("z", "a")], share=0)


# The fine-tunes.


def test_sft_is_the_mean_over_response_tokens(models):
    examples = [{"prompt_ids": p["prompt_ids"], "response_ids": p["chosen_ids"]} for p in PAIRS]
    s = statistics(SFT(), collate(examples, ("response",)), models[0], {})
    total = 0.0
    for example in examples:
        text = torch.tensor([example["prompt_ids"] + example["response_ids"]])
        logp = models[0].model(text).logits[0, :-1].log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]
        total -= logp[len(example["prompt_ids"]) - 1 :].sum().item()
    loss, logs = SFT()(s)
    assert loss.item() == pytest.approx(total / 7, abs=1e-10)
    assert logs["perplexity"].item() == pytest.approx(math.exp(total / 7), rel=1e-9)
    assert s.d is None


def test_the_whole_way_with_the_familys_trainer(tmp_path):
    """Fine-tunes of a tiny model on both sets, scores of the pairs, one epoch of cDPO."""
    from locum.align.trainer import Trainer, align_arguments

    data = build_ce_data(
        [Sampled([1, i], [[2, 3, 0], [4, 5, 0], [4, 6, 0]], "abb", [True, False, False]) for i in range(4)]
    )

    def trained(method, examples, where):
        lm = tiny(vocab_size=V, seed=0)
        settings = {
            "learning_rate": 1e-2,
            "num_train_epochs": 4,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        Trainer(lm.model, method, align_arguments(tmp_path / where, **settings), examples).train()
        return ModelScorer(lm.model)

    positive, negative = trained(SFT(), data.positive, "positive"), trained(SFT(), data.negative, "negative")
    pairs = ContrastiveEstimation(positive, negative, eos_ids=(0,)).annotate(data.pairs)
    assert all(pair["rejected_ce"][0] < 0.5 and pair["rejected_ce"][-1] == 0 for pair in pairs)
    policy = trained(CDPO(), pairs, "policy")
    before, after = (
        sum(x.sum() for x in token_log_probs(m, pairs, "rejected"))
        for m in (ModelScorer(tiny(vocab_size=V).model), policy)
    )
    assert after < before
