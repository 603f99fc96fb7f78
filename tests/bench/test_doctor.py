"""The bedside figures are those of real decoding, and every disease only decoding shows is diagnosed by them."""

import dataclasses

import pytest
import torch
from tiny import prompt, tiny_draft, tiny_model, tiny_target

from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.doctor.inspect_head import measured_findings
from fledge.doctor.readings import (
    CHAIN,
    Diagnosis,
    Reading,
    RecordedAnswers,
    chain_rounds,
    diagnose,
    draft_of,
    layers_to_tap,
)
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.checkpoint import draft_tensors
from fledge.drafters.eagle3.head import Head
from fledge.drafters.loss import LossSettings
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target
from fledge.train.module import TTTModule

TOKENS = 24


@pytest.fixture(scope="module")
def target() -> Target:
    """Tapped wherever a reading may want it to be."""
    return Target(tiny_model("llama"), tap_layers=range(8), name="tiny-llama")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [prompt(6 + index % 5, seed=index) for index in range(16)]


@pytest.fixture(scope="module", params=[False, True], ids=["eagle3", "eagle3.1"])
def trained(request, target, prompts) -> Head:
    """A head that knows its target's answers to these prompts by heart: every wrong reading hurts."""
    draft = tiny_draft(tiny_target("llama"), eagle31=request.param, draft_vocab_size=None).requires_grad_(True).float()
    draft.warm_start_head(target.head_weight)
    records = RecordedAnswers(target, prompts, TOKENS).records
    columns = torch.tensor([target.tap_layers.index(layer) for layer in draft.config.tap_layers])
    records = [dataclasses.replace(r, tap_hidden=r.tap_hidden[:, columns].clone(),
                                   last_hidden=r.last_hidden.clone()) for r in records]  # fmt: skip
    module = TTTModule(draft, target.head, CHAIN, LossSettings())
    optimiser = torch.optim.AdamW(draft.parameters(), 3e-3)
    batch = pack(records)
    for _ in range(150):
        optimiser.zero_grad()
        module(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimiser.step()
    return Head(draft.config, draft_tensors(draft.eval(), torch.float32))


def stated(head: Head) -> Reading:
    return Reading("stated", "", head.config, head.tensors.get("d2t"))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.05, seed=3)], ids=["greedy", "sampled"])
def test_a_walk_over_the_numbers_is_a_chain_decode(target, prompts, trained, sampling):
    """The slow twin: decoding itself, round by round."""
    answers = [generate(target, None, ids, max_new_tokens=TOKENS, sampling=sampling).token_ids for ids in prompts[:6]]
    recorded = RecordedAnswers(target, prompts[:6], TOKENS, answers=answers if sampling.temperature else None)
    score = recorded.score(trained, stated(trained))
    own = Target(target.model, tap_layers=trained.config.tap_layers, name="own")
    draft = draft_of(trained, stated(trained), own.embedding_weight)
    tree = TreeShape(total_token=CHAIN + 1, depth=CHAIN - 1, top_k=1)
    emitted = rounds = 0
    begin = 0
    for record, length in zip(recorded.records, recorded.prompt_lengths, strict=True):
        ids = record.input_ids[:length].tolist()
        real = generate(own, draft, ids, tree=tree, max_new_tokens=TOKENS, sampling=sampling)
        tokens = len(record) - length
        lengths = score.lengths[begin : begin + tokens - 1].tolist()
        begin += tokens - 1
        assert real.token_ids == record.input_ids[length:].tolist()
        assert chain_rounds(lengths, tokens) == real.accepted
        emitted, rounds = emitted + tokens - 1, rounds + len(real.accepted)
    assert begin == len(score.lengths) and score.tau == pytest.approx(emitted / rounds)
    least = 1.2 if sampling.temperature else 1.5  # it does accept, and not always the same
    assert score.tau > least and len(set(score.lengths.tolist())) > 2


def ill(head: Head, **changes) -> Head:
    return dataclasses.replace(head, config=dataclasses.replace(head.config, **changes))


def run(target, prompts, head, **more) -> Diagnosis:
    return diagnose(target, head, prompts, max_new_tokens=TOKENS, **more)


def test_a_healthy_head_is_left_alone(target, prompts, trained):
    found = run(target, prompts, trained)
    assert found.best is found.stated and measured_findings(found) == []
    assert {"taps", "norms", "rope"} <= found.settled()


def test_wrong_taps_wrong_rope_wrong_feedback(target, prompts, trained):
    outputs = tuple(layer - 1 for layer in trained.config.tap_layers)
    other_rope = {"rope_type": "default", "rope_theta": 30.0}
    for changes, topic in (({"tap_layers": outputs}, "taps"), ({"rope_parameters": other_rope}, "rope"),
                           ({"norm_before_residual": True}, "norms")):  # fmt: skip
        found = run(target, prompts, ill(trained, **changes))
        assert found.best.reading.config == trained.config, topic
        (finding,) = measured_findings(found)
        assert finding.topic == topic and finding.severity == "error" and "tau" in finding.cost
    if trained.config.fc_norm:
        found = run(target, prompts, ill(trained, norm_output=False))
        assert found.best.reading.config == trained.config


def test_only_the_layers_a_reading_names_are_tapped(target, prompts, trained):
    """As the command loads its target. Once another layer's reading had won, its own neighbours were asked for and the
    doctor crashed; found by walking through the documentation with a head of five steps."""
    sick = ill(trained, tap_layers=tuple(layer - 1 for layer in trained.config.tap_layers))
    tapped = Target(target.model, tap_layers=layers_to_tap(sick.config, target.num_layers), name="tapped")
    assert max(trained.config.tap_layers) + 1 not in tapped.tap_layers
    assert run(tapped, prompts, sick).best.reading.config == trained.config


def test_two_diseases_at_once(target, prompts, trained):
    outputs = tuple(layer - 1 for layer in trained.config.tap_layers)
    sick = ill(trained, tap_layers=outputs, rope_parameters={"rope_type": "default", "rope_theta": 30.0})
    assert run(target, prompts, sick).best.reading.config == trained.config


def test_the_better_of_two_vocabularies(target, prompts):
    """Both are valid; only one makes the head's words the target's. The head knows one word: the commonest."""
    answers = RecordedAnswers(target, prompts, TOKENS)
    said = torch.cat([r.input_ids[n:] for r, n in zip(answers.records, answers.prompt_lengths, strict=True)])
    word = int(said.bincount().argmax())
    right = torch.cat((torch.arange(word, word + 24), torch.arange(word + 30, word + 54))) % 128
    right = right.sort().values - torch.arange(48)
    wrong = torch.arange(0, 96, 2) + 1 - word % 2 - torch.arange(48)  # the other parity: without the word
    draft = tiny_draft(tiny_target("llama"))
    place = (right + torch.arange(48)).tolist().index(word)
    with torch.no_grad():
        for name in ("fc", "midlayer.self_attn.o_proj", "midlayer.mlp.down_proj", "lm_head"):
            draft.get_submodule(name).weight.zero_()
        draft.fc.weight[0] = 1e-3
        draft.lm_head.weight[:, 0] = -1.0
        draft.lm_head.weight[place] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    head = Head(draft.config, draft_tensors(draft, torch.float32) | {"d2t": wrong})
    found = run(target, prompts, head, vocabularies={"d2t": wrong, "t2d": right})
    assert [score.reading.label for score in found.scores if score.reading.topic == "vocab"] == [
        "the vocabulary of t2d"
    ]
    assert found.best.reading.d2t is right and found.best.tau > found.stated.tau


def test_a_deaf_head_is_called_one(target, prompts):
    head = tiny_draft(tiny_target("llama"), "adversarial")
    found = run(target, prompts[:4], Head(head.config, draft_tensors(head, torch.float32)))
    assert [finding.topic for finding in measured_findings(found)] == ["target"]
