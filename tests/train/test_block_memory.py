"""What a step of a block draft is planned to take: what autograd holds, what optimizers keep, what is multiplied."""

import dataclasses

import pytest
import torch

from fledge.drafters.batch import pack
from fledge.drafters.dspark.blocks import draw_blocks
from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.dspark.loss import BlockLossSettings
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.dspark.training import BlockModule, block_states
from fledge.target.record import TargetRecord
from fledge.train.block_memory import block_flop_per_step, block_parameters, block_step_memory
from fledge.train.muon import MuonWithAuxiliary, split_parameters

ROWS, ANCHORS, VOCAB, SIZE = 160, 40, 300, 96
DSPARK = BlockConfig(
    hidden_size=SIZE, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    vocab_size=VOCAB, draft_vocab_size=VOCAB, tap_layers=(1, 2, 3), num_layers=2, block_size=5, mask_token_id=7,
    sample_from_anchor=True, markov_rank=24, confidence=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)  # fmt: skip
DFLASH = dataclasses.replace(DSPARK, markov_rank=0, confidence=False, sample_from_anchor=False, draft_vocab_size=120)
KINDS = pytest.mark.parametrize("config", [DSPARK, DFLASH], ids=["dspark", "dflash"])


def draft_of(config: BlockConfig, dtype: torch.dtype = torch.float32) -> BlockDraft:
    """A draft of a target in this format."""
    torch.manual_seed(0)
    return BlockDraft(config, torch.randn(VOCAB, SIZE).to(dtype), torch.randn(VOCAB, SIZE).to(dtype))


def held_bytes(config: BlockConfig, *, bf16: bool) -> int:
    """What autograd keeps between forward and backward of all blocks' states, each storage once."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    draft = draft_of(config, dtype)
    batch = pack([TargetRecord(
        sample_id="r", input_ids=torch.randint(VOCAB, (ROWS,)), loss_mask=torch.ones(ROWS, dtype=torch.bool),
        position_ids=torch.arange(ROWS), tap_hidden=torch.randn(ROWS, 3, SIZE).to(dtype),
        last_hidden=torch.randn(ROWS, SIZE).to(dtype),
    )])  # fmt: skip
    blocks = draw_blocks(batch, config.num_drafts, ANCHORS, (0,))
    assert len(blocks) == ANCHORS
    outside = [*draft.parameters(), batch.tap_hidden, draft.embedding]
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = block_states(draft, batch, blocks)[:, config.first_slot :]
            before = torch.zeros(states.shape[:2], dtype=torch.int64)
            if draft.confidence_head is not None:
                draft.confidence(states, before)
    return sum(sizes.values()) + states.untyped_storage().nbytes()


@KINDS
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(config, bf16):
    planned = block_step_memory(config, rows=ROWS, blocks=ANCHORS, bf16=bf16, device_type="cpu").activations
    assert planned == pytest.approx(held_bytes(config, bf16=bf16), rel=0.15)
    deeper = dataclasses.replace(config, num_layers=3)  # control: another draft
    assert planned != pytest.approx(held_bytes(deeper, bf16=bf16), rel=0.15)


@KINDS
def test_weights_and_moments_are_those_of_the_module(config):
    draft = draft_of(config)
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    assert sum(block_parameters(config).values()) == sum(parameter.numel() for parameter in trained)
    module = BlockModule(draft, lambda hidden: hidden, BlockLossSettings(), num_anchors=4)
    planned = block_step_memory(config, rows=8, blocks=2)
    assert sum(4 * p.numel() for p in module.parameters()) == planned.weights
    matrices, rest = split_parameters(module)
    optimizer = MuonWithAuxiliary(matrices, rest, lambda left: torch.optim.AdamW(left), lr=1e-3, weight_decay=0.0)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert kept == planned.moments


@KINDS
def test_products_are_those_of_a_step(config):
    """Counted by PyTorch over forward and backward, but for the attention, whose kernel multiplies masked keys, too."""
    from torch.utils.flop_counter import FlopCounterMode

    draft = draft_of(config)
    head = torch.randn(VOCAB, SIZE)
    module = BlockModule(draft, lambda hidden: hidden @ head.T, BlockLossSettings(), num_anchors=ANCHORS)
    batch = pack([TargetRecord(
        sample_id="r", input_ids=torch.randint(VOCAB, (ROWS,)), loss_mask=torch.ones(ROWS, dtype=torch.bool),
        position_ids=torch.arange(ROWS), tap_hidden=torch.randn(ROWS, 3, SIZE), last_hidden=torch.randn(ROWS, SIZE),
    )])  # fmt: skip
    with FlopCounterMode(display=False) as counted, torch.autocast("cpu", torch.bfloat16):
        module(batch).loss.backward()
    planned = block_flop_per_step(config, rows=ROWS, blocks=ANCHORS, taught=ROWS)
    assert planned == pytest.approx(counted.get_total_flops(), rel=0.25)
