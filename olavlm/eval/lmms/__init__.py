"""A student under lmms-eval (``--model olavlm``), which knows a few hundred more benchmarks.

lmms-eval needs torchvision and is installed beside this package in an environment of its own; nothing else here imports
it. What it loads by the entry point ``lmms_eval.models`` is `manifest`, so that naming another model costs nothing.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry is told: the name ``olavlm``, chat interface (an ``lmms_eval`` `ModelManifest`)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("olavlm", chat_class_path="olavlm.eval.lmms.model.OlaVlm")
