"""A small draft, records, and TTT written out row by row: the definition that training is tested against."""

import math

import torch
from torch import Tensor

from fledge.drafters.alignment import Alignment
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.loss import PositionWeights
from fledge.drafters.position_weights import dynamic_weights
from fledge.target.quirks import LogitQuirks
from fledge.target.record import TargetRecord

STEPS, VOCAB, DRAFT_VOCAB, SIZE = 4, 40, 24, 16


def make_draft(*, eagle31: bool = False, window: int | None = None, layers: int = 1) -> DraftModel:
    torch.manual_seed(0)
    config = DraftConfig(
        hidden_size=SIZE, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=VOCAB, draft_vocab_size=DRAFT_VOCAB, tap_layers=(0, 1, 2),
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, fc_norm=eagle31, norm_output=eagle31,
        sliding_window=window, num_layers=layers,
    )  # fmt: skip
    draft = DraftModel(config, torch.randn(VOCAB, SIZE))
    chosen = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    draft.set_vocab(chosen - torch.arange(DRAFT_VOCAB), torch.isin(torch.arange(VOCAB), chosen))
    for norm in (module for module in draft.modules() if isinstance(module, torch.nn.RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return draft


def make_record(length: int, mask: str, seed: int) -> TargetRecord:
    generator = torch.Generator().manual_seed(seed)
    return TargetRecord(
        sample_id=f"s{seed}",
        input_ids=torch.randint(VOCAB, (length,), generator=generator),
        loss_mask=torch.tensor([char == "a" for char in mask]),
        position_ids=torch.arange(length),
        tap_hidden=torch.randn(length, 3, SIZE, generator=generator),
        last_hidden=torch.randn(length, SIZE, generator=generator),
    )


RECORDS = {
    "one turn": [make_record(9, "pppaaaaaa", 1)],
    "packed": [make_record(7, "ppaaaaa", 2), make_record(5, "paaaa", 3), make_record(6, "aaaaaa", 4)],
    "two turns": [make_record(14, "ppaaapppppaaaa", 5)],
    "untrainable": [make_record(5, "pppap", 6), make_record(6, "ppaaaa", 7)],
}
HEAD = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(9)) * 0.7


def teacher_head(hidden: torch.Tensor) -> torch.Tensor:
    return LogitQuirks(soft_cap=4.0).apply(hidden @ HEAD.T)


# -- the definition, row by row ----------------------------------------------------------------------------------------


def reference_states(draft: DraftModel, record: TargetRecord) -> list[torch.Tensor]:
    """f'' of every row at every step, from whole matrices: K x (T, H)."""
    length, scale = len(record), 1 / math.sqrt(draft.config.head_dim)
    tokens = record.input_ids
    keys: list[list[Tensor]] = [[] for _ in range(draft.config.num_layers)]
    values: list[list[Tensor]] = [[] for _ in keys]
    hidden, states = draft.fuse(record.tap_hidden), []
    for step in range(STEPS):
        ids = torch.tensor([int(tokens[min(t + 1 + step, length - 1)]) for t in range(length)])
        cos, sin = draft.rope(record.position_ids + step)
        out = hidden
        for number in range(draft.config.num_layers):
            layer = draft.layers[str(number)] if number else draft.midlayer
            if number:
                x = layer.input_layernorm(out)
            else:
                x = torch.cat([layer.input_layernorm(draft.embedding[ids]), layer.hidden_norm(hidden)], dim=-1)

            def heads(linear, x=x):
                return linear(x).view(length, -1, draft.config.head_dim)

            def turn(s, cos=cos, sin=sin):
                half = s.shape[-1] // 2
                return s * cos[:, None] + torch.cat([-s[..., half:], s[..., :half]], -1) * sin[:, None]

            q = turn(heads(layer.self_attn.q_proj))
            k, v = keys[number], values[number]
            k.append(turn(heads(layer.self_attn.k_proj)).repeat_interleave(2, 1))
            v.append(heads(layer.self_attn.v_proj).repeat_interleave(2, 1))
            attended = torch.zeros_like(q)
            for t in range(length):
                seen_k = torch.cat([k[0][: t + 1]] + [k[j][t : t + 1] for j in range(1, step + 1)])
                seen_v = torch.cat([v[0][: t + 1]] + [v[j][t : t + 1] for j in range(1, step + 1)])
                weights = torch.einsum("hd,khd->hk", q[t], seen_k).mul(scale).softmax(-1)
                attended[t] = torch.einsum("hk,khd->hd", weights, seen_v)
            out = out + layer.self_attn.o_proj(attended.flatten(1))
            out = out + layer.mlp(layer.post_attention_layernorm(out))
        states.append(out)
        hidden = draft.norm(out) if draft.config.norm_output else out
    return states


def reference_loss(
    draft: DraftModel, records: list[TargetRecord], *, shift: int = 1, positions: PositionWeights = "dynamic"
) -> Tensor:
    """Mean per sequence and step, summed over sequences. shift = 0 is the unshifted mask of other trainers."""
    total = torch.zeros(())
    inside = torch.arange(DRAFT_VOCAB) + draft.d2t
    for record in records:
        states, mask, length = reference_states(draft, record), record.loss_mask, len(record)
        losses: dict[int, dict[int, tuple[Tensor | float, float]]] = {}  # row -> step -> loss, how sure the draft is
        count = [0] * STEPS
        for step, hidden in enumerate(states):
            for t in range(length):
                p = t + 1 + step
                if p + 1 >= length or not (mask[p - 1 + shift] and mask[p + shift] and (shift or mask[t])):
                    continue
                count[step] += 1
                target_logits = teacher_head(record.last_hidden[p])
                losses.setdefault(t, {})[step] = (0.0, 0.0)
                if not draft.t2d[target_logits.argmax()]:
                    continue
                p_draft = target_logits[inside].softmax(-1)
                log_q = draft.lm_head(draft.norm(hidden[t])).log_softmax(-1)
                sure = float(log_q.detach()[inside == target_logits.argmax()].exp())
                losses[t][step] = -(p_draft * log_q).sum(), sure
        for of_row in losses.values():
            sures = [0.5 + 0.5 * sure for _, sure in of_row.values()]
            reach = [math.prod(sures[: n + 1]) for n in range(len(sures))]
            for n, (step, (loss, _)) in enumerate(of_row.items()):
                weight = 0.8**step if positions == "fixed" else sum(reach[n:]) / sum(reach)
                total = total + weight * loss / count[step]
    return total


def dynamic_by_position(alignment: Alignment, confidence: Tensor, floor: float) -> Tensor:
    """Dynamic weights of all pairs, (K, P) like the confidence; 0 where nothing is trained."""
    pairs = alignment.pairs
    place = (pairs.step, pairs.place)
    return torch.zeros_like(confidence).index_put(
        place, dynamic_weights(confidence[place], pairs.row, pairs.step, pairs.supervised, floor)
    )
