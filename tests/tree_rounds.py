"""A verifier's rounds for one sequence whose length the host knows."""

import torch

from fledge.decoding.accept import Accepted
from fledge.decoding.verifier import Lengths, Verifier
from fledge.drafters.tree import Trees
from fledge.target.record import TargetOutput


def known(length: int) -> Lengths:
    return Lengths(torch.tensor([length]), (length,))


def verify_one(verifier: Verifier, trees: Trees, length: int) -> TargetOutput:
    """The target on a tree behind so many committed rows."""
    return verifier.verify(trees, known(length), length + trees.num_nodes, taps=True)


def keep_path(verifier: Verifier, path: list[int], length: int) -> None:
    """Commit these nodes of the tree just verified."""
    nodes = torch.tensor([path])
    verifier.keep(known(length), Accepted(nodes, torch.zeros_like(nodes), torch.tensor([len(path)])))
