"""The picture of docs/studio.md: ``python -m tests.studio.picture docs/figures/studio.png``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.crossing.process import ListeningProcess
from tests.studio.browser import Browser

COLOURS = 255


def main(out: Path) -> None:
    """The first example at a tenth of its tokens, sent once over 10 Mbit/s."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ListeningProcess("studio") as page,
        Browser(Path(folder) / "profile", width=1400, height=1120) as browser,
    ):
        browser.open(page.address)
        browser.until("document.querySelector('.answers')")
        browser.click(".send")
        browser.until("document.querySelectorAll('.way').length === 2")
        browser.until("document.querySelector('.send').disabled === false")
        browser.js("document.activeElement.blur()")
        shot = Path(folder) / "shot.png"
        browser.screenshot(shot)
        page.stop()
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
