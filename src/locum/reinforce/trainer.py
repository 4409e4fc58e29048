"""Training by a recipe on Accelerate: several processes, mixed precision, trackers, checkpoints that go on bit for bit.

    >>> from locum.reinforce import Recipe, Trainer
    >>> trainer = Trainer("dapo + d3s", policy, problems, reward, "out")  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

Each process samples its share of the prompts; then all hold the whole batch, so that what stages choose is the choice of
one; and each trains on its share of what is left. Draws depend on the seed, the step and a prompt's place in it alone, so
several processes do what one would do with the same batch, and a run that was stopped goes on as if it had not been.
"""

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locum.errors import UserError
from locum.files import write_atomically
from locum.method import require
from locum.progress import Bar
from locum.reinforce import checkpoint
from locum.reinforce.base import Run
from locum.reinforce.learner import Learner, Problem, Reward, Settings
from locum.reinforce.problems import Deck
from locum.reinforce.recipe import Recipe
from locum.tokens.rollouts import Rollouts, uniforms
from locum.tokens.sampling import Sampling

__all__ = ["Arguments", "Trainer"]

log = logging.getLogger(__name__)
LOG, ASKED = "log.jsonl", "run.json"


@dataclass(frozen=True)
class Arguments:
    """How long, how fast, and what is kept.

    Args:
        steps: batches of rollouts.
        prompts: of a batch.
        max_new_tokens: most tokens of a completion.
        learning_rate: of AdamW, > 0.
        weight_decay: of AdamW, >= 0.
        schedule: "constant", "linear" or "cosine", after the warm-up.
        warmup: steps over which the learning rate grows.
        settings: how a batch is learnt from.
        sampling: the law that completions are drawn from.
        seed: of everything that is random.
        save_every: steps between checkpoints; 0 for one at the end only.
        keep: checkpoints that are kept.
        eval_every: steps between evaluations on held-out problems; 0 for one at the end only.
        eval_rows: held-out problems of an evaluation.
        precision: "no" or "bf16": what forwards run in.
        report_to: a tracker that accelerate knows, e.g. "tensorboard" or "wandb"; "none".
    """

    steps: int = 100
    prompts: int = 16
    max_new_tokens: int = 256
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    settings: Settings = field(default_factory=Settings)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    seed: int = 0
    save_every: int = 50
    keep: int = 2
    eval_every: int = 0
    eval_rows: int = 200
    precision: str = "no"
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "max_new_tokens", "keep", "eval_rows"):
            require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("warmup", "seed", "save_every", "eval_every"):
            require(self, name, getattr(self, name) >= 0, ">= 0")
        require(self, "learning_rate", 0 < self.learning_rate < float("inf"), "finite and > 0")
        require(self, "weight_decay", 0 <= self.weight_decay < float("inf"), "finite and >= 0")
        require(self, "schedule", self.schedule in ("constant", "linear", "cosine"), "constant, linear or cosine")
        require(self, "precision", self.precision in ("no", "bf16"), "no or bf16")


class _Processes:
    """The processes of an Accelerator, as a `Learner` asks them."""

    def __init__(self, accelerator: Any, model: nn.Module | None) -> None:
        self.accelerator, self.model = accelerator, model
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def join(self, rollouts: Rollouts | None) -> Rollouts | None:
        if self.world == 1:
            return rollouts
        from accelerate.utils import gather_object

        device = self.accelerator.device
        parts = [p for p in gather_object([None if rollouts is None else rollouts.to("cpu")]) if p is not None]
        return Rollouts.join(parts).to(device) if parts else None

    def total(self, x: Tensor) -> Tensor:
        if self.world == 1:
            return x
        return self.accelerator.reduce(x.to(self.accelerator.device), reduction="sum").to(x.device)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        if last or self.model is None or self.world == 1:
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def ready(self, parameters: Sequence[Tensor]) -> None:
        """Before the optimiser's step: gradients that no wrapper has averaged yet."""
        if self.world > 1 and self.model is None:
            for p in parameters:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = self.accelerator.reduce(grad, reduction="mean")


class Trainer:
    """Trains a policy by a recipe.

    Args:
        recipe: a `Recipe`, or the text of one.
        policy: what the recipe's likelihood asks: a `TextPolicy`, or anything with the same methods whose weights are in
            `policy.model`, or which is a module itself.
        problems: what is asked; every batch takes the next ones of an order that depends on the seed.
        reward: ``(problems, completions as token ids) -> reward per row``; nan where there is none.
        out: the folder of checkpoints and figures.
        args: how long, how fast.
        eval_problems: held-out problems.
        reference: opens a context whose value is the reference policy; for recipes that need one.
        asked: plain data that a resumed run must have asked for too.
        tell: called with the figures of each step.

    Raises: UserError for a recipe that asks for what is not there, before anything is sampled.
    """

    def __init__(
        self,
        recipe: Recipe | str,
        policy: Any,
        problems: Sequence[Problem],
        reward: Reward,
        out: str | Path,
        args: Arguments | None = None,
        *,
        eval_problems: Sequence[Problem] = (),
        reference: Callable[[], AbstractContextManager[Any]] | None = None,
        asked: Mapping[str, Any] | None = None,
        tell: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        from accelerate import Accelerator
        from transformers import get_scheduler

        self.recipe = Recipe.read(recipe) if isinstance(recipe, str) else recipe
        self.args, self.out, self.policy = args or Arguments(), Path(out), policy
        if not problems:
            raise UserError("there are no problems to train on")
        self.problems, self.eval_problems, self.reward, self.tell = problems, eval_problems, reward, tell
        a, tracker = self.args, self.args.report_to
        kind: dict[str, Any] = {} if tracker == "none" else {"log_with": tracker, "project_dir": str(self.out)}
        self.module: nn.Module = policy if isinstance(policy, nn.Module) else policy.model
        on_cpu = next(self.module.parameters()).device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision=a.precision, cpu=on_cpu, **kind)
        if str(self.accelerator.distributed_type).rsplit(".", 1)[-1] not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise UserError(
                f"rollouts need whole weights in every process: launch with data parallelism (DDP), "
                f"not {self.accelerator.distributed_type}"
            )
        if "value" in self.recipe.needs and not hasattr(policy, "critic"):
            raise UserError(f"the recipe {self.recipe} needs a critic, and {type(policy).__name__} has none")
        if "value" in self.recipe.needs and hasattr(policy, "add_critic"):
            policy.add_critic()
        if (engine := getattr(policy, "engine", None)) is not None and self.accelerator.num_processes > 1:
            raise UserError(f"{type(engine).__name__} samples for one process: launch one")
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, a.learning_rate, weight_decay=a.weight_decay)
        updates = a.settings.epochs * a.settings.minibatches
        self.schedule = get_scheduler(a.schedule, self.optimizer, a.warmup * updates, a.steps * updates)
        wrapped = None
        if isinstance(policy, nn.Module):
            policy.to(self.accelerator.device)
        else:
            policy.model = wrapped = self.accelerator.prepare_model(policy.model)
        self.learner = Learner(
            self.recipe,
            policy,
            _Scheduled(self.optimizer, self.schedule),
            reward,
            Run(0, a.steps, a.max_new_tokens),
            a.seed,
            a.sampling,
            a.settings,
            reference,
            _Processes(self.accelerator, wrapped),
        )
        self.deck, self.cursor = Deck(problems, a.seed), 0  # the cursor: problems taken so far
        self.figures: dict[str, float] = {}
        self.asked = json.loads(json.dumps(dict(asked or {}) | {"recipe": str(self.recipe)}))

    def train(self, resume: bool = False) -> dict[str, float]:
        """All steps that are left; the last figures.

        Args:
            resume: go on with the run in the folder.

        Raises: UserError for a folder that holds another run; and what stops a run, after its state was kept.
        """
        self._begin(resume)
        a, run = self.args, self.learner.run
        if a.report_to != "none":
            self.accelerator.init_trackers("locum", config={"recipe": str(self.recipe)})
        with self._stopping() as stopped, Bar("reinforce", a.steps) as bar:
            while run.step < a.steps:
                try:
                    self.figures = self._step()
                except (KeyboardInterrupt, UserError):
                    self.cursor, run.step = self._before
                    if not self.learner.changed:  # what was learnt before this step is whole
                        self._save()
                    raise
                self._log(bar)
                if stopped:
                    self._save()
                    raise KeyboardInterrupt
                if a.save_every and run.step % a.save_every == 0 and run.step < a.steps:
                    self._save()
        self._save()
        if self.eval_problems and not (a.eval_every and a.steps % a.eval_every == 0):
            self.figures |= self.evaluate()
        if a.report_to != "none":
            self.accelerator.end_training()
        return self.figures

    def evaluate(self, samples: int = 1, sampling: Sampling | None = None) -> dict[str, float]:
        """Mean reward of held-out problems: greedy answers, or several samples of each."""
        sampling = sampling or Sampling(temperature=0.0)
        problems = list(self.eval_problems[: self.args.eval_rows])
        p, room = self.learner.processes, self.args.max_new_tokens
        mine = problems[p.rank :: p.world]
        found = torch.zeros(3, dtype=torch.float64)
        if mine:
            numbers = torch.arange(len(mine) * samples) * p.world + p.rank
            draws = uniforms(self.args.seed ^ 0xE7A1, numbers, room)
            made = self.recipe.likelihood.generate(
                self.policy, [x.ids for x in mine], samples, [room] * len(mine), draws, None, sampling
            )
            owner = [x for x in mine for _ in range(samples)]
            reward = self.reward(owner, made.lists())
            known = ~reward.isnan()
            told = [float(x) for x in (reward[known].sum(), known.sum(), made.mask.sum())]  # of different devices
            found = torch.tensor(told, dtype=torch.float64)
        total, count, tokens = p.total(found).tolist()
        return {"eval/reward": total / max(count, 1), "eval/length": tokens / max(len(problems) * samples, 1)}

    # One step and what surrounds it.

    @property
    def _first(self) -> bool:
        return self.accelerator.is_main_process

    def _step(self) -> dict[str, float]:
        self._before = self.cursor, self.learner.run.step
        figures = self.learner.step(self._problems)
        figures["learning_rate"] = self.schedule.get_last_lr()[0]
        if hasattr(self.policy, "refresh"):
            self.policy.refresh()
        every = self.args.eval_every
        if every and self.eval_problems and self.learner.run.step % every == 0:
            figures |= self.evaluate()
        return figures

    def _problems(self, batch: int) -> list[Problem]:
        """The next ones."""
        self.cursor += self.args.prompts
        return self.deck.take(self.cursor - self.args.prompts, self.args.prompts)

    def _log(self, bar: Bar) -> None:
        step = self.learner.run.step
        row = {"step": step} | self.figures
        if self.tell is not None:
            self.tell(dict(row))
        if self.args.report_to != "none":
            self.accelerator.log(self.figures, step=step)
        if not self._first:
            return
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = {"reward": "reward", "tokens_per_second/rollout": "sampled tokens/s", "eval/reward": "held-out reward"}
        bar.at(step, ", ".join(f"{name} {self.figures[k]:.3g}" for k, name in told.items() if k in self.figures))

    @contextmanager
    def _stopping(self) -> Iterator[list[bool]]:
        """Let a first Ctrl-C end the step that is on, a second one everything at once; the list is not empty after a first."""
        stopped: list[bool] = []
        if threading.current_thread() is not threading.main_thread():
            yield stopped
            return

        def stop(*_: Any) -> None:
            if stopped:
                raise KeyboardInterrupt
            stopped.append(True)
            log.warning("stopping after this step; once more to stop at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield stopped
        finally:
            signal.signal(signal.SIGINT, before)

    # On the disk.

    def _begin(self, resume: bool) -> None:
        path = self.out / ASKED
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            if not resume:
                raise UserError(f"{str(self.out)!r} holds a run already: go on with --resume, or choose another folder")
            asked = self._all_asked()
            if different := [k for k in asked if before.get(k) != asked[k]]:
                k = different[0]
                raise UserError(f"{str(self.out)!r} holds a run with another {k}: {before.get(k)!r}, not {asked[k]!r}")
            if (found := checkpoint.last(self.out)) is not None:
                memory, state = checkpoint.load(found, {"model": self._plain()}, self.optimizer)
                self.learner.run.memory, self.learner.run.step = memory, state["step"]
                self.cursor = state["cursor"]
                self.schedule.load_state_dict(state["schedule"])
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{str(self.out)!r} is not empty and holds no run: choose another folder")
        self.accelerator.wait_for_everyone()
        if self._first:
            write_atomically(path, json.dumps(self._all_asked(), indent=1) + "\n")
            self._cut_log()
        self.accelerator.wait_for_everyone()

    def _cut_log(self) -> None:
        """Figures of steps that are done again are written again."""
        path = self.out / LOG
        if path.exists():
            lines = [x for x in path.read_text("utf-8").splitlines() if x.endswith("}")]
            kept = [x for x in lines if json.loads(x)["step"] <= self.learner.run.step]
            path.write_text("".join(f"{x}\n" for x in kept), "utf-8")

    def _all_asked(self) -> dict[str, Any]:
        args = asdict(self.args)
        for name in ("save_every", "keep", "eval_every", "eval_rows", "report_to"):  # these may change
            args.pop(name)
        return json.loads(json.dumps(self.asked | args))

    def _plain(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.module)

    def _save(self) -> None:
        run = self.learner.run
        state = {"step": run.step, "cursor": self.cursor, "schedule": self.schedule.state_dict()}
        if self._first:
            checkpoint.save(self.out, run.step, {"model": self._plain()}, self.optimizer, run.memory, state)
            checkpoint.prune(self.out, self.args.keep)
        self.accelerator.wait_for_everyone()


class _Scheduled:
    """An optimizer whose learning rate follows a schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()
