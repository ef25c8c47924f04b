"""What the pool counts while it runs."""

import msgspec

from workers.messages import PoolCounters


class Counts(PoolCounters, frozen=False):
    """`PoolCounters` that grow: each is counted where the thing happens."""

    def snapshot(self) -> PoolCounters:
        """Return them as they are now."""
        return PoolCounters(**msgspec.structs.asdict(self))
