"""Permutations: what is right, what models are warmed up on, and that a warm start teaches something."""

import pytest
import torch

from locum.errors import UserError
from locum.tasks.permutations import Bidirectional, Permutations, pretrained, untrained, valid_share


def test_right_by_hand():
    task = Permutations(symbols=4)
    texts = [[2, 0, 3, 1], [0, 1, 2, 2], [3, 2, 1, 0]]
    assert task.right(torch.tensor(texts)).tolist() == [True, False, True]
    assert [task.score(text) for text in texts] == [1.0, 0.0, 1.0]
    assert (task.prompt, task.mask_id) == ([4], 5)


@pytest.mark.parametrize(("noise", "share"), [(0.0, 1.0), (1.0, 720 / 6**6)])
def test_noise_spoils_texts(noise, share):
    texts = Permutations(noise=noise).texts(20_000, torch.Generator().manual_seed(0))
    assert Permutations().right(texts).double().mean().item() == pytest.approx(share, abs=4 * 0.12 / 20_000**0.5)
    counts = torch.stack([(texts == v).double().mean(0) for v in range(6)])
    assert ((counts - 1 / 6).abs() < 0.015).all()  # every symbol is as likely at every place


def test_a_model_sees_both_sides_and_no_padding():
    model = Bidirectional(8, 6, 7)
    ids, real = torch.tensor([[6, 1, 7, 3, 4, 5, 0]]), torch.ones(1, 7, dtype=torch.bool)
    plain = model(ids, real)
    for place in (1, 6):
        other = ids.clone()
        other[0, place] = 2
        assert not torch.allclose(model(other, real)[0, 2], plain[0, 2], atol=1e-4)
    wide = model(torch.tensor([[3, 3, 6, 1, 7, 3, 4]]), torch.tensor([[False, False] + [True] * 5]))
    assert torch.allclose(wide[:, 2:], model(ids[:, :5], real[:, :5]), atol=1e-6)


def test_a_warm_start_teaches_and_gives_copies():
    task = Permutations(symbols=3, noise=0.1, warm_steps=60)
    warm = pretrained(0, task)
    assert valid_share(untrained(0, task), task, 500) < 0.4
    assert valid_share(warm, task, 500) > 0.6
    again = pretrained(0, task)
    assert again.model is not warm.model
    assert all(torch.equal(a, b) for a, b in zip(warm.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("field", "value"), [("symbols", 1), ("noise", 1.5), ("noise", float("nan")), ("warm_steps", -1)]
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UserError, match=rf"Permutations\.{field} must be .*, got {value}"):
        Permutations(**{field: value})
