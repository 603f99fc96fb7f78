"""TTT attention against its dense twin: values and every gradient, packed documents, runs in the middle, GQA."""

import pytest
import torch

from fledge.draft import ttt_attention as ttt


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
    assert ttt.runs_of(active, (3, 3)) == (ttt.Run(0, 1, 3), ttt.Run(3, 3, 4), ttt.Run(3, 5, 6))


ACTIVE = {
    "every row": ([1] * 7, (7,)),
    "suffix": ([0, 0, 0, 1, 1, 1, 1], (7,)),
    "packed": ([0, 1, 1, 0, 0, 1, 1, 1, 1, 1], (4, 6)),
    "holes": ([0, 1, 1, 0, 1, 0, 1, 1, 0], (9,)),
}


@pytest.mark.parametrize("case", ACTIVE)
@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize("kernel", ["flash", "plain"])
def test_equals_dense(case: str, later: int, kernel: str, monkeypatch):
    if kernel == "plain":  # what a device without a flash kernel runs
        monkeypatch.setattr(ttt, "_flash", plain_flash)
        monkeypatch.setattr(ttt, "_flash_backward", plain_flash_backward)
    flags, lengths = ACTIVE[case]
    active = torch.tensor(flags, dtype=torch.bool)
    runs = ttt.runs_of(active, lengths)
    q, k, v, later_k, later_v = tensors(len(flags), int(active.sum()), later)
    leaves = [q, k, v, *later_k, *later_v]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))

    fast = ttt.ttt_attention(q, k, v, later_k, later_v, runs)
    fast_grads = torch.autograd.grad((fast * weight).sum(), leaves)
    dense = ttt.dense_ttt_attention(q, k, v, later_k, later_v, runs)
    dense_grads = torch.autograd.grad((dense * weight).sum(), leaves)

    torch.testing.assert_close(fast, dense, atol=2e-6, rtol=1e-5)
    for found, wanted in zip(fast_grads, dense_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["every row", "packed", "holes"])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 50])
def test_a_sliding_window_equals_dense(case: str, window: int):
    """Chunks of a window's length; the triangle of oldest keys is computed as a causal block read backwards."""
    flags, lengths = ACTIVE[case]
    active = torch.tensor(flags, dtype=torch.bool)
    runs = ttt.runs_of(active, lengths)
    q, k, v, later_k, later_v = tensors(len(flags), int(active.sum()), 2)
    leaves = [q, k, v, *later_k, *later_v]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (ttt.ttt_attention, ttt.dense_ttt_attention):
        out = attend(q, k, v, later_k, later_v, runs, window)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, atol=3e-6, rtol=1e-5)
    wide = ttt.dense_ttt_attention(q, k, v, later_k, later_v, runs)
    assert ((wide - results[1][0]).abs().max() > 1e-3) == (window < max(lengths))  # control: the window shows


def test_blocks_of_a_window_cover_each_pair_once():
    """Every (row, key) inside the window lies in exactly one block, for all sizes of run, document and window."""
    for first, start, stop, window in [(0, 0, 9, 4), (2, 5, 20, 3), (0, 3, 11, 8), (1, 1, 30, 1), (4, 6, 9, 50)]:
        seen = torch.zeros(stop - start, stop, dtype=torch.int64)
        for _, blocks in ttt.blocks_of([ttt.Run(first, start, stop)], window):
            for block in blocks:
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
    two = ttt.ttt_attention(q, k, v, later_k, later_v, ttt.runs_of(active, (3, 3)))
    one = ttt.ttt_attention(q, k, v, later_k, later_v, ttt.runs_of(active, (6,)))
    assert (two[:3] - one[:3]).abs().max() < 1e-6
    assert (two[3:] - one[3:]).abs().max() > 0.05


def test_merged_statistics_are_what_makes_the_backward_exact():
    """Negative control: the block's own log-sum-exp instead of the merged one gives wrong gradients."""
    q, k, v, later_k, later_v = tensors(5, 5, 2)
    runs = (ttt.Run(0, 0, 5),)
    out, lse = ttt._flash(q, k, v, True)
    merged = ttt.ttt_attention(q, k, v, later_k, later_v, runs)
    grad = torch.ones_like(merged)
    wrong_q, *_ = ttt._flash_backward(grad, q, k, v, merged, lse, True)
    right_q, *_ = torch.autograd.grad(ttt.dense_ttt_attention(q, k, v, later_k, later_v, runs).sum(), [q])
    own = ttt._own_backward(grad, q, merged, lse, later_k, later_v, wrong_q)
    assert len(own) == 4 and (wrong_q - right_q).abs().max() > 1e-2


def plain_flash(q, k, v, causal):
    out, lse = ttt._plain(*ttt._heads_first(q, k, v), causal)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def plain_flash_backward(grad_out, q, k, v, out, lse, causal):
    first = [x.transpose(0, 1)[None] for x in (grad_out, out)]
    grads = ttt._plain_backward(
        first[0], *ttt._heads_first(q, k, v), first[1], lse.transpose(0, 1)[None], causal
    )  # fmt: skip
    dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
    return dq, ttt._sum_groups(dk, k.shape[1]), ttt._sum_groups(dv, v.shape[1])
