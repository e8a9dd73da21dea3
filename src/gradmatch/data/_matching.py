"""Trajectory matching: images on which a student, started on an expert's checkpoint, ends on a later one.

With theta_0 and theta* an expert's parameters some epochs apart, and N steps theta_{i+1} = theta_i - lr g_i(theta_i, S)
on the synthetic set S, the loss |theta_N - theta*|^2 / |theta_0 - theta*|^2 is lowered in the pixels and in lr
(MTT, Cazenavette et al., arXiv 2203.11932). How the gradient goes through the N steps is core's affair.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.augment import SiameseAugment
from gradmatch.core.ensemble import member_seeds
from gradmatch.core.examples import as_examples
from gradmatch.core.networks import Network, active_dropout, build
from gradmatch.core.unroll import MODES, STORES, UnrolledGradient, unrolled_gradient
from gradmatch.data._common import Distiller, Job, State, SyntheticDataset, unstandardise
from gradmatch.data._inner import (
    SEEDS,
    Augment,
    Inner,
    batch_order,
    caller,
    distance_to,
    require_matchable,
    squared_gap,
)
from gradmatch.data._match_state import (
    MatchJob,
    descend,
    generator_of,
    match_job,
    require_scaling,
    teacher_labels,
    tensor_of,
)
from gradmatch.data._trajectories import TrajectoryBuffer, name_of, train_experts

SOFT_LABELS = (False, "teacher", "teacher-init")
_GIVEN = {"dataset", "net_factory", "out", "resume", "progress"}
_EXPERT_OPTIONS = set(inspect.signature(train_experts).parameters) - _GIVEN


class TrajectoryMatcher(Distiller):
    """The loop that the trajectory-matching systems share; FTD and TESLA differ in experts, averaging and labels.

    Args:
        per_class, steps: images per class; outer iterations (5000 as in MTT and FTD).
        syn_steps: N, inner steps on the synthetic set.
        expert_epochs: M, epochs between an expert's start and target.
        max_start_epoch: starts are drawn from epochs 0 .. max_start_epoch - 1.
        lr_img, momentum: SGD on the pixels (and on the rate). The loss is tiny per pixel, so that 100 to 10000 is
            usual for standardised 32x32 images; small images and few steps need less.
        lr_lr: rate of learning the inner rate.
        lr_syn: inner rate to start from; it is learned, and is the rate for training on the result.
        lr_floor: the least inner rate; the published code has none. None stops the run instead once the rate is
            not positive.
        ema_decay: averages the pixels over about 1 / (1 - decay) iterations; 0: no averaging.
        batch_syn: images in an inner step; default all.
        unroll: "exact" (default), "tesla", "full", "checkpoint": how to differentiate the inner steps.
        state_store: "memory", "cpu" or "recompute": where "exact" and "tesla" keep the N states.
        soft_labels: "teacher" assigns the target expert's probabilities in every iteration, "teacher-init" once,
            before the first step; False leaves hard labels.
        lr_label: rate at which label logits are learned as well; default None, labels are constants.
        augment: operations of :class:`gradmatch.core.augment.SiameseAugment` joined by "_", or a function
            ``(x, generator) -> x``; used for experts and students. Default none.
        allow_batchnorm, allow_dropout: permit such networks: batch statistics; the draws of a step replayed.
        experts: options of :func:`gradmatch.data.train_experts` for ``distill`` without a buffer.
        init, standardise, seed, device: as for every :class:`Distiller`.

    Raises:
        InputError: options out of range, a buffer too short or of another network, start equal to target, a loss or
            rate that leaves its range (naming the iteration).
    """

    expert_defaults: Mapping[str, Any] = {"optimizer": "sgd"}

    def __init__(
        self,
        *,
        per_class: int = 10,
        steps: int = 5000,
        syn_steps: int = 30,
        expert_epochs: int = 2,
        max_start_epoch: int = 20,
        lr_img: float = 100.0,
        lr_lr: float = 1e-5,
        lr_syn: float = 0.01,
        lr_floor: float | None = 1e-3,
        momentum: float = 0.5,
        ema_decay: float = 0.0,
        batch_syn: int | None = None,
        unroll: str = "exact",
        state_store: str = "memory",
        soft_labels: bool | str = False,
        lr_label: float | None = None,
        augment: str | Augment | None = None,
        allow_batchnorm: bool = False,
        allow_dropout: bool = False,
        experts: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(per_class=per_class, steps=steps, **options)
        self.syn_steps = checks.whole("syn_steps", syn_steps)
        self.expert_epochs = checks.whole("expert_epochs", expert_epochs)
        self.max_start_epoch = checks.whole("max_start_epoch", max_start_epoch)
        self.lr_img = checks.nonnegative("lr_img", lr_img)
        self.lr_lr = checks.nonnegative("lr_lr", lr_lr)
        self.lr_syn = checks.positive("lr_syn", lr_syn)
        self.lr_floor = None if lr_floor is None else checks.positive("lr_floor", lr_floor)
        self.momentum = checks.fraction("momentum", momentum, zero=True, one=False)
        self.ema_decay = checks.fraction("ema_decay", ema_decay, zero=True, one=False)
        self.batch_syn = None if batch_syn is None else checks.whole("batch_syn", batch_syn)
        self.unroll = checks.one_of("unroll", unroll, MODES)
        self.state_store = checks.one_of("state_store", state_store, STORES)
        self.soft_labels = checks.one_of("soft_labels", soft_labels, SOFT_LABELS)
        self.lr_label = None if lr_label is None else checks.nonnegative("lr_label", lr_label)
        checks.require(
            self.lr_label is None or self.soft_labels != "teacher",
            "lr_label is given with soft_labels 'teacher', which overwrites labels in every iteration; use "
            "'teacher-init' or hard labels.",
        )
        self.augment = SiameseAugment(augment) if isinstance(augment, str) else augment
        self.allow_batchnorm = bool(checks.one_of("allow_batchnorm", allow_batchnorm, (True, False)))
        self.allow_dropout = bool(checks.one_of("allow_dropout", allow_dropout, (True, False)))
        self.experts = {**self.expert_defaults, **(experts or {})}
        strange = sorted(set(self.experts) - _EXPERT_OPTIONS)
        checks.require(
            not strange,
            f"experts has {checks.listing(strange)}, no option of experts; "
            f"it may have {', '.join(sorted(_EXPERT_OPTIONS))}.",
        )
        self._buffer: TrajectoryBuffer | None = None
        self._raw: SyntheticDataset | None = None

    @property
    def raw(self) -> SyntheticDataset | None:
        """The result of the last ``distill`` with the images of its last step, before averaging."""
        return self._raw

    def describe(self) -> dict[str, Any]:
        """The options, and how the experts were trained."""
        experts = {k: name_of(v) if callable(v) else v for k, v in self.experts.items()}
        found = super().describe() | {"augment": name_of(self.augment), "experts": experts}
        if self._buffer is not None:
            first = self._buffer.parts[0]
            marks = [float(vector.double().sum()) for vector in (first[0, -1], first[-1, 0])]
            found |= {"experts": self._buffer.meta, "buffer": [len(self._buffer), *marks]}
        return found

    def distill(
        self,
        dataset: Any,
        network: Network,
        *,
        buffer: TrajectoryBuffer | str | Path | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        init: SyntheticDataset | str | Path | None = None,
        progress: Any = None,
    ) -> SyntheticDataset:
        """Learn the synthetic set; trains the experts first where no ``buffer`` (or its folder) is given.

        With ``out``, experts trained here are kept in its folder "experts", and ``raw.safetensors`` holds the images
        without averaging. The other arguments are those of :meth:`Distiller.distill`.
        """
        run = copy.copy(self)
        dataset = as_examples(dataset)  # read for the experts and for the images, an iterator only once
        if isinstance(buffer, str | Path):
            buffer = TrajectoryBuffer.load(buffer)
        if buffer is None:
            home = None if out is None else Path(out) / "experts"
            buffer = run._train_experts(dataset, network, init, home, resume)
        run._buffer = buffer
        result = super(TrajectoryMatcher, run).distill(
            dataset, network, out=out, resume=resume, init=init, progress=progress
        )
        raw_file = None if out is None else Path(out) / "raw.safetensors"
        self._raw = run._raw
        if raw_file is not None and run._raw is not None:
            run._raw.save(raw_file)
        elif raw_file is not None and raw_file.is_file():
            self._raw = SyntheticDataset.load(raw_file)
        return result

    def _train_experts(
        self, dataset: Any, network: Network, init: Any, out: Path | None, resume: bool
    ) -> TrajectoryBuffer:
        base = Distiller.job(self, dataset, network, init)
        self._student(base)  # what would be refused after hours of training is refused before
        options = {"seed": self.seed, "augment": self.augment, **self.experts, "standardise": False}
        wanted = self.max_start_epoch + self.expert_epochs - 1
        options.setdefault("epochs", max(50, wanted))
        checks.require(
            options["epochs"] >= wanted,
            f"experts have {options['epochs']} epochs; max_start_epoch {self.max_start_epoch} and expert_epochs "
            f"{self.expert_epochs} need at least {wanted}.",
        )
        return train_experts(base.real, network, **options, out=out, resume=resume)

    def job(
        self, dataset: Any, network: Network, init: SyntheticDataset | str | Path | None = None
    ) -> MatchJob:
        """The checked data, experts and student."""
        base = super().job(dataset, network, init)
        buffer = self._buffer
        if buffer is None:
            checks.refuse("there is no buffer of experts yet; call distill, which trains one or takes yours.")
        buffer.require_segments(self.max_start_epoch, self.expert_epochs)
        require_scaling(buffer, base)
        net = self._student(base)
        return MatchJob(**vars(base), buffer=buffer, net=net, space=buffer.require_network(net))

    def _student(self, base: Job) -> nn.Module:
        """The network that is matched; refuses one that cannot be, and inner batches larger than the set."""
        count = base.real.classes * self.per_class
        checks.require(
            self.batch_syn is None or self.batch_syn <= count,
            f"batch_syn is {self.batch_syn}; there are only {count} synthetic images.",
        )
        net = build(base.network, self.seed, base.device).to(base.real.x.dtype).train()
        require_matchable(net, self.allow_batchnorm, self.allow_dropout)
        return net

    def start(self, job: Job) -> State:
        """Images at their initial values, the rate, both velocities, and what the options add."""
        images = job.images.clone()
        state: State = {
            "images": images,
            "images_velocity": torch.zeros_like(images),
            "lr": torch.tensor(self.lr_syn, dtype=images.dtype, device=images.device),
            "lr_velocity": torch.zeros((), dtype=images.dtype, device=images.device),
            "generator": torch.Generator().manual_seed(member_seeds(self.seed, 0).order),
        }
        if self.ema_decay:
            state["ema"] = images.clone()
        if self.soft_labels == "teacher-init":
            # the target of the first iteration, whose draw this repeats
            same = generator_of(state).clone_state()
            target = match_job(job).buffer.draw(same, self.max_start_epoch, self.expert_epochs)[3]
            state["labels"] = teacher_labels(match_job(job), images, target.to(images))
        if self.lr_label is not None:
            hard = torch.nn.functional.one_hot(job.labels, job.real.classes).to(images.dtype)
            soft = 0.9 * hard + 0.1 / job.real.classes
            labels = tensor_of(state, "labels") if "labels" in state else soft
            state["logits"] = labels.clamp_min(1e-6).log()
            state["logits_velocity"] = torch.zeros_like(labels)
        return state

    def step(self, job: Job, state: State, k: int) -> Mapping[str, float]:
        """One outer iteration: draw a segment of an expert, match it, move pixels, rate and what else is learned."""
        try:
            result = self.gradient(job, state)
        except checks.InputError as error:
            raise checks.InputError(f"iteration {k}: {error}") from error
        descend(state, "images", result.grads["images"], self.lr_img, self.momentum)
        descend(state, "lr", result.lr_grad, self.lr_lr, self.momentum)
        if self.lr_label is not None:
            descend(state, "logits", result.grads["logits"], self.lr_label, self.momentum)
        if self.ema_decay:
            tensor_of(state, "ema").lerp_(tensor_of(state, "images"), 1 - self.ema_decay)
        rate = float(tensor_of(state, "lr"))
        if self.lr_floor is None:
            checks.require(
                rate > 0, f"iteration {k}: lr_syn became {rate}; it must stay above 0 (lower lr_lr)."
            )
        elif rate < self.lr_floor:
            tensor_of(state, "lr").fill_(self.lr_floor)
        return {"loss": float(result.loss), "lr_syn": rate}

    def gradient(self, job: Job, state: State) -> UnrolledGradient:
        """Matching loss of a freshly drawn segment and its gradients; assigns the labels where a teacher does."""
        match, generator = match_job(job), generator_of(state)
        images, space = tensor_of(state, "images"), match.space
        _, _, theta0, target = match.buffer.draw(generator, self.max_start_epoch, self.expert_epochs)
        theta0, target = theta0.to(images), target.to(images)
        gap = squared_gap(theta0, target)
        if self.soft_labels == "teacher":
            state["labels"] = teacher_labels(match, images, target)
        labels = tensor_of(state, "labels") if "labels" in state else match.labels
        inner = Inner(
            caller(match.net),
            batch_order(len(images), self.batch_syn, self.syn_steps, generator),
            torch.randint(SEEDS, (self.syn_steps,), generator=generator).tolist(),
            self.augment,
            bool(active_dropout(match.net)),
        )
        inputs = {k: v for k, v in state.items() if k in ("images", "logits")}
        return unrolled_gradient(
            lambda params, i, x: inner.loss(params, i, x, labels),
            space.unflatten(theta0),
            distance_to(space.unflatten(target), gap),
            inputs,
            tensor_of(state, "lr"),
            self.syn_steps,
            self.unroll,
            state_store=self.state_store,
        )

    def images_of(self, job: Job, state: State) -> Tensor:
        """The averaged images where there is averaging."""
        return tensor_of(state, "ema" if self.ema_decay else "images")

    def labels_of(self, job: Job, state: State) -> Tensor:
        """Learned or assigned probabilities, or the hard labels."""
        if self.lr_label is not None:
            return tensor_of(state, "logits").softmax(1)
        return tensor_of(state, "labels") if "labels" in state else job.labels

    def lr_of(self, job: Job, state: State) -> float | None:
        """The learned inner rate."""
        return float(tensor_of(state, "lr"))

    def _result(self, job: Job, state: State) -> SyntheticDataset:
        result = super()._result(job, state)
        plain = unstandardise(tensor_of(state, "images"), job.mean, job.std)
        self._raw = replace(result, images=plain.detach().cpu().clone())
        return result
