"""The documentation site: `sphinx-build -W -n --keep-going -b html docs out/site`, without a network too."""

import ast
import inspect
import logging
import re
import textwrap
import tomllib
from pathlib import Path

import latex2mathml.converter
import optax
from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.ext.intersphinx import InventoryAdapter

import jax_centerloss

project = "jax-centerloss"
author = ""
copyright = "The jax-centerloss authors"
version = release = jax_centerloss.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Pages. Their code is run by tests/test_docs.py, not here.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# API. Signatures are those of the source: see `as_written`.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 72
toc_object_entries = False
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "references"), ("Attributes", "params_style")]
nitpick_ignore_regex = [("py:class", ".*")]  # Types in signatures, of projects that may be out of reach.

html_theme = "sphinx_book_theme"
html_title = f"jax-centerloss {release}"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["breaks.js"]
html_copy_source = False
html_show_sphinx = False
html_use_index = html_domain_indices = False
html_math_renderer = "mathml"
html_theme_options = {
    "logo": {"text": "jax-centerloss"},
    "repository_url": "https://github.com/jax-centerloss/jax-centerloss",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
}
GITHUB = "https://github.com/jax-centerloss/jax-centerloss/blob/main/"

# Without a network the site has no links to other projects.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "jax": ("https://docs.jax.dev/en/latest/", None),
    "flax": ("https://flax.readthedocs.io/en/stable/", None),
    "optax": ("https://optax.readthedocs.io/en/stable/", None),
}
intersphinx_timeout = 5
logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(
    lambda record: "failed to reach" not in str(record.msg)
)

SHORT = {
    "jnp": "jax.numpy",
    "np": "numpy",
    "nnx": "flax.nnx",
    "nn": "flax.linen",
    "checkify": "jax.experimental.checkify",
}
OWN = {*jax_centerloss.__all__, "nnx.CenterLoss", "linen.CenterLoss"} - {"nnx", "linen"}

# Words for the search, by the heading that they lead to.
SEARCH_WORDS = tomllib.loads(Path(__file__).with_name("search_words.toml").read_text(encoding="utf-8"))

# Private names of types, and a default that is not one.
PUBLIC = {
    r"(?:_checks\.)?\bCLIP\b": "({:g}, {:g})".format(*jax_centerloss.center_loss.__kwdefaults__["clip"]),
    r"\bClip\b": "tuple[float, float] | None",
    r"\bReduceFn\b": "Callable | None",
    r"\bAxisName\b": "Hashable",
    r"\bOutSharding\b": "NamedSharding | PartitionSpec | Format",
    r"\bSource \| Any\b": "Mapping | str | os.PathLike | Any",
    r"\b(?:jax\.nn\.initializers|lax)\.": "",
    r"(\blabels: ArrayLike) \| None=None": r"\1",
}

# The functions that `row_optimizer` returns have headings of their own.
for function in jax_centerloss.row_optimizer(optax.sgd(0.5)):
    setattr(jax_centerloss.row_optimizer, function.__name__, function)


def as_written(app, what, name, obj, options, signature, annotation):
    """Types and defaults as the source has them; of a module its `__init__`, or its fields."""
    if signature is None or name.endswith(".Centers"):
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    if isinstance(node, ast.ClassDef):
        node = next((part for part in node.body if getattr(part, "name", "") == "__init__"), node)
    if isinstance(node, ast.ClassDef):
        text, returned = ", ".join(ast.unparse(p) for p in node.body if isinstance(p, ast.AnnAssign)), None
    else:
        text, returned = ast.unparse(node.args).removeprefix("self, "), ast.unparse(node.returns)
    for private, public in PUBLIC.items():
        text = re.sub(private, public, text)
    return f"({text})", None if what == "class" else returned


def as_rst(app, what, name, obj, options, lines):
    """Docstrings have code in single backquotes, as Markdown has."""

    def double(code):
        return "`" + re.sub(r"\n *", " ", code[0]) + "`"

    lines[:] = re.sub(r"(?<!`)`[^`]+`(?!`)", double, "\n".join(lines)).split("\n")


def link_names(app, doctree):
    """Links the first mention of a name on a page to where it is documented, also by JAX, Flax or optax."""
    known = {name for names in InventoryAdapter(app.env).main_inventory.values() for name in names}
    links = nodes.title, nodes.reference, addnodes.pending_xref
    done = {id(inner) for kind in links for link in doctree.findall(kind) for inner in link.findall()}
    for literal in [*doctree.findall(nodes.literal)]:
        name = re.sub(r"^jax_centerloss\.|\(.*", "", literal.astext())
        first, dot, rest = name.partition(".")
        full = f"jax_centerloss.{name}" if name in OWN else SHORT.get(first, first) + dot + rest
        if id(literal) not in done and full not in done and (name in OWN or (dot and full in known)):
            done.add(full)
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=full)
            literal.replace_self(link)
            link += literal


def search_words(app, doctree):
    """Lets the search find a heading by words that are not in it, before all others."""
    for place, words in SEARCH_WORDS.items():
        page, _, slug = place.partition("#")
        if page == app.env.docname:
            sections = [node for node in doctree.findall(nodes.section) if slug in ("", node.get("slug"))]
            if not sections:
                raise ExtensionError(f"search_words.toml: there is no heading {place}")
            anchor = sections[0]["ids"][0] if slug else ""
            entries = [("single", word, anchor, "main", None) for word in words]
            sections[0].insert(1, addnodes.index(entries=entries))


def source(app, docname, content):
    """Links to files that are no pages lead to GitHub, and numbers in tables break before ± and [ only."""
    if docname == "tutorial":  # Colab opens it, too, so that its links to these pages are whole.
        site = r"https://jax-centerloss\.github\.io/jax-centerloss"
        content[0] = re.sub(rf"{site}/([\w/]+)\.html", r"\1.md", content[0])
    elif "/" not in docname:
        content[0] = re.sub(r"(?<!!)(\[[^\]]*\]\()\.\./", rf"\1{GITHUB}", content[0])
        # A symbolic link, which MyST would follow to a file that is no page.
        content[0] = re.sub(r"\[([^\]]+)\]\(tutorial\.ipynb\)", r"{doc}`\1 <tutorial>`", content[0])

    def keep_together(row):
        return re.sub(r"(?<=±) (?=\d)|(?<=\d,) (?=[+-]\d)", "\u00a0", row[0])

    content[0] = re.sub(r"^\|.*$", keep_together, content[0], flags=re.MULTILINE)


def as_wide_as_the_page(app, doctree):
    """Pictures, which Sphinx then links to themselves in full size. Those on cards are links already."""
    for image in doctree.findall(nodes.image):
        if not any(name.startswith("sd-") for name in image["classes"]):
            image["width"] = "100%"


def mathml(display):
    def visit(self, node):
        text = latex2mathml.converter.convert(node.astext(), display=display)
        text = text.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')  # A norm grows by \left only.
        if display == "block":
            text = f'<div class="math" tabindex="0">{text}</div>'
        self.body.append(text)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml("inline"), mathml("block"))
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # Before napoleon.
    app.connect("autodoc-process-signature", as_written)
    app.connect("doctree-read", as_wide_as_the_page)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", search_words)
    app.connect("source-read", source)
