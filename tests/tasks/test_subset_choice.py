"""Subset choice: its truth, its policy's draws and scores, and exact accuracy."""

import pytest
import torch
from torch import Tensor

from locum.errors import UserError
from locum.tasks.subset_choice import BOILERPLATE, SubsetChoice, SubsetPolicy, strict_accuracy, warmed_up
from locum.tokens.logprobs import of_hidden
from locum.tokens.rollouts import Generated, Rollouts, uniforms
from locum.tokens.sampling import Sampling

TASK = SubsetChoice(options=3, features=2, bank=16)


@pytest.fixture(scope="module")
def policy() -> SubsetPolicy:
    return warmed_up(0, TASK, steps=20)


def written(
    policy: SubsetPolicy, prefixes: list[list[int]], copies: int = 1, **more: object
) -> tuple[Rollouts, Generated]:
    n = len(prefixes) * copies
    made = policy.generate(prefixes, copies, [20] * len(prefixes), uniforms(3, torch.arange(n), 20), **more)
    rows = [p for p in prefixes for _ in range(copies)]
    return Rollouts.of(rows, made, torch.arange(n) // copies), made


def test_the_truth_is_a_half_space_and_never_empty() -> None:
    task = SubsetChoice(options=2, features=3, bank=2000)
    true = task.truth
    assert true.any(-1).all()
    forced = true[:, 0] & ~true[:, 1]  # a quarter is so by itself, a quarter because the first steps in
    assert 0.45 < float(forced.float().mean()) < 0.55
    x = task.questions[~forced]
    w = torch.linalg.lstsq(x.flatten(0, 1), true[~forced].flatten()[:, None] * 2.0 - 1).solution[:, 0]
    assert float(((x @ w > 0) == true[~forced]).float().mean()) > 0.97
    again = SubsetChoice(options=2, features=3, bank=2000)
    assert torch.equal(task.questions, again.questions)
    assert not torch.equal(task.questions, SubsetChoice(options=2, features=3, bank=2000, seed=1).questions)


def test_letters_and_what_was_named() -> None:
    for number in range(4):
        answer = [*BOILERPLATE, *TASK.truth[number].long().tolist()]
        assert TASK.named(answer) == ",".join(TASK.letters(number))
    assert TASK.named([2, 3, 4, 5, 1, 0, 1]) == "A,C"
    assert TASK.named([2, 3, 4, 5, 0, 0, 0]) == ""
    assert TASK.named([2, 3, 4, 5, 1, 4, 1]) == "?"  # no answer
    assert TASK.named([2, 3, 4, 5, 1, 0]) == "?"  # broken off


def test_draws_pick_tokens_by_the_cumulated_law(policy: SubsetPolicy) -> None:
    numbers = torch.tensor([4, 11])
    law = policy.lm_head(policy(numbers)).detach().double().softmax(-1)
    draws = uniforms(3, torch.arange(6), 20)
    _, made = written(policy, [[4], [11]], 3)
    assert made.mask.all()
    assert made.ended.all()
    for row in range(6):
        for t in range(TASK.length):
            u, token, p = float(draws[row, t]), int(made.ids[row, t]), law[row // 3, t]
            assert float(p[:token].sum()) <= u < float(p[: token + 1].sum()) + 1e-12


def test_temperatures_are_applied_once(policy: SubsetPolicy) -> None:
    def half(z: Tensor) -> Tensor:
        return torch.full((len(z),), 0.5)

    _, by_heat = written(policy, [[2], [5]], 8, heat=half)
    _, by_sampling = written(policy, [[2], [5]], 8, sampling=Sampling(temperature=0.5))
    _, plain = written(policy, [[2], [5]], 8)
    assert torch.equal(by_heat.ids, by_sampling.ids)
    assert not torch.equal(by_heat.ids, plain.ids)


def test_a_text_that_was_begun_is_gone_on_with(policy: SubsetPolicy) -> None:
    """Its laws are those of its columns; and no more than there is room for."""
    made = policy.generate([[7, 2, 3, 4, 5, 1], [7]], 2, [20, 3], uniforms(0, torch.arange(4), 20))
    assert made.mask.sum(-1).tolist() == [2, 2, 3, 3]
    assert made.ended.tolist() == [True, True, False, False]
    assert not made.ids[:2, 2:].any()
    rows = Rollouts.of([[7, 2, 3, 4, 5, 1]] * 2 + [[7]] * 2, made, torch.tensor([0, 0, 1, 1]))
    h = policy(torch.tensor([7]))[0]
    assert torch.allclose(policy.scores(rows).hidden, torch.cat([h[5:7], h[5:7], h[:3], h[:3]]), atol=1e-6)


def test_scores_are_what_tokens_were_drawn_from_and_carry_gradients(policy: SubsetPolicy) -> None:
    rows, made = written(policy, [[1], [12], [1]], 2)
    scores = policy.scores(rows)
    assert scores.head is not None
    expected = policy.lm_head(policy(torch.tensor([1, 1, 12, 12, 1, 1]))).log_softmax(-1)
    found = rows.spread(of_hidden(scores.hidden, scores.head, rows.targets))
    assert torch.allclose(found, expected.gather(-1, made.ids[..., None])[..., 0], atol=1e-6)
    found.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in policy.parameters())
    policy.zero_grad()


def test_exact_accuracy_is_the_frequency(policy: SubsetPolicy) -> None:
    _, made = written(policy, [[0], [1], [2], [3]], 2000)
    right = [TASK.named(c) == ",".join(TASK.letters(i // 2000)) for i, c in enumerate(made.lists())]
    exact = strict_accuracy(policy, torch.arange(4))
    assert sum(right) / 8000 == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 8000) ** 0.5)


def test_warmed_up_policies_write_the_boilerplate_and_toss_coins() -> None:
    task = SubsetChoice()
    policy = warmed_up(1, task)
    law = policy.lm_head(policy(torch.arange(200))).detach().softmax(-1)
    assert float(law[:, range(4), BOILERPLATE].min()) > 0.95
    assert float((law[:, 4:, :2].mean((0, 1)) - 0.5).abs().max()) < 0.05
    assert strict_accuracy(policy, torch.arange(200)) == pytest.approx(0.5**10, rel=0.3)
    again = warmed_up(1, task)
    assert again is not policy
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("prefix", "room"), [([], 5), ([1, 2, 3, 4, 5, 1, 0, 1], 5), ([1], 0)])
def test_what_cannot_be_gone_on_from(policy: SubsetPolicy, prefix: list[int], room: int) -> None:
    with pytest.raises(UserError, match="prefix 1 cannot be gone on from"):
        policy.generate([[0], prefix], 1, [5, room], torch.zeros(2, 20))


def test_bad_values() -> None:
    for field in ("options", "features", "bank"):
        with pytest.raises(UserError, match=rf"SubsetChoice\.{field} must be >= 1, got 0"):
            SubsetChoice(**{field: 0})
    with pytest.raises(UserError, match="7 tokens may come but draws has 2 columns"):
        warmed_up(0, TASK, steps=20).generate([[0]], 1, [20], torch.zeros(1, 2))
