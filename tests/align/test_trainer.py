"""The trainer: steps do not depend on how a batch is cut up, a killed run goes on, what is saved is a plain model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from locum.align import DPO, TDPO2, TGDPO, SparsePO
from locum.align.run import LoRA, align
from locum.align.statistics import LOGP_REF
from locum.align.trainer import BAD_BATCH, SIGNAL_FILE, Trainer, align_arguments, last_checkpoint
from locum.errors import UserError
from locum.models import tiny

WORDS = ("sea", "sky", "tide", "rock", "bird", "wind")
ROWS = [
    {"prompt": f"the {a}", "chosen": f" is {b} and good", "rejected": f" was {b}"} for a in WORDS for b in WORDS[:4]
]


def examples(n=16, seed=0, vocab=32):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(vocab, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    return [{"prompt_ids": ids(2, 5), "chosen_ids": ids(3, 8), "rejected_ids": ids(3, 8)} for _ in range(n)]


def arguments(folder, **settings):
    quiet = {"disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    return align_arguments(folder, **quiet | settings)


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def same(a, b, tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", [DPO(), TDPO2()])
def test_accumulated_batches_are_one_batch(method, tmp_path):
    runs = []
    for size, accumulate in ((8, 1), (2, 4)):
        trainer = Trainer(
            tiny(),
            method,
            arguments(
                tmp_path / f"{size}",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulate,
                optim="sgd",
            ),
            examples(),
        )
        trainer.train()
        runs.append((trainer.state.log_history[-2]["loss"], weights(trainer)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-5)
    same(runs[0][1], runs[1][1], 1e-5)


def test_a_reference_scored_before_training_changes_nothing(tmp_path):
    runs = []
    for early in (False, True):
        trainer = Trainer(
            tiny(),
            DPO(),
            arguments(tmp_path / str(early), per_device_train_batch_size=4),
            examples(),
            examples(4, seed=1),
            precompute_reference=early,
        )
        trainer.train()
        runs.append(weights(trainer) | {"eval_loss": torch.tensor(trainer.evaluate()["eval_loss"])})
        assert (f"chosen_{LOGP_REF}" in trainer.train_dataset[0]) == early
    same(*runs, 1e-5)


def test_a_method_that_needs_more_of_the_reference_says_so(tmp_path):
    with pytest.raises(UserError, match="TDPO2 needs more of the reference"):
        Trainer(tiny(), TDPO2(), arguments(tmp_path), examples(), precompute_reference=True)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [TDPO2(), SparsePO(mask="common")])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(method, tmp_path):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}

    def trainer(folder, *callbacks):
        return Trainer(tiny(), method, arguments(tmp_path / folder, **settings), examples(), callbacks=list(callbacks))

    torch.manual_seed(0)
    whole = trainer("whole")
    whole.train()
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        trainer("cut", StopAt(5)).train()
    torch.manual_seed(0)
    rest = trainer("cut")
    rest.train(resume_from_checkpoint=True)
    assert rest.state.log_history[-2]["loss"] == pytest.approx(whole.state.log_history[-2]["loss"], abs=1e-6)
    same(weights(whole), weights(rest), 1e-6)


def test_what_is_saved_is_the_plain_policy_and_no_pickle(tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(tiny(), SparsePO(mask="independent"), arguments(tmp_path, max_steps=2), examples())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    files = {p.name for p in (tmp_path / "saved").iterdir()}
    assert SIGNAL_FILE in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [k for k in load_file(tmp_path / "saved" / "model.safetensors") if "signal" in k]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)
    assert set(load_file(tmp_path / "saved" / SIGNAL_FILE)) == set(trainer.signal.state_dict())


def test_a_loss_that_is_not_finite_stops_with_its_batch_saved(tmp_path):
    model = tiny()
    trainer = Trainer(model, DPO(), arguments(tmp_path, per_device_train_batch_size=2), examples(8))
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"stopped at step 1: .*saved in"):
        trainer.train()
    kept = load_file(tmp_path / BAD_BATCH)
    assert kept["input_ids"].shape == kept["attention_mask"].shape
    assert {"completion_mask", "stat_logp", "stat_d"} <= set(kept)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({"guide": "x"}, "uses the models ref beside the policy, not guide"),
        ({"ref": tiny(vocab_size=40).model}, "a vocabulary of 40 tokens and the policy one of 32"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_training(models, said, tmp_path):
    with pytest.raises(UserError, match=said):
        Trainer(tiny(), DPO(), arguments(tmp_path), examples(), models=models)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for step, state in ((2, "{}"), (10, '{"glob'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_rows_of_text_keep_the_columns_that_the_method_needs(model_folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folders["target"])
    row = {
        "prompt": "a",
        "chosen": "bc",
        "rejected": "d",
        "chosen_r_hat": [0.1, 0.2, 0.3],
        "rejected_r_hat": [0.4, 0.5],
    }
    model = AutoModelForCausalLM.from_pretrained(model_folders["target"])
    trainer = Trainer(model, TGDPO(), arguments(tmp_path, max_steps=1), [row], processing_class=tokenizer)
    trainer.train()
    assert list(trainer.train_dataset[0]["chosen_r_hat"]) == pytest.approx([0.1, 0.2, 0.3])


def test_rows_of_text_need_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="need a tokenizer"):
        Trainer(tiny(), DPO(), arguments(tmp_path), ROWS)


# whole runs, from a file to a folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


SETTINGS = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "disable_tqdm": True, "device": "cpu"}


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_a_folder_that_from_pretrained_reads(lora, data, model_folders, tmp_path):
    done = align(TDPO2(), model_folders["target"], data, tmp_path / "out", eval_data=data, lora=lora, **SETTINGS)
    assert done.steps == 6
    assert done.counts == {"examples": 24, "left_out": 0}
    assert done.figures["eval_loss"] < 0.6931
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(model_folders["target"])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert not torch.allclose(again(ids).logits, start(ids).logits, atol=1e-4)


def test_merged_adapters_are_the_same_model(data, model_folders, tmp_path):
    ids, found = torch.arange(10)[None], []
    for merge in (False, True):
        out = tmp_path / str(merge)
        align(DPO(), model_folders["target"], data, out, lora=LoRA(rank=4), merge=merge, **SETTINGS)
        with torch.no_grad():
            found.append(AutoModelForCausalLM.from_pretrained(out)(ids).logits)
        assert (out / "adapter_config.json").exists() != merge
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def command(model, data, out, *more):
    flags = ["--learning-rate", "1e-3", "--batch-size", "2", "--logging-steps", "1", "--device", "cpu", "--json"]
    files = ["--model", str(model), "--data", str(data), "--out", str(out)]
    return [sys.executable, "-m", "locum", "align", "--method", "tdpo2", *files, *flags, *more]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_loss(data, model_folders, tmp_path):
    more = ["--lora", "--save-steps", "2", "--epochs", "3"]

    def run(out, *extra):
        made = command(model_folders["target"], data, out, *more, *extra)
        return json.loads(subprocess.run(made, check=True, capture_output=True, env=environment()).stdout)

    whole = run(tmp_path / "whole")
    process = subprocess.Popen(
        command(model_folders["target"], data, tmp_path / "cut", *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    began = time.monotonic()
    while not (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").exists():
        assert time.monotonic() - began < 200
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    rest = run(tmp_path / "cut", "--resume")
    assert rest["steps"] == whole["steps"] == 36
    assert rest["figures"]["loss"] == pytest.approx(whole["figures"]["loss"], abs=1e-6)
    end = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    same(*end, 1e-6)


TWO = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_trainer import Trainer, arguments, examples
from locum.align import SparsePO, TDPO2
from locum.align.run import LoRA
from locum.models import tiny

for name, method, lora in (("full", TDPO2(), False), ("lora", TDPO2(), True), ("masks", SparsePO(mask="common"), False)):
    torch.manual_seed(0)
    model = tiny().model
    if lora:
        model = LoRA(rank=4).on(model)
    size = int(sys.argv[3])
    trainer = Trainer(model, method, arguments(sys.argv[2] + name, per_device_train_batch_size=size), examples())
    trainer.train()
    if trainer.accelerator.is_main_process:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        accuracies = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
        print("RESULT", json.dumps([name, losses, accuracies]))
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO, "utf-8")
    found = []
    for processes, size in ((1, 4), (2, 2)):
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
        made = [*launch, str(script), str(Path(__file__).parent), str(tmp_path / f"p{processes}-"), str(size)]
        done = subprocess.run(made, capture_output=True, text=True, env=environment())
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert len(lines) == 3, done.stderr[-2000:]
        found.append([json.loads(line.removeprefix("RESULT")) for line in lines])
    for (name, losses, margins), (_, losses_2, margins_2) in zip(*found, strict=True):
        assert len(losses) == 4, name
        assert losses_2 == pytest.approx(losses, abs=1e-5), name
        assert margins_2 == pytest.approx(margins, abs=1e-5), name
