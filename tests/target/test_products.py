"""Packed products are F.linear's to rounding, give a row the same bits in any company, and follow their weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import onednn_packs
from torch import nn

from fledge.target import native, products
from fledge.target.linear import head_logits
from fledge.target.products import KERNELS, Kernel, ProductChoice, accelerate, is_packed, least_rows, measured_choice

ALWAYS = ProductChoice("onednn", (4, 4), True)  # one and two rows are filled up to four
LOOP = ProductChoice("loop", (), True)
DTYPES = (torch.float32, torch.bfloat16)

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


class Block(nn.Module):
    """Layers with the names that decoders give theirs."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, size in {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 48, "gate_proj": 96}.items():
            self.add_module(name, nn.Linear(96, size, bias=bias, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(inputs) for layer in self.children()]


@pytest.fixture(params=[ALWAYS, pytest.param(LOOP, marks=needs_compiler)], ids=["onednn", "loop"])
def always(request, monkeypatch):
    monkeypatch.setattr(products, "choice_for", lambda _shape, _groups: request.param)
    return request.param.kernel


def skip_without_kernel(name: str, dtype: torch.dtype) -> None:
    if name == "onednn" and not onednn_packs(dtype):
        pytest.skip(f"oneDNN has no products of {dtype} for this processor")


def replaced(monkeypatch, name: str, multiply) -> None:
    """Another product in this kernel's place; the other kernel is taken away."""
    monkeypatch.setattr(products, "KERNELS", {name: Kernel(KERNELS[name].pack, multiply)})


def noting(calls: list[torch.Tensor], kernel: Kernel) -> Kernel:
    return Kernel(kernel.pack, lambda *args: calls.append(args[0]) or kernel.multiply(*args))


@torch.inference_mode()
def both(block: Block, inputs: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    slow = [F.linear(inputs, layer.weight, layer.bias) for layer in block.children()]
    return list(zip(block(inputs), slow, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 1), (2, 5), (1, 40)])
def test_it_is_the_linear_layer(always, dtype, bias, rows):
    skip_without_kernel(always, dtype)
    block = Block(dtype, bias)
    accelerate(block, least_bytes=0)
    assert all(map(is_packed, block.children()))
    inputs = torch.randn(*rows, 96, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, expected in both(block, inputs):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_neighbours_are_one_product_of_one_input(always, monkeypatch):
    """The second layer takes its part of the first one's product only where it is given the same input."""
    block = Block()
    accelerate(block, least_bytes=0)
    calls: list[torch.Tensor] = []
    for layer in block.children():
        product = vars(layer)["forward"].product
        if product.kernel is KERNELS[always]:
            product.kernel = noting(calls, product.kernel)
    one, other = torch.randn(4, 96), torch.randn(4, 96)
    with torch.inference_mode():
        block.q_proj(one), block.k_proj(one), block.v_proj(one)
        assert len(calls) == 1
        block.q_proj(one)
        found = block.k_proj(other)
    assert len(calls) == 3
    torch.testing.assert_close(found, F.linear(other, block.k_proj.weight, block.k_proj.bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["onednn", pytest.param("loop", marks=needs_compiler)])
def test_a_row_has_the_same_bits_in_any_company(monkeypatch, name, dtype):
    """What makes speculative decoding emit plain decoding's tokens: a row alone and one of many are the same."""
    skip_without_kernel(name, dtype)
    replaced(monkeypatch, name, KERNELS[name].multiply)
    torch.manual_seed(0)
    layer = nn.Linear(192, 320, bias=False, dtype=dtype).requires_grad_(False)
    monkeypatch.setattr(products, "GAIN", 1e-9)  # however slow it is here
    choice = measured_choice([[layer]])
    assert choice.independent or name == "onednn"
    if not choice.independent:
        pytest.skip("oneDNN's products depend on the number of rows here")
    product = products.Product([layer], choice)
    inputs = torch.randn(200, 192, dtype=dtype)
    with torch.inference_mode():
        many = product.of(0, inputs)
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64):
            assert torch.equal(product.of(0, inputs[:rows]), many[:rows]), rows


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, num_inputs", [(16, 70), (48, 1024), (336, 70), (2064, 70)])
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_the_loop_is_the_product_for_every_number_of_rows(monkeypatch, dtype, outputs, num_inputs, threads):
    """Every tile of `multiply.c` and every remainder, beside exact sums."""
    monkeypatch.setattr(native, "BYTES_OF_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(outputs)
        weight = torch.randn(outputs, num_inputs, generator=generator)
        bias = torch.randn(outputs, generator=generator)
        inputs = torch.randn(45, num_inputs, generator=generator)
        weight, bias, inputs = weight.to(dtype), bias.to(dtype), inputs.to(dtype)
        packed, exact = native.pack(weight), inputs.double() @ weight.double().T + bias.double()
        whole = native.multiply(inputs, packed, bias)
        tolerance = 1e-6 * num_inputs if dtype == torch.float32 else 2**-8 * exact.abs().max()
        assert (whole.double() - exact).abs().max() <= tolerance
        for rows in range(1, 46):
            assert torch.equal(native.multiply(inputs[-rows:], packed, bias), whole[-rows:]), rows
        assert torch.equal(native.multiply(inputs.repeat(5, 1), packed, bias), whole.repeat(5, 1))  # not all at once
    finally:
        torch.set_num_threads(before)


def test_dependence_on_the_number_of_rows_is_noticed(monkeypatch):
    """A kernel whose single rows differ is filled up; one whose rows always differ is called dependent."""
    layer = nn.Linear(32, 32, bias=False).requires_grad_(False)
    product = KERNELS["onednn"].multiply
    monkeypatch.setattr(products, "GAIN", 1e-9)  # however slow it is here

    def differing(most: int):
        return lambda x, weight, bias: product(x, weight, bias) + (len(x) if len(x) <= most else 0)

    replaced(monkeypatch, "onednn", differing(1))
    assert measured_choice([[layer]]).fill[0] >= 2
    replaced(monkeypatch, "onednn", differing(1 << 10))
    assert not measured_choice([[layer]]).independent


def test_a_difference_that_few_rows_show_is_noticed():
    """Of SmolLM2's down_proj in bf16 one row in twelve shows that single rows are summed in another order. One random
    row was compared, and the product was called independent."""
    skip_without_kernel("onednn", torch.bfloat16)
    layer = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    asked: list[int] = []

    def differing(inputs, weight, bias):
        asked.append(len(inputs))
        return KERNELS["onednn"].multiply(inputs, weight, bias) + (asked.count(1) == 12 and len(inputs) == 1)

    assert least_rows(Kernel(KERNELS["onednn"].pack, differing), layer.weight) == 2


def test_it_follows_its_weights(always):
    """A head that is evaluated between two steps of training decodes with its new weights."""
    block = Block()
    accelerate(block, least_bytes=0)
    inputs = torch.randn(3, 96)
    before = both(block, inputs)
    with torch.no_grad():
        block.k_proj.weight.mul_(2)
        block.o_proj.weight = nn.Parameter(torch.randn(48, 96), requires_grad=False)
    for number, (found, expected) in enumerate(both(block, inputs)):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, before[number][0]) == (number not in (1, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_has_its_own_weights(always, copied):
    block = Block()
    accelerate(block, least_bytes=0)
    both(block, torch.randn(2, 96))
    twin = copied(block)
    with torch.no_grad():
        block.q_proj.weight.zero_()
    for found, expected in both(twin, torch.randn(2, 96)):
        torch.testing.assert_close(found, expected)


def test_what_is_left_to_pytorch(always, monkeypatch):
    """Gradients, many rows of oneDNN, other dtypes and autocast."""
    block = Block().requires_grad_(True)
    accelerate(block, least_bytes=0)
    used: list[torch.Tensor] = []
    product = vars(block.o_proj)["forward"].product
    product.kernel = noting(used, product.kernel)
    few = torch.randn(2, 96)
    block.o_proj(few).sum().backward()
    assert block.o_proj.weight.grad is not None
    with torch.inference_mode():
        if always != "loop":
            block.o_proj(torch.randn(products.MOST_ROWS + 1, 96))
        block.o_proj(torch.randn(0, 96))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert block.o_proj(few).dtype == torch.bfloat16
        assert not used
        block.o_proj(few)
    assert used


def test_who_is_accelerated(always, monkeypatch):
    """Small models gain nothing, large ones have no room twice, and layers that were changed before are left alone."""
    small = Block()
    accelerate(small)
    assert not any(map(is_packed, small.children()))
    changed = Block()
    changed.o_proj.forward = lambda inputs: inputs
    accelerate(changed, least_bytes=0)
    assert [is_packed(layer) for layer in changed.children()] == [True, True, True, False, True]
    monkeypatch.setattr(products, "free_memory", lambda: 1000)
    accelerate(small, least_bytes=0)
    assert not any(map(is_packed, small.children()))


def test_a_choice_is_measured_once_per_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    measured: list[int] = []
    monkeypatch.setattr(products, "measured_choice", lambda _groups: measured.append(1) or ALWAYS)
    layers = [[nn.Linear(8, 8)]]
    assert products.choice_for("8 x 8", layers) == products.choice_for("8 x 8", layers) == ALWAYS
    assert len(measured) == 1
    products.choice_for("8 x 16", layers)
    assert len(measured) == 2
    monkeypatch.setattr(native, "fingerprint", lambda: "none")  # the compiler has gone, and its loop with it
    products.choice_for("8 x 16", layers)
    assert len(measured) == 3


def test_a_slower_kernel_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(products, "choice_for", lambda _shape, _groups: ProductChoice(None, (), True))
    block = Block()
    accelerate(block, least_bytes=0)
    assert not any(map(is_packed, block.children()))


def test_a_packed_head_gives_the_logits(always):
    head = nn.Linear(16, 5008, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 16)
    with torch.inference_mode():
        expected = head_logits(head, hidden)
        accelerate(head_holder := nn.Sequential(head), least_bytes=0)
        assert is_packed(head_holder[0])
        torch.testing.assert_close(head_logits(head, hidden), expected)
