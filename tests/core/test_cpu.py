import sys

import pytest
import torch

from gradmatch.core.cpu import keep_freed_memory, threads


def test_threads_are_restored_after_an_exception():
    before = torch.get_num_threads()
    inside = []

    def fail():
        with threads(1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == before


def test_keeping_memory_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("GRADMATCH_KEEP_MEMORY", "0")
    assert keep_freed_memory() is False
    monkeypatch.delenv("GRADMATCH_KEEP_MEMORY")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
