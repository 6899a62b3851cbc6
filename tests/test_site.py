"""The documentation site: every public name has a page, nothing warns, and no link leads nowhere."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import jax_centerloss

DOCS = Path(__file__).resolve().parents[1] / "docs"
NEEDED = ["sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton", "sphinx_design", "latex2mathml"]
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

if MISSING and os.environ.get("CENTERLOSS_REQUIRE_SITE"):
    raise ImportError(f"CENTERLOSS_REQUIRE_SITE is set, but there is no {', '.join(MISSING)}")
needs_sphinx = pytest.mark.skipif(
    bool(MISSING), reason=f"the site needs the extra docs: there is no {', '.join(MISSING)}"
)


def test_every_public_name_has_its_page():
    described = {}
    for page in (DOCS / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(
            r"^\.\. (?:autofunction|py:module):: jax_centerloss\.(\w+)$", text, re.MULTILINE
        ):
            described.setdefault(name, []).append(page.stem)
    assert described == {name: [name] for name in jax_centerloss.__all__}


def test_every_public_name_is_in_the_list_and_in_the_contents():
    text = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[`(\w+)`\]\((\w+)\.md\): ", text, re.MULTILINE)
    assert sorted(listed) == [(name, name) for name in sorted(jax_centerloss.__all__)]
    contents = re.findall(
        r"^\w+$", "".join(re.findall(r"```{toctree}(.*?)```", text, re.DOTALL)), re.MULTILINE
    )
    assert contents == [name for name, _ in listed]


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag == "link" and "stylesheet" in (attrs.get("rel") or ""):
            self.loaded.append(attrs["href"])
        if tag in ("img", "script", "source", "iframe") and attrs.get("src"):
            self.loaded.append(attrs["src"])


def is_outside(link):
    return re.match(r"[a-z]+:|//", link) is not None


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the built site, by their paths."""
    out = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html"]
    # As users have it: without the suite's settings.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    built = subprocess.run([*command, str(DOCS), str(out)], capture_output=True, text=True, env=env)
    assert built.returncode == 0, built.stderr
    return {path: Page(path) for path in out.rglob("*.html") if "_static" not in path.parts}


@needs_sphinx
def test_links_and_anchors_resolve(site):
    broken = []
    for path, page in site.items():
        for link in {*page.links, *page.loaded}:
            if is_outside(link):
                continue
            target, anchor = urldefrag(link)
            file = (path.parent / unquote(target.split("?")[0])).resolve() if target else path
            known = file.exists() and (file.suffix != ".html" or not anchor or file not in site)
            if not known and not (file in site and unquote(anchor) in site[file].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken


@needs_sphinx
def test_nothing_is_loaded_from_elsewhere(site):
    loaded = {link for page in site.values() for link in page.loaded if not link.startswith("data:")}
    assert not {link for link in loaded if is_outside(link)}


@needs_sphinx
def test_equations_are_readable_without_a_script(site):
    pages = [path for path in site if "<math" in path.read_text(encoding="utf-8")]
    assert "moving_centers.html" in [path.name for path in pages]
