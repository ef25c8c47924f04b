"""A sequence: one row of the batch, that is, one choice of one job while it is being generated."""

from enum import Enum, auto

import numpy as np
import torch
from llguidance import LLMatcher

from workers.engine.errors import OutOfBlocks
from workers.engine.kv_cache import BlockPool, chain_hash, salt_hash
from workers.messages import EmbedJob, GenerateJob, Job, TokenLogprobs


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Token ids of prompt and output, and how many of them the KV cache holds.

    ``ids[:length]`` are the tokens so far, ``prompt_length`` of them given. Tokens ``ids[:computed]`` have their keys
    and values in the blocks of ``blocks``. A decoding sequence has exactly one token that is not computed; anything
    more is prefill, be it a new prompt or one that was preempted.
    """

    def __init__(self, job: Job, choice: int, ids: list[int], capacity: int) -> None:
        self.job = job
        self.choice = choice
        self.state = State.WAITING
        self.prompt_length = len(job.prompt)
        self.length = len(ids)
        self.ids = np.zeros(max(capacity, self.length), dtype=np.int64)
        self.ids[: self.length] = ids
        self.computed = 0
        self.cached_tokens = 0
        # Admitted, but not in any pass yet: a single pending token is then still prompt.
        self.fresh = True
        # The job's choices or beams are sequences of their own now.
        self.forked = False
        self.blocks: list[int] = []
        self._hashes: list[bytes] = []
        salt = f"{job.adapter}\0{job.salt}" if isinstance(job, GenerateJob) else ""
        self._salt = salt_hash(salt)
        # Where the text stands in the job's grammar; None without one.
        self.matcher: LLMatcher | None = None
        # Scores of the output so far, when the job asks for them and is a beam search; of the prompt, when it asks.
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_scored = not (isinstance(job, GenerateJob) and job.prompt_logprobs is not None)
        # Sum of the last hidden states so far, for an embedding job only: float64 [hidden_size].
        self.hidden_sum: torch.Tensor | None = None

        self.is_embedding = isinstance(job, EmbedJob)
        self._plain = isinstance(job, GenerateJob) and _takes_likeliest(job)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest one."""
        return self._plain and self.matcher is None

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.length - self.computed

    @property
    def output_length(self) -> int:
        return self.length - self.prompt_length

    def append(self, token: int) -> None:
        self.ids[self.length] = token
        self.length += 1

    def restart(self) -> None:
        """Forget the output: back to the prompt alone. Blocks must have been released."""
        self.length = self.prompt_length
        self.forked = False
        self.logprobs = []
        self._hashes = []
        if self.matcher is not None:
            self.matcher.reset()

    def output_ids(self) -> list[int]:
        ids: list[int] = self.ids[self.prompt_length : self.length].tolist()
        return ids

    # --- blocks -------------------------------------------------------------------------------------------------------

    def take_cached_prefix(self, pool: BlockPool) -> int:
        """Adopt the blocks of the pool that hold the beginning of this sequence; return the number of tokens saved.

        At least one token stays to be computed, because its logits are wanted. An embedding needs the hidden states of
        all its tokens, and scores of the prompt need its logits, so they adopt nothing.
        """
        if self.is_embedding or not self.prompt_scored:
            return 0
        size = pool.block_size
        for index in range((self.length - 1) // size):
            block = pool.find(self._hash(index, size))
            if block is None:
                break
            self.blocks.append(block)
        self.computed = len(self.blocks) * size
        return self.computed

    def blocks_needed(self, tokens: int, block_size: int) -> int:
        """Blocks to add so that ``tokens`` more tokens fit behind the computed ones."""
        return max(0, -(-(self.computed + tokens) // block_size) - len(self.blocks))

    def reserve(self, tokens: int, pool: BlockPool) -> list[tuple[int, int]]:
        """Make room for ``tokens`` more computed tokens; return the block copies that must happen before the write.

        Raises `OutOfBlocks` and takes nothing when they are not there.
        """
        first = self.computed // pool.block_size
        # Copy on write: the last block is half full and somebody else goes on from it, too.
        copy = bool(self.computed % pool.block_size) and pool.is_shared(self.blocks[first])
        needed = self.blocks_needed(tokens, pool.block_size)
        if pool.free < needed + copy:
            raise OutOfBlocks
        copies: list[tuple[int, int]] = []
        if copy:
            own = pool.allocate()
            copies.append((self.blocks[first], own))
            pool.release(self.blocks[first])
            self.blocks[first] = own
        self.blocks.extend(pool.allocate() for _ in range(needed))
        return copies

    def advance(self, tokens: int, pool: BlockPool) -> None:
        """Note that ``tokens`` more tokens are computed; blocks that are full now can be found by others."""
        before = self.computed // pool.block_size
        self.computed += tokens
        if self.is_embedding:
            # Nobody takes them up: they would only displace prompts that somebody may send again.
            return
        for index in range(before, self.computed // pool.block_size):
            pool.register(self.blocks[index], self._hash(index, pool.block_size))

    def release_blocks(self, pool: BlockPool) -> None:
        """Give every block back; the sequence would have to be computed again."""
        # Last blocks first: the beginning of a prompt is the likelier one to be wanted again, so it is evicted last.
        for block in reversed(self.blocks):
            pool.release(block)
        self.blocks = []
        self.computed = 0
        self.hidden_sum = None
        self.prompt_logprobs = []

    def fork(self, choice: int, pool: BlockPool) -> "Sequence":
        """Return a copy that shares all blocks with this one."""
        twin = Sequence.__new__(Sequence)
        twin.__dict__.update(self.__dict__)
        twin.choice = choice
        twin.ids = self.ids.copy()
        twin.blocks = list(self.blocks)
        twin._hashes = list(self._hashes)
        twin.logprobs = list(self.logprobs)
        twin.matcher = self.matcher.deep_copy() if self.matcher is not None else None
        for block in twin.blocks:
            pool.share(block)
        return twin

    def _hash(self, index: int, size: int) -> bytes:
        """Return the chain hash of block ``index``. Tokens behind a hashed block never change."""
        while len(self._hashes) <= index:
            at = len(self._hashes)
            previous = self._hashes[-1] if at else self._salt
            self._hashes.append(chain_hash(previous, self.ids[at * size : (at + 1) * size]))
        return self._hashes[index]


def _takes_likeliest(job: GenerateJob) -> bool:
    """Whether nothing but a grammar can keep the job from the likeliest token."""
    p = job.sampling
    changed = p.logit_bias or p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty or job.min_tokens
    return p.temperature == 0 and not changed
