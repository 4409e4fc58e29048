"""Numbers per token on the disk: nothing is worked out twice, nothing of another model is taken for one's own."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.align import DPO
from locum.align import cache as module
from locum.align.cache import TokenCache, fingerprint, with_column, with_reference
from locum.align.statistics import ModelScorer, collate, statistics, token_log_probs
from locum.errors import UserError
from locum.models import tiny

LENGTHS = [3, 1, 4, 1, 5]
EXAMPLES = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9, 10, 11, 12]},
    {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6], "rejected_ids": [7, 8]},
]


class Counting:
    """Values that say where they belong: example + position / 10. Dies after some calls if told so."""

    def __init__(self, calls=None):
        self.left = calls
        self.seen = []

    def __call__(self, rows):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.seen += rows
        return {name: [self.value(i) + k for i in rows] for k, name in enumerate(("a", "b"))}

    @staticmethod
    def value(i):
        return torch.tensor([i + t / 10 for t in range(LENGTHS[i])])


def made(folder, name="x", **options):
    return TokenCache(folder, name, LENGTHS, ("a", "b"), **options)


def assert_whole(cache):
    for k, name in enumerate(("a", "b")):
        for i, row in enumerate(cache.rows(name)):
            assert row.dtype == np.float32
            assert row.tolist() == (Counting.value(i) + k).tolist()


def test_every_example_gets_its_own_values(tmp_path):
    cache, compute, said = made(tmp_path), Counting(), []
    cache.fill(compute, batch_size=2, progress=lambda *at: said.append(at))
    assert compute.seen == [0, 1, 2, 3, 4]
    assert said == [(2, 5), (4, 5), (5, 5)]
    assert_whole(cache)
    cache.fill(compute)
    assert len(compute.seen) == 5
    assert_whole(made(tmp_path))  # another process sees the same


@settings(max_examples=20)
@given(st.permutations(range(5)), st.integers(1, 5), st.integers(0, 4))
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path_factory, order, batch_size, calls):
    folder = tmp_path_factory.mktemp("cache")
    first, second = Counting(calls), Counting()
    for compute in (first, second):
        try:
            made(folder).fill(compute, batch_size, order)
        except KeyboardInterrupt:
            assert made(folder).done == min(5, calls * batch_size)
    assert first.seen + second.seen == list(order)
    assert_whole(made(folder))


def test_rows_are_views_of_the_file_and_writing_into_them_leaves_it_alone(tmp_path):
    cache = made(tmp_path)
    cache.fill(Counting())
    rows = cache.rows("a")
    assert not any(row.flags.owndata for row in rows)
    assert isinstance(rows[0].base.base, np.memmap) or isinstance(rows[0].base, np.memmap)
    torch.as_tensor(rows[0]).zero_()
    assert_whole(cache)


def test_the_files_are_plain(tmp_path):
    made(tmp_path).fill(Counting())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy", "done.npy", "manifest.json"]
    flat = np.load(tmp_path / "b.npy", allow_pickle=False)
    assert (flat.dtype, flat.shape) == (np.float32, (14,))
    manifest = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    assert manifest == {"fingerprint": "x", "columns": ["a", "b"], "examples": 5, "tokens": 14}


def test_another_model_is_refused_or_starts_anew(tmp_path):
    made(tmp_path).fill(Counting())
    for other in (lambda: made(tmp_path, "y"), lambda: TokenCache(tmp_path, "x", LENGTHS[:4], ("a", "b"))):
        with pytest.raises(UserError, match="holds numbers made from another model or other data; remove it"):
            other()
    assert made(tmp_path).done == 5
    assert made(tmp_path, "x", renew=True).done == 5  # nothing to renew
    anew = made(tmp_path, "y", renew=True)
    assert anew.done == 0
    anew.fill(Counting())
    assert_whole(made(tmp_path, "y"))


def test_rows_are_not_given_before_all_are_there(tmp_path):
    with pytest.raises(UserError, match="has 0 of 5 examples; fill it first"):
        made(tmp_path).rows("a")


def test_a_folder_that_was_being_made_when_the_run_was_killed_is_made_again(tmp_path):
    made(tmp_path).fill(Counting())
    for content in (None, "{"):
        (tmp_path / "manifest.json").unlink()
        if content:
            (tmp_path / "manifest.json").write_text(content, "utf-8")
        assert made(tmp_path).done == 0


def test_values_that_are_not_one_per_token_are_refused(tmp_path):
    with pytest.raises(UserError, match="example 2 has 3 values of a for 4 response tokens"):
        made(tmp_path).fill(lambda rows: {"a": [torch.zeros(3 if i == 2 else LENGTHS[i]) for i in rows]})
    assert made(tmp_path).done == 0


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"cannot keep 14 numbers in .*a\.npy': No space left on device"):
        made(tmp_path)


def test_nothing_to_keep(tmp_path):
    cache = TokenCache(tmp_path, "x", [], ("a",))
    cache.fill(Counting())
    assert cache.rows("a") == []


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.fixture(scope="module")
def models():
    return tiny(seed=0).model, tiny(seed=1).model


def test_kept_log_probs_stand_in_for_the_reference(tmp_path, models):
    policy, ref = map(ModelScorer, models)
    kept = with_reference(ref, EXAMPLES, ("chosen", "rejected"), tmp_path, batch_size=2)
    for block in ("chosen", "rejected"):
        for example, values in zip(kept, token_log_probs(ref, EXAMPLES, block), strict=True):
            assert example[f"{block}_logp_ref"].tolist() == pytest.approx(values.tolist(), abs=1e-5)
    live, _ = DPO()(statistics(DPO(), collate(EXAMPLES), policy, {"ref": ref}))
    cached, _ = DPO()(statistics(DPO(), collate(kept, columns=("logp_ref",)), policy, {}))
    assert cached.item() == pytest.approx(live.item(), abs=1e-5)
    assert "chosen_logp_ref" not in EXAMPLES[0]


def test_the_reference_is_not_run_again_for_the_same_weights_and_tokens(tmp_path, models, monkeypatch):
    ref = ModelScorer(models[1])
    first = with_reference(ref, EXAMPLES, ("chosen", "rejected"), tmp_path)
    monkeypatch.setattr(module, "token_log_probs", None)
    again = with_reference(ref, EXAMPLES, ("chosen", "rejected"), tmp_path)
    assert again[0]["chosen_logp_ref"].tolist() == first[0]["chosen_logp_ref"].tolist()
    changed = [*EXAMPLES[:2], EXAMPLES[2] | {"rejected_ids": [7, 9]}]
    for scorer, examples in ((ModelScorer(models[0]), EXAMPLES), (ref, changed), (ref, EXAMPLES[::-1])):
        with pytest.raises(UserError, match="made from another model or other data"):
            with_reference(scorer, examples, ("chosen", "rejected"), tmp_path)


def test_long_examples_of_a_block_come_first(tmp_path):
    seen = []

    def values(examples, block):
        seen.append((block, [EXAMPLES.index(e) for e in examples]))
        return [torch.full((len(e[f"{block}_ids"]),), 1.0) for e in examples]

    kept = with_column("w", values, EXAMPLES, ("chosen", "rejected"), tmp_path, "signal", batch_size=2)
    assert seen == [("chosen", [2, 0]), ("chosen", [1]), ("rejected", [2]), ("rejected", [1, 0])]
    assert [len(e["rejected_w"]) for e in kept] == [1, 4, 2]


def test_a_fingerprint_sees_one_weight_one_token_and_the_adapter_in_use():
    from peft import LoraConfig, get_peft_model

    model = tiny(seed=0).model
    plain = fingerprint(model)
    assert plain == fingerprint(tiny(seed=0).model) == fingerprint(ModelScorer(model))
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert fingerprint(model) != plain
    assert fingerprint(EXAMPLES) == fingerprint([dict(e, chosen="text") for e in EXAMPLES])
    assert fingerprint(EXAMPLES) != fingerprint([*EXAMPLES[:2], EXAMPLES[2] | {"prompt_ids": [1, 2, 3, 5]}])
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    policy.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: fingerprint(ModelScorer(policy, name)) for name in ("", "default", "other")}
    assert len(set(before.values())) == 3
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_A.default" in n).add_(1.0)
    after = {name: fingerprint(ModelScorer(policy, name)) for name in ("", "default", "other")}
    assert {name for name in before if before[name] != after[name]} == {"default"}
