"""The picture of a run's page that the README shows, by day and by night.

python tests/screenshot.py runs/forget_lora docs        # writes docs/report.png and docs/report_dark.png
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from browser import address, browser
from PIL import Image

WIDTH, FINE = 1180, 1.5
"""Of the window, and pixels of the picture to one of the window."""
COLOURS = 96
"""So many colours are enough for a page, and make the file a quarter as large."""


def take(run: Path, folder: Path) -> None:
    """Write both pictures."""
    with browser() as chromium:
        for scheme, name in (("light", "report.png"), ("dark", "report_dark.png")):
            page = chromium.new_page(viewport={"width": WIDTH, "height": 800}, device_scale_factor=FINE, color_scheme=scheme)
            page.goto(address(run / "report.html"))
            first = page.locator("figure").first.bounding_box()  # the picture ends below it
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": first["y"] + first["height"] + 16}
            whole = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip)))
            whole.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(folder / name, optimize=True)
            page.close()
            print(f"{folder / name}: {(folder / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
