"""T-REG: hand numbers, the gradient it is known by, SimPO's version, and rewards from two opposite requests of a real model."""

import logging
import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align import DPO, TREG, TokenStats
from locum.align.statistics import ModelScorer, collate, statistics
from locum.align.treg import OPENING, RewriteReward, SimPOReg, squashed
from locum.errors import UserError
from locum.models import LM, load, tiny

F64 = torch.float64
LOGP = [[-1.0, -1.2], [-0.9, -1.1]]  # chosen, rejected
D = [[0.4, -0.2], [0.1, 0.3]]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def hand_rewards():
    """Log-probabilities under both requests, chosen and rejected."""
    better = torch.tensor([-1.0, -2.0, -1.5, -0.5], dtype=F64)
    worse = torch.tensor([-2.0, -1.5, -0.5, -0.5], dtype=F64)
    return squashed(better, worse).view(2, 2)


def stats(logp=LOGP, d=D, r=None, mask=None):
    """Statistics whose gradient reaches logp through d as well."""
    leaf, d = torch.tensor(logp, dtype=F64, requires_grad=True), torch.tensor(d, dtype=F64)
    r = hand_rewards() if r is None else torch.tensor(r, dtype=F64)
    where = torch.ones(d.shape, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return TokenStats(leaf - (leaf.detach() - d), where, logp=leaf, columns={"r_hat": r})


def gradient(loss, s):
    return torch.autograd.grad(loss(s)[0], s.logp, retain_graph=True)[0].flatten().tolist()


def test_hand_case():
    assert hand_rewards().flatten().tolist() == pytest.approx([0.231058579, -0.122459331, -0.231058579, 0], abs=1e-9)
    s = stats()
    loss, logs = TREG(beta=0.5)(s)
    assert loss.item() == pytest.approx(0.736269632, abs=1e-9)
    assert logs["loss/preference"].item() == pytest.approx(0.744396660, abs=1e-9)
    assert logs["loss/extra"].item() == pytest.approx(0.25 * 0.524979187 * (0.042053691 - 0.103976360), abs=1e-9)
    assert gradient(TREG(beta=0.5), s) == pytest.approx([-0.2777, -0.2545, 0.2777, 0.2625], abs=1e-4)
    want = {"size": 0.146144122, "positive_chosen": 0.5, "positive_rejected": 0.0}
    assert {k: logs[f"r_hat/{k}"].item() for k in want} == pytest.approx(want, abs=1e-7)


def test_the_regulariser_alone():
    """-sum beta r log pi of each response, times alpha, with the pair's weight 1."""
    extra = TREG(beta=0.5, alpha=1.0, weight="one").extra(stats(), torch.zeros(1, dtype=F64))
    assert extra.item() == pytest.approx(0.042053691 - 0.103976360, abs=1e-9)


def test_the_correlation_is_with_the_implicit_reward_and_0_where_there_is_none():
    s = stats()
    pair = torch.stack([s.columns["r_hat"].flatten(), s.d.detach().flatten()])
    assert TREG().logs(s)["r_hat/correlation"].item() == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-6)
    assert TREG().logs(stats(d=[[0.0] * 2] * 2))["r_hat/correlation"] == 0


def test_without_the_regulariser_it_is_dpo():
    s, none = stats(), stats(r=[[0.0] * 2] * 2)
    for loss, seen in ((TREG(0.7, alpha=0.0), s), (TREG(0.7, alpha=3.0), none)):
        assert loss(seen)[0].item() == pytest.approx(DPO(0.7)(seen)[0].item(), abs=1e-12)
        want = torch.autograd.grad(DPO(0.7)(seen)[0], seen.logp, retain_graph=True)[0].flatten().tolist()
        assert gradient(loss, seen) == pytest.approx(want, abs=1e-12)


tokens = st.tuples(st.floats(-5, 0), st.floats(-3, 3), st.floats(-0.5, 0.5))


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), st.floats(0.05, 2), st.floats(0, 2))
def test_closed_form_gradient(pair, beta, alpha):
    """-/+ beta sigmoid(-z) (1 +/- alpha r)."""
    w, lo = ([list(x) for x in zip(*side, strict=True)] for side in zip(*pair, strict=True))
    s = stats([w[0], lo[0]], [w[1], lo[1]], [w[2], lo[2]])
    c = beta / (1 + math.exp(beta * (sum(w[1]) - sum(lo[1]))))
    want = [-c * (1 + alpha * r) for r in w[2]] + [c * (1 - alpha * r) for r in lo[2]]
    assert gradient(TREG(beta, alpha), s) == pytest.approx(want, abs=1e-12)


def test_an_attached_weight_is_another_gradient_of_the_same_value():
    s = stats()
    plain, attached = TREG(0.5), TREG(0.5, weight="attached")
    assert plain(s)[0].item() == attached(s)[0].item()
    assert gradient(attached, s) != pytest.approx(gradient(plain, s), abs=1e-4)


def test_log_ratios_in_the_regulariser_change_the_value_and_not_the_gradient():
    """sum r log(pi/ref) for sum r log pi."""
    s, method = stats(), TREG(0.5)
    z = 0.5 * (s.d[0].sum() - s.d[1].sum())
    reg = -0.5 * (s.columns["r_hat"] * s.d).sum()
    other = -torch.nn.functional.logsigmoid(z) + 0.25 * torch.sigmoid(-z).detach() * reg
    assert other.item() != pytest.approx(method(s)[0].item(), abs=1e-4)
    slope = torch.autograd.grad(other, s.logp, retain_graph=True)[0].flatten().tolist()
    assert gradient(method, s) == pytest.approx(slope, abs=1e-12)


def test_each_pair_has_its_own_weight():
    """The mean over pairs is of w times R, not of w by R."""
    first, second = stats(), stats(d=[[2.0, 1.0], [-1.0, 0.0]])
    rows = (
        torch.cat([a.chunk(2)[half] for half in (0, 1) for a in pair])
        for pair in ((first.logp, second.logp), (first.d, second.d), (first.columns["r_hat"], second.columns["r_hat"]))
    )
    logp, d, r = rows
    both = TokenStats(d, torch.ones(4, 2, dtype=torch.bool), logp=logp, columns={"r_hat": r})
    want = (TREG(0.5)(first)[0] + TREG(0.5)(second)[0]) / 2
    assert TREG(0.5)(both)[0].item() == pytest.approx(want.item(), abs=1e-12)


@given(left=st.integers(0, 3), right=st.integers(0, 3), junk=st.sampled_from([9.0, math.nan, math.inf]))
def test_padding_changes_nothing(left, right, junk):
    def padded(rows):
        return [[junk] * left + list(row) + [junk] * right for row in rows]

    mask = [[False] * left + [True] * 2 + [False] * right] * 2
    s = stats(padded(LOGP), padded(D), padded(hand_rewards().tolist()), mask)
    loss, logs = TREG(0.5)(s)
    assert loss.item() == pytest.approx(0.736269632, abs=1e-9)
    assert all(v.isfinite() for v in logs.values())


@pytest.mark.parametrize("bad", [0.6, -0.51, math.nan, math.inf])
def test_rewards_out_of_range_are_refused(bad):
    with pytest.raises(
        UserError, match=rf"the column 'r_hat' must lie in \[-0.5, 0.5\]; row 1 of the batch has {bad:g}"
    ):
        TREG()(stats(r=[[0.1, 0.2], [0.0, bad]]))


def test_simpo_by_hand():
    """Responses of 2 and 1 tokens: r_w = .5 (-2.2)/2 = -.55, r_l = .5 (-.9) = -.45, z = -.1 - .3; gradients by length."""
    s = stats(mask=[[True, True], [True, False]])
    method = SimPOReg(beta=0.5, alpha=0.25, gamma=0.3)
    loss, logs = method(s)
    w, (r, _) = 1 / (1 + math.exp(-0.4)), (hand_rewards().tolist(), None)
    reg = -0.25 * (r[0][0] * -1.0 + r[0][1] * -1.2) - 0.5 * r[1][0] * -0.9
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.4)) + 0.25 * w * reg, abs=1e-12)
    assert logs["rewards/margins"].item() == pytest.approx(-0.1, abs=1e-12)
    assert logs["rewards/chosen"].item() == pytest.approx(-0.55, abs=1e-12)
    c = 0.5 * w
    want = [-c / 2 * (1 + 0.25 * r[0][0]), -c / 2 * (1 + 0.25 * r[0][1]), c * (1 - 0.25 * r[1][0]), 0.0]
    assert gradient(method, s) == pytest.approx(want, abs=1e-12)


def test_simpo_needs_no_reference():
    policy = ModelScorer(tiny(vocab_size=16, dtype=F64).model)
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    rewards = {"chosen_r_hat": [0.1, 0.2, -0.3], "rejected_r_hat": [0.4]}
    batch = collate([pair | rewards], columns=("r_hat",))
    s = statistics(SimPOReg(), batch, policy, {})
    assert s.d is None
    loss, logs = SimPOReg()(s)
    assert loss.isfinite()
    mean = s.logp[0][batch.mask[0]].mean().item()
    assert logs["rewards/chosen"].item() == pytest.approx(10 * mean, abs=1e-10)


@pytest.mark.parametrize(
    ("cls", "field", "bad"),
    [
        (TREG, "beta", 0.0),
        *((TREG, "alpha", bad) for bad in (-0.1, math.nan, math.inf)),
        *((SimPOReg, "gamma", bad) for bad in (-0.1, math.nan, math.inf)),
    ],
)
def test_a_bad_value_is_named(cls, field, bad):
    with pytest.raises(UserError, match=rf"{cls.__name__}\.{field} must be .*, got {bad}"):
        cls(**{field: bad})


def test_a_bad_weight_is_named():
    jaxtyping.config.update("jaxtyping_disable", True)  # the type checker would refuse it first
    try:
        with pytest.raises(UserError, match=r"TREG\.weight must be one of detached, attached, one, got 'none'"):
            TREG(weight="none")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@given(st.lists(st.tuples(*[st.floats(-30, 0)] * 2), min_size=2, max_size=8))
def test_rewards_are_odd_bounded_and_monotone(pairs):
    better, worse = torch.tensor(pairs, dtype=F64).T
    r = squashed(better, worse)
    assert torch.equal(squashed(worse, better), -r)
    assert not squashed(better, better).any()
    assert (r.abs() <= 0.5).all()
    order = (better - worse).argsort()
    assert (r[order].diff() >= 0).all()
    torch.testing.assert_close(r, torch.sigmoid(better - worse) - 0.5, atol=1e-12, rtol=0)


# The rewards of a real, if tiny, model: bytes are its tokens, and 512 its most.


@pytest.fixture(scope="module")
def lm(model_folders):
    return load(model_folders["target"])


@pytest.fixture(scope="module")
def chatty(model_folders):
    lm = load(model_folders["target"])
    lm.tokenizer.chat_template = CHAT
    return lm


def example(lm, prompt="Name a fruit.", chosen="Apples.", rejected="Cars, I guess.", **more):
    ids = {f"{name}_ids": [*lm.encode(text), 256] for name, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt_ids": lm.encode(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected, **ids, **more}


def test_the_reward_is_that_of_both_requests_at_the_responses_ids(lm, chatty):
    for model in (lm, chatty):
        x, signal = example(model), RewriteReward(model)
        (r,) = signal.values([x], "chosen")
        better, worse = signal.requests(x, "chosen")
        text = model.decode(better)
        assert "more helpful" in text
        assert text.index("Name a fruit.") < text.index("Apples.")
        assert text.endswith("<assistant>\n" if model is chatty else OPENING)
        logp = []
        for head in (better, worse):
            whole = torch.tensor([[*head, *x["chosen_ids"]]])
            rows = model.model(whole).logits[0, len(head) - 1 : -1].log_softmax(-1)
            logp.append(rows.gather(1, torch.tensor(x["chosen_ids"])[:, None])[:, 0])
        torch.testing.assert_close(r, squashed(*logp), atol=1e-5, rtol=0)
        assert r.any()


def test_equal_requests_give_zero_and_exchanged_ones_the_negative(lm):
    xs = [example(lm), example(lm, chosen="Figs and pears")]
    there = RewriteReward(lm, better="good", worse="bad").values(xs, "chosen")
    back = RewriteReward(lm, better="bad", worse="good").values(xs, "chosen")
    none = RewriteReward(lm, better="good", worse="good").values(xs, "chosen")
    assert all(torch.equal(a, -b) for a, b in zip(there, back, strict=True))
    assert not any(r.any() for r in none)
    assert all((r.abs() < 0.5).all() for r in there)


@settings(max_examples=5)
@given(st.lists(st.text("abcé 名", min_size=1, max_size=12), min_size=1, max_size=4), st.integers(1, 3))
def test_a_batch_changes_nothing(lm, responses, batch_size):
    xs = [example(lm, chosen=text) for text in responses]
    together = RewriteReward(lm, batch_size=batch_size).values(xs, "chosen")
    for x, r in zip(xs, together, strict=True):
        torch.testing.assert_close(r, RewriteReward(lm).values([x], "chosen")[0], atol=1e-5, rtol=0)
        assert len(r) == len(x["chosen_ids"])


def test_annotated_examples_train(lm):
    done = RewriteReward(lm).annotate([example(lm), example(lm, prompt="Again?")])
    batch = collate(done, columns=("r_hat",))
    loss, logs = TREG()(statistics(TREG(), batch, ModelScorer(lm.model), {"ref": ModelScorer(lm.model)}))
    assert logs["loss/preference"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert loss.isfinite()
    assert batch.targets.tolist() == [i for b in ("chosen", "rejected") for x in done for i in x[f"{b}_ids"]]


def test_texts_are_decoded_where_there_are_none(lm):
    x = example(lm)
    bare = {k: v for k, v in x.items() if k.endswith("_ids")}
    assert RewriteReward(lm).requests(bare, "chosen") == RewriteReward(lm).requests(x, "chosen")
    unseen = RewriteReward(lm, template="Make it {quality}: {instruction}").requests(x, "chosen")
    assert "Apples" not in lm.decode(unseen[0])


def test_long_instructions_are_cut_at_their_beginning(lm):
    x = example(lm, prompt="é" * 400 + "the end")
    better, worse = RewriteReward(lm).requests(x, "chosen")
    assert max(len(better), len(worse)) + len(x["chosen_ids"]) <= 512
    assert "the end\n\n### Response:\nApples." in lm.decode(worse)
    assert len(lm.decode(better)) > 300
    (r,) = RewriteReward(lm).values([x], "chosen")
    assert r.any()


def test_what_does_not_fit_gets_zero_and_is_counted(lm, caplog):
    xs = [example(lm), example(lm, chosen="A" * 400)]
    with caplog.at_level(logging.WARNING):
        short, long = RewriteReward(lm).values(xs, "chosen")
    assert short.any()
    assert long.tolist() == [0.0] * 401
    assert "1 of 2 chosen responses do not fit into 512 tokens: their rewards are 0" in caplog.text


def test_tokens_that_both_requests_rule_out_get_zero_and_are_counted(model_folders, caplog):
    class Mute(torch.nn.Linear):
        """A head that never ends a text."""

        def forward(self, hidden):
            return torch.cat(
                [super().forward(hidden)[..., :256], hidden.new_full((*hidden.shape[:-1], 1), -math.inf)], -1
            )

    lm = load(model_folders["target"])
    mute = Mute(32, 257, bias=False)
    mute.weight = lm.model.get_output_embeddings().weight
    lm.model.set_output_embeddings(mute)
    x = example(lm)
    with caplog.at_level(logging.WARNING):
        (r,) = RewriteReward(lm).values([x], "chosen")
    assert r[-1] == 0
    assert r[:-1].any()
    assert "1 of 8 tokens of chosen responses are impossible under both requests" in caplog.text


def test_bad_input_to_the_scorer_is_named(lm, model_folders):
    with pytest.raises(UserError, match="example 1 has an empty rejected response"):
        RewriteReward(lm).values([example(lm), example(lm, rejected_ids=[])], "rejected")
    with pytest.raises(UserError, match=r"example 0 has the token 300 in chosen_ids.*made by another tokenizer"):
        RewriteReward(lm).values([example(lm, chosen_ids=[300])], "chosen")
    with pytest.raises(UserError, match=r"evaluator .* and model .* must share one vocabulary, but token"):
        RewriteReward(lm, policy=load(model_folders["foreign"]))
    with pytest.raises(UserError, match="has no tokenizer"):
        RewriteReward(LM(lm.model)).values([example(lm)], "chosen")
    for template in ("no braces", "{quality}", "{quality} {instruction} {other}", "{quality} {instruction} {}"):
        with pytest.raises(UserError, match=r"RewriteReward\.template must be a text with {quality}, {instruction}"):
            RewriteReward(lm, template=template)
    with pytest.raises(UserError, match=r"RewriteReward\.max_length must be None or > 0, got 0"):
        RewriteReward(lm, max_length=0)
