"""What a head's files cannot say is measured: it is tried under every reading of its files, and the best one wins.

Files cannot say whether a head was trained at another rope base than its config states, whether its tap ids are inputs
or outputs of layers, or which of two contradicting vocabularies is its own. Decoding can. At temperature 0 the text
does not depend on the head, so the target writes it once. One unrolled pass of the draft then gives, for every
position, how many tokens a chain begun there would have accepted, and with these numbers the rounds of a chain decode
can be counted: tau is that of real decoding (tests/bench/test_doctor.py), and a reading costs one pass of the draft.

Readings are compared by the log-probability that the draft gives to the target's tokens. Accepted drafts alone are too
coarse: for SmolLM2 with taps one layer off the difference is +0.008 +- 0.010 drafts, but -0.035 +- 0.004 nats
(dev/log). A fault that costs no tau is reported as a warning.

Every reading differs from the stated one in one point. The one that gains most is adopted if it gains more than
STANDARD_ERRORS standard errors and loses no drafts. Then all points are tried again from there, so that two faults are
found one after the other, the larger first. (Going topic by topic in a fixed order is worse: with a wrong rope, a wrong
norm can help a little and would be kept.)
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.data.tokenize import Sample
from fledge.decoding.generate import generate
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.config import DraftConfig
from fledge.drafters.eagle3.foreign import t2d_from
from fledge.drafters.eagle3.head import EMBEDDING, Head
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.drafters.layer_config import rope_of
from fledge.errors import UserError
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.target.record import TargetRecord, default_tap_layers

CHAIN = 4  # drafts per round
STANDARD_ERRORS = 3.0  # needed to adopt a reading: neighbouring positions are not independent, and ten are tried
MAX_FAULTS = 4  # looked for

# P positions where a chain may begin


@dataclass(frozen=True)
class Reading:
    """One way to understand a head's files."""

    topic: str
    label: str
    config: DraftConfig
    d2t: Tensor | None  # (D,) offsets; None: the whole vocabulary


@dataclass(frozen=True)
class Score:
    """What a head accepts under a reading. The lengths stand for the same positions in every reading."""

    reading: Reading
    tau: float  # tokens per target forward of a greedy chain, bonus included
    lengths: Tensor  # (P,) drafts accepted by a chain begun at each position
    log_probs: Tensor  # (P,) mean over the chain of log q(the target's token), at each position

    def gain_over(self, other: "Score") -> tuple[float, float]:
        """Mean difference of log-probability per drafted token, in nats, and its standard error."""
        return _mean_difference(self.log_probs, other.log_probs)

    def drafts_over(self, other: "Score") -> tuple[float, float]:
        """Mean difference of accepted drafts per position, and its standard error."""
        return _mean_difference(self.lengths, other.lengths)

    def beats(self, other: "Score") -> bool:
        (gain, error), (drafts, drafts_error) = self.gain_over(other), self.drafts_over(other)
        return gain > STANDARD_ERRORS * error and gain > 0 and drafts >= -drafts_error


@dataclass(frozen=True)
class Diagnosis:
    """What was tried, what is best, and what it cost."""

    stated: Score
    best: Score
    scores: list[Score]  # every reading one point away from the stated one
    positions: int
    seconds: float

    def settled(self) -> set[str]:
        """Topics that more than one reading was tried for."""
        return {score.reading.topic for score in self.scores}


class RecordedAnswers:
    """The target's greedy answers to a few prompts, with the states of every layer a reading may tap."""

    def __init__(
        self, target: Target, prompts: Sequence[Sequence[int]], max_new_tokens: int,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        """`target` taps every layer that any reading names. `answers`: its greedy ones, where they are known."""
        self.target = target
        self.records: list[TargetRecord] = []
        self.prompt_lengths: list[int] = []
        source = LiveSource(target)
        for index, prompt in enumerate(prompts):
            if answers is None:
                answer = generate(target, None, prompt, max_new_tokens=max_new_tokens).token_ids
            else:
                answer = list(answers[index])
            if len(answer) < CHAIN + 2:
                continue
            ids = torch.tensor([*prompt, *answer])
            self.records.append(source.record(Sample(str(index), ids, torch.arange(len(ids)) >= len(prompt))))
            self.prompt_lengths.append(len(prompt))
        if not self.records:
            raise UserError(f"{target.name} answered none of {len(prompts)} prompts with {CHAIN + 2} tokens or more.")

    def score(self, head: Head, reading: Reading) -> Score:
        """Try one reading on every answer."""
        draft = draft_of(head, reading, self.target.embedding_weight)
        columns = torch.tensor([self.target.tap_layers.index(layer) for layer in reading.config.tap_layers])
        outcomes, emitted, rounds = [], 0, 0
        for record, prompt_length in zip(self.records, self.prompt_lengths, strict=True):
            outcomes.append(chain_acceptance(draft, record, columns.to(record.tap_hidden.device)))
            tokens = len(record) - prompt_length
            emitted, rounds = emitted + tokens - 1, rounds + len(chain_rounds(outcomes[-1][0].tolist(), tokens))
        lengths, log_probs = (torch.cat(parts).cpu() for parts in zip(*outcomes, strict=True))
        return Score(reading, emitted / rounds, lengths, log_probs)


@torch.inference_mode()
def chain_acceptance(draft: DraftModel, record: TargetRecord, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) drafts accepted by a chain begun after each answer token, cut at the answer's end; (P,) mean log q.

    Position 0 is the round after the prefill's token. An accepted draft *is* the next token, so the unrolled pass over
    the text shows the draft what decoding would show it. Tokens outside the draft vocabulary count as 1 / V.
    """
    batch = pack([dataclasses.replace(record, tap_hidden=record.tap_hidden[:, columns])])
    alignment = align(batch, CHAIN)
    states = unroll(draft, batch, alignment, CHAIN)  # K of (S, H), normed
    first = int(record.loss_mask.nonzero()[0]) - 1  # the last prompt row drafts the answer's second token
    rows = torch.arange(first, len(record) - 2, device=columns.device)
    index = torch.searchsorted(alignment.rows, rows)
    draft_id = torch.full((draft.config.vocab_size,), -1, device=columns.device)
    draft_id[draft.target_ids(torch.arange(draft.config.draft_vocab_size, device=columns.device))] = torch.arange(
        draft.config.draft_vocab_size, device=columns.device
    )
    alive, lengths = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    log_probs, steps = torch.zeros(len(rows), device=columns.device), torch.zeros_like(rows)
    for step in range(CHAIN):
        wanted = rows + 2 + step
        inside = wanted < len(record)
        token = record.input_ids[wanted.clamp_max(len(record) - 1)]
        known = draft_id[token]
        logits = draft.lm_head(states[step][index]).float()
        alive = alive & inside & (logits.argmax(-1) == known)
        lengths += alive
        log_q = logits.log_softmax(-1).gather(-1, known.clamp_min(0)[:, None])[:, 0]
        log_probs += torch.where(known >= 0, log_q, -math.log(draft.config.vocab_size)) * inside
        steps += inside
    return lengths, log_probs / steps


def chain_rounds(lengths: Sequence[int], tokens: int) -> list[int]:
    """Accepted drafts of every round of a chain decode of `tokens` tokens. A round begins where the last one ended."""
    rounds, position = [], 0
    while position < tokens - 1:
        accepted = min(lengths[position], tokens - 2 - position)  # the answer's last token counts as the bonus
        rounds.append(accepted)
        position += accepted + 1
    return rounds


def _mean_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    difference = ours.double() - theirs.double()
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def draft_of(head: Head, reading: Reading, embedding: Tensor) -> DraftModel:
    """The head as this reading understands it, in the target's dtype."""
    draft = DraftModel(reading.config, head.tensors.get(EMBEDDING, embedding).to(embedding))
    weights = {name: tensor for name, tensor in head.tensors.items() if name not in ("d2t", "t2d", EMBEDDING)}
    draft.load_state_dict(weights, strict=False)
    if reading.d2t is not None:
        draft.set_vocab(reading.d2t, t2d_from(reading.d2t, reading.config.vocab_size))
    return draft.to(embedding.device, embedding.dtype).eval().requires_grad_(False)


def diagnose(
    target: Target, head: Head, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    vocabularies: dict[str, Tensor] | None = None,
) -> Diagnosis:  # fmt: skip
    """Adopt the reading that gains most, until none gains significantly."""
    start = time.perf_counter()
    recorded = RecordedAnswers(target, prompts, max_new_tokens)
    stated = best = recorded.score(head, Reading("stated", "as the files say", head.config, head.tensors.get("d2t")))
    first: list[Score] = []
    for _ in range(MAX_FAULTS):
        tried = [recorded.score(head, reading) for reading in readings(best.reading, target, vocabularies or {})]
        first = first or tried
        candidate = max(tried, key=lambda score: score.gain_over(best)[0])
        if not candidate.beats(best):
            break
        best = candidate
    return Diagnosis(stated, best, first, len(stated.lengths), time.perf_counter() - start)


def readings(now: Reading, target: Target, vocabularies: dict[str, Tensor]) -> Iterator[Reading]:
    """All readings that differ from `now` in one point."""
    for others in (tap_readings, vocab_readings, norm_readings, rope_readings):
        yield from others(now, target, vocabularies)


def layers_to_tap(config: DraftConfig, num_layers: int) -> tuple[int, ...]:
    """Every layer that some reading of the tap ids names."""
    return tuple(sorted({layer for taps in _tap_choices(config, num_layers) for layer in taps}))


def tap_readings(now: Reading, target: Target, vocabularies: dict[str, Tensor]) -> Iterator[Reading]:
    """The ids one layer later and earlier (outputs read as inputs, and the reverse), and the usual three.

    Seen from a reading that is itself a layer off, some of them were never tapped: nobody writes ids two layers off.
    """
    for taps in _tap_choices(now.config, target.num_layers):
        if taps != now.config.tap_layers and set(taps) <= set(target.tap_layers):
            yield _other(now, "taps", f"taps {list(taps)}", tap_layers=taps)


def vocab_readings(now: Reading, target: Target, vocabularies: dict[str, Tensor]) -> Iterator[Reading]:
    """Each of two contradicting vocabularies."""
    for name, d2t in vocabularies.items():
        if now.d2t is not None and not torch.equal(d2t, now.d2t):
            yield dataclasses.replace(now, topic="vocab", label=f"the vocabulary of {name}", d2t=d2t)


def norm_readings(now: Reading, target: Target, vocabularies: dict[str, Tensor]) -> Iterator[Reading]:
    """The other feedback of an EAGLE-3.1 head, and the other residual."""
    if now.config.fc_norm or now.config.norm_output:
        flipped = not now.config.norm_output
        yield _other(now, "norms", f"norm_output {flipped}", norm_output=flipped)
    flipped = not now.config.norm_before_residual
    yield _other(now, "norms", f"norm_before_residual {flipped}", norm_before_residual=flipped)


def rope_readings(now: Reading, target: Target, vocabularies: dict[str, Tensor]) -> Iterator[Reading]:
    """The target's rope, and base 10000 (what AngelSlim and ModelOpt train with unless told otherwise)."""
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    seen = [now.config.rope_parameters]
    for label, rope in (("the target's rope", rope_of(target.text_config)), ("rope base 10000", plain)):
        if rope not in seen:
            seen.append(rope)
            yield _other(now, "rope", label, rope_parameters=rope)


def _tap_choices(config: DraftConfig, num_layers: int) -> list[tuple[int, ...]]:
    stated = config.tap_layers
    choices = [stated, tuple(layer + 1 for layer in stated), tuple(layer - 1 for layer in stated)]
    if len(stated) == 3 and num_layers >= 7:
        choices.append(default_tap_layers(num_layers))
    inside = [taps for taps in choices if 0 <= min(taps) and max(taps) < num_layers]
    return list(dict.fromkeys(inside))


def _other(now: Reading, topic: str, label: str, **changes: Any) -> Reading:
    return dataclasses.replace(now, topic=topic, label=label, config=dataclasses.replace(now.config, **changes))
