"""SparsePO by hand and against TDPO1 and DPO; its masks are causal, sound under padding, and say when they are dead."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align import DPO, TDPO1, SparsePO, TokenStats
from locum.align.masks import FunctionMask, LearnedMask, MaPO, MaskNetwork, RandomMask, rescaled
from locum.align.statistics import ModelScorer, collate, statistics, token_signals
from locum.align.table import TableScorer, fit, response_batch
from locum.errors import UserError
from locum.models import tiny
from locum.tasks.token_mdp import TableMDP, tied
from locum.tokens.tiles import Scores

F64 = torch.float64
V, LAYERS, H = 16, 4, 32
D = torch.tensor([[0.4, -0.2], [0.1, 0.3]], dtype=F64)
K = torch.tensor([[0.05, 0.10], [0.20, 0.01]], dtype=F64)
M = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=F64)
PAIRS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]},
    {"prompt_ids": [9], "chosen_ids": [1, 2, 3, 4, 11], "rejected_ids": [5]},
]
LEARNED = [SparsePO(mask=mask, mask_init="torch", **more) for mask, more in [
    ("common", {}), ("independent", {}), ("common", {"mask_layers": "last"}), ("common", {"mask_width": 5}), ("binary", {}),
]]  # fmt: skip
ids = lambda method: f"{method.mask}-{method.mask_layers}-{method.mask_width}"  # noqa: E731


def stats(m_u, m_d, d=D, k=K, mask=None):
    ones = torch.ones(d.shape, dtype=torch.bool) if mask is None else mask
    return TokenStats(d, ones, k, columns={"mask_u": m_u, "mask_d": m_d})


def random_stats(seed, m_u=None, m_d=None):
    g = torch.Generator().manual_seed(seed)
    d, k = (torch.randn(6, 5, generator=g, dtype=F64) for _ in range(2))
    lengths = torch.randint(1, 6, (6, 1), generator=g)
    d, k = d.requires_grad_(), k.abs().requires_grad_()
    masks = (
        torch.rand(6, 5, generator=g, dtype=F64) if m is None else torch.full((6, 5), float(m), dtype=F64)
        for m in (m_u, m_d)
    )
    return stats(*(m.requires_grad_() for m in masks), d, k, torch.arange(5) < lengths)


def loss_and_gradients(method, s):
    loss, _ = method(s)
    inputs = [x for x in (s.d, s.k) if x.requires_grad]
    return loss, torch.autograd.grad(loss, inputs, materialize_grads=True)


@pytest.fixture(scope="module")
def models():
    return {n: tiny(vocab_size=V, layers=LAYERS, seed=i, dtype=F64).model for i, n in enumerate(("policy", "ref"))}


@pytest.fixture(scope="module")
def scorers(models):
    return {n: ModelScorer(m) for n, m in models.items()}


def signal_of(method, seed=0, layers=LAYERS, hidden=H):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return method.signal(layers, hidden).double()


# The loss.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("c", [1.0, 0.3, 4.0])
def test_constant_masks_are_tdpo1_with_another_beta_and_no_kl_mask_is_dpo(seed, c):
    for masks, other in (((c, c), TDPO1(beta=0.8 * c)), ((c, 0), DPO(beta=0.8 * c))):
        s = random_stats(seed, *masks)
        ours, theirs = loss_and_gradients(SparsePO(), s), loss_and_gradients(other, s)
        assert ours[0].item() == pytest.approx(theirs[0].item(), abs=1e-12)
        for a, b in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_hand_case():
    """u = .30 - .60 = -.30, delta = .02 - .10 = -.08, z = .8 (-.30 + .08) = -.176; the L1 norm is 1.5 + 2 = 3.5."""
    m = M.clone()
    loss, logs = SparsePO(beta=0.8)(stats(m, m))
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.176)), abs=1e-12)
    assert loss.item() == pytest.approx(0.785014193, abs=1e-9)
    sparse, _ = SparsePO(beta=0.8, lambda_u=0.001, lambda_d=0.001)(stats(m, m))
    assert (sparse - loss).item() == pytest.approx(0.0035, abs=1e-12)
    want = {
        "rewards/chosen": 0.8 * (0.30 + 0.10),
        "rewards/rejected": 0.8 * (0.60 + 0.02),
        "rewards/margins": -0.176,
        "rewards/accuracies": 0.0,
        "kl/chosen": 0.15,
        "kl/rejected": 0.21,
        "kl/masked/chosen": 0.10,
        "kl/masked/rejected": 0.02,
    }
    for kind in "ud":
        want |= {f"mask/mean_{kind}/chosen": 0.75, f"mask/mean_{kind}/rejected": 1.0}
        want |= {f"mask/zeros_{kind}/chosen": 0.0, f"mask/zeros_{kind}/rejected": 0.5}
    assert {name: x.item() for name, x in logs.items()} == pytest.approx(want, abs=1e-12)


def test_a_common_mask_is_counted_once():
    """Half of each lambda: what two equal masks with half of both would cost."""
    s = random_stats(0)
    s = TokenStats(s.d, s.mask, s.k, columns={"mask_u": (m := s.columns["mask_u"]), "mask_d": m})
    common = SparsePO(lambda_u=0.3, lambda_d=0.1)(s)[0]
    independent = SparsePO(mask="independent", lambda_u=0.15, lambda_d=0.05)(s)[0]
    assert common.item() == pytest.approx(independent.item(), abs=1e-14)
    per_pair = (m * s.mask).sum(-1).view(2, 3).sum(0)
    assert (common - SparsePO()(s)[0]).item() == pytest.approx(0.2 * per_pair.mean().item(), abs=1e-12)


def test_one_term_alone_may_be_masked():
    s = random_stats(1)
    one = torch.ones_like(s.d)
    u, d = s.columns["mask_u"], s.columns["mask_d"]
    for on, masks, cost in (("reward", (u, one), {"lambda_u": 0.2}), ("kl", (one, d), {"lambda_d": 0.2})):
        plain, logs = SparsePO(on=on)(s)
        same = SparsePO()(TokenStats(s.d, s.mask, s.k, columns=dict(zip(("mask_u", "mask_d"), masks, strict=True))))
        assert plain.item() == pytest.approx(same[0].item(), abs=1e-12)
        assert ("mask/mean_u/chosen" in logs) == (on == "reward")
        norm = (masks[0 if on == "reward" else 1] * s.mask).sum(-1).view(2, 3).sum(0).mean()
        assert (SparsePO(on=on, **cost)(s)[0] - plain).item() == pytest.approx(0.2 * norm.item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_in_the_masks(seed):
    """dL/dm_u = -+ beta sigmoid(-z) d and dL/dm_d = -+ beta sigmoid(-z) k, chosen -, rejected +; nothing on padding."""
    s = random_stats(seed)
    method = SparsePO(beta=0.5)
    grads = torch.autograd.grad(method(s)[0], list(s.columns.values()))
    chosen, rejected = s.sums(method.score(s))
    weight = (0.5 * torch.sigmoid(-0.5 * (chosen - rejected)) / 3).repeat(2)[:, None]
    sign = torch.tensor([-1.0] * 3 + [1.0] * 3).double()[:, None]
    for grad, term in zip(grads, (s.d, s.k), strict=True):
        torch.testing.assert_close(grad, sign * weight * term * s.mask, atol=1e-12, rtol=0)
    assert (grads[1][:3] <= 0).all()
    assert (grads[1][3:] >= 0).all()


# MaPO.


def test_rescaling_by_hand():
    """Means (1, 2, 4) become (0, 1/3, 1) in their row, the row of one token and the constant one 1; rows stay apart."""
    mask = torch.tensor([[False, True, True, True], [True, False, False, False], [False, False, True, True]])
    values = torch.tensor([[1.0, 2.0, 4.0, -7.0, 5.0, 5.0]], dtype=F64)
    want = torch.tensor([[0.0, 1 / 3, 1.0, 1.0, 1.0, 1.0]], dtype=F64)
    torch.testing.assert_close(rescaled(values, mask), want, atol=1e-12, rtol=0)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-10, 10))
def test_rescaling_forgets_scale_and_offset(seed, p, q):
    """So z-normalising first, as the authors' code does, changes nothing."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=g) < 0.6
    values = torch.randn(3, int(mask.sum()), generator=g, dtype=F64)
    m = rescaled(values, mask)
    assert ((m >= 0) & (m <= 1)).all()
    torch.testing.assert_close(rescaled(p * values + q, mask), m, atol=1e-12, rtol=0)
    rows = torch.zeros(3, 4, 6, dtype=F64)
    rows[:, mask] = values
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    centred = (rows - rows.sum(-1, keepdim=True) / n) * mask
    spread = (centred.square().sum(-1, keepdim=True) / n).sqrt() + 1e-12
    torch.testing.assert_close(rescaled((centred / spread)[:, mask], mask), m, atol=1e-10, rtol=0)


def test_mapo_is_the_mean_over_places_and_kinds(scorers, models):
    """By hand from what the model says, one response; the logits are a kind of one place, layers places of the others."""
    example = PAIRS[1]
    (found,) = token_signals(MaPO(("residual", "logits")), scorers["ref"], [example], "chosen")
    text = torch.tensor([example["prompt_ids"] + example["chosen_ids"]])
    out = models["ref"](input_ids=text, output_hidden_states=True)
    scale = lambda a: (a - a.min()) / (a.max() - a.min())  # noqa: E731
    residual = torch.stack([scale(h[0, :-1].mean(-1)) for h in out.hidden_states[1:]]).mean(0)
    want = (residual + scale(out.logits[0, :-1].mean(-1))) / 2
    torch.testing.assert_close(found["mask_u"], want, atol=1e-10, rtol=0)
    assert torch.equal(found["mask_d"], found["mask_u"])
    (whole,) = token_signals(MaPO(), scorers["ref"], [example], "chosen")
    assert ((whole["mask_u"] >= 0) & (whole["mask_u"] <= 1)).all()
    (one,) = token_signals(MaPO(), scorers["ref"], [PAIRS[1]], "rejected")
    assert one["mask_u"].tolist() == [1.0]


def test_mapo_needs_nothing_but_means(scorers):
    signal = SparsePO(mask="mapo").signal(LAYERS, H)
    assert list(signal.parameters()) == []
    assert signal.groups(1e-3)[0]["params"] == []
    batch = collate(PAIRS)
    ref = scorers["ref"](batch, signal.taps)
    assert {kind: [x.shape for x in layers] for kind, layers in ref.taps.items()} == {
        kind: [(len(ref),)] * LAYERS for kind in ("mlp", "attention", "residual")
    }
    s = statistics(SparsePO(mask="mapo"), batch, scorers["policy"], scorers, signal)
    assert not s.columns["mask_u"].requires_grad


# Learned masks.


@pytest.mark.parametrize("method", LEARNED, ids=ids)
def test_a_mask_sees_the_prefix_only(method, scorers):
    """A token and what follows it leave its own mask and those before it alone; what comes after it moves."""
    signal = signal_of(method)
    example = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6, 7]}
    (before,) = token_signals(signal, scorers["ref"], [example])
    moved = 0.0
    for t in range(5):
        changed = {**example, "response_ids": [*example["response_ids"][:t], *[9] * (5 - t)]}
        (after,) = token_signals(signal, scorers["ref"], [changed])
        for kind in ("mask_u", "mask_d"):
            torch.testing.assert_close(after[kind][: t + 1], before[kind][: t + 1], atol=1e-10, rtol=0)
            moved += (after[kind][t + 1 :] - before[kind][t + 1 :]).abs().sum().item()
    assert moved > 1e-3


def test_mapo_looks_at_the_whole_response(scorers):
    """Its activations are causal, its rescaling is not: the last token that is read moves the smallest and the largest."""
    example = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6, 7]}
    changed = {**example, "response_ids": [3, 4, 5, 9, 7]}
    (before,), (after,) = (token_signals(MaPO(), scorers["ref"], [e]) for e in (example, changed))
    assert (before["mask_u"][:4] - after["mask_u"][:4]).abs().max() > 1e-3


@pytest.mark.parametrize("method", [*LEARNED, SparsePO(mask="mapo")], ids=ids)
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_nothing(method, left, scorers):
    """Alone, in a batch padded on either side: one mask, one loss; no padding in MaPO's minimum and maximum."""
    signal = signal_of(method)
    batch = collate(PAIRS, pad_id=13, left=left)
    s = statistics(method, batch, scorers["policy"], scorers, signal)
    rows = [e[f"{block}_ids"] for block in ("chosen", "rejected") for e in PAIRS]
    both = [token_signals(signal, scorers["ref"], [e], block)[0] for block in ("chosen", "rejected") for e in PAIRS]
    for row, (tokens, alone) in enumerate(zip(rows, both, strict=True)):
        for kind in ("mask_u", "mask_d"):
            values = s.columns[kind][row]
            assert len(values[s.mask[row]]) == len(tokens)
            torch.testing.assert_close(values[s.mask[row]], alone[kind], atol=1e-10, rtol=0)
            assert (values[~s.mask[row]] == 0).all()
    together = token_signals(signal, scorers["ref"], PAIRS, "chosen", batch_size=2)
    for one, alone in zip(together, both, strict=False):  # texts are scored by length and come back in their order
        assert one.keys() == {"mask_u", "mask_d", "logp_ref"}
        for kind, values in one.items():
            torch.testing.assert_close(values, alone[kind], atol=1e-10, rtol=0)
    losses = [method(statistics(method, collate([e]), scorers["policy"], scorers, signal))[0] for e in PAIRS]
    assert method(s)[0].item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-10)


@pytest.mark.parametrize("method", LEARNED[:4], ids=ids)
def test_gradient_reaches_the_mask_network_and_never_the_reference(method, models):
    """Central differences of the loss in mask parameters; a layer whose ReLU is shut gets none."""
    models = {n: copy.deepcopy(m) for n, m in models.items()}
    scorers = {n: ModelScorer(m) for n, m in models.items()}
    signal = signal_of(method)
    if method.mask_layers == "all":
        with torch.no_grad():
            signal.reward.ends[1].bias.fill_(-100.0)
            for network in (n for n in (signal.reward, signal.kl) if n is not None):
                network.mixer.weight.abs_()

    batch = collate(PAIRS)
    s = statistics(method, batch, scorers["policy"], scorers, signal)
    method(s)[0].backward()
    ref = scorers["ref"](batch, signal.taps)

    def loss():
        columns = {name: batch.spread(m) for name, m in signal(ref, batch).items()}
        return method(TokenStats(s.d.detach(), s.mask, s.k.detach(), columns=columns))[0]

    assert all(p.grad is None for p in models["ref"].parameters())
    assert any(p.grad.abs().sum() > 0 for p in models["policy"].parameters())
    checked = 0
    with torch.no_grad():
        for p in signal.parameters():
            at = int(p.grad.abs().argmax())
            found, flat = p.grad.view(-1)[at].item(), p.view(-1)
            before = flat[at].item()
            flat[at] = before + 1e-5
            high = loss().item()
            flat[at] = before - 1e-5
            low = loss().item()
            flat[at] = before
            assert (high - low) / 2e-5 == pytest.approx(found, abs=1e-6)
            checked += found != 0
    assert checked >= 4
    if method.mask_layers == "all":
        assert signal.reward.ends[1].weight.grad.abs().max() == 0
        assert signal.reward.ends[0].weight.grad.abs().max() > 0


def test_common_is_one_tensor_and_independent_two(scorers):
    batch = collate(PAIRS)
    common, independent = (signal_of(SparsePO(mask=m, mask_init="torch")) for m in ("common", "independent"))
    ref = scorers["ref"](batch, common.taps)
    one, two = common(ref, batch), independent(ref, batch)
    assert one["mask_u"] is one["mask_d"]
    assert (two["mask_u"] - two["mask_d"]).abs().max() > 1e-3
    assert sum(p.numel() for p in independent.parameters()) == 2 * sum(p.numel() for p in common.parameters())


def test_the_network_by_hand():
    """m = ReLU(sum_l v_l ReLU(W_l LN(h_l) + b_l)) with one layer norm for all layers."""
    network = MaskNetwork(2, 3, init="torch").double()
    with torch.no_grad():
        network.norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
        network.norm.bias.copy_(torch.tensor([0.1, 0.0, -0.2]))
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(7, 3, generator=g, dtype=F64) for _ in range(2)]
    ends = []
    for end, h in zip(network.ends, hidden, strict=True):
        normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = normal * network.norm.weight + network.norm.bias
        ends.append((x @ end.weight[0] + end.bias).clamp(min=0))
    want = (torch.stack(ends, -1) @ network.mixer.weight[0]).clamp(min=0)
    torch.testing.assert_close(network(hidden), want, atol=1e-12, rtol=0)
    assert network.mixer.bias is None


def test_initial_masks():
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(4000, 64, generator=g) for _ in range(4)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        paper = MaskNetwork(4, 64)
        assert (MaskNetwork(4, 64, init="ones")(hidden) == 1).all()
        assert (MaskNetwork(4, 64, width=5, init="ones")(hidden) == 1).all()
        assert (MaskNetwork(1, 64, init="ones")(hidden[:1]) == 1).all()
    for end in paper.ends:
        assert end.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert end.bias.item() == 0
    assert 0 <= paper(hidden).mean() < 0.05


def test_starting_from_ones_is_tdpo1_and_learns(scorers):
    method = SparsePO(mask_init="ones")
    signal = signal_of(method)
    loss, _ = method(statistics(method, collate(PAIRS), scorers["policy"], scorers, signal))
    want, _ = TDPO1(beta=0.8)(statistics(TDPO1(), collate(PAIRS), scorers["policy"], scorers))
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    loss.backward()
    assert all(end.weight.grad.abs().max() > 0 for end in signal.reward.ends)


def test_a_binary_mask_is_zero_or_one_and_stays_as_it_was_made(scorers):
    signal = signal_of(SparsePO(mask="binary", mask_init="torch"))
    found = token_signals(signal, scorers["ref"], PAIRS, "rejected")
    values = torch.cat([x["mask_u"] for x in found])
    assert set(values.tolist()) <= {0.0, 1.0}
    assert signal.groups(1e-3) == []


def test_a_random_mask_is_new_for_every_batch(scorers):
    signal = RandomMask()
    batch = collate(PAIRS)
    ref = scorers["ref"](batch)
    a, b = (signal(ref, batch)["mask_u"] for _ in range(2))
    assert ((a >= 0) & (a < 1)).all()
    assert not torch.equal(a, b)


def test_dropout_is_off_outside_training(scorers):
    method = SparsePO(mask_init="torch", mask_dropout=0.5)
    signal = signal_of(method)
    batch = collate(PAIRS)
    ref = scorers["ref"](batch, signal.taps)
    trained = [signal(ref, batch)["mask_u"] for _ in range(2)]
    assert not torch.equal(*trained)
    signal.eval()
    assert torch.equal(*[signal(ref, batch)["mask_u"] for _ in range(2)])


def test_masks_are_float32_whatever_the_reference_runs_in():
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(50, 8, generator=g).bfloat16() for _ in range(2)]
    network = MaskNetwork(2, 8, init="ones")
    with torch.no_grad():
        network.ends[0].weight.normal_(std=0.1, generator=g)
    want = network([h.float() for h in hidden])
    with torch.autocast("cpu", torch.bfloat16):
        found = network(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        network(hidden)
    assert all(x.dtype == torch.bfloat16 for x in kept if x.dim() == 2 and x.shape[1] == 8)


def test_optimizer_groups():
    """Matrices decay, norms and biases do not; the learning rate is the policy's unless another is given."""
    signal = signal_of(SparsePO(mask="independent", mask_weight_decay=0.03))
    decayed, others = signal.groups(1e-4)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.03, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert len(decayed["params"]) == 2 * (LAYERS + 1)
    assert {id(p) for group in (decayed, others) for p in group["params"]} == {id(p) for p in signal.parameters()}
    assert decayed["lr"] == others["lr"] == 1e-4
    assert all(group["lr"] == 0.5 for group in signal_of(SparsePO(mask_lr=0.5)).groups(1e-4))


def test_a_dead_mask_is_told(scorers):
    """Zero on every token of three steps in a row; one living step in between starts the count anew."""
    method = SparsePO(mask_init="ones", dead_after=3)
    signal = signal_of(method)
    batch = collate(PAIRS)

    def step():
        return method(statistics(method, batch, scorers["policy"], scorers, signal))[0]

    def fill(v):
        with torch.no_grad():
            signal.reward.mixer.weight.fill_(v)

    fill(-1.0)
    step(), step()
    fill(1.0)
    step()
    fill(-1.0)
    step()
    loss = step()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    loss.backward()
    assert all(p.grad.abs().max() == 0 for p in signal.parameters())
    signal.eval()
    step()  # an evaluation does not count
    signal.train()
    with torch.no_grad():
        step()
    with pytest.raises(UserError, match="0 on every token of 3 steps in a row, so nothing is trained"):
        step()
    never = signal_of(SparsePO(mask_init="ones", dead_after=0))
    for p in never.reward.mixer.parameters():
        torch.nn.init.constant_(p, -1.0)
    ref = scorers["ref"](batch, never.taps)
    assert all((never(ref, batch)["mask_u"] == 0).all() for _ in range(30))


def test_a_dead_kl_mask_is_no_error(scorers):
    """L1 may well put out the KL mask: what remains is DPO."""
    method = SparsePO(mask="independent", mask_init="ones", dead_after=1)
    signal = signal_of(method)
    torch.nn.init.constant_(signal.kl.mixer.weight, -1.0)
    loss, _ = method(statistics(method, collate(PAIRS), scorers["policy"], scorers, signal))
    dpo, _ = DPO(beta=0.8)(statistics(DPO(), collate(PAIRS), scorers["policy"], scorers))
    assert loss.item() == pytest.approx(dpo.item(), abs=1e-12)


# Training.


def test_a_table_policy_and_its_mask_learn_together():
    mdp = TableMDP.scored(0, prompts=2, length=4)
    pairs = mdp.pairs(200, torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    features = tuple(tied(torch.randn(2, 17, 6, generator=g, dtype=F64), 4) for _ in range(2))
    signal = signal_of(SparsePO(mask_init="torch"), layers=2, hidden=6)
    before = copy.deepcopy(signal.state_dict())
    curve = fit(SparsePO(beta=0.1), mdp, pairs, signal=signal, features=features, steps=30, measure_every=30)
    assert curve.logs[-1]["loss"] < math.log(2)
    assert curve.reward[-1] > curve.reward[0]
    assert any(not torch.equal(x, before[n]) for n, x in signal.state_dict().items())


def test_the_trained_model_is_a_plain_one(tmp_path):
    """Masks are saved apart; what `from_pretrained` reads has the policy's logits."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from locum.align.trainer import Trainer, align_arguments

    model = tiny(vocab_size=V, layers=2).model
    method = SparsePO(mask_init="ones", lambda_u=0.001, mask_lr=1e-2)
    args = align_arguments(
        tmp_path, learning_rate=1e-3, max_steps=2, warmup_steps=0, use_cpu=True, logging_steps=1, disable_tqdm=True
    )
    trainer = Trainer(model, method, args, PAIRS)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    row = trainer.state.log_history[0]
    assert row["mask/mean_u/chosen"] == pytest.approx(1.0, abs=1e-6)
    assert trainer.state.log_history[1]["mask/mean_u/chosen"] != row["mask/mean_u/chosen"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert not any("signal" in n for n in plain.state_dict())
    text = torch.tensor([[1, 2, 3]])
    assert torch.equal(plain.eval()(text).logits, model.eval()(text).logits)
    assert load_file(tmp_path / "end" / "signal.safetensors").keys() == trainer.signal.state_dict().keys()


# What is refused.


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda ref, batch: torch.zeros(len(ref), 1), r"shape \[11\], got \[11, 1\]"),
        (lambda ref, batch: torch.zeros(batch.mask.shape), r"shape \[11\], got \[4, 5\]"),
        (lambda ref, batch: torch.arange(11.0) - 0.5, "finite and >= 0, got -0.5 at response token 0"),
        (lambda ref, batch: torch.full((11,), math.nan), "finite and >= 0, got nan"),
        (lambda ref, batch: torch.full((11,), math.inf), "finite and >= 0, got inf"),
    ],
)
def test_a_mask_of_ones_own_is_checked(function, said, scorers):
    with pytest.raises(UserError, match=said):
        statistics(SparsePO(), collate(PAIRS), scorers["policy"], scorers, FunctionMask(function))


def test_a_mask_of_ones_own(scorers):
    """The norm of the last hidden state, kept by a tap."""
    signal = FunctionMask(lambda ref, batch: ref.taps["last"][0], {"last": lambda h: h.norm(dim=-1)})
    s = statistics(SparsePO(), collate(PAIRS), scorers["policy"], scorers, signal)
    assert (s.columns["mask_u"][s.mask] > 0).all()


def test_a_reference_of_other_depth_or_without_layers_is_named(scorers):
    signal = signal_of(SparsePO(), layers=LAYERS + 1)
    with pytest.raises(UserError, match="made for 5 layers; the reference shows 4"):
        statistics(SparsePO(), collate(PAIRS), scorers["policy"], scorers, signal)
    bare = tiny(vocab_size=V).model
    bare.model.levels, bare.model.layers = bare.model.layers, None
    with pytest.raises(UserError, match="LlamaForCausalLM shows no list of layers"):
        ModelScorer(bare)(collate(PAIRS), signal.taps)


def test_missing_masks_are_named():
    with pytest.raises(UserError, match="SparsePO needs 'mask_d' per token: give `statistics` what its `signal` makes"):
        SparsePO()(TokenStats(D, torch.ones(2, 2, dtype=torch.bool), K, columns={"mask_u": M}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"on": "kl", "mask": "independent"}, "on must be both for independent masks, got 'kl'"),
        ({"lambda_u": -1.0}, "lambda_u must be finite and >= 0, got -1.0"),
        ({"lambda_d": math.nan}, "lambda_d must be finite and >= 0, got nan"),
        ({"lambda_u": 0.1, "mask": "mapo"}, "lambda_u must be 0 for mask='mapo' and on='both', got 0.1"),
        ({"lambda_d": 0.1, "on": "reward"}, "lambda_d must be 0 for mask='common' and on='reward', got 0.1"),
        ({"mask_lr": 0.0}, "mask_lr must be finite and > 0, or None, got 0.0"),
        ({"mask_weight_decay": math.inf}, "mask_weight_decay must be finite and >= 0"),
        ({"mask_dropout": 1.0}, r"mask_dropout must be in \[0, 1\), got 1.0"),
        ({"mask_width": -1}, "mask_width must be >= 0, got -1"),
        ({"places": ()}, "places must be some of mlp, attention, residual, logits, none twice"),
        ({"places": ("mlp", "mlp")}, "places must be some of"),
        ({"places": ("heads",)}, "places must be some of"),
        ({"dead_after": -1}, "dead_after must be >= 0, got -1"),
    ],
)
def test_a_bad_value_is_named(fields, said):
    with pytest.raises(UserError, match=rf"SparsePO\.{said}"):
        SparsePO(**fields)


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("mask", "common, independent, mapo, binary, random"),
        ("on", "both, reward, kl"),
        ("mask_init", "paper, torch, ones"),
        ("mask_layers", "all, last"),
    ],
)
def test_an_unknown_kind_is_named(field, allowed):
    method = SparsePO()
    object.__setattr__(method, field, "other")  # past the check of types, which the tests have on
    with pytest.raises(UserError, match=rf"SparsePO\.{field} must be one of {allowed}, got 'other'"):
        method.__post_init__()


def test_the_table_and_the_model_go_one_way():
    """A table's features stand for hidden states, layer by layer."""
    mdp = TableMDP.scored(0, prompts=2, length=4)
    g = torch.Generator().manual_seed(1)
    features = tuple(tied(torch.randn(2, 17, 6, generator=g, dtype=F64), 4) for _ in range(2))
    batch = response_batch(torch.tensor([0, 1]), torch.tensor([[3, 8, 1, 2], [0, 0, 5, 9]]))
    signal = signal_of(SparsePO(mask_init="torch"), layers=2, hidden=6)
    found = signal(TableScorer(mdp.ref_logits, features)(batch, signal.taps), batch)["mask_u"]
    states = torch.stack([f[1, 3, 5] for f in features])  # the last token of the second row follows a 5
    assert found[-1].item() == pytest.approx(signal.reward(list(states[:, None])).item(), abs=1e-12)
    assert isinstance(signal, LearnedMask)
    assert isinstance(TableScorer(mdp.ref_logits, features)(batch), Scores)
