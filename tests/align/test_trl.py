"""Inside TRL's DPOTrainer: our DPO is TRL's, on the same batch and in training, and what cannot work there is refused."""

import pytest
import torch

from locum.align import DPO, SELM, TDPO2, TGDPO, SparsePO
from locum.errors import UserError

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from locum.align.integrations.trl import DPOTrainer  # noqa: E402

ROWS = [
    {"prompt": f"the {a}", "chosen": f" is {b} and good", "rejected": f" was {b}"}
    for a in ("sea", "sky")
    for b in ("wide", "a")
]


@pytest.fixture
def parts(model_folders, tmp_path):
    def load():
        return AutoModelForCausalLM.from_pretrained(model_folders["target"])

    config = trl.DPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folders["target"])
    tokenizer.pad_token = tokenizer.eos_token
    return load, {"args": config, "train_dataset": datasets.Dataset.from_list(ROWS), "processing_class": tokenizer}


def moved(model):
    """Away from the reference, the same each time."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))


def test_loss_and_gradient_on_one_batch_are_trls(parts):
    load, common = parts
    ours, theirs = (
        DPOTrainer(load(), ref_model=load(), method=DPO(beta=0.1), **common),
        trl.DPOTrainer(load(), ref_model=load(), **common),
    )
    found = []
    for trainer in (ours, theirs):
        moved(trainer.model)
        trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        found.append((loss, torch.autograd.grad(loss, list(trainer.model.parameters()))))
    assert abs(found[0][0].item() - 0.6931) > 0.01  # the policy has moved
    assert found[0][0].item() == pytest.approx(found[1][0].item(), abs=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_training_is_trls_and_logs_the_methods_figures(parts):
    load, common = parts
    losses = []
    for trainer in (DPOTrainer(load(), method=DPO(beta=0.1), **common), trl.DPOTrainer(load(), **common)):
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    trainer = DPOTrainer(load(), method=TDPO2(), **common)
    trainer.train()
    assert {"kl/chosen", "rewards/accuracies"} <= set(trainer.state.log_history[1])


def test_with_an_adapter_the_base_is_the_reference(parts):
    from peft import LoraConfig

    load, common = parts
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(load(), method=DPO(), peft_config=config, **common)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (TGDPO(), "the column 'r_hat'"),
        (SELM(), "the responses chosen, rejected, reference"),
        (SparsePO(mask="common"), "parameters of its own"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(parts, method, said):
    load, common = parts
    with pytest.raises(UserError, match=said):
        DPOTrainer(load(), method=method, **common)
