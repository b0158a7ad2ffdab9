"""A notebook as a page: its words, its code, and what came out when it was last carried out (`jupyter execute --inplace`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any


def page(text: str) -> str:
    """The page, in Markdown.

    Args:
        text: the notebook's file.
    """
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        parts += [shown for output in cell.get("outputs", ()) for shown in _shown(output)]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> Iterator[str]:
    """One output: a picture, a table, or text; progress on standard error is not shown."""
    data = output.get("data", {})
    if "image/png" in data:
        yield f'<img alt="{"".join(data["text/plain"])}" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    elif "text/html" in data:
        html = re.sub(r"<style.*?</style>|\n\s*", "", "".join(data["text/html"]), flags=re.DOTALL)
        yield re.sub(r' (border|class|style)="[^"]*"', "", html)  # the site's own
    elif text := "".join(data.get("text/plain", output.get("text", "") if output.get("name") == "stdout" else "")).strip("\n"):
        yield f"```text\n{text}\n```"
