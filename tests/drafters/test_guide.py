"""docs/add-a-drafter.md, followed: the drafter of the page is registered, decodes, and changes no text."""

import pytest
from pages import ROOT, run_python
from saved_target import byte_tokenizer
from tiny import prompt, tiny_model

import fledge
from fledge.decoding.generate import generate, generate_batch
from fledge.drafters import registry
from fledge.drafters.tree import TreeShape


@pytest.fixture
def pair(monkeypatch) -> fledge.Speculator:
    monkeypatch.setattr(registry, "DRAFTERS", [*registry.DRAFTERS])
    run_python(ROOT / "docs" / "add-a-drafter.md")
    model = tiny_model("llama", vocab_size=258)
    return fledge.load(model, "repeat", tokenizer=byte_tokenizer(), tree=TreeShape(6, 4, 1))


def test_the_page_s_drafter_is_lossless(pair):
    target, options = pair.target, {"max_new_tokens": 30, "eos_token_ids": ()}
    prompts = [prompt(9), prompt(5), prompt(14)]
    plain = [generate(target, None, ids, **options).token_ids for ids in prompts]
    assert [generate(target, pair.drafter, ids, tree=pair.tree, **options).token_ids for ids in prompts] == plain
    together = generate_batch(target, pair.drafter, prompts, tree=pair.tree, **options)
    assert [one.token_ids for one in together] == plain
    fixed = generate_batch(target, pair.drafter, prompts, tree=pair.tree, shapes="fixed", **options)
    assert [one.token_ids for one in fixed] == plain


def test_what_repeats_is_accepted(pair):
    """Negative control: the drafter is at work. A target whose head likes one token repeats it."""
    head = pair.target.model.lm_head.weight.data
    head.zero_()
    made = generate(pair.target, pair.drafter, prompt(9), tree=pair.tree, max_new_tokens=21, eos_token_ids=())
    assert len(set(made.token_ids)) == 1 and made.tau == 5
    assert type(pair.drafter).__name__ == "RepeatLast"
