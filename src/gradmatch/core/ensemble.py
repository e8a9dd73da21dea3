"""Many small networks trained at once, each exactly as it would be trained alone.

Four programs do the same work: a plain loop over members, one batched program over stacked parameters
(``torch.func.vmap``), members side by side in threads, and worker processes of one thread each. Which one pays is a
property of the machine and the network; what comes out is the same up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gradmatch.core import _vmapped, _workers, checks
from gradmatch.core._members import (
    Augment,
    MemberSeeds,
    Recipe,
    Update,
    accuracy_of,
    logits_of,
    member_seeds,
)
from gradmatch.core._programs import PROGRAMS, TEST_BATCH, choose, join, run_loop, run_threads, stack
from gradmatch.core.examples import Examples
from gradmatch.core.networks import Network, build
from gradmatch.core.store import load_tensors, save_tensors

__all__ = ["PROGRAMS", "Ensemble", "MemberSeeds", "member_seeds", "train_ensemble"]

FILE = "ensemble.safetensors"


@dataclass(frozen=True)
class Ensemble:
    """Trained members, stacked.

    Attributes:
        params: every parameter of all members (n, ...), by name.
        buffers: every buffer of all members (n, ...), by name.
        losses: mean training loss of every member and epoch (n, epochs).
        trajectories: recorded parameters (n, records, P) float32 on the CPU, flattened in the order of
            ``params``; ``None`` when nothing was recorded.
        recorded: the epochs after which they were recorded; 0 is the initialisation.
        test_accuracy: share of right answers on ``test`` (n,); ``None`` without one.
        program, reason: which program ran, and why.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    losses: Tensor
    trajectories: Tensor | None
    recorded: tuple[int, ...]
    test_accuracy: Tensor | None
    program: str
    reason: str
    template: nn.Module = field(repr=False)

    def __len__(self) -> int:
        return len(self.losses)

    def modules(self) -> list[nn.Module]:
        """The members as separate networks in eval mode."""
        return [self.module(k) for k in range(len(self))]

    def module(self, k: int) -> nn.Module:
        """Member ``k`` as a network of its own in eval mode."""
        module = copy.deepcopy(self.template)
        with torch.no_grad():
            for own, stacked in (
                (module.named_parameters(), self.params),
                (module.named_buffers(), self.buffers),
            ):
                for name, tensor in own:
                    tensor.copy_(stacked[name][k])
        return module.eval()

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (P,), or several (..., P), cut into named parameters of their own shapes."""
        shapes = {name: p.shape[1:] for name, p in self.params.items()}
        sizes = [s.numel() for s in shapes.values()]
        checks.require(
            vector.shape[-1] == sum(sizes),
            f"vector has {vector.shape[-1]} entries; a member has {sum(sizes)} parameters.",
        )
        parts = zip(shapes.items(), vector.split(sizes, -1), strict=True)
        return {name: part.reshape(*vector.shape[:-1], *shape) for (name, shape), part in parts}

    @torch.no_grad()
    def predict(self, x: Tensor, batch: int = TEST_BATCH) -> Tensor:
        """Logits (n, m, C) of every member for inputs (m, ...), in eval mode."""
        x = x.to(self.losses)
        if self.program == "vmap":
            call = vmap(lambda params, part: functional_call(self.template, params, (part,)), (0, None))
            return torch.cat([call(self.params, part) for part in x.split(batch)], 1)
        return torch.stack([logits_of(self.module(k), x, batch) for k in range(len(self))])

    def accuracy(self, x: Tensor, y: Tensor, batch: int = TEST_BATCH) -> Tensor:
        """Share of right answers of every member (n,), float64; labels may be probabilities."""
        checks.same_length("x", x, "y", y)
        return accuracy_of(self.predict(x, batch), y.to(self.losses.device))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; a folder gets ``ensemble.safetensors``."""
        tensors = {f"params.{k}": t for k, t in self.params.items()}
        tensors |= {f"buffers.{k}": t for k, t in self.buffers.items()} | {"losses": self.losses}
        optional = {"trajectories": self.trajectories, "test_accuracy": self.test_accuracy}
        tensors |= {k: t for k, t in optional.items() if t is not None}
        header = {
            "names": list(self.params),
            "recorded": list(self.recorded),
            "program": self.program,
            "reason": self.reason,
        }
        return save_tensors(_file(path), {k: t.contiguous() for k, t in tensors.items()}, header)

    @classmethod
    def load(cls, path: str | Path, network: Network) -> Ensemble:
        """Read what :meth:`save` wrote; ``network`` is the factory the members were built by.

        Raises:
            InputError: not such a file, or a network of other parameters.
        """
        tensors, header = load_tensors(_file(path))
        checks.require("losses" in tensors and "names" in header, f"{path} does not hold an ensemble.")
        params = {name: tensors[f"params.{name}"] for name in header["names"]}
        template = build(network, 0).to(tensors["losses"].dtype).eval()
        own = {name: p.shape for name, p in template.named_parameters()}
        checks.require(
            own == {name: t.shape[1:] for name, t in params.items()},
            f"network has other parameters than the ensemble in {path}.",
        )
        cut = len("buffers.")
        return cls(
            params,
            {k[cut:]: t for k, t in tensors.items() if k.startswith("buffers.")},
            tensors["losses"],
            tensors.get("trajectories"),
            tuple(header["recorded"]),
            tensors.get("test_accuracy"),
            header["program"],
            header["reason"],
            template,
        )


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE


def train_ensemble(
    network: Network,
    data: Any,
    n: int,
    *,
    epochs: int = 300,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    milestones: Iterable[int] | None = None,
    gamma: float = 0.1,
    augment: Augment | None = None,
    update: Update | None = None,
    record: str | Iterable[int] | None = None,
    test: Any = None,
    seed: int = 0,
    program: str = "auto",
    workers: int | None = None,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Ensemble:
    """Train ``n`` networks on the same data, each with its own seeds, as ``n`` separate loops would.

    Member k draws its initial weights, batch order, augmentations and random layers from
    ``member_seeds(seed, k)``. A batch that holds the whole set keeps its order; otherwise every epoch is a fresh
    ``torch.randperm`` from a CPU generator, cut into batches, the last of which may be smaller.

    Args:
        network: factory of fresh networks, or one network to re-initialise.
        data: pair (x, y) or ``Examples``; x (m, ...) float32 or float64 (the networks follow), y whole numbers
            (m,) or probabilities (m, C).
        epochs, lr, momentum, weight_decay, batch_size: SGD; defaults of the dataset-condensation evaluator.
        milestones: epochs from which the rate is multiplied by ``gamma``; default ``(epochs // 2 + 1,)``.
        augment: ``augment(x, generator) -> x``, called on every batch of every member.
        update: ``update(params, grad_fn, state, lr) -> (params, state)``, one step of another optimiser in place
            of SGD: dictionaries of tensors, nothing changed in place, ``state`` empty at first; ``grad_fn`` gives
            the gradient of the present batch at any parameters and may be called several times.
        record: epochs after which to keep the parameters (0 is the initialisation), or "epochs" for all.
        test: pair (x, y) on which every member is tested after training.
        program: "auto", "loop", "vmap" (one batched program), "threads" (members side by side, each with its share
            of PyTorch's threads; ``augment`` and ``update`` must not draw from the global generator), or "processes"
            (workers of one thread; needs joblib and pickles the factory). Where threads or processes cannot be used
            the loop runs and ``reason`` says why.
        workers: number of processes; default the cores this process may use.
        together: at most so many members in one batched program, where memory is short; default all.
        device: default the device of the data.
        progress: called with (member-epochs done, in all).

    Raises:
        InputError: bad options or data, a network "vmap" cannot run, or a loss that is not finite.

    >>> x, y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    >>> ensemble = train_ensemble(lambda: nn.Linear(3, 2), (x, y), 8, epochs=2, record="epochs")
    >>> len(ensemble), tuple(ensemble.trajectories.shape), ensemble.program
    (8, (8, 3, 8), 'vmap')
    """
    n = checks.whole("n", n)
    x, y = _pair("data", data, device)
    held = None if test is None else _pair("test", test, x.device, x.dtype)
    recipe = Recipe(
        epochs=checks.whole("epochs", epochs, least=0),
        lr=checks.nonnegative("lr", lr),
        momentum=checks.fraction("momentum", momentum, zero=True, one=False),
        weight_decay=checks.nonnegative("weight_decay", weight_decay),
        batch_size=checks.whole("batch_size", batch_size),
        milestones=(epochs // 2 + 1,) if milestones is None else tuple(milestones),
        gamma=checks.nonnegative("gamma", gamma),
        augment=augment,
        update=update,
        record=_recorded(record, epochs),
        seed=checks.whole("seed", seed, least=0),
    )
    template = build(network, member_seeds(recipe.seed, 0).init).to(device=x.device, dtype=x.dtype).train()
    chosen, reason = choose(program, template, network, x, y, recipe, n, workers, held)
    done = _counter(progress, n * recipe.epochs)
    if chosen == "vmap":
        size = n if together is None else checks.whole("together", together)
        groups = [range(k, min(k + size, n)) for k in range(0, n, size)]
        result = join([_vmapped.train_stacked(network, x, y, recipe, g, done) for g in groups])
    elif chosen == "processes":
        result = stack(_workers.train(network, x, y, recipe, n, workers, held, TEST_BATCH, done), x.device)
    else:
        run = run_threads if chosen == "threads" else run_loop
        result = stack(run(network, x, y, recipe, n, held, done), x.device)
    ensemble = Ensemble(
        params=result.params,
        buffers=result.buffers,
        losses=result.losses,
        trajectories=result.snapshots if recipe.record else None,
        recorded=recipe.record,
        test_accuracy=result.accuracy,
        program=chosen,
        reason=reason,
        template=template.eval(),
    )
    if held is not None and result.accuracy is None:
        return replace(ensemble, test_accuracy=ensemble.accuracy(*held).cpu())
    return ensemble


def _pair(
    name: str, data: Any, device: torch.device | str | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Checked (x, y) on the device; labels may be probabilities, so this is not ``as_examples``."""
    x, y = (data.x, data.y) if isinstance(data, Examples) else data
    x, y = torch.as_tensor(x).detach(), torch.as_tensor(y).detach()
    checks.same_length(f"{name} inputs", x, f"{name} labels", y)
    checks.require(len(x) > 0, f"{name} is empty; at least one example is needed.")
    checks.require(
        x.is_floating_point(), f"{name} inputs are {x.dtype}; they must be floating (scale them first)."
    )
    checks.require(
        y.ndim == (2 if y.is_floating_point() else 1),
        f"{name} labels are {y.dtype} of shape {tuple(y.shape)}; they must be whole numbers (m,) "
        "or probabilities (m, classes).",
    )
    checks.finite(f"{name} inputs", x)
    checks.finite(f"{name} labels", y)
    x = x.to(device=device or x.device, dtype=dtype or x.dtype)
    return x, y.to(x.device, x.dtype if y.is_floating_point() else torch.long)


def _recorded(record: str | Iterable[int] | None, epochs: int) -> tuple[int, ...]:
    if record is None:
        return ()
    if isinstance(record, str):
        checks.one_of("record", record, ("epochs",))
        return tuple(range(epochs + 1))
    return tuple(sorted({checks.whole("record", k, least=0, most=epochs) for k in record}))


def _counter(progress: Callable[[int, int], object] | None, total: int) -> Callable[[int], object] | None:
    if progress is None:
        return None
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    return count
