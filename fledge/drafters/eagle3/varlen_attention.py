"""The step-0 part of TTT attention as one flash kernel for all documents, on a GPU.

Block by block (attention_blocks.py), rows in many pieces take many small kernels, and a GPU waits for their launches.
PyTorch's flash kernel for documents of different lengths takes all of them at once, if each document's queries are its
last rows. So the query rows are put where they belong in their documents, zeros between them:

    document  a a a a a a | b b b b         keys     . . . . . . | . . . .
    queries       2   4 5 |   1   3         places   2 3 4 5     | 1 2 3       from the first query to the end
    order of the rows: 4 5 | 1 | 2 | 3      zeros at 3 of a and 2 of b

What is computed for zeros is thrown away: at 2048 tokens a step's attention is a fortieth of its products. Grouped
heads stay grouped, and nothing is merged.
"""

import torch
from torch import Tensor

from fledge.drafters.runs import QueryPlaces

# N rows of all documents, S query rows, G places of queries, h query heads, g key heads, d head_dim, D documents

LARGEST_HEAD = 256  # what the kernel can do


def suits(q: Tensor) -> bool:
    """Whether the kernel takes such queries."""
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= LARGEST_HEAD
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and fits


class VarlenAttention:
    """Attention of the first S query rows. A row sees `window` keys at most, its own included."""

    def __init__(self, where: QueryPlaces, window: int | None, num_rows: int) -> None:
        self.where, self.places = where, where.places[:num_rows]
        self.options = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (S, h, d) over k, v (N, g, d); returns out (S, h, d) and the log-sum-exp (S, h) in fp32."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            self._placed(q), k, v, *self._documents(), 0.0, True, False, **self.options
        )
        return out[self.places], lse.T[self.places]

    def attend_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v in fp32, given the merged out and lse of all rows. Places without a query have no
        gradient, so what else is said of them does not matter."""
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)  # there is no dropout
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            self._placed(grad_out), self._placed(q), k, v, self._placed(out), self._placed(lse).T.contiguous(),
            *self._documents(), 0.0, True, seed, unused, **self.options,
        )  # fmt: skip
        return grad_q[self.places].float(), grad_k.float(), grad_v.float()

    def _documents(self) -> tuple[Tensor, Tensor, int, int]:
        where = self.where
        return where.query_ends, where.key_ends, where.longest_query, where.longest_key

    def _placed(self, rows: Tensor) -> Tensor:
        """(S, ..) -> (G, ..), zeros where there is no query."""
        return rows.new_zeros((self.where.num_places, *rows.shape[1:])).index_copy_(0, self.places, rows)
