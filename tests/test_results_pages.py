"""The pages of docs/results are what the raw files beside them say."""

import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_reproduce import FOUND, result

from peft_uniattn.reproduce.record import write_record

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"


def load():
    spec = importlib.util.spec_from_file_location("make_results_pages", DOCS / "make_results_pages.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


maker = load()
PAGES = maker.pages()
PICTURES = [
    (path, picture)
    for path in maker.files_of(maker.FAMILIES[0])
    if path.suffix == ".json"
    for picture in maker.plots_of(path).values()
]


@pytest.mark.parametrize("name", PAGES)
def test_making_a_page_again_gives_the_committed_one(name):
    assert (RESULTS / name).read_text() == PAGES[name], "run python docs/make_results_pages.py"


def test_every_raw_file_is_on_one_page():
    shown = Counter(path.name for family in maker.FAMILIES for path in maker.files_of(family))
    raw = {path.name for path in RESULTS.iterdir() if path.suffix != ".md"}
    assert shown == dict.fromkeys(raw, 1)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert [name for name in PAGES if f"results/{name}" not in navigation] == []


def test_the_main_table_is_the_first_of_the_page_of_quality():
    assert PAGES["quality.md"].partition("\n## ")[2].startswith("reproduce_smollm2_by_loss\n")


@pytest.mark.parametrize(("path", "picture"), PICTURES)
def test_a_picture_is_drawn_from_its_result_and_small(path, picture, tmp_path, monkeypatch):
    kept = picture.read_text()
    monkeypatch.setattr(maker, "PLOTS", tmp_path)
    maker.draw(path)
    assert len(kept) < 100_000
    # What is drawn; versions of matplotlib differ in where they put it.
    assert (tmp_path / picture.name).read_text().count("<use ") == kept.count("<use ")


def test_a_record_of_reproduce_becomes_a_page(tmp_path, monkeypatch):
    row = dataclasses.replace(
        result("post-train", 3, {"a": 51.25}, 1234, loss=2.5),
        environment={"device": "some GPU", "torch": "9.9"},
        curves={"training": [(1, 3.0)]},
    )
    path = tmp_path / "reproduce_new.json"
    write_record(path, [row], model="a model", command="peft-uniattn reproduce --seeds 3", findings=FOUND)
    monkeypatch.setattr(maker, "RESULTS", tmp_path)
    page = maker._page(maker.FAMILIES[0])
    assert "model: a model; hardware: some GPU; versions: torch 9.9; seed: 3; date: 20" in page
    assert "```bash\npeft-uniattn reproduce --seeds 3\n```" in page
    assert "| post-train | 1,234 (100.0 %) | – | 51.2 | 51.2 | – | – | 2.500 | 1 |" in page
    assert "../plots/reproduce_new_curves.svg" in page


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            {"conditions": {"device": "CPU", "threads": 2}, "settings": {"seed": 7}},
            {"hardware": "CPU, 2 threads", "seed": "7"},
        ),
        ({"hardware": "two GPUs", "environment": {"device": "GPU"}}, {"hardware": "two GPUs"}),
        ({"receipt": {"base_model": "m", "environment": {"torch": "2"}}}, {"model": "m", "versions": "torch 2"}),
    ],
)
def test_conditions_are_found_where_files_have_them(raw, said):
    assert maker.facts(json.loads(json.dumps(raw))) == said
