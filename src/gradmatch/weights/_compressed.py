"""Networks some of whose layers are kept as codebooks and indices: call, save, load, make plain again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.state_dicts import Spec, open_state_dict, write_state_dict
from gradmatch.core.store import load_tensors
from gradmatch.weights._coded import (
    PARTS,
    Coded,
    CodedLayer,
    as_matrix,
    coded_layer,
    dense_layer,
    is_compressible,
    replace,
    unpack,
)

FORMAT = "gradmatch-codebooks"


class CompressedModel(nn.Module):
    """A network some of whose layers are coded; called as the network is.

    Attributes:
        network: the network itself, with all its own methods.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        return self.network(*args, **kwargs)

    @property
    def coded(self) -> dict[str, CodedLayer]:
        """The coded layers by their names in the network."""
        return {n: m for n, m in self.network.named_modules() if isinstance(m, CodedLayer)}

    def to_dense(self) -> nn.Module:
        """The network as plain modules, of the same values."""
        dense = copy.deepcopy(self.network)
        for name, layer in self.coded.items():
            replace(dense, name, dense_layer(layer))
        return dense

    def stored(self) -> dict[str, Tensor]:
        """What a file holds: packed indices, codes, scales, boundaries, and other parameters in half precision.

        Tied tensors stand there once. Parameters that half precision would spoil, and buffers, keep their type.
        """
        state = open_state_dict(self.network)
        parameters = {n for n, _ in self.network.named_parameters(remove_duplicate=False)}
        return {k: halved(state.read(k)) if k in parameters else state.read(k) for k in state.specs}

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file; :meth:`load` reads it into a network of the same architecture."""
        checks.require(
            str(path).endswith(".safetensors"), f"path is {str(path)!r}; it must end in .safetensors."
        )
        tensors = self.stored()
        return write_state_dict(
            path,
            {k: Spec.of(t) for k, t in tensors.items()},
            lambda name: [tensors[name]],
            metadata=self.header(),
        )

    def header(self) -> dict[str, str]:
        """The file's metadata: which layers are coded, by how many bits."""
        bits = ",".join(f"{name}:{layer.weight_bits}" for name, layer in self.coded.items())
        return {"format": FORMAT, "layers": bits}

    @classmethod
    def load(cls, path: str | Path, network: nn.Module) -> CompressedModel:
        """The model that :meth:`save` wrote.

        Args:
            path: the .safetensors file.
            network: any network of the architecture that was compressed; it stays as it is. Its types are kept.

        Raises:
            InputError: another kind of file, or one that does not fit the network.
        """
        tensors, layers = _read(Path(path))
        made = copy.deepcopy(network)
        names = dict(made.named_modules())
        for name, bits in layers.items():
            layer = names.get(name)
            checks.require(
                layer is not None and is_compressible(layer),
                f"{path} has codes for the layer {name!r}, which the network does not have.",
            )
            assert layer is not None
            replace(
                made, name, _shell(layer, bits, {k: tensors.get(f"{name}.weight_{k}") for k in PARTS}, name)
            )
        known = open_state_dict(made)
        missing = [k for k in known.specs if k not in tensors]
        extra = [k for k in tensors if k not in known]
        checks.require(not missing, f"{path} has no {checks.listing(missing)}, which the network needs.")
        checks.require(not extra, f"{path} has {checks.listing(extra)}, which the network does not have.")
        try:
            made.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise checks.InputError(
                f"{path} does not fit the network: {' '.join(str(error).split())[:200]}"
            ) from error
        return cls(made)


def halved(tensor: Tensor) -> Tensor:
    """In half precision, where that keeps every value to about three digits; else as it is."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.half()
    off = (half.to(tensor.dtype) - tensor).abs().max() if tensor.numel() else tensor.new_zeros(())
    return half if bool(off <= 1e-3 * tensor.abs().max()) else tensor


@torch.no_grad()
def in_half_precision(network: nn.Module) -> nn.Module:
    """The network itself, its parameters rounded to what a file would hold."""
    for parameter in network.parameters():
        parameter.copy_(halved(parameter).to(parameter.dtype))
    return network


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    from safetensors import safe_open

    tensors, _ = load_tensors(path)
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
    checks.require(header.get("format") == FORMAT, f"{path} is not a compressed model of this library.")
    pairs = [entry.rpartition(":") for entry in header.get("layers", "").split(",") if entry]
    sound = all(name and bits in "12345678" for name, _, bits in pairs)
    checks.require(sound, f"{path} has a header that names no sound layers.")
    return tensors, {name: int(bits) for name, _, bits in pairs}


def _shell(layer: nn.Module, bits: int, parts: dict[str, Tensor | None], name: str) -> nn.Module:
    """A coded layer with the tensors of a file, if they fit each other and the layer."""
    indices, codes, scales, ends = (parts[k] for k in PARTS)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out, count = as_matrix(layer, weight).shape[0], weight.numel()
    checks.require(
        indices is not None
        and codes is not None
        and ends is not None
        and indices.dtype == torch.uint8
        and indices.shape == ((count * bits + 7) // 8,)
        and ends.ndim == 1
        and len(ends) > 0
        and int(ends[-1]) == out
        and bool((torch.diff(ends, prepend=ends.new_zeros(1)) >= 0).all())
        and codes.shape in {(1, 2**bits), (len(ends), 2**bits)}
        and (scales is None or scales.shape == ends.shape),
        f"the codes of layer {name!r} do not fit a weight of shape {tuple(weight.shape)} at {bits} bits.",
    )
    assert indices is not None
    assert codes is not None
    assert ends is not None
    checks.finite(f"codes of layer {name!r}", codes)
    unpacked = unpack(indices, bits, count).reshape(out, -1)
    return coded_layer(layer, Coded(unpacked, codes, scales, ends, bits))
