"""Where to split a supernet: ours against the plain loop over edges, operations and repeats, with the same decision.

The loop is what the public scripts do: for each edge, each repeat draws an architecture and a batch, each
operation is put on the edge alone as one-hot weights of the mixture, and cosine distances are taken pair by
pair on the lists of shared gradients. Ours takes each distinct path of a draw once for all edges and one
product of gradient rows for each. So that both decide on the same draws the loop is given them;
``confidence`` then shows what stopping early saves on top."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from _timer import figure, main, missing, race
from gradmatch.core.distance import gradient_distance
from gradmatch.core.networks import build
from gradmatch.weights import CellSpace, GMSplitter, NASBench201Space, SearchSpace
from gradmatch.weights._partition import best_partition
from gradmatch.weights._splitter import Split, draw, full_encoding

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def loop(space: SearchSpace, net: nn.Module, loader: Batches, repeat: int) -> tuple[int, torch.Tensor]:
    """The edge with the largest score, and all distances."""
    g = torch.Generator().manual_seed(0)
    rests = [draw(space, full_encoding(space), g) for _ in range(repeat)]
    count = len(space.ops[0])
    found = torch.zeros(len(space.edges), count, count)
    for e in range(len(space.edges)):
        own = set(net.edge_parameters(e))
        shared = [p for n, p in net.named_parameters() if n not in own]
        for r, rest in enumerate(rests):
            x, y = loader[r % len(loader)]
            lists = []
            for o in range(count):
                theta = F.one_hot(torch.tensor((*rest[:e], o, *rest[e + 1 :])), count).float()
                loss = F.cross_entropy(net(x, theta), y)
                lists.append(torch.autograd.grad(loss, shared, allow_unused=True, materialize_grads=True))
            for i in range(count):
                for j in range(count):
                    if i != j:
                        found[e, i, j] += float(gradient_distance(lists[i], lists[j], "cosine")) / repeat
    scores = [float(d.triu(1).sum()) - best_partition(d, 2)[1] for d in found]
    return max(range(len(scores)), key=lambda e: scores[e]), found


def same(ours: Split, theirs: tuple[int, torch.Tensor]) -> None:
    off = float((ours.distances - theirs[1]).abs().max())
    print(f"  edge {ours.edge}, groups {ours.groups}; largest difference of a distance {off:.1e}")
    assert ours.edge == theirs[0], "another edge is chosen"
    assert off < 1e-3, f"distances differ by {off}"


def run() -> None:
    missing("skhu101/GM-NAS split_supernet", "scripts, not installable; the loop below is what they do")
    g = torch.Generator().manual_seed(0)
    cell = CellSpace()
    images: Batches = [(torch.randn(64, 64, generator=g), torch.arange(64) % 10) for _ in range(8)]
    net = build(cell.supernet, 0)
    race(
        "CellSpace, batch 64, repeat 20",
        lambda: GMSplitter(cell, repeat=20).choose(net, images),
        lambda: loop(cell, net, images, 20),
        peer="loop",
        rounds=3,
        check=same,
        target=5.0,
    )
    split = GMSplitter(cell, repeat=200, confidence=0.95).choose(net, images)
    figure("draws of 200 until 95 % of bootstrap samples agree", draws=split.draws)
    big = NASBench201Space(channels=16, cells=1)
    photos: Batches = [(torch.randn(48, 3, 32, 32, generator=g), torch.arange(48) % 10) for _ in range(2)]
    large = build(big.supernet, 0)
    race(
        "NAS-Bench-201, C=16, N=1, batch 48, repeat 1",
        lambda: GMSplitter(big, repeat=1).choose(large, photos),
        lambda: loop(big, large, photos, 1),
        peer="loop",
        rounds=3,
        check=same,
        target=5.0,
        unit="s",
    )


if __name__ == "__main__":
    main(run)
