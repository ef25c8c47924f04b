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


def test_an_unused_cache_takes_no_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = KVCache([LayerShape(4, 64, 64)] * 8, 2000, 16, torch.bfloat16, torch.device("cpu"))
    size = 2000 * KVCache.bytes_per_block([LayerShape(4, 64, 64)] * 8, 16, torch.bfloat16)
    assert size > 200_000_000
    assert resident() - before < size / 20
    assert not cache.keys[3][1999].any()


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
