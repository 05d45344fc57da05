"""What model cards say about the base: its name and licence, from its own card; never a guess."""

import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from peft_uniattn.training.model_card import Base, adapter_card, find_base, standalone_card
from peft_uniattn.training.receipt import Receipt

DETAILS = {"plan": {"rank": 8}}


def receipt(**changes):
    settings = {
        "base_model": "lab/base", "data": "data.jsonl", "superblocks": [[0, 1]], "num_layers": 2,
        "kv_bytes_before": 64, "kv_bytes_after": 48, "adapter_parameters": 16, "adapter_bytes": 64,
        "losses": {"base": 1.5}, "prompt": "", "answers": {}, "evaluations": {"after stage 2": {"accuracy": 0.25}},
        "reload_difference": 0.0, "seconds": 60.0, "environment": {"torch": "2"},
    }  # fmt: skip
    return Receipt(**{**settings, **changes})


def hub(monkeypatch, **card):
    def model_info(self, name, **arguments):
        assert arguments["timeout"] <= 5
        return ModelInfo(id=name, cardData=card)

    monkeypatch.setattr(HfApi, "model_info", model_info)


def test_a_licence_on_the_hub_is_named(monkeypatch):
    hub(monkeypatch, license="apache-2.0")
    assert find_base("lab/base") == Base("lab/base", "apache-2.0")


def test_terms_of_its_own_are_named_and_linked(monkeypatch):
    hub(monkeypatch, license="other", license_name="lab-terms", license_link="https://lab.example/terms")
    card = standalone_card(receipt(), DETAILS, find_base("lab/base"))
    assert card.data.license == "other"
    assert card.data.license_name == "lab-terms"
    assert "[lab-terms](https://lab.example/terms)" in card.text


def test_a_folder_says_it_in_its_readme(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    assert find_base(str(tmp_path)) == Base(None, "mit")


@pytest.mark.parametrize("name", [None, "a folder that is not there", "lab/unreachable"])
def test_without_an_answer_nothing_is_claimed(name, monkeypatch):
    def model_info(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    base = find_base(name)
    assert base.licence is None
    assert "licence applies to this model as well." in adapter_card(receipt(), DETAILS, base).text


@pytest.mark.parametrize(
    ("card", "library", "relation"), [(adapter_card, "peft", "adapter"), (standalone_card, "transformers", "finetune")]
)
def test_the_hub_can_file_it_under_its_base(card, library, relation):
    made = card(receipt(), DETAILS, Base("lab/base", "apache-2.0"))
    fields = made.data.to_dict()
    assert (fields["base_model"], fields["base_model_relation"]) == ("lab/base", relation)
    assert (fields["library_name"], fields["license"]) == (library, "apache-2.0")


@pytest.mark.parametrize("card", [adapter_card, standalone_card])
def test_it_loads_in_three_lines_and_says_what_was_measured(card):
    text = card(receipt(), DETAILS).text
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    for part in (
        "| 0 | 1 |",
        "rank 8",
        "1.5000",
        "| accuracy, after stage 2 | 0.2500 |",
        "64 → 48 bytes",
        "@misc{xiong",
    ):
        assert part in text


@pytest.mark.parametrize(("method", "claim"), [("cla", "keys and values"), ("llmdrop", "without attention")])
def test_a_rival_is_not_called_uniattn(method, claim):
    text = standalone_card(receipt(adapter_parameters=0), {"plan": {"method": method, "rank": None}}).text
    assert claim in text
    assert "W_c" not in text


def test_folders_of_a_machine_stay_out_of_a_card():
    made = receipt(
        base_model="/home/me/models/small", data="/home/me/one.jsonl, lab/two", answers={"base": ""}, prompt="?"
    )
    card = str(adapter_card(made, DETAILS))
    assert "/home" not in card
    assert "# UniAttn adapter: small" in card and "| data | one.jsonl, lab/two |" in card
    assert "| answer, base | (nothing) |" in card
