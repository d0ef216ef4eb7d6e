"""What is known of scenes that nothing is trained on, in the layouts of `olavlm.eval.truth`: pairs, labels, depth."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from olavlm.data.folder import new_folder
from olavlm.eval.truth import MILLIMETRES
from pipelines.demo_world.processes import render_split
from pipelines.demo_world.scenes import LEVELS

PAIRS = 8  # of points in an image, at most
TRIED = 400  # pairs drawn for them
APART = 1.1  # ratio of their depths, at least: people must be able to tell

Rng = np.random.Generator


def write_truth(out: Path, scenes: int, seed: int, level: str, workers: int = 2) -> None:
    """Render the first scenes of the benchmark's split into a new folder: images, pairs, label maps and depth maps.

    Neither teachers, students nor probes are trained on that split. Same arguments, same bytes.

    Args:
        out: a folder that is not there.
        scenes: how many.
        seed: another seed, other scenes.
        level: how hard they are, a key of `LEVELS`.
        workers: rendering processes; changes nothing but the time taken.
    """
    annotations = {}
    with new_folder(out) as folder:
        for kind in ("images", "labels", "depths"):
            (folder / kind).mkdir()
        rendered = render_split("benchmark", scenes, seed, workers, LEVELS[level])
        for index, (scene, rendering) in enumerate(rendered):
            name = f"{index:06d}.png"
            Image.fromarray(rendering.image).save(folder / "images" / name)
            Image.fromarray(rendering.semantic().astype(np.uint8)).save(folder / "labels" / name)
            millimetres = (rendering.depth * MILLIMETRES).round().clip(0, 2**16 - 1).astype(np.uint16)
            Image.fromarray(millimetres).save(folder / "depths" / name)
            rng = np.random.Generator(np.random.PCG64([scene.seed, 3]))
            if found := pairs(rendering.depth, rng):
                annotations[f"images/{name}"] = found
        (folder / "annotations.json").write_text(json.dumps(annotations, indent=1))


def pairs(depth: NDArray[np.float32], rng: Rng) -> list[dict[str, object]]:
    """Up to `PAIRS` pairs of points as DA-2K has them, whose order cannot be told from where they are.

    The ground rises in an image as it goes away: of two points drawn anywhere the lower one is mostly the closer one.
    So as many pairs are taken in which the higher one is; whoever knows nothing but the rows is right in half of them.

    Args:
        depth: (H, W), any unit.
        rng: draws the points.
    """
    rows, columns = (rng.integers(side, size=(TRIED, 2)) for side in depth.shape)
    of_points = depth[rows, columns]
    apart = of_points.max(1) >= APART * of_points.min(1)
    first_closer = of_points[:, 0] < of_points[:, 1]
    higher_closer = np.where(first_closer, rows[:, 0] < rows[:, 1], rows[:, 1] < rows[:, 0])
    level = rows[:, 0] == rows[:, 1]
    kinds = [np.flatnonzero(apart & ~level & (higher_closer == wanted)) for wanted in (True, False)]
    count = min(PAIRS // 2, *map(len, kinds))
    return [
        {
            "point1": [int(rows[i, 0]), int(columns[i, 0])],
            "point2": [int(rows[i, 1]), int(columns[i, 1])],
            "closer_point": "point1" if first_closer[i] else "point2",
        }
        for i in sorted(np.concatenate([kind[:count] for kind in kinds]).tolist())
    ]
