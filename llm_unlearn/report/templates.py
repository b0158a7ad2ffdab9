"""How a page is made of its template: all that comes from data or models is escaped, and shown as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn.report.texts import readable

if TYPE_CHECKING:
    from jinja2 import Template


def template(name: str) -> Template:
    """A template of this folder. A name that it asks for and is not given is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    files = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(
        loader=files, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    return jinja.get_template(name)
