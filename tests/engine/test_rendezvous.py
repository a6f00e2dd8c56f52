import threading
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from d2kit.engine.launch import fresh_store, torchrun_store

pytestmark = pytest.mark.faults(19, fast=True)
SECOND = timedelta(seconds=1)


def start(store, world=3, timeout=timedelta(seconds=20), ranks=None):
    """Let the ranks of a life meet; return the store of each, or what it raised."""
    found = {}

    def meet(rank):
        try:
            found[rank] = fresh_store(store, rank, world, timeout)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=meet, args=(r,)) for r in ranks or range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_life_sees_nothing_of_the_one_before():
    store = HashStore()
    lives = [start(store) for _ in range(3)]
    for number, life in enumerate(lives):
        life[1].set("place", str(number))
        assert not life[2].check(["only the first life"])
        lives[0][0].set("only the first life", "")
    for number, life in enumerate(lives):
        assert [life[rank].get("place") for rank in range(3)] == [str(number).encode()] * 3


def test_processes_of_torchrun_have_a_store_of_their_life(monkeypatch):
    """Whatever the installed torch does: some give every life a part of the store, some do not."""
    store, ranks = HashStore(), threading.local()

    def rendezvous(url, timeout):
        assert url == "env://"
        yield store, ranks.own, 2

    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)

    def life():
        found = {}

        def meet(rank):
            ranks.own = rank
            found[rank] = torchrun_store(timedelta(seconds=20))

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    dead = life()
    dead[0].set("address", "where nobody listens any more")
    assert dead[1].check(["address"])
    assert not life()[1].check(["address"])


def test_a_life_that_died_half_way_is_no_hindrance():
    store = HashStore()
    died = start(store, timeout=SECOND / 5, ranks=[1, 2])  # rank 0 never came
    assert all(isinstance(error, Exception) for error in died.values())
    died = start(store, timeout=SECOND / 5, ranks=[0, 2])  # rank 1 never came
    assert isinstance(died[0], Exception)
    life = start(store)
    life[0].set("place", "here")
    assert [life[rank].get("place") for rank in (1, 2)] == [b"here", b"here"]


def test_who_has_not_come_is_named():
    store = HashStore()
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of 3"):
        fresh_store(store, 0, 3, SECOND / 10)
