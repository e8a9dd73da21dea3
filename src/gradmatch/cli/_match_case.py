"""What ``gradmatch match-weights`` reads: two networks of one architecture, an input, and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.datasets import Split


@dataclass(frozen=True)
class Case:
    """Two networks of one architecture, an input, and data by the name of their split."""

    a: nn.Module
    b: dict[str, Tensor]
    example: Any
    loss: str
    splits: dict[str, Any]


def read(
    first: str,
    second: str,
    network: str | None,
    data: str | None,
    examples: int,
    width: int = 32,
    size: int | None = None,
    split: Split | None = None,
) -> Case:
    """Everything from disk, refused before any work where it does not fit together."""
    from gradmatch.cli._pretrained import is_pretrained
    from gradmatch.core import checks

    if is_pretrained(first):
        checks.require(network is None, "--network is given, but A is a folder that names its own.")
        return _pretrained_case(first, second, data, examples)
    checks.require(
        network is not None,
        f"A is {first!r}, a file of weights; say which network they belong to by --network.",
    )
    assert network is not None
    if data is not None:
        from gradmatch.cli._distill import load_data

        split = load_data(data, size)
    assert split is not None
    return _own_case(first, second, network, split, examples if data is not None else 0, width)


def stand_in(shape: str | None, classes: int) -> Split:
    """Random inputs of a shape, where a network is to be run without data.

    Raises:
        InputError: no shape, or one that is none.
    """
    import torch

    from gradmatch.core import checks
    from gradmatch.core.examples import Examples
    from gradmatch.datasets import Split

    checks.require(
        shape is not None,
        "--network is run on an input to see which units belong together; give --data, or the shape of one --input.",
    )
    sizes = [checks.whole("--input", k) for k in (shape or "").split(",")]
    count = checks.whole("--classes", classes)
    x = torch.rand(count, *sizes, generator=torch.Generator().manual_seed(0))
    drawn = Examples(x, torch.arange(count), count)
    return Split(drawn, drawn, (), "random")


def _own_case(first: str, second: str, network: str, split: Split, examples: int, width: int) -> Case:
    import copy

    from gradmatch.cli._network import network_for
    from gradmatch.core import checks
    from gradmatch.core.networks import build
    from gradmatch.core.state_dicts import open_state_dict

    a = build(network_for(network, split.train, width), 0).eval()
    other = copy.deepcopy(a)
    for name, path, module in (("A", first, a), ("B", second, other)):
        try:
            module.load_state_dict(open_state_dict(path, name).tensors())
        except RuntimeError as error:
            raise checks.InputError(
                f"{name} {path!r} does not fit --network: {' '.join(str(error).split())[:200]}."
            ) from error
    splits = {
        name: (own.x[:examples], own.y[:examples])
        for name, own in (("train", split.train), ("test", split.test))
    }
    return Case(
        a,
        other.state_dict(),
        split.train.x[:1],
        "cross_entropy",
        {k: v for k, v in splits.items() if len(v[1])},
    )


def _pretrained_case(first: str, second: str, data: str | None, examples: int) -> Case:
    from gradmatch.cli import _pretrained
    from gradmatch.cli._distill import load_data
    from gradmatch.cli._permute import _example
    from gradmatch.core import checks

    a, b = _pretrained.load_model(first, "A"), _pretrained.load_model(second, "B").state_dict()
    example, kind = _example(a), type(a).__name__
    if data is None:
        return Case(a, b, example, "cross_entropy", {})
    if kind.endswith("ForImageClassification"):
        split = load_data(data, None)
        parts = (("train", split.train), ("test", split.test))
        splits: dict[str, Any] = {
            name: {"pixel_values": own.x[:examples], "labels": own.y[:examples]}
            for name, own in parts
            if len(own)
        }
        return Case(a, b, example, "cross_entropy", splits)
    checks.require(
        kind.endswith(("ForCausalLM", "LMHeadModel")),
        f"A is a {kind}; with --data it must be an image classifier or a causal language model.",
    )
    tokenizer = _pretrained.load_tokenizer(first, "A")
    length = min(128, int(getattr(a.config, "max_position_embeddings", 128)))
    ids = _pretrained.windows(tokenizer, _pretrained.texts(data), length, examples)
    return Case(a, b, example, "next_token", {"text": {"input_ids": ids}})
