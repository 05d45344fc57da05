"""
What the site needs beyond the Markdown files of this folder: pages that lie elsewhere in the repository, and copies of
the source files that pages link to, so that every link works on GitHub and in the built site alike.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Page of the site -> file of the repository.
ELSEWHERE = {
    "presets.md": "configs/README.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
# Superblocks side by side, [15-18] [19-22], which Markdown would take for a link.
_SUPERBLOCKS = re.compile(r"(?<=\d\]) (?=\[\d)")
# References to code inside docstrings, which are no links.
_REFERENCE = re.compile(r"\[(<code[^>]*>[\w.]+</code>)\]")
# Figures of a table that belong together, 46,080 (80.0 %) or 47.5 ± 0.2, where a narrow column would break them.
_CELL = re.compile(r"<td[^>]*>[^<]*</td>")
_GAP = re.compile(r"(?<=\d) (?=[%±×])|(?<=[±×]) (?=\d)")
# Types as PEFT's docstrings write them, `int`, *optional*, where they are shown as code already.
_TYPE = re.compile(r"<code>\[?`[^<]*</code>")


def on_files(files, config):
    """Add the pages that lie elsewhere, and every source file that a page links to."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for path in map(_source, _LINK.findall(file.content_string)):
            target = _target(file.src_uri, path)
            if target is not None and target.startswith("source/") and files.get_file_from_path(target) is None:
                origin = ROOT / target.removeprefix("source/")
                files.append(File.generated(config, target, abs_src_path=str(origin)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links to files of the repository point to their places in the site, and leave Superblocks alone."""

    def replaced(match):
        target = _target(page.file.src_uri, match[1])
        if target is None:
            return match[0]
        relative = os.path.relpath(target, PurePosixPath(page.file.src_uri).parent)
        return f"]({relative}{match[2] or ''})"

    return _SUPERBLOCKS.sub("  ", _LINK.sub(replaced, markdown))


def on_page_content(html, page, config, files):
    """Take off what docstrings say in Markdown where the site shows code; keep a table's figures in one piece."""
    html = _CELL.sub(lambda match: _GAP.sub("\N{NO-BREAK SPACE}", match[0]), html)
    html = _TYPE.sub(lambda match: re.sub(r"[`*~]|\[(?=`)|(?<=`)\]", "", match[0]), html)
    return _REFERENCE.sub(r"\1", html)


def _source(match: tuple[str, str]) -> str:
    return match[0]


def _target(page: str, link: str) -> str | None:
    """Where the site has what `link` means on `page`; None if the link is right as it is."""
    origin = PurePosixPath(ELSEWHERE.get(page, f"docs/{page}"))
    path = PurePosixPath(os.path.normpath(origin.parent / link))
    if page not in ELSEWHERE and path.is_relative_to("docs"):
        return None
    for name, source in ELSEWHERE.items():
        if str(path) == source or str(path / "README.md") == source:
            return name
    if path.is_relative_to("docs"):
        return str(path.relative_to("docs"))
    if str(path) == "README.md":
        return "index.md"
    return f"source/{path}" if (ROOT / path).is_file() else None
