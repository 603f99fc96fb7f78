"""transformers' own `generate` with our loop in it: the same call, the same answer."""

import pytest
import torch
from tiny import EOS, HYBRIDS, NAMES, prompt, tiny_draft, tiny_model
from transformers import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, NoRepeatNGramLogitsProcessor, TemperatureLogitsWarper

import fledge
from fledge.errors import UserError
from fledge.target.model import Target

TREE = fledge.TreeShape(8, 2, 3)


def padded(*prompts: list[int]) -> dict[str, torch.Tensor]:
    """Prompts with padding on their left, as a tokenizer gives them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def head():
    return tiny_draft(Target(tiny_model("llama")), draft_vocab_size=None)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("llama", "gemma3", "gpt_oss", "deepseek_v3")])
def test_greedy_is_generate_s_own(name):
    model = tiny_model(name)
    head = tiny_draft(Target(model, tap_layers=(1, 2, 3)), draft_vocab_size=None)
    once = fledge.speculate(head, tree=TREE)
    for inputs in (padded(prompt(9)), padded(prompt(9), prompt(14), prompt(3))):
        for options in ({"max_new_tokens": 24}, {"max_new_tokens": 24, "eos_token_id": [EOS, 40, 41, 42, 43]}):
            expected = model.generate(**inputs, **options, do_sample=False)
            found = model.generate(**inputs, **options, do_sample=False, custom_generate=once)
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_running_state_decodes_as_a_chain():
    name = next(iter(HYBRIDS))
    model = tiny_model(name)
    head = tiny_draft(Target(model, tap_layers=(1, 2, 3)), draft_vocab_size=None)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(torch.tensor([prompt(9)]), **options)
    chain = fledge.speculate(head, tree=fledge.TreeShape(4, 2, 1))
    assert torch.equal(model.generate(torch.tensor([prompt(9)]), **options, custom_generate=chain), expected)


def test_a_dictionary_comes_back_where_it_was_asked_for(model, head):
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "typical_p": 0.5}
    found = model.generate(**padded(prompt(9)), **options, custom_generate=fledge.speculate(head, tree=TREE))
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert torch.equal(found.sequences, model.generate(**padded(prompt(9)), **options).sequences)


def test_draws_follow_torch_s_seed_and_are_as_many_as_asked_for(model, head):
    options = {
        "max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.95,
        "num_return_sequences": 3, "custom_generate": fledge.speculate(head, tree=TREE),
    }  # fmt: skip
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(**padded(prompt(9)), **options).tolist())
    assert found[0] == found[1] != found[2]
    assert len({tuple(row) for row in found[0]}) > 1


def test_only_what_the_processors_keep_is_drawn(model):
    """top_k = 1 leaves the greedy token; the processors' values are read, not the config's names alone."""
    greedy = model.generate(**padded(prompt(9)), max_new_tokens=12, do_sample=False)
    once = fledge.speculate("lookup")
    drawn = model.generate(**padded(prompt(9)), max_new_tokens=12, do_sample=True, top_k=1, custom_generate=once)
    assert torch.equal(drawn, greedy)
    cold = LogitsProcessorList([TemperatureLogitsWarper(1e-4)])
    options = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "logits_processor": cold}
    assert torch.equal(model.generate(**padded(prompt(9)), **options, custom_generate=once), greedy)


def test_a_model_under_training_goes_on_as_it_was(model, head):
    model.train()
    model.model.layers[0].eval()
    frozen = next(model.parameters()).requires_grad_(False)
    once = fledge.speculate(head, tree=TREE)
    model.generate(**padded(prompt(9)), max_new_tokens=4, do_sample=False, custom_generate=once)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert not frozen.requires_grad and model.lm_head.weight.requires_grad
    frozen.requires_grad_(True)
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # a step of training between two calls
    expected = model.generate(**padded(prompt(9)), max_new_tokens=12, do_sample=False)
    found = model.generate(**padded(prompt(9)), max_new_tokens=12, do_sample=False, custom_generate=once)
    assert torch.equal(found, expected)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)


def test_a_loop_made_for_every_call_leaves_no_hooks(model, head):
    before = [len(layer._forward_pre_hooks) for layer in model.model.layers]
    for _ in range(3):
        once = fledge.speculate(head, tree=TREE)
        model.generate(**padded(prompt(9)), max_new_tokens=4, do_sample=False, custom_generate=once)
        assert sum(len(layer._forward_pre_hooks) for layer in model.model.layers) == sum(before) + 3
        del once
    assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "num_beams=2"), ({"min_new_tokens": 4}, "min_new_tokens=4"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(9.0)])}, "MaxTimeCriteria"),
        ({"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])}, "NoRepeatNGramLogitsProcessor"),
        ({"position_ids": torch.arange(9)[None] + 3}, "position_ids"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "padded on their right"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(model, options, named):
    with pytest.raises(UserError, match=named):
        model.generate(
            torch.tensor([prompt(9)]), max_new_tokens=4, **options, custom_generate=fledge.speculate("lookup")
        )
