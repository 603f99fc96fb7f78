"""`model.generate(..., custom_generate=fledge.speculate(draft))`: transformers' own call, decoded speculatively.

transformers prepares everything (inputs, left padding, the generation config, processors and stopping criteria) and
calls us in place of its loop; we return what that loop returns. It hands no streamer to a custom loop. Whatever else
would change the answer and is not built here is refused by its name.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fledge.api.pairs import Draft, let_go, pair_up, target_of
from fledge.api.settings import SAMPLING, refuse_fields
from fledge.decoding.default_tree import drafting
from fledge.decoding.generate import generate_batch
from fledge.decoding.records import Sampling
from fledge.drafters.base import Drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

# Processors that a generation config asks for and Sampling does: the field, and the attribute that holds its value.
PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
}
CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
# What generate() may hand to the model's forward that does not change the answer, or is read here.
MODEL_INPUTS = {"attention_mask", "cache", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}


def speculate(draft: Draft, *, tree: TreeShape | None = None) -> "Speculation":
    """A loop for `model.generate(custom_generate=...)` that decodes with this drafter: a head's folder, the name of a
    drafter without weights, or a loaded drafter. Make it once: the first call with a model reads the head."""
    return Speculation(draft, tree)


@dataclass(frozen=True)
class _Pair:
    target: Target
    drafter: Drafter | None
    made_for: tuple[Any, ...]  # the model, and where and in what its embedding was


class Speculation:
    """See `speculate`."""

    def __init__(self, draft: Draft, tree: TreeShape | None) -> None:
        self.draft, self.tree = draft, tree
        self._pair: _Pair | None = None
        self._let_go: Any = None

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_inputs: Any,
    ) -> Any:  # fmt: skip
        """(B, P + N): the prompts, and the answers filled up with padding; or a GenerateDecoderOnlyOutput."""
        _refuse(model_inputs, stopping_criteria, generation_config)
        sampling, prompts = _sampling(logits_processor, generation_config), _unpadded(input_ids, model_inputs)
        stops = {int(token) for one in stopping_criteria if hasattr(one, "eos_token_id") for token in one.eos_token_id}
        with evaluating(model):
            pair = self._pair_with(model)
            made = generate_batch(
                pair.target, pair.drafter, prompts, max_new_tokens=stopping_criteria.max_length - input_ids.shape[1],
                sampling=sampling, eos_token_ids=sorted(stops),
                **drafting(pair.target, pair.drafter, self.tree, at_once=len(prompts)),
            )  # fmt: skip
        padding = generation_config._pad_token_tensor  # of prompts without a stop token all answers are as long
        answers = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(one.token_ids, device=input_ids.device) for one in made], batch_first=True,
            padding_value=0 if padding is None else int(padding),
        )  # fmt: skip
        sequences: Any = torch.cat((input_ids, answers), dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)

    def _pair_with(self, model: Any) -> _Pair:
        """The model as a target, with the drafter; kept for the next call with this model."""
        embedding = model.get_input_embeddings().weight
        made_for = (model, embedding.device, embedding.dtype)
        if self._pair is None or self._pair.made_for != made_for:
            if self._let_go is not None:
                self._let_go()
            pair = pair_up(self.draft, lambda taps: target_of(model, None, taps))
            self._pair = _Pair(*pair, made_for)
            self._let_go = weakref.finalize(self, let_go, self._pair.target)
        return self._pair


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout; a model under training goes on as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _refuse(model_inputs: dict[str, Any], stopping_criteria: Any, config: Any) -> None:
    """An error that names what would change the answer and is not built here."""
    names = [name for name, value in model_inputs.items() if value is not None and name not in MODEL_INPUTS]
    cache = model_inputs.get("cache", model_inputs.get("past_key_values"))
    if cache is not None and cache.get_seq_length():
        names.append("a cache that holds tokens already")
    names += [type(one).__name__ for one in stopping_criteria if type(one).__name__ not in CRITERIA]
    if names:
        raise UserError(
            f"fledge.speculate does not support {', '.join(sorted(names))}. Leave it out, or generate without "
            f"custom_generate. (Chats with pictures: fledge.load(...).generate.)"
        )
    refuse_fields(config, but="num_return_sequences")  # the prompts are repeated already


def _sampling(processors: Any, config: Any) -> Sampling:
    """The law that the processors make, which must be those of the config. The seed comes from torch's generator."""
    values: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    for processor in processors:
        field, attribute = PROCESSORS.get(type(processor).__name__, ("", ""))
        if field not in SAMPLING:
            raise UserError(
                f"fledge.speculate does not support {type(processor).__name__}, which changes the target's choice. "
                f"Leave out what asks for it, or generate without custom_generate."
            )
        values[field] = getattr(processor, attribute)
    return Sampling(**values, seed=int(torch.randint(1 << 62, ())))


def _unpadded(input_ids: Tensor, model_inputs: dict[str, Any]) -> list[list[int]]:
    """The prompts (B, P) without the padding on their left."""
    mask = model_inputs.get("attention_mask")
    seen = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool().to(input_ids.device)
    if not bool(seen[:, -1].all()) or bool((seen[:, 1:] < seen[:, :-1]).any()):
        raise UserError("the prompts are padded on their right or inside. Pad on the left: padding_side='left'.")
    positions = model_inputs.get("position_ids")
    if positions is not None and positions.dim() == 2:
        usual = (seen.cumsum(1) - 1).to(positions.device)
        if not bool((positions == usual)[seen.to(positions.device)].all()):
            raise UserError("fledge.speculate does not support position_ids other than 0, 1, 2 .. Leave them out.")
    return [row[some].tolist() for row, some in zip(input_ids, seen, strict=True)]
