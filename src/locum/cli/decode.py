"""``locum decode``: the flags are the general ones below and the fields of the chosen method."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tyro import conf

from locum.cli.command import Command, emit, quiet_stdout
from locum.cli.flags import chosen_method, method_name, read_method, text_file
from locum.errors import MissingExtra, UserError
from locum.method import names, require

if TYPE_CHECKING:
    from locum.decode.constraints import Constraint
    from locum.models import LM
    from locum.tokens import Sampling

__all__ = ["Decode", "methods"]

DEFAULT, CONSTRAINED = "auto", "awrs"
MODEL, DRAFT = "smollm2-135m-instruct", "smollm2-draft"


def methods() -> list[str]:
    """The names of what can decode a text: the drafters, and the papers that go another way."""
    return sorted([*names("decode", "Drafter"), "awrs", "rtoq"])


@dataclass(frozen=True)
class Options:
    """What every method takes.

    Args:
        method: how to decode; its own parameters are flags too (locum decode --method NAME --help). A .yaml file that
            holds a method will do as well.
        prompt: the text to answer or continue.
        prompts: a file of prompts instead: one a line, or .jsonl with "prompt".
        model: a shipped name, a path, or a hub name.
        draft: the small model to draft with, for methods that use one; smollm2-draft when left out.
        verifier: the rule that checks drafts; by default the exact one that accepts most.
        raw: continue the prompt as it is, without the model's chat template.
        max_new_tokens: how many tokens to generate at most.
        temperature: 0 is greedy, which is the default except for awrs (1).
        top_k: only the k most likely tokens.
        top_p: only the smallest set of most likely tokens with this mass.
        min_p: only tokens at least this likely, relative to the most likely one.
        stop: end the text before any of these strings.
        seed: fixes every random choice.
        regex: awrs: the text must match this regular expression.
        json_schema: awrs: the text must be JSON of the schema in this file.
        grammar: awrs: the text must be of the context-free grammar (Lark's notation) in this file.
        dtype: the models' type, e.g. float32 or bfloat16; the device's usual one when left out.
        device: e.g. cpu or cuda; the best there is when left out.
        json: print one JSON document instead of the text.
    """

    method: str = DEFAULT
    prompt: str | None = None
    prompts: Path | None = None
    model: str = MODEL
    draft: str | None = None
    verifier: str | None = None
    raw: bool = False
    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: conf.UseAppendAction[tuple[str, ...]] = ()
    seed: int = 0
    regex: str | None = None
    json_schema: Path | None = None
    grammar: Path | None = None
    dtype: str | None = None
    device: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        require(self, "max_new_tokens", self.max_new_tokens >= 1, ">= 1")
        require(self, "seed", self.seed >= 0, ">= 0")
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give one of --prompt TEXT and --prompts FILE")
        if self.prompt == "":
            raise UserError("--prompt must hold at least one character, got ''")
        if sum(c is not None for c in self.constraints) > 1:
            raise UserError("give only one of --regex, --json-schema and --grammar")

    @property
    def constraints(self) -> tuple[str | None, Path | None, Path | None]:
        return self.regex, self.json_schema, self.grammar


@dataclass(frozen=True)
class Decode(Command):
    """Continue a text with one method.

    Args:
        options: what every method takes.
        method: the method itself.
    """

    name: ClassVar[str] = "decode"
    options: Options
    method: Any

    @classmethod
    def read(cls, args: Sequence[str]) -> "Decode":
        return cls(*read_method(Options, cls.name, args, _chosen(args), methods(), "Continue a text"))

    def run(self) -> int:
        o, name = self.options, method_name(self.method)
        if any(o.constraints) and name != "awrs":
            raise UserError(f"a constraint needs --method awrs, got --method {name}")
        if name == "awrs" and not any(o.constraints):
            raise UserError("awrs needs a constraint: --regex, --json-schema or --grammar")
        from locum import models
        from locum.decode import Drafter
        from locum.tasks import read_prompts
        from locum.tokens import Sampling

        prompts = [o.prompt] if o.prompt is not None else [p.text for p in read_prompts(o.prompts or Path())]
        temperature = o.temperature if o.temperature is not None else float(name == "awrs")
        sampling = Sampling(temperature, o.top_k, o.top_p, o.min_p)
        constraint = self._constraint()
        verifier = names("decode", "Verifier")[o.verifier]() if o.verifier else None
        if verifier is not None and isinstance(self.method, Drafter):
            from locum.decode import check_pair

            check_pair(self.method.draws, verifier)
        with quiet_stdout(o.json):
            model = models.load(o.model, dtype=o.dtype, device=o.device)
            if isinstance(self.method, Drafter):
                rows = self._draft(model, prompts, sampling, verifier)
            elif constraint is not None:
                rows = [self._constrain(model, prompt, sampling, constraint) for prompt in prompts]
            else:
                rows = [self._search(model, prompt) for prompt in prompts]
        if o.json:
            emit({"method": name, "model": o.model, "texts": rows})
        return 0

    def _constraint(self) -> "Constraint | None":
        o = self.options
        if not any(o.constraints):
            return None
        try:
            from locum.decode import constraints
        except ModuleNotFoundError as error:
            raise MissingExtra(f"a constraint ({error.name})", "constrain") from None
        if o.regex is not None:
            return constraints.Regex(o.regex)
        if o.json_schema is not None:
            return constraints.JsonSchema(text_file(o.json_schema, "JSON schema"))
        return constraints.Grammar(text_file(o.grammar or Path(), "grammar"))

    def _ids(self, model: "LM", prompt: str) -> list[int]:
        return model.encode(prompt) if self.options.raw else model.chat(prompt)

    def _draft(self, model: "LM", prompts: list[str], sampling: "Sampling", verifier: Any) -> list[dict[str, Any]]:
        from locum import models
        from locum.decode import generate

        o = self.options
        wants = self.method.needs_draft or (
            (o.draft or o.model == MODEL) and any(d.needs_draft for d in getattr(self.method, "drafters", ()))
        )  # a choice among drafters goes without a draft model where there is none
        draft = models.load(o.draft or DRAFT, dtype=o.dtype, device=o.device) if wants else None
        state, rows = self.method.start(model, draft), []
        for number, prompt in enumerate(prompts):
            made = generate(
                model,
                self._ids(model, prompt),
                drafter=self.method,
                verifier=verifier,
                draft=draft,
                sampling=sampling,
                max_new_tokens=o.max_new_tokens,
                seed=o.seed + number,
                stop=o.stop,
                state=state,
                stream=None if o.json else _write,
            )[0]
            self._end(f"{len(made.ids)} tokens in {made.seconds:.1f} s, {made.tokens_per_forward:.2f} per forward")
            figures = {"tokens": len(made.ids), "forwards": made.forwards, "seconds": made.seconds}
            rows.append({"prompt": prompt, "text": made.text, "finish": made.finish} | figures)
        return rows

    def _constrain(self, model: "LM", prompt: str, sampling: "Sampling", constraint: "Constraint") -> dict[str, Any]:
        o = self.options
        made = self.method.generate(
            model, self._ids(model, prompt), constraint, max_new_tokens=o.max_new_tokens, sampling=sampling, seed=o.seed
        )
        if not made.posterior:
            raise UserError(
                f"no particle found a valid text of at most {o.max_new_tokens} tokens: "
                "raise --n-particles or --max-new-tokens"
            )
        if not o.json:
            _write("\n".join(f"{share:.3f}  {text}" for text, share in made.posterior.items()))
        self._end(f"{made.tokens} tokens in {made.seconds:.1f} s, {made.checks_per_token:.1f} checks per token")
        figures = {"log_probability_of_constraint": made.log_normaliser, "checks_per_token": made.checks_per_token}
        return {"prompt": prompt, "posterior": made.posterior, "seconds": made.seconds} | figures

    def _search(self, model: "LM", prompt: str) -> dict[str, Any]:
        found = self.method.search(model, self._ids(model, prompt), max_new_tokens=self.options.max_new_tokens)
        texts = [{"text": model.decode(h.ids), "logp": h.logp, "score": h.score} for h in found]
        if not self.options.json:
            _write(texts[0]["text"])
        self._end(f"best of {len(found)} texts, log-probability {found[0].logp:.2f} nats")
        return {"prompt": prompt, "texts": texts}

    def _end(self, said: str) -> None:
        if not self.options.json:
            _write("\n")
        print(f"[{method_name(self.method)}: {said}]", file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _chosen(args: Sequence[str]) -> str:
    """The method that the arguments name, or the one that serves them."""
    constrained = any(a.split("=")[0] in ("--regex", "--json-schema", "--grammar") for a in args)
    return chosen_method(args) or (CONSTRAINED if constrained else DEFAULT)
