from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.demo_world import recipe
from pipelines.demo_world.build import tell
from pipelines.demo_world.recipe import JOBS, QUICK, Material
from pipelines.demo_world.samples import batches, render_samples


@pytest.fixture(scope="module")
def material() -> Material:
    told = [t for chunk in tell("teachers", 40, 0, 1) for t in chunk]
    return Material(render_samples("teachers", 128, workers=1), render_samples("gates", 256, workers=1), told, QUICK)


@pytest.fixture(scope="module")
def trained(material: Material, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    out = tmp_path_factory.mktemp("weights")
    return out, {name: job(material, out) for name, job in JOBS.items()}


def test_recipe_makes_what_ships(trained: tuple[Path, dict[str, dict[str, float]]]) -> None:
    """Same files, tensors and shapes as the shipped weights, whose card names every folder."""
    out, measured = trained
    shipped = Path(recipe.__file__).parent / "weights"
    files = {str(f.relative_to(shipped)) for f in shipped.rglob("*") if f.is_file()}
    assert {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} | {"MODEL_CARD.md"} == files
    for file in sorted(f for f in files if f.endswith(".safetensors")):
        ours, theirs = load_file(out / file), load_file(shipped / file)
        # Not the first dimension: how many words the language model knows depends on how much was read.
        assert {k: (v.dtype, v.shape[1:]) for k, v in ours.items()} == {
            k: (v.dtype, v.shape[1:]) for k, v in theirs.items()
        }
    card = recipe.model_card(out, measured, QUICK, 60.0)
    assert all(f"`{folder}`" in card for folder in recipe.FOLDERS.values())


def test_same_seed_same_weights(
    trained: tuple[Path, dict[str, dict[str, float]]], material: Material, tmp_path: Path
) -> None:
    JOBS["depth"](material, tmp_path)
    once, again = (load_file(folder / "depth" / "model.safetensors") for folder in (trained[0], tmp_path))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_batches_are_epochs_in_random_order() -> None:
    rows = list(batches(count=10, batch=5, steps=5, seed=0))
    assert len(rows) == 5
    for first, second in ((0, 1), (2, 3)):
        assert sorted([*rows[first], *rows[second]]) == list(range(10))
