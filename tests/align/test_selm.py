"""SELM's term against enumerated expectations, its reductions and hand numbers, and what a round makes of labels."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locum.align import DPO, SELM, TokenStats
from locum.align.rounds import Round
from locum.align.selm import rank
from locum.align.statistics import ModelScorer, collate, statistics
from locum.align.table import TableScorer, response_batch, table_round
from locum.errors import UserError
from locum.models import tiny
from locum.tasks.token_mdp import TableMDP

F64 = torch.float64
REF, Z = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, -0.1, 0.4], dtype=F64)
TRIPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8], "reference_ids": [9]},
    {"prompt_ids": [9], "chosen_ids": [1, 2, 3, 4], "rejected_ids": [5], "reference_ids": [7, 7, 7, 7, 7, 7]},
]


def loud(**fields):
    """SELM with an alpha that only a test can mean."""
    with pytest.warns(UserWarning, match="above 0.1 text degenerates"):
        return SELM(**fields)


def table(z):
    return z.expand(1, 1, 3, 3)


def bandit(logits=None):
    """One prompt, one token of three."""
    return TableMDP(table(REF.log()).clone(), torch.zeros(1, 1, 3, 3, dtype=F64))


def loss_of(method, z, chosen, rejected, reference):
    """The loss of single-token responses under softmax(z)."""
    blocks = [torch.tensor(y)[:, None] for y in (chosen, rejected, reference)]
    prompt = torch.zeros(len(chosen), dtype=torch.long)
    batch = response_batch(prompt, *blocks[: len(method.blocks)])
    return method(statistics(method, batch, TableScorer(table(z)), {"ref": TableScorer(table(REF.log()))}))


def value_and_gradient(method, *responses, z=Z):
    z = z.clone().requires_grad_()
    loss, _ = loss_of(method, z, *responses)
    return loss.item(), torch.autograd.grad(loss, z)[0]


ALL = [y for y, n in enumerate((5, 3, 2)) for _ in range(n)]  # every response as often as the reference says it
SAME = [0] * len(ALL)  # best equal to worst: DPO's part is log 2, without gradient


@functools.cache
def pair_of(dtype):
    return [ModelScorer(tiny(vocab_size=16, seed=i, dtype=dtype).model) for i in (1, 2)]


@pytest.fixture(scope="module")
def models():
    return pair_of(F64)


def test_hand_case():
    d = torch.tensor([[-0.2], [0.0], [-3.0]], dtype=F64)
    s = TokenStats(d, torch.ones(3, 1, dtype=torch.bool), blocks=3)
    assert DPO(beta=0.1)(s)[0].item() == pytest.approx(0.703197180, abs=1e-9)
    loss, logs = SELM(beta=0.1, alpha=0.001)(s)
    assert loss.item() == pytest.approx(0.702897180, abs=1e-9)
    assert logs["explore/log_ratio"].item() == -3
    assert logs["rewards/margins"].item() == pytest.approx(-0.02, abs=1e-12)


def test_alpha_zero_is_dpo_and_leaves_the_third_block_alone(models):
    batch = collate(TRIPLES, SELM.blocks)
    s = statistics(SELM(), batch, models[0], {"ref": models[1]})
    d = s.d.detach().requires_grad_()
    loss, _ = SELM(beta=0.3, alpha=0.0)(replace(s, d=d))
    (grad,) = torch.autograd.grad(loss, d)
    rows = len(TRIPLES) * 2
    pairs = d.detach()[:rows].requires_grad_()
    want, _ = DPO(beta=0.3)(TokenStats(pairs, s.mask[:rows]))
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    torch.testing.assert_close(grad[:rows], torch.autograd.grad(want, pairs)[0], atol=1e-12, rtol=0)
    assert (grad[rows:] == 0).all()


def test_the_term_is_minus_the_kl_from_the_reference():
    """E_{y~ref} log pi/ref = -KL(ref || pi), gradient ref - pi."""
    value, grad = value_and_gradient(loud(beta=1.0, alpha=1.0), SAME, SAME, ALL)
    pi = Z.softmax(-1)
    assert value - math.log(2) == pytest.approx(-(REF * (REF.log() - pi.log())).sum().item(), abs=1e-12)
    assert value - math.log(2) == pytest.approx(-0.106286304, abs=1e-9)
    torch.testing.assert_close(grad, REF - pi, atol=1e-12, rtol=0)
    assert grad.tolist() == pytest.approx([0.1624, 0.0499, -0.2123], abs=5e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_importance_identity(beta):
    """E_{y~ref} dlog pi = E_{y~pi} exp(-r/beta) dlog pi, with r the implicit reward."""
    z = Z.clone().requires_grad_()
    logp = z.log_softmax(-1)
    r = beta * (logp - REF.log()).detach()
    (of_pi,) = torch.autograd.grad(((-r / beta).exp() * logp.exp().detach() * logp).sum(), z)
    _, of_ref = value_and_gradient(loud(beta=beta, alpha=1.0), SAME, SAME, ALL)
    torch.testing.assert_close(of_ref / beta, of_pi, atol=1e-12, rtol=0)


def test_the_term_is_what_optimism_is_worth():
    """max_pi E_pi r - E_ref r - beta KL(pi || ref), at its maximum ref exp(r/beta)/Z, is beta KL(ref || pi)."""
    r, beta = torch.tensor([1.0, -0.5, 0.3], dtype=F64), 0.7
    best = (REF.log() + r / beta).log_softmax(-1)
    pi = best.exp()
    worth = (pi * r).sum() - (REF * r).sum() - beta * (pi * (best - REF.log())).sum()
    value, _ = value_and_gradient(loud(beta=beta, alpha=1.0), SAME, SAME, ALL, z=best)
    assert worth.item() == pytest.approx(0.242581558, abs=1e-9)
    assert math.log(2) - value == pytest.approx(worth.item(), abs=1e-12)


@pytest.mark.parametrize(("temperature", "unbiased"), [(1.0, True), (0.0, False)])
def test_drawn_responses_give_the_terms_gradient_and_greedy_ones_do_not(temperature, unbiased):
    method = loud(beta=1.0, alpha=1.0, temperature=temperature)
    mdp, n = bandit(), 20_000
    asked = [{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [1]}] * n
    round = table_round(
        mdp, mdp.ref_logits, torch.Generator().manual_seed(0), lambda e: [-x["response_ids"][0] for x in e]
    )
    found = method.collect(round, asked)
    assert len(found) == n
    drawn = [e["reference_ids"][0] for e in found]
    _, grad = value_and_gradient(method, [0] * n, [0] * n, drawn)
    want = REF - Z.softmax(-1)
    error = (REF * (1 - REF) / n).sqrt()  # of the mean of onehot(y_r) - pi
    assert bool(((grad - want).abs() < 4 * error).all()) == unbiased
    assert unbiased or set(drawn) == {0}


def test_policy_equal_to_reference():
    """Value log 2; gradient -beta/2 (grad w - grad l) + alpha beta grad log pi(y_r)."""
    beta, alpha = 0.4, 0.05
    value, grad = value_and_gradient(SELM(beta=beta, alpha=alpha), [2], [1], [0], z=REF.log())
    best, worst, drawn = (torch.eye(3, dtype=F64)[y] - REF for y in (2, 1, 0))
    assert value == pytest.approx(math.log(2), abs=1e-12)
    torch.testing.assert_close(grad, -beta / 2 * (best - worst) + alpha * beta * drawn, atol=1e-12, rtol=0)


def test_the_references_response_may_be_the_best_one():
    """Then its log-probability has the factor beta (alpha - sigmoid(-z))."""
    d = torch.tensor([[0.3], [-0.2]], dtype=F64, requires_grad=True)
    s = TokenStats(d[[0, 1, 0]], torch.ones(3, 1, dtype=torch.bool), blocks=3)
    (grad,) = torch.autograd.grad(SELM(beta=0.5, alpha=0.01)(s)[0], d)
    assert grad[0].item() == pytest.approx(0.5 * (0.01 - 1 / (1 + math.exp(0.25))), abs=1e-12)


def test_one_forward_of_three_blocks_is_three_forwards(models):
    whole = statistics(SELM(), collate(TRIPLES, SELM.blocks), models[0], {"ref": models[1]})
    for block, want in zip(SELM.blocks, whole.sums(whole.d), strict=True):
        alone = statistics(SELM(), collate(TRIPLES, (block,)), models[0], {"ref": models[1]})
        torch.testing.assert_close(alone.sums(alone.d)[0], want, atol=1e-10, rtol=0)


@given(st.integers(0, 5), st.booleans(), st.booleans())
def test_padding_changes_nothing(more, left, single):
    policy, ref = pair_of(torch.float32 if single else F64)
    method = SELM(beta=0.5, alpha=0.1)
    longer = {"prompt_ids": [1] * (1 + more)} | {f"{b}_ids": [2] * (1 + more) for b in SELM.blocks}
    alone, _ = method(statistics(method, collate(TRIPLES, SELM.blocks), policy, {"ref": ref}))
    batch = collate([*TRIPLES, longer], SELM.blocks, left=left)
    s = statistics(method, batch, policy, {"ref": ref})
    keep = torch.tensor([0, 1, 3, 4, 6, 7])
    assert s.d is not None
    padded, _ = method(TokenStats(s.d[keep], s.mask[keep], blocks=3))
    torch.testing.assert_close(padded, alone, atol=1e-5 if single else 1e-10, rtol=0)


# A round.


def labelled(score, sampler=None, index=0):
    """A round whose policy always says [9], labelled by a function of a response's first token."""

    def say(examples, temperature, generator):
        return [{**e, "response_ids": [9], "truncated": False} for e in examples]

    return Round(
        index, {}, sampler or say, lambda e: [float(score(x["response_ids"][0])) for x in e], torch.Generator()
    )


@pytest.mark.parametrize("order", list(itertools.permutations((1.0, 2.0, 3.0))))
def test_best_and_worst_of_all_orders(order):
    best, worst, tied = rank(torch.tensor([order], dtype=F64))
    assert (best.item(), worst.item(), tied.item()) == (order.index(3.0), order.index(1.0), False)
    round = labelled({7: order[0], 8: order[1], 9: order[2]}.get)
    [found] = SELM().collect(round, [{"prompt_ids": [1], "chosen_ids": [7], "rejected_ids": [8]}])
    ids = [[7], [8], [9]]
    assert found["chosen_ids"] == ids[best]
    assert found["rejected_ids"] == ids[worst]
    assert found["reference_ids"] == [9]
    assert found["scores"] == [3.0, 1.0, order[2]]
    place = {1.0: "worst", 2.0: "middle", 3.0: "best"}[order[2]]
    assert {k for k in ("best", "middle", "worst") if round.logs[f"explore/{k}"]} == {place}
    assert round.logs["score/reference"] == order[2]
    assert round.logs["score/pair"] == (order[0] + order[1]) / 2


def test_ties_go_to_the_first_and_are_counted_and_rows_without_preference_are_dropped():
    scores = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [2, 2, 2], [0, 1, 2]], dtype=F64)
    best, worst, tied = rank(scores)
    assert best.tolist() == [0, 1, 0, 2, 0, 2]
    assert worst.tolist() == [2, 0, 1, 0, 0, 0]
    assert tied.tolist() == [True] * 5 + [False]
    asked = [{"prompt_ids": [1], "chosen_ids": [a], "rejected_ids": [b]} for a, b in ((7, 8), (9, 9), (7, 7), (5, 9))]
    round = labelled(lambda token: 0.0 if token == 5 else 1.0)
    found = SELM().collect(round, asked)
    assert [(e["chosen_ids"], e["rejected_ids"]) for e in found] == [([9], [5])]
    assert (round.logs["explore/tied"], round.logs["explore/dropped"]) == (1.0, 0.75)
    noisy = iter([3.0, 2.0, 1.0])
    assert SELM().collect(labelled(lambda _: next(noisy)), [asked[1]]) == []  # one text thrice, whatever the scores


def test_prompts_alone_get_two_more_responses():
    """Those at temperature 1; y_r as the method says."""
    asked = []

    def say(examples, temperature, generator):
        asked.append(temperature)
        return [{**e, "response_ids": [4 + len(asked)], "truncated": False} for e in examples]

    [found] = SELM().collect(labelled(lambda token: token, say), [{"prompt_ids": [1]}])
    assert asked == [0.0, 1.0, 1.0]
    assert found["reference_ids"] == found["rejected_ids"] == [5]
    assert found["chosen_ids"] == [7]


def test_rounds_of_a_table_draw_from_its_policy():
    mdp = TableMDP.random(0)
    z = mdp.ref_logits + 1
    z[:, :, :, 2] += 50
    round = table_round(mdp, z, torch.Generator().manual_seed(0))
    prompts = [{"prompt_ids": [p]} for p in (0, 3)]
    for temperature in (0.0, 0.5, 1.0):
        assert [e["response_ids"] for e in round.sample(prompts, temperature)] == [[2] * mdp.length] * 2
    drawn = table_round(mdp, mdp.ref_logits, torch.Generator().manual_seed(0)).sample(prompts * 2000)
    first = torch.tensor([e["response_ids"][0] for e in drawn[1::2]])
    want = mdp.ref_logits[3, 0, 0].softmax(-1)
    assert (torch.bincount(first, minlength=mdp.vocab) / 2000).tolist() == pytest.approx(want.tolist(), abs=0.05)
    logp = round.log_probs("ref", [{"prompt_ids": [3], "response_ids": [1] * mdp.length}])[0]
    assert logp[0].item() == pytest.approx(mdp.ref_logits[3, 0, 0].log_softmax(-1)[1].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("beta", math.nan),
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("temperature", -1.0),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UserError, match=rf"SELM\.{field} must be .*, got {value}"):
        SELM(**{field: value})


def test_bad_input_ends_in_one_sentence():
    pair = {"prompt_ids": [1], "chosen_ids": [7], "rejected_ids": [8]}
    with pytest.raises(UserError, match="example 0 of the batch has no 'reference_ids'"):
        collate([pair], SELM.blocks)
    with pytest.raises(UserError, match="empty reference response"):
        collate([{**pair, "reference_ids": []}], SELM.blocks)
    with pytest.raises(UserError, match="the labeller gave nan to a response to prompt 1"):
        SELM().collect(labelled(lambda t: math.nan if t == 6 else t), [pair, {**pair, "rejected_ids": [6]}])
    with pytest.raises(UserError, match="it needs a labeller"):
        SELM().collect(replace(labelled(float), labeller=None), [pair])
    half = {"prompt_ids": [1], "chosen_ids": [7]}
    for prompts, number, n in (([pair, half], 1, 1), ([pair, {"prompt_ids": [1]}], 1, 0), ([half], 0, 1)):
        with pytest.raises(UserError, match=rf"prompt {number} has {n} of chosen_ids and rejected_ids"):
            SELM().collect(labelled(float), prompts)
