"""What data and models wrote, made fit for a page: not endless, and with no letter that hides or turns others round."""

from __future__ import annotations

from typing import Any

MOST = 4000
"""Longer texts are cut; the JSON file has all of them."""

TURNING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Letters that only set the direction in which the others are read."""

SEEN: dict[int, str] = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: "\u2421"}
    | {code: f"\u27e8U+{code:04X}\u27e9" for code in (*range(0x80, 0xA0), 0x2028, 0x2029, 0xFEFF, *TURNING)}
)
"""Control letters -> how they are shown."""


def readable(text: Any, most: int = MOST) -> str:
    """A text as a reader can trust it: control letters are seen instead of obeyed, and a long text is cut, with how long it was."""
    whole = str(text)
    cut = whole[:most].replace("\r\n", "\n").translate(SEEN)
    return cut if len(whole) <= most else f"{cut}… (cut: {len(whole):,} characters in all)"
