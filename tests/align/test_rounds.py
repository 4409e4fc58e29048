"""Rounds of tiny language models: what is sampled, what is the reference, and that a killed run goes on as if it had not been."""

import itertools
import json
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from locum.align import DPO, RTO, SELM, OnlineAlignDistil
from locum.align.driver import run_rounds
from locum.align.round_trainer import RoundTrainer
from locum.align.trainer import align_arguments
from locum.errors import UserError
from locum.models import LM, tiny

WORDS = [*"abcdefghijklmno", "<end>"]
V, EOS = len(WORDS), 15


@pytest.fixture(scope="module", autouse=True)
def no_collection():
    """Every training begins with a garbage collection, which takes a second in a process full of modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def start(tokenizer):
    """A maker of the start policy, the same every time."""

    def make(seed=1):
        lm = tiny(vocab_size=V, hidden_size=16, heads=2, kv_heads=1, layers=1, seed=seed)
        lm.model.generation_config.eos_token_id = EOS
        return LM(lm.model, tokenizer)

    return make


PROMPTS = [
    {"prompt_ids": [i, (3 * i) % 15], "chosen_ids": [i, EOS], "rejected_ids": [(i + 1) % 15, 2, EOS]} for i in range(15)
]


def early(prompts, responses):
    """The earlier in the alphabet, the better."""
    assert len(prompts) == len(responses)
    return [-sum(map(ord, r.replace(" ", ""))) / max(len(r), 1) for r in responses]


def arguments(out, **settings):
    quiet = {"disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    return align_arguments(out, **quiet | {"learning_rate": 0.01, "per_device_train_batch_size": 2} | settings)


def weights(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    pass


class Watch(transformers.TrainerCallback):
    """Looks at the trainer at every step, and ends the run at one of them."""

    def __init__(self, kill_at=None):
        self.kill_at, self.steps, self.seen = kill_at, 0, []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **_):
        self.seen.append((optimizer.param_groups[0]["lr"], max(int(s["step"]) for s in optimizer.state.values())))

    def on_step_begin(self, args, state, control, **_):
        if self.steps == self.kill_at:
            raise Killed
        self.steps += 1


def selm(start, out, labeller=early, watch=None, model=None, **settings):
    settings = {"rounds": 3, "max_new_tokens": 4, "args": arguments(out)} | settings
    model = model or start()
    done = run_rounds(
        SELM(beta=0.3, alpha=0.01, temperature=1.0), model, PROMPTS, labeller, callbacks=[watch or Watch()], **settings
    )
    return done, weights(model.model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """SELM's three rounds, not stopped."""
    out = tmp_path_factory.mktemp("whole")
    made = tiny(vocab_size=V, hidden_size=16, heads=2, kv_heads=1, layers=1, seed=1)
    made.model.generation_config.eos_token_id = EOS
    watch = Watch()
    done, end = selm(None, out, watch=watch, model=LM(made.model, tokenizer))
    return out, done, end, watch


def test_every_round_labels_its_share_and_trains_on_it(whole, start, tokenizer):
    _, done, end, _ = whole
    assert [r.index for r in done] == [0, 1, 2]
    prompts = [tuple(e["prompt_ids"]) for r in done for e in r.examples()]
    assert len(set(prompts)) == len(prompts) <= 15
    for r in done:
        for e in r.examples():
            pair = next(p for p in PROMPTS if p["prompt_ids"] == e["prompt_ids"])
            responses = [pair["chosen_ids"], pair["rejected_ids"], e["reference_ids"]]
            scores = early([""] * 3, [tokenizer.decode(x, skip_special_tokens=True) for x in responses])
            assert e["scores"] == [max(scores), min(scores), scores[2]]
            assert e["chosen"] == tokenizer.decode(e["chosen_ids"], skip_special_tokens=True)
            assert e["prompt"] == tokenizer.decode(e["prompt_ids"])
        assert sum(r.logs[f"explore/{k}"] for k in ("best", "middle", "worst")) == pytest.approx(1)
        assert r.logs["explore/dropped"] == pytest.approx(1 - len(r.examples()) / 5)
        assert 0 < r.logs["distinct"] <= 1
        assert 0 < r.logs["share/sampling"] < 1
        assert 1 <= r.logs["length"] <= 4
        assert {"seconds/sampling", "seconds/labelling", "seconds/training", "truncated"} <= r.logs.keys()
        assert r.history[0]["round"] == r.index
        assert r.history[0]["round/distinct"] == r.logs["distinct"]
        assert any("explore/log_ratio" in h for h in r.history)
        assert not (r.folder / "training").exists()
        assert not (r.policy / "optimizer.pt").exists()
    last = AutoModelForCausalLM.from_pretrained(done[2].policy)
    assert same(weights(last), end)


def test_rounds_draw_differently_and_each_again_the_same(start, tmp_path):
    trainer = RoundTrainer(start(), SELM(), arguments(tmp_path), rounds=2)

    def drawn(index):
        round = trainer.round(index, None, max_new_tokens=6, batch_size=4)
        return [[e["response_ids"] for e in round.sample(PROMPTS)] for _ in range(2)]

    first, second = drawn(0), drawn(1)
    assert first == drawn(0)
    assert first != second
    assert first[0] != first[1]


def test_the_policy_at_a_rounds_start_is_its_reference(whole, start):
    """At the first step of every round log pi/ref is 0, and optimizer and schedule begin anew."""
    _, done, _, watch = whole
    for r in done:
        ratios = [h["explore/log_ratio"] for h in r.history if "explore/log_ratio" in h]
        assert ratios[0] == pytest.approx(0, abs=1e-6)
        assert abs(ratios[-1]) > 1e-4
    steps = [step for _, step in watch.seen]
    assert steps.count(1) == 3
    policies = [weights(m) for m in (start().model, *(AutoModelForCausalLM.from_pretrained(r.policy) for r in done))]
    assert not any(same(a, b) for a, b in itertools.combinations(policies, 2))


@pytest.mark.parametrize("kill_at", [0, 2, 5])
def test_a_run_killed_in_training_goes_on_from_its_checkpoint(whole, start, tmp_path, kill_at):
    _, done, end, watch = whole
    with pytest.raises(Killed):
        selm(start, tmp_path, watch=Watch(kill_at))
    again = Watch()
    found, got = selm(start, tmp_path, watch=again)
    assert same(got, end)
    assert len(again.seen) == len(watch.seen) - kill_at
    assert [r.examples() for r in found] == [r.examples() for r in done]


def test_a_run_killed_while_it_labels_goes_on_and_repeats_no_finished_round(whole, start, tmp_path):
    _, _, end, _ = whole
    asked = []

    def counted(prompts, responses):
        asked.append(len(responses))
        if len(asked) == 2:
            raise Killed
        return early(prompts, responses)

    with pytest.raises(Killed):
        selm(start, tmp_path, counted)
    first = (tmp_path / "round-0" / "round.json").stat().st_mtime_ns
    found, got = selm(start, tmp_path, counted)
    assert same(got, end)
    assert asked == [15] * 4
    assert (tmp_path / "round-0" / "round.json").stat().st_mtime_ns == first
    (tmp_path / "round-2" / "round.json").unlink()  # as if killed when all but this was written
    assert same(selm(start, tmp_path, counted)[1], end)
    watch = Watch()
    found, got = selm(start, tmp_path, counted, watch)  # nothing is left to do
    assert same(got, end)
    assert (len(found), len(asked), watch.seen) == (3, 4, [])


def test_half_a_checkpoint_is_passed_over(whole, start, tmp_path):
    with pytest.raises(Killed):
        selm(start, tmp_path, watch=Watch(2))
    half = tmp_path / "round-0" / "training" / "checkpoint-9"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch"')
    assert same(selm(start, tmp_path)[1], whole[2])


@pytest.fixture
def adapted(start):
    peft = pytest.importorskip("peft")

    def make():
        lm = start()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
            return LM(peft.get_peft_model(lm.model, config), lm.tokenizer)

    return make


def test_the_reference_of_an_adapter_is_the_adapter_as_it_was(start, adapted, tmp_path):
    model = adapted()
    done, end = selm(start, tmp_path / "a", model=model)
    for r in done:
        ratios = [h["explore/log_ratio"] for h in r.history if "explore/log_ratio" in h]
        assert ratios[0] == pytest.approx(0, abs=1e-6)
        assert abs(ratios[-1]) > 1e-5
    base = weights(start().model)
    assert all(torch.equal(x, base[k.replace("base_model.model.", "").replace(".base_layer", "")])
               for k, x in end.items() if "lora" not in k)  # fmt: skip
    moved = [k for k in end if "lora_B.default" in k]
    assert moved
    assert all(end[k].abs().max() > 0 for k in moved)
    with pytest.raises(Killed):
        selm(start, tmp_path / "b", model=adapted(), watch=Watch(4))
    assert same(selm(start, tmp_path / "b", model=adapted())[1], end)


# Methods that keep their reference: one training over all rounds.


def rto(start, out, watch=None, rounds=3, **settings):
    model, dpo = start(), start(7).model
    method = RTO(critic=True, beta_1=0.5, critic_lr=0.01)
    done = run_rounds(
        method,
        model,
        [{"prompt_ids": p["prompt_ids"]} for p in PROMPTS],
        early,
        rounds=rounds,
        args=arguments(out, lr_scheduler_type="linear", warmup_steps=0, **settings),
        prompts_per_round=6,
        max_new_tokens=4,
        models={"dpo": dpo},
        callbacks=[watch or Watch()],
    )
    return done, weights(model.model)


def test_optimizer_and_schedule_go_on_where_the_reference_stays(start, tmp_path):
    watch = Watch()
    done, end = rto(start, tmp_path / "a", watch)
    assert [step for _, step in watch.seen] == list(range(1, 10))  # three rounds of three steps, one Adam
    rates = [rate for rate, _ in watch.seen]
    assert rates == pytest.approx([0.01 * (1 - k / 9) for k in range(1, 10)])
    assert done[0].history[0]["round/kl"] == pytest.approx(0, abs=1e-6)
    assert abs(done[2].history[0]["round/kl"]) > 1e-4  # from the first reference
    assert (done[2].policy / "signal.safetensors").exists()
    assert not (done[1].policy / "optimizer.pt").exists()
    passes = [tuple(e["prompt_ids"]) for r in done for e in r.examples()]
    assert len(set(passes[:15])) == 15
    assert len(passes) == 18
    for kill_at in (3, 8):  # at a round's start and inside one
        out = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            rto(start, out, Watch(kill_at))
        found, got = rto(start, out)
        assert [r.examples() for r in found] == [r.examples() for r in done]
        assert same(got, end)


def test_rounds_without_a_labeller(start, tmp_path):
    model = start()
    done = run_rounds(
        OnlineAlignDistil(teacher="dpo_ref"),
        model,
        [{"prompt": f"{w} b"} for w in "abcdef"],
        rounds=2,
        args=arguments(tmp_path),
        max_new_tokens=3,
        models={"dpo": start(5).model},
    )
    assert [len(r.examples()) for r in done] == [3, 3]
    assert "seconds/labelling" not in done[0].logs
    assert not same(weights(model.model), weights(start().model))


def test_a_round_without_examples_leaves_the_policy_as_it_was(start, tmp_path):
    model = start()
    done = run_rounds(SELM(), model, PROMPTS, lambda p, r: [0.0] * len(r), rounds=1, args=arguments(tmp_path))
    assert done[0].logs["explore/dropped"] == 1
    assert done[0].history == []
    assert same(weights(model.model), weights(start().model))


@dataclass(frozen=True)
class Offline(DPO):
    pass


def test_bad_input_ends_in_one_sentence(start, tmp_path):
    with pytest.raises(UserError, match="Offline trains on data that it is given; rounds need a method that samples"):
        run_rounds(Offline(), start(), PROMPTS, early)
    for name in ("rounds", "prompts_per_round"):
        with pytest.raises(UserError, match=f"{name} must be >= 1, got 0"):
            run_rounds(SELM(), start(), PROMPTS, early, **{name: 0})
    with pytest.raises(UserError, match="give no model 'ref'"):
        selm(start, tmp_path / "a", models={"ref": start(2).model})
    with pytest.raises(UserError, match="leave precompute_reference out"):
        selm(start, tmp_path / "a", precompute_reference=True)
    with pytest.raises(UserError, match="15 prompts are too few for equal shares in 16 rounds"):
        selm(start, tmp_path / "b", rounds=16)
    with pytest.raises(UserError, match="the labeller gave 1 scores for 45 responses"):
        selm(start, tmp_path / "c", lambda p, r: [0.0], rounds=1)
    with pytest.raises(UserError, match="begun with another value of rounds, max_new_tokens;"):
        selm(start, tmp_path / "c", rounds=2, max_new_tokens=5)
    assert json.loads((tmp_path / "c" / "rounds.json").read_text())["rounds"] == 1
    with pytest.raises(UserError, match="a labeller reads texts: give the tokenizer"):
        selm(start, tmp_path / "d", model=LM(start().model))
    with pytest.raises(UserError, match="rows of text need a tokenizer"):
        run_rounds(SELM(), LM(start().model), [{"prompt": "a"}], early, args=arguments(tmp_path / "e"))
