"""The kernels of a GPU beside their slow twins: on a card as they are, elsewhere in Triton's interpreter.

The interpreter multiplies no bf16 matrices; there float16 stands in for it.
"""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_draft, tiny_model, tiny_target
from torch import nn

from fledge.decoding import exact
from fledge.decoding.accept import least_kept, least_kept_unsorted
from fledge.drafters.base import Emitted
from fledge.drafters.eagle3 import ttt_attention
from fledge.drafters.eagle3.fused_step import FusedStep, fused_step
from fledge.drafters.eagle3.propose import EagleProposer
from fledge.drafters.eagle3.ttt_attention import dense_ttt_attention
from fledge.drafters.runs import Run
from fledge.drafters.tree import TreeShape
from fledge.target import card, gpu, gpu_exact, gpu_products
from fledge.target.attention import attention_by_rows
from fledge.target.fused import fused_layers
from fledge.target.model import Target

pytest.importorskip("triton", reason="Triton is for Linux")
ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
SHORT = torch.bfloat16 if ON_CARD else torch.float16
CLOSE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest number
DTYPES = [torch.float32, SHORT]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """The kernels, also on a CPU."""
    if not ON_CARD:
        found = importlib.import_module("fledge.target.kernels")
        monkeypatch.setattr(card, "kernels", lambda: found)
        monkeypatch.setattr(card, "runs_on", lambda device: True)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def some(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    assert found.shape == expected.shape
    error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < CLOSE[dtype or found.dtype], float(error)


REAL = card.kernels


@pytest.mark.skipif(ON_CARD, reason="a card is made up")
def test_without_a_compiler_pytorch_does_it(monkeypatch, capsys):
    """Containers that only run programs have no C compiler, without which Triton starts nothing."""

    def refuse(*_):
        raise RuntimeError("Failed to find C compiler.\nMore lines")

    monkeypatch.setattr(card, "kernels", REAL)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(card, "_try", lambda found: None)
    REAL.cache_clear()
    try:
        assert card.kernels() is importlib.import_module("fledge.target.kernels"), "negative control"
        REAL.cache_clear()
        monkeypatch.setattr(card, "_try", refuse)
        assert card.kernels() is None and card.kernels() is None
        shown = " ".join(capsys.readouterr().err.split())
        assert shown.count("Triton compiles no kernels here (Failed to find C compiler.)") == 1
    finally:
        REAL.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_more", [False, True])
def test_norm(dtype, one_more):
    states, weight = some(2, 3, 72, dtype=dtype), some(72, dtype=dtype)
    expected = F.rms_norm(states.float(), (72,), weight.float() + one_more, 1e-6)
    assert_close(gpu.rms_norm(states, weight, 1e-6, one_more=one_more), expected, dtype)


def test_beside():
    ids, table, states = torch.tensor([[3, 0], [7, 3]], device=DEVICE), some(8, 24), some(2, 2, 24)
    first, second = some(24), some(24)
    halves = F.rms_norm(table[ids], (24,), first, 1e-6), F.rms_norm(states, (24,), second, 1e-6)
    found = gpu.beside(ids, table, first, states, second, 1e-6)
    assert found is not None
    assert_close(found, torch.cat(halves, -1))
    assert gpu.beside(ids, table.double(), first, states, second, 1e-6) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "rows", "keys", "size"),
    [(1, 8, 2, 1, 40, 16), (2, 6, 2, 5, 300, 24), (1, 4, 4, 33, 130, 32), (3, 8, 2, 1, 65, 80), (1, 2, 1, 2, 20, 256)],
)
def test_attention(dtype, batch, heads, groups, rows, keys, size):
    """Queries, keys and values as a cache has them: not contiguous. Some rows see one key of the first part alone."""
    query = some(batch, rows, heads, size, dtype=dtype).transpose(1, 2)
    key, value = some(2, batch, groups, keys + 7, size, dtype=dtype)[:, :, :, :keys]
    seen = torch.rand(batch, 1, rows, keys, device=DEVICE) < 0.5
    seen[..., 0], seen[..., -1, 1:] = True, False
    mask = torch.zeros(seen.shape, dtype=dtype, device=DEVICE).masked_fill_(~seen, torch.finfo(dtype).min)
    assert gpu.can_attend(query, key, value, mask)
    wide = (one.float() for one in (query, key, value))
    low = torch.zeros(seen.shape, device=DEVICE).masked_fill_(~seen, torch.finfo(torch.float32).min)
    found, expected = gpu.attend(query, key, value, mask, size**-0.5), attention_by_rows(*wide, low, size**-0.5)
    assert_close(found, expected, dtype)


def test_attention_without_a_mask():
    query, key, value = some(2, 4, 1, 16), some(2, 2, 70, 16), some(2, 2, 70, 16)
    assert gpu.can_attend(query, key, value, None)
    assert_close(gpu.attend(query, key, value, None, 0.3), attention_by_rows(query, key, value, None, 0.3))
    assert not gpu.can_attend(some(2, 4, 3, 16), key, value, None), "several rows without a mask are a causal block"
    assert not gpu.can_attend(query, key, value, some(2, 4, 1, 70)), "a mask for each head"


@pytest.mark.parametrize("normed", [None, "before", "behind"])
@pytest.mark.parametrize("one_more", [False, True])
def test_turn_writes_where_it_is_told(normed, one_more):
    """Norm and rotation of heads, into rows of a cache, beside PyTorch's operations."""
    batch, rows, heads, groups, size, hidden = 2, 3, 4, 2, 16, 24
    norms = {name: some(size) for name in ("query_norm", "key_norm")} if normed else {}
    layer = gpu.Layer(
        hidden=hidden, heads=heads, groups=groups, size=size, eps=1e-6, one_more=one_more,
        turned_first=normed == "behind", qkv=some((heads + 2 * groups) * size, hidden), **norms,
    )  # fmt: skip
    states, cos, sin = some(batch * rows, hidden), some(batch, rows, size), some(batch, rows, size)
    product = (states @ layer.qkv.T).view(batch, rows, -1, size)

    def turned(part, norm):
        def scaled(one):
            return one if norm is None else F.rms_norm(one, (size,), norm + one_more, 1e-6)

        def rotated(one):
            low, high = one.chunk(2, -1)
            return one * cos[:, :, None] + torch.cat((-high, low), -1) * sin[:, :, None]

        return scaled(rotated(part)) if normed == "behind" else rotated(scaled(part))

    parts = product.split((heads, groups, groups), 2)
    expected = turned(parts[0], layer.query_norm), turned(parts[1], layer.key_norm), parts[2]
    for one, other in zip(gpu.before_attention(layer, states, cos, sin, batch, rows), expected, strict=True):
        assert_close(one.transpose(1, 2), other)
    cache = torch.zeros(2, 3, groups, 11, size, device=DEVICE)
    places = torch.tensor([[4, 5, 6], [1, 2, 9]], device=DEVICE)
    _, *written = gpu.before_attention(layer, states, cos, sin, batch, rows, (cache[0], cache[1], places))
    for one, other in zip(written, expected[1:], strict=True):
        for slot in range(batch):
            assert_close(one[slot, :, places[slot]].transpose(0, 1), other[slot])
    assert (cache != 0).sum() == 2 * batch * rows * groups * size, "no other row is touched"


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_behind_attention(gelu, around):
    rows, width, hidden, inner = 5, 32, 24, 40
    norms = {name: some(hidden) for name in ("mixed_norm", "out_norm")} if around else {}
    layer = gpu.Layer(
        hidden=hidden, heads=2, groups=1, size=16, eps=1e-6, gelu=gelu, residual=0.5, inner=inner,
        mix=some(hidden, width), mlp_norm=some(hidden), gate_up=some(2 * inner, hidden), down=some(hidden, inner),
        **norms,
    )  # fmt: skip
    states, mixed = some(rows, hidden), some(rows, width)

    def normed(one, norm):
        return one if norm is None else F.rms_norm(one, (hidden,), norm, 1e-6)

    total = states + 0.5 * normed(mixed @ layer.mix.T, layer.mixed_norm)
    gate, up = (normed(total, layer.mlp_norm) @ layer.gate_up.T).chunk(2, -1)
    opened = F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
    expected = total + 0.5 * normed((opened * up) @ layer.down.T, layer.out_norm)
    found, _ = gpu.behind_attention(layer, states, mixed)
    assert_close(found, expected)
    layer.gate_up = None
    sums, of_sums = gpu.behind_attention(layer, states, mixed)
    assert_close(sums, total)
    assert_close(of_sums, normed(total, layer.mlp_norm))


@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 96), (192, 1100)])
def test_products(rows, outputs, inputs):
    """Every shape that may be chosen, with outputs and inputs that it does not divide."""
    states, weight = some(rows, inputs, dtype=SHORT), some(outputs, inputs, dtype=SHORT, scale=0.1)
    bias = some(outputs, dtype=SHORT)
    most = next(most for most in gpu_products.SHAPES if rows <= most)
    shapes = [
        shape if ON_CARD else gpu_products.ProductShape(32, min(shape.inputs, 512), 4, 2)
        for shape in gpu_products.SHAPES[most]
    ]
    for shape in shapes if ON_CARD else shapes[:1]:
        for beside in (None, bias):
            expected = F.linear(states.float(), weight.float(), None if beside is None else beside.float())
            assert_close(gpu_products.multiply(states, weight, beside, shape), expected, SHORT)


@pytest.mark.skipif(not ON_CARD, reason="what is measured needs a card")
@pytest.mark.parametrize("rows", [1, 5, 60, 200])
def test_the_fastest_product_is_the_same_product(rows, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    states, weight = some(rows, 512, dtype=SHORT), some(1024, 512, dtype=SHORT, scale=0.1)
    assert_close(gpu_products.linear(states, weight), F.linear(states.float(), weight.float()), SHORT)
    assert rows > max(gpu_products.SHAPES) or list(tmp_path.rglob("*.json")), "what was measured is kept"


def test_joined_weights_are_kept_once():
    layers = [nn.Linear(8, outputs, bias=True, device=DEVICE) for outputs in (6, 2, 2)]
    before = torch.cat([layer.weight for layer in layers])
    joined = gpu_products.joined_of(*layers)
    assert joined is not None and joined.shape == (10, 8)
    weight, bias = joined.parts()
    assert torch.equal(weight, before) and bias is not None
    assert torch.equal(bias, torch.cat([layer.bias for layer in layers]))
    assert layers[1].weight.data_ptr() == weight[6:].data_ptr()
    layers[1].weight.zero_()
    assert not weight[6:8].any(), "the layers' own are views"
    assert joined.parts()[0].data_ptr() == weight.data_ptr(), "nothing is moved twice"
    layers[0].forward = lambda inputs: inputs
    assert gpu_products.joined_of(*layers) is None, "somebody else computes it"


def test_weights_that_were_joined_while_decoding_can_be_trained():
    """An evaluation decodes between two training steps: what it makes must not be of inference mode."""
    layers = [nn.Linear(8, outputs, device=DEVICE) for outputs in (6, 2)]
    joined = gpu_products.joined_of(*layers)
    assert joined is not None
    with torch.inference_mode():
        weight, _ = joined.parts()
    inputs = some(3, 8)
    with torch.enable_grad():
        sum(layer(inputs).square().sum() for layer in layers).backward()
    torch.optim.AdamW([one for layer in layers for one in layer.parameters()], lr=0.1, fused=ON_CARD).step()
    assert torch.equal(weight[:6], layers[0].weight), "and the joint weight is the trained one"


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_layers_of_stock_models(name):
    """All of them are found, and what they make is tried against the stock forward on the way."""
    model = tiny_model(name).to(DEVICE, torch.float32)
    layers = list(model.model.layers)[:2]
    found = fused_layers(model, layers)
    assert [one.layer for one in found] == layers
    assert all(one.operations is gpu for one in found)


# -- drafting and choosing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "width"), [(3, 700, 4), (2, 1500, 10), (1, 40, 8), (2, 9000, 3)])
def test_best_scores(dtype, rows, cols, width):
    from fledge.drafters import kernels

    logits = some(1, rows, cols, dtype=dtype, scale=3)
    scores, ids = kernels.best_scores(logits, width)
    expected = logits.float().log_softmax(-1).topk(width, -1)
    assert torch.allclose(scores, expected.values, atol=1e-5)
    assert torch.equal(logits.gather(-1, ids), logits.gather(-1, expected.indices)), "of equals, any"
    assert all(len(set(row)) == width for row in ids[0].tolist())


def test_best_scores_of_an_overflow():
    from fledge.drafters import kernels

    logits = some(4, 600)
    logits[1, 5], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    scores, ids = kernels.best_scores(logits, 4)
    assert scores[0].isfinite().all() and (scores[1:] == float("-inf")).all()
    assert all(len(set(row)) == 4 for row in ids.tolist()) and ids.min() >= 0 and ids.max() < 600


@pytest.mark.parametrize("cols", [100, 9000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_nucleus(cols, top_p):
    from fledge.decoding import kernels

    probabilities = some(3, cols, scale=3).softmax(-1)
    found = kernels.least_kept(probabilities, top_p)
    assert torch.allclose(found, least_kept_unsorted(probabilities, top_p), rtol=1e-3)
    assert torch.equal(least_kept(probabilities, top_p, 10**6), found), "the kernel is what is asked"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "groups", "size", "steps"), [(5, 6, 2, 24, 3), (3, 4, 4, 16, 1)])
def test_later_steps(dtype, rows, heads, groups, size, steps):
    from fledge.drafters.eagle3 import kernels

    q, out, grad_out = (some(rows, heads, size, dtype=dtype) for _ in range(3))
    keys, values = ([some(rows, groups, size, dtype=dtype) for _ in range(steps)] for _ in range(2))
    lse, grad_q = some(rows, heads), some(rows, heads, size)
    scores = ttt_attention._own_scores(q, keys)
    merged = torch.logsumexp(torch.cat((lse[..., None], scores), -1), -1)
    weights = torch.exp(scores - merged[..., None])
    mixed = out.float() * torch.exp(lse - merged)[..., None] + ttt_attention._weighted(weights, values, heads)
    found, found_lse = kernels.merge(q, out, lse, torch.stack(keys), torch.stack(values))
    assert_close(found, mixed, dtype)
    assert_close(found_lse, merged)
    other_grad_q = grad_q.clone()
    grads = ttt_attention._own_backward(grad_out, q, found, merged, keys, values, grad_q)
    stacked = torch.stack(keys), torch.stack(values)
    found_grads = kernels.merge_backward(grad_out, q, found, merged, *stacked, other_grad_q)
    assert_close(other_grad_q, grad_q)
    assert_close(torch.cat(found_grads), torch.stack(grads), dtype)


def test_training_takes_the_kernels():
    """Attention of training-time test and its gradients, beside the dense twin."""
    q, k, v = (some(7, heads, 16).requires_grad_() for heads in (4, 2, 2))
    later = [some(7, 2, 16).requires_grad_() for _ in range(4)]
    runs, seed = (Run(0, 0, 4), Run(4, 4, 7)), some(7, 4, 16)
    with torch.enable_grad():
        made = ttt_attention.ttt_attention(q, k, v, later[:2], later[2:], runs)
        expected = dense_ttt_attention(q.cpu(), k.cpu(), v.cpu(), [one.cpu() for one in later[:2]],
                                       [one.cpu() for one in later[2:]], runs)  # fmt: skip
    assert made.grad_fn is not None
    assert_close(made.cpu(), expected)
    of_twin = torch.autograd.grad(expected, (q, k, v, *later), seed.cpu())
    for one, other in zip(torch.autograd.grad(made, (q, k, v, *later), seed), of_twin, strict=True):
        assert_close(one, other)


def on_cpu(monkeypatch):
    """From now on nothing is computed by the kernels."""
    monkeypatch.setattr(card, "runs_on", lambda device: False)
    monkeypatch.setattr(card, "fits", lambda *_: False)


@pytest.mark.parametrize("config", [{}, {"num_layers": 2, "norm_output": True}])
def test_trees_are_those_of_the_slow_step(config, monkeypatch):
    """Two rounds of an EAGLE head: all candidates with their scores, from caches that the kernels write."""
    target = tiny_target("llama")
    draft = tiny_draft(target, **config).to(DEVICE)
    tokens, new = torch.randint(4, 100, (2, 12), device=DEVICE), torch.randint(4, 100, (2, 2), device=DEVICE)
    taps = some(2, 14, len(target.tap_layers), target.hidden_size)

    def candidates() -> list[torch.Tensor]:
        proposer = EagleProposer(draft, TreeShape(20, 3, 3), 2, 64)
        for slot in range(2):
            proposer.fill(slot, tokens[slot], taps[slot, :12], torch.arange(12, device=DEVICE))
        found = []
        for length, emitted in ((12, tokens[:, -1:]), (14, new)):
            count = torch.full((2,), emitted.shape[1], device=DEVICE)
            before = taps[:, length - 1 - emitted.shape[1] : length - 1]
            lengths = torch.full((2,), length - 1, device=DEVICE)
            proposer.follow(Emitted(emitted, count, before, lengths), 40)
            found += proposer.candidates(lengths, proposer.num_levels, 40)
        return found

    found = candidates()
    assert isinstance(fused_step(draft), FusedStep)
    on_cpu(monkeypatch)
    for one, other in zip(found, candidates(), strict=True):
        assert torch.equal(one, other) if one.dtype == torch.int64 else torch.allclose(one, other, atol=1e-4)


# -- the same bits in any company --------------------------------------------------------------------------------------


@pytest.fixture
def dots_of_any_row(monkeypatch):
    """The interpreter multiplies by NumPy, whose sums depend on where in a block a row stands; a card's do not."""
    if ON_CARD:
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, *_):
        found = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(found + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def ancestors_in(parents: list[int]) -> torch.Tensor:
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        seen[node] |= seen[parent]
    return seen


def test_paths_of_a_tree():
    ancestors, levels = ancestors_in([0, 0, 0, 2]), torch.tensor([[0, 1, 1, 2]])
    paths = gpu_exact.Paths.of(torch.tensor([7]), levels, ancestors[None])
    expected = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 2, 3, 0]]
    below = torch.ones(4, 4).tril().bool() & (torch.arange(4) <= levels[0][:, None])
    assert torch.equal(paths.nodes[0] * below, torch.tensor(expected) * below)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "length", "window"),
    [(8, 2, 16, 30, None), (3, 3, 24, 254, 40), (6, 1, 80, 300, None), (8, 2, 16, 520, 300)],
)
def test_attention_has_the_same_bits_in_any_company(heads, groups, size, length, window, dots_of_any_row):
    """A path alone, step by step behind what it has grown to; as a chain; and in a tree beside another sequence, with
    keys behind that are nobody's. Beside the slow twin, which computes row by row."""
    parents = [0, 0, 0, 2, 2, 3, 4, 4, 6, 6]
    path, num_nodes = [0, 2, 4, 6, 9], len(parents)
    levels = torch.tensor([ancestors_in(parents)[node].sum() - 1 for node in range(num_nodes)])
    keys, lengths = length + num_nodes + 21, torch.tensor([length - 7, length], device=DEVICE)
    query = some(2, num_nodes, heads, size, dtype=SHORT).transpose(1, 2)
    cache = some(2, 2, groups, keys, size, dtype=SHORT)

    def attended(rows, tree_levels, ancestors, lengths, cache):
        """With the mask that `Masks` makes of it."""
        batch, num, num_keys = len(lengths), rows.shape[2], cache.shape[3]
        seen, at = torch.zeros(batch, num, num_keys, dtype=torch.bool), torch.zeros(batch, num_keys)
        for b, its in enumerate(lengths.tolist()):
            at[b] = torch.arange(num_keys)
            at[b, its : its + num] = its + tree_levels
            seen[b, :, :its], seen[b, :, its : its + num] = True, ancestors
            if window:
                seen[b] &= at[b] > (its + tree_levels)[:, None] - window
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(SHORT).min)[:, None].to(DEVICE, SHORT)
        of_trees = (one.expand(batch, *one.shape).to(DEVICE) for one in (tree_levels, ancestors))
        paths = gpu_exact.Paths.of(lengths, *of_trees)
        keys, values = cache
        return gpu_exact.attend(rows, keys, values, mask, paths, 0.3), attention_by_rows(rows, *cache, mask, 0.3)

    in_a_tree, twin = attended(query, levels, ancestors_in(parents), lengths, cache)
    assert_close(in_a_tree, twin, SHORT)
    rows = torch.tensor([*range(length), *(length + node for node in path)], device=DEVICE)
    own, its_rows = cache[:, 1:, :, rows], query[1:, :, path]
    line, last = torch.arange(len(path)), torch.tensor([length], device=DEVICE)
    in_a_chain, _ = attended(its_rows, line, ancestors_in([max(0, one - 1) for one in line.tolist()]), last, own)
    assert torch.equal(in_a_tree[1, path], in_a_chain[0])
    for step in range(len(path)):
        one, node = its_rows[:, :, step : step + 1], torch.ones(1, 1, dtype=torch.bool)
        alone, _ = attended(one, torch.tensor([0]), node, last + step, own[:, :, :, : length + step + 1])
        assert torch.equal(alone[0, 0], in_a_chain[0, step]), step
    elsewhere = in_a_tree[1, 5] if not window else in_a_tree[0, 9]
    assert not torch.equal(elsewhere, in_a_tree[1, 9]), "negative control"


def test_products_have_the_same_bits_in_any_company(dots_of_any_row):
    states, weight = some(130, 300, dtype=SHORT), some(70, 300, dtype=SHORT, scale=0.1)
    whole = gpu_products.linear_exact(states, weight)
    assert_close(whole, F.linear(states.float(), weight.float()), SHORT)
    for first, rows in ((0, 1), (129, 1), (3, 5), (60, 9), (64, 66)):
        assert torch.equal(gpu_products.linear_exact(states[first : first + rows], weight), whole[first : first + rows])


@pytest.mark.parametrize("name", ["gemma3", "qwen3"] if ON_CARD else ["gemma3"])
def test_models_have_the_same_bits_in_any_company(name, monkeypatch, dots_of_any_row):
    """By the self-test, with windows, over the end of a part. A model that is small enough for the interpreter."""
    if not ON_CARD:
        monkeypatch.setattr(gpu_exact, "PART", 16)
        monkeypatch.setattr(gpu_exact, "cut", lambda *_: (16, 1))
        monkeypatch.setattr(gpu, "linear", F.linear)  # nothing is measured
        monkeypatch.setattr(exact, "LEVELS", 3)
        monkeypatch.setattr(exact, "WIDTH", 2)

    def target_of(dtype):
        few = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        if name == "gemma3":
            few["layer_types"] = ["sliding_attention", "full_attention"]
        model = tiny_model(name, **few)
        return Target(model.to(DEVICE, dtype), tap_layers=(1,), name=f"tiny-{name}")

    target = target_of(SHORT)
    assert exact.obstacle_on_a_card(target) is None
    assert exact.differing_nodes(target) == 0
    if name != "gemma3":
        return
    assert "float32" in (exact.obstacle_on_a_card(target_of(torch.float32)) or "")
    as_cached = gpu_exact.Paths.of
    monkeypatch.setattr(gpu_exact.Paths, "of", lambda lengths, levels, seen: as_cached(lengths, levels, seen.tril(-1)))
    assert exact.differing_nodes(target), "negative control: nodes that do not see themselves"
