"""Triton kernels for what a drafter chooses from its logits. `best_scores` of `tree.py` has the slow twin.

PyTorch takes the softmax of a row and its best with some ten launches, 45 us for ten rows of 32,000 on an H100.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CANDIDATES = 4096
CHUNK = 512


@triton.jit(do_not_specialize=["cols"])
def _best_of_chunks(logits, values, places, sums, cols, chunks, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The best of each chunk of a row, and what it adds to the softmax: exp of its logits less its largest one."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * cols + c, mask=c < cols, other=float("-inf")).to(tl.float32)
    least: tl.constexpr = -1e38  # of a logit: above what is no logit, or has been chosen
    kept = tl.where(c < cols, tl.maximum(tl.where(x == x, x, least), least), float("-inf"))
    base = (row * chunks + chunk) * WIDTH
    most = tl.max(kept, 0)
    tl.store(sums + row * chunks + chunk, tl.sum(tl.exp(x - most), 0))
    for place in tl.static_range(WIDTH):
        best, at = tl.max(kept, 0, return_indices=True)
        tl.store(values + base + place, best)
        tl.store(places + base + place, chunk * CHUNK + at)
        kept = tl.where(c == chunk * CHUNK + at, float("-inf"), kept)


@triton.jit
def _best_of_rows(
    values, places, sums, scores, ids, chunks, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CANDIDATES: tl.constexpr
):
    row, n, i = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS), tl.arange(0, CANDIDATES)
    of_chunk = tl.load(values + (row * chunks + n) * WIDTH, mask=n < chunks, other=float("-inf"))
    most = tl.max(of_chunk, 0)
    total = tl.sum(tl.load(sums + row * chunks + n, mask=n < chunks, other=0.0) * tl.exp(of_chunk - most), 0)
    lse = most + tl.log(total)
    there = i < chunks * WIDTH
    left = tl.load(values + row * chunks * WIDTH + i, mask=there, other=float("-inf"))
    for place in tl.static_range(WIDTH):
        best, at = tl.max(left, 0, return_indices=True)
        score = best - lse
        tl.store(scores + row * WIDTH + place, tl.where((score > -1e37) & (score < 1.0), score, float("-inf")))
        tl.store(ids + row * WIDTH + place, tl.load(places + row * chunks * WIDTH + at).to(tl.int64))
        left = tl.where(i == at, float("-inf"), left)


def best_scores(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids (.., k) of the best of each row of logits (.., D); a row with NaN has -inf."""
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    rows, cols = flat.shape
    size = CHUNK
    while -(-cols // size) * width > MOST_CANDIDATES:
        size *= 2
    chunks = -(-cols // size)
    values = torch.empty(rows, chunks, width, dtype=torch.float32, device=flat.device)
    places = torch.empty(rows, chunks, width, dtype=torch.int32, device=flat.device)
    sums = torch.empty(rows, chunks, dtype=torch.float32, device=flat.device)
    _best_of_chunks[rows, chunks](
        flat, values, places, sums, cols, chunks, WIDTH=width, CHUNK=size, num_warps=max(1, size // 512)
    )
    scores = torch.empty(rows, width, dtype=torch.float32, device=flat.device)
    ids = torch.empty(rows, width, dtype=torch.int64, device=flat.device)
    candidates = triton.next_power_of_2(chunks * width)
    _best_of_rows[rows,](
        values, places, sums, scores, ids, chunks, WIDTH=width, CHUNKS=triton.next_power_of_2(chunks),
        CANDIDATES=candidates, num_warps=max(1, min(8, candidates // 512)),
    )  # fmt: skip
    shape = (*logits.shape[:-1], width)
    return scores.view(shape), ids.view(shape)
