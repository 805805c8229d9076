"""What a browser, and a reader of HTML, find on the pages of the API reference."""

import functools
import html.parser
import json
import re
import shutil
import subprocess
from urllib.parse import unquote, urlsplit

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

#: Run in the page: how large each equation is, and where the parts of its fractions are.
MEASURE = """
const place = node => node.getBoundingClientRect().toJSON();
const equations = [...document.querySelectorAll("math")].map(math => ({
  text: math.textContent,
  fractions: [...math.querySelectorAll("mfrac")].map(f => [...f.children].map(place)),
  ...place(math),
}));
const found = document.createElement("script");
found.type = "application/json";
found.id = "measured";
found.textContent = JSON.stringify(equations).replaceAll("<", "\\\\u003c");
document.body.append(found);
"""


def measured(text):
    (found,) = re.findall(r'<script type="application/json" id="measured">(.*?)</script>', text)
    return json.loads(found)


class Page(html.parser.HTMLParser):
    """The links and the places of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loaded = [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        for key in ("src", "href") if tag != "a" else ():
            if attributes.get(key):
                self.loaded.append(attributes[key])

    def loaded_from_elsewhere(self):
        return [address for address in self.loaded if urlsplit(address).netloc]

    def broken_links(self, path):
        """Those that lead to no file, or to no place in one; others' sites are not asked."""
        broken = []
        for link in self.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            place = unquote(parts.fragment)
            if not target.is_file():
                broken.append(link)
            elif place not in (places_of(target) if parts.path else self.ids):
                broken.append(link)
        return broken


@functools.cache
def places_of(path):
    return Page(path.read_text()).ids


class Browser:
    """A headless one, whose files are in a folder of the test's."""

    def __init__(self, folder):
        found = (shutil.which(name) for name in BROWSERS)
        self.command = next(filter(None, found), None) or pytest.skip(
            f"no browser is installed; any of {', '.join(BROWSERS)} will do"
        )
        self.folder = folder

    def open(self, path, query="", then=""):
        """The page as it is once its scripts, and then the given one, have run."""
        if then:  # in a copy, which finds its styles and scripts beside the page
            text = path.read_text().replace("<head>", f'<head><base href="{path.as_uri()}">', 1)
            path = self.folder / path.name
            path.write_text(text.replace("</body>", f"<script>{then}</script></body>"))
        done = subprocess.run(
            [self.command, "--headless", "--no-sandbox", "--disable-gpu",
             f"--user-data-dir={self.folder}", "--virtual-time-budget=10000", "--dump-dom",
             f"{path.as_uri()}?{query}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout
