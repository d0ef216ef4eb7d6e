"""Rendering over processes. Imports nothing heavy: every spawned process pays for it."""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from pipelines.demo_world.scenes import Rendering, Scene, render, sample_scene, scene_seed

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


def render_split(split: str, count: int, seed: int = 0, workers: int = 2) -> Iterable[tuple[Scene, Rendering]]:
    """The first `count` scenes of a split with their renderings, in order, whatever the number of processes."""
    chunks = [(split, start, min(start + CHUNK, count), seed) for start in range(0, count, CHUNK)]
    for chunk in in_processes(_render_chunk, chunks, workers):
        yield from chunk


def _render_chunk(chunk: tuple[str, int, int, int]) -> list[tuple[Scene, Rendering]]:
    split, start, stop, seed = chunk
    scenes = [sample_scene(scene_seed(split, index, seed)) for index in range(start, stop)]
    return [(scene, render(scene)) for scene in scenes]
