"""A progress bar for commands that walk through a whole store: on a terminal's stderr, silent elsewhere."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a bar that says how far they are and how long the rest will take."""
    console = Console(stderr=True)
    return progress.track(items, what, console=console, transient=True, disable=not console.is_terminal)
