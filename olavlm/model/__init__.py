"""The student: its configuration, task tokens, embedding predictors, losses and processor.

`EmbeddingDistiller` gives the embedding losses to any other model.
Importing this package registers the student with transformers' Auto classes. What does not belong here: teachers,
reading corpora or targets, the training loop.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from olavlm.model.build import build_student
from olavlm.model.configuration import OlaVlmConfig, TaskConfig
from olavlm.model.distill import EmbeddingDistiller
from olavlm.model.layout import ImageLayout, find_images
from olavlm.model.losses import EmbeddingLosses, TaskTargets, cosine, embedding_losses, info_nce, smooth_l1
from olavlm.model.modeling import OlaVlmForConditionalGeneration, OlaVlmOutput, parameter_groups
from olavlm.model.predictor import EmbeddingPredictor
from olavlm.model.processing import OlaVlmProcessor

AutoConfig.register("ola_vlm", OlaVlmConfig)
AutoModelForImageTextToText.register(OlaVlmConfig, OlaVlmForConditionalGeneration)
AutoProcessor.register(OlaVlmConfig, OlaVlmProcessor)  # type: ignore[no-untyped-call]

__all__ = [
    "EmbeddingDistiller",
    "EmbeddingLosses",
    "EmbeddingPredictor",
    "ImageLayout",
    "OlaVlmConfig",
    "OlaVlmForConditionalGeneration",
    "OlaVlmOutput",
    "OlaVlmProcessor",
    "TaskConfig",
    "TaskTargets",
    "build_student",
    "cosine",
    "embedding_losses",
    "find_images",
    "info_nce",
    "parameter_groups",
    "smooth_l1",
]
