"""The equivalences of the text path, over the table of tiny vision-language targets, with pictures in the prompt."""

import pytest
import torch
from tiny import tiny_draft
from tiny_vlm import HYBRIDS, MULTIMODAL_ROPE, NAMES, image_prompt, tiny_vlm
from tree_rounds import keep_path, verify_one

from fledge.data.samples import Prompt
from fledge.decoding import session, verifier
from fledge.decoding.generate import Sampling, TreeShape, generate, generate_batch, uses_fixed_shapes
from fledge.decoding.verifier import AttentionVerifier
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.registry import proposer_of as real_proposer
from fledge.drafters.rope import LAYOUTS
from fledge.drafters.tree import Trees, ancestors_of
from fledge.errors import UserError
from fledge.target.model import Target

GREEDY = Sampling()
NEW = 14
TREES = (TreeShape(60, 5, 10), TreeShape(8, 5, 1), TreeShape(12, 2, 4))
PARENTS = [0, 0, 0, 0, 1, 1, 2, 4, 4, 7, 9, 9]
LEVELS = [0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5]
TOLERANCE = 2e-5
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
WITH_TREES = [name for name in NAMES if name not in HYBRIDS]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture
def two_pictures(pictures):
    """A prompt with a text, a picture, a text and another picture, by the name of the target."""
    return lambda name, seed=0: image_prompt(name, pictures, "look: ", " and ", seed=seed)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def stock(target: Target, prompt: Prompt, ids: list[int] | None = None, **options):
    """The library's own forward: it makes positions, masks and all by itself."""
    inputs = dict(prompt.model_inputs)
    more = len(ids or prompt.ids) - len(prompt.ids)
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, more))
    with torch.inference_mode():
        return target.model(input_ids=torch.tensor([ids or prompt.ids]), use_cache=False, **inputs, **options)


@pytest.mark.parametrize("name", NAMES)
def test_taps_and_head_are_the_models_own(name, two_pictures):
    """Qwen3-VL adds pictures to the states between its first layers (DeepStack). The library's `hidden_states` are what
    a layer returns, ours what the next one is given, as in vLLM: with them the first taps differ on picture rows only.
    """
    target, prompt = tiny_vlm(name), two_pictures(name)
    ids = torch.tensor(prompt.ids)
    positions = target.positions(ids, prompt.model_inputs)
    found = target.forward(ids[None], position_ids=positions[..., None, :], **prompt.model_inputs)
    expected = stock(target, prompt, output_hidden_states=True)
    seen = ids == target.config.image_token_id if name in DEEPSTACK else torch.zeros_like(ids, dtype=torch.bool)
    for index, layer in enumerate(target.tap_layers):
        assert torch.equal(found.tap_hidden[0, ~seen, index], expected.hidden_states[layer][0, ~seen])
    if name in DEEPSTACK:
        assert not torch.allclose(found.tap_hidden[0, seen, 0], expected.hidden_states[1][0, seen], atol=0.1)
        assert torch.equal(found.tap_hidden[0, :, 2], expected.hidden_states[3][0])
    torch.testing.assert_close(found.last_hidden, expected.hidden_states[-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.head(found.last_hidden), expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_matters(name, two_pictures):
    """The negative control of every test here: another picture, other states behind it."""
    target = tiny_vlm(name)
    one, two = (stock(target, two_pictures(name, seed)).logits[0, -1] for seed in (0, 7))
    assert relative_error(one, two) > 1e-3


@pytest.mark.parametrize("name", MULTIMODAL_ROPE)
def test_positions_and_delta_are_the_librarys(name, two_pictures):
    target, prompt = tiny_vlm(name), two_pictures(name)
    ids = torch.tensor(prompt.ids)
    found = target.positions(ids, prompt.model_inputs)
    inputs = {key: prompt.model_inputs[key] for key in ("mm_token_type_ids", "image_grid_thw")}
    expected, deltas = target.model.model.get_rope_index(ids[None], **inputs)
    assert torch.equal(found, expected[:, 0]) and found.shape == (target.rope_axes, len(ids))
    assert int(found[..., -1].max()) + 1 - len(ids) == int(deltas)
    assert (found[0] != torch.arange(len(ids))).any() or name == "hunyuan_vl"
    assert torch.equal(target.positions(ids, {}), torch.arange(len(ids))), "text alone counts plainly"


def path_to(node: int) -> list[int]:
    return [0] if node == 0 else [*path_to(PARENTS[node]), node]


def tree_of(seed: int) -> Trees:
    parents = torch.tensor([PARENTS])
    drawn = torch.randint(0, 256, (1, len(PARENTS)), generator=torch.Generator().manual_seed(seed))
    return Trees(drawn, parents, torch.tensor([LEVELS]), ancestors_of(parents, max(LEVELS)))


def tree_error(target: Target, prompt: Prompt) -> float:
    """The largest error of states over two rounds: a tree, one of its paths kept, a tree behind it."""
    ids, verifier = prompt.ids, AttentionVerifier(target, 1, len(prompt.ids) + 2 * len(PARENTS))
    found: list[tuple[list[int], torch.Tensor]] = []
    with verifier.running():
        tensor = torch.tensor(ids)
        positions = target.positions(tensor, prompt.model_inputs)
        prefill = verifier.prefill(
            slice(0, 1), tensor[None], taps=False, positions=positions, model_inputs=prompt.model_inputs
        )  # fmt: skip
        found.append((ids, prefill.last_hidden[0, -1]))
        for kept, seed in ((10, 1), (None, 2)):
            nodes = tree_of(seed)
            output = verify_one(verifier, nodes, len(ids))
            for node in (0, 5, 8, 10, 11):
                found.append((ids + nodes.token_ids[0, path_to(node)].tolist(), output.last_hidden[0, node]))
            if kept is not None:
                keep_path(verifier, path_to(kept), len(ids))
                ids = ids + nodes.token_ids[0, path_to(kept)].tolist()
    return max(
        relative_error(target.head(last_hidden), stock(target, prompt, tokens).logits[0, -1])
        for tokens, last_hidden in found
    )


@pytest.mark.parametrize("name", WITH_TREES)
def test_a_tree_behind_pictures_is_its_paths_and_compaction_is_recomputation(name, two_pictures):
    assert tree_error(tiny_vlm(name), two_pictures(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_forgotten_rope_delta_is_found(name, two_pictures, monkeypatch):
    real = AttentionVerifier.prefill

    def forgetful(self, *args, **options):
        output = real(self, *args, **options)
        self._offsets.zero_()
        return output

    monkeypatch.setattr(AttentionVerifier, "prefill", forgetful)
    assert tree_error(tiny_vlm(name), two_pictures(name)) > 100 * TOLERANCE


def test_a_causal_mask_over_gemmas_pictures_is_found(two_pictures, monkeypatch):
    """Gemma 3's picture tokens see each other in both directions: with fledge's own causal mask the states differ."""
    from contextlib import nullcontext

    monkeypatch.setattr(verifier, "stock_attention", lambda config: nullcontext())
    assert tree_error(tiny_vlm("gemma3"), two_pictures("gemma3")) > 100 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_plain_is_the_librarys_generate(name, two_pictures):
    target, prompt = tiny_vlm(name), two_pictures(name)
    ids = torch.tensor([prompt.ids])
    theirs = target.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        **prompt.model_inputs,
    )  # fmt: skip
    found = generate(
        target, None, prompt.ids, max_new_tokens=NEW, sampling=GREEDY, eos_token_ids=(),
        model_inputs=prompt.model_inputs,
    )  # fmt: skip
    assert found.token_ids == theirs[0, len(prompt.ids) :].tolist()
    assert len(set(found.token_ids)) > 2, "a repeated token would prove little"


@pytest.mark.parametrize("name", NAMES)
def test_speculative_is_plain(name, two_pictures, monkeypatch):
    """Whatever the head proposes, after two pictures, after another two, and after text alone, on the same caches."""
    target = tiny_vlm(name)
    turn = 0
    for prompt in (two_pictures(name), Prompt([5, 9, 33]), two_pictures(name, seed=3)):
        options = {"max_new_tokens": NEW, "sampling": GREEDY, "eos_token_ids": (), "model_inputs": prompt.model_inputs}
        expected = generate(target, None, prompt.ids, **options).token_ids
        for kind in ("random", "adversarial"):
            head = tiny_draft(target, kind, eagle31=turn % 2 == 1)
            found = generate(target, head, prompt.ids, tree=TREES[turn % 3], **options)
            assert found.token_ids == expected, (kind, turn)
            turn += 1


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_the_drafter_uses_the_targets_positions(name, two_pictures, monkeypatch):
    """What the head is given at row j is the rope of the target's position of token j, behind the prompt, too."""
    target, prompt = tiny_vlm(name), two_pictures(name)
    given: list[torch.Tensor] = []
    real = DraftModel.rope
    monkeypatch.setattr(DraftModel, "rope", lambda self, ids: (given.append(ids), real(self, ids))[1])
    made = []
    monkeypatch.setattr(
        session, "proposer_of", lambda *args: (made.append(real_proposer(*args)), made[-1])[1]
    )  # fmt: skip
    options = {"max_new_tokens": NEW, "sampling": GREEDY, "eos_token_ids": (), "model_inputs": prompt.model_inputs}
    found = generate(target, tiny_draft(target), prompt.ids, tree=TREES[0], **options)
    ids = torch.tensor(prompt.ids + found.token_ids)
    inputs = dict(prompt.model_inputs)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW))
    expected = target.positions(ids, inputs)
    last = len(prompt.ids) - 1
    of_prompt = expected[..., : last + 1]
    assert any(one.shape == of_prompt.shape and torch.equal(one, of_prompt) for one in given), "the prompt's rows"
    rows = torch.arange(last, len(ids))
    rope = made[0]._rope_of(rows[None])
    for mine, theirs in zip(rope, real(made[0].draft, expected[..., last:]), strict=True):
        assert torch.equal(mine[0], theirs)


def test_every_multimodal_rope_of_the_table_has_a_layout():
    assert {tiny_vlm(name).text_config.model_type for name in MULTIMODAL_ROPE} <= set(LAYOUTS)


@pytest.mark.parametrize("name", WITH_TREES)
def test_text_takes_fixed_shapes_and_pictures_do_not(name):
    target, options = tiny_vlm(name), dict(tree=TREES[2], max_new_tokens=8, sampling=GREEDY, eos_token_ids=())
    prompts = [[token % 60 + 4 for token in range(first, 60, 5)] for first in (0, 30)]
    found = generate_batch(target, tiny_draft(target), prompts, shapes="fixed", **options)
    alone = [generate(target, None, one, shapes="exact", **options) for one in prompts]
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    with pytest.raises(UserError, match="pictures in the prompt"):
        uses_fixed_shapes("fixed", target, None, pictures=True)
