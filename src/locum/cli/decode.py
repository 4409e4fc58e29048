"""``locum decode``: the flags are the general ones below and the fields of the chosen method."""

import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tyro import conf

from locum.bench.prompts import read_prompts
from locum.cli.command import Command, emit, quiet_stdout, read
from locum.errors import MissingExtra, UserError, unknown
from locum.method import from_dict, from_yaml, names, require

if TYPE_CHECKING:
    from locum.decode.constraints import Constraint
    from locum.models import LM
    from locum.tokens import Sampling

__all__ = ["Decode", "methods"]

DEFAULT, CONSTRAINED = "auto", "awrs"


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
        draft: the small model to draft with, for methods that need one.
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
    model: str = "smollm2-135m-instruct"
    draft: str = "smollm2-draft"
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
        args = list(args)
        chosen = _chosen(args)
        if chosen.endswith((".yaml", ".yml")):
            return cls(read(Options, cls.name, args), from_yaml(_text(Path(chosen), "method file")))
        known = names("decode")
        if chosen.lower() not in methods():
            raise unknown("method of decode", chosen, methods())
        make, build = _flags(known[chosen.lower()])

        def both(general: Options, method: make) -> tuple[Options, Any]:  # type: ignore[valid-type]
            return general, method

        both.__doc__ = f"Continue a text with one method, here {chosen} (of {', '.join(methods())})."
        options, fields = read(both, cls.name, args)  # type: ignore[arg-type]
        return cls(options, build(fields))

    def run(self) -> int:
        o, name = self.options, type(self.method).__name__.lower()
        if any(o.constraints) and name != "awrs":
            raise UserError(f"a constraint needs --method awrs, got --method {name}")
        if name == "awrs" and not any(o.constraints):
            raise UserError("awrs needs a constraint: --regex, --json-schema or --grammar")
        from locum import models
        from locum.decode import Drafter
        from locum.tokens import Sampling

        prompts = [o.prompt] if o.prompt is not None else [text for _, text in read_prompts(o.prompts or Path())]
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
            return constraints.JsonSchema(_text(o.json_schema, "JSON schema"))
        return constraints.Grammar(_text(o.grammar or Path(), "grammar"))

    def _ids(self, model: "LM", prompt: str) -> list[int]:
        return model.encode(prompt) if self.options.raw else model.chat(prompt)

    def _draft(self, model: "LM", prompts: list[str], sampling: "Sampling", verifier: Any) -> list[dict[str, Any]]:
        from locum import models
        from locum.decode import generate

        o = self.options
        draft = models.load(o.draft, dtype=o.dtype, device=o.device) if self.method.needs_draft else None
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
        print(f"[{type(self.method).__name__.lower()}: {said}]", file=sys.stderr, flush=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None


def _chosen(args: list[str]) -> str:
    """The method that the arguments name, before they are read as a whole."""
    for at, arg in enumerate(args):
        if arg == "--method" and at + 1 < len(args):
            return args[at + 1]
        if arg.startswith("--method="):
            return arg.removeprefix("--method=")
    constrained = any(a.split("=")[0] in ("--regex", "--json-schema", "--grammar") for a in args)
    return CONSTRAINED if constrained else DEFAULT


def _flags(cls: type) -> tuple[type, Any]:
    """A dataclass with the method's fields as flags, and what makes the method of it.

    A field that holds a method is given by that method's name; a field named like a general option gets the method's
    name in front.
    """
    taken = {f.name for f in dataclasses.fields(Options)}
    hints, flags, inner, renamed = typing.get_type_hints(cls), [], set(), {}
    docs = cls.__doc__ or ""
    for f in (f for f in dataclasses.fields(cls) if f.init):
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        flag = f"{cls.__name__.lower()}_{f.name}" if f.name in taken else f.name
        renamed[flag] = f.name
        docs = re.sub(rf"^(\s+){f.name}:", rf"\1{flag}:", docs, flags=re.MULTILINE)
        if dataclasses.is_dataclass(hints[f.name]):
            inner.add(flag)
            flags.append((flag, str, dataclasses.field(default=type(value).__name__.lower())))
        elif value is dataclasses.MISSING:
            flags.append((flag, hints[f.name], dataclasses.field()))
        else:
            flags.append((flag, hints[f.name], dataclasses.field(default=value)))
    made = dataclasses.make_dataclass(cls.__name__, flags, namespace={"__doc__": docs}, frozen=True)

    def build(values: Any) -> Any:
        given = {flag: getattr(values, flag) for flag, *_ in flags}
        made = {flag: from_dict({"method": f"decode.{given[flag]}"}) for flag in inner}
        return cls(**{renamed[flag]: value for flag, value in (given | made).items()})

    return made, build
