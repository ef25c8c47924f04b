"""The engine of a model worker: continuous batching over a block KV cache. Knows token ids, never text."""
