"""What can go wrong with stored things."""


class StoreError(Exception):
    """The store cannot do it now (disk full, read-only, locked...); ``reason`` is for the log, not for clients."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLarge(StoreError):
    """One record alone is larger than the whole store may be."""


class ChainBroken(Exception):
    """A response that a conversation goes back to is not stored any more; ``missing`` is its id."""

    def __init__(self, missing: str) -> None:
        super().__init__(missing)
        self.missing = missing


class TooMuch(Exception):
    """What is to be read at once is larger than a conversation may be; ``most``: bytes."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most
