"""The teachers: one short file each, encode and decode side by side, and a registry.

A teacher of your own is a subclass of `featurize.teachers.base.Teacher` in any package, in the pipeline ``teacher:
package.module:Class``. Ours have short names: a file in this folder, in `_MODULES`, with the class under ``@register``.
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
    return _find(config.teacher)(config, device)


def _find(name: str) -> type[Teacher]:
    """The class called `name`, or that is at ``package.module:Class``."""
    if name in _MODULES:
        import_module(f"featurize.teachers.{name}")
    if name in _registry:
        return _registry[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join(sorted({*_MODULES, *_registry}))
        raise OlaError(f"teacher {name!r} is not known; expected {known} or package.module:Class")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OlaError(f"teacher {name!r}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Teacher)):
        raise OlaError(f"teacher {name!r}: expected a subclass of featurize.teachers.base.Teacher")
    return found
