"""Benchmarks: what an erasure does to a model, and what it costs."""
