"""Does a model find its way in the gallery of an older one? Open-set search over all pairs of a sequence of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._batches import OrderedData
from gradmatch.core.tap import evaluating
from gradmatch.embed.stationary import unit_rows

__all__ = ["average_accuracy", "average_compatibility", "compatibility_matrix"]


@torch.no_grad()
def compatibility_matrix(
    models: Sequence[nn.Module], query: Any, gallery: Any, *, batch_size: int = 500
) -> Float[Tensor, "t t"]:
    """C[i, j] for j <= i: share of queries, embedded by model i, whose nearest template of model j is their identity's.

    A template is the mean of the normalised features of an identity's gallery images, normalised. Every model embeds
    the gallery once and the queries once. Queries whose identity the gallery does not have are misses.

    Args:
        models: in the order of their updates; each gives features (n, d). Evaluated in eval mode.
        query, gallery: labelled images of classes that no model has seen: (x, y), a ``Dataset`` or ``DataLoader``.
        batch_size: of data without batches.

    Returns:
        (T, T) float64 in [0, 1]; NaN above the diagonal, where a new gallery would meet an old model.

    Raises:
        InputError: no models, features of different widths, or features without direction.
    """
    checks.require(len(models) > 0, "models is empty; at least one is needed.")
    templates, queries = [], []
    identities = asked = torch.empty(0)
    for k, model in enumerate(models):
        features, owners = _embedded(model, gallery, f"features of models[{k}]", batch_size)
        identities, of = torch.unique(owners, return_inverse=True)
        sums = torch.zeros(len(identities), features.shape[1]).index_add_(0, of, features)
        templates.append(unit_rows(f"templates of models[{k}]", sums))
        features, asked = _embedded(model, query, f"features of models[{k}]", batch_size)
        queries.append(features)
    widths = {t.shape[1] for t in templates}
    checks.require(
        len(widths) == 1,
        f"models give features of {sorted(widths)} numbers; they can be compared only if they are equally many.",
    )
    found = torch.full((len(models), len(models)), torch.nan, dtype=torch.float64)
    for i, own in enumerate(queries):
        nearest = torch.stack([(own @ t.T).argmax(1) for t in templates[: i + 1]])
        found[i, : i + 1] = (identities[nearest] == asked).double().mean(1)
    return found


def _embedded(model: nn.Module, data: Any, name: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Normalised features and labels, on the CPU."""
    features, labels = [], []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        for batch in OrderedData(data, batch_size, check_order=False):
            inputs = batch.inputs
            moved = (
                {k: v.to(device) for k, v in inputs.items()}
                if isinstance(inputs, dict)
                else inputs.to(device)
            )
            features.append(unit_rows(name, model(moved).float()).cpu())
            labels.append(batch.target.cpu())
    return torch.cat(features), torch.cat(labels)


def average_compatibility(matrix: Float[Tensor, "t t"]) -> float:
    """AC: share of pairs j < i with C[i, j] > C[j, j], in [0, 1]; ties fail.

    So a model compared with copies of itself has 0. One model has 1 by definition.
    """
    c = _square(matrix)
    if len(c) == 1:
        return 1.0
    i, j = torch.tril_indices(len(c), len(c), -1)
    return float((c[i, j] > c[j, j]).double().mean())


def average_accuracy(matrix: Float[Tensor, "t t"]) -> float:
    """AA: mean of C over j <= i, in percent. Zeros count as zeros (the released helper takes them for missing)."""
    c = _square(matrix)
    i, j = torch.tril_indices(len(c), len(c))
    return 100 * float(c[i, j].mean())


def _square(matrix: Any) -> Tensor:
    c = torch.as_tensor(matrix, dtype=torch.float64)
    checks.require(
        c.ndim == 2 and c.shape[0] == c.shape[1] and len(c) > 0,
        f"matrix has shape {tuple(c.shape)}; it must be (models, models).",
    )
    lower = c[tuple(torch.tril_indices(len(c), len(c)))]
    checks.require(
        bool(((lower >= 0) & (lower <= 1)).all()),
        "matrix must have shares between 0 and 1 on and below its diagonal.",
    )
    return c
