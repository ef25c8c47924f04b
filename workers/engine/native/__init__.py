"""The decoder step of Llama-like models on the CPU, in C (``csrc``): weights packed for its dot products, a thread
pool of its own, one call for each forward pass.

Models that it does not cover, and machines without a C compiler, run on torch instead.
"""
