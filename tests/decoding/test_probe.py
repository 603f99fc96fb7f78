"""The self-test: what it finds on every odd target is what decoding can do, and it finds planted faults."""

import copy

import pytest
from odd_targets import ODD, ROPE_LIMIT, found, librarys_answer, odd_target
from tiny import ScriptedDraft, prompt, tiny_model

from fledge.decoding import probe as module
from fledge.decoding.generate import Sampling, TreeShape, generate, generate_batch
from fledge.decoding.probe import Ability, ability_of, probe, shape_for, trust
from fledge.decoding.requests import PromptTooLong
from fledge.decoding.running_state import RunningState
from fledge.drafters.registry import PromptLookup
from fledge.errors import UserError
from fledge.target.model import Target

TREE = TreeShape(8, 3, 3)
LONG = [name for name in ODD if name.endswith("longrope")]


def fresh(name: str = "llama") -> Target:
    return Target(tiny_model(name), tap_layers=(1, 2, 3), name=f"fresh-{name}")


def answer(target: Target, drafter, ids: list[int], new: int = 13) -> list[int]:
    options = {"max_new_tokens": new, "sampling": Sampling(), "eos_token_ids": ()}
    return generate(target, drafter, ids, tree=TREE, **options).token_ids


def lines_said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(module, "say", lines.append)
    return lines


# -- every target is right, falls back or is refused -------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
def test_the_answer_is_the_librarys_or_an_error(name, monkeypatch):
    """Before the self-test longrope, Jamba, MPT and doge answered wrongly, and falcon, bloom, llama4 and the sparse
    DeepSeek crashed. The texts grow past every window and past the limit of the longropes."""
    target, expected, lines, ids = odd_target(name), ODD[name][2], lines_said(monkeypatch), prompt(22)
    assert found(target)[0] == expected
    if expected == "refused":
        with pytest.raises(UserError, match=rf"tiny-{name}: cannot be decoded here, because"):
            answer(target, None, ids)
        return
    theirs = librarys_answer(target, ids, 13)
    assert answer(target, None, ids) == theirs and len(set(theirs)) > 2
    drafter = PromptLookup() if name == "gemma3n" else ScriptedDraft(target, ids + theirs, wrong=3)
    for _ in range(2):
        assert answer(target, drafter, ids) == theirs
    words = {"trees": [], "chains": ["drafts chains instead of trees, because "], "plain": ["decodes without drafts"]}
    assert len(lines) == len(words[expected]) and all(
        word in line for word, line in zip(words[expected], lines, strict=True)
    )


# -- longrope ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [ROPE_LIMIT - 1, ROPE_LIMIT, ROPE_LIMIT + 1])
def test_longrope_at_its_limit(length):
    target, ids = odd_target("phi3_longrope"), prompt(length)
    theirs = librarys_answer(target, ids, 8)
    for wrong in (0, 3):
        assert answer(target, ScriptedDraft(target, ids + theirs, wrong=wrong), ids, 8) == theirs


def test_a_batch_on_both_sides_of_the_limit():
    target, prompts = odd_target("phi3_longrope"), [prompt(20), prompt(ROPE_LIMIT + 5), prompt(28)]
    made = generate_batch(target, None, prompts, max_new_tokens=8, eos_token_ids=())
    assert [one.token_ids for one in made] == [librarys_answer(target, ids, 8) for ids in prompts]


def test_a_limit_that_nobody_knows_shows():
    """Control: without reading again, the answer parts from the library's behind the limit."""
    target, ids = copy.copy(odd_target("phi3_longrope")), prompt(20)
    trust(target, Ability("trees", own_cache=True))
    wrong, right = answer(target, None, ids, 30), librarys_answer(target, ids, 30)
    assert wrong[: ROPE_LIMIT - 19] == right[: ROPE_LIMIT - 19] and wrong != right


@pytest.mark.parametrize("name", [*LONG, "ministral3"])
def test_a_rope_that_changes_is_measured(name, monkeypatch):
    """Whatever it is called. A yarn has an original length, too, and does not change there."""
    monkeypatch.setattr(module, "longrope_limit", lambda rope: None)
    assert probe(odd_target(name)).rope_limit == (ROPE_LIMIT if name in LONG else None)


# -- planted faults ----------------------------------------------------------------------------------------------------


def spoil(target: Target, when) -> None:
    """States going into layer 1 are turned around where `when(rows, rows cached before)`."""

    def hook(layer, args, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and when(args[0].shape[1], cache.get_seq_length(1)):
            return (args[0].flip(-1), *args[1:]), kwargs
        return None

    target.layers[1].register_forward_pre_hook(hook, with_kwargs=True)


def test_nothing_is_found_where_nothing_is_wrong(monkeypatch):
    lines, target = lines_said(monkeypatch), fresh()
    assert probe(target) == Ability("trees", own_cache=True) and shape_for(target, TREE) == TREE and not lines


def test_a_chunk_that_differs_from_its_steps(monkeypatch):
    target, lines = fresh(), lines_said(monkeypatch)
    spoil(target, lambda rows, before: rows > 1 and before > 0)
    assert ability_of(target).most == "plain" and "a chain of drafts differ by" in ability_of(target).reason
    assert shape_for(target, TREE) is None and shape_for(target, TREE) is None
    assert len(lines) == 1 and lines[0].startswith("fresh-llama: decodes without drafts, because its hidden states")


def test_a_cache_that_differs_from_a_plain_forward():
    target = fresh()
    spoil(target, lambda rows, before: before > 0)
    with pytest.raises(UserError, match="its hidden states of a token behind its cache differ"):
        answer(target, None, prompt(5))


def test_biases_by_row_instead_of_position():
    """ALiBi in MPT counts rows: right for chains, wrong for trees, whose siblings share a position."""
    ability = ability_of(odd_target("mpt"))
    assert ability.most == "chains" and "of a tree differ by" in ability.reason


def test_a_state_that_is_not_rolled_back(monkeypatch):
    target = fresh("qwen3_next")
    assert probe(target).most == "chains"
    monkeypatch.setattr(RunningState, "_put_back", lambda self, copies: None)
    assert probe(target).most == "plain"


@pytest.mark.parametrize("name", ["mpt", "jamba", "gemma4", "exaone4"])
def test_bf16_rounds_and_is_no_fault(name):
    target = Target(copy.deepcopy(odd_target(name).model).bfloat16(), tap_layers=(1, 2, 3), name=name)
    assert probe(target).most == ODD[name][2]


# -- what it costs, and what limits a text -----------------------------------------------------------------------------


def test_it_costs_a_handful_of_short_forwards(monkeypatch):
    """0.6 s of one core for SmolLM2 in bf16: a forward reads its weights once."""
    target, sizes = fresh(), []
    forward = target.forward
    monkeypatch.setattr(target, "forward", lambda ids, **more: sizes.append(ids.numel()) or forward(ids, **more))
    ability_of(target)
    ability_of(target)
    assert len(sizes) <= 12 and sum(sizes) <= 160  # three of them measure the rope of this one


def test_moshi_ends_at_its_window():
    """Its cache forgets what is behind the window, its mask does not: past it `generate` parts from a plain forward."""
    target = odd_target("moshi")
    assert len(answer(target, None, prompt(60), 13)) == 4
    with pytest.raises(PromptTooLong, match="70 tokens, but tiny-moshi has 64 positions"):
        answer(target, None, prompt(70))
