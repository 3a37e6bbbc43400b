"""Looks at every page of the built documentation in a real browser: python docs/_checks/pages.py SITE

Light and dark, on a wide screen and on a phone. A page is good if

* nothing is wider than the page: what is too wide, such as a table, scrolls by itself;
* each picture has a size, and could be loaded;
* the browser reports no error;
* no text has markup in it that should have become something else.

The browser is a Chromium that is there already. Without one, this says so and is content.
"""

from __future__ import annotations

import http.server
import re
import shutil
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENS = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")
#: Markup that the build should have turned into something else.
MARKUP = re.compile(r":(?:func|class|meth|mod|attr|data):`|``|(?m:\s::$)|\]\(\w+\.md|\bTODO\b")

#: What is too wide, unless something around it scrolls or hides it; and pictures without a size.
FIND_FAULTS = """() => {
    const faults = [], wide = document.documentElement.clientWidth
    const scrolls = element => {
        for (let each = element; each && each !== document.body; each = each.parentElement)
            if (each !== element && ['auto', 'scroll'].includes(getComputedStyle(each).overflowX)) return true
        return false
    }
    for (const element of document.querySelector('.md-main').querySelectorAll('article, article *')) {
        const box = element.getBoundingClientRect()
        if (box.width && box.left < -1 && !scrolls(element)) faults.push(`<${element.tagName}> begins left of the page`)
        if (box.width && box.right > wide + 1 && !scrolls(element))
            faults.push(`<${element.tagName}> ${element.className} reaches to ${Math.round(box.right)} of ${wide} px`)
    }
    if (document.documentElement.scrollWidth > wide + 1) faults.push('the page scrolls sideways')
    for (const picture of document.images) {
        const box = picture.getBoundingClientRect()
        if (!picture.naturalWidth || !box.width || !box.height) faults.push(`${picture.src} has no size`)
    }
    return faults.slice(0, 5)
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, *args: Any) -> None:
        pass


def look_at(page: Any, address: str) -> list[str]:
    """What is wrong with the page at ``address``."""
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address, wait_until="load")
    for screen, size in SCREENS.items():
        page.set_viewport_size(size)
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            faults += [f"{screen}, {scheme}: {fault}" for fault in page.evaluate(FIND_FAULTS)]
    text = page.evaluate("() => document.querySelector('article').innerText")
    faults += [f"has {found!r} in its text" for found in dict.fromkeys(MARKUP.findall(text))]
    if len(text) < 200:
        faults.append("is empty")
    return faults


def main(site: Path) -> int:
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        print(f"skipped: there is no Chromium here ({', '.join(BROWSERS)})", file=sys.stderr)
        return 0
    from playwright.sync_api import sync_playwright

    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if path.name != "404.html")
    if not pages:
        print(f"there are no pages in {site}: build them first")
        return 1
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    failed = 0
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=options)
        for name in pages:
            page = browser.new_page()
            for fault in look_at(page, f"http://127.0.0.1:{server.server_port}/{name}"):
                print(f"{name}: {fault}")
                failed += 1
            page.close()
        browser.close()
    server.shutdown()
    print(f"{len(pages)} pages, light and dark, wide and on a phone: {failed or 'no'} faults")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
