"""The KV cache: blocks of token slots, shared by reference count, found again by the hash of what they hold.

The bookkeeping (`BlockPool`) is plain Python and knows no tensor; the storage (`KVCache`) is one pair of tensors per
layer. Paging after PagedAttention (Kwon et al. 2023, section 4); prefix reuse by hash chain over full blocks.
"""

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from workers.engine.errors import OutOfBlocks
from workers.engine.transfer import to_device


class BlockPool:
    """Hands out block numbers 0..count-1 and remembers which full blocks hold which tokens.

    A block with references belongs to sequences. A block without references is either blank or *cached*: still found by
    its hash until it is needed for something else, least recently used first.
    """

    def __init__(self, count: int, block_size: int) -> None:
        self.count = count
        self.block_size = block_size
        self._references = [0] * count
        self._blank = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, bytes] = OrderedDict()
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        return self.count - self.free

    def allocate(self) -> int:
        """Return a block with one reference and undefined content. Raises `OutOfBlocks`."""
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block, digest = self._cached.popitem(last=False)
            del self._block_of_hash[digest]
            del self._hash_of_block[block]
        else:
            raise OutOfBlocks
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference."""
        self._references[block] += 1

    def references(self, block: int) -> int:
        """Return how many holders the block has."""
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def release(self, block: int) -> None:
        """Take a reference away; at the last one the block becomes cached (when it is registered) or blank."""
        self._references[block] -= 1
        if self._references[block]:
            return
        digest = self._hash_of_block.get(block)
        if digest is None:
            self._blank.append(block)
        else:
            self._cached[block] = digest

    def register(self, block: int, digest: bytes) -> None:
        """Remember that the full block ``block`` holds what ``digest`` names; the first holder of a digest keeps it."""
        if digest not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[digest] = block
            self._hash_of_block[block] = digest

    def forget(self, block: int) -> None:
        """Take back what `register` said of a block that has references."""
        digest = self._hash_of_block.pop(block, None)
        if digest is not None:
            del self._block_of_hash[digest]

    def find(self, digest: bytes) -> int | None:
        """Return the block that holds ``digest``, with a reference added, or None."""
        block = self._block_of_hash.get(digest)
        if block is None:
            return None
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1
        return block


def chain_hash(previous: bytes, ids: np.ndarray) -> bytes:
    """Return the name of a full block: a digest of its token ids (int64 ``[block_size]``) and of all before it."""
    return hashlib.blake2b(ids.tobytes(), key=previous, digest_size=16).digest()


def salt_hash(salt: str) -> bytes:
    """Return the chain's start for a tenant and adapter: blocks of different salts never match."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps per token."""

    kv_heads: int
    key_dim: int
    value_dim: int


class KVCache:
    """Storage of all layers: keys and values, each ``[blocks, block_size, kv_heads, head_dim]``.

    ``by_head``: the layout of the C step, for layers that are all alike: keys ``[blocks, kv_heads, head_dim,
    block_size]`` and values ``[blocks, kv_heads, block_size, head_dim]``, all layers of a block side by side in memory.
    A new block then touches one stretch of fresh memory, not one in each layer, which the system has to clear.
    """

    def __init__(
        self,
        shapes: list[LayerShape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_head: bool = False,
    ) -> None:
        self.block_size = block_size
        if by_head:
            heads, size = shapes[0].kv_heads, shapes[0].key_dim
            whole = _zeros((blocks, 2 * len(shapes), heads * size * block_size), dtype, device)
            self.keys = [whole[:, n].view(blocks, heads, size, block_size) for n in range(0, 2 * len(shapes), 2)]
            self.values = [whole[:, n].view(blocks, heads, block_size, size) for n in range(1, 2 * len(shapes), 2)]
            return
        self.keys = [_zeros((blocks, block_size, s.kv_heads, s.key_dim), dtype, device) for s in shapes]
        self.values = [_zeros((blocks, block_size, s.kv_heads, s.value_dim), dtype, device) for s in shapes]

    @staticmethod
    def bytes_per_block(shapes: list[LayerShape], block_size: int, dtype: torch.dtype) -> int:
        return sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes) * block_size * dtype.itemsize

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer: the write after a fork."""
        source = to_device([c[0] for c in copies], self.keys[0].device)
        target = to_device([c[1] for c in copies], self.keys[0].device)
        for storage in (*self.keys, *self.values):
            storage.index_copy_(0, target, storage.index_select(0, source))

    def clear(self, blocks: list[int]) -> None:
        """Fill blocks with zeros, so that what is no number in them spreads to nobody."""
        index = to_device(blocks, self.keys[0].device)
        for storage in (*self.keys, *self.values):
            storage.index_fill_(0, index, 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on the CPU from pages that take no memory until they are written (torch would write them now).

    Zeros and not just any memory: attention multiplies what it masks by nothing, and nothing times NaN is NaN.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
