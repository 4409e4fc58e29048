"""AlignDistil: the hand case, the objective it stands for, its teachers, its gradient, its batches and its bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align.aligndistil import AlignDistil, OnlineAlignDistil, both_ways, swapped, train_teachers
from locum.align.base import TokenStats
from locum.align.statistics import ModelScorer, collate, statistics
from locum.align.table import TableScorer, response_batch, table_round
from locum.errors import UserError
from locum.models import tiny
from locum.tasks.token_mdp import TableMDP, solve_tree, tree_value
from locum.tokens import logprobs as lp
from locum.tokens import tiles

F64 = torch.float64
IDS = torch.zeros(1, dtype=torch.long)
LN3 = math.log(3)
KINDS = ("dpo_ref", "contrastive", "adaptive", "dpo_ref_adaptive")


def row(*z):
    return torch.tensor([z], dtype=F64)


def random_tiles(seed, rows=5, V=7, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    names = ("policy", "dpo", "reverse", "ref")
    return {name: scale * torch.randn(rows, V, generator=g, dtype=F64) for name in names}


def stats(method, z, rows=1):
    """The tiles' positions as `rows` responses of one length, as the method sees them."""
    n = len(z["policy"])
    seen = method.per_token({k: z[k] for k in ("policy", *method.frozen)}, torch.zeros(n, dtype=torch.long))
    seen = {name: x.view(rows, -1) for name, x in seen.items()}
    mask = torch.ones(rows, n // rows, dtype=torch.bool)
    return TokenStats(None, mask, logp=seen.pop("logp"), blocks=1, columns=seen)


def test_hand_case():
    """z_d = (ln 3, 0), z_r = (0, ln 3), uniform student, r = 2, eps = 0."""
    method = AlignDistil(r=2, eps=0, beta_0=0.1)
    policy = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    z = {"policy": policy, "dpo": row(LN3, 0), "reverse": row(0, LN3)}
    target, alpha = method.teach(z["dpo"].log_softmax(-1), z["reverse"].log_softmax(-1))
    assert alpha.item() == pytest.approx(1.0, abs=1e-12)  # 2 D, D = .5
    assert target.exp()[0].tolist() == pytest.approx([27 / 28, 1 / 28], abs=1e-12)
    s = stats(method, z)
    assert s.columns["kl"].item() == pytest.approx(0.5 * math.log(196 / 27), abs=1e-12)
    assert s.columns["kl"].item() == pytest.approx(0.9911389, abs=1e-7)
    loss, logs = method(s)
    assert loss.item() == pytest.approx(0.09911389, abs=1e-8)
    (grad,) = torch.autograd.grad(loss, policy)
    assert grad[0].tolist() == pytest.approx([-0.0823959, 0.0823959], abs=1e-7)
    kl = 0.5 * math.log(4 / 3)  # of a uniform law to (3/4, 1/4), and to (1/4, 3/4)
    assert [logs[k].item() for k in ("kl/dpo", "kl/reverse")] == pytest.approx([kl, kl], abs=1e-12)
    assert logs["rewards/expected"].item() == pytest.approx(0, abs=1e-12)
    assert [logs[k].item() for k in ("alpha", "length", "skipped")] == [pytest.approx(1.0), 1.0, 0.0]
    assert s.logp.item() == pytest.approx(math.log(0.5), abs=1e-12)


# The objective, on trees.


def random_tree(seed, A=3, H=3):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(A**t, A, generator=g, dtype=F64).log_softmax(-1) for t in range(H)] for _ in range(3)]


def reward_of(dpo, ref, beta_0=0.1):
    return [beta_0 * (d - r) for d, r in zip(dpo, ref, strict=True)]


def teacher_of(dpo, ref, beta):
    method = AlignDistil(teacher="dpo_ref", beta=beta)
    return [method.teach(d, r)[0] for d, r in zip(dpo, ref, strict=True)]


@pytest.mark.parametrize("beta", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_objective_is_minus_the_distillation_loss_plus_a_known_term(seed, beta):
    """J(pi) = E_{y ~ pi} sum_t [-beta KL(pi || p*) + beta log Z], every prefix of the tree enumerated."""
    ref, dpo, pi = random_tree(seed)
    right, reach = 0.0, torch.ones(1, dtype=F64)
    for r, d, p, target in zip(ref, dpo, pi, teacher_of(dpo, ref, beta), strict=True):
        log_z = lp.log_sum_exp(r + (0.1 / beta) * (d - r))
        right += (reach * beta * (log_z - tiles.kl_of(p, target))).sum().item()
        reach = (reach[:, None] * p.exp()).flatten()
    assert tree_value(reward_of(dpo, ref), ref, pi, beta) == pytest.approx(right, abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_teacher_is_the_optimum_at_beta_0_and_myopic_below(seed):
    ref, dpo, _ = random_tree(seed)
    reward = reward_of(dpo, ref)
    same = teacher_of(dpo, ref, 0.1)
    for target, d, r in zip(same, dpo, ref, strict=True):
        torch.testing.assert_close(target, d, atol=1e-12, rtol=0)
        assert lp.log_sum_exp(r + (d - r)).abs().max() < 1e-12
    assert tree_value(reward, ref, same, 0.1) == pytest.approx(0, abs=1e-12)
    assert solve_tree(reward, ref, 0.1).V[0].item() == pytest.approx(0, abs=1e-12)
    for beta in (0.02, 0.05):
        teacher, best = (tree_value(reward, ref, x, beta) for x in (teacher_of(dpo, ref, beta), dpo))
        assert best <= teacher <= solve_tree(reward, ref, beta).V[0].item() + 1e-12


# The teachers.


@pytest.mark.parametrize("kind", KINDS)
def test_shifted_logits_change_nothing(kind):
    method, z = AlignDistil(teacher=kind, beta=0.04, r=5), random_tiles(0)
    shifts = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(1), dtype=F64) * 10
    moved = {name: x + shift for (name, x), shift in zip(z.items(), shifts, strict=True)}
    for a, b in zip(stats(method, z).columns.values(), stats(method, moved).columns.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_teachers_at_their_edges():
    z = {name: x.log_softmax(-1) for name, x in random_tiles(2).items()}
    still = AlignDistil(r=0, eps=0).teach(z["dpo"], z["reverse"])
    torch.testing.assert_close(still, (z["dpo"], torch.zeros(5, dtype=F64)), atol=1e-12, rtol=0)
    agreed = AlignDistil().teach(z["dpo"], z["dpo"])
    torch.testing.assert_close(agreed, (z["dpo"], torch.full((5,), 1e-3, dtype=F64)), atol=1e-12, rtol=0)
    nothing = AlignDistil(teacher="dpo_ref_adaptive", r=0, eps=0).teach(z["dpo"], z["ref"])[0]
    torch.testing.assert_close(nothing, z["ref"], atol=1e-12, rtol=0)
    for w in (1.5, 3.0):  # the contrastive teacher with ref for reverse is the other one, with the anchor moved
        one = AlignDistil(teacher="contrastive", beta=0.1 / (w - 1)).teach(z["dpo"], z["ref"])[0]
        two = AlignDistil(teacher="dpo_ref", beta=0.1 / w).teach(z["dpo"], z["ref"])[0]
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
        torch.testing.assert_close(two, (w * z["dpo"] + (1 - w) * z["ref"]).log_softmax(-1), atol=1e-12, rtol=0)


@given(st.integers(0, 99), st.floats(0.1, 30), st.floats(0.1, 20))
def test_alpha_lies_between_its_bounds_and_the_distance_is_symmetric(seed, r, scale):
    z = {name: x.log_softmax(-1) for name, x in random_tiles(seed, scale=scale).items()}
    method = AlignDistil(r=r)
    _, alpha = method.teach(z["dpo"], z["reverse"])
    assert ((alpha >= 1e-3) & (alpha <= r + 1e-3 + 1e-12)).all()
    torch.testing.assert_close(alpha, method.teach(z["reverse"], z["dpo"])[1], atol=1e-12, rtol=0)
    distance = 0.5 * (z["dpo"].exp() - z["reverse"].exp()).abs().sum(-1)
    torch.testing.assert_close(alpha, r * distance + 1e-3, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_closed_form_and_reaches_the_policy_alone(kind):
    """beta_t pi (log pi/p* - KL) / |y| over two responses of three tokens, against autograd and finite differences."""
    method = AlignDistil(teacher=kind, r=3, beta=0.05)
    z = {name: x.requires_grad_() for name, x in random_tiles(3, rows=6).items()}
    s = stats(method, z, rows=2)
    grads = torch.autograd.grad(method(s)[0], list(z.values()), allow_unused=True)
    assert grads[1:] == (None, None, None)
    assert not s.columns["alpha"].requires_grad
    with torch.no_grad():
        pi = z["policy"].log_softmax(-1)
        target, alpha = method.teach(*(z[name].log_softmax(-1) for name in ("dpo", method.other)))
        gap = pi - target
        kl = (pi.exp() * gap).sum(-1, keepdim=True)
        want = (0.1 / alpha)[:, None] * pi.exp() * (gap - kl) / 3 / 2
    assert (kl > 0).all()
    torch.testing.assert_close(s.columns["kl"].detach().flatten(), kl[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(grads[0], want, atol=1e-8, rtol=0)
    frozen = {name: x.detach() for name, x in z.items()}
    assert torch.autograd.gradcheck(lambda p: method(stats(method, frozen | {"policy": p}, rows=2))[0], (z["policy"],))
    own = frozen | {"policy": target}
    assert stats(method, own).columns["kl"].abs().max() < 1e-12


def test_temperature_divides_policy_and_teacher():
    z = random_tiles(4)
    target, _ = AlignDistil().teach(z["dpo"].log_softmax(-1), z["reverse"].log_softmax(-1))
    hot = stats(AlignDistil(temperature=2.0), z).columns
    torch.testing.assert_close(hot["kl"][0], tiles.divergence(z["policy"] / 2, target / 2), atol=1e-12, rtol=0)
    torch.testing.assert_close(hot["alpha"], stats(AlignDistil(), z).columns["alpha"], atol=0, rtol=0)


def test_half_precision_over_a_large_vocabulary():
    """Bfloat16 logits of 32k tokens, made float32, against the same logits in float64: 2 % of each KL."""
    g = torch.Generator().manual_seed(5)
    z = {name: torch.randn(3, 32_000, generator=g).bfloat16() for name in ("policy", "dpo", "reverse")}
    for kind in ("contrastive", "adaptive"):
        method = AlignDistil(teacher=kind, r=20, beta=0.05)
        found = stats(method, {name: x.float() for name, x in z.items()}).columns
        exact = stats(method, {name: x.double() for name, x in z.items()}).columns
        for name in ("kl", "alpha", "kl_dpo", "kl_other"):
            torch.testing.assert_close(found[name].double(), exact[name], rtol=2e-2, atol=0)


def test_a_token_that_all_rule_out_counts_for_nothing():
    z = random_tiles(6)
    wide = {name: torch.cat([x, torch.full((5, 2), -math.inf, dtype=F64)], 1) for name, x in z.items()}
    for kind in KINDS:
        method = AlignDistil(teacher=kind)
        policy = wide["policy"].clone().requires_grad_()
        s = stats(method, wide | {"policy": policy})
        for name, x in stats(method, z).columns.items():
            torch.testing.assert_close(s.columns[name].detach(), x, atol=1e-12, rtol=0)
        (grad,) = torch.autograd.grad(method(s)[0], policy)
        assert torch.isfinite(grad).all()
        assert (grad[:, -2:] == 0).all()


# Batches.


@pytest.fixture(scope="module")
def models():
    return {name: tiny(vocab_size=16, seed=i, dtype=F64).model for i, name in enumerate(("policy", "dpo", "reverse"))}


EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7, 8], "rejected_ids": [4]},
    {"prompt_ids": [9], "chosen_ids": [3, 15], "rejected_ids": [4]},
    {"prompt_ids": [2, 2, 2, 2, 5], "chosen_ids": [11], "rejected_ids": [4, 5]},
]


def seen(models, method, examples, **how):
    scorers = {name: ModelScorer(model) for name, model in models.items()}
    return statistics(method, collate(examples, method.blocks, **how), scorers.pop("policy"), scorers)


@settings(max_examples=6)
@given(st.permutations(range(3)), st.booleans(), st.integers(0, 3))
def test_padding_order_company_and_tiles_change_nothing(models, order, left, tile):
    """A batch gives each token what its response gives alone, and the mean over responses of the mean over tokens."""
    method = AlignDistil(r=4)
    alone = [method(seen(models, method, [EXAMPLES[i]]))[0] for i in order]
    terms = [seen(models, method, [EXAMPLES[i]]) for i in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 16 * tile)
        s = seen(models, method, [EXAMPLES[i] for i in order], left=left, pad_id=13)
    loss, logs = method(s)
    for name in ("kl", "alpha"):
        packed = torch.cat([t.columns[name][t.mask] for t in terms])
        torch.testing.assert_close(s.columns[name][s.mask], packed, atol=1e-10, rtol=0)
        assert (s.columns[name][~s.mask] == 0).all()
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-10, rtol=0)
    by_hand = [(0.1 * t.columns["kl"] / t.columns["alpha"])[t.mask] for t in terms]
    assert loss.item() == pytest.approx(sum(x.mean().item() for x in by_hand) / 3, abs=1e-10)
    whole = AlignDistil(r=4, length_norm=False)(s)[0].item()
    assert whole == pytest.approx(sum(x.sum().item() for x in by_hand) / 3, abs=1e-10)
    plain = AlignDistil(r=4, weight_by_beta=False)(s)[0].item()
    assert plain == pytest.approx(sum(t.columns["kl"][t.mask].mean().item() for t in terms) / 3, abs=1e-10)
    assert logs["length"].item() == pytest.approx(8 / 3)


def test_gradients_of_a_model_are_those_of_its_whole_logits(models):
    """From hidden states and head, tile by tile, in float64: to 1e-10 of the plain formula."""
    method = AlignDistil(r=4)
    policy = models["policy"]
    loss, _ = method(seen(models, method, EXAMPLES))
    got = torch.autograd.grad(loss, list(policy.parameters()))
    batch = collate(EXAMPLES, ("chosen",))
    z = {name: m(batch.ids, attention_mask=batch.attention_mask).logits[:, :-1] for name, m in models.items()}
    dpo, rev, pi = (z[name].log_softmax(-1) for name in ("dpo", "reverse", "policy"))
    alpha = (4 * 0.5 * (dpo.exp() - rev.exp()).abs().sum(-1) + 1e-3).detach()
    target = (dpo + alpha[..., None] * (dpo - rev)).log_softmax(-1).detach()
    term = 0.1 / alpha * (pi.exp() * (pi - target)).sum(-1)
    plain = ((term * batch.mask).sum(-1) / batch.mask.sum(-1)).mean()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    for a, b in zip(got, torch.autograd.grad(plain, list(policy.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_only_what_a_teacher_is_made_of_is_scored():
    assert [AlignDistil(teacher=kind).frozen for kind in KINDS] == [
        ("ref", "dpo"),
        ("dpo", "reverse"),
        ("dpo", "reverse"),
        ("ref", "dpo"),
    ]


def test_empty_responses_are_skipped_and_counted():
    method, z = AlignDistil(), random_tiles(7, rows=6)
    s = stats(method, z, rows=2)
    padded = {name: torch.cat([x, torch.zeros(1, 3, dtype=F64)]) for name, x in s.columns.items()}
    mask = torch.tensor([[True] * 3, [True] * 3, [False] * 3])
    loss, logs = method(TokenStats(None, mask, blocks=1, columns=padded))
    assert loss.item() == pytest.approx(method(s)[0].item(), abs=1e-12)
    assert logs["skipped"] == 1
    with pytest.raises(UserError, match="no response of the batch has a token"):
        method(TokenStats(None, mask[2:], blocks=1, columns={name: x[2:] for name, x in padded.items()}))


# Its own responses, and its teachers.


def test_on_policy_examples_are_the_policy_s_own_and_empty_ones_are_counted():
    mdp = TableMDP.random(0, prompts=2, vocab=5, length=4)
    prompts = [{"prompt_ids": [i % 2]} for i in range(6)]
    method = OnlineAlignDistil()
    assert (method.blocks, method.r, AlignDistil().r) == (("response",), 30.0, 20.0)
    round = table_round(mdp, 3 * mdp.ref_logits, torch.Generator().manual_seed(0))
    examples = method.collect(round, prompts)
    again = table_round(mdp, 3 * mdp.ref_logits, torch.Generator().manual_seed(0)).sample(prompts)
    assert [e["response_ids"] for e in examples] == [e["response_ids"] for e in again]
    assert [e["prompt_ids"] for e in examples] == [p["prompt_ids"] for p in prompts]
    assert round.logs == {"skipped": 0.0}
    assert collate(examples, method.blocks).mask.sum() == 24

    def half(examples, temperature, generator):
        return [{**e, "response_ids": [1] * (i % 2)} for i, e in enumerate(examples)]

    few = type(round)(0, {}, half, None, torch.Generator())
    assert len(method.collect(few, prompts)) == 3
    assert few.logs == {"skipped": 3.0}
    with pytest.raises(UserError, match="answered none of the 1 prompts"):
        method.collect(few, prompts[:1])


def test_swapped_pairs_exchange_blocks_and_their_columns():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "chosen_a_b": [0.1], "rejected_a_b": [0.2]}]
    assert swapped(rows) == [
        {"prompt_ids": [1], "rejected_ids": [2], "chosen_ids": [3], "rejected_a_b": [0.1], "chosen_a_b": [0.2]}
    ]
    assert swapped([{"prompt": "p", "chosen": "c", "rejected": "r"}]) == [
        {"prompt": "p", "rejected": "c", "chosen": "r"}
    ]
    assert swapped(swapped(rows)) == rows


def test_table_teachers_and_a_step_towards_them():
    """The reverse model has the opposite preferences; the loss of a batch falls when its gradient is followed."""
    mdp, g = TableMDP.random(1, prompts=2, vocab=4, length=4), torch.Generator().manual_seed(1)
    teachers = both_ways(lambda _, pairs: TableScorer(mdp.fit_dpo(pairs, 0.1, steps=30)), mdp.pairs(500, g))
    dpo, reverse, ref = (
        mdp.value(z).mean() for z in (teachers["dpo"].logits, teachers["reverse"].logits, mdp.ref_logits)
    )
    assert reverse < ref < dpo
    policy, prompt = mdp.ref_logits.clone().requires_grad_(), torch.arange(2).repeat(16)
    batch = response_batch(prompt, mdp.sample(mdp.ref_logits, prompt, g))
    method = OnlineAlignDistil(r=2)
    loss, _ = method(statistics(method, batch, TableScorer(policy), teachers))
    (grad,) = torch.autograd.grad(loss, policy)
    after, _ = method(statistics(method, batch, TableScorer(policy.detach() - 0.5 * grad), teachers))
    assert after < loss


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("adapters", [False, True])
def test_teachers_of_language_models_are_trained_and_used(tmp_path, adapters):
    """DPO both ways through the trainer, as copies or as adapters of one base; the policy itself is left as it was."""
    from locum.align.trainer import Trainer, align_arguments

    torch.manual_seed(0)
    model = tiny(vocab_size=16, seed=3).model
    if adapters:
        model = lora(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    rows = [{"prompt_ids": [i % 5, 1], "chosen_ids": [2, i % 7, 15], "rejected_ids": [3, 9 - i % 7]} for i in range(24)]
    args = align_arguments(
        tmp_path, learning_rate=3e-3, num_train_epochs=2, save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    teachers = train_teachers(model, rows, args)
    for name, p in model.named_parameters():
        if name in before:
            torch.testing.assert_close(p, before[name], atol=0, rtol=0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    batch = collate(rows)
    scorers = {k: ModelScorer(model, x) if isinstance(x, str) else ModelScorer(x) for k, x in teachers.items()}

    def margin(scorer):
        with torch.no_grad():
            logp = batch.spread(tiles.over_tiles(tiles.log_prob, [scorer(batch)], batch.targets)[0])
        chosen, rejected = lp.masked_sum(logp, batch.mask).chunk(2)
        return (chosen - rejected).mean().item()

    assert margin(scorers["reverse"]) < margin(ModelScorer(model)) < margin(scorers["dpo"])
    trainer = Trainer(model, AlignDistil(r=4), args, rows, models=teachers)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "kl/teacher" in log]
    assert logged[-1]["kl/teacher"] < logged[0]["kl/teacher"]
    assert margin(ModelScorer(model)) > margin(scorers["reverse"])
    if adapters:
        with pytest.raises(UserError, match="has an adapter 'dpo' already"):
            train_teachers(model, rows, args)


# Bad input.


@pytest.mark.parametrize(
    ("field", "value"),
    [("r", -1.0), ("r", math.nan), ("eps", -1e-3), ("beta", 0.0), ("beta_0", math.inf), ("temperature", 0.0)],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=rf"AlignDistil\.{field} must be .*, got {value!r}"):
        AlignDistil(**{field: value})


def test_an_unknown_teacher_is_named():
    method = AlignDistil()
    object.__setattr__(method, "teacher", "dpo")  # the type check of the tests would refuse it before
    with pytest.raises(UserError, match=r"teacher must be one of dpo_ref, contrastive, adaptive, .*, got 'dpo'"):
        method.__post_init__()


def test_logits_that_are_not_finite_are_refused():
    method, z = AlignDistil(), random_tiles(8, rows=6)
    for name in ("policy", "dpo", "reverse"):
        bad = dict(z)
        bad[name] = z[name].clone()
        bad[name][2, 1] = math.nan
        with pytest.raises(UserError, match="not finite at 1 of the batch's 6 response tokens"):
            method(stats(method, bad, rows=2))
    with pytest.raises(UserError, match="not finite at 6"):
        method(stats(AlignDistil(eps=0), z | {"reverse": z["dpo"]}, rows=2))


def test_missing_models_and_other_vocabularies_are_refused(models):
    method = AlignDistil()
    with pytest.raises(UserError, match="AlignDistil needs the model 'reverse'"):
        seen({name: models[name] for name in ("policy", "dpo")}, method, EXAMPLES)
    other = tiny(vocab_size=17, seed=2, dtype=F64).model
    with pytest.raises(UserError, match="same vocabulary; their logits have 16, 17 entries"):
        seen(models | {"reverse": other}, method, EXAMPLES)
    with pytest.raises(UserError, match="empty chosen response"):
        seen(models, method, [{"prompt_ids": [1], "chosen_ids": []}])
