"""A store of its own for each start of the processes of torchrun, also after a restart."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

__all__ = ["fresh_store", "torchrun_store"]

PAUSE = 0.02  # seconds between two looks of rank 0


def torchrun_store(timeout: timedelta) -> Store:
    """Return the store through which the processes that torchrun started find each other.

    torchrun keeps one store while it restarts failed processes, and torch 2.15 puts no difference
    between their lives: a restarted process reads where a dead one listened, and waits for it.

    Args:
        timeout: after which a process that waits for the others gives up.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return fresh_store(store, rank, world_size, timeout)


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return the part of a shared store that only the processes alive now know of.

    Each process leaves a word that nobody used before, and rank 0 answers every word with the name
    of the part, until all have confirmed that name. Words of dead processes, which may still lie
    there, are answered too, which nobody reads.

    Args:
        store: may hold anything that earlier processes of this job wrote.
        rank: of this process.
        world_size: number of processes that call this.
        timeout: for the whole.

    Raises:
        torch.distributed.DistStoreError: if rank 0 does not answer in time.
        TimeoutError: on rank 0, if a process does not confirm in time.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"d2kit/word/{rank}", word)
        store.wait([f"d2kit/answer/{word}"], timeout)
        name = store.get(f"d2kit/answer/{word}").decode()
        store.set(f"d2kit/confirmed/{name}/{rank}", "")
        return PrefixStore(name, store)
    waiting = set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"d2kit/word/{other}"]):
                store.set(f"d2kit/answer/{store.get(f'd2kit/word/{other}').decode()}", word)
            if store.check([f"d2kit/confirmed/{word}/{other}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(waiting)} of {world_size} have not come in time")
        time.sleep(PAUSE)
    return PrefixStore(word, store)
