"""How the best tree is found: ranks and choice by hand, and agreement with the trees decoding really builds."""

import numpy as np
import pytest
import torch
from block_reference import tiny_block
from tiny import prompt, tiny_draft, tiny_target

from fledge.data.samples import Prompt
from fledge.decoding import costs, tune
from fledge.decoding.costs import MAX_LEVELS, RoundCosts, emitted_between
from fledge.decoding.tree_profile import TreeProfile, profile_path, read_profile, resolve_tree, write_profile
from fledge.decoding.tune import best_by_nodes, continuation_ranks, expected_tau
from fledge.drafters.eagle3.propose import EagleProposer
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.tree import TreeShape, candidate_levels
from fledge.errors import UserError


def test_ranks_of_the_true_continuation():
    """root -> a b; a -> c d; b -> e f, scores as in `tree.py`; the text goes on with a, then d."""
    scores = np.array([-0.1, -2.5, -0.4, -1.9, -2.6, -4.0])
    tokens, parents = np.array([1, 2, 3, 4, 5, 6]), np.array([-1, -1, 0, 0, 1, 1])
    ranks = continuation_ranks(scores, tokens, parents, np.array([1, 1, 2, 2, 2, 2]), [1, 4, 9])
    assert ranks[0, 0] == 0 and np.isinf(ranks[0, 1])  # one level: a is the best; d is deeper
    assert list(ranks[1, :3]) == [0, 2, np.inf]  # two levels: a, c, d
    for nodes, tau in ((2, 2), (3, 2), (4, 3)):
        assert expected_tau([ranks], nodes, 2) == tau
    assert expected_tau([ranks], 4, 1) == 2


@pytest.mark.parametrize("width", [1, 3])
def test_expected_tau_is_what_the_tree_of_decoding_keeps(width):
    """For every smaller tree: build it as decoding does, walk down the true continuation, count."""
    target = tiny_target("llama")
    draft = tiny_draft(target, "random", draft_vocab_size=None)
    tokens = torch.tensor(prompt(30))
    taps = target.forward(tokens[None]).tap_hidden[0].clone()

    def followed(shape: TreeShape, root: int):
        """A proposer behind the text up to the root, which it has just followed."""
        proposer = EagleProposer(draft, shape, 1, 64 + shape.total_token)
        proposer.fill(0, tokens[:root], taps[:root], torch.arange(root))
        emitted = emitted_between(tokens, taps, root, root)
        proposer.follow(emitted, root + proposer.rows_ahead)
        return proposer, emitted, root + proposer.rows_ahead

    for root in (5, 12, 20):
        truth = tokens[root + 1 :].tolist()
        shape = TreeShape(len(candidate_levels(width, MAX_LEVELS)) + 1, MAX_LEVELS - 1, width)
        large, emitted, num_keys = followed(shape, root)
        found = large.candidates(emitted.lengths, MAX_LEVELS, num_keys)
        scores, drafted, parents = (x[0].float().detach().numpy() for x in found)
        truth[: min(2, width)] = [int(drafted[width - 1]), *truth[1:2]]  # make the continuation go at least one level
        ranks = continuation_ranks(scores, drafted, parents, candidate_levels(width, MAX_LEVELS).numpy(), truth)
        for nodes, levels in ((width + 1, 1), (6, 2), (9, 4), (30, 8)):
            small, emitted, num_keys = followed(TreeShape(nodes, levels - 1, width), root)
            trees = small.propose(emitted, levels, num_keys)
            parents_of, tokens_of = trees.parents[0].tolist(), trees.token_ids[0].tolist()
            node, kept = 0, 0
            for token in truth:
                below = range(1, len(tokens_of))
                children = [i for i in below if parents_of[i] == node and tokens_of[i] == token]
                if not children:
                    break
                node, kept = children[0], kept + 1
            assert expected_tau([ranks], nodes, levels) == 1 + kept


def test_the_best_tree_weighs_acceptance_against_cost():
    """Free verification: the tree that holds all. Costly verification: the smallest with two true tokens."""
    ranks = np.full((MAX_LEVELS, MAX_LEVELS), np.inf)
    for levels in range(1, MAX_LEVELS + 1):
        ranks[levels - 1, :levels] = [0, 10, 20, 30, 40, 50, 60, 70][:levels]
    draft_s = {(10, levels): 0.001 for levels in range(1, MAX_LEVELS + 1)}

    def best(per_node):
        costs = RoundCosts(0.01, {nodes: 0.01 + per_node * nodes for nodes in tune.NODES}, draft_s, 0.0)
        return max(best_by_nodes({10: [ranks]}, costs), key=lambda point: point["tokens_per_s"])

    assert best(0.0)["total_token"] >= 72 and best(0.0)["depth"] == 7
    assert (best(0.05)["total_token"], best(0.05)["tau"]) == (12, 3.0)


def test_tune_measures_chooses_and_confirms(monkeypatch):
    monkeypatch.setattr(tune, "NODES", (2, 4, 8))
    monkeypatch.setattr(tune, "WIDTHS", (1, 3))
    monkeypatch.setattr(costs, "TURNS", 1)
    from fledge.decoding.records import Sampling

    target = tiny_target("llama")
    draft = tiny_draft(target, draft_vocab_size=None)
    profile = tune.tune(target, draft, [Prompt(prompt(8))], sampling=Sampling(), max_new_tokens=20, eos_token_ids=())
    assert len(profile.curve) == 3 and profile.tree.total_token in (2, 4, 8)
    assert profile.tokens_per_s == max(point["tokens_per_s"] for point in profile.curve)
    assert set(profile.measured) == {"plain", "chosen", "default"} and min(profile.measured.values()) > 0
    with pytest.raises(UserError, match="too short to tune"):
        tune.tune(target, draft, [Prompt(prompt(8))], sampling=Sampling(), max_new_tokens=4, eos_token_ids=())


def test_a_drafter_of_few_levels_is_tuned():
    """A block draft of three slots proposes no deeper tree than that, however deep the measured ones are."""
    target, draft = tiny_target("llama"), tiny_block(tiny_target("llama"), "dspark", block_size=3)
    whole = Prompt(prompt(9), {}).followed_by(prompt(20))
    ranks = list(tune.ranks_along(target, draft, [(Prompt(prompt(9), {}), whole.ids[9:])], 2))
    assert ranks and all(np.isinf(one[:, 3:]).all() for one in ranks)
    times = costs.draft_times(target, draft, prompt(12), 2)
    assert list(times) == list(range(1, MAX_LEVELS + 1)) and times[3] == times[MAX_LEVELS]


def test_a_drafter_of_chains_has_no_tree_to_tune():
    with pytest.raises(UserError, match="no trees to tune"):
        costs.tree_proposer(PromptLookup(), costs.largest_tree(3), 0)


def some_profile(hardware):
    return TreeProfile(
        tree=TreeShape(24, 4, 6), tau=2.5, tokens_per_s=30.0, plain_tokens_per_s=20.0, temperature=0.0, measured={},
        curve=[], costs={"verify_s": {}, "draft_s": {}, "overhead_s": 0.0}, hardware=hardware,
    )  # fmt: skip


def test_auto_reads_the_profile_and_numbers_do_not(tmp_path, capsys):
    from fledge import provenance

    head = tmp_path / "head"
    write_profile(profile_path(str(head), None), some_profile(provenance.hardware()))
    assert resolve_tree("auto", 5, 10, head=str(head)) == TreeShape(24, 4, 6)
    assert "another machine" not in capsys.readouterr().err
    assert resolve_tree(60, 5, 10, head=str(head)) == TreeShape(60, 5, 10)


def test_a_profile_of_another_machine_is_used_with_a_warning(tmp_path, capsys):
    path = tmp_path / "profile.json"
    write_profile(path, some_profile({"cpu": "abacus", "gpus": [], "torch_threads": 1}))
    assert resolve_tree("auto", 5, 10, head=None, path=path) == TreeShape(24, 4, 6)
    assert "another machine: cpu abacus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [(None, "fledge bench --tune"), ("{", "not a tree profile"), ("{}", "not a")]
)
def test_a_missing_or_broken_profile_says_what_to_do(tmp_path, text, message):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_profile(path)
