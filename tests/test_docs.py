"""The pages of docs/: links lead somewhere, figures are those of raw results, the site builds without a warning."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from peft_uniattn import UniAttnConfig
from peft_uniattn.forecast import Serving, forecast

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *DOCS.rglob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")),
    ROOT / "examples" / "README.md",
]


def anchors(page: Path) -> set[str]:
    """What a heading can be linked by: its words in small letters, joined by hyphens."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_and_headings_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if urlsplit(link).scheme:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize(
    ("table", "raw"),
    [
        ("decode", ()),
        ("decode", ("decode_compiled_h100.json",)),
        ("beyond_bytes", ()),
        ("one_layer", ()),
        ("first_token", ()),
        ("stored_tiles", ()),
        ("real_text", ()),
        ("simulated", ()),
        ("training", ()),
    ],
)
def test_tables_of_performance_are_those_of_raw_results(table, raw):
    spec = importlib.util.spec_from_file_location("make_performance_tables", DOCS / "make_performance_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert getattr(module, table)(*raw) in (DOCS / "performance.md").read_text()


def test_losses_of_the_quick_start_are_those_of_the_raw_result():
    receipt = json.loads((DOCS / "results" / "quickstart.json").read_text())["receipt"]
    page = (DOCS / "quickstart.md").read_text()
    assert all(f"| {step} | {loss:.4f} |" in page for step, loss in receipt["losses"].items())
    assert f"{receipt['seconds'] / 60:.1f} minutes" in page
    assert f"{receipt['adapter_bytes'] / 2**20:.1f} MiB" in page


def test_figures_of_the_plan_are_those_of_the_command():
    full, low = forecast("llama-3.1-8b", UniAttnConfig(), Serving(16, 8192), rank=64).unified
    page = (DOCS / "plan.md").read_text()
    assert f"{low.time_ratio:.3f} of the time" in page
    assert f"{full.time_ratio:.3f} with\nfull compensation" in page


class Links(HTMLParser):
    """What a page of the site refers to, and the places in it that can be referred to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links, self.names = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name) and tag != "link"]
        self.names |= {attributes[name] for name in ("id", "name") if attributes.get(name)}


def test_the_site_builds_without_a_warning_and_all_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 25
    for page, parsed in pages.items():
        for link in parsed.links:
            address = urlsplit(link)
            if address.scheme or link in ("#", "."):
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.exists(), f"{page.name}: {link}"
            if address.fragment and target in pages and not address.fragment.startswith("__"):
                assert unquote(address.fragment) in pages[target].names, f"{page.name}: {link}"
