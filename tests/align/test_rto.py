"""RTO's rewards, advantages and losses equal their definitions; its token reward is the hidden one, shaped."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align.base import TokenStats
from locum.align.critics import Critic, TableCritic
from locum.align.rounds import Round
from locum.align.rto import RTO, sentence_ends, token_rewards
from locum.align.statistics import ModelScorer, collate, statistics
from locum.align.table import TableScorer, table_round, train
from locum.errors import UserError
from locum.models import tiny
from locum.tasks.token_mdp import TableMDP, along_paths, solve_tree, tree_value
from locum.tokens import ppo

F64 = torch.float64
PLACEMENTS = ("token", "sentence", "eos", "shaped", "none")
DPO, REF, OLD = [-1.0, -0.5, -0.2], [-1.2, -0.4, -0.2], [-1.1, -0.6, -0.1]
COLUMNS = (*RTO.columns, "logp_ref")


def logps(rows=3, tokens=6, seed=0, dtype=F64):
    """Log-probabilities under the DPO model, the reference and the sampling policy, a mask, a score, and sentence ends."""
    g = torch.Generator().manual_seed(seed)
    dpo, ref, old = -torch.rand(3, rows, tokens, generator=g, dtype=F64).to(dtype) * 3
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=g)
    mask = torch.arange(tokens) < lengths
    score = torch.randn(rows, generator=g, dtype=F64).to(dtype)
    return (dpo, ref, old, mask, score), torch.rand(rows, tokens, generator=g) < 0.3


def worked(dtype=torch.float32, **options):
    given_ = [torch.tensor([x], dtype=dtype) for x in (DPO, REF, OLD)]
    return token_rewards(*given_, torch.ones(1, 3, dtype=torch.bool), torch.tensor([0.7], dtype=dtype), **options)


# The reward.


@pytest.mark.parametrize(
    ("placement", "want"),
    [
        ("token", [0.009, -0.003, 0.699]),
        ("eos", [-0.001, 0.002, 0.704]),
        ("shaped", [0.009, -0.003, 0.694]),
        ("none", [-0.001, 0.002, 0.699]),
    ],
)
def test_worked_case(placement, want):
    """d = (.01, -.005, 0), penalty (.001, -.002, .001), score .7 on the last token."""
    assert worked(placement=placement)[0].tolist() == pytest.approx(want, abs=1e-6)
    assert worked(F64, placement=placement)[0].tolist() == pytest.approx(want, abs=1e-12)


def test_worked_case_of_advantages():
    value = torch.tensor([[0.5, 0.6, 0.65]])
    advantage, returns = ppo.gae(worked(), value, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    assert advantage[0].tolist() == pytest.approx([0.1978725, 0.09355, 0.049], abs=1e-6)
    assert returns[0].tolist() == pytest.approx([0.6978725, 0.69355, 0.699], abs=1e-6)


def test_a_sentence_is_paid_at_its_end():
    dpo = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 99.0]], dtype=F64)
    zero, mask = torch.zeros_like(dpo), torch.tensor([[True] * 5 + [False]])
    ends = torch.tensor([[False, True, True, False, False, True]])
    r = token_rewards(dpo, zero, zero, mask, placement="sentence", ends=ends, beta_1=1.0)
    assert r.tolist() == [[0, 3, 4, 0, 24, 0]]


@settings(max_examples=30)
@given(st.integers(0, 200))
def test_totals(seed):
    """Token, sentence and eos pay the same in total; shaped and none what plain PPO pays."""
    args, ends = logps(seed=seed, dtype=torch.float32)
    total = {p: token_rewards(*args, placement=p, ends=ends, beta_1=0.5).sum(-1) for p in PLACEMENTS}
    for other in ("sentence", "eos"):
        torch.testing.assert_close(total[other], total["token"], atol=1e-5, rtol=0)
    torch.testing.assert_close(total["shaped"], total["none"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_without_an_implicit_reward_it_is_ppo_bit_for_bit(placement):
    (dpo, ref, old, mask, score), ends = logps(dtype=torch.float32)
    plain = token_rewards(None, ref, old, mask, score, placement="none")
    assert torch.equal(token_rewards(dpo, ref, old, mask, score, placement=placement, ends=ends, beta_1=0.0), plain)
    assert torch.equal(token_rewards(ref, ref, old, mask, score, placement=placement, ends=ends), plain)


def test_clip_comes_after_the_weight():
    zero, one = torch.zeros(1, 2, dtype=F64), torch.ones(1, 2, dtype=torch.bool)
    dpo = torch.tensor([[2.0, -0.4]], dtype=F64)
    assert token_rewards(dpo, zero, zero, one, clip=0.05)[0].tolist() == pytest.approx([0.05, -0.02], abs=1e-15)
    assert token_rewards(dpo, zero, zero, one)[0].tolist() == pytest.approx([0.1, -0.02], abs=1e-15)


@settings(max_examples=30)
@given(st.integers(0, 99), st.floats(1e-3, 1.0))
def test_clip_limits_every_token_and_a_wide_one_none(seed, clip):
    (dpo, ref, old, mask, _), _ = logps(seed=seed)
    dense = token_rewards(dpo, ref, old, mask, beta_1=1.0, beta_2=0.0, clip=clip)
    assert dense.abs().max() <= clip
    free = token_rewards(dpo, ref, old, mask, beta_1=1.0)
    assert torch.equal(token_rewards(dpo, ref, old, mask, beta_1=1.0, clip=math.inf), free)


def test_another_reference_of_the_dpo_model():
    (dpo, ref, old, mask, score), _ = logps()
    other = logps(seed=7)[0][0]
    got = token_rewards(dpo, ref, old, mask, score, logp_dpo_ref=other)
    want = token_rewards(dpo - other + ref, ref, old, mask, score)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


# On trees and tables, where the best policy is known.


def tree(seed, A=3, H=3):
    g = torch.Generator().manual_seed(seed)
    reward = [torch.randn(A**t, A, generator=g, dtype=F64) for t in range(H)]
    return reward, [torch.randn(A**t, A, generator=g, dtype=F64).log_softmax(-1) for t in range(H)]


def log_ratios(logpi, logref, beta):
    """beta log pi/ref per level, made by `token_rewards`."""
    full = [torch.ones_like(x, dtype=torch.bool) for x in logpi]
    return [token_rewards(p, r, r, m, beta_1=beta, beta_2=0.0) for p, r, m in zip(logpi, logref, full, strict=True)]


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_token_reward_is_the_hidden_one_shaped(seed, beta):
    reward, logref = tree(seed)
    best = solve_tree(reward, logref, beta)
    implicit = log_ratios(best.logpi, logref, beta)
    along, hidden = along_paths(implicit), along_paths(reward)
    torch.testing.assert_close(along.sum(-1), hidden.sum(-1) - best.V[0], atol=1e-8, rtol=0)
    for t, (r, i) in enumerate(zip(reward, implicit, strict=True)):  # token by token: r + V(s') - V(s)
        shaped = r + best.V[t + 1].view(-1, 3) - best.V[t][:, None]
        torch.testing.assert_close(i, shaped, atol=1e-8, rtol=0)
    again = solve_tree(implicit, logref, beta)
    for a, b in zip(again.logpi, best.logpi, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_with_equal_weights_and_no_score_the_best_policy_is_the_dpo_model(beta):
    _, logref = tree(0)
    _, logdpo = tree(1)
    found = solve_tree(log_ratios(logdpo, logref, beta), logref, beta)
    for a, b in zip(found.logpi, logdpo, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    assert float(found.V[0]) == pytest.approx(0.0, abs=1e-8)
    implicit = log_ratios(logdpo, logref, beta)
    assert tree_value(implicit, logref, logdpo, beta) == pytest.approx(0.0, abs=1e-8)
    assert tree_value(implicit, logref, tree(2)[1], beta) < -1e-3


# A round and the loss.


@pytest.fixture(scope="module")
def mdp():
    return TableMDP.random(0, prompts=2, vocab=4, length=5)


PROMPTS = [{"prompt_ids": [p % 2]} for p in range(8)]


def table(mdp, seed):
    return torch.randn(mdp.reward.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def total(mdp):
    def label(examples):
        prompt = torch.tensor([e["prompt_ids"][0] for e in examples])
        return mdp.along(mdp.reward, prompt, torch.tensor([e["response_ids"] for e in examples])).sum(-1).tolist()

    return label


def collected(mdp, method, values=None, **more):
    critic = TableCritic(2, 5, 4)
    if values is not None:
        critic.values.data = values
    frozen = {"dpo": TableScorer(table(mdp, 1)), **more}
    g = torch.Generator().manual_seed(0)
    round = table_round(mdp, table(mdp, 2), g, total(mdp), frozen=frozen, signal=critic if method.critic else None)
    return method.collect(round, PROMPTS), round


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_round_holds_what_the_equations_say(mdp, placement, critic):
    method = RTO(
        placement=placement, critic=critic, delimiters=(0, 2), reward_mean=0.5, reward_std=2.0, lam=0.8, gamma=0.9
    )
    values = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    examples, round = collected(mdp, method, values)
    prompt = torch.tensor([e["prompt_ids"][0] for e in examples])
    y = torch.tensor([e["response_ids"] for e in examples])
    mask, score = torch.ones_like(y, dtype=torch.bool), torch.tensor(total(mdp)(examples))
    old, ref, dpo = (mdp.along(z.log_softmax(-1), prompt, y) for z in (table(mdp, 2), mdp.ref_logits, table(mdp, 1)))
    paid = token_rewards(
        dpo, ref, old, mask, (score - 0.5) / 2, placement=placement, ends=(y == 0) | (y == 2), beta_1=0.05, beta_2=0.01
    )
    value = mdp.along(values[..., None].expand_as(mdp.reward), prompt, y) if critic else torch.zeros_like(paid)
    advantage, returns = ppo.gae(paid, value, mask, 0.9, 0.8 if critic else 1.0)
    want = {"old_logp": old, "logp_ref": ref, "old_value": value, "return": returns}
    want["advantage"] = ppo.whiten(advantage, mask)
    for name, x in want.items():
        got = torch.stack([e[f"response_{name}"] for e in examples])
        torch.testing.assert_close(got, x, atol=1e-5, rtol=0, check_dtype=False, msg=name)
    assert round.logs["score"] == pytest.approx(((score - 0.5) / 2).mean().item(), abs=1e-6)
    assert round.logs["kl"] == pytest.approx((old - ref).sum(-1).mean().item(), abs=1e-6)
    assert (round.logs["length"], round.logs["truncated"]) == (5, 0)


def test_scores_are_limited(mdp):
    method = RTO(placement="none", beta_2=0.0, reward_std=1e-3, reward_limit=3.0, critic=False)
    examples, _ = collected(mdp, method)
    paid = torch.stack([e["response_return"] for e in examples])
    assert torch.equal(paid.abs(), torch.full_like(paid, 3.0))


def test_a_separate_reference_of_the_dpo_model_is_used(mdp):
    own = TableScorer(table(mdp, 1))  # the DPO model itself: its reward is 0, and what is left is plain PPO
    method = RTO(critic=False, dpo_ref=True)
    assert method.frozen == ("ref", "dpo", "dpo_ref")
    shared, plain = collected(mdp, method, dpo_ref=own)[0], collected(mdp, RTO("none", critic=False))[0]
    for a, b in zip(shared, plain, strict=True):
        assert torch.equal(a["response_advantage"], b["response_advantage"])
    with pytest.raises(UserError, match="needs the model 'dpo_ref'"):
        collected(mdp, method)


def test_gradient_of_the_policy_loss_at_ratio_one(mdp):
    """It is -(1/B) sum_b (1/|y_b|) sum_t A_t grad log pi, also by finite differences of the loss in the table."""
    method = RTO(critic=False)
    examples = collected(mdp, method)[0]
    for i, e in enumerate(examples):  # of several lengths
        n = 2 + i % 4
        examples[i] = {k: v if k in ("prompt_ids", "truncated") else v[:n] for k, v in e.items()}
    batch = collate(examples, ("response",), COLUMNS)
    beside = {"ref": TableScorer(mdp.ref_logits)}
    z0 = table(mdp, 2)

    def loss(z):
        return method(statistics(method, batch, TableScorer(z), beside))[0]

    z = z0.clone().requires_grad_()
    loss(z).backward()
    y, mask = batch.ids[:, 1:], batch.mask
    w = z0.clone().requires_grad_()
    logp = w.log_softmax(-1)[batch.ids[:, :1], torch.arange(y.shape[1]), torch.nn.functional.pad(y[:, :-1], (1, 0)), y]
    advantage = batch.columns["advantage"]
    (-(torch.where(mask, advantage * logp, 0.0).sum(-1) / mask.sum(-1)).mean()).backward()
    torch.testing.assert_close(z.grad, w.grad, atol=1e-10, rtol=1e-6)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        way = torch.randn(z0.shape, generator=g, dtype=F64)
        slope = (loss(z0 + 1e-6 * way) - loss(z0 - 1e-6 * way)) / 2e-6
        assert float(slope) == pytest.approx(float((z.grad * way).sum()), rel=1e-4)


def test_the_loss_by_hand():
    """Two rows of 2 and 1 tokens; ratios 1.5, .5 and 1.1; values move by .5, -.1 and 0."""
    rows = [[0, math.log(1.5), math.log(0.5)], [0, math.log(1.1), 0]]
    a, v, r = [[0, 1.0, -1.0], [0, 2.0, 0]], [[0, 0.5, -0.1], [0, 0.0, 0]], [[0, 1.0, 0.0], [0, 2.0, 0]]
    logp, a, v, r = (torch.tensor(x, dtype=F64) for x in (rows, a, v, r))
    mask = torch.tensor([[False, True, True], [False, True, False]])
    columns = {"old_logp": 0 * logp, "advantage": a, "return": r, "old_value": 0 * v, "value": v}
    s = TokenStats(logp, mask, None, logp, 1, columns)
    loss, logs = RTO(value_clip=0.4)(s)
    policy = ((-1.2 + 0.8) / 2 + -2.2) / 2
    value = ((max(0.25, 0.36) / 2 + 0.01 / 2) / 2 + 4 / 2) / 2
    assert logs["loss/policy"].item() == pytest.approx(policy, abs=1e-12)
    assert logs["loss/value"].item() == pytest.approx(value, abs=1e-12)
    assert loss.item() == pytest.approx(policy + value, abs=1e-12)
    assert RTO(critic=False)(s)[0].item() == pytest.approx(policy, abs=1e-12)
    assert logs["ratio/clipped"].item() == pytest.approx(0.5, abs=1e-12)
    assert logs["kl/ref"].item() == pytest.approx(logp.sum().item() / 2, abs=1e-12)


@settings(max_examples=15)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 50))
def test_padding_on_either_side_changes_nothing(left, right, seed):
    (dpo, ref, old, mask, score), ends = logps(seed=seed)

    def wide(x, fill=math.nan):
        return torch.nn.functional.pad(x, (left, right), value=fill)

    more = wide(mask, False)
    value, logp = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for placement in PLACEMENTS:
        r = token_rewards(dpo, ref, old, mask, score, placement=placement, ends=ends)
        padded = token_rewards(wide(dpo), wide(ref), wide(old), more, score, placement=placement, ends=wide(ends, True))
        torch.testing.assert_close(padded, wide(r, 0.0), atol=1e-6, rtol=0)
        (a, b), (c, d) = ppo.gae(r, value, mask), ppo.gae(padded, wide(value), more)
        torch.testing.assert_close(c, wide(a, 0.0), atol=1e-6, rtol=0)
        columns = {"old_logp": old, "advantage": a, "return": b, "old_value": value, "value": value + 0.3}
        shown = {k: wide(x) for k, x in columns.items()} | {"advantage": c, "return": d}
        plain = RTO()(TokenStats(None, mask, None, old + logp / 9, 1, columns))[0]
        far = RTO()(TokenStats(None, more, None, wide(old + logp / 9), 1, shown))[0]
        assert far.item() == pytest.approx(plain.item(), abs=1e-6)


@settings(max_examples=20)
@given(st.permutations(range(4)), st.sampled_from(PLACEMENTS))
def test_rows_may_come_in_any_order(order, placement):
    (dpo, ref, old, mask, score), ends = logps(rows=4)
    r = token_rewards(dpo, ref, old, mask, score, placement=placement, ends=ends)
    rows = [x[list(order)] for x in (dpo, ref, old, mask, score)]
    assert torch.equal(token_rewards(*rows, placement=placement, ends=ends[list(order)]), r[list(order)])


# With language models.

V = 16


def model_round(method, labeller=None, signal=None):
    """A round of tiny models; responses are given, of different lengths, the last one cut."""
    scorers = {name: ModelScorer(tiny(vocab_size=V, seed=i).model) for i, name in enumerate(("policy", *method.frozen))}
    g = torch.Generator().manual_seed(5)

    def sampler(prompts, temperature, generator):
        assert temperature == 1.0
        ids = [torch.randint(V, (2 + i,), generator=g).tolist() for i in range(len(prompts))]
        return [{**p, "response_ids": y, "truncated": len(y) > 4} for p, y in zip(prompts, ids, strict=True)]

    return Round(0, scorers, sampler, labeller, torch.Generator(), signal, batch_size=2)


def test_a_round_of_language_models_and_steps_on_it():
    method = RTO(placement="sentence", delimiters=(1, 2, 3), critic_lr=0.01)
    critic = method.signal(2, 32)
    assert isinstance(critic, Critic)
    assert critic.groups(1e-6)[0]["lr"] == 0.01
    round = model_round(method, lambda examples: [float(len(e["response_ids"])) for e in examples], critic)
    examples = method.collect(round, [{"prompt_ids": [3] * (1 + i)} for i in range(4)])
    assert round.logs["truncated"] == 0.25
    assert [e["truncated"] for e in examples] == [False, False, False, True]
    batch = collate(examples, method.blocks, COLUMNS)
    policy, beside = round.scorers["policy"], {"ref": round.scorers["ref"]}
    s = statistics(method, batch, policy, beside, critic)
    torch.testing.assert_close(s.logp, s.columns["old_logp"], atol=1e-5, rtol=0)
    loss, logs = method(s)
    assert loss.item() == pytest.approx(logs["loss/policy"].item() + logs["loss/value"].item())
    assert (s.columns["old_value"] == 0).all()  # the critic says 0 before it is trained
    adam = torch.optim.Adam([{"params": policy.model.parameters(), "lr": 1e-3}, *critic.groups(1e-3)])
    losses = []
    for _ in range(15):
        loss, logs = method(statistics(method, batch, policy, beside, critic))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append((logs["loss/policy"].item(), logs["loss/value"].item()))
    assert losses[-1][0] < losses[0][0] - 0.03
    assert losses[-1][1] < losses[0][1]
    again = {f: p.grad for f, p in round.scorers["ref"].model.named_parameters() if p.grad is not None}
    assert not again


def test_the_critic_reads_the_last_hidden_state():
    ref, critic = tiny(vocab_size=V, seed=1).model, Critic(32)
    torch.nn.init.normal_(critic.head[-1].weight)
    batch = collate(
        [{"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}, {"prompt_ids": [6], "response_ids": [7]}], ("response",)
    )
    found = batch.spread(critic(ModelScorer(ref)(batch, critic.taps), batch)["value"])
    with torch.no_grad():
        out = ref(batch.ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states[-1]
        want = critic.head(out)[..., 0][:, :-1]
    torch.testing.assert_close(found[batch.mask], want[batch.mask], atol=1e-5, rtol=1e-5)


def test_without_a_critic_no_model_but_the_policy_is_run_for_the_loss():
    method = RTO(critic=False, beta_3=0.0)
    assert method.signal(2, 32) is None
    round = model_round(method)
    examples = method.collect(round, [{"prompt_ids": [1, 2]}] * 3)
    s = statistics(method, collate(examples, method.blocks, COLUMNS), round.scorers["policy"], {})
    loss, logs = method(s)
    assert "loss/value" not in logs
    assert loss.item() == pytest.approx(logs["loss/policy"].item())
    assert logs["kl/ref"].item() == pytest.approx(round.logs["kl"], abs=1e-4)


def test_a_table_learns(mdp):
    """Reward rises from rounds that the method makes itself, and the value loss falls."""
    method, critic, g = RTO(beta_2=0.0), TableCritic(2, 5, 4), torch.Generator().manual_seed(0)
    frozen, kept = {"dpo": TableScorer(mdp.solve(0.5)[2])}, []

    def batch_of(step, logits):
        if step % 4 == 0:
            round = table_round(mdp, logits, g, total(mdp), frozen=frozen, signal=critic)
            examples = method.collect(replace(round, batch_size=64), PROMPTS * 4)
            kept[:] = [collate(examples, method.blocks, COLUMNS)]
        return kept[0]

    curve = train(method, mdp, batch_of, frozen=frozen, signal=critic, tie=False, steps=48, lr=0.1, measure_every=48)
    assert curve.reward[-1] > curve.reward[0] + 1.5
    assert curve.logs[-1]["loss/value"] < curve.logs[0]["loss/value"]


# Presets and bad input.


def test_the_released_script_limits_each_token():
    assert RTO.released() == RTO(clip=0.05)
    assert RTO.released(beta_1=0.1, clip=0.2) == RTO(beta_1=0.1, clip=0.2)
    assert (RTO().beta_1, RTO().beta_2, RTO().beta_3, RTO().clip) == (0.05, 0.01, 1.0, None)


def test_plain_ppo_needs_no_dpo_model():
    assert RTO("none").frozen == ("ref",)
    assert RTO().frozen == ("ref", "dpo")


def test_the_tokens_that_end_a_sentence(model_folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folders["target"])
    want = sorted(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(mark))[0] for mark in ".!?\n")
    assert list(sentence_ends(tokenizer)) == want
    assert list(sentence_ends(tokenizer, ";")) == tokenizer(";")["input_ids"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_1", -0.1),
        ("beta_2", math.nan),
        ("beta_3", math.inf),
        ("clip", 0.0),
        ("clip_eps", 0.0),
        ("value_clip", -1.0),
        ("lam", 1.5),
        ("gamma", math.nan),
        ("critic_lr", 0.0),
        ("reward_std", 0.0),
        ("reward_mean", math.nan),
        ("reward_limit", -1.0),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=rf"RTO\.{field} must be .*, got {value!r}"):
        RTO(**{field: value})


def test_an_unknown_placement_is_named():
    method = RTO()
    object.__setattr__(method, "placement", "here")  # past the check of types, which the tests have on
    with pytest.raises(ValueError, match=r"RTO\.placement must be one of token, sentence, .*, got 'here'"):
        method.__post_init__()


def test_sentences_need_their_delimiters():
    with pytest.raises(ValueError, match=r"RTO\.delimiters must be at least one token id .*, got \(\)"):
        RTO(placement="sentence")
    with pytest.raises(UserError, match="placement 'sentence' needs `ends`"):
        token_rewards(*logps()[0], placement="sentence")


def test_bad_rewards_are_named():
    (dpo, ref, old, mask, score), _ = logps()
    with pytest.raises(
        UserError, match=r"the DPO model's log-probabilities have shape \[3, 5\] and the mask has \[3, 6\]"
    ):
        token_rewards(dpo[:, 1:], ref, old, mask, score)
    with pytest.raises(UserError, match="row 1 has no response token"):
        token_rewards(dpo, ref, old, mask & (torch.arange(3) != 1)[:, None], score)
    with pytest.raises(UserError, match=r"beta_2 must be >= 0, got -0\.1"):
        token_rewards(dpo, ref, old, mask, score, beta_2=-0.1)
    with pytest.raises(UserError, match="placement 'eos' pays the DPO model's reward, and no log-probabilities"):
        token_rewards(None, ref, old, mask, score, placement="eos")


@pytest.mark.parametrize("who", [0, 1, 2])
def test_a_token_that_a_model_rules_out(who):
    given_ = [torch.tensor([[0.0, *x]], dtype=F64) for x in (DPO, REF, OLD)]
    mask, score = torch.tensor([[False, True, True, True]]), torch.tensor([0.7], dtype=F64)
    plain = token_rewards(*given_, mask, score)
    given_[who][0, 2] = -math.inf
    name = ("DPO model", "reference", "sampling policy")[who]
    with pytest.raises(UserError, match=f"the {name} gives response token 1 of row 0 the log-probability -inf"):
        token_rewards(*given_, mask, score)
    r = token_rewards(*given_, mask, score, clip=0.03)
    assert torch.equal(r[0, [0, 1, 3]], plain[0, [0, 1, 3]])
    dense, penalty = ((-0.03, -0.002), (0.03, 0.03), (-0.005, -0.03))[who]
    assert r[0, 2].item() == pytest.approx(dense - penalty, abs=1e-12)
    given_[who][0, 2] = math.nan
    with pytest.raises(UserError, match=f"the {name} gives response token 1 of row 0 the log-probability nan"):
        token_rewards(*given_, mask, score, clip=0.03)


def test_what_a_round_lacks_is_named(mdp):
    g = torch.Generator()
    plain = {"frozen": {"dpo": TableScorer(mdp.ref_logits)}, "signal": TableCritic(2, 5, 4)}
    with pytest.raises(UserError, match=r"beta_3=1\.0 scores whole responses: give a labeller"):
        RTO().collect(table_round(mdp, mdp.ref_logits, g, **plain), PROMPTS)
    with pytest.raises(UserError, match="needs the model 'dpo'"):
        RTO().collect(table_round(mdp, mdp.ref_logits, g, total(mdp), signal=plain["signal"]), PROMPTS)
    with pytest.raises(UserError, match="set critic=False"):
        RTO().collect(table_round(mdp, mdp.ref_logits, g, total(mdp), frozen=plain["frozen"]), PROMPTS)
    broken = table_round(mdp, mdp.ref_logits, g, lambda examples: [0.0, math.nan] * 4, **plain)
    with pytest.raises(UserError, match="the labeller gave nan to response 1"):
        RTO().collect(broken, PROMPTS)
