"""The side of Tailrace that knows tokens: the pool and its model workers."""
