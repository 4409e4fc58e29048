"""The trainer: a run that is cut goes on bit for bit, two processes are one, and what goes wrong costs nothing that was learnt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from locum.errors import UserError
from locum.models import LM, tiny
from locum.models.training import LoRA
from locum.reinforce import Recipe
from locum.reinforce.judge import Judge, RewardError
from locum.reinforce.learner import Problem, Settings
from locum.reinforce.policy import TextPolicy, reference_of
from locum.reinforce.run import reinforce
from locum.reinforce.trainer import Arguments, Trainer

END = 3
PROBLEMS = [Problem([5 + i % 7, 6, 7 + i % 3][: 2 + i % 2], {"n": i}) for i in range(30)]
EVERYTHING = "dapo + hapo + d3s + kl"
SETTINGS = Settings(epochs=2, minibatches=2, rows_per_forward=8, rows_per_pass=8)


def reward(problems, completions):
    return torch.tensor([sum(t == 4 for t in c) / len(c) + 0.1 * (c[-1] == END) for c in completions])


def model(dtype=torch.float32):
    lm = tiny(vocab_size=32, seed=1, dtype=dtype)
    lm.model.generation_config.eos_token_id = END
    return lm


def trainer(out, text=EVERYTHING, steps=6, judge=reward, lora=False, dtype=torch.float32, **more):
    lm = model(dtype)
    if lora:
        lm = LM(LoRA(rank=4).on(lm.model), None, "tiny")
    policy = TextPolicy(lm)
    reference = None
    if "kl" in text:
        reference = reference_of(policy, None if lora else model(dtype).model)
    args = Arguments(
        steps=steps, prompts=4, max_new_tokens=10, learning_rate=3e-3, settings=SETTINGS, save_every=2, **more
    )
    return Trainer(
        Recipe.read(text), policy, PROBLEMS, judge, out, args, reference=reference, eval_problems=PROBLEMS[:5]
    )


def weights(out, step):
    return load_file(Path(out) / f"checkpoint-{step}" / "state.safetensors")


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("text", "lora"), [(EVERYTHING, False), ("gspo + kl", True), ("ppo + flat(group_size=4)", False)]
)
def test_a_run_that_is_cut_goes_on_bit_for_bit(text, lora, tmp_path):
    trainer(tmp_path / "whole", text, lora=lora).train()
    calls = 0

    def failing(problems, completions):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return reward(problems, completions)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", text, lora=lora, judge=failing).train()
    assert (tmp_path / "cut" / "log.jsonl").read_text("utf-8").count("\n") < 6
    trainer(tmp_path / "cut", text, lora=lora).train(resume=True)
    same(weights(tmp_path / "whole", 6), weights(tmp_path / "cut", 6))
    figures = []
    for name in ("whole", "cut"):
        rows = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text("utf-8").splitlines()]
        figures.append([{k: v for k, v in row.items() if "second" not in k} for row in rows])
    assert figures[0] == figures[1]
    assert [row["step"] for row in figures[0]] == [1, 2, 3, 4, 5, 6]
    memory = json.loads((tmp_path / "cut" / "checkpoint-6" / "state.json").read_text("utf-8"))["memory"]
    assert ("hapo" in text) == bool(memory["items"])  # the temperature's statistics travel with the run


def test_a_killed_process_goes_on(tmp_path):
    """Ended by the system, with a step half done."""
    code = """
import sys, os
sys.path.insert(0, sys.argv[1])
import test_trainer as t
calls = 0
def judge(problems, completions):
    global calls
    calls += 1
    if calls == 8 and sys.argv[3] == "die":
        os.kill(os.getpid(), 9)
    return t.reward(problems, completions)
t.trainer(sys.argv[2], "grpo + d3s", judge=judge).train(resume=True)
"""
    script = tmp_path / "run.py"
    script.write_text(code, "utf-8")
    asked = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path / "cut")]
    done = [subprocess.run([*asked, how], capture_output=True, env=environment()).returncode for how in ("die", "live")]
    assert done[1] == 0
    trainer(tmp_path / "whole", "grpo + d3s").train()
    same(weights(tmp_path / "whole", 6), weights(tmp_path / "cut", 6))


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_trainer as t
for text in ("grpo + d3s", t.EVERYTHING, "gspo + thr(mask=False)"):
    out = sys.argv[2] + "-" + text.split("+")[0].strip()
    # In float64: Adam divides by gradients that are nearly 0, and makes 1e-5 of what float32 rounds off there.
    trainer = t.trainer(out, text, steps=3, dtype=t.torch.float64)
    trainer.train()
    if trainer.accelerator.is_main_process:
        print("RESULT", out, json.dumps({k: v for k, v in trainer.figures.items() if "second" not in k}))
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO, "utf-8")
    found = []
    for processes in (1, 2):
        # --multi_gpu is accelerate's name for torch's own launcher; on a CPU its --cpu would want MPI.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launch += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        launch += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        made = [*launch, str(script), str(Path(__file__).parent), str(tmp_path / f"p{processes}")]
        done = subprocess.run(made, capture_output=True, text=True, env=environment())
        lines = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert len(lines) == 3, done.stderr[-2000:]
        found.append([(out, json.loads(figures)) for _, out, figures in lines])
    for (one, figures), (two, figures_2) in zip(*found, strict=True):
        assert figures_2 == pytest.approx(figures, abs=1e-5), one
        same(weights(one, 3), weights(two, 3), 1e-5)


def test_a_failing_reward_stops_with_what_was_learnt(tmp_path):
    judge = Judge(lambda prompts, completions, **_: [1.0 if c else 0.0 for c in completions])
    seen = 0

    def graded(problems, completions):
        nonlocal seen
        seen += 1
        if seen == 5:
            bad = Judge(lambda prompts, completions, **_: [float("nan")] * len(completions))
            return bad(["p"] * len(completions), ["c"] * len(completions), {}).rewards
        judge(["p"] * len(completions), ["c"] * len(completions), {})
        return reward(problems, completions)

    with pytest.raises(RewardError, match="row 0 gave nan"):
        trainer(tmp_path, "grpo", judge=graded).train()
    assert (tmp_path / "checkpoint-4" / "state.json").exists()
    assert trainer(tmp_path, "grpo").train(resume=True)["reward"] > 0


def test_rows_without_a_reward_are_left_out_and_the_run_goes_on(tmp_path):
    def some(problems, completions):
        found = reward(problems, completions)
        found[1] = float("nan")
        return found

    figures = trainer(tmp_path, "grpo", judge=some, steps=2).train()
    assert figures["reward"] == figures["reward"]


def test_folders_of_other_runs_are_refused(tmp_path):
    trainer(tmp_path / "a", "grpo", steps=2).train()
    with pytest.raises(UserError, match="holds a run already"):
        trainer(tmp_path / "a", "grpo", steps=2).train()
    with pytest.raises(UserError, match="another recipe: 'grpo', not 'dapo'"):
        trainer(tmp_path / "a", "dapo", steps=2).train(resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        trainer(tmp_path / "b", "grpo").train()


def test_what_a_recipe_needs_must_be_there(tmp_path):
    with pytest.raises(UserError, match="needs a reference policy"):
        Trainer("grpo + kl", TextPolicy(model()), PROBLEMS, reward, tmp_path)
    with pytest.raises(UserError, match="no problems"):
        Trainer("grpo", TextPolicy(model()), [], reward, tmp_path)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_from_a_file_to_a_folder(lora, model_folders, tmp_path):
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(3)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def vowels(prompts, completions, answer):
        assert len(prompts) == len(completions) == len(answer)
        return [sum(c in "aeiou" for c in text) for text in completions]

    args = Arguments(steps=2, prompts=3, max_new_tokens=6, learning_rate=1e-3)
    asked = {"reward": vowels, "args": args, "eval_data": rows[:4], "lora": lora}
    done = reinforce("grpo + kl", model_folders["target"], str(data), tmp_path / "out", **asked)
    assert done.counts == {"problems": 12, "held_out": 4, "too_long": 0, "without_reward": 0}
    assert "eval/reward" in done.figures
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) > 0
    assert json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))["steps"] == 2
    from locum.method import from_yaml

    assert from_yaml((tmp_path / "out" / "recipe.yaml").read_text("utf-8")) == Recipe.read("grpo + kl")
