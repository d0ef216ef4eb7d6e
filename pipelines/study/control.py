"""Teachers that look elsewhere, for the control arm: features as good as the real ones, of another picture.

Everything a student could gain from a loss as such, from its gradients, its extra parameters, from what features of
scenes have in common, it can gain from these as well; but nothing about the image that it sees. Which other scene a
picture's features are of is a function of its pixels, so that targets stay what they are everywhere in this
repository: a pure function of the image, under an identity of their own.
"""

from hashlib import blake2b

from PIL import Image
from torch import Tensor

from featurize.teachers.base import Teacher
from featurize.teachers.depth_anything import DepthAnything
from featurize.teachers.oneformer import OneFormer
from featurize.teachers.unclip import UnClip
from pipelines.demo_world.scenes import LEVELS, render, sample_scene, scene_seed

_SEED = 10**4  # of scenes that no pipeline renders


def elsewhere(image: Image.Image) -> Image.Image:
    """Another scene of the demo world, of the level whose images have this size; the same for the same pixels.

    Args:
        image: mode RGB, as wide as the images of some level.
    """
    level = next(level for level in LEVELS.values() if level.size == image.width)
    number = int.from_bytes(blake2b(image.tobytes(), digest_size=8).digest())
    return Image.fromarray(render(sample_scene(scene_seed("pretrain", number % 10**8, _SEED), level)).image)


class _Elsewhere(Teacher):
    def preprocess(self, image: Image.Image) -> Tensor:
        """See `Teacher.preprocess`; of another scene."""
        return super().preprocess(elsewhere(image))


class ShuffledDepth(_Elsewhere, DepthAnything):
    """Depth features of another scene."""


class ShuffledSegmentation(_Elsewhere, OneFormer):
    """Segmentation features of another scene."""


class ShuffledGeneration(_Elsewhere, UnClip):
    """Image embeddings of another scene."""
