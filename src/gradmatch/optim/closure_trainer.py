"""A Hugging Face Trainer for optimizers that need the loss, or the model's outputs, and not gradients alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from gradmatch.core.checks import refuse, require
from gradmatch.core.problem import next_token, twice_differentiable


class ClosureTrainer(Trainer):
    """``transformers.Trainer`` that steps any optimizer of this package in its own protocol.

    Optimizers that take ordinary gradients, and those from elsewhere, are driven as by ``Trainer`` itself. For the
    others the closure of the batch goes to ``optimizer.step``: its first call costs no forward pass of its own, as the
    loss that Trainer reports is the same tensor. Override :meth:`losses_of_outputs` for other models than causal
    language models, if the optimizer works on outputs.

    Raises:
        InputError: gradient accumulation, for which a step would see the last part of its batch only.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch; the step that follows is prepared."""
        outer: Any = self.optimizer
        optimizer: Any = getattr(outer, "optimizer", outer)  # accelerate wraps it
        protocols = getattr(optimizer, "protocols", ("grad",))
        if "grad" in protocols:
            return super().training_step(model, inputs, num_items_in_batch)
        require(
            self.args.gradient_accumulation_steps == 1,
            f"gradient_accumulation_steps is {self.args.gradient_accumulation_steps}; {type(optimizer).__name__} needs "
            "its whole batch in one step, 1.",
        )
        model.train()
        inputs = self._prepare_inputs(inputs)
        closure: Callable[[], Any]
        if "loss closure" in protocols:
            with twice_differentiable() if "graph" in protocols else nullcontext():
                loss, closure = self._loss_closure(model, inputs)
        elif "output closure" in protocols:
            loss, closure = self._output_closure(model, inputs)
        else:
            refuse(
                f"optimizer has the protocols {protocols}; ClosureTrainer knows grad, loss and output closures."
            )

        def step(_: object = None) -> None:
            del outer.step  # it stood in place of the method for this once
            optimizer.step(closure)

        outer.step = step
        return loss.detach()

    def losses_of_outputs(self, outputs: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Losses [b] of the model's outputs; here next-token cross-entropy with ``inputs["labels"]``."""
        return next_token(outputs, inputs["labels"])

    def _loss_closure(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Callable[[], Tensor]]:
        def loss() -> Tensor:
            return cast(Tensor, self.compute_loss(model, inputs))

        first = loss()
        return first, _first_then(first, loss)

    def _output_closure(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Callable[[], Any]]:
        def outputs() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            found: Tensor = model(**inputs).logits
            return found, lambda z: self.losses_of_outputs(z, inputs)

        first = outputs()
        with torch.no_grad():
            loss = first[1](first[0]).mean()
        return loss, _first_then(first, outputs)


def _first_then(first: Any, again: Callable[[], Any]) -> Callable[[], Any]:
    """A function that gives ``first`` when called first, and makes a new one each time after."""
    held = [first]

    def call() -> Any:
        return held.pop() if held else again()

    return call
