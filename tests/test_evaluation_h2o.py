"""Accuracy on a cache that H2O compresses, against a full cache in float64 in which evicted tokens are masked."""

import pytest
import torch
from conftest import loud, prompt, specification, tiny_adapter, tiny_model
from h2o_oracle import H2OOracle
from lm_eval.models.huggingface import HFLM
from typer.testing import CliRunner
from word_tokenizer import word_tokenizer

from peft_uniattn import to_standalone
from peft_uniattn.cli import app
from peft_uniattn.evaluation.compressed import H2OLanguageModel

SUPERBLOCKS = [[1, 2, 3], [4, 5]]  # layer 0 is outside
# Tokens of context and answer: equal and unequal contexts, a single token of each, and one too long for 20 tokens.
LENGTHS = ((9, 3), (9, 1), (12, 4), (9, 3), (1, 1), (1, 2), (23, 2))
MAX_LENGTH = 20


@pytest.fixture(params=["base", "standalone"])
def model(request, float64):
    made = loud(tiny_model())
    if request.param == "base":
        return made, ()
    made = tiny_adapter(made, superblocks=SUPERBLOCKS)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "uniattn_" in name:
                parameter.normal_(std=0.25)
    return to_standalone(made), SUPERBLOCKS


def requests():
    ids = prompt(1, 200)[0].tolist()
    made = []
    for number, (context, answer) in enumerate(LENGTHS):
        first = 11 * number
        made.append((("", ""), ids[first : first + context], ids[first + context : first + context + answer]))
    return made


def language_model(model, budget, batch_size=2):
    options = {"pretrained": model, "tokenizer": word_tokenizer(), "batch_size": batch_size, "max_length": MAX_LENGTH}
    return HFLM(**options) if budget is None else H2OLanguageModel(budget=budget, **options)


def expected(model, superblocks, context, answer, budget):
    """Log-probability of `answer`, each token predicted from a cache that was compressed before."""
    oracle = H2OOracle(
        **specification(model, superblocks),
        capacity=lambda seen: max(1, round(budget * seen)),
        recent=lambda capacity: max(1, round(0.5 * capacity)),
    )
    ids = torch.tensor([(context + answer)[-MAX_LENGTH - 1 :]])
    split = max(1, ids.shape[1] - len(answer) - 1)
    chunks = [ids[:, :split], *(ids[:, index : index + 1] for index in range(split, ids.shape[1] - 1))]
    logs = torch.cat([oracle(chunk)[:, -1:] for chunk in chunks], 1)[0, -len(answer) :].log_softmax(-1)
    target = torch.tensor(answer)
    return logs.gather(-1, target[:, None]).sum().item(), bool((logs.argmax(-1) == target).all())


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_answers_are_predicted_from_what_the_cache_has_kept(model, budget):
    model, superblocks = model
    found = language_model(model, budget)._loglikelihood_tokens(requests())
    wanted = [expected(model, superblocks, context, answer, budget) for _, context, answer in requests()]
    # The logits' softmax is taken in float32, as lm-eval does.
    scores = [torch.tensor([score for score, _ in side]) for side in (found, wanted)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_cache_that_keeps_everything_changes_nothing(model):
    model, _ = model
    scores = [
        [score for score, _ in language_model(model, budget)._loglikelihood_tokens(requests())]
        for budget in (None, 1.0)
    ]
    torch.testing.assert_close(*map(torch.tensor, scores), rtol=1e-5, atol=1e-5)


def test_a_compressed_cache_changes_something(model):
    model, _ = model
    full, compressed = (language_model(model, budget)._loglikelihood_tokens(requests()) for budget in (None, 0.25))
    assert full != compressed


def test_generation_is_refused(model):
    with pytest.raises(ValueError, match="h2o_budget is for tasks whose answers are given"):
        language_model(model[0], 0.5).generate_until([])


def test_the_command_refuses_a_budget_before_it_loads_a_model(tmp_path):
    result = CliRunner().invoke(app, ["eval", "nowhere", "--tasks", "arc_easy", "--h2o-budget", "1.5"])
    assert result.exit_code == 1
    assert "budget=1.5 must be a share" in result.output
