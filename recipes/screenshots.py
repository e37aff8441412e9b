"""Take pictures of a report with headless Chromium: light, dark, and as on a phone.

    distill-sampler report scores.parquet --output report.html
    python recipes/screenshots.py report.html --output docs/images

Needs Chromium or Chrome (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VIEWS = {"light": (1120, False), "dark": (1120, True), "phone": (390, False)}
"""By name, the width in pixels, and whether the reader prefers dark pages."""
_QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


def browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def chromium(*options: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium with a profile of its own.

    Raises:
        ValueError: no Chromium is installed.
    """
    path = browser()
    if path is None:
        raise ValueError(f"No Chromium found (looked for {', '.join(BROWSERS)}). Debian: apt-get install chromium.")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [path, "--headless", "--no-sandbox", "--disable-gpu", *_QUIET, f"--user-data-dir={profile}"]
        return subprocess.run([*command, *options], check=True, capture_output=True, text=True, timeout=300)


def screenshot(page: Path, output: Path, *, view: str, height: int, scroll_to: str = "") -> Path:
    """Write a picture of a page.

    Args:
        page: the HTML file.
        output: the PNG file.
        view: `light`, `dark` or `phone`.
        height: height of the picture in pixels.
        scroll_to: id of the element that the picture begins with; by default the top of the page.
    """
    width, dark = VIEWS[view]
    address = page.resolve().as_uri() + (f"#{scroll_to}" if scroll_to else "")
    with tempfile.TemporaryDirectory(prefix="frame-") as folder:
        # Chromium's own window is never as narrow as a phone, but a frame can be
        frame = Path(folder) / "frame.html"
        size = f"width={width} height={height}"
        style = "<style>body{margin:0}iframe{border:0;display:block}</style>"
        frame.write_text(f"<!doctype html>{style}<iframe {size} src='{escape(address)}'></iframe>", encoding="utf-8")
        chromium(
            f"--window-size={max(width, 500)},{height}",
            "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=15000",
            f"--screenshot={output}",
            frame.as_uri(),
        )
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="The report.")
    parser.add_argument("--output", type=Path, default=Path("."), help="Folder for the pictures.")
    parser.add_argument("--views", nargs="+", choices=list(VIEWS), default=list(VIEWS))
    parser.add_argument("--height", type=int, default=1400, help="Height of the pictures, in pixels.")
    parser.add_argument("--from", dest="begin", default="", help="Id of the section that the pictures begin with.")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for view in given.views:
        name = f"{given.page.stem}-{view}.png"
        print(screenshot(given.page, given.output / name, view=view, height=given.height, scroll_to=given.begin))


if __name__ == "__main__":
    main()
