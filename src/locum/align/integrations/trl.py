"""Any loss of the family in TRL's DPOTrainer: one class changes in a script that trains with TRL already.

    >>> from locum.align import TDPO2
    >>> from locum.align.integrations.trl import DPOTrainer
    >>> trainer = DPOTrainer("my-model", args=config, train_dataset=data, method=TDPO2(beta=0.1))  # doctest: +SKIP

TRL reads and tokenizes the data, keeps the reference, logs and saves; `compute_loss` alone is ours. `beta` and
`loss_type` of TRL's configuration are not used: the method has its own.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from locum.align.base import Method, PairBatch
from locum.align.statistics import BASE, ModelScorer, Scorer, statistics
from locum.errors import MissingExtra, UserError

try:
    import trl
except ImportError:
    raise MissingExtra("locum.align.integrations.trl", "trl") from None

__all__ = ["DPOTrainer"]


class DPOTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` with a method of `locum.align` for its loss.

    Args:
        method: a loss on chosen and rejected responses that needs no columns of its own beside the data.
        models: frozen models by the names in `method.frozen`, except "ref", which is TRL's.
        args, kwargs: as trl.DPOTrainer's. A sequence cache of the reference (`precompute_ref_log_probs`) is refused: it holds
            one number per response, and the family's losses need one per token.

    Raises: UserError for a method that does not fit.
    """

    def __init__(
        self, *args: Any, method: Method, models: Mapping[str, nn.Module] | None = None, **kwargs: Any
    ) -> None:
        name = type(method).__name__
        if method.blocks != ("chosen", "rejected") or method.columns:
            more = [f"the column {c!r}" for c in method.columns] or [f"the responses {', '.join(method.blocks)}"]
            raise UserError(f"{name} needs {more[0]}, which TRL's data has not: use locum.align.Trainer")
        self.method = method
        super().__init__(*args, **kwargs)
        if self.precompute_ref_logps:
            raise UserError("precompute_ref_log_probs keeps one number per response; set it to False")
        config = self.model.config.get_text_config()
        if method.signal(config.num_hidden_layers, config.hidden_size) is not None:
            raise UserError(f"{name} has parameters of its own to train: use locum.align.Trainer")
        self.frozen: dict[str, Scorer] = {"ref": self._reference()}
        for other in set(method.frozen) - {"ref"}:
            if other not in (models or {}):
                raise UserError(f"{name} needs the model {other!r} beside the policy; none was given")
            self.frozen[other] = ModelScorer((models or {})[other].eval().requires_grad_(False).to(self.args.device))

    def _reference(self) -> ModelScorer:
        """TRL's reference: a model of its own, or the policy without its adapter (with the adapter "ref" if it has one)."""
        if self.ref_model is not None:
            return ModelScorer(self.ref_model)
        model = self.accelerator.unwrap_model(self.model)
        return ModelScorer(model, "ref" if "ref" in getattr(model, "peft_config", {}) else BASE)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = PairBatch(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"].bool())
        loss, logs = self.method(statistics(self.method, batch, ModelScorer(model), self.frozen))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in logs.items():
            metrics[name].append(self.accelerator.gather_for_metrics(value.detach()).mean().item())
        return (loss, defaultdict(lambda: torch.empty(0))) if return_outputs else loss
