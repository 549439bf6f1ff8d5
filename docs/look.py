"""Looks at the built documentation as a reader does, in a browser, and complains.

command:   pip install -e ".[docs]" && sphinx-build -W docs docs/_build
           python docs/look.py docs/_build --screenshots shots
time:      one minute on two CPU cores, for all pages at two widths
expected:  a line a page, and status 0

Serves the folder on localhost and opens every page at the width of a desktop and of a
phone, in Chromium (`--browser` names it). A page fails if its console has an error, a
resource is missing or comes from elsewhere, it scrolls sideways, or an image is broken.
Every link to a page or place of the site must lead there; those that lead elsewhere are
only listed. Each word of `WORDS` must be found by the site's own search, on its page.
"""

import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Page, sync_playwright

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
WORDS = {  # What to search for, and the page that must be among the results.
    "keep_if_skipped": "howto/batch_norm_and_ema.html",
    "roll_back": "howto/roll_back.html",
    "float16": "howto/mixed_precision.html",
    "AutoClip": "methods.html",
    "curriculum": "concepts/trust_region.html",
}
SHOWN = ("index", "quickstart", "api/guard")  # Pages of which screenshots are kept.


class Silent(http.server.SimpleHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *args):
        """Say nothing."""


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """Serves a folder at a free port, in a thread."""
    handler = functools.partial(Silent, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def watch(page: Page, site: str) -> list[str]:
    """A list that grows by whatever goes wrong on the page."""
    wrong: list[str] = []

    def requested(request):
        if not request.url.startswith((site, "data:", "blob:")):
            wrong.append(f"asks for {request.url}")

    def answered(response):
        if response.status >= 400:
            wrong.append(f"{response.status} for {response.url}")

    def said(message):
        if message.type == "error":
            wrong.append(f"console: {message.text}")

    page.on("request", requested)
    page.on("response", answered)
    page.on("console", said)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    return wrong


def look(page: Page, url: str) -> tuple[list[str], list[str], list[str]]:
    """Opens a page; what is wrong with its looks, its links and its places."""
    page.goto(url, wait_until="load")
    wrong = []
    wide, room = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    if wide > room + 1:
        wrong.append(f"scrolls sideways: {wide} in {room} pixels")
    broken = page.evaluate(
        "[...document.images].filter(i => i.complete && !i.naturalWidth)"
        ".map(i => i.src)"
    )
    wrong += [f"broken image {source}" for source in broken]
    links = page.evaluate(
        "[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
    )
    places = page.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    return wrong, links, places


def broken_links(links: dict[str, list[str]], places: dict[str, set[str]], site: str):
    """Links to the site itself that lead nowhere, and the number of all others."""
    wrong, elsewhere = [], set()
    for url, found in links.items():
        for link in found:
            target, place = urldefrag(urljoin(url, link))
            if not target.startswith(site):
                elsewhere.add(target)
            elif target not in places and not is_file(target, site):
                wrong.append(f"{url}: {link} leads nowhere")
            elif place and target in places and unquote(place) not in places[target]:
                wrong.append(f"{url}: {link} names no place there")
    return wrong, elsewhere


def is_file(target: str, site: str) -> bool:
    """Whether a target that was not opened is a file of the site all the same."""
    return (FOLDER / unquote(target.removeprefix(site)).lstrip("/")).is_file()


def search(page: Page, site: str, word: str) -> list[str]:
    """The pages that the site's search finds."""
    page.goto(f"{site}/search.html?q={word}", wait_until="load")
    page.wait_for_selector("#search-results ul.search li a", timeout=20_000)
    page.wait_for_function(
        "document.querySelector('.search-summary')?.innerText.match(/\\d/)"
    )
    return page.evaluate(
        "[...document.querySelectorAll('#search-results ul.search > li > a')]"
        ".map(a => a.href)"
    )


FOLDER = Path()


def main(argv=None) -> int:
    """Opens everything; returns the number of complaints, at most 1."""
    global FOLDER
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the built site")
    parser.add_argument("--screenshots", type=Path, help="a folder for screenshots")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--pages", nargs="*", default=SHOWN, help="to take pictures of")
    options = parser.parse_args(argv)
    FOLDER = options.folder.resolve()
    server = serve(FOLDER)
    site = f"http://127.0.0.1:{server.server_port}"
    pages = sorted(
        str(path.relative_to(FOLDER).with_suffix(""))
        for path in FOLDER.rglob("*.html")
        if "_static" not in path.parts
    )
    complaints, links, places = [], {}, {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.browser, args=["--no-sandbox"]
        )
        for device, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            wrong = watch(page, site)
            for name in pages:
                url = f"{site}/{name}.html"
                seen, links[url], found = look(page, url)
                places[url] = set(found)
                seen += wrong
                wrong.clear()
                print(f"{device:8} {name:32} {seen or 'ok'}")
                complaints += [f"{name} ({device}): {what}" for what in seen]
                if options.screenshots and name in options.pages:
                    options.screenshots.mkdir(parents=True, exist_ok=True)
                    image = f"{device}_{name.replace('/', '_')}.png"
                    page.screenshot(path=options.screenshots / image)
            for word, wanted in WORDS.items():
                hits = search(page, site, word)
                ok = f"{site}/{wanted}" in {urldefrag(hit)[0] for hit in hits}
                print(f"{device:8} search {word:25} {len(hits)} pages")
                if not ok:
                    complaints.append(f"search for {word!r} does not find {wanted}")
            page.close()
        browser.close()
    server.shutdown()
    wrong, elsewhere = broken_links(links, places, site)
    complaints += wrong
    print(f"{len(pages)} pages, {sum(map(len, links.values()))} links, of which")
    print(f"{len(elsewhere)} addresses lead elsewhere and were not followed.")
    print("\n".join(complaints) or "nothing to complain of")
    return min(1, len(complaints))


if __name__ == "__main__":
    sys.exit(main())
