"""Conversations to samples, batch after batch, in this process or several.

Knows templates and processes, nothing of files: the order of the batches is that of the conversations, whoever encoded
them, and only a few batches are under way at a time.
"""

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice

import numpy as np
import torch

from fledge.data.conversations import Conversation
from fledge.data.images import ImageRef
from fledge.data.rejects import Reject
from fledge.data.samples import Sample
from fledge.data.tokenize import ChatTemplate

BATCH = 256  # conversations that are encoded together

Encoded = tuple[list[Conversation], list[list[Sample] | Reject]]
Packed = list[list[tuple[str, np.ndarray, np.ndarray, bool, int, tuple[ImageRef, ...], tuple[str, ...]]] | Reject]


def encode_batches(
    conversations: Iterator[Conversation], template: ChatTemplate, max_length: int | None, min_supervised: int,
    num_proc: int,
) -> Iterator[Encoded]:  # fmt: skip
    """Batches in order; with several processes a few are under way at a time, so memory stays flat."""
    batches = iter(lambda: list(islice(conversations, BATCH)), [])
    if num_proc <= 1:
        for batch in batches:
            yield batch, template.encode_many(batch, max_length, min_supervised)
        return
    under_way: deque[tuple[list[Conversation], Future]] = deque()
    with ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(template,)
    ) as pool:
        for batch in batches:
            under_way.append((batch, pool.submit(_encode_in_worker, batch, max_length, min_supervised)))
            if len(under_way) > 2 * num_proc:
                done, future = under_way.popleft()
                yield done, _unpack(future.result())
        for done, future in under_way:
            yield done, _unpack(future.result())


_worker_template: ChatTemplate | None = None


def _start_worker(template: ChatTemplate) -> None:
    global _worker_template
    _worker_template = template


def _encode_in_worker(batch: list[Conversation], max_length: int | None, min_supervised: int) -> Packed:
    """Arrays, not tensors, travel back: torch would pass each of them through a file descriptor."""
    assert _worker_template is not None, "the worker was not initialised"
    packed: Packed = []
    for result in _worker_template.encode_many(batch, max_length, min_supervised):
        if isinstance(result, Reject):
            packed.append(result)
        else:
            packed.append(
                [
                    (s.id, s.input_ids.numpy(), s.loss_mask.numpy(), s.truncated, s.num_cut, s.images, s.untraced)
                    for s in result
                ]
            )
    return packed


def _unpack(packed: Packed) -> list[list[Sample] | Reject]:
    as_tensor = torch.from_numpy
    return [
        result if isinstance(result, Reject)
        else [
            Sample(id, as_tensor(ids), as_tensor(mask), cut, n, images, untraced)
            for id, ids, mask, cut, n, images, untraced in result
        ]
        for result in packed
    ]  # fmt: skip
