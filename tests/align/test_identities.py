"""Where methods of the family must agree: with their own part switched off, and at the first step from the reference."""

import math

import pytest
import torch

from locum.align import DPO, TDPO1, TDPO2, TGDPO, TREG, OnlineTGDPO
from locum.align.base import Method
from locum.align.statistics import statistics
from locum.align.table import TableScorer, response_batch

F64 = torch.float64
V, H, N, BETA = 4, 3, 3, 0.7


@pytest.fixture(params=range(3))
def world(request):
    """Policy, reference and guide tables, and a batch of pairs that has the column "r_hat"."""
    g = torch.Generator().manual_seed(request.param)
    models = [torch.randn(1, H, V, V, generator=g, dtype=F64) for _ in range(3)]
    chosen, rejected = (torch.randint(V, (N, H), generator=g) for _ in range(2))
    r = torch.rand(2 * N, H, generator=g, dtype=F64) - 0.5
    return *models, response_batch(torch.zeros(N, dtype=torch.long), chosen, rejected, columns={"r_hat": r})


def at(method: Method, policy, ref, guide, batch):
    """Loss, and gradient with respect to the policy's logits."""
    leaf = policy.clone().requires_grad_()
    frozen = {"ref": TableScorer(ref), "guide": TableScorer(guide)}
    loss, _ = method(statistics(method, batch, TableScorer(leaf), frozen))
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(
    "method", [TDPO2(BETA, alpha=0), TGDPO(BETA, alpha=0), OnlineTGDPO(BETA, alpha=0), TREG(BETA, alpha=0)]
)
def test_alpha_zero_is_dpo(method, world):
    (loss, gradient), (dpo, slope) = at(method, *world), at(DPO(BETA), *world)
    assert loss == pytest.approx(dpo, abs=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", [TDPO1(BETA), TDPO2(BETA), TDPO2(BETA, alpha=3.0)])
def test_at_the_reference_the_kl_terms_have_no_gradient(method, world):
    _, ref, guide, batch = world
    (loss, gradient), (dpo, slope) = at(method, ref, ref, guide, batch), at(DPO(BETA), ref, ref, guide, batch)
    assert loss == pytest.approx(math.log(2), abs=1e-12)
    assert dpo == pytest.approx(math.log(2), abs=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-10, rtol=0)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 1.9])
def test_at_the_reference_t_reg_and_tgdpo_go_the_same_way(alpha, world):
    """Both weigh tokens by 1 + alpha r and 1 - alpha r; away from the reference their pairs weigh differently."""
    policy, ref, guide, batch = world
    treg, tgdpo = (at(method, ref, ref, guide, batch)[1] for method in (TREG(BETA, alpha), TGDPO(BETA, alpha)))
    torch.testing.assert_close(treg, tgdpo, atol=1e-12, rtol=0)
    assert (tgdpo - at(DPO(BETA), ref, ref, guide, batch)[1]).abs().max() > 1e-3
    apart = [at(method, policy, ref, guide, batch)[1] for method in (TREG(BETA, alpha), TGDPO(BETA, alpha))]
    assert (apart[0] - apart[1]).abs().max() > 1e-4
