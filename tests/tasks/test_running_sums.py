"""Running sums: solutions and slips by hand, their frequency, and a solver that goes on from where it is put."""

import math

import pytest
import torch

from locum.errors import UserError
from locum.tasks.running_sums import END, MODULUS, RunningSums, Solver


def test_a_solution_by_hand():
    task = RunningSums(length=3)
    digits = torch.tensor([[3, 1, 5]])
    assert task.solutions(digits).tolist() == [[3, 3, 1, 4, 5, 2, END]]
    written = torch.tensor(
        [
            [3, 3, 1, 4, 5, 2, END],
            [3, 4, 1, 5, 5, 3, END],
            [3, 4, 1, 5, 5, 2, END],
            [3, 3, 1, 4, 5, 2, 0],
            [3, 3, 1, 4, 5, END, END],
        ]
    )
    many = digits.expand(5, -1)
    assert task.answers(written).tolist() == [2, 3, 2, -1, -1]
    assert task.correct(many, written).tolist() == [True, False, True, False, False]
    assert task.first_wrong(many, written).tolist() == [7, 1, 1, 6, 5]


def test_slips_come_after_hard_digits_and_every_sum_after_them_is_off():
    task, g = RunningSums(length=6, hard=(3, 5), slip=0.55, stray=0.01), torch.Generator().manual_seed(0)
    digits = task.problems(20_000, g)
    written = task.solutions(digits, g)
    off = (written - task.solutions(digits))[:, 1:-1:2] % MODULUS
    slipped = torch.diff(off, dim=1, prepend=torch.zeros(len(off), 1, dtype=torch.long)) % MODULUS
    assert set(slipped.unique().tolist()) == {0, 1}
    hard = (digits == 3) | (digits == 5)
    for where, share in ((hard, 0.55), (~hard, 0.01)):
        n = int(where.sum())
        assert slipped[where].double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share / n))
    at = task.first_wrong(digits, written)
    assert ((at % 2 == 1) | (at == written.shape[1])).all()


def test_late_problems_have_one_hard_digit_near_the_end():
    task = RunningSums(length=8)
    hard = torch.isin(task.late_problems(500, torch.Generator().manual_seed(0), last=2), torch.tensor([3, 5]))
    assert (hard.sum(1) == 1).all()
    assert set(hard.long().argmax(1).tolist()) == {6, 7}


def test_a_solver_samples_its_own_law_and_goes_on_from_a_beginning():
    torch.manual_seed(0)
    solver = Solver(8)
    digits = torch.tensor([[3, 1]]).expand(20_000, -1)
    y = solver.sample(digits, torch.Generator().manual_seed(0))
    assert y.shape == (20_000, 5)
    begun = torch.tensor([[3, 3]]).expand(20_000, -1)
    law = solver.head(solver(digits[:1], torch.tensor([[3, 3, 0]])))[0, 2].softmax(-1)
    for after in (y[(y[:, :2] == begun).all(1)], solver.sample(digits, torch.Generator().manual_seed(1), begun)):
        assert (after[:, :2] == begun[0]).all()
        share = torch.bincount(after[:, 2], minlength=MODULUS + 1) / len(after)
        assert (share - law).abs().max() < 4 * math.sqrt(0.25 / len(after))
    whole = solver(digits[:7], y[:7])
    torch.testing.assert_close(solver(digits[:7], y[:7, :3]), whole[:, :3])


@pytest.mark.parametrize(
    ("field", "value"), [("length", 0), ("hard", (7,)), ("slip", 1.5), ("slip", math.nan), ("stray", -0.1)]
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(UserError, match=rf"^RunningSums\.{field} must be"):
        RunningSums(**{field: value})


def test_late_problems_that_cannot_be():
    g = torch.Generator()
    for task, last in ((RunningSums(hard=()), 2), (RunningSums(hard=tuple(range(7))), 2), (RunningSums(length=3), 4)):
        with pytest.raises(UserError, match="needs hard and easy digits"):
            task.late_problems(1, g, last)
