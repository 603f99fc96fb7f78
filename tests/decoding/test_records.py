"""The records of decoding refuse what cannot be, and count what was emitted."""

import pytest

from fledge.decoding.records import Generation, Sampling
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
     {"min_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}],
)  # fmt: skip
def test_impossible_sampling(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize("values", [{"total_token": 0}, {"depth": -1}, {"top_k": 0}])
def test_impossible_trees(values):
    with pytest.raises(UserError, match="total_token >= 1, depth >= 0 and top_k >= 1"):
        TreeShape(**values)


@pytest.mark.parametrize("total_token, depth, levels", [(60, 5, 6), (60, 0, 1), (4, 7, 3), (1, 5, 0)])
def test_levels_of_a_tree(total_token, depth, levels):
    assert TreeShape(total_token, depth, 10).levels == levels


def test_tau_counts_no_prefill_token():
    generation = Generation([1, 2, 3, 4, 5, 6, 7], [3, 1], 6, "length", 0.1, 1.0, {}, num_forwards=2)
    assert generation.tau == 3.0
    assert Generation([1], [], 6, "stop", 0.1, 0.0, {}, num_forwards=0).tau != 0  # NaN: no round, no tau
