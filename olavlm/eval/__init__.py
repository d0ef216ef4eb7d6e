"""Benchmarks: prompts, batched greedy generation, answer parsing, scoring.

Nothing here knows a run folder or a pipeline: `pipelines.evaluate` puts the pieces together.
"""
