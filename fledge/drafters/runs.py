"""Contiguous runs of rows: what attention is asked for, cut at documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fledge.drafters.batch import sent

# S query rows, D documents


@dataclass(frozen=True)
class Run:
    """Query rows [start, stop) of the flat batch, in the document whose first row is `first`."""

    first: int
    start: int
    stop: int


def runs_of(active: Tensor, lengths: Sequence[int]) -> tuple[Run, ...]:
    """Contiguous runs of True in `active` (N,), cut at document boundaries.

    active = 0 1 1 | 1 0 1, lengths = (3, 3)  ->  [1, 3) of the first document, [3, 4) and [5, 6) of the second
    """
    runs, first = [], 0
    flags = active.tolist()
    for length in lengths:
        start = None
        for row in range(first, first + length + 1):
            inside = row < first + length and flags[row]
            if inside and start is None:
                start = row
            elif not inside and start is not None:
                runs.append(Run(first, start, row))
                start = None
        first += length
    return tuple(runs)


@dataclass(frozen=True)
class QueryPlaces:
    """Where the query rows of a batch stand in their documents. Rows of a later step are the first of these."""

    places: Tensor  # (S,) int64 of 0 .. G - 1
    query_ends: Tensor  # (D + 1,) int32, 0 first: where each document's places end
    key_ends: Tensor  # (D + 1,) int32, 0 first: where each document's rows end
    num_places: int
    longest_query: int  # 2 at least: of one query the kernel makes a special case
    longest_key: int


def query_places(rows: Tensor, lengths: Sequence[int], device: torch.device) -> QueryPlaces:
    """For query rows (S,) of the flat batch, in any order, on the host; documents of these lengths."""
    key_ends = [0, *accumulate(lengths)]
    is_query = torch.zeros(key_ends[-1], dtype=torch.bool)
    is_query[rows] = True
    begins = []
    for part, stop in zip(is_query.split(list(lengths)), key_ends[1:], strict=True):
        begins.append(stop - len(part) + int(part.int().argmax()) if part.any() else stop - 1)  # at least one place
    sizes = [stop - begin for begin, stop in zip(begins, key_ends[1:], strict=True)]
    query_ends = [0, *accumulate(sizes)]
    document = torch.bucketize(rows, torch.tensor(key_ends[1:]), right=True)
    places = rows - torch.tensor(begins)[document] + torch.tensor(query_ends)[document]
    return QueryPlaces(
        sent(places, device), sent(torch.tensor(query_ends, dtype=torch.int32), device),
        sent(torch.tensor(key_ends, dtype=torch.int32), device), query_ends[-1], max(2, *sizes), max(lengths),
    )  # fmt: skip
