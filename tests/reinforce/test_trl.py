"""TRL's GRPOTrainer beside ours: on one batch, with the same policies, the same loss and the same gradient."""

import copy

import pytest
import torch

from locum.models import LM
from locum.reinforce import Recipe, Run
from locum.reinforce.old_policy import old_policy
from locum.reinforce.policy import TextPolicy, reference_of
from locum.tokens.rollouts import Generated, Rollouts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

ROOM, GROUP = 7, 4
SAME = {  # TRL's names for what is a recipe here
    "grpo + groupnormalised(eps=1e-4)": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "grpo + tokenmean + clip(high=0.28) + groupnormalised(eps=1e-4)": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo + groupnormalised(eps=1e-4)": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
    },
    "grpo + kl(beta=0.04) + groupnormalised(eps=1e-4)": {
        "loss_type": "grpo",
        "beta": 0.04,
        "use_bias_correction_kl": False,
    },
    "grpo + kl(beta=0.04, corrected=True) + groupnormalised(eps=1e-4)": {"loss_type": "grpo", "beta": 0.04},
}


def rollouts():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (2 * GROUP, ROOM), generator=g)
    lengths = torch.randint(2, ROOM + 1, (2 * GROUP,), generator=g)
    mask = torch.arange(ROOM) < lengths[:, None]
    prefixes = [[10, 11, 12]] * GROUP + [[20, 21, 22, 23, 24]] * GROUP
    made = Generated(ids * mask, mask, lengths < ROOM)
    reward = torch.rand(2 * GROUP, generator=g)
    return Rollouts.of(prefixes, made, torch.arange(2).repeat_interleave(GROUP), reward)


def moved(model):
    """Away from the old policy, the same each time."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("text", SAME)
def test_loss_and_gradient_are_those_of_trl(text, model_folders, tmp_path):
    folder, settings, batch = model_folders["target"], SAME[text], rollouts()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    lm = LM(AutoModelForCausalLM.from_pretrained(folder), tokenizer, "target")
    frozen = copy.deepcopy(lm.model)
    recipe = Recipe.read(text)
    policy = TextPolicy(lm)
    want = recipe.needs | {"old_logp"}
    seen = old_policy(recipe, policy, batch, want, reference=reference_of(policy, frozen))
    plan = recipe.prepare(seen, Run(room=ROOM))

    config = trl.GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_completion_length=ROOM,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        **({"beta": 0.0} | settings),
    )
    other = trl.GRPOTrainer(
        copy.deepcopy(lm.model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 8),
        processing_class=tokenizer,
    )
    moved(lm.model)
    moved(other.model)

    loss, _ = recipe.loss(plan, recipe.likelihood.columns(policy, plan.rollouts, frozenset({"logp"})))
    loss.backward()

    advantages = plan.advantages[plan.rollouts.mask.cumsum(-1).eq(1) & plan.rollouts.mask]
    other.current_gradient_accumulation_steps = 1
    other.model.train()
    theirs = other._compute_loss(
        other.model,
        {
            "prompt_ids": batch.prefix,
            "prompt_mask": batch.prefix_mask.long(),
            "completion_ids": batch.ids,
            "completion_mask": batch.mask.long(),
            "advantages": advantages,
            "old_per_token_logps": seen.columns["old_logp"],
            "ref_per_token_logps": seen.columns.get("ref_logp"),
            "num_items_in_batch": batch.mask.sum(),
        },
    )
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    for (name, p), q in zip(lm.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
