"""Models of several initialisations brought to the order of the first one's units, for ``gradmatch merge``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradmatch.core import checks

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.core.state_dicts import StateDict


def permuted(models: Sequence[str], sources: Sequence[StateDict]) -> list[StateDict]:
    """The first model as it lies on disk, and every other in memory with its units matched to the first one's.

    Raises:
        InputError: models without their networks, or a network of which no units may be permuted.
    """
    from gradmatch.cli._pretrained import is_pretrained, load_model
    from gradmatch.core.assign import PermutationSpec
    from gradmatch.core.state_dicts import open_state_dict
    from gradmatch.weights import weight_match

    for path in models:
        checks.require(
            is_pretrained(path),
            f"--method permute runs the network to see its units, and {path!r} is no Hugging Face folder; use "
            "'gradmatch match-weights' for networks of your own.",
        )
    network = load_model(models[0], "A")
    try:
        spec = PermutationSpec.from_module(network, _example(network))
    except checks.InputError as error:
        raise checks.InputError(
            f"--method permute cannot follow the units of {models[0]!r}: {error}"
        ) from error
    checks.require(
        bool(spec.sizes), f"--method permute finds no units in {models[0]!r} that may be permuted."
    )
    target, found = network.state_dict(), [sources[0]]
    for path in models[1:]:
        own = load_model(path, path).state_dict()
        moved = weight_match(spec, target, own).apply(own)
        kept = {
            name: moved[name] for name in sources[0].specs if name in moved
        }  # tied names stand there once
        found.append(open_state_dict(kept, path))
    return found


def _example(network: nn.Module) -> dict[str, Any]:
    """A small input of the kind that the network's configuration tells."""
    config: Any = network.config
    if isinstance(getattr(config, "vocab_size", None), int):
        return {"input_ids": torch.arange(6)[None] % config.vocab_size}
    size, channels = (getattr(config, name, None) for name in ("image_size", "num_channels"))
    checks.require(
        isinstance(size, int) and isinstance(channels, int),
        f"--method permute does not know what a {type(network).__name__} reads.",
    )
    side, count = int(size or 0), int(channels or 0)
    return {"pixel_values": torch.linspace(0, 1, count * side * side).reshape(1, count, side, side)}
