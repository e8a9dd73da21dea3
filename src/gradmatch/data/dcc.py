"""DCC: dataset condensation with contrastive signals (Lee, Chun, Jung, Yun, Yoon; ICML 2022, arXiv 2202.02916).

Images are learned so that the gradient they give a network is the gradient that real data gives it. Class-wise
matching (DC, arXiv 2006.05929, and DSA, arXiv 2102.08259) compares one gradient for every class,

    L_cls = sum_c D(G(theta; S_c), G(theta; T_c)),

and where the classes share something large, each of these gradients is mostly that. Contrastive matching compares
their mean, in which the shared part cancels and what separates the classes is left:

    L_con = D(G(theta; S), mean_c G(theta; T_c)).

G(theta; B) is the gradient of the mean cross-entropy of batch B, D a distance of gradient lists. Networks are drawn
afresh in an outer loop and trained on S between the image updates of an inner loop. The contrastive loss moves fast
and unsteadily at first, so the first ``inner_warmup`` updates of the first ``outer_warmup`` networks match by class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradmatch.core import checks
from gradmatch.core.augment import SiameseAugment
from gradmatch.core.distance import DISTANCES
from gradmatch.core.networks import Network, build, has_batchnorm
from gradmatch.core.pooling import with_product_pools
from gradmatch.data._common import Distiller, Job, State, SyntheticDataset
from gradmatch.data._gradient_matching import Learner, Tensors, kernel_velocity

__all__ = ["DCC", "METHODS", "LoopCounts", "condense", "kernel_velocity", "loops"]

METHODS = ("dcc", "dsac", "dc", "dsa")
STRATEGY = "color_crop_cutout_flip_scale_rotate"
_TABLE = {1: (10, 5), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
_STATISTICS_PER_CLASS = 16


class LoopCounts(NamedTuple):
    """Image updates on each network, and epochs of training it on S after each of them."""

    inner_loop: int
    net_epochs: int


def loops(per_class: int) -> LoopCounts:
    """The published counts for 1, 10, 20, 30, 40 and 50 images per class.

    Between these sizes a straight line is followed, rounded down; above 50, the counts of 50 are taken.

    >>> loops(10), loops(25)
    (LoopCounts(inner_loop=10, net_epochs=50), LoopCounts(inner_loop=25, net_epochs=22))
    """
    sizes = list(_TABLE)
    inner, epochs = (np.interp(per_class, sizes, [_TABLE[k][j] for k in sizes]) for j in range(2))
    return LoopCounts(int(inner), int(epochs))


class DCC(Distiller):
    """Condense a data set into a few images per class by matching gradients, contrastively or by class.

    One step of the run is one image update, with the training of the network that follows it.

    Args:
        per_class: images per class.
        method: "dcc" (contrastive), "dsac" (the same with augmentation), or the baselines "dc" and "dsa" (by class).
        outer_loop: networks; 1000 as published, unless ``steps`` says otherwise.
        steps: image updates in all, in place of ``outer_loop``; the last network may get fewer than the others.
        inner_loop, net_epochs: image updates on each network, and epochs of its training after each; default the
            published :func:`loops` of ``per_class``. (Published DC at one image per class uses 1 and 1.)
        outer_warmup, inner_warmup: match by class in the first ``inner_warmup`` updates of the first ``outer_warmup``
            networks ("dcc" and "dsac" only). Default: a quarter of the networks (250 of the published 1000), and 10
            or ``inner_loop`` if that is less. 0 turns the warm-up off.
        distance: "filter_cosine" (published), "mse" or "cosine".
        lr_img, momentum: SGD on the images.
        lr_net, batch_train: SGD on the network.
        batch_real: real images per class and update (all of a class that has fewer).
        augment: strategy of "dsac" and "dsa", see :class:`gradmatch.core.augment.SiameseAugment`.
        parity: draw augmentations as the public code does.
        init: "real" or "noise" (or "mean"); ``standardise``, ``seed``, ``device``: see :class:`Distiller`.

    Batch-norm networks: before every update the statistics of 16 real images a class are taken and frozen.

    Raises:
        InputError: options out of range, a warm-up longer than its loop, augmentation without "dsac" or "dsa".

    >>> from gradmatch.core.examples import Examples
    >>> real = Examples(torch.randn(40, 1, 8, 8), torch.arange(40) % 2, 2)
    >>> network = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    >>> DCC(per_class=1, steps=3, net_epochs=1).distill(real, network).images.shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        per_class: int = 10,
        method: str = "dcc",
        outer_loop: int | None = None,
        steps: int | None = None,
        inner_loop: int | None = None,
        net_epochs: int | None = None,
        outer_warmup: int | None = None,
        inner_warmup: int | None = None,
        distance: str = "filter_cosine",
        lr_img: float = 0.1,
        momentum: float = 0.5,
        lr_net: float = 0.01,
        batch_real: int = 256,
        batch_train: int = 256,
        augment: str | None = None,
        parity: bool = False,
        init: str = "real",
        standardise: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        published = loops(checks.whole("per_class", per_class))
        self.inner_loop = checks.whole(
            "inner_loop", published.inner_loop if inner_loop is None else inner_loop
        )
        self.net_epochs = checks.whole(
            "net_epochs", published.net_epochs if net_epochs is None else net_epochs, 0
        )
        self.outer_loop = self._networks(outer_loop, steps)
        super().__init__(
            per_class=per_class,
            steps=self.outer_loop * self.inner_loop if steps is None else steps,
            init=init,
            standardise=standardise,
            seed=seed,
            device=device,
        )
        self.method = checks.one_of("method", method, METHODS)
        self._set_warmup(outer_warmup, inner_warmup)
        self.distance = checks.one_of("distance", distance, DISTANCES)
        self.lr_img = checks.positive("lr_img", lr_img)
        self.momentum = checks.fraction("momentum", momentum, zero=True, one=False)
        self.lr_net = checks.positive("lr_net", lr_net)
        self.batch_real = checks.whole("batch_real", batch_real)
        self.batch_train = checks.whole("batch_train", batch_train)
        self.augment = self._strategy(augment)
        self.parity = bool(checks.one_of("parity", parity, (True, False)))
        self._siamese = SiameseAugment(self.augment, parity=self.parity) if self.augment != "none" else None
        self._prepared: tuple[Job, Learner, list[Tensor]] | None = None

    def _networks(self, outer_loop: int | None, steps: int | None) -> int:
        checks.require(
            outer_loop is None or steps is None,
            f"outer_loop is {outer_loop} and steps is {steps}; give one of them.",
        )
        if steps is not None:
            return math.ceil(checks.whole("steps", steps, least=0) / self.inner_loop)
        return checks.whole("outer_loop", 1000 if outer_loop is None else outer_loop, least=0)

    def _set_warmup(self, outer: int | None, inner: int | None) -> None:
        self.outer_warmup = self.outer_loop // 4 if outer is None else checks.whole("outer_warmup", outer, 0)
        self.inner_warmup = (
            min(10, self.inner_loop) if inner is None else checks.whole("inner_warmup", inner, 0)
        )
        checks.require(
            self.outer_warmup <= self.outer_loop,
            f"outer_warmup is {outer}; it must be at most outer_loop, {self.outer_loop}.",
        )
        checks.require(
            self.inner_warmup <= self.inner_loop,
            f"inner_warmup is {inner}; it must be at most inner_loop, {self.inner_loop}.",
        )

    def _strategy(self, augment: str | None) -> str:
        siamese = self.method in ("dsac", "dsa")
        if augment is None:
            return STRATEGY if siamese else "none"
        checks.require(
            siamese or augment == "none",
            f'augment is {augment!r} with method {self.method!r}; augmentation is for "dsac" and "dsa".',
        )
        return augment

    def contrastive_at(self, outer: int, inner: int) -> bool:
        """Whether update ``inner`` of network ``outer`` matches contrastively (counting from 0)."""
        warm = outer < self.outer_warmup and inner < self.inner_warmup
        return self.method in ("dcc", "dsac") and not warm

    def job(self, dataset: Any, network: Network, init: Any = None) -> Job:
        """See :meth:`Distiller.job`; warns of data that comes out differently each time it is read."""
        _warn_of_random(dataset)
        job = super().job(dataset, network, init)
        checks.require(
            self._siamese is None or job.real.x.ndim == 4,
            f"dataset has inputs of shape {tuple(job.real.x.shape[1:])}; augment needs images (channels, h, w).",
        )
        return job

    def start(self, job: Job) -> State:
        """Images, their momentum and the generators; the first network is drawn by the first step."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return {"images": job.images.clone(), "velocity": torch.zeros_like(job.images), "draws": generator}

    def step(self, job: Job, state: State, k: int) -> Mapping[str, float]:
        """Image update ``k``, and the network's training after it."""
        outer, inner = divmod(k, self.inner_loop)
        learner = self._prepare(job)[1]
        if inner == 0:
            self._fresh_network(job, state, outer)
        params, buffers = _part(state, "param:"), _part(state, "buffer:")
        if has_batchnorm(learner.module):
            learner.freeze_statistics(
                params, buffers, torch.cat(self._real(job, state, _STATISTICS_PER_CLASS))
            )
        try:
            loss = self._update_images(job, state, params, buffers, self.contrastive_at(outer, inner))
        except checks.InputError as error:
            raise checks.InputError(f"step {k}: {error}") from error
        if inner < self.inner_loop - 1 and k < self.steps - 1:
            batches = self._training(job, state)
            seed = int(torch.randint(2**62, (1,), generator=_generator(state)))
            trained = learner.train(params, buffers, batches, self.lr_net, seed)
            state.update({f"param:{name}": p for name, p in trained.items()})
        return {"loss": loss}

    def images_of(self, job: Job, state: State) -> Tensor:
        """The learned images."""
        return _tensor(state, "images")

    def _prepare(self, job: Job) -> tuple[Job, Learner, list[Tensor]]:
        """The network's computation and the indices of every class, kept from step to step."""
        if self._prepared is None or self._prepared[0] is not job:
            module = with_product_pools(build(job.network, self.seed, job.device))
            learner = Learner.of(module, self.distance)
            self._prepared = (job, learner, [job.real.of_class(c) for c in range(job.real.classes)])
        return self._prepared

    def _fresh_network(self, job: Job, state: State, outer: int) -> None:
        seed = int(np.random.SeedSequence([self.seed, outer]).generate_state(1, np.uint64)[0] >> 1)
        module = build(job.network, seed, job.device)
        state.update({f"param:{name}": p.detach().clone() for name, p in module.named_parameters()})
        state.update({f"buffer:{name}": b.detach().clone() for name, b in module.named_buffers()})

    def _real(self, job: Job, state: State, size: int) -> list[Tensor]:
        """At most ``size`` random real images of every class, without replacement."""
        generator = _generator(state)
        chosen = (
            of[torch.randperm(len(of), generator=generator)[:size].to(of.device)]
            for of in self._prepare(job)[2]
        )
        return [job.real.x[index] for index in chosen]

    def _update_images(
        self, job: Job, state: State, params: Tensors, buffers: Tensors, contrastive: bool
    ) -> float:
        images, velocity = _tensor(state, "images"), _tensor(state, "velocity")
        real = self._real(job, state, self.batch_real)
        views = None
        if self._siamese is not None:
            size = (images.shape[2], images.shape[3])
            views = [self._siamese.draw(size, _generator(state)) for _ in real]
        loss, grads = self._prepare(job)[1].image_gradients(
            params, buffers, real, torch.split(images, self.per_class), contrastive, views=views
        )
        velocity.mul_(self.momentum).add_(torch.cat(grads))
        images.sub_(velocity, alpha=self.lr_img)
        return float(loss)

    def _training(self, job: Job, state: State) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of ``net_epochs`` epochs over S, in random order where there are several."""
        images, generator = _tensor(state, "images"), _generator(state)
        for _ in range(self.net_epochs):
            parts: list[Any] = [slice(None)]
            if len(images) > self.batch_train:
                order = torch.randperm(len(images), generator=generator).to(images.device)
                parts = list(torch.split(order, self.batch_train))
            for part in parts:
                x = images[part]
                yield (x if self._siamese is None else self._siamese(x, generator)), job.labels[part]


def condense(
    dataset: Any,
    ipc: int,
    net_factory: Network,
    method: str = "dcc",
    steps: int | None = None,
    **options: Any,
) -> SyntheticDataset:
    """Condense ``dataset`` into ``ipc`` images per class: ``DCC(...).distill(...)`` in one call.

    Args:
        dataset: labelled images; see :func:`gradmatch.core.examples.as_examples`.
        ipc: images per class.
        net_factory: makes a fresh network at every call.
        method, steps, options: as for :class:`DCC`.
    """
    return DCC(per_class=ipc, method=method, steps=steps, **options).distill(dataset, net_factory)


def _warn_of_random(dataset: Any) -> None:
    """Reading a row twice shows whether random transforms are at work; one draw of them is what gets condensed."""
    rows = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if not isinstance(rows, Dataset) or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        return
    pair = [rows[0] for _ in range(2)] if len(rows) else []
    first = [row[0] for row in pair if isinstance(row, tuple | list)]
    if len(first) == 2 and not np.array_equal(np.asarray(first[0]), np.asarray(first[1])):
        warnings.warn(
            "dataset gives another image each time it is read; one pass of it is kept and condensed.",
            stacklevel=4,
        )


def _part(state: State, prefix: str) -> Tensors:
    return {
        k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and isinstance(v, Tensor)
    }


def _tensor(state: State, name: str) -> Tensor:
    value = state[name]
    assert isinstance(value, Tensor)
    return value


def _generator(state: State) -> torch.Generator:
    value = state["draws"]
    assert isinstance(value, torch.Generator)
    return value
