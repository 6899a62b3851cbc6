"""The documentation site: `sphinx-build -W -n --keep-going -b html docs out/site`, without a network too."""

import ast
import html
import inspect
import re
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.ext.intersphinx import InventoryAdapter

import jax_centerloss

project = "jax-centerloss"
author = ""
copyright = "The jax-centerloss authors"
version = release = jax_centerloss.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Pages. Their code is run by tests/test_docs.py, not here.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# API. A signature shows names and defaults as they are written in the source. Types are left out: ArrayLike
# would become a union of eight classes there, while shapes and dtypes are told below each signature.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "references"), ("Attributes", "params_style")]

html_theme = "sphinx_book_theme"
html_title = f"jax-centerloss {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {
    "repository_url": "https://github.com/jax-centerloss/jax-centerloss",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "show_toc_level": 2,
    "navbar_persistent": [],
}
GITHUB = "https://github.com/jax-centerloss/jax-centerloss/blob/main/"

INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "jax": "https://docs.jax.dev/en/latest/",
    "flax": "https://flax.readthedocs.io/en/stable/",
    "optax": "https://optax.readthedocs.io/en/stable/",
}


FETCHED = tempfile.TemporaryDirectory()  # Removed at exit.


def fetched(mapping):
    """The inventories that can be had now: without a network the site has no links to other projects."""

    def fetch(name):
        try:
            with urllib.request.urlopen(mapping[name] + "objects.inv", timeout=5) as answer:
                content = answer.read()
        except (OSError, HTTPException):
            return None
        file = Path(FETCHED.name, f"{name}.inv")
        file.write_bytes(content)
        return (mapping[name], str(file)) if content.startswith(b"# Sphinx inventory") else None

    with ThreadPoolExecutor() as pool:
        found = dict(zip(mapping, pool.map(fetch, mapping), strict=True))
    return {name: place for name, place in found.items() if place is not None}


intersphinx_mapping = fetched(INVENTORIES)

SHORT = {
    "jnp": "jax.numpy",
    "np": "numpy",
    "nnx": "flax.nnx",
    "nn": "flax.linen",
    "checkify": "jax.experimental.checkify",
}


def linked(app, text, own):
    """The code as a literal, which links to the page of the name that it is, if there is one."""
    name = text.removeprefix("jax_centerloss.").removesuffix("()")
    if name in jax_centerloss.__all__ and own != f"jax_centerloss.{name}":
        kind = "mod" if name in ("nnx", "linen") else "func"
        return f":py:{kind}:`{text} <jax_centerloss.{name}>`"
    first, dot, rest = text.partition(".")
    full = SHORT.get(first, first) + dot + rest
    known = InventoryAdapter(app.env).main_inventory
    if dot and any(full in items for kind, items in known.items() if kind.startswith("py:")):
        return f":external:py:obj:`{text} <{full}>`"
    return f"``{text}``"


def as_rst(app, what, name, obj, options, lines):
    """Docstrings have code in single backquotes, as Markdown has, and lists of `"option"`: text."""
    lines[:] = re.sub(r"`[^`]*`", lambda code: re.sub(r"\n *", " ", code[0]), "\n".join(lines)).split("\n")
    item = False
    for i, line in enumerate(lines):
        starts = re.match(r' *`"\w+"`: ', line) is not None
        item = starts or (item and line.strip() != "")
        if item:
            indent = len(line) - len(line.lstrip())
            line = line[:indent] + ("- " if starts else "  ") + line[indent:]
        if not line.lstrip().startswith((">>>", "...")):
            line = re.sub(r"(?<![`:])`([^`]+)`(?!`)", lambda found: linked(app, found[1], name), line)
        lines[i] = line


def readable_signature(app, what, name, obj, options, signature, annotation):
    """Defaults as in the source, also where Flax hides the signature of a module; a constant by its value."""
    if signature and name.endswith(".CenterLoss"):
        body = ast.parse(inspect.getsource(obj)).body[0].body
        inits = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        for arguments in inits:
            del arguments.args[0]  # self
            for argument in arguments.args + arguments.kwonlyargs:
                argument.annotation = None
            signature = f"({ast.unparse(arguments)})"
        if not inits:  # A dataclass.
            fields = [node for node in body if isinstance(node, ast.AnnAssign)]
            texts = (f.target.id + (f"={ast.unparse(f.value)}" if f.value else "") for f in fields)
            signature = f"({', '.join(texts)})"
    if signature:
        low, high = jax_centerloss.center_loss.__kwdefaults__["clip"]
        signature = re.sub(r"\bclip=[\w.]*CLIP\b", f"clip=({low:g}, {high:g})", signature)
    return signature, annotation


def outside_links(app, docname, content):
    """Files that are no pages of the site are shown by GitHub. Pictures are copied."""
    if "/" not in docname:
        content[0] = re.sub(r"(?<!!)(\[[^\]]*\]\()\.\./", rf"\1{GITHUB}", content[0])


def links_of_the_root(app, path, parent, content):
    """CONTRIBUTING.md and CHANGELOG.md lie in the folder above."""
    content[0] = re.sub(r"(\]\()docs/(?=[\w/]+\.md)", r"\1", content[0])
    content[0] = re.sub(r"(\]\()(?![a-z]+:|#|\w+\.md)", rf"\1{GITHUB}", content[0])


def breakable(app, pagename, templatename, context, doctree):
    """Lets long names in a table break after `_`, `.` and `(`, and a signature after its parenthesis."""

    def name(found):
        if len(html.unescape(found[0])) < 18:
            return found[0]
        return re.sub(r"(?<=\w\w)(_|\(|\.(?=[A-Za-z]))", r"\1<wbr>", found[0])

    def cell(found):
        text = found[0].replace('<span class="pre">test_', '<span class="pre name">test_')
        return re.sub(r'(?<=">)[^<\s]{18,}(?=</span>)', name, text)

    if "body" in context:
        body = re.sub(r"<td[ >].*?</td>", cell, context["body"], flags=re.DOTALL)
        context["body"] = body.replace(
            '<span class="sig-paren">(</span>', '<span class="sig-paren">(</span><wbr>'
        )


def as_wide_as_the_page(app, doctree):
    """Pictures, which Sphinx then links to themselves in full size."""
    for image in doctree.findall(nodes.image):
        image["width"] = "100%"


def mathml(display):
    def visit(self, node):
        text = latex2mathml.converter.convert(node.astext(), display=display)
        if display == "block":
            text = f'<div class="math" tabindex="0">{text}</div>'
        self.body.append(text)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # Before napoleon.
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("doctree-read", as_wide_as_the_page)
    app.connect("html-page-context", breakable)
    app.connect("source-read", outside_links)
    app.connect("include-read", links_of_the_root)
