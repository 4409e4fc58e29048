"""Cut completions may be left out of the training; their rewards stay in the group."""

import torch

from locum.reinforce import Recipe
from locum.tokens.rollouts import Generated, Rollouts


def test_cut_completions_are_left_out_but_count_in_their_group():
    mask = torch.arange(3) < torch.tensor([3, 2, 3])[:, None]
    made = Generated(torch.ones(3, 3, dtype=torch.long) * mask, mask, torch.tensor([False, True, True]))
    rollouts = Rollouts.of([[1]] * 3, made, torch.zeros(3, dtype=torch.long), torch.tensor([0.0, 1.0, 2.0]))
    plan = Recipe.read("dr_grpo + finished + tokenmean").prepare(rollouts)
    assert plan.advantages[:, 0].tolist() == [0.0, 1.0]  # the mean is that of all three
    assert plan.keep.sum(-1).tolist() == [2, 3]
    assert plan.logs["finished_rows"] == torch.tensor(2 / 3).item()
