"""The engine's own choice of a tree: costs are measured once, what a head is worth is learned, tokens stay the same."""

import pytest
from tiny import prompt, tiny_draft, tiny_target

from fledge.decoding import default_tree as module
from fledge.decoding.adaptive import RETRY, TreeChoice, decides_rounds
from fledge.decoding.default_tree import (
    LARGE,
    NONE,
    SHARES,
    SMALL,
    PairCosts,
    TreeCosts,
    default_tree,
    key_of,
    measured_costs,
    measured_rounds,
)
from fledge.decoding.generate import Sampling, generate
from fledge.decoding.records import RoundTrace
from fledge.decoding.settings import DraftingSettings
from fledge.decoding.tree_profile import resolve_tree
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

CHEAP = PairCosts({1: 1.0, 16: 1.1}, dict.fromkeys(range(1, 6), 0.01), 0.0)
DEAR = PairCosts({1: 1.0, 16: 9.0}, dict.fromkeys(range(1, 6), 2.0), 0.0)


@pytest.fixture
def target(monkeypatch, tmp_path) -> Target:
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_budgets", {})
    return tiny_target("llama")


def test_costs_are_measured_once_per_pair_of_shapes(target, monkeypatch):
    measured: list[int] = []
    monkeypatch.setattr(module, "measured_costs", lambda *_: measured.append(1) or CHEAP)
    draft, alike, other = tiny_draft(target), tiny_draft(target, seed=2), tiny_draft(target, draft_vocab_size=None)
    tree, budget = default_tree(target, draft)
    assert tree == SMALL and budget is not None
    assert default_tree(target, draft)[1] is budget, "what was learned about a head holds for the next prompt"
    assert default_tree(target, alike)[1] is not budget
    assert len(measured) == 1
    default_tree(target, other)
    assert len(measured) == 2
    assert key_of(target, draft) == key_of(target, alike) != key_of(target, other)


def test_what_is_measured(target):
    """Every part of a round has a cost, and more levels cost more."""
    costs = measured_costs(target, tiny_draft(target))
    assert set(costs.verify_s) == set(module.SIZES) and min(costs.verify_s.values()) > 0
    assert sorted(costs.draft_s) == list(range(1, SMALL.levels + 1))
    assert costs.draft_s[1] < costs.draft_s[SMALL.levels] and costs.overhead_s >= 0


@pytest.mark.parametrize("costs", [CHEAP, DEAR])
def test_tokens_are_plain_decodings(target, monkeypatch, costs):
    """A head that is cheap to follow is followed; one that cannot pay is left after a few rounds."""
    monkeypatch.setattr(module, "measured_costs", lambda *_: costs)
    draft = tiny_draft(target)
    options = {"max_new_tokens": 40, "sampling": Sampling(), "eos_token_ids": ()}
    plain = generate(target, None, prompt(9), **options)
    tree, budget = default_tree(target, draft)
    own = generate(target, draft, prompt(9), tree=tree, budget=budget, trace=True, **options)
    assert own.token_ids == plain.token_ids
    assert own.rounds is not None
    drafting = sum(len(round_.token_ids) > 1 for round_ in own.rounds)
    assert drafting > len(own.rounds) / 2 if costs is CHEAP else drafting < len(own.rounds) / 4


@pytest.mark.parametrize(
    ("flags", "own"),
    [({}, True), ({"top_k": 1}, False), ({"depth": 0}, False), ({"total_token": "auto"}, False),
     ({"adaptive": True}, False), ({"shapes": "fixed"}, False), ({"shapes": "exact"}, True)],
)  # fmt: skip
def test_when_the_engine_chooses(flags, own):
    assert DraftingSettings(**flags).own_choice == own


def test_flags_that_are_not_given_have_the_documented_values():
    assert resolve_tree(None, None, None, head=None) == TreeShape(60, 5, 10)
    assert resolve_tree(None, 2, None, head=None) == TreeShape(60, 2, 10)


def test_where_there_is_nothing_to_decide(target):
    assert default_tree(target, None) == (LARGE, None)
    assert default_tree(target, tiny_draft(target), at_once=4) == (NONE, None)


def test_lookup_by_cost(target, monkeypatch):
    """Its drafts take no time: what they bring decides, and a text that repeats itself needs fewer rounds."""
    asked = []
    monkeypatch.setattr(module, "draft_times", lambda *_: asked.append(1))
    lookup = PromptLookup()
    costs = measured_costs(target, lookup)
    assert not asked and costs.draft_s == {}
    monkeypatch.setattr(module, "measured_costs", lambda *_: PairCosts(CHEAP.verify_s, {}, 0.0))
    tree, budget = default_tree(target, lookup)
    assert budget is not None and key_of(target, lookup) != key_of(target, tiny_draft(target))
    options = {"max_new_tokens": 48, "eos_token_ids": ()}
    ids = [*prompt(6), *prompt(6), *prompt(6)]
    plain = generate(target, None, ids, **options)
    found = generate(target, lookup, ids, tree=tree, budget=budget, trace=True, **options)
    assert found.token_ids == plain.token_ids and found.rounds is not None
    assert any(len(one.token_ids) > 1 for one in found.rounds)


def test_a_head_follows_what_the_text_brought(target, monkeypatch):
    """Rounds without it are made up for: its drafts are those of a head that reads the text from the beginning."""
    monkeypatch.setattr(module, "measured_costs", lambda *_: CHEAP)
    draft, options = tiny_draft(target), {"eos_token_ids": (), "trace": True}
    tree, budget = default_tree(target, draft)
    ids = [*prompt(6), *prompt(6)]
    seen = generate(target, draft, ids, tree=tree, budget=budget, max_new_tokens=60, **options)
    done, free, compared = 1, 0, 0
    for one in seen.rounds or []:
        if one.parents == [0, *range(len(one.parents) - 1)]:
            free += len(one.parents) > 1
        elif free:
            text = [*ids, *seen.token_ids[: done - 1]]
            fresh = generate(target, draft, text, tree=TreeShape(69, 4, 4), max_new_tokens=8, **options)
            assert paths_of(one) <= paths_of((fresh.rounds or [])[0])
            compared += 1
        done += len(one.accepted)
    assert free and compared


def paths_of(one: RoundTrace) -> set[tuple[int, ...]]:
    """The tokens from the root to every node of a tree of a round."""
    paths = [(one.token_ids[0],)]
    for token, parent in zip(one.token_ids[1:], one.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths)


# -- on a GPU: a tree for every answer ---------------------------------------------------------------------------------


def brings(choice: TreeChoice, tokens: float, rounds: int = 200) -> None:
    """Answers in whose rounds the large tree would bring so many tokens."""
    for _ in range(rounds):
        tree = choice.next_tree()
        choice.record(1 if tree is None else 1 + (tokens - 1) * SHARES[tree])


@pytest.mark.parametrize(
    ("round_s", "tokens", "tree"),
    [((1.3, 1.2), 3.0, LARGE), ((2.0, 1.2), 3.0, SMALL), ((1.5, 1.2), 1.2, None), ((1.5, 1.2), 1.4, SMALL)],
)
def test_the_tree_that_promises_most_is_chosen(round_s, tokens, tree):
    choice = TreeChoice(1.0, dict(zip(SHARES, round_s, strict=True)), SHARES)
    brings(choice, tokens)
    chosen = [choice.next_tree() for _ in range(2 * RETRY)]
    assert chosen.count(tree) >= 2 * RETRY - 2


def test_a_draft_that_did_not_pay_is_tried_again():
    choice = TreeChoice(1.0, dict(zip(SHARES, (1.3, 1.2), strict=True)), SHARES)
    brings(choice, 1.0)
    chosen = [choice.next_tree() for _ in range(3 * RETRY)]
    assert chosen.count(None) < 3 * RETRY, "seldom"
    brings(choice, 3.0, rounds=2000)
    assert choice.next_tree() == LARGE


@pytest.fixture
def fixed(monkeypatch):
    """As on a GPU, but for the capture."""
    monkeypatch.setattr(module, "uses_fixed_shapes", lambda shapes, target, drafter: True)


@pytest.mark.usefixtures("fixed")
def test_answers_with_trees_chosen_for_each(target, monkeypatch):
    monkeypatch.setattr(module, "measured_rounds", lambda *_: TreeCosts(1.0, [2.0, 1.9]))
    draft = tiny_draft(target)
    tree, choice = default_tree(target, draft)
    assert tree == LARGE and not decides_rounds(choice) and default_tree(target, draft)[1] is choice
    assert default_tree(target, draft, at_once=4) == (LARGE, None)
    options = {"max_new_tokens": 24, "eos_token_ids": ()}
    plain = generate(target, None, prompt(9), **options)
    used = []
    for shapes in ("fixed", "exact", "fixed", "fixed"):
        found = generate(target, draft, prompt(9), tree=tree, budget=choice, shapes=shapes, **options)
        assert found.token_ids == plain.token_ids
        used.append(choice._current)
    assert used[0] == LARGE and used[-1] is None, "a random head does not pay"


def test_whole_rounds_are_measured(target):
    costs = measured_rounds(target, tiny_draft(target))
    assert len(costs.round_s) == len(SHARES) and costs.plain_s > 0 and min(costs.round_s) > 0
