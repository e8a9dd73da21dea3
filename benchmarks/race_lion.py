"""Lion's step against lion-pytorch, google/automl (point GOOGLE_AUTOML at a clone) and pytorch_optimizer, with the byte
floor; and the program search: what the cache, and runs as one batched program, save.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from _optimizers import ENTRIES, race_entry
from _timer import main, race
from gradmatch.core.cpu import threads
from gradmatch.datasets import digits
from gradmatch.optim import ProgramOptimizer, ProgramSearch, programs
from gradmatch.optim.program_search import MLPTask

MUTATIONS = 300


def proxy() -> MLPTask:
    found = digits().train
    order = torch.randperm(len(found.y), generator=torch.Generator().manual_seed(0))
    x, y = found.x[order], found.y[order]
    return MLPTask((x[:600], y[:600]), (x[600:1000], y[600:1000]), lr=0.01)


def loops(task: MLPTask) -> float:
    """The same score by a torch module and an optimizer for each run."""
    x, y = task.train.x.flatten(1), task.train.y
    _, _, parts, _, _, rows = task._start(x.shape[1], 10, len(x))
    found = []
    for run in range(task.runs):
        net = nn.Sequential(nn.Linear(x.shape[1], task.hidden), nn.ReLU(), nn.Linear(task.hidden, 10))
        start = [parts[0][run].T, parts[1][run, 0], parts[2][run].T, parts[3][run, 0]]
        with torch.no_grad():
            for p, value in zip(net.parameters(), start, strict=True):
                p.copy_(value)
        optimizer = ProgramOptimizer(net.parameters(), programs.adamw(), lr=task.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
        for t in range(task.steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows[t, run]]), y[rows[t, run]]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found.append(float(F.cross_entropy(net(task.validation.x.flatten(1)), task.validation.y)))
    return sum(found) / len(found)


def same_score(a: float, b: float) -> None:
    assert abs(a - b) < 1e-3 * b, f"{a} and {b}"


def same_history(a: object, b: object) -> None:
    assert a == b, "the histories differ"


def run() -> None:
    race_entry(ENTRIES["lion"])
    task = proxy()
    with threads(1):
        race(
            "score of a program, two runs of 60 steps",
            lambda: task(programs.adamw()),
            lambda: loops(task),
            peer="torch modules and autograd",
            check=same_score,
            target=2.0,
        )
        race(
            f"search of {MUTATIONS} mutations",
            lambda: ProgramSearch(tasks=task).run(MUTATIONS).history,
            lambda: ProgramSearch(tasks=task, cache=False).run(MUTATIONS).history,
            peer="no cache",
            rounds=3,
            warmup=0,
            check=same_history,
            target=2.0,
            unit="s",
        )


if __name__ == "__main__":
    main(run)
