"""Teachers that look elsewhere: good features, of another picture, by the picture alone."""

import numpy as np
import torch
from PIL import Image

from featurize import teachers
from olavlm.config import load_pipeline
from pipelines.demo_world.scenes import LEVELS, render, sample_scene, scene_seed
from pipelines.study.control import elsewhere


def test_another_scene_by_the_pixels_alone():
    for level in LEVELS.values():
        one, two = (Image.fromarray(render(sample_scene(scene_seed("probe", i), level)).image) for i in range(2))
        assert elsewhere(one) == elsewhere(one.copy())
        assert elsewhere(one).size == one.size
        assert len({image.tobytes() for image in (one, two, elsewhere(one), elsewhere(two))}) == 4
        changed = np.array(one)
        changed[0, 0, 0] ^= 1
        assert elsewhere(Image.fromarray(changed)) != elsewhere(one)


def test_the_control_s_targets_are_the_teacher_s_own_of_that_scene():
    image = Image.fromarray(render(sample_scene(scene_seed("probe", 0), LEVELS["easy"])).image)
    for task, name in {"depth": "ShuffledDepth", "seg": "ShuffledSegmentation", "gen": "ShuffledGeneration"}.items():
        stated = load_pipeline("demo").teachers[task]
        own = teachers.load(stated)
        control = teachers.load(stated.model_copy(update={"teacher": f"pipelines.study.control:{name}"}))
        assert torch.equal(control.preprocess(image), own.preprocess(elsewhere(image)))
        assert control.identity(task) != own.identity(task)
