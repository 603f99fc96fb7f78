"""Proposing with a block draft: keys of what was committed, one pass over a block of masks, then a tree of its slots.

A sequence of L committed tokens and its root x_L has L rows in the cache of every layer: keys and values of the fused
target states of positions 0 .. L-1. The root's own states do not exist yet. One pass drafts all slots:

    rows       0 .. L-1           | block (its keys are not kept)
    positions  0 .. L-1           | L      L+1  ..  L+B-1
    inputs     target states      | x_L    M    ..  M

Each slot gives a distribution of the token at its place. Without a Markov head the slots do not know of each other's
choices, and the tree is their product: the children of every node of a level are the same tokens. With one, log-odds
by the parent's token are added, so nodes of one level have different children. A node's score is the sum of the
log-chances along its path; the best `width` nodes of a level get children (as EAGLE-2 has it). The chance of a child is
the draft's probability q. A confidence head says how likely the draft of a slot is to be accepted, c; where it trusts
the likeliest child less than the draft does, all children have less of a chance: q min(1, c / max q). In a chain that
is min(q, c), and its products along the block are DSpark's survival. A budget stops where these chances do not pay.

No shape depends on what was drafted or accepted unless a budget cuts levels or nodes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.drafters.base import Budget, Emitted
from fledge.drafters.dspark.model import BlockDraft
from fledge.drafters.layer_cache import LayerCache
from fledge.drafters.rope_table import RopeTable
from fledge.drafters.tree import Trees, TreeShape, best_scores, build_trees, candidate_levels
from fledge.target.attention import grouped_sdpa

# B sequences, E new tokens, k width, S slots of a block, H hidden size, K keys, C candidates, D draft vocabulary


class BlockProposer:
    """A block draft at work on `batch` sequences."""

    needs_taps = True

    def __init__(self, draft: BlockDraft, shape: TreeShape, batch: int, capacity: int) -> None:
        config, weight = draft.config, draft.fc.weight
        self.draft = draft
        self.width = min(shape.top_k, max(shape.total_token - 1, 1), config.draft_vocab_size)
        self.num_levels = min(shape.levels, config.num_drafts)  # slots behind the trained block draft nothing of use
        levels = candidate_levels(self.width, self.num_levels)
        self.num_drafted = min(shape.total_token - 1, len(levels))
        self.rows_ahead = self.num_levels + 1
        self.cache = LayerCache(config, batch, weight)
        self._rope = RopeTable(draft, batch)
        self.reserve(capacity)
        self._levels = levels.to(weight.device)
        self._ids = torch.arange(self.width, device=weight.device)
        self._blocked = torch.finfo(weight.dtype).min
        self._states: Tensor | None = None  # (B, levels, H) of the slots that draft
        self._logits: Tensor | None = None  # (B, levels, D) of them, before the Markov head
        self._roots: Tensor | None = None  # (B, 1)

    def reserve(self, capacity: int) -> None:
        self.cache.reserve(capacity)
        self._rope.reserve(capacity + self.draft.config.block_size)

    def move(self, source: int, goal: int) -> None:
        self.cache.move(source, goal)
        self._rope.move(source, goal)

    def fill(self, slot: int, token_ids: Tensor, taps: Tensor | None, positions: Tensor) -> None:
        assert taps is not None
        self._rope.fill(slot, positions, self.cache.capacity + self.draft.config.block_size)
        rope = self.draft.rope(positions.to(self._ids.device))
        self.cache.fill(slot, self.draft.context_keys(self.draft.context(taps), rope))

    def follow(self, emitted: Emitted, num_keys: int) -> None:
        """Keys of the newly committed rows, then the block behind the roots. Rows behind a sequence's own are computed
        all the same; no mask shows them, and the next round overwrites them."""
        assert emitted.taps is not None
        lengths, num_new = emitted.lengths, emitted.num_new
        rows = (lengths - num_new)[:, None] + torch.arange(emitted.token_ids.shape[1], device=lengths.device)
        context = self.draft.context(emitted.taps)
        for layer, (keys, values) in enumerate(self.draft.context_keys(context, self._rope.of(rows))):
            self.cache.write(layer, rows, keys.transpose(1, 2), values.transpose(1, 2))
        self._roots = emitted.roots
        normed = self._forward(emitted.roots[:, 0], lengths, num_keys)
        first = self.draft.config.first_slot
        self._states = normed[:, first : first + self.num_levels]
        self._logits = self.draft.logits(self._states)

    def _forward(self, anchors: Tensor, lengths: Tensor, num_keys: int) -> Tensor:
        """Normed states (B, S, H) of the blocks that begin with `anchors` (B,) at positions `lengths` (B,)."""
        config = self.draft.config
        mask = self._mask(lengths, num_keys)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            keys, values = self.cache.read(layer, len(lengths), num_keys)
            keys, values = torch.cat((keys, k.transpose(1, 2)), dim=2), torch.cat((values, v.transpose(1, 2)), dim=2)
            return grouped_sdpa(q.transpose(1, 2), keys, values, mask).transpose(1, 2)

        slots = torch.arange(config.block_size, device=lengths.device)
        return self.draft.forward_block(
            self.draft.block_inputs(anchors), self._rope.of(lengths[:, None] + slots), attend
        )  # fmt: skip

    def _mask(self, lengths: Tensor, num_keys: int) -> Tensor:
        """Additive (B, 1, S, K + S): the committed rows (inside the window before the anchor), and the block."""
        config = self.draft.config
        rows = torch.arange(num_keys, device=lengths.device)
        seen = rows < lengths[:, None]
        if config.sliding_window is not None:
            seen &= rows >= lengths[:, None] - config.sliding_window
        size = config.block_size
        own = torch.ones(size, size, dtype=torch.bool, device=lengths.device)
        own = own.tril() if config.causal else own
        whole = torch.cat((seen[:, None].expand(-1, size, -1), own.expand(len(seen), -1, -1)), dim=-1)
        mask = torch.zeros(whole.shape, dtype=self.draft.fc.weight.dtype, device=lengths.device)
        return mask.masked_fill_(~whole, self._blocked)[:, None]

    def propose(self, emitted: Emitted, num_levels: int, num_keys: int, budget: Budget | None = None) -> Trees:
        scores, tokens, parents = self.candidates(emitted.lengths, num_levels, num_keys, budget)
        num_drafted = min(self.num_drafted, scores.shape[1])
        if budget is not None:
            num_drafted = budget.num_nodes(scores[0], num_drafted)
        return build_trees(emitted.roots, tokens, parents, self._levels, scores, num_drafted, num_levels)

    def candidates(
        self, lengths: Tensor, num_levels: int, num_keys: int, budget: Budget | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, target ids and parents (B, C) of all drafts, level by level; parent -1 is the root."""
        assert self._roots is not None, "follow comes before propose"
        batch, width = len(lengths), self.width
        chances, tokens = self._children(0, self._roots)  # (B, 1, k)
        beam_scores, beam_tokens, beam_ids = chances[:, 0], tokens[:, 0], self._ids.expand(batch, -1)
        scores, all_tokens, parents = [beam_scores], [beam_tokens], [torch.full_like(beam_ids, -1)]
        num_candidates = width
        for level in range(1, min(num_levels, self.num_levels)):
            if budget is not None and not budget.deeper(beam_scores[0]):
                break
            chances, tokens = self._children(level, beam_tokens)  # (B, k, k)
            scores.append((beam_scores[..., None] + chances).flatten(1))
            all_tokens.append(tokens.flatten(1))
            parents.append(beam_ids.repeat_interleave(width, dim=1))
            beam_scores, best = scores[-1].topk(width, dim=-1)
            beam_tokens, beam_ids = all_tokens[-1].gather(1, best), best + num_candidates
            num_candidates += width * width
        return torch.cat(scores, dim=1), torch.cat(all_tokens, dim=1), torch.cat(parents, dim=1)

    def _children(self, level: int, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Log-chances and target ids (B, n, k) of the best tokens of a level behind each parent token (B, n)."""
        assert self._states is not None and self._logits is not None
        logits = self._logits[:, level, None].float()  # (B, 1, D)
        if self.draft.markov_head is not None:
            logits = logits + self.draft.markov_logits(parents).float()
        log_probs, draft_ids = best_scores(logits, self.width)
        if self.draft.confidence_head is not None:
            trust = F.logsigmoid(self.draft.confidence(self._states[:, level, None], parents).float())
            log_probs = log_probs + (trust[..., None] - log_probs[..., :1]).clamp_max(0)
            log_probs = log_probs.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
        shape = (*parents.shape, self.width)
        return log_probs.expand(shape), self.draft.target_ids(draft_ids).expand(shape)
