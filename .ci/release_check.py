"""Does the version agree with CHANGELOG.md, and with the tag of a release?

python .ci/release_check.py            at any time, as CI runs it
python .ci/release_check.py v0.1.0     for a release; prints its section of CHANGELOG.md, for the notes

CHANGELOG.md has a section a version, the newest first: "## 0.2.0 (unreleased)" or "## 0.1.0 (2026-12-01)".
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_version(init: str) -> str:
    """Return what `__version__` is in the text of `jax_centerloss/__init__.py`."""
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', init, flags=re.MULTILINE)
    return version


def check(version: str, changelog: str, tag: str | None = None) -> str:
    """Return the text of the changelog's newest section, or raise a ValueError: what does not agree."""
    _, *parts = re.split(r"^## (.*)$", changelog, flags=re.MULTILINE)
    sections = []
    for heading in parts[::2]:
        named = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", heading)
        if named is None:
            raise ValueError(
                f"CHANGELOG.md: got the heading {heading!r}, expected a version and (unreleased) or a date"
            )
        sections.append(named.groups())
    if not sections:
        raise ValueError("CHANGELOG.md has no section: begin one with '## 0.1.0 (unreleased)'")
    (newest, date), *older = sections
    for name, its_date in older:
        if its_date == "unreleased":
            raise ValueError(f"CHANGELOG.md: {name} is older than {newest}, but has no date")
    if newest != version:
        raise ValueError(f"__version__ is {version}, but the newest section of CHANGELOG.md is {newest}")
    if tag is not None and tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, but __version__ is {version}: its tag is v{version}")
    if tag is not None and date == "unreleased":
        raise ValueError(f"CHANGELOG.md says that {version} is unreleased: put its date there, then tag")
    return parts[1].strip()


if __name__ == "__main__":
    init = (ROOT / "jax_centerloss" / "__init__.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        text = check(read_version(init), changelog, *sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
    if sys.argv[1:]:
        print(text)
