"""TTT attention against its dense twin: values and every gradient, packed documents, runs in the middle, GQA."""

import pytest
import torch
from emulated_device import CUDA, EmulatedDevice

from fledge.drafters import cpu_kernels
from fledge.drafters.eagle3 import attention_blocks as blocks
from fledge.drafters.eagle3.ttt_attention import _own_backward, dense_ttt_attention, ttt_attention
from fledge.drafters.runs import Run, query_places, runs_of


def tensors(num_rows: int, num_queries: int, later: int, heads: int = 4, kv_heads: int = 2, dim: int = 8):
    generator = torch.Generator().manual_seed(0)

    def rand(rows: int, num_heads: int) -> torch.Tensor:
        return torch.randn(rows, num_heads, dim, generator=generator).requires_grad_()

    return (
        rand(num_queries, heads), rand(num_rows, kv_heads), rand(num_rows, kv_heads),
        [rand(num_queries, kv_heads) for _ in range(later)], [rand(num_queries, kv_heads) for _ in range(later)],
    )  # fmt: skip


def test_runs_are_cut_at_documents():
    active = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert runs_of(active, (3, 3)) == (Run(0, 1, 3), Run(3, 3, 4), Run(3, 5, 6))


def by_products(monkeypatch):
    """What 16-bit numbers on a CPU run, here in fp32 and in small chunks."""
    monkeypatch.setattr(cpu_kernels, "suits", lambda q: True)
    monkeypatch.setattr(cpu_kernels, "QUERIES", 3)


ACTIVE = {
    "every row": ([1] * 7, (7,)),
    "suffix": ([0, 0, 0, 1, 1, 1, 1], (7,)),
    "packed": ([0, 1, 1, 0, 0, 1, 1, 1, 1, 1], (4, 6)),
    "holes": ([0, 1, 1, 0, 1, 0, 1, 1, 0], (9,)),
}


@pytest.mark.parametrize("case", ACTIVE)
@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize("kernel", ["flash", "plain", "plain in parts", "products"])
def test_equals_dense(case: str, later: int, kernel: str, monkeypatch):
    if kernel.startswith("plain"):  # what a device without a flash kernel runs
        monkeypatch.setattr(blocks, "_flash", blocks._plain)
        monkeypatch.setattr(blocks, "_flash_backward", blocks._plain_backward)
    if kernel == "plain in parts":
        monkeypatch.setattr(blocks, "PLAIN_BYTES", 100)  # one or two rows at a time
    if kernel == "products":
        by_products(monkeypatch)
    flags, lengths = ACTIVE[case]
    active = torch.tensor(flags, dtype=torch.bool)
    runs = runs_of(active, lengths)
    q, k, v, later_k, later_v = tensors(len(flags), int(active.sum()), later)
    leaves = [q, k, v, *later_k, *later_v]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    fast = ttt_attention(q, k, v, later_k, later_v, runs)
    fast_grads = torch.autograd.grad((fast * weight).sum(), leaves)
    dense = dense_ttt_attention(q, k, v, later_k, later_v, runs)
    dense_grads = torch.autograd.grad((dense * weight).sum(), leaves)

    torch.testing.assert_close(fast, dense, atol=2e-6, rtol=1e-5)
    for found, wanted in zip(fast_grads, dense_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["every row", "packed", "holes"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("kernel", ["flash", "products"])
def test_a_sliding_window_equals_dense(case: str, window: int, kernel: str, monkeypatch):
    """Chunks of a window's length; the triangle of oldest keys is computed as a causal block read backwards."""
    if kernel == "products":
        by_products(monkeypatch)
    flags, lengths = ACTIVE[case]
    active = torch.tensor(flags, dtype=torch.bool)
    runs = runs_of(active, lengths)
    q, k, v, later_k, later_v = tensors(len(flags), int(active.sum()), 2)
    leaves = [q, k, v, *later_k, *later_v]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (ttt_attention, dense_ttt_attention):
        out = attend(q, k, v, later_k, later_v, runs, window)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, atol=3e-6, rtol=1e-5)
    wide = dense_ttt_attention(q, k, v, later_k, later_v, runs)
    assert ((wide - results[1][0]).abs().max() > 1e-3) == (window < max(lengths))  # control: the window shows


def test_blocks_of_a_window_cover_each_pair_once():
    """Every (row, key) inside the window lies in exactly one block, for all sizes of run, document and window."""
    for first, start, stop, window in [(0, 0, 9, 4), (2, 5, 20, 3), (0, 3, 11, 8), (1, 1, 30, 1), (4, 6, 9, 50)]:
        seen = torch.zeros(stop - start, stop, dtype=torch.int64)
        for _, parts in blocks.blocks_of([Run(first, start, stop)], window):
            for block in parts:
                part = seen[block.queries, block.keys]
                ones = torch.ones(part.shape, dtype=torch.int64)
                part += (
                    (ones.flip(0, 1).tril().flip(0, 1) if block.backwards else ones.tril()) if block.causal else ones
                )
        row, key = torch.arange(start, stop)[:, None], torch.arange(stop)
        assert torch.equal(seen, ((key <= row) & (key > row - window) & (key >= first)).long()), (first, start, window)


def test_dense_twin_would_notice_a_leak_between_documents():
    """Negative control: the same rows as one document give other values."""
    q, k, v, later_k, later_v = tensors(6, 6, 1)
    active = torch.ones(6, dtype=torch.bool)
    two = ttt_attention(q, k, v, later_k, later_v, runs_of(active, (3, 3)))
    one = ttt_attention(q, k, v, later_k, later_v, runs_of(active, (6,)))
    assert (two[:3] - one[:3]).abs().max() < 1e-6
    assert (two[3:] - one[3:]).abs().max() > 0.05


def test_merged_statistics_are_what_makes_the_backward_exact():
    """Negative control: the block's own log-sum-exp instead of the merged one gives wrong gradients."""
    q, k, v, later_k, later_v = tensors(5, 5, 2)
    runs = (Run(0, 0, 5),)
    kernel = blocks.BlockAttention(runs, None)
    _, lse = kernel.attend(q, k, v)
    merged = ttt_attention(q, k, v, later_k, later_v, runs)
    grad = torch.ones_like(merged)
    wrong_q, *_ = kernel.attend_backward(grad, q, k, v, merged, lse)
    right_q, *_ = torch.autograd.grad(dense_ttt_attention(q, k, v, later_k, later_v, runs).sum(), [q])
    own = _own_backward(grad, q, merged, lse, later_k, later_v, wrong_q)
    assert len(own) == 4 and (wrong_q - right_q).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", ["flash", "products"])
def test_runs_may_come_in_any_order(kernel, monkeypatch):
    """Depths at random put deep runs first: rows move, their values do not."""
    if kernel == "products":
        by_products(monkeypatch)
    runs = (Run(4, 7, 10), Run(0, 1, 2), Run(4, 4, 6), Run(0, 3, 4))
    q, k, v, later_k, later_v = tensors(10, 7, 2)
    leaves = [q, k, v, *later_k, *later_v]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (ttt_attention, dense_ttt_attention):
        out = attend(q, k, v, later_k, later_v, runs)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)
    turned = ttt_attention(q, k, v, later_k, later_v, runs[::-1])
    assert (turned - results[1][0]).abs().max() > 0.05  # control: the order of the runs is the order of the rows


@pytest.mark.parametrize("later", [0, 3])
@pytest.mark.parametrize("window", [None, 100])
def test_products_in_bf16_are_near_fp32(later: int, window: int | None):
    """Confident rows too: their log-sum-exp is large, and one 16-bit number would not hold it."""
    runs = (Run(0, 0, 150), Run(200, 240, 400))
    rough = [tensor.detach() * 2 for tensor in flat(tensors(400, 310, later, heads=6, dim=64))]
    rough = [tensor.bfloat16().requires_grad_() for tensor in rough]
    exact = [tensor.detach().float().requires_grad_() for tensor in rough]
    weight = torch.randn(310, 6, 64, generator=torch.Generator().manual_seed(1))

    def results(leaves, attend=ttt_attention):
        q, k, v, *own = leaves
        out = attend(q, k, v, own[:later], own[later:], runs, window)
        return [out.float(), *torch.autograd.grad((out * weight).sum(), leaves)]

    wanted = results(exact, dense_ttt_attention)
    assert cpu_kernels.suits(rough[0]) and not cpu_kernels.suits(exact[0])
    for found, right in zip(results(rough), wanted, strict=True):
        assert error(found, right) < 0.02
    coarse = [tensor.detach().requires_grad_() for tensor in rough]
    original = cpu_kernels._widened
    try:  # control: the second part of the log-sum-exp and of delta is left out
        cpu_kernels._widened = lambda states, number=None: original(
            states, None if number is None else number.bfloat16().float()
        )
        worse = results(coarse)
    finally:
        cpu_kernels._widened = original
    assert error(worse[2], wanted[2]) > 1.3 * error(results(rough)[2], wanted[2])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def flat(parts) -> list[torch.Tensor]:
    q, k, v, later_k, later_v = parts
    return [q, k, v, *later_k, *later_v]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", ["every row", "packed", "holes", "pieces", "a document without queries"])
def test_one_kernel_for_all_documents_equals_dense(case, window):
    """What a GPU runs: queries stand in their documents with zeros between them. Rows of a later step are the first."""
    runs, lengths = {
        "every row": ((Run(0, 0, 7),), (7,)),
        "packed": ((Run(0, 1, 3), Run(4, 5, 10)), (4, 6)),
        "holes": ((Run(0, 1, 3), Run(0, 4, 5), Run(0, 6, 8)), (9,)),
        "pieces": ((Run(4, 7, 10), Run(0, 1, 2), Run(4, 4, 6), Run(0, 3, 4)), (4, 6)),
        "a document without queries": ((Run(0, 2, 4), Run(7, 8, 9)), (4, 3, 3)),
    }[case]
    rows = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    for used in (runs, runs[:1]):
        q, k, v, later_k, later_v = tensors(sum(lengths), sum(run.stop - run.start for run in used), 2)
        rough = [part.detach().bfloat16() for part in (q, k, v, *later_k, *later_v)]
        weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
        with EmulatedDevice() as device:
            places = query_places(rows, lengths, CUDA)
            q, k, v, *own = leaves = [device.put(part).requires_grad_() for part in rough]
            device.forget()
            out = ttt_attention(q, k, v, own[:2], own[2:], used, window, places)
            (out * device.put(weight)).sum().backward()
            counts = device.operations
            assert counts["_flash_attention_forward"] == counts["_flash_attention_backward"] == 1
            assert not device.reads and not device.waits
            fast = [device.peek(part) for part in (out, *(leaf.grad for leaf in leaves))]
        q, k, v, *own = leaves = [part.float().requires_grad_() for part in rough]
        out = dense_ttt_attention(q, k, v, own[:2], own[2:], used, window)
        dense = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
        for found, wanted in zip(fast, dense, strict=True):
            error = (found.float() - wanted).norm() / wanted.norm().clamp_min(1e-3)
            assert error < 0.03, f"{case}, {window=}: {error:.3f}"


def test_queries_at_the_wrong_place_are_noticed():
    """Negative control: rows that say they stand one further on see another key."""
    runs, lengths = (Run(0, 1, 4),), (6,)
    q, k, v = (part.detach().bfloat16() for part in tensors(6, 3, 0)[:3])
    wanted = dense_ttt_attention(q.float(), k.float(), v.float(), [], [], runs)
    errors = []
    with EmulatedDevice() as device:
        for moved in (0, 1):
            places = query_places(torch.arange(1, 4) + moved, lengths, CUDA)
            out = ttt_attention(device.put(q), device.put(k), device.put(v), [], [], runs, None, places)
            errors.append((device.peek(out).float() - wanted).abs().max())
    assert errors[0] < 0.02 and errors[1] > 0.1
