"""What a package index shows, and what a release says of itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dywspan import __version__

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'(?:\]\(|src="|href=")([^)" ]+)')


def test_pictures_and_links_of_the_readme_survive_on_a_package_index() -> None:
    toml = pytest.importorskip("tomllib")  # Python 3.11
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = {link.partition("#")[0] for link in LINK.findall(text) if not re.match(r"https?:|#", link)}
    assert relative and all((ROOT / link).exists() for link in relative)
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = LINK.findall(text)
    assert all(re.match(r"https?://|#", link) for link in links)
    base = project["project"]["urls"]["Repository"]
    for link in relative:
        raw = base.replace("https://github.com", "https://raw.githubusercontent.com")
        picture = link.endswith((".png", ".svg"))
        wanted = f"{raw}/v$HFPR_VERSION/{link}" if picture else f"{base}/blob/v$HFPR_VERSION/{link}"
        assert any(found.startswith(wanted) for found in links), link


def test_version_changelog_and_citation_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version,), (date,) = (re.findall(rf'^{key}: "?([^"\n]+)', citation, re.M) for key in ("version", "date-released"))
    assert released[0] == (version, date) and __version__.startswith(version)
