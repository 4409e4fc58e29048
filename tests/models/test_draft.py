"""The draft that ships: what it is made of, and that it stands in for its target as its card says."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import locum.models
from locum.models import LM, load, require_same_vocabulary
from locum.tasks import prompts

FOLDER = Path(locum.models.__file__).with_name("draft")


def test_the_files_are_small_plain_and_documented():
    names = {p.name for p in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pkl"))}
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 7.5e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_tensor(k).dtype for k in weights.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}
    config = json.loads((FOLDER / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (49152, True)


def test_the_card_states_data_steps_loss_and_acceptance():
    card = (FOLDER / "README.md").read_text("utf-8")
    for words in (
        "license: apache-2.0",
        "positions",
        "steps",
        "cross-entropy",
        "acceptance",
        "scripts/distill_draft.py",
    ):
        assert words in card
    assert "{" not in card


@pytest.fixture(scope="module")
def pair() -> tuple[LM, LM]:
    return load(), load("smollm2-draft")


def test_it_shares_the_targets_vocabulary_and_end_of_turn(pair):
    target, draft = pair
    require_same_vocabulary(target, draft)
    assert draft.eos_ids == target.eos_ids


@torch.inference_mode()
def test_its_acceptance_is_that_of_the_card(pair):
    """Along the target's greedy answer to a code prompt: within 0.15 of the card, whose figure is over four such answers."""
    target, draft = pair
    ids = target.chat(prompts("code")[0].text)
    start, s = len(ids), target.session(256)
    logits = s.prefill(ids)
    rows = []
    for _ in range(32):
        rows.append(logits)
        ids = [*ids, int(logits.argmax())]
        logits = s.extend(ids[-1:], [-1])[0]
        s.commit([0])
    p = torch.stack(rows).float().softmax(-1)
    q = draft.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float().softmax(-1)
    card = (FOLDER / "README.md").read_text("utf-8")
    stated = re.search(r"prompts, code \| \d+ \| ([\d.]+) \|", card)
    assert stated is not None
    assert torch.minimum(p, q).sum(-1).mean().item() == pytest.approx(float(stated[1]), abs=0.15)
