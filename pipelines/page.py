"""Self-contained pages: Jinja templates of this folder that load nothing."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from olavlm.cli import human_bytes
from pipelines import figures
from pipelines.results import duration


def render(template: str, **values: Any) -> str:
    """A template of this folder with these values, escaped; a value it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": human_bytes,
        "duration": duration,
        "count": lambda number: f"{number:,}",
        "percent": lambda share: f"{100 * share:.1f}",
        "picture": figures.picture,
    }
    return environment.get_template(template).render(**values)
