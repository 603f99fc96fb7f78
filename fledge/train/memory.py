"""How much memory one training step takes, part by part, from the draft's sizes alone.

The step has three moments that can be its peak: the loss (activations of all steps, one chunk of the head), the
beginning of the backward (activations, and gradients arriving), the optimizer's step. Everything that `fledge.drafters`
keeps between forward and backward is listed here once; a test compares the sum with what autograd really holds, and
benchmarks/plan_memory.py the whole with a measured peak.
"""

from dataclasses import dataclass, replace

from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.loss import pair_bytes, pairs_per_chunk

# H hidden, I intermediate, h heads, g kv heads, d head_dim, D draft vocab, V vocab, A taps, K steps


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process. `peak` is what it needs besides the target."""

    weights: int  # fp32
    moments: int  # fp32: Muon's one of a matrix, AdamW's two of everything else
    gradients: int  # fp32
    activations: int  # kept from forward to backward
    batch: int  # hidden states and ids of the rows
    loss: int  # one chunk of teacher and draft logits, and the gradients the loss makes

    @property
    def peak(self) -> int:
        """Weights, moments and batch are always there; gradients meet the activations only once the loss is done."""
        return self.weights + self.moments + self.batch + self.activations + max(self.loss, self.gradients)


def num_parameters(config: DraftConfig) -> dict[str, int]:
    """Trained weights of a draft by part."""
    size, layers = config.hidden_size, config.num_layers
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    norms = size * (2 + 2 * layers + (len(config.tap_layers) if config.fc_norm else 0))
    mix = config.num_attention_heads * config.head_dim * size
    return {
        "fc": len(config.tap_layers) * size * size,
        "attention": (layers + 1) * size * heads * config.head_dim + layers * mix,  # the first reads twice the width
        "mlp": 3 * size * config.intermediate_size * layers,
        "norms": norms + 2 * config.head_dim * config.qk_norm * layers,
        "lm_head": config.draft_vocab_size * size,
    }


def kept_elements(config: DraftConfig, *, recompute: bool = False) -> int:
    """Numbers kept for each active row and TTT step."""
    size, head_dim = config.hidden_size, config.head_dim
    keys, layers = 2 * config.num_key_value_heads * head_dim, config.num_layers
    if recompute:
        return 2 * size + layers * keys  # the step's output, plain and normed; keys and values, which later steps read
    queries = 2 * config.num_attention_heads * head_dim  # queries and what they attended
    if config.qk_norm:  # and both before their norm
        queries += (config.num_attention_heads + config.num_key_value_heads) * head_dim
    further = (layers - 1) * (4 * size + queries + keys + 2 * config.intermediate_size)
    return 6 * size + queries + keys + 2 * config.intermediate_size + further


def step_memory(
    config: DraftConfig, *, rows: int, active_rows: int | None = None, ttt_steps: int = 7, bf16: bool = True,
    recompute: bool = False, state_bytes: int = 2, device_type: str = "cuda", muon: bool = True, survival: float = 1.0,
) -> StepMemory:  # fmt: skip
    """One forward, backward and optimizer step over `rows` tokens, `active_rows` of which are trained (None: all), to
    depths drawn with `survival`."""
    active = rows if active_rows is None else active_rows
    steps = sum(survival**step for step in range(ttt_steps))
    num_pairs = round(active * steps)  # rows over all steps
    element = 2 if bf16 else 4
    size, taps = config.hidden_size, len(config.tap_layers)
    parameters = num_parameters(config)
    total = sum(parameters.values())
    projections = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    whole = (config.num_layers - 1) * (rows - active) * kept_elements(replace(config, num_layers=1))
    once = whole + rows * (taps * size + 3 * size + projections + 2 * config.num_key_value_heads * config.head_dim)
    activations = element * (num_pairs * kept_elements(config, recompute=recompute) + once)
    activations += 2 * size * projections * element + (2 * total if bf16 else 0)  # split projections; bf16 copies
    if recompute:  # one step at a time is there in full
        activations += element * active * kept_elements(config)
    short = config.draft_vocab_size < config.vocab_size  # records come with the teacher's summary
    sizes = config.draft_vocab_size, config.vocab_size
    per_chunk = pairs_per_chunk(*sizes, device_type, steps=round(steps), short=short)
    chunk = min(per_chunk, num_pairs) * pair_bytes(*sizes, steps=round(steps), short=short) * element // 4
    state_grads = element * num_pairs * size
    return StepMemory(
        weights=4 * total,
        moments=8 * total - (4 * (total - parameters["lm_head"] - parameters["norms"]) if muon else 0),
        gradients=4 * total + state_grads,
        activations=activations,
        batch=rows * ((taps + 1) * size * state_bytes + 17),
        loss=chunk + state_grads + 4 * parameters["lm_head"] + (2 * parameters["lm_head"] if bf16 else 0),
    )


def flop_per_step(
    config: DraftConfig, *, rows: int, active_rows: int, taught: int, ttt_steps: int, survival: float = 1.0
) -> int:
    """Matrix products of one step: the draft's for active rows, its head's and the teacher's for taught positions.

    The teacher's are those of the draft vocabulary; the whole head is part of making a record."""
    parameters, size = num_parameters(config), config.hidden_size
    layer = parameters["attention"] + parameters["mlp"]
    steps = sum(survival**step for step in range(ttt_steps))
    attention = 7 * 2 * size * active_rows * rows / 2 * steps * config.num_layers  # 2 forward, 5 backward, causal
    head = 6 * steps * taught * parameters["lm_head"] + 2 * taught * config.draft_vocab_size * size
    whole = 6 * (rows - active_rows) * layer * (config.num_layers - 1) // config.num_layers  # all but the last layer
    return round(4 * rows * parameters["fc"] + 6 * steps * active_rows * layer + whole + attention + head)
