"""JLCM: codebooks and mappings learned jointly (Yvinec, Dapogny, Bailly; ICLR 2024, arXiv 2309.17361).

A layer's weights become indices into small codebooks, log2(K) bits each: W^[o, i] = s_g C_b[I[o, i]].

1. Neurons are grouped by the distribution of their weights and put in order of their groups, the order folded into
   the layers around, so that a group costs a boundary and no ids. Either each group has a codebook ("codebooks") or
   all share one and each has a scale ("scales").
2. Codes start as the exact 1-D k-means of the weights, indices as the nearest codes.
3. Layer after layer, codes and indices are learned by Adam on |f(W, x) - f(W^, x^)|^2, before the activation, with x
   from the float network and x^ from the one compressed so far. Codes take their gradient; indices a proximal
   surrogate that reaches near codes first (:mod:`gradmatch.weights._mapping`).

No public code and not the full text were at hand: points marked [reading] there follow from the abstract, the caption
of the paper's figure 1 and its reviews.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core._safetensors import aligned, header
from gradmatch.core.state_dicts import Spec, open_state_dict
from gradmatch.core.tap import evaluating
from gradmatch.weights._coded import PARTS, coded_layer, matrix_of, replace
from gradmatch.weights._compressed import CompressedModel, in_half_precision
from gradmatch.weights._layerwise import by_output, calibration_batches, chosen, few, pairs
from gradmatch.weights._mapping import Learning, started
from gradmatch.weights._neurons import even_ends, grouped

__all__ = ["CompressedModel", "Compression", "LayerReport", "compress"]

VARIANTS, OBJECTIVES = ("codebooks", "scales"), ("output", "weight")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name, shape: of the weight as a matrix (out, in).
        groups: of neurons.
        error_kmeans, error: relative squared error of the outputs on the calibration data (without data: of the
            weights), at the k-means start and in the end.
        moved: share of weights that ended at another code than the nearest.
        jump: mean length of the changes of code in the run, in units of the codes' range.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    error_kmeans: float
    error: float
    moved: float
    jump: float


@dataclass(frozen=True)
class Compression:
    """The outcome of :func:`compress` in figures.

    Attributes:
        bytes: of the file that :meth:`CompressedModel.save` writes, by the formula: |W| bits / 8, 2 for each code,
            scale and other parameter, 4 for each boundary, and the header.
        dense_bytes: of the tensors of the model as given.
        layers: one report for each coded layer, in the order of the run.
    """

    bytes: int
    dense_bytes: int
    layers: tuple[LayerReport, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the model's tensors."""
        return self.dense_bytes / self.bytes

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self) | {"ratio": self.ratio}


@torch.no_grad()
def compress(
    model: nn.Module,
    calibration: Any = None,
    *,
    bits: int = 3,
    groups: int = 4,
    variant: str = "codebooks",
    objective: str = "output",
    steps: int = 1000,
    batch_size: int = 64,
    examples: int = 1024,
    lr_codes: float = 1e-2,
    lr_map: float = 1e-3,
    grad: str | None = "proximal",
    map_init: str = "onehot",
    map_opt: str = "shared",
    candidates: int | str = 8,
    reorder: bool = True,
    layers: Callable[[str], bool] | None = None,
    keep_first_last: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[CompressedModel, Compression]:
    """Compress a trained network's Linear and convolution layers to ``bits`` bits a weight.

    Args:
        model: any network, a transformers model too; it stays as it is.
        calibration: a few hundred inputs like those in use, unlabelled or labelled: tensors, a ``Dataset``, a loader, a
            dict of keyword arguments, or batches of these.
        bits: 1 to 8; K = 2^bits codes.
        groups: of neurons in each layer.
        variant: "codebooks" (one for each group) or "scales" (one codebook, a scale for each group).
        objective: "output", or "weight": k-means alone, without data.
        steps: of Adam for each layer; 0 leaves the k-means start.
        batch_size: inputs (or positions of linear layers' inputs) of a step.
        examples: calibration inputs at most, 1024 as customary.
        lr_codes: in units of the mean size of a code.
        lr_map: of the logits; with 1e-2 codes oscillate.
        grad: gradient of the mapping: "proximal", "proximal-exp", "sign", "default"; None learns codes alone.
        map_init, map_opt: start and optimiser of the logits, see :mod:`gradmatch.weights._mapping`.
        candidates: codes each weight may take, the nearest so many; or "all". Memory is 8 bytes each a weight.
        reorder: put neurons in order of their groups; else groups are even stretches of the order there is.
        layers: which layers, by name; default all Linear and convolution layers.
        keep_first_last: leave the first and last of these in half precision, as is customary.
        seed: of groups and batches.
        device: where the work is done and the result lives; default where the model is.
        progress: called with (steps done, all steps).

    Returns:
        The compressed model (it looks weights up as they are used; ``to_dense()`` gives plain modules) and the figures.

    Raises:
        InputError: options out of range, no layer to compress, more groups than neurons, weights that are not floating
            or not finite, no calibration data, or a network that does not run on it.

    Warns:
        Layers whose order is fixed (logits), or all of a network that cannot be traced, get one group; layers that the
        data does not reach keep the k-means start.

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small, figures = compress(net, torch.randn(64, 8), bits=2, steps=20)
    >>> small(torch.randn(5, 8)).shape, [layer.name for layer in figures.layers]
    (torch.Size([5, 4]), ['2'])
    """
    checks.require(
        isinstance(model, nn.Module), f"model is a {type(model).__name__}; it must be an nn.Module."
    )
    checks.whole("bits", bits, 1, 8)
    checks.whole("groups", groups)
    checks.one_of("variant", variant, VARIANTS)
    checks.one_of("objective", objective, OBJECTIVES)
    width = 2**bits if candidates == "all" else checks.whole("candidates", candidates, 2)
    learning = Learning(steps, batch_size, lr_codes, lr_map, grad, map_init, map_opt, width)
    model = model if device is None else copy.deepcopy(model).to(device)
    data = calibration_batches(calibration, examples, batch_size, model)
    checks.require(
        bool(data) or objective == "weight",
        "calibration is empty; objective='output' needs inputs (objective='weight' does not).",
    )
    names = chosen(model, data, layers, keep_first_last, groups)
    float_net, ends = _in_order(model, names, groups, reorder, data, seed)
    net = in_half_precision(copy.deepcopy(float_net))
    tick = _ticker(progress, steps * len(names))
    reports = []
    with evaluating(float_net), evaluating(net):
        for k, name in enumerate(names):
            matrix = matrix_of(float_net, name)
            start = started(matrix, ends[name], bits, variant)
            seen = pairs(float_net, net, name, data) if objective == "output" else None
            found, energy = by_output(net, name, matrix, start, seen, learning, seed + k, tick)
            replace(net, name, coded_layer(net.get_submodule(name), found.coded))
            errors = found.error_before / energy, found.error_after / energy
            reports.append(
                LayerReport(name, tuple(matrix.shape), len(start.ends), *errors, found.moved, found.jump)
            )
    compressed = CompressedModel(net)
    return compressed, Compression(_predicted(compressed), _nbytes(model), tuple(reports))


def _ticker(progress: Callable[[int, int], object] | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _in_order(
    model: nn.Module, names: list[str], groups: int, reorder: bool, data: list[Any], seed: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the model with neurons in order of their groups, and the groups' ends of each layer."""
    if reorder and groups > 1:
        checks.require(
            bool(data),
            "calibration is None; to put neurons in order an input is needed, to trace the network with.",
        )
        return grouped(model, names, groups, few(data[0]), seed)
    return copy.deepcopy(model), {n: even_ends(len(matrix_of(model, n)), groups) for n in names}


# --- sizes -------------------------------------------------------------------------------------------------


def _predicted(compressed: CompressedModel) -> int:
    """Bytes of the file: of coded layers by the formula, of all else by type and shape, and of the header."""
    specs = {k: Spec.of(t) for k, t in compressed.stored().items()}
    own = {f"{n}.weight_{k}" for n in compressed.coded for k in PARTS}
    rest = sum(s.nbytes for k, s in specs.items() if k not in own)
    codes = sum(layer.coded.nbytes for layer in compressed.coded.values())
    return len(header(aligned(specs), compressed.header())) + rest + codes


def _nbytes(model: nn.Module) -> int:
    return sum(s.nbytes for s in open_state_dict(model).specs.values())
