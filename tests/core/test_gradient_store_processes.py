"""Gradient stores written by processes that are killed, or by several at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradmatch.core._gradient_store import part_file
from gradmatch.core.problem import Problem
from gradmatch.core.store import GradientStore
from gradmatch.zoo import convnet

PROGRAM = """
import sys, time
sys.path.insert(0, {tests!r})
from test_gradient_store_processes import {make}
from gradmatch.core.store import GradientStore

def slow(done, of):
    print(done, flush=True)
    time.sleep(60)

GradientStore.build({make}(), sys.argv[1], project=16, part_rows=4, progress=slow)
"""


def conv_problem() -> Problem:
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = convnet(channels=1, size=8, classes=3, width=4, depth=1, norm="none")
    return Problem(
        model, "cross_entropy", (torch.randn(50, 1, 8, 8, generator=g), torch.arange(50) % 3), batch_size=4
    )


def gpt2_problem() -> Problem:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    ids = torch.randint(0, 50, (11, 9), generator=torch.Generator().manual_seed(0))
    return Problem(model.eval(), "next_token", {"input_ids": ids}, batch_size=2)


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_killed_and_resumed_gives_the_same_bytes(tmp_path):
    """SIGKILL with the first part on disk, in programs of two threads."""
    pytest.importorskip("transformers")
    tests, jobs = str(Path(__file__).parent), {}
    for make in (conv_problem, gpt2_problem):
        program = PROGRAM.format(tests=tests, make=make.__name__)
        words = [sys.executable, "-c", program, str(tmp_path / make.__name__)]
        jobs[make] = subprocess.Popen(
            words, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "2"}
        )
    for make, job in jobs.items():
        assert job.stdout is not None
        job.stdout.readline()
        job.kill()
        job.wait()
        part = GradientStore(tmp_path / make.__name__)
        assert 0 < len(part.present()) < len(part.manifest["parts"])
        kept = {k: part_file(part.path, k).stat().st_mtime_ns for k in part.present()}
        GradientStore.build(make(), part.path, project=16, part_rows=4)
        GradientStore.build(make(), tmp_path / "unbroken" / make.__name__, project=16, part_rows=4)
        assert content(part.path) == content(tmp_path / "unbroken" / make.__name__)
        assert all(part_file(part.path, k).stat().st_mtime_ns == t for k, t in kept.items())


def test_workers_give_the_bytes_of_one_process(tmp_path):
    pytest.importorskip("joblib")
    seen: list[tuple[int, int]] = []
    GradientStore.build(conv_problem(), tmp_path / "one", project=16, part_rows=8)
    GradientStore.build(
        conv_problem(),
        tmp_path / "two",
        project=16,
        part_rows=8,
        workers=2,
        progress=lambda *at: seen.append(at),
    )
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert seen[-1] == (50, 50)


def test_a_failure_in_a_worker_is_the_same_sentence(tmp_path):
    from gradmatch.core.checks import InputError

    pytest.importorskip("joblib")
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.fill_(1e30)
    broken = Problem(model, "mse", (torch.full((40, 1), 1e20), torch.zeros(40, 2)), batch_size=4)
    with pytest.raises(InputError, match="gradients"):
        GradientStore.build(broken, tmp_path / "g", project=None, part_rows=4, workers=2)
