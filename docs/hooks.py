"""Makes a site of pages that GitHub shows too: the README as home, the sources they link to, equations as MathML."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()([^)#\s]+)(?=[)#])")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.S)
ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):(?=<code>|`)")  # of docstrings
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds index.md, made of the README, and a page for every file outside docs/ that a page links to."""
    home = _moved((ROOT / "README.md").read_text(encoding="utf-8"), Path("README.md"), Path("docs/index.md"))
    files.append(File.generated(config, "index.md", content=home))
    pages = {Path("docs", page.src_uri): page.content_string for page in files.documentation_pages()}
    for path in sorted({path for page, text in pages.items() for path in _outside(text, page)}):
        kept = {"content": _shown(path), "inclusion": InclusionLevel.NOT_IN_NAV}
        files.append(File.generated(config, f"source/{path}.md", **kept))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Links to files outside docs/ lead to the pages made of them."""
    where = Path("docs", page.file.src_uri)  # pyright: ignore[reportAttributeAccessIssue]
    outside = _outside(markdown, where)

    def link(match: re.Match[str]) -> str:
        target = _target(match[2], where)
        return f"{match[1]}{_relative(Path(f'docs/source/{target}.md'), where)}" if target in outside else match[0]

    return LINK.sub(link, markdown)


def on_page_content(content: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Equations become MathML, which browsers draw without a script; Sphinx' roles in docstrings go."""
    drawn = EQUATION.sub(lambda m: convert(html.unescape(m[3]), display="block" if m[2] == "[" else "inline"), content)
    return ROLE.sub("", drawn)


def _target(link: str, page: Path) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _moved(text: str, old: Path, new: Path) -> str:
    """The text with links that are right at the new place."""

    def link(match: re.Match[str]) -> str:
        return match[0] if "://" in match[2] else f"{match[1]}{_relative(_target(match[2], old), new)}"

    return LINK.sub(link, text)


def _outside(text: str, page: Path) -> set[Path]:
    targets = {_target(link[2], page) for link in LINK.finditer(text) if "://" not in link[2]}
    return {path for path in targets if path.parts[0] not in ("docs", "..") and (ROOT / path).exists()}


def _shown(path: Path) -> str:
    """A page of a source file, or of a folder's files."""
    head = f"---\ntitle: {path.name}\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        inside = [p for p in sorted((ROOT / path).iterdir()) if not p.name.startswith(("_", "."))]
        return head + "".join(f"- `{p.name}{'/' * p.is_dir()}`\n" for p in inside)
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _moved(text, path, Path(f"docs/source/{path}.md"))
    return f"{head}`````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n`````\n"
