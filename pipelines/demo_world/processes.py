"""Rendering over processes. Imports nothing heavy: every spawned process pays for it."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from pipelines.demo_world.scenes import EASY, Level, Rendering, Scene, render, sample_scene, scene_seed

A = TypeVar("A")
B = TypeVar("B")
CHUNK = 100


def in_processes(function: Callable[[A], B], items: list[A], workers: int) -> Iterable[B]:
    """`map` over spawned processes, in order; one worker or one item stays in this process."""
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, items)


def render_split(
    split: str, count: int, seed: int = 0, workers: int = 2, level: Level = EASY
) -> Iterable[tuple[Scene, Rendering]]:
    """The first `count` scenes of a split with their renderings, in order, whatever the number of processes."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    for chunk in in_processes(partial(_render_chunk, split, seed, level), chunks, workers):
        yield from chunk


def _render_chunk(split: str, seed: int, level: Level, indices: range) -> list[tuple[Scene, Rendering]]:
    scenes = [sample_scene(scene_seed(split, index, seed), level) for index in indices]
    return [(scene, render(scene)) for scene in scenes]


def scenes_per_second(level: Level = EASY, count: int = 200) -> float:
    """How many scenes this process samples and renders per second of its own CPU time; one thread."""
    _render_chunk("gates", 0, level, range(10))  # warm up
    start = time.process_time()
    _render_chunk("gates", 0, level, range(count))
    return count / (time.process_time() - start)
