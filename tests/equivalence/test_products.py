"""Packed products change no token in fp32: every tiny target decodes, with a head and without, what it does without
them. Row counts differ between the two ways to decode, so this is also about rows that are filled up."""

import pytest
import torch
from tiny import NAMES, always_packed, prompt, tiny_draft, tiny_model, tiny_target

from fledge.decoding.generate import Sampling, TreeShape, generate
from fledge.target import products
from fledge.target.model import Target
from fledge.target.products import KERNELS, accelerate, is_packed

TREES = (TreeShape(8, 2, 3), TreeShape(6, 4, 1))


def answers(target: Target) -> list[list[int]]:
    draft = tiny_draft(target)
    accelerate(draft, least_bytes=0 if is_packed_anywhere(target.model) else products.LEAST_BYTES)
    options = {"max_new_tokens": 12, "sampling": Sampling(), "eos_token_ids": ()}
    ways = [(None, None), *((draft, tree) for tree in TREES)]
    return [generate(target, drafter, prompt(9), tree=tree, **options).token_ids for drafter, tree in ways]


def is_packed_anywhere(model: torch.nn.Module) -> bool:
    return any(map(is_packed, model.modules()))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_stock_models(name, kernel, monkeypatch):
    expected = answers(tiny_target(name))
    target = Target(tiny_model(name), tap_layers=tiny_target(name).tap_layers)
    monkeypatch.setattr(products, "choice_for", always_packed(kernel))
    accelerate(target.model, least_bytes=0)
    assert is_packed_anywhere(target.model)
    assert answers(target) == expected
    assert not is_packed_anywhere(tiny_target(name).model)
