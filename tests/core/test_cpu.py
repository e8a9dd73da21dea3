import sys

import pytest
import torch

from gradmatch.core.cpu import keep_freed_memory, side_by_side, threads


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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_side_by_side_keeps_order_shares_threads_and_restores(count):
    before = torch.get_num_threads()

    def work(a, b):
        return a * b, torch.get_num_threads()

    with threads(count):
        found = side_by_side(work, [(k, 2) for k in range(3)])
        assert torch.get_num_threads() == count
    assert [v for v, _ in found] == [0, 2, 4]
    assert {n for _, n in found} == {1}
    assert torch.get_num_threads() == before


def test_side_by_side_raises_the_first_failure_and_starts_no_more():
    started = []

    def work(k):
        started.append(k)
        if k == 0:
            raise KeyError(k)
        return k

    with threads(2), pytest.raises(KeyError):
        side_by_side(work, [(k,) for k in range(500)])
    assert len(started) < 500
    with threads(2):
        assert torch.get_num_threads() == 2


def test_threads_started_later_are_not_left_with_a_share():
    import threading

    with threads(4):
        side_by_side(lambda: None, [(), ()])
        seen = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [4]
