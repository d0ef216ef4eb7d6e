from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from pipelines.demo_world.scenes import CLASSES, LEVELS
from pipelines.demo_world.sheet import CLASS_COLOURS, contact_sheet, save, sheet, show_classes, show_depth


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image, np.float64)


def test_a_sheet_of_hard_scenes_stays_small(tmp_path: Path) -> None:
    file = tmp_path / "new" / "sheet.png"
    contact_sheet(file, LEVELS["hard"])
    assert file.stat().st_size < 400_000
    assert len(pixels(file)) > 5 * LEVELS["hard"].size


def test_a_sheet_is_a_function_of_its_seed(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.png", "same.png", "other.png")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        contact_sheet(file, scenes=1, seed=seed)
    one, same, other = (file.read_bytes() for file in files)
    assert one == same != other


def test_classes_have_their_colours_and_near_is_brighter(tmp_path: Path) -> None:
    figure, [[classes, depth]] = sheet(1, ("classes", "depth"))
    show_classes(classes, np.arange(len(CLASSES)).repeat(64)[None].repeat(7 * 64, 0))
    show_depth(depth, np.array([[2.0, 5.0, 9.0, 13.0]]).repeat(64, 1).repeat(256, 0))
    save(figure, tmp_path / "sheet.png")
    shown = pixels(tmp_path / "sheet.png")
    middle, half = shown[-128], shown.shape[1] // 2
    found = middle[: half - 6].reshape(-1, 3)
    for colour in CLASS_COLOURS:
        assert np.abs(found - np.array(to_rgb(colour)) * 255).max(axis=1).min() < 9
    bands = middle[half + 32 :: 64].sum(axis=-1)[:4]
    assert (np.diff(bands) < 0).all()
