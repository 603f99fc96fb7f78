"""The CPU's kernels are PyTorch's, to rounding, in value and gradient, for every layout that training multiplies."""

import pytest
import torch
import torch.nn.functional as F

from fledge.drafters import cpu_kernels
from fledge.drafters.batch import pack
from fledge.drafters.cpu_kernels import filled_up, is_argmax, linear, num_filler, product
from fledge.target.record import TargetRecord


def matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).T
    if layout == "sliced":
        return torch.randn(rows, 2 * columns)[:, columns:]
    return torch.randn(rows, columns)


@pytest.mark.parametrize("left", ["whole", "transposed", "sliced"])
@pytest.mark.parametrize("right", ["whole", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_a_matrix_product(left, right, dtype):
    torch.manual_seed(0)
    a, b = matrix(33, 40, left).to(dtype), matrix(24, 40, right).to(dtype)
    torch.testing.assert_close(product(a, b), a @ b.T)


@pytest.mark.parametrize("shape", [(40,), (33, 40), (3, 11, 40), (0, 40)])
def test_linear_is_f_linear(shape):
    torch.manual_seed(0)
    inputs, weight = torch.randn(shape, requires_grad=True), torch.randn(24, 80)[:, 40:].requires_grad_()
    weigh = torch.randn(*shape[:-1], 24)
    outcomes = []
    for function in (linear, F.linear):
        out = function(inputs, weight)
        outcomes.append((out, *torch.autograd.grad((out * weigh).sum(), [inputs, weight])))
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_slices_do_not_reach_onednn(monkeypatch):
    """Its reference code for them is a hundred times slower."""
    assert cpu_kernels._dense(torch.randn(8, 16)[:, 8:]).is_contiguous()
    whole = torch.randn(8, 16)
    assert cpu_kernels._dense(whole) is whole and cpu_kernels._dense(whole.T).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_filled_up_on_a_cpu_alone(device):
    numbers = torch.arange(70)
    record = TargetRecord(
        sample_id="a", input_ids=numbers, loss_mask=numbers > 3, position_ids=numbers,
        tap_hidden=torch.randn(70, 3, 8), last_hidden=torch.randn(70, 8),
    )  # fmt: skip
    batch = pack(filled_up([record], torch.device(device)))
    assert (len(batch.input_ids), num_filler(batch)) == ((192, 122) if device == "cpu" else (70, 0))
    assert not batch.loss_mask[70:].any()


def test_of_equal_maxima_one_is_the_argmax():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    found = [is_argmax(scores, scores.amax(-1), torch.full((2,), column)) for column in range(3)]
    assert torch.stack(found).sum(0).tolist() == [1, 1] and found[0].tolist() == [False, True]
