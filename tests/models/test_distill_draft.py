"""The script that makes the draft: its batched forward, its loss, and that a killed run goes on where it was."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from locum.models import tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "distill_draft.py"


@pytest.fixture(scope="module")
def distill():
    spec = importlib.util.spec_from_file_location("distill_draft", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_draft"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Teacher:
    """A tiny random model behind a chat template that opens with four fixed ids."""

    def __init__(self):
        self.model = tiny(vocab_size=128, seed=3).model
        self.eos_ids = frozenset({2})
        self.vocab_size = 128
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def encode(self, text):
        return [ord(c) % 128 for c in text]

    def chat(self, text):
        return [3, 4, 5, 6, *self.encode(text), 7]


def starts(distill, lm):
    chats = [distill.Seed(lm.chat("ab" * n), 6, 0.9, 1) for n in (1, 3, 2)]
    return [*chats, distill.Seed([0, 9], 9, 0.5, 1), distill.Seed([11], 3, 1.0, 1)]


def test_what_is_stored_is_the_models_own_law(distill):
    """Continuous batching, the shared opening and rows at different positions change nothing: laws to float16 rounding."""
    lm, fed = Teacher(), []
    plan = starts(distill, lm)
    shard = distill.sample_shard(lm, plan, torch.Generator().manual_seed(0), 2, fed.append)
    lengths = shard["length"].tolist()
    assert shard["prompt"].tolist() == [len(s.ids) for s in plan]
    assert all(len(s.ids) < n <= len(s.ids) + s.max_new for s, n in zip(plan, lengths, strict=True))
    assert sum(fed) == sum(lengths) - 3 * 3  # of the four ids all chats open with, three come from the shared cache
    columns = (shard[k].split(lengths) for k in ("ids", "law_ids", "law_logp"))
    for ids, tokens, logp, start in zip(*columns, plan, strict=True):
        assert ids[: len(start.ids)].tolist() == start.ids
        with torch.no_grad():
            expected = lm.model(input_ids=ids.long()[None]).logits[0].log_softmax(-1)
        assert torch.allclose(expected.gather(1, tokens.long()), logp.float(), atol=2e-3, rtol=2e-3)
        assert torch.allclose(expected.topk(distill.TOP).values, logp.float(), atol=2e-3, rtol=2e-3)


def test_the_law_after_single_tokens(distill):
    lm = Teacher()
    table = distill.sample_bigrams(lm, 10, 4, lambda n: None)
    with torch.no_grad():
        expected = lm.model(input_ids=torch.tensor([[0, 9]])).logits[0, -1].log_softmax(-1)
    assert torch.allclose(expected.topk(distill.TOP).values, table["law_logp"][9].float(), atol=2e-3, rtol=2e-3)


def a_batch(distill, n=200, vocabulary=90, width=8):
    torch.manual_seed(0)
    law = torch.randn(n, vocabulary).mul(3).log_softmax(-1).topk(distill.TOP)
    label = torch.randint(-1, vocabulary, (n,))
    return distill.Batch(torch.randn(n, width), law.indices, law.values, label, torch.rand(n)), torch.randn(
        vocabulary, width
    )


@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.4, 0.6, 0.1)])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_formula(distill, mix):
    batch, embed = a_batch(distill)
    sums, by_hidden, by_embed = distill.head_loss(batch, embed, torch.zeros(1), distill.Mix(*mix), grad=True)
    hidden, table = batch.hidden.clone().requires_grad_(), embed.clone().requires_grad_()
    logq = (hidden @ table.t()).log_softmax(-1)
    p, q = batch.law_logp.exp(), logq.gather(1, batch.law_ids).exp()
    rest, left = 1 - p.sum(-1), 1 - q.sum(-1)
    cross = -(p * q.log()).sum(-1) - rest * left.log()
    distance = ((p - q).abs().sum(-1) + (rest - left).abs()) / 2
    hard = -logq.gather(1, batch.label.clamp(min=0)[:, None])[:, 0] * (batch.label >= 0)
    loss = (batch.weight * (mix[0] * cross + mix[1] * distance + mix[2] * hard)).sum()
    loss.backward()
    assert sums[0].item() == pytest.approx(loss.item(), rel=1e-4)
    assert torch.allclose(by_hidden, hidden.grad, atol=1e-4)
    assert torch.allclose(by_embed, table.grad, atol=1e-3)


def test_a_few_tokens_stand_for_the_whole_vocabulary_without_bias(distill):
    """Mean of the partial sums of exp(logit + log-weight) over 400 draws: the full sum, within 1 %."""
    torch.manual_seed(1)
    logits = torch.randn(500, dtype=torch.float64)
    law_ids, label = torch.arange(40).reshape(4, 10), torch.tensor([41, -1, 3, 42])
    estimates = []
    for seed in range(400):
        tokens, weight = distill.candidates(500, law_ids, label, 50, seed)
        assert len(tokens) == 42 + 50
        assert (weight[:40] == 0).all()
        estimates.append((logits[tokens] + weight).exp().sum())
    assert torch.stack(estimates).mean().item() == pytest.approx(logits.exp().sum().item(), rel=0.01)


def test_every_text_comes_once_an_epoch(distill):
    texts = list(range(10))
    seen = [t for step in range(5) for pack in distill.batch_of(texts, step, 4, seed=0) for t in pack]
    assert sorted(seen) == sorted(texts * 2)
    assert sorted(seen[:10]) == texts


@pytest.fixture
def run(distill, tmp_path, monkeypatch):
    """Train on a tiny teacher's shard in a folder of its own, up to a step."""
    lm = Teacher()
    monkeypatch.setattr("locum.models.load", lambda *args, **kwargs: lm)
    plan = [distill.Seed(lm.chat("x"), random.Random(i).randint(2, 9), 0.9, 1) for i in range(24)]
    shard = distill.sample_shard(lm, plan, torch.Generator().manual_seed(0), 8, lambda n: None)

    def go(name: str, steps: int, until: int | None = None) -> Path:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        distill.save_atomic(shard, work / "sample-000.safetensors")
        args = SimpleNamespace(work=work, threads=1, seed=0, width=16, layers=1, lr=1e-2, decay=0.1, tv=0.5)
        args.batch, args.every, args.steps = 4, 2, steps
        if until is not None:
            save = distill.Run.save

            def stop(self):
                save(self)
                if self.step >= until:
                    raise KeyboardInterrupt

            monkeypatch.setattr(distill.Run, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                distill.train(args)
            monkeypatch.setattr(distill.Run, "save", save)
        else:
            distill.train(args)
        return work

    return go


def test_a_run_that_was_cut_short_ends_where_the_other_ends(run):
    whole = run("whole", 6)
    run("cut", 6, until=2)
    cut = run("cut", 6)
    a, b = (load_file(w / "train-6.safetensors") for w in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in cut.glob("train-*")] == ["train-6.safetensors"]


def test_training_without_samples_says_what_to_do(distill, tmp_path):
    with pytest.raises(SystemExit, match=r"holds 0 sequences .* run the stage 'sample' first"):
        distill.read_shards(tmp_path)


@pytest.mark.slow
def test_a_quick_run_goes_from_sampling_to_a_draft_with_a_card(tmp_path):
    """The real teacher, a few sequences and steps: the figures mean nothing, the files are all there and load."""
    command = [sys.executable, str(SCRIPT), "all", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"sample-000.safetensors", "bigrams.safetensors", "train-4.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }
    draft = LlamaForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    card = (tmp_path / "draft" / "README.md").read_text("utf-8")
    assert "24 texts" in card
    assert "4 steps" in card
