"""Healing through Hugging Face's `Trainer`: its data, callbacks, loggers and accelerators, with the loss and the steps of `bondsmith heal`.

    trainer = HealTrainer(model, TrainingArguments("out", max_steps=100), train_dataset=rows, teacher=original)
    trainer.train()
    trainer.save_model("healed")

While it trains, gauged networks are in their free form; what `save_model` writes afterwards is as it was. Checkpoints that the trainer
writes on its way hold the free form: they are for `train(resume_from_checkpoint=True)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from bondsmith.nn.free import free_all, pivot_all
from bondsmith.stages.healing.losses import TopK, token_sums
from bondsmith.stages.training import Steps, reduced_matrices, train_scales_inside, trainable


class HealTrainer(Trainer):
    """A `Trainer` that trains networks, norms and scales of a compressed model towards its original.

    Args:
        teacher: the original, in memory; without it the loss is the cross entropy of the labels.
        kl_weight, ce_weight, top_k, norm_rate: as in `bondsmith heal`.
        learning_rate: as there, but taken as it is: give less where little was lost. `TrainingArguments.learning_rate` is not used, its
            schedule is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        top_k: int = 64,
        learning_rate: float = 0.0005,
        norm_rate: float = 1e-3,
        **kwargs: Any,
    ):
        train_scales_inside(model)
        self.dense = reduced_matrices(getattr(model.config, "quantization_config", {}))
        trainable(model, dense=self.dense)
        super().__init__(model, *args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device) if teacher is not None else None
        self.weights = (kl_weight, ce_weight) if teacher is not None else (0.0, 1.0)
        self.top_k, self.rates = top_k, (learning_rate, norm_rate)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as `Trainer` does; returns what it returns."""
        freed = free_all(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            pivot_all(self.model, freed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Returns the optimizer of `bondsmith heal`."""
        if self.optimizer is None:
            self.optimizer: torch.optim.Optimizer = Steps(
                self.model, trainable(self.model, dense=self.dense), *self.rates
            )
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss per token that is to be predicted: those whose label is not -100."""
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        counts = labels != -100
        out = model(**given, use_cache=False)
        top = None
        if self.teacher is not None:
            with torch.no_grad():
                logits = self.teacher(**given, use_cache=False).logits
            top = TopK.of(logits[:, :-1][counts[:, 1:]], self.top_k)
        sums = token_sums(out.logits, labels, counts, top, self.weights)
        loss = sums.loss / (sums.tokens if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = (
                loss * self.accelerator.num_processes
            )  # the tokens are those of all processes, gradients are averaged
        return (loss, out) if return_outputs else loss
