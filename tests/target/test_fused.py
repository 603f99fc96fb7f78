"""Decoder layers of few operations are the stock ones, and step aside where they would not be."""

import copy

import pytest
import torch
from tiny import NAMES, WINDOW, always_packed, prompt, tiny_model, tiny_target
from torch import nn

from fledge.decoding.verifier import AttentionVerifier, Lengths
from fledge.drafters.tree import Trees
from fledge.target import native, products
from fledge.target.fused import FusedLayer, fuse, fused, fused_layers
from fledge.target.model import Target
from fledge.target.products import accelerate

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")

WHOLE = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "hunyuan_v1_dense", "phi3"
}  # fmt: skip
BESIDE_ITS_MLP = {"qwen3_moe", "hunyuan_v1_moe"}
PREFIX = 9


@pytest.fixture(autouse=True)
def packed(monkeypatch):
    monkeypatch.setattr(products, "choice_for", always_packed("loop"))


def target_of(name: str, dtype: torch.dtype = torch.float32) -> Target:
    target = Target(tiny_model(name).to(dtype), tap_layers=tiny_target(name).tap_layers)
    for parameter in target.model.parameters():
        parameter.mul_(4 if parameter.dim() > 1 else 1)  # at their small initial values layers add next to nothing
    accelerate(target.model, least_bytes=0)
    return target


def layers_of(target: Target) -> list[FusedLayer]:
    return fused_layers(target.model, target.layers)


@torch.inference_mode()
def states_of(target: Target, num_nodes: int, *, fuses: bool) -> torch.Tensor:
    """What the target says of a chain of nodes behind a prefix."""
    verifier = AttentionVerifier(target, 1, PREFIX + num_nodes)
    assert verifier._layers
    verifier._layers = verifier._layers if fuses else []
    token_ids = torch.tensor([prompt(PREFIX + num_nodes)])
    nodes = torch.arange(num_nodes)
    chain = Trees(token_ids[:, PREFIX:], (nodes - 1).clamp(min=0)[None], nodes[None], nodes[None, :, None] >= nodes)
    with verifier.running():
        verifier.prefill(slice(0, 1), token_ids[:, :PREFIX], taps=False)
        lengths = Lengths(torch.tensor([PREFIX]), (PREFIX,))
        return verifier.verify(chain, lengths, PREFIX + num_nodes, taps=False).last_hidden


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_fused_where_they_are_built_like_llamas(name):
    """cohere2 has its parts side by side, deepseek_v3 compresses keys, glm4 turns neighbours: not these layers."""
    target = target_of(name)
    found = layers_of(target)
    assert len(found) == (target.num_layers if name in WHOLE | BESIDE_ITS_MLP else 0)
    assert all(one.fuses_mlp == (name in WHOLE) for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(WHOLE | BESIDE_ITS_MLP))
@pytest.mark.parametrize("num_nodes", [1, 5])
def test_states_are_the_stock_models(name, num_nodes, dtype):
    target = target_of(name, dtype)
    found, expected = (states_of(target, num_nodes, fuses=fuses) for fuses in (True, False))
    error = (found - expected).float().norm() / expected.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("num_nodes", [3, 20])
def test_rows_that_would_drive_each_other_from_the_cache_lie_apart(num_nodes):
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
    target = Target(tiny_model("llama", **sizes), tap_layers=tiny_target("llama").tap_layers)
    accelerate(target.model, least_bytes=0)
    assert all(native.apart(512, layer.dtype) > 512 and layer.fuses_mlp for layer in layers_of(target))
    found, expected = (states_of(target, num_nodes, fuses=fuses) for fuses in (True, False))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_what_differs_a_little_is_not_fused():
    """The control of the trial: any of these changes to a layer's law shows."""

    def scaled(layer: nn.Module) -> None:
        stock = type(layer).forward
        layer.__class__ = type("Scaled", (type(layer),), {"forward": lambda *a, **k: stock(*a, **k) * 1.01})

    def positional(layer: nn.Module) -> None:
        """As Llama 4 does: queries grow with the logarithm of their position."""
        attention, stock = layer.self_attn, type(layer.self_attn).forward

        def forward(self, *args, **kwargs):
            self.scaling = 0.25 * (1 + kwargs["position_ids"].max().log() / 100)
            return stock(self, *args, **kwargs)

        attention.__class__ = type("Positional", (type(attention),), {"forward": forward})

    def other_activation(layer: nn.Module) -> None:
        layer.mlp.act_fn = nn.GELU()

    target = target_of("llama")
    scaled(target.layers[1])
    positional(target.layers[2])
    other_activation(target.layers[3])
    layers = list(target.layers)
    found = {layers.index(one.layer): one for one in layers_of(target)}
    assert found.keys() == set(range(target.num_layers)) - {1, 2}
    assert not found[3].fuses_mlp and found[4].fuses_mlp


def test_heads_that_the_compiled_operation_cannot_hold(monkeypatch):
    """It norms a head in a buffer of its own, and takes as many weights as a head has numbers."""
    target = target_of("qwen3")
    whole = nn.Parameter(torch.ones(4 * 32), requires_grad=False)
    target.layers[1].self_attn.q_norm.weight = whole
    assert len(layers_of(target)) == target.num_layers - 1
    monkeypatch.setattr(native, "MOST_SIZE", 16)
    assert not layers_of(target)


def test_constants_of_the_attention_function_are_handed_on():
    (one, *_) = layers_of(target_of("mistral"))
    assert one.constants["sliding_window"] == WINDOW and one.constants["scaling"] == 16**-0.5


def test_it_steps_aside():
    """Gradients and other dtypes are the stock forward's, and a hook inside the layer is called."""
    target = target_of("qwen3")
    layers = layers_of(target)
    token_ids = torch.tensor([prompt(9)])
    expected = target.model(token_ids).logits
    calls = []

    def few(*args):
        calls.append(args)
        return before(*args)

    before = native.before_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "before_attention", few)
        with fused(layers):
            torch.testing.assert_close(target.model(token_ids).logits, expected, rtol=0, atol=0)
            assert not calls
            with torch.inference_mode():
                target.model(token_ids[:, :3])
                assert len(calls) == target.num_layers
        heard = []
        hook = target.layers[2].mlp.gate_proj.register_forward_hook(lambda *_: heard.append(1))
        with fused(layers), torch.inference_mode():
            target.model(token_ids[:, :3])
        assert heard and len(calls) == 2 * target.num_layers - 1
        hook.remove()
    assert not any("forward" in vars(layer) for layer in target.layers)


@pytest.mark.parametrize("name", ["llama", "gemma3", "hunyuan_v1_dense"])
@torch.inference_mode()
def test_texts_are_read_so_for_good(monkeypatch, name):
    """What extraction does: whole texts without a cache, side by side, with the states between the layers."""
    target, ids = target_of(name), torch.tensor([prompt(30), prompt(30, 1)])
    expected = target.forward(ids)
    calls: list[int] = []
    before = native.before_attention
    monkeypatch.setattr(native, "before_attention", lambda *args: calls.append(1) or before(*args))
    fuse(target)
    calls.clear()  # those of the trial
    found = target.forward(ids)
    assert len(calls) == target.num_layers
    for one, other in ((found.last_hidden, expected.last_hidden), (found.tap_hidden, expected.tap_hidden)):
        assert (one - other).norm() < 1e-5 * other.norm()


@torch.inference_mode()
def test_a_copy_of_a_fused_model_reads_its_own_weights():
    target, ids = target_of("qwen3"), torch.tensor([prompt(6)])
    fuse(target)
    before = target.model(ids).logits
    twin = copy.deepcopy(target.model)
    for layer in target.layers:
        layer.mlp.down_proj.weight.zero_()
        layer.input_layernorm.weight.data = torch.zeros(0)
    torch.testing.assert_close(twin(ids).logits, before)


def test_weights_of_another_kind_or_size_are_not_read_by_pointer():
    """A norm in fp32 beside products in bf16; a product that gives fewer numbers than the layer takes."""
    target = target_of("llama", torch.bfloat16)
    target.layers[1].input_layernorm.float()
    target.layers[2].post_attention_layernorm.weight = nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
    layers = list(target.layers)
    assert {layers.index(one.layer) for one in layers_of(target)} == set(range(target.num_layers)) - {1, 2}


def test_new_weights_are_used():
    target = target_of("llama")
    before = states_of(target, 1, fuses=True)
    with torch.no_grad():
        target.layers[0].mlp.down_proj.weight.mul_(2)
    after, expected = (states_of(target, 1, fuses=fuses) for fuses in (True, False))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu"])
@torch.inference_mode()
def test_gates_of_any_size(name, dtype):
    """A layer of which only the gate is left: its MLP has weights of one, and `up` is one by its bias."""
    size = 16
    one, none = torch.eye(size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    weights = {"mix": none, "gate_up": torch.cat([one, none]), "down": one}
    weights = {key: native.pack(weight) for key, weight in weights.items()}
    bias = torch.cat([torch.zeros(size), torch.ones(size)]).to(dtype)
    layer = native.Layer(hidden=size, heads=1, size=size, inner=size, gelu=name == "gelu", residual=1.0)
    for key, weight in weights.items():
        setattr(layer, key, weight.data_ptr())
    layer.gate_up_bias = bias.data_ptr()
    numbers = [-200.0, -88.0, -87.0, -9.0, -3.0, -1.0, -1e-3, -1e-30, 0.0, 1e-30, 0.5, 1.0, 9.0, 87.0, 88.0, 200.0]
    states = torch.tensor([numbers], dtype=dtype)
    out, _ = native.behind_attention(layer, states, torch.zeros_like(states))
    activation = {"silu": nn.functional.silu, "gelu": lambda x: nn.functional.gelu(x, approximate="tanh")}[name]
    torch.testing.assert_close(
        out, states + activation(states), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6
    )


def test_norms_in_another_order_are_not_taken_for_these(monkeypatch):
    """The control of the trial for what a layer has been given since: each of these facts, if wrong, shows."""
    for name, fact, wrong in (
        ("hunyuan_v1_dense", "turned_first", 0), ("gemma3", "one_more", 0), ("granite", "residual", 1.0),
        ("gemma3", "gelu", 0), ("llama", "eps", 0.5), ("gemma2", "out_norm", None), ("gemma2", "mixed_norm", None),
    ):  # fmt: skip
        target = target_of(name)
        for layer in target.layers:  # norms that do something
            for norm in layer.modules():
                if type(norm).__name__.endswith("RMSNorm"):
                    norm.weight.uniform_(0.5, 2)
        assert len(layers_of(target)) == target.num_layers
        facts = FusedLayer._facts

        def changed(self, facts=facts, fact=fact, wrong=wrong):
            found = facts(self)
            setattr(found, fact, wrong)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusedLayer, "_facts", changed)
            assert not layers_of(target), (name, fact)
