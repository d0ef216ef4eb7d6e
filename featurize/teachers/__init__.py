"""The teachers: one short file each, encode and decode side by side, and a registry.

A teacher of your own: a file in this folder with a subclass of `featurize.teachers.base.Teacher` under
``@register("name")``, the file named in `_MODULES`, and ``teacher: name`` in the pipeline.
"""

from collections.abc import Callable
from importlib import import_module

from featurize.teachers.base import Teacher
from olavlm.config import TeacherConfig
from olavlm.errors import OlaError

_MODULES = ("depth_anything", "oneformer", "unclip", "vision_model")
_registry: dict[str, type[Teacher]] = {}


def register(name: str) -> Callable[[type[Teacher]], type[Teacher]]:
    """Class decorator: make a teacher known as `name`."""

    def decorate(cls: type[Teacher]) -> type[Teacher]:
        _registry[name] = cls
        return cls

    return decorate


def load(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher a pipeline asks for; its weights are found and checked now, and read when first needed.

    Raises:
        OlaError: unknown teacher, missing weights, or a grid, width, layer or input size the network does not give.
    """
    if config.teacher in _MODULES:
        import_module(f"featurize.teachers.{config.teacher}")
    if config.teacher not in _registry:
        known = ", ".join(sorted({*_MODULES, *_registry}))
        raise OlaError(f"teacher {config.teacher!r} is not registered; known teachers: {known}")
    return _registry[config.teacher](config, device)
