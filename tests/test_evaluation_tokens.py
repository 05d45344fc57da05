"""Answers are scored from where they begin in training, also where a tokenizer joins them with the prompt."""

import pytest
import torch
from conftest import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from peft_uniattn.evaluation.language_model import LanguageModel

VOCABULARY = {"</s>": 0, "a": 1, ":": 2, "r": 3, "s": 4, ":r": 5, " ": 6}


@pytest.fixture(scope="module")
def language_model():
    joining = Tokenizer(BPE(vocab=VOCABULARY, merges=[(":", "r")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining, eos_token="</s>", pad_token="</s>")
    return LanguageModel(
        pretrained=tiny_model(vocab_size=len(VOCABULARY), dtype=torch.float32), tokenizer=tokenizer, batch_size=1
    )


def test_an_answer_that_is_joined_with_the_prompt_begins_with_the_joint_token(language_model):
    assert language_model._encode_pair("aa:", "rs") == ([1, 1], [5, 4])


def test_an_answer_of_nothing_but_the_joint_token_is_scored(language_model):
    assert language_model._encode_pair("a:", "r") == ([1], [5])


def test_other_answers_are_split_as_lm_eval_splits_them(language_model):
    for context, answer in (("a:", "s"), ("a: ", "s"), ("a", "rs")):
        assert language_model._encode_pair(context, answer) == super(LanguageModel, language_model)._encode_pair(
            context, answer
        )
