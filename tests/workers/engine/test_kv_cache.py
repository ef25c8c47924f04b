"""Blocks are neither lost nor given twice, and a cached block is found exactly by what it holds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.errors import OutOfBlocks
from workers.engine.kv_cache import BlockPool, KVCache, LayerShape, chain_hash, salt_hash


def test_blocks_run_out_and_come_back() -> None:
    pool = BlockPool(3, 4)
    blocks = {pool.allocate() for _ in range(3)}
    assert blocks == {0, 1, 2}
    with pytest.raises(OutOfBlocks):
        pool.allocate()
    pool.release(1)
    assert pool.allocate() == 1


def test_a_shared_block_is_freed_by_its_last_holder() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.share(block)
    pool.release(block)
    assert pool.used == 1
    pool.release(block)
    assert pool.used == 0


def test_a_registered_block_is_found_until_it_is_needed_for_something_else() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.register(block, b"name")
    pool.release(block)
    assert pool.find(b"name") == block
    pool.release(block)
    assert {pool.allocate(), pool.allocate()} == {0, 1}
    assert pool.find(b"name") is None


def test_the_least_recently_used_block_goes_first() -> None:
    pool = BlockPool(2, 4)
    for name in (b"a", b"b"):
        pool.register(pool.allocate(), name)
    pool.release(0)
    pool.release(1)
    first = pool.find(b"a") if pool.find(b"a") is not None else None
    assert first is not None
    pool.release(first)
    pool.release(first)
    pool.allocate()
    assert pool.find(b"b") is None
    assert pool.find(b"a") is not None


def test_hashes_tell_tenants_and_histories_apart() -> None:
    ids = np.arange(4, dtype=np.int64)
    assert chain_hash(salt_hash("a"), ids) != chain_hash(salt_hash("b"), ids)
    assert chain_hash(chain_hash(salt_hash("a"), ids), ids) != chain_hash(salt_hash("a"), ids)


def _pages_in_memory(tensor: torch.Tensor) -> int:
    """Count the pages of ``tensor`` that have memory, by /proc/self/pagemap: 8 bytes a page, bit 63 says so.

    Unlike the resident size of the process, this does not move with what else the process does.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = tensor.data_ptr() // page, (tensor.data_ptr() + tensor.nbytes - 1) // page
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(8 * first)
        entries = np.frombuffer(pagemap.read(8 * (last - first + 1)), dtype=np.uint64)
    assert len(entries) == last - first + 1
    return int((entries >> np.uint64(63)).sum())


def test_an_unused_cache_takes_no_memory() -> None:
    cache = KVCache([LayerShape(4, 64, 64)] * 8, 2000, 16, torch.bfloat16, torch.device("cpu"))
    tensors = [*cache.keys, *cache.values]
    pages = sum(tensor.nbytes for tensor in tensors) // os.sysconf("SC_PAGE_SIZE")
    assert pages > 50_000
    assert sum(map(_pages_in_memory, tensors)) < pages / 20
    assert not cache.keys[3][1999].any()
    cache.keys[3].fill_(1)
    assert _pages_in_memory(cache.keys[3]) >= cache.keys[3].nbytes // os.sysconf("SC_PAGE_SIZE")


@given(st.lists(st.sampled_from(["allocate", "share", "release", "register", "find"]), max_size=80), st.randoms())
def test_every_block_is_free_or_referenced_and_never_both(steps: list[str], random: object) -> None:
    pool = BlockPool(5, 4)
    held: list[int] = []
    for n, step in enumerate(steps):
        if step == "allocate" and pool.free:
            block = pool.allocate()
            assert block not in held
            held.append(block)
        elif step == "share" and held:
            pool.share(held[n % len(held)])
            held.append(held[n % len(held)])
        elif step == "release" and held:
            pool.release(held.pop(n % len(held)))
        elif step == "register" and held:
            pool.register(held[n % len(held)], bytes([n % 7]))
        elif step == "find":
            found = pool.find(bytes([n % 7]))
            if found is not None:
                held.append(found)
        assert pool.used == len(set(held))
