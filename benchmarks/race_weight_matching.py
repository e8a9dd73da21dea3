"""Weight matching against straightforward scipy sweeps and the public JAX code: MLP 512 x 3 and VGG-16.

Both peers visit the groups in an order of their own making (ours is given the same), compute each group's scores from
whole tensors, permuted anew, and solve it by scipy. "The same" is the same sum of products, to float32 rounding.

The public code is not installable. Point GIT_RE_BASIN at a clone of samuela/git-re-basin and install ``jax``; only its
``src/weight_matching.py`` is loaded (its ``utils``, of which one line is used, would need flax).
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.core.assign import Permutation, PermutationSpec
from gradmatch.weights._ascent import Ascent
from gradmatch.weights.weight_matching import matched_tensors

PUBLIC = "GIT_RE_BASIN"
State = dict[str, Tensor]
Orders = dict[str, Tensor]


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for before in (784, 512, 512):
        layers += [nn.Linear(before, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def vgg16() -> nn.Module:
    """VGG-16 for 32 x 32 images: thirteen convolutions with norms, three linear layers of 512."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    head = nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    return nn.Sequential(*layers, *head)


def names_of(spec: PermutationSpec, key: str) -> list[str | None]:
    """The group on each axis; here every axis is one group or none."""
    return [getattr(axis, "name", None) for axis in spec.axes[key]]


def sweeps(spec: PermutationSpec, a: State, b: State, sequence: Callable[[int], Sequence[int]]) -> Orders:
    """Straightforward: for every place of a group both tensors, B permuted along its other axes, and one product."""
    orders = {g: np.arange(n) for g, n in spec.sizes.items()}
    groups = list(orders)
    moved = True
    while moved:
        moved = False
        for k in sequence(len(groups)):
            group = groups[k]
            n = spec.sizes[group]
            scores = torch.zeros(n, n)
            for place in spec.occurrences(group):
                if place.tensor not in a:
                    continue
                w = b[place.tensor]
                for d, name in enumerate(names_of(spec, place.tensor)):
                    if name is not None and d != place.dim:
                        w = w.index_select(d, torch.from_numpy(orders[name]))
                left, right = (t.movedim(place.dim, 0).reshape(n, -1) for t in (a[place.tensor], w))
                scores += left @ right.T
            matrix = scores.numpy()
            rows, columns = linear_sum_assignment(matrix, maximize=True)
            old, new = matrix[rows, orders[group]].sum(dtype=float), matrix[rows, columns].sum(dtype=float)
            moved |= bool(new > old + 1e-9 * abs(old))
            orders[group] = columns
    return {g: torch.from_numpy(o) for g, o in orders.items()}


def ours(spec: PermutationSpec, a: State, b: State, sequence: Callable[[int], Sequence[int]]) -> Orders:
    ascent = Ascent(spec, a, b, list(a), Permutation.identity(spec).order)
    ascent.run(100, sequence)
    return ascent.orders


def load_public() -> tuple[Any, Any] | str:
    """The public module and jax, or why not."""
    folder = os.environ.get(PUBLIC)
    if folder is None or not (Path(folder) / "src/weight_matching.py").is_file():
        return f"{PUBLIC} names no clone of it"
    try:
        import jax
    except ImportError as error:
        return str(error)
    stand_in = types.ModuleType("utils")
    stand_in.rngmix = lambda key, x: jax.random.fold_in(key, hash(x))  # type: ignore[attr-defined]
    sys.modules["utils"] = stand_in
    sys.path.insert(0, str(Path(folder) / "src"))
    return importlib.import_module("weight_matching"), jax


def public(code: Any, jax: Any, spec: PermutationSpec, a: State, b: State) -> Orders:
    made = code.permutation_spec_from_axes_to_perm({k: tuple(names_of(spec, k)) for k in a})
    arrays = [{k: jax.numpy.asarray(t.numpy()) for k, t in w.items()} for w in (a, b)]
    found = code.weight_matching(jax.random.PRNGKey(0), made, *arrays, silent=True)
    return {g: torch.from_numpy(np.array(o)).long() for g, o in found.items()}


def public_sequence(
    jax: Any, spec: PermutationSpec, a: State, code: Any
) -> Callable[[], Callable[[int], list[int]]]:
    """The orders in which the public code visits, as places of our groups."""
    theirs = list(
        code.permutation_spec_from_axes_to_perm({k: tuple(names_of(spec, k)) for k in a}).perm_to_axes
    )
    groups = [g for g in spec.sizes if g in theirs]

    def fresh() -> Callable[[int], list[int]]:
        counter = iter(range(1000))

        def draw(n: int) -> list[int]:
            key = jax.random.fold_in(jax.random.PRNGKey(0), hash(next(counter)))
            return [groups.index(theirs[int(i)]) for i in jax.random.permutation(key, n)]

        return draw

    return fresh


def seeded() -> Callable[[int], list[int]]:
    generator = torch.Generator().manual_seed(0)
    return lambda n: torch.randperm(n, generator=generator).tolist()


def run() -> None:
    loaded = load_public()
    for name, make, example in (
        ("MLP 784-512-512-512-10", mlp, torch.randn(1, 784)),
        ("VGG-16", vgg16, torch.randn(1, 3, 32, 32)),
    ):
        torch.manual_seed(0)
        nets = make(), make()
        spec = PermutationSpec.from_module(nets[0], example)
        keys = matched_tensors(spec, nets[0].state_dict())
        a, b = ({k: net.state_dict()[k] for k in keys} for net in nets)

        def value(orders: Orders, spec: PermutationSpec = spec, a: State = a, b: State = b) -> float:
            return sum(
                float((t.double() * spec.permuted(k, b[k], orders).double()).sum()) for k, t in a.items()
            )

        def same(x: Orders, y: Orders, value: Callable[[Orders], float] = value) -> None:
            one, two = value(x), value(y)
            alike = np.mean([float((x[g] == y[g]).double().mean()) for g in x])
            print(f"  sum of products {one:.6f} and {two:.6f}; {alike:.1%} of the units in the same place")
            assert one > two - 1e-5 * abs(two), f"{one} under the peer's {two}"

        rounds = 7 if make is mlp else 3
        race(
            name,
            lambda spec=spec, a=a, b=b: ours(spec, a, b, seeded()),
            lambda spec=spec, a=a, b=b: sweeps(spec, a, b, seeded()),
            peer="scipy sweeps",
            rounds=rounds,
            check=same,
            target=2.0,
            unit="s",
        )
        if isinstance(loaded, str):
            missing("git-re-basin weight_matching", loaded)
            continue
        code, jax = loaded
        fresh = public_sequence(jax, spec, a, code)
        race(
            name,
            lambda spec=spec, a=a, b=b, fresh=fresh: ours(spec, a, b, fresh()),
            lambda spec=spec, a=a, b=b, code=code, jax=jax: public(code, jax, spec, a, b),
            peer="git-re-basin (JAX)",
            rounds=rounds,
            check=same,
            target=2.0,
            unit="s",
        )


if __name__ == "__main__":
    main(run)
