"""Sums of reasoning-gym: a teacher whose errors come at known rates, problems that are held out, a model that is made once."""

import itertools
import json
import math
import random
import sys

import pytest
import torch
from transformers import AutoTokenizer

from locum.errors import MissingExtra, UserError
from locum.models import load
from locum.tasks import gym_sums, made
from locum.tasks.gym_sums import NEW_TOKENS, Teacher, reward, tokenizer, world

SMALL = {"train": 40, "held_out": 20, "layers": 1, "width": 16, "steps": 3, "batch": 4}
ROWS = gym_sums._rows(7, 1, 3000, kept_apart=False)
PROMPTS, ENTRIES = [row["prompt"] for row in ROWS], [row["entry"] for row in ROWS]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCUM_CACHE", str(tmp_path))
    return tmp_path


def weights(lm):
    return torch.cat([p.flatten() for p in lm.model.parameters()])


def written(teacher, seed=0):
    rng = random.Random(seed)
    return [teacher.write(prompt, rng) for prompt in PROMPTS]


def near(share):
    return pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(PROMPTS)))


def test_text_goes_through_tokens_and_back(tmp_path):
    text = "8-1+7-5=7+7-5=14-5=9"
    ours = tokenizer()
    ours.save_pretrained(tmp_path)
    for characters in (ours, AutoTokenizer.from_pretrained(tmp_path)):
        ids = characters.encode(text + "<end>")
        assert len(ids) == len(text) + 1
        assert ids[-1] == characters.eos_token_id != characters.pad_token_id
        assert characters.decode(ids, skip_special_tokens=True) == text
        assert characters.decode(ids) == text + "<end>"
        assert characters.encode("1 é\n=") == characters.encode("1") + [characters.unk_token_id] * 3 + ids[7:8]
        batch = characters(["1=", "12="], padding=True)
        assert batch["attention_mask"] == [[0, 1, 1], [1, 1, 1]]
        assert batch["input_ids"][0][0] == characters.pad_token_id


def test_solutions_by_hand():
    right, careless = Teacher(0, 0), Teacher(1, 0)
    rng = random.Random(0)
    assert right.write("8-1+7-5=", rng) == "7+7-5=14-5=9"
    assert careless.write("8-1+7-5=", rng) == "7+7-5=4-5=-1"
    assert right.write("3-0-9-8+0=", rng) == "3-9-8+0=-6-8+0=-14+0=-14"
    assert careless.write("3-0-9-8+0=", rng) == "3-9-8+0=-6-8+0=-4+0=-4"
    assert careless.write("9+9+9=", rng) == "8+9=7"
    cases = {(12, -5): 17, (-12, 5): -17, (5, -12): -17, (27, 8): 25, (7, -7): 0, (-10, 6): -14, (-4, -3): -7}
    assert {pair: gym_sums._without_carry(*pair) for pair in cases} == cases
    assert not any(a == b for a, b in zip(written(Teacher(0, 1)), written(right), strict=True))
    assert Teacher(0.4, 0.1).flawless("8-1+7-5=") == pytest.approx(0.9**3 * 0.6**2)  # 7 + 7 and 14 - 5


def test_the_verifier_passes_what_is_right_and_the_rest_comes_at_its_rate():
    assert reward(PROMPTS, written(Teacher(0, 0)), entry=ENTRIES) == [1.0] * len(PROMPTS)
    teacher, right = Teacher(), written(Teacher(0, 0))
    said = written(teacher)
    clean = sum(a == b for a, b in zip(said, right, strict=True)) / len(said)
    assert clean == near(sum(map(teacher.flawless, PROMPTS)) / len(PROMPTS))
    assert clean <= sum(reward(PROMPTS, said, entry=ENTRIES)) / len(said) < clean + 0.05  # errors that cancel
    forgetful = written(Teacher(carry=0.4, stray=0))
    rate = sum(Teacher(carry=0.4, stray=0).flawless(p) for p in PROMPTS) / len(PROMPTS)
    assert sum(a == b for a, b in zip(forgetful, right, strict=True)) / len(right) == near(rate)
    assert max(map(len, itertools.chain(said, forgetful))) + 1 <= NEW_TOKENS


def test_only_full_marks_count():
    entry = json.dumps({"question": "1 + 3 =", "answer": "4", "metadata": {"source_dataset": "chain_sum"}})
    said = ["4", "5-1=4", "5-1=+04", "14", "4=", "", "4=5", "--4"]
    assert (
        reward(["1+3="] * len(said), said, entry=[entry] * len(said), answer=["4"] * len(said)) == [1, 1, 1] + [0] * 5
    )
    with pytest.raises(ValueError, match="shorter"):
        reward(["1+3="] * 2, ["4", "4"], entry=[entry])


def test_problems_are_held_out_whatever_the_seed(cache):
    parts = [world(seed, **SMALL)[1:] for seed in (0, 1)]
    train, held_out = ([row["prompt"] for rows in part for row in rows] for part in zip(*parts, strict=True))
    assert (len(train), len(held_out)) == (80, 40)
    assert len(set(train)) > 70
    assert len(set(held_out)) > 35
    taught = {p for p, _ in itertools.islice(gym_sums._problems(0, 0, kept_apart=False), 2000)}
    assert not set(held_out) & (set(train) | taught | set(PROMPTS))
    for row in parts[0][0]:
        entry = json.loads(row["entry"])
        assert row["answer"] == entry["answer"] == str(eval(row["prompt"][:-1]))
        assert entry["question"].replace(" ", "").endswith(f":{row['prompt']}")


def test_a_model_is_made_once_and_is_a_checkpoint_like_any_other(cache, monkeypatch):
    calls, fitted = [], []
    fit = made.fit
    monkeypatch.setattr(gym_sums, "fit", lambda *args: fitted.append(fit(*args)) or fitted[-1])
    lm, train, held_out = world(0, **SMALL, progress=lambda *call: calls.append(call))
    assert calls == [("training the sums", i, 3) for i in (1, 2, 3)]
    again, *rows = world(0, **SMALL)
    assert rows == [train, held_out]
    assert len(fitted) == 1
    assert torch.equal(weights(lm), weights(again))
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), fitted[0].parameters(), strict=True))
    assert lm.eos_ids == {lm.tokenizer.eos_token_id}
    (folder,) = (cache / "gym-sums").iterdir()
    loaded = load(str(folder), device="cpu")
    assert loaded.encode("1+2=") == lm.encode("1+2=")
    assert torch.equal(weights(loaded), weights(lm))


def test_the_seed_decides_everything_and_touches_no_global_state(tmp_path, monkeypatch):
    found = []
    torch.manual_seed(5)
    for i, seed in enumerate((0, 0, 1)):
        monkeypatch.setenv("LOCUM_CACHE", str(tmp_path / str(i)))
        found.append(world(seed, **SMALL))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)
    assert torch.equal(weights(found[0][0]), weights(found[1][0]))
    assert found[0][1:] == found[1][1:]
    assert not torch.equal(weights(found[0][0]), weights(found[2][0]))
    assert found[0][1] != found[2][1]


def test_solutions_alone_are_learnt_and_training_learns_them():
    ((ids, labels),) = gym_sums._lessons(Teacher(0, 0), seed=3, steps=1, batch=8)
    characters = tokenizer()
    last = torch.where(labels[:, -1:] < 0, characters.pad_token_id, labels[:, -1:])
    whole = torch.cat([ids, last], 1)
    for text, label in zip(whole, labels, strict=True):
        prompt, _, solution = characters.decode(text[text != characters.pad_token_id]).partition("=")
        assert solution == characters.decode(label[label != -100])
        assert solution == Teacher(0, 0).write(prompt, random.Random(0)) + "<end>"
    model = made.llama(len(characters), 1, 32, gym_sums.HEAD, seed=0)
    calls = []
    lessons = gym_sums._lessons(Teacher(), seed=0, steps=150, batch=16)

    def loss(ids, labels):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten()).item()

    before = loss(ids, labels)
    made.fit(model, lessons, 150, 4e-3, "sums", lambda *_: calls.append(1))
    assert len(calls) == 150
    assert loss(ids, labels) < before - 1.0  # 2.9 nats to about 1.6


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    gym_sums._gym.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtra, match="locum\\[reinforce\\]"):
        reward(["1+3="], ["4"], entry=["{}"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: world(steps=0), "steps must be at least 1, got 0"),
        (lambda: world(train=0), "train must be at least 1, got 0"),
        (lambda: world(width=24), "multiple of 16, got 24"),
        (lambda: world(held_out=10_001), "at most 10000 and seed >= 0, got 1024, 10001 and 0"),
        (lambda: world(-1), "got 1024, 256 and -1"),
        (lambda: Teacher(carry=1.5), r"Teacher\.carry must be in \[0, 1\], got 1.5"),
        (lambda: Teacher(stray=math.nan), r"Teacher\.stray must be"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
