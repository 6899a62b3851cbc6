"""The site: each public name has its heading, nothing warns or is too wide, links and searches lead on."""

import html
import importlib.util
import json
import os
import re
import shutil
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
# What CENTERLOSS_REQUIRE_SITE asks for does not include a browser, which pip does not bring.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")


def test_every_public_name_is_documented_once_below_its_own_heading():
    described = []
    for page in (DOCS / "api").glob("*.md"):
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            names = re.findall(r":: jax_centerloss\.(\w+)$", section, re.MULTILINE)
            assert names == [section.split("\n")[0]]
            described += [(name, page.stem) for name in names]
    assert sorted(name for name, _ in described) == sorted(jax_centerloss.__all__)
    text = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[`(\w+)`\]\((\w+)\.md#\1\): ", text, re.MULTILINE)
    assert sorted(listed) == sorted(described)


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


# What people type into the search box, and where the first hit has to lead.
SEARCHES = {
    "freeze": "moving_centers.html#freeze-centers",
    "imbalance": "variants.html#imbalanced-classes",
    "ONNX": "deploy.html#export-onnx",
    "sweep": "choosing.html#sweep",
    "hyperparameter": "choosing.html",
    "lambda": "choosing.html",
    "gradient accumulation": "choosing.html#gradient-accumulation",
    "pretrained": "choosing.html#fine-tune-a-pretrained-network",
    "fine-tune": "choosing.html#fine-tune-a-pretrained-network",
    "ArcFace": "choosing.html#when-to-use-center-loss",
    "inference": "deploy.html#inference-without-labels",
    "retrieval": "deploy.html#retrieval-by-nearest-center",
    "label smoothing": "variants.html#label-smoothing",
    "anomaly": "variants.html#outliers-anomalies-open-set-out-of-distribution",
    "open set": "variants.html#outliers-anomalies-open-set-out-of-distribution",
    "outlier": "variants.html#outliers-anomalies-open-set-out-of-distribution",
    "out-of-distribution": "variants.html#outliers-anomalies-open-set-out-of-distribution",
    "equinox": "other_frameworks.html#equinox-and-haiku",
    "haiku": "other_frameworks.html#equinox-and-haiku",
    "ignore_index": "coming_from.html#labels-and-ignore-index",
    "pytorch checkpoint": "coming_from.html#load-a-pytorch-checkpoint",
    "data parallel": "many_devices.html#several-gpus-data-parallel",
    "several GPUs": "many_devices.html#several-gpus-data-parallel",
    "centers don't move": "troubleshooting.html#my-centers-don-t-move",
    "citation": "contributing.html#license-and-citation",
    "license": "contributing.html#license-and-citation",
}

# Opens the pages in frames, without scripts and with what is folded unfolded. Sphinx's own script searches.
IN_BROWSER = """<!doctype html>
<iframe id="search" src="search.html"></iframe>
{frames}
<pre id="seen"></pre>
<script>
addEventListener("load", () => {
  const wide = [], widths = {};
  for (const frame of document.querySelectorAll("iframe[sandbox]")) {
    const page = frame.contentDocument, root = page.documentElement;
    page.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");
    for (const folded of page.querySelectorAll("details")) folded.open = true;
    for (frame.width of [390, 1280]) {
      const where = `${frame.getAttribute("src")} at ${frame.width}`;
      widths[where] = root.scrollWidth;
      if (root.scrollWidth > root.clientWidth) wide.push(`${where}: ${root.scrollWidth}`);
    }
    for (const box of page.querySelectorAll(".pst-scrollable-table-container"))
      if (box.scrollWidth > box.clientWidth)
        wide.push(`${frame.getAttribute("src")}: table ${box.innerText.slice(0, 40)}: ${box.scrollWidth}`);
  }
  const hits = {};
  const script = document.getElementById("search").contentWindow;
  for (const query of {queries})
    hits[query] = script.eval(`Search._performSearch(...Search._parseQuery(${JSON.stringify(query)}))`)
      .reverse().slice(0, 5).map(([page, title, anchor]) => `${page}.html${anchor}`);
  document.getElementById("seen").textContent = JSON.stringify({ wide, widths, hits });
});
</script>
"""


@pytest.fixture(scope="module")
def seen(site, tmp_path_factory):
    """What a browser sees: pages and tables that are too wide, and what the search finds."""
    root = min(site, key=lambda path: len(path.parts)).parent
    frames = [
        f'<iframe sandbox="allow-same-origin" src="{path.relative_to(root)}" height="900"></iframe>'
        for path in sorted(site)
    ]
    content = IN_BROWSER.replace("{frames}", "\n".join(frames)).replace("{queries}", json.dumps([*SEARCHES]))
    (root / "in_browser.html").write_text(content, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path_factory.mktemp('browser')}"
    command = [BROWSER, *options, profile, (root / "in_browser.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.+?)</pre>', dom, re.DOTALL)[1]))


@needs_sphinx
@needs_browser
def test_no_page_is_wider_than_its_window(seen, site):
    assert len(seen["widths"]) == 2 * len(site)
    assert not seen["wide"]


@needs_sphinx
@needs_browser
@pytest.mark.parametrize("query", SEARCHES)
def test_the_search_leads_to_the_answer(seen, site, query):
    assert seen["hits"][query][:1] == [SEARCHES[query]]
    page, _, anchor = SEARCHES[query].partition("#")
    (found,) = [content for path, content in site.items() if path.as_posix().endswith(f"html/{page}")]
    assert not anchor or anchor in found.anchors
