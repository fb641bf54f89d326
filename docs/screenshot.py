"""Take the README's pictures of a report, with Debian's Chromium.

python launch/report.py runs/* --out report.html
python docs/screenshot.py report.html docs/images
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, SCALE, MARGIN = 1180, 1.5, 24


def save(page: Page, first: str, last: str, path: Path) -> None:
    """A picture of the page from one element to another."""
    top, bottom = (page.locator(selector).first.bounding_box() for selector in (first, last))
    start = max(top["y"] - MARGIN, 0)
    clip = {"x": 0, "y": start, "width": WIDTH, "height": bottom["y"] + bottom["height"] + MARGIN - start}
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True)))
    shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


def main(report: Path, folder: Path) -> None:
    """The curves of the palindromes under a cursor, and the film and the walk of the first GAN."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE, color_scheme=scheme
            )
            page.goto(report.resolve().as_uri())
            plot = page.locator("#palindromes .plot").first
            plot.scroll_into_view_if_needed()
            plot.hover(position={"x": 165, "y": 120})
            page.evaluate("scrollTo({top: 0, behavior: 'instant'})")  # which moves no mouse
            save(page, "#palindromes h2", "#palindromes .charts", folder / f"report-curves-{scheme}.png")
            save(page, "#digits article h3", "#digits article .walk", folder / f"report-digits-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
