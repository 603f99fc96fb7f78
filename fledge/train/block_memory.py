"""How much memory one training step of a block draft takes, and its products, from the draft's sizes alone.

As `fledge.train.memory` has them for EAGLE-3. A step is one forward of all drawn blocks: the context's rows give keys
and values to every layer, the blocks' rows go through the layers, and those that draft meet the head.
"""

from fledge.drafters.dspark.config import BlockConfig
from fledge.drafters.dspark.loss import bytes_of_pair, pairs_of_chunk
from fledge.train.memory import StepMemory

# H hidden, I intermediate, h heads, g kv heads, d head_dim, D draft vocab, V vocab, A taps, r Markov rank


def block_parameters(config: BlockConfig) -> dict[str, int]:
    """Trained weights by part; the head is the target's and frozen."""
    size, layers, rank = config.hidden_size, config.num_layers, config.markov_rank
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return {
        "fc": len(config.tap_layers) * size * size,
        "attention": layers * size * heads * config.head_dim,
        "mlp": layers * 3 * size * config.intermediate_size,
        "norms": layers * 2 * (size + config.head_dim) + 2 * size,
        "markov": rank * (config.vocab_size + config.draft_vocab_size),
        "confidence": size + rank + 1 if config.confidence else 0,
    }


def kept_by_context(config: BlockConfig) -> int:
    """Numbers kept for each row of the context."""
    keys = config.num_key_value_heads * config.head_dim
    return (len(config.tap_layers) + 2) * config.hidden_size + config.num_layers * 3 * keys


def kept_by_block(config: BlockConfig) -> int:
    """Numbers kept for each row of a block."""
    size, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 4 * size + 3 * queries + 3 * keys + 2 * config.intermediate_size
    heads = size + 2 * config.markov_rank if config.confidence else config.markov_rank
    return config.num_layers * layer + 2 * size + heads


def block_step_memory(
    config: BlockConfig, *, rows: int, blocks: int, bf16: bool = True, state_bytes: int = 2, device_type: str = "cuda",
    muon: bool = True,
) -> StepMemory:  # fmt: skip
    """One forward, backward and optimizer step over `rows` tokens with so many blocks."""
    element, size = 2 if bf16 else 4, config.hidden_size
    parameters = block_parameters(config)
    total = sum(parameters.values())
    matrices = parameters["fc"] + parameters["attention"] + parameters["mlp"]
    head_rows = 0 if config.full_vocab else config.draft_vocab_size * size
    num_pairs = blocks * config.num_drafts
    activations = element * (rows * kept_by_context(config) + blocks * config.block_size * kept_by_block(config))
    if bf16:  # copies of the matrices, and of the angles for every rotation
        activations += 2 * matrices
        angles = 2 * 2 * config.head_dim * config.num_layers
        activations += angles * (rows + 2 * blocks * config.block_size)
    sizes, short = (config.draft_vocab_size, config.vocab_size), not config.full_vocab
    most = pairs_of_chunk(*sizes, element, device_type, short=short)
    chunk = min(most, num_pairs) * bytes_of_pair(*sizes, element, short=short)
    state_grads = element * num_pairs * (size + config.markov_rank)
    markov = config.markov_rank * config.draft_vocab_size
    return StepMemory(
        weights=4 * (total + head_rows),
        moments=8 * total - (4 * matrices if muon else 0),
        gradients=4 * total + state_grads,
        activations=activations,
        batch=rows * ((len(config.tap_layers) + 1) * size * state_bytes + 17),
        loss=chunk + state_grads + 4 * markov + (2 * (markov + head_rows) if bf16 else 0),
    )


def block_flop_per_step(config: BlockConfig, *, rows: int, blocks: int, taught: int) -> int:
    """Matrix products of one step over `rows` tokens, `taught` of which the target's own text has: fc, keys and values
    of the context, the layers of the blocks, their head and the Markov head's, and the teacher's head of each position.
    """
    parameters, size = block_parameters(config), config.hidden_size
    slots, pairs = blocks * config.block_size, blocks * config.num_drafts
    keys = config.num_layers * 2 * config.num_key_value_heads * config.head_dim * size
    queries = config.num_layers * config.num_attention_heads * config.head_dim
    seen = rows / 2 if config.sliding_window is None else min(rows / 2, config.sliding_window)
    attention = 7 * 2 * queries * slots * seen  # two products forward, two of them again and three more backward
    head = pairs * config.draft_vocab_size * (4 * size + 6 * config.markov_rank)
    return round(
        4 * rows * parameters["fc"] + 6 * rows * keys + 6 * slots * (parameters["attention"] + parameters["mlp"])
        + attention + head + 2 * min(taught, pairs) * config.draft_vocab_size * size
    )  # fmt: skip
