"""A notebook as a page: its words and its code. (It is kept without what came out of it; a test runs it.)"""

from __future__ import annotations

import json


def page(text: str) -> str:
    """The page, in Markdown.

    Args:
        text: the notebook's file.
    """
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells) + "\n"
