"""Hugging Face's Trainer on a tiny GPT-2 with every optimizer: stopped and resumed, it ends as if it never stopped.

To test another optimizer, add how to make it to ``MAKE`` (and its name to ``QUIET`` if its closure must repeat: such a
model has no dropout).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from gradmatch.core.checks import InputError
from gradmatch.optim import (
    AdaHessian,
    ClosureTrainer,
    DiffGrad,
    GradNormSmooth,
    Lion,
    LowRankAdamW,
    ProgramOptimizer,
    TargetSurrogate,
    _protocol,
    programs,
)
from gradmatch.optim._adam import AdamFamily
from gradmatch.optim._base import OptimizerBase

STEPS, STOP = 4, 2


class LossDescent(AdamFamily):
    """The simplest optimizer with a loss closure: Adam on a gradient of its own making, two evaluations a step."""

    protocols = ("loss closure",)

    def _gradients(self, closure):
        params = self._all_params()
        closure()
        loss = _protocol.loss_with_graph(self._name, params, closure, self.protocols)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        return loss


class OutputDescent(AdamFamily):
    """The same with an output closure."""

    protocols = ("output closure",)

    def _gradients(self, closure):
        params = self._all_params()
        z, losses = _protocol.outputs_and_loss(self._name, params, closure, self.protocols)
        for p, g in zip(params, torch.autograd.grad(losses(z).mean(), params), strict=True):
            p.grad = g


ADAM = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MAKE: dict[str, Callable[[Any], OptimizerBase]] = {
    "adam": lambda params: AdamFamily(params, ADAM),
    "adam flat": lambda params: AdamFamily(params, {**ADAM, "flat": True}),
    "lion": lambda params: Lion(params, lr=1e-3, weight_decay=0.1),
    "lion flat": lambda params: Lion(params, lr=1e-3, weight_decay=0.1, flat=True),
    "program": lambda params: ProgramOptimizer(params, programs.adamw(), lr=1e-3),
    "diffgrad": lambda params: DiffGrad(params, lr=1e-3),
    "adahessian": lambda params: AdaHessian(params, lr=0.01, block=32, hessian_every=3),
    "gns": lambda params: GradNormSmooth(params, curvature="empirical_fisher"),
    "low rank": lambda params: LowRankAdamW(params, 1e-3, 0.5, residual="error_feedback", update_gap=3),
    "low rank turned": lambda params: LowRankAdamW(params, 1e-3, 0.5, residual="scaled"),
    "galore": lambda params: LowRankAdamW(params, 1e-3, 0.5, projector="svd", update_gap=2),
    "sso": lambda params: TargetSurrogate(params, eta=2.0, inner_steps=3),
    "sso armijo": lambda params: TargetSurrogate(params, eta_schedule="armijo", inner_steps=2),
    "loss closure": lambda params: LossDescent(params, ADAM),
    "output closure": lambda params: OutputDescent(params, ADAM),
}
QUIET = ("gns", "sso", "sso armijo", "loss closure", "output closure")


def model(dropout: float) -> GPT2LMHeadModel:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(vocab_size=23, n_positions=8, n_embd=8, n_layer=1, n_head=2, **rates)
    config._attn_implementation = "eager"  # its second derivatives exist
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


class Texts(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(23, (32, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(name: str, out: Path, *, resume: bool = False, **extra: Any) -> nn.Module:
    """A run of ``STEPS`` updates that keeps its state after ``STOP``, or that goes on from there."""
    arguments = TrainingArguments(
        str(out), max_steps=STEPS, save_steps=STOP, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, seed=0, **extra,
    )  # fmt: skip
    own = model(0.0 if name in QUIET else 0.1)
    optimizer = MAKE[name](own.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    trainer = ClosureTrainer(own, arguments, train_dataset=Texts(), optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{STOP}") if resume else None)
    assert trainer.state.global_step == STEPS
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history if "loss" in e)
    return own


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> Any:
    state = torch.get_rng_state()  # Trainer seeds the global generator
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize("name", MAKE)
def test_a_stopped_run_ends_bitwise_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    """Whatever a run does after its last checkpoint is lost when it is killed: the rest starts from that alone."""
    whole = train(name, tmp_path)
    resumed = train(name, tmp_path, resume=True)
    for (key, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key
    assert not torch.equal(next(whole.parameters()), next(model(0.0).parameters()))


def test_accumulation_is_refused_where_a_step_needs_its_whole_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gradient_accumulation_steps is 2; LossDescent needs"):
        train("loss closure", tmp_path, gradient_accumulation_steps=2)
