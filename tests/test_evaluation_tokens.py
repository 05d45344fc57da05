"""Answers are scored from where they begin in training, also where a tokenizer would join them with the prompt."""

import pytest
import torch
from conftest import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from peft_uniattn.evaluation.language_model import LanguageModel
from peft_uniattn.training.data import encode_pairs

VOCABULARY = {"</s>": 0, "a": 1, ":": 2, "r": 3, "s": 4, ":r": 5, " ": 6, ": ": 7}


@pytest.fixture(scope="module")
def language_model():
    joining = Tokenizer(BPE(vocab=VOCABULARY, merges=[(":", "r"), (":", " ")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining, eos_token="</s>", pad_token="</s>")
    return LanguageModel(
        pretrained=tiny_model(vocab_size=len(VOCABULARY), dtype=torch.float32), tokenizer=tokenizer, batch_size=1
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("aa:", "rs", ([1, 1, 2], [3, 4])),
        ("a:", "r", ([1, 2], [3])),
        ("a: ", "rs", ([1, 2], [6, 3, 4])),  # lm-eval counts a blank at a prompt's end as the answer's
    ],
)
def test_an_answer_that_would_be_joined_with_the_prompt_leaves_it_its_tokens(language_model, prompt, answer, expected):
    assert language_model._encode_pair(prompt, answer) == expected


@pytest.mark.parametrize(("prompt", "answer"), [("a:", "s"), ("a ", "s"), ("a", "rs")])
def test_other_answers_are_split_as_lm_eval_splits_them(language_model, prompt, answer):
    assert language_model._encode_pair(prompt, answer) == super(LanguageModel, language_model)._encode_pair(
        prompt, answer
    )


@pytest.mark.parametrize("answer", ["rs", "r", "s", "sr"])
def test_they_are_those_of_training(language_model, answer):
    ((ids, start),) = encode_pairs(language_model.tokenizer, ["aa:"], [answer])
    assert language_model._encode_pair("aa:", answer) == (ids[:start], ids[start:])
