"""What decoding asks of a GPU, counted on an emulated one: no host reads in a round, few launches, known traps avoided.

The counts are those of the tiny targets. Launches of a layer and of a pass do not depend on sizes, so they are the
counts of real targets, too.
"""

import pytest
import torch
from emulated_device import DeviceTensor, EmulatedDevice
from tiny import NAMES, prompt, tiny_draft, tiny_model

from fledge.decoding import generate, memory, session
from fledge.decoding.capture import Timer, run_parts
from fledge.decoding.generate import open_session
from fledge.decoding.records import Sampling
from fledge.decoding.requests import Request
from fledge.decoding.round import Round, Shapes
from fledge.decoding.session import Session
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target
from fledge.target.norms import as_one_kernel, rms_norms

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
MIXTURES = ("qwen3_moe", "hunyuan_v1_moe", "gpt_oss", "deepseek_v3")
TREE = TreeShape(20, 3, 4)
LENGTHS = (20, 1, 5)
LAWS = {
    "greedy": Sampling(), "top-p": Sampling(0.7, 0.9), "all": Sampling(0.7, 0.9, 20, min_p=0.02, repetition_penalty=1.1)
}  # fmt: skip


@pytest.fixture
def device(monkeypatch):
    """Nothing is captured and nothing is timed by events: the round itself is looked at."""
    monkeypatch.setattr(session, "Captured", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(session, "Timer", lambda device: Timer(torch.device("cpu")))
    with EmulatedDevice() as emulated:
        yield emulated


def pair(device: EmulatedDevice, name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Target, object]:
    target = Target(device.put(tiny_model(name).to(dtype)), tap_layers=(1, 2, 3), name=name)
    draft = tiny_draft(target).to(dtype)
    draft.bind_embedding(target.embedding_weight)
    return target, device.put(draft)


def begun(target: Target, drafter, law: Sampling, tree: TreeShape = TREE) -> Session:
    """A session after its prompts are read."""
    requests = [Request(prompt(length), 30, law) for length in LENGTHS]
    found = open_session(target, drafter, requests, tree=tree, eos_token_ids=())
    assert found.fixed
    for request in requests:
        found.add(request)
    while found.waiting:
        found.step()
    return found


def counts(device: EmulatedDevice, found: Session) -> dict[str, int]:
    """Launches of each part of a round, which reads nothing."""
    launches = {}
    with found.round.verifier.running():
        for name, part in found.round.parts(Shapes(64)).items():
            device.forget()
            part()
            launches[name] = device.launches
            assert not device.reads and not device.waits, f"{name}: {device.reads} {device.waits}"
    return launches


@pytest.mark.parametrize("name, law", [*((name, "all") for name in NAMES), ("qwen3", "greedy"), ("qwen3", "top-p")])
def test_a_round_reads_nothing(name, law, device):
    dtype = torch.bfloat16 if name in MIXTURES else torch.float32  # experts in fp32 read offsets on the host
    target, drafter = pair(device, name, dtype)
    for one in (drafter, None):
        counts(device, begun(target, one, LAWS[law]))
        generate.drop_sessions(target)


def test_launches_of_a_round(device):
    """Stated maxima. A layer's 28: four norms (two of them of q and k), seven products, ten of two ropes, two writes to
    the cache, attention, and four of residuals and the gate."""
    layers = {}
    for num_layers in (4, 6):
        model = tiny_model("qwen3", num_hidden_layers=num_layers).bfloat16()
        target = Target(device.put(model), tap_layers=(1, 2, 3), name="qwen3")
        layers[num_layers] = counts(device, begun(target, None, Sampling()))["verify"]
    per_layer = (layers[6] - layers[4]) / 2
    assert per_layer <= 28 and layers[4] - 4 * per_layer <= 24

    target, drafter = pair(device, "qwen3")
    deep, flat = (
        counts(device, begun(target, drafter, Sampling(), tree)) for tree in (TreeShape(20, 4, 4), TreeShape(20, 3, 4))
    )
    assert deep["draft"] - flat["draft"] <= 60, "launches of one more draft pass"
    assert flat["draft"] <= 258 and flat["accept"] <= 56


def test_norms_of_one_kernel_are_the_librarys(device):
    """Qwen3's norms are taken over; Gemma's, which scale by 1 + weight, are left alone."""
    model = device.put(tiny_model("qwen3"))
    norms = rms_norms(model)
    assert len(norms) == 4 * 4 + 1 and not rms_norms(device.put(tiny_model("gemma3")))
    rows = device.put(torch.randn(3, 64))
    before = model(inputs_embeds=rows[None]).logits
    device.forget()
    with as_one_kernel(norms):
        after = model(inputs_embeds=rows[None]).logits
    assert device.operations["rms_norm"] == len(norms) and not device.operations["rsqrt"]
    torch.testing.assert_close(after.elem, before.elem, atol=1e-5, rtol=1e-5)
    assert all("forward" not in vars(module) for module in norms)


def test_a_target_on_a_gpu_leaves_out_cudnn_attention(device):
    torch.backends.cuda.enable_cudnn_sdp(True)
    Target(tiny_model("llama"), tap_layers=(1, 2, 3))
    assert torch.backends.cuda.cudnn_sdp_enabled(), "a CPU is nobody's business"
    try:
        pair(device, "llama")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_answers_on_the_emulated_device_are_the_cpus(device):
    target, drafter = pair(device, "qwen3", torch.float32)
    options = {"tree": TREE, "max_new_tokens": 8, "eos_token_ids": ()}
    found = generate.generate_batch(target, drafter, [prompt(n) for n in LENGTHS], **options)
    on_cpu = Target(tiny_model("qwen3"), tap_layers=(1, 2, 3))
    for length, answer in zip(LENGTHS, found, strict=True):
        assert answer.token_ids == generate.generate(on_cpu, None, prompt(length), **options).token_ids


# -- negative controls -------------------------------------------------------------------------------------------------

PLANTED = {
    "item": lambda state: state.lengths[0].item(),
    "bool": lambda state: bool(state.done.any()),
    "copy": lambda state: state.lengths.cpu(),
    "to": lambda state: state.lengths.to("cpu", torch.int32),
    "mask": lambda state: state.tokens[state.done],
    "unique": lambda state: state.tokens.unique(),
    "numbers": lambda state: torch.tensor([1, 2], device=state.lengths.device),
    "stranger": lambda state: state.lengths[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_read_is_counted(planted, device, monkeypatch):
    target, _ = pair(device, "llama")
    found = begun(target, None, Sampling())
    real = Round.accept
    monkeypatch.setattr(Round, "accept", lambda self, shapes: (PLANTED[planted](self.state), real(self, shapes))[1])
    with pytest.raises(AssertionError, match="accept: "):
        counts(device, found)


def test_what_a_gpu_refuses_is_refused(device):
    rows = device.put(torch.randn(2, 4))
    with pytest.raises(AssertionError, match="a CPU tensor among those of the device"):
        rows + torch.ones(4)
    q, k = device.put(torch.randn(1, 4, 2, 8)), device.put(torch.randn(1, 2, 6, 8))
    mask = torch.zeros(1, 1, 2, 6, device="cuda")
    with pytest.raises(AssertionError, match="no fused kernel"):
        torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
    assert isinstance(mask, DeviceTensor) and mask.device == torch.device("cuda", 0)


def test_a_launch_more_is_counted(device):
    target, _ = pair(device, "llama")
    found = begun(target, None, Sampling())
    device.forget()
    with found.round.verifier.running():
        run_parts(found.round, Shapes(64), lambda name: None)
        first = device.launches
        found.round.state.lengths.add(1)
        assert device.launches == first + 1
