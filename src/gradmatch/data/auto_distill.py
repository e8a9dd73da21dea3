"""The library's own recipe for dataset distillation, for when no published method is asked for by name.

Two phases, both against a pool of narrow networks that are being trained on the synthetic set itself:

1. *Ridge.* With F_s, F_t the last hidden layer's features of the synthetic set S and of a real batch, the loss is
   |F_t F_s^T (F_s F_s^T + ridge k I)^-1 Y_s - Y_t|^2 with k the mean of the kernel's diagonal, differentiated to S
   alone (the idea of FRePo: Zhou, Nezhadarya, Ba, arXiv 2206.00719). The ridge is strong, 0.1, where the
   literature takes 1e-6: the evaluator stops long before it has fitted the small eigenvalues of this kernel, so a
   weak ridge rewards directions that the evaluator never learns.
2. *Refinement.* The real loss after a window of the networks' own training is differentiated through that training
   (truncated windows at random ages: RaT-BPTT, Feng, Vedantam, Kempe, arXiv 2311.07025). Above one image per class
   windows begin once a network is ripe: what counts is the loss late in the evaluator's training.

The pool's rate is four times the evaluator's, for a quarter of its steps: the same path, four times cheaper. Every
step takes several networks, side by side in threads of their own, and follows the mean of their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from gradmatch.core import checks
from gradmatch.core.cpu import side_by_side
from gradmatch.core.examples import Examples, as_examples
from gradmatch.core.networks import Network, build
from gradmatch.core.unroll import unrolled_gradient
from gradmatch.data._auto_parts import FeatureNet, Parameters, best_scale, centroids, narrow_convnet, tensor
from gradmatch.data._common import Distiller, Job, Progress, State, SyntheticDataset


@dataclass(frozen=True)
class Preset:
    """Step counts (ridge, refinement) for one and for more images per class, and the size of the pool."""

    one: tuple[int, int]
    more: tuple[int, int]
    pool: int


PRESETS = {"demo": Preset((400, 100), (400, 0), 8), "full": Preset((600, 1800), (800, 120), 16)}
_GRAPH_IMAGES = 1500  # window times images up to which the graph of a whole window is kept: about a gigabyte


class AutoDistill(Distiller):
    """Learn a small training set by the recipe of this file; what ``distill --method auto`` runs.

    Args:
        per_class: images per class.
        preset: "demo" (about a minute on two cores) or "full" (at most ten); sets ``steps``,
            ``refine_steps`` and ``pool``.
        steps: ridge steps, in place of the preset's.
        refine_steps: steps of the second phase, in place of the preset's.
        labels: "hard"; "smooth" (each label keeps ``1 - smoothing``, the rest is spread evenly); "learned"
            (start from the smooth ones, learned in the second phase); default "hard" for one image per class, else
            "learned".
        smoothing: in [0, 1); default 0.5, chosen on a hold-out of Fashion-MNIST's training images.
        ridge: lambda as a part of the kernel's mean diagonal; default 0.1 (the same hold-out).
        image_lr, refine_lr, label_lr: Adam's rates for the images in the two phases and for the labels in the second;
            each falls to a thirtieth over the second half of its phase.
        average: factor of the running mean of the images that is given back.
        pool: number of networks, in place of the preset's.
        age: steps a network of the pool is trained before a fresh one takes its place.
        rate: the pool's learning rate; default 0.04 * min(4, 2048 / features of the last layer), four times
            the evaluator's 0.01 at its 2048 features.
        window: steps differentiated through in the second phase; default 10 at one image per class, else 6.
        ripe: age from which windows begin; default 0 at one image per class, else half of ``age``. This, ``window``
            and the rates of the second phase are of the same hold-out.
        networks: networks of a step; threads of their own where the processor has them.
        batch_size: real images per step.
        init, standardise, seed, device: as :class:`Distiller`; ``init`` may also be "kmeans" (default).
    """

    def __init__(
        self,
        *,
        per_class: int = 10,
        preset: str = "demo",
        steps: int | None = None,
        refine_steps: int | None = None,
        labels: str | None = None,
        smoothing: float = 0.5,
        ridge: float = 0.1,
        image_lr: float = 0.02,
        refine_lr: float = 0.01,
        label_lr: float = 0.02,
        average: float = 0.99,
        pool: int | None = None,
        age: int = 40,
        rate: float | None = None,
        window: int | None = None,
        ripe: int | None = None,
        networks: int = 2,
        batch_size: int = 256,
        init: str = "kmeans",
        standardise: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        start = "real" if init == "kmeans" else init
        super().__init__(
            per_class=per_class, steps=0, init=start, standardise=standardise, seed=seed, device=device
        )
        checks.one_of("preset", preset, PRESETS)
        counts = PRESETS[preset].one if self.per_class == 1 else PRESETS[preset].more
        ridge_steps = counts[0] if steps is None else checks.whole("steps", steps, least=0)
        self.refine_steps = (
            counts[1] if refine_steps is None else checks.whole("refine_steps", refine_steps, least=0)
        )
        self.ridge_steps = ridge_steps
        self.steps = ridge_steps + self.refine_steps
        self.init = init
        default = "hard" if self.per_class == 1 else "learned"
        self.labels = checks.one_of("labels", labels or default, ("hard", "smooth", "learned"))
        self.smoothing = checks.fraction("smoothing", smoothing, zero=True, one=False)
        self.ridge = checks.positive("ridge", ridge)
        self.image_lr = checks.positive("image_lr", image_lr)
        self.refine_lr = checks.positive("refine_lr", refine_lr)
        self.label_lr = checks.positive("label_lr", label_lr)
        self.average = checks.fraction("average", average, zero=True, one=False)
        self.pool = PRESETS[preset].pool if pool is None else checks.whole("pool", pool)
        self.age = checks.whole("age", age)
        self.rate = None if rate is None else checks.positive("rate", rate)
        longest, late = (10, 0) if self.per_class == 1 else (6, self.age // 2)
        self.window = checks.whole(
            "window", min(longest, self.age) if window is None else window, most=self.age
        )
        late = min(late, self.age - self.window)
        self.ripe = late if ripe is None else checks.whole("ripe", ripe, least=0, most=self.age - self.window)
        self.networks = checks.whole("networks", networks, most=self.pool)
        self.batch_size = checks.whole("batch_size", batch_size)
        self._nets: tuple[Job, list[FeatureNet]] | None = None

    def distill(
        self,
        dataset: Any,
        network: Network | None = None,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        init: SyntheticDataset | str | Path | None = None,
        progress: Progress | None = None,
    ) -> SyntheticDataset:
        """As :meth:`Distiller.distill`; without ``network`` a :func:`narrow_convnet` that fits the images is used.

        Raises:
            InputError: also for images that are not square where ``network`` is not given, for a network without a
                linear last layer, and for active dropout.
        """
        real = as_examples(dataset)
        if network is None:
            checks.require(
                real.x.ndim == 4 and real.x.shape[2] == real.x.shape[3] >= 8,
                f"dataset holds inputs of shape {tuple(real.x.shape[1:])}; without a network they must be square "
                "images of at least 8 pixels.",
            )
            network = narrow_convnet(real.x.shape[1], real.x.shape[2], real.classes)
        return super().distill(real, network, out=out, resume=resume, init=init, progress=progress)

    # ------------------------------------------------------------------ the start

    def _initial(self, real: Examples, mean: Any, std: Any, init: Any) -> Tensor:
        if init is not None or self.init != "kmeans":
            return super()._initial(real, mean, std, init)
        generator = torch.Generator().manual_seed(self.seed)
        groups = [real.x[real.of_class(c)] for c in range(real.classes)]
        for c, group in enumerate(groups):
            checks.require(
                len(group) >= self.per_class,
                f"class {c} has {len(group)} samples; per_class {self.per_class} needs at least as many.",
            )
        return torch.cat([centroids(group, self.per_class, generator) for group in groups])

    def start(self, job: Job) -> State:
        generator = torch.Generator().manual_seed(self.seed + 1)
        soft = self._smooth(job).log().clamp_min(-12.0)
        state: State = {
            "draw": generator,
            "images": job.images.clone(),
            "mean": job.images.clone(),
            "logits": soft,
        }
        state |= {"mean_logits": soft.clone(), "ages": torch.zeros(self.pool, dtype=torch.long)}
        for name in ("images", "logits"):
            state |= {f"{m}:{name}": torch.zeros_like(tensor(state, name)) for m in "mv"}
        for i in range(self.pool):
            self._fresh(job, state, i)
        nets = self._nets_of(job)
        for first in range(0, self.pool, self.networks):
            several = range(first, min(first + self.networks, self.pool))
            tasks = [
                (job, net, state, i, i * self.age // self.pool) for net, i in zip(nets, several, strict=False)
            ]
            side_by_side(self._train, tasks)
        return state

    def _smooth(self, job: Job) -> Tensor:
        """The labels as probabilities (n, classes) before any are learned."""
        hard = one_hot(job.labels, job.real.classes).to(job.images)
        keep = 0.0 if self.labels == "hard" else self.smoothing
        return (1 - keep) * hard + keep / job.real.classes

    def _probabilities(self, job: Job, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.labels == "learned" else self._smooth(job)

    # ------------------------------------------------------------------ the pool

    def _nets_of(self, job: Job) -> list[FeatureNet]:
        """One copy of the network for each network of a step: threads cannot share a module."""
        if self._nets is None or self._nets[0] is not job:
            made = [build(job.network, self.seed, job.device) for _ in range(self.networks)]
            self._nets = (job, [FeatureNet(m, job.images, self.rate) for m in made])
        return self._nets[1]

    def _fresh(self, job: Job, state: State, i: int) -> None:
        seed = int(torch.randint(2**62, (), generator=_generator(state)))
        for name, value in build(job.network, seed, job.device).named_parameters():
            state[f"net{i}:{name}"] = value.detach().clone()
            state[f"speed{i}:{name}"] = torch.zeros_like(value)
        tensor(state, "ages")[i] = 0

    def _train(self, job: Job, net: FeatureNet, state: State, i: int, steps: int) -> None:
        """Steps of network ``i`` on the synthetic set, as the evaluator would take them."""
        images, labels = tensor(state, "images"), self._probabilities(job, tensor(state, "logits"))
        for _ in range(steps):
            weights = {k: v.requires_grad_() for k, v in net.parameters(state, i).items()}
            loss = cross_entropy(net(weights, images)[0], labels)
            self._move(net, state, i, weights, loss)

    def _move(self, net: FeatureNet, state: State, i: int, weights: Parameters, loss: Tensor) -> None:
        """One step of SGD with momentum down the gradient of ``loss``."""
        gradient = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (name, weight), g in zip(weights.items(), gradient, strict=True):
                speed = 0.9 * tensor(state, f"speed{i}:{name}") + g + 5e-4 * weight
                state[f"speed{i}:{name}"], state[f"net{i}:{name}"] = speed, weight.detach() - net.rate * speed
        tensor(state, "ages")[i] += 1

    # ------------------------------------------------------------------ the steps

    def step(self, job: Job, state: State, k: int) -> Mapping[str, float]:
        generator = _generator(state)
        members = torch.randperm(self.pool, generator=generator)[: self.networks].tolist()
        refining = k >= self.ridge_steps
        span = self.window if refining else 1
        tasks = []
        for net, i in zip(self._nets_of(job), members, strict=True):
            index = torch.randint(len(job.real), (self.batch_size,), generator=generator)
            if int(tensor(state, "ages")[i]) + span > self.age:
                self._fresh(job, state, i)  # not in a thread: it seeds the global generator for a moment
            tasks.append((job, net, state, i, job.real.take(index.to(job.device))))
        found = side_by_side(self._refine if refining else self._regress, tasks)
        loss = sum(f[0] for f in found) / len(found)
        first, count = (self.ridge_steps, self.refine_steps) if refining else (0, self.ridge_steps)
        fade = max(1 / 30, min(1.0, 2 * (1 - (k - first) / count)))
        rates = {"images": self.refine_lr if refining else self.image_lr}
        if refining and self.labels == "learned":
            rates["logits"] = self.label_lr
        for name, rate in rates.items():
            g = torch.stack([f[1][name] for f in found]).mean(0)
            self._descend(state, name, g, fade * rate, k - first)
        keep = min(self.average, k / (k + 10))
        for name, mean in (("images", "mean"), ("logits", "mean_logits")):
            state[mean] = tensor(state, mean).lerp(tensor(state, name), 1 - keep)
        return {"loss": loss}

    def _regress(
        self, job: Job, net: FeatureNet, state: State, i: int, real: Examples
    ) -> tuple[float, Parameters]:
        """Ridge regression from the synthetic to the real features; the same forward pass also trains the network."""
        weights = {k: v.requires_grad_() for k, v in net.parameters(state, i).items()}
        images = tensor(state, "images").detach().requires_grad_()
        with torch.no_grad():
            f_real = net(weights, real.x)[1]
        logits, features = net(weights, images)
        leaf = features.detach().requires_grad_()
        loss = self._ridge_loss(job, leaf, f_real, real.y)
        pull = torch.autograd.grad(loss, leaf)[0]
        gradient = torch.autograd.grad(features, images, pull, retain_graph=True)[0]
        inner = cross_entropy(logits, self._probabilities(job, tensor(state, "logits")))
        self._move(net, state, i, weights, inner)
        return float(loss.detach()), {"images": gradient}

    def _ridge_loss(self, job: Job, features: Tensor, f_real: Tensor, y_real: Tensor) -> Tensor:
        """Mean squared error of the ridge regression fitted to the synthetic features (n, d), on the real ones."""
        classes = job.real.classes
        targets = one_hot(job.labels, classes).to(features) - 1 / classes
        kernel = features @ features.T
        scale = kernel.detach().diagonal().mean().clamp_min(1e-12)
        damping = self.ridge * scale * torch.eye(len(kernel)).to(kernel)
        fitted = f_real @ (features.T @ torch.linalg.solve(kernel + damping, targets))
        error: Tensor = fitted - one_hot(y_real, classes).to(fitted) + 1 / classes
        return error.square().mean()

    def _refine(
        self, job: Job, net: FeatureNet, state: State, i: int, real: Examples
    ) -> tuple[float, Parameters]:
        """The real loss after a window of the network's own training, through that training."""
        self._train(job, net, state, i, max(0, self.ripe - int(tensor(state, "ages")[i])))
        inputs = {"images": tensor(state, "images"), "logits": tensor(state, "logits")}

        def step_loss(theta: Parameters, _: int, x: Parameters) -> Tensor:
            return cross_entropy(net(theta, x["images"])[0], self._probabilities(job, x["logits"]))

        def outer_loss(theta: Parameters) -> Tensor:
            logits = net(theta, real.x)[0]
            return cross_entropy(logits * best_scale(logits.detach(), real.y), real.y)

        out = unrolled_gradient(
            step_loss,
            net.parameters(state, i),
            outer_loss,
            inputs,
            net.rate,
            self.window,
            # the same gradient either way; the adjoint's memory does not grow with the window
            "full" if self.window * len(job.images) <= _GRAPH_IMAGES else "exact",
            momentum=0.9,
            weight_decay=5e-4,
            velocity0=net.parameters(state, i, "speed"),
        )
        for name, weight in out.theta.items():
            state[f"net{i}:{name}"], state[f"speed{i}:{name}"] = weight, out.velocity[name]
        tensor(state, "ages")[i] += self.window
        return float(out.loss), dict(out.grads)

    def _descend(self, state: State, name: str, g: Tensor, rate: float, k: int) -> None:
        """Adam with betas (0.9, 0.99); its moments start anew with each phase, whose gradients differ in size."""
        alive = float(k > 0)
        m = state[f"m:{name}"] = alive * 0.9 * tensor(state, f"m:{name}") + 0.1 * g
        v = state[f"v:{name}"] = alive * 0.99 * tensor(state, f"v:{name}") + 0.01 * g.square()
        m, v = m / (1 - 0.9 ** (k + 1)), v / (1 - 0.99 ** (k + 1))
        state[name] = tensor(state, name) - rate * m / (v.sqrt() + 1e-8)

    def images_of(self, job: Job, state: State) -> Tensor:
        return tensor(state, "mean")

    def labels_of(self, job: Job, state: State) -> Tensor:
        return job.labels if self.labels == "hard" else self._probabilities(job, tensor(state, "mean_logits"))


def _generator(state: State) -> torch.Generator:
    value = state["draw"]
    assert isinstance(value, torch.Generator)
    return value
