"""A boosted last layer for a trained network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.optim.gbnn import GBNNClassifier


def boost_head(
    network: nn.Module, loader: Iterable[Any], *, head: str | None = None, **options: Any
) -> nn.Module:
    """A copy of a classifier whose last layer is replaced by a boosted one, on the frozen features before it.

    Args:
        network: its last linear layer, or the module named ``head``, takes features (b, d) and gives logits.
        loader: batches (x, y) or dictionaries with "labels" (as Hugging Face models take), labels 0..C-1.
        options: of :class:`GBNNClassifier`. Features are standardised, and that is folded into the new head.

    Returns:
        The copy, whose new head gives logits (b, C) of which the softmax is the boosted probability; it can be tuned
        on. The fitted estimator is its attribute ``boosted``.

    Raises:
        InputError: no such layer, features that are no rows, labels that are not 0..C-1.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batches = [(torch.randn(30, 4, 4), torch.arange(30) % 3)]
    >>> boost_head(net, batches, total_units=6, random_state=0)(torch.randn(2, 4, 4)).shape
    torch.Size([2, 3])
    """
    name, layer = _head(network, head)
    rows, labels = _features(network, layer, loader)
    checks.labels("labels", torch.from_numpy(labels))
    mean, deviation = rows.mean(0), rows.std(0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    model = GBNNClassifier(**options).fit((rows - mean) / deviation, labels)
    net = model.network_
    weight = net.weight / deviation
    net = replace(net, weight=weight, bias=net.bias - weight @ mean)
    if len(model.classes_) == 2:  # F as the logits -F and F: the softmax has the logit 2 F
        both = np.array([[-1.0], [1.0]])
        net = replace(net, out_weight=both * net.out_weight, out_bias=net.out_bias * both[:, 0])
    found = copy.deepcopy(network)
    found.set_submodule(name, net.module().to(next(layer.parameters())), strict=True)
    object.__setattr__(found, "boosted", model)  # no module, so not among its children
    return found


def _head(network: nn.Module, head: str | None) -> tuple[str, nn.Module]:
    modules = {name: m for name, m in network.named_modules() if name}
    if head is None:
        linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
        checks.require(bool(linear), "network has no nn.Linear inside; name its head.")
        head = linear[-1]
    checks.require(head in modules, f"head is {head!r}; the network has no module of that name.")
    return head, modules[head]


@torch.no_grad()
def _features(network: nn.Module, layer: nn.Module, loader: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the head (n, d), and the labels, over all batches, in eval mode."""
    device = next(network.parameters()).device
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    modes = [(m, m.training) for m in network.modules()]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float().cpu()))
    network.eval()
    try:
        for batch in loader:
            if isinstance(batch, Mapping):
                network(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
                labels.append(torch.as_tensor(batch["labels"]).cpu())
            else:
                network(batch[0].to(device))
                labels.append(torch.as_tensor(batch[1]).cpu())
    finally:
        hook.remove()
        for m, training in modes:
            m.training = training
    checks.require(bool(seen), "loader gave no batch, or the network never used its head.")
    checks.require(
        all(f.ndim == 2 for f in seen),
        f"the head takes features of shape {tuple(seen[0].shape)}; they must be rows (b, d).",
    )
    rows, y = torch.cat(seen), torch.cat(labels)
    checks.same_length("features", rows, "labels", y)
    return checks.finite("features", rows).double().numpy(), y.numpy()
