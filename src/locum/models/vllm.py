"""Completions from vLLM, where it is installed: an engine, texts out of it, and new weights into it.

Public calls of vLLM only. Its random numbers are its own, so a text is repeated by its seed and engine, not by draws; and it
keeps min-p before top-k and top-p, which is another law than `Sampling.law` where they are combined.
"""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from locum.errors import MissingExtra, UserError
from locum.models.scoring import unwrapped
from locum.tokens.rollouts import Generated
from locum.tokens.sampling import Sampling

__all__ = ["vllm_engine", "vllm_generate", "vllm_update"]


def _vllm() -> Any:
    try:
        import vllm
    except ImportError:
        raise MissingExtra("sampling with vLLM", "vllm") from None
    return vllm


def vllm_engine(model: str, **settings: Any) -> Any:
    """A `vllm.LLM` that reads a prefix once for all that go on from it.

    Args:
        model: a directory or hub name.
        settings: anything else that `vllm.LLM` takes: dtype, gpu_memory_utilization, tensor_parallel_size, ...
    """
    return _vllm().LLM(model=model, enable_prefix_caching=True, **settings)


def vllm_generate(
    engine: Any,
    prefixes: Sequence[Sequence[int]],
    copies: int,
    room: Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int],
    eos_ids: Collection[int],
) -> Generated:
    """`copies` completions of each prefix, as adjacent rows, on the CPU.

    Args:
        engine: a `vllm.LLM`.
        prefixes: token ids, at least one each.
        room: most new tokens of each prefix.
        seeds: one per prefix; different seeds give different texts in every copy.
        eos_ids: ids that end a row; they belong to it. What the engine's own model takes for an end does not count.

    Raises: UserError for an empty prefix, room below 1, or lists that are not of one length; MissingExtra without vLLM.
    """
    _check(prefixes, copies, room, seeds)
    n = 1 if sampling.greedy else copies  # vLLM refuses copies of what can be drawn in one way only
    asked = [_params(sampling, n, new, seed, eos_ids) for new, seed in zip(room, seeds, strict=True)]
    found = engine.generate([{"prompt_token_ids": list(p)} for p in prefixes], asked, use_tqdm=False)
    made = [completion for request in found for completion in list(request.outputs) * (copies // n)]
    texts = [torch.tensor(list(completion.token_ids), dtype=torch.long) for completion in made]
    if not texts:
        nothing = torch.zeros(0, 0, dtype=torch.long)
        return Generated(nothing, nothing.bool(), nothing[:, :0].any(-1))
    ids = pad_sequence(texts, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(t) for t in texts])[:, None]
    return Generated(ids, mask, torch.tensor([completion.finish_reason == "stop" for completion in made]))


def _params(sampling: Sampling, n: int, room: int, seed: int, eos_ids: Collection[int]) -> Any:
    return _vllm().SamplingParams(
        n=n,
        temperature=float(sampling.temperature),
        top_k=sampling.top_k or -1,  # all
        top_p=1.0 if sampling.top_p is None else float(sampling.top_p),
        min_p=0.0 if sampling.min_p is None else float(sampling.min_p),
        max_tokens=room,
        seed=seed * n % (1 << 63),  # copy i is drawn with seed + i, so that seeds n apart share no stream
        ignore_eos=True,
        stop_token_ids=sorted(eos_ids),
        detokenize=False,
    )


def _check(prefixes: Sequence[Sequence[int]], copies: int, room: Sequence[int], seeds: Sequence[int]) -> None:
    if copies < 1:
        raise UserError(f"copies must be >= 1, got {copies}")
    if not len(prefixes) == len(room) == len(seeds):
        raise UserError(
            f"one room and one seed per prefix, got {len(room)} and {len(seeds)} for {len(prefixes)} prefixes"
        )
    for number, (prefix, new) in enumerate(zip(prefixes, room, strict=True)):
        if not len(prefix):
            raise UserError(f"prefix {number} has no tokens; a completion needs at least one to go on from")
        if new < 1:
            raise UserError(f"room must be >= 1, got {new} for prefix {number}")


def vllm_update(engine: Any, model: nn.Module) -> None:
    """Put a model's weights into the engine, adapters merged, and forget what was cached under the old ones.

    They go through a folder of safetensors, which every worker of the engine reads with its own shards and quantisation
    (`reload_weights`); set TMPDIR to a RAM disk where that matters. An engine that sleeps must have its weights awake:
    ``engine.wake_up(tags=["weights"])`` before, ``engine.wake_up(tags=["kv_cache"])`` behind.
    """
    with tempfile.TemporaryDirectory(prefix="locum-weights-") as folder, _merged(model) as weights:
        unwrapped(model).save_pretrained(folder, state_dict=weights)
        engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    engine.reset_prefix_cache()


@contextmanager
def _merged(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A model's weights under the names that they have without adapters. Adapters are merged while the block lasts."""
    outer: Any = getattr(model, "module", model)
    if not hasattr(outer, "peft_config"):
        yield outer.state_dict()
        return
    kept = {name: p.detach().to("cpu", copy=True) for name, p in outer.named_parameters() if ".base_layer." in name}
    outer.merge_adapter()
    try:
        own, active = f".{outer.base_model.prefix}", f".modules_to_save.{outer.active_adapter}."
        found = outer.get_base_model().state_dict()
        yield {
            name.replace(".base_layer.", ".").replace(active, "."): x
            for name, x in found.items()
            if own not in name and ".original_module." not in name
        }
    finally:
        outer.unmerge_adapter()
        with torch.no_grad():
            for name, p in outer.named_parameters():
                if name in kept:
                    p.copy_(kept[name])  # what was added and taken away again is a rounding off
