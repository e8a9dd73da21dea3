"""For each operation of PyTorch, which axes it joins, cuts and fixes; see :mod:`gradmatch.core._axis_trace`.

A rule is called as ``rule(trace, given, out)`` after the operation ran: ``given`` holds its arguments by the names of
its schema, and ``out`` what it returned. It must say what axes the outputs have; an output it says nothing about
counts as fixed. Operations without a rule fix all axes of what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradmatch.core._axis_nodes import Node, cut, freeze, join, product
from gradmatch.core._axis_shapes import SHAPE_RULES, Given, Rule, Trace, places_of, tensors_of, unit


def pointwise(trace: Trace, given: Given, out: Any) -> None:
    """Axes of equal size are joined as they are broadcast."""
    sources = [trace.of(t) for t in tensors_of(given)]
    for result in [out] if isinstance(out, Tensor) else out:
        nodes = []
        for back in range(1, result.ndim + 1):
            size = result.shape[-back]
            here = [s[-back] for s in sources if len(s) >= back and s[-back].size == size != 1]
            for other in here[1:]:
                join(here[0], other)
            nodes.append(here[0] if here else unit() if size == 1 else Node(size, fixed=True))
        trace.set(result, nodes[::-1])


def same(trace: Trace, given: Given, out: Any) -> None:
    """The (first) output has the input's axes."""
    trace.set(out if isinstance(out, Tensor) else out[0], trace.of(tensors_of(given)[0]))


def along(trace: Trace, given: Given, out: Any) -> None:
    """As ``same``, with the axis worked along fixed (cumulative sums, sorting, rolling)."""
    source = tensors_of(given)[0]
    nodes = trace.of(source)
    for d in places_of(source, given.get("dim", given.get("dims"))):
        freeze(nodes[d])
    for result in [out] if isinstance(out, Tensor) else out:
        kept = [
            n if result.ndim == len(nodes) and n.size == s else Node(s, fixed=True)
            for n, s in zip(nodes, result.shape, strict=False)
        ]
        trace.set(result, kept)


def reduction(trace: Trace, given: Given, out: Any) -> None:
    """A symmetric function over some axes; they vanish, in whatever order their entries were."""
    source = tensors_of(given)[0]
    gone = places_of(source, given.get("dim"))
    nodes = list(trace.of(source))
    left = [n for d, n in enumerate(nodes) if d not in gone]
    kept = [unit() if d in gone else n for d, n in enumerate(nodes)]
    if isinstance(out, Tensor):
        trace.set(out, kept if given.get("keepdim") else left)
        return
    trace.set(out[0], kept if given.get("keepdim") else left)
    if not out[1].is_floating_point():  # of max and min: places of entries, so these must have one
        for d in gone:
            freeze(nodes[d])
    trace.set(out[1], kept if given.get("keepdim") else left)


_FACTORS = (
    ("batch1", "batch2"), ("mat1", "mat2"), ("mat", "vec"), ("self", "mat2"), ("self", "vec"), ("self", "tensor"),
)  # fmt: skip


def matrix_product(trace: Trace, given: Given, out: Any) -> None:
    """mm, bmm, mv, dot and their sums with a third tensor: the contracted axes are joined."""
    names = next(n for n in _FACTORS if all(given.get(k) is not None for k in n))
    first, second = given[names[0]], given[names[1]]
    a, b = trace.of(first), trace.of(second)
    join(a[-1], b[-2] if len(b) > 1 else b[0])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        join(x, y)
    nodes = [*a[:-1], *(b[-1:] if len(b) > 1 else ())]
    if isinstance(given.get("self"), Tensor) and given["self"] is not first:
        _join_right(trace.of(given["self"]), nodes)
    trace.set(out, nodes)


def _join_right(own: Sequence[Node], nodes: Sequence[Node]) -> None:
    for x, y in zip(reversed(own), reversed(nodes), strict=False):
        if x.size == y.size != 1:
            join(x, y)


def linear(trace: Trace, given: Given, out: Tensor) -> None:
    """Input (..., in) times weight (out, in)."""
    source, weight = trace.of(given["input"]), trace.of(given["weight"])
    join(source[-1], weight[1])
    if given.get("bias") is not None:
        join(trace.of(given["bias"])[0], weight[0])
    trace.set(out, [*source[:-1], weight[0]])


def convolution(trace: Trace, given: Given, out: Tensor) -> None:
    """Channels are joined, pixels fixed. With groups, whole groups and places within all groups may change.

    Each of those needs an order of its own; one within the groups is shared by them, since the weight has one axis.
    """
    source, weight = trace.of(given["input"]), trace.of(given["weight"])
    groups = int(given["groups"])
    for node in (*source[2:], *weight[2:]):
        freeze(node)
    outer, inner = (weight[1], weight[0]) if given["transposed"] else (weight[0], weight[1])
    if groups > 1:
        blocks = Node(groups)
        if given["transposed"]:  # weight (in, out / groups)
            join(inner, source[1])
            cut_in = cut(inner, [groups, inner.size // groups], "product")
            join(cut_in[0], blocks)
            outer = product([blocks, outer])
        else:  # weight (out, in / groups)
            join(source[1], product([blocks, inner]))
            join(outer, product([blocks, Node(outer.size // groups)]))
    else:
        join(source[1], inner)
    if given.get("bias") is not None:
        join(trace.of(given["bias"])[0], outer)
    trace.set(out, [source[0], outer, *(Node(s, fixed=True) for s in out.shape[2:])])


def batch_norm(trace: Trace, given: Given, out: Any) -> None:
    """Weight, bias and running statistics go with the channels."""
    source = trace.of(given["input"])
    for key in ("weight", "bias", "running_mean", "running_var"):
        if given.get(key) is not None:
            join(source[1], trace.of(given[key])[0])
    trace.set(out[0] if isinstance(out, tuple | list) else out, source)


def layer_norm(trace: Trace, given: Given, out: Any) -> None:
    """Weight and bias go with the normalised axes."""
    source = trace.of(given["input"])
    for key in ("weight", "bias"):
        if given.get(key) is not None:
            _join_right(trace.of(given[key]), source)
    trace.set(out[0] if isinstance(out, tuple | list) else out, source)


def group_norm(trace: Trace, given: Given, out: Any) -> None:
    """Channels may change places within groups and groups as wholes."""
    source, groups = trace.of(given["input"]), int(given["group"])
    channels = source[1]
    if 1 < groups < channels.size:
        cut(channels, [groups, channels.size // groups], "product")
    for key in ("weight", "bias"):
        if given.get(key) is not None:
            join(channels, trace.of(given[key])[0])
    trace.set(out[0], source)


def embedding(trace: Trace, given: Given, out: Tensor) -> None:
    """Rows have their ids; the features are free."""
    weight = trace.of(given["weight"])
    freeze(weight[0])
    trace.set(out, [*trace.of(given["indices"]), weight[1]])


def spatial(count: int) -> Rule:
    """Pooling, resampling and padding of the last ``count`` axes, whose entries are pixels."""

    def rule(trace: Trace, given: Given, out: Any) -> None:
        nodes = trace.of(tensors_of(given)[0])
        for node in nodes[-count:]:
            freeze(node)
        for result in [out] if isinstance(out, Tensor) else out:
            trace.set(result, [*nodes[:-count], *(Node(s, fixed=True) for s in result.shape[-count:])])

    return rule


_BY_RULE: dict[Rule, str] = {
    **SHAPE_RULES,
    pointwise: "add copy where masked_fill lerp _prelu_kernel _to_copy clamp threshold hardtanh",
    same: "clone detach alias contiguous lift_fresh _softmax _log_softmax _safe_softmax native_dropout zero fill",
    along: "cumsum cumprod flip roll sort argsort topk tril triu logcumsumexp",
    reduction: "sum mean amax amin max min var std var_mean std_mean prod logsumexp any all "
    "linalg_vector_norm norm",
    matrix_product: "mm bmm addmm baddbmm mv dot addmv",
    linear: "linear",
    convolution: "convolution",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_with_update cudnn_batch_norm",
    layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
    group_norm: "native_group_norm",
    embedding: "embedding",
    spatial(1): "reflection_pad1d replication_pad1d upsample_nearest1d upsample_linear1d",
    spatial(2): "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d",
    spatial(3): "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d upsample_trilinear3d",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _BY_RULE.items() for name in names.split()}
