"""The engine that decodes in this process: target, head and chat template, loaded once for many questions.

The spec is a small record that travels to a worker; `load` happens there. Knows the decoding stage and the target;
knows nothing of rows, files or statistics.
"""

import dataclasses
import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from fledge.bench.settings import BenchSettings
from fledge.data.detokenize import answer_text
from fledge.data.rejects import Reject
from fledge.data.samples import Prompt
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.accept import one_node, penalised
from fledge.decoding.adaptive import AdaptiveBudget, TreeChoice, decides_rounds
from fledge.decoding.default_tree import default_tree
from fledge.decoding.exact import is_exact, verifier_of, want_exact
from fledge.decoding.generate import ShapePolicy, generate, uses_fixed_shapes
from fledge.decoding.records import Generation, RoundTrace, Sampling
from fledge.decoding.tree_profile import profile_path, read_profile
from fledge.decoding.verifier import Lengths
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape, roots_only
from fledge.errors import UserError
from fledge.target.model import Target

THINKING: dict[str, bool | None] = {"default": None, "on": True, "off": False}
NOISE_TOKENS = 64  # last tokens of a text whose rounding is measured


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Everything needed to load an engine somewhere else."""

    target: str
    head: str | None
    mode: str
    dtype: str
    chat_template_type: str | None
    thinking: Literal["default", "on", "off"]
    sampling: Sampling
    tree: TreeShape
    num_gpus: int
    max_gpu_memory: str | None
    max_pixels: int | None = None
    min_pixels: int | None = None
    shapes: ShapePolicy = "auto"
    exact: bool = False
    own_choice: bool = False  # of what is drafted; `tree` is then the most
    profile: str | None = None  # of the costs that adaptive drafting goes by; None: every tree as large as asked for

    @classmethod
    def of(cls, args: BenchSettings, tree: TreeShape, *, num_gpus: int) -> "EngineSpec":
        """The spec behind the flags; `num_gpus` is what this machine really gives one model."""
        return cls(
            target=args.model.target,
            head=args.model.draft if args.needs_head else None,
            mode=args.model.mode,
            dtype=args.model.dtype,
            chat_template_type=args.model.chat_template_type,
            thinking=args.model.thinking,
            sampling=args.sampling.law(args.model.target),
            tree=tree,
            num_gpus=num_gpus,
            max_gpu_memory=args.workers.max_gpu_memory,
            max_pixels=args.model.max_pixels,
            min_pixels=args.model.min_pixels,
            shapes=args.model.shapes,
            exact=args.model.exact,
            own_choice=args.model.own_choice,
            profile=str(profile_path(args.model.draft, args.tuning.profile_path))
            if args.model.adaptive else None,
        )  # fmt: skip

    def load(self) -> "InProcessEngine":
        """Load target, head and template."""
        pace: Any = AdaptiveBudget.from_profile(read_profile(Path(self.profile)), self.tree) if self.profile else None
        files = read_drafter(self.head) if self.head else None  # before the target: a bad head costs no loading
        target = Target.from_pretrained(
            self.target,
            dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
            tap_layers=(files.tap_layers if files else None) or (),
            max_pixels=self.max_pixels,
            min_pixels=self.min_pixels,
            chat_template=self.chat_template_type,
            **self.placement(),
        )
        want_exact(target, self.exact)
        draft = files.bind(target) if files else None
        if self.own_choice:
            _, pace = default_tree(target, draft)
        return InProcessEngine(self, target, draft, self._template(target), pace)

    def _template(self, target: Target) -> ChatTemplate:
        return ChatTemplate(
            target.tokenizer, self.chat_template_type, eos_token_ids=target.eos_token_ids, vision=target.vision
        )

    def placement(self) -> dict[str, Any]:
        """Where the weights go: one device, or spread over the first `num_gpus` with a memory limit on each."""
        if self.num_gpus == 0:
            return {"device": "cpu"}
        if self.num_gpus == 1 and not self.max_gpu_memory:
            return {"device": "cuda:0"}
        limit = self.max_gpu_memory
        memory = {gpu: limit or torch.cuda.get_device_properties(gpu).total_memory for gpu in range(self.num_gpus)}
        return {"device_map": "auto", "max_memory": memory}


def refused_path(one: RoundTrace) -> list[int]:
    """The drafted continuation that was refused where the round ended: from its last kept node on."""
    node, path = one.accepted[-1], []
    for child in range(node + 1, len(one.parents)):  # children follow their parents; the root is its own parent
        if one.parents[child] == node:
            node = child
            path.append(one.token_ids[node])
    return path


def promised(one: RoundTrace) -> list[float]:
    """By level, the chance that one of its nodes is kept, as the drafter gives it; empty where it gives none, or where
    the answer's end cut the round."""
    if one.scores is None or one.bonus is None:
        return []
    levels = [0]
    for parent in one.parents[1:]:
        levels.append(levels[parent] + 1)
    chances = [0.0] * max(levels)
    for level, score in zip(levels[1:], one.scores[1:], strict=True):
        chances[level - 1] += math.exp(score)
    return chances


class InProcessEngine:
    """See `fledge.bench.measure.BenchEngine`."""

    def __init__(
        self,
        spec: EngineSpec,
        target: Target,
        draft: Any,
        template: ChatTemplate,
        pace: AdaptiveBudget | TreeChoice | None = None,
    ) -> None:
        self.spec, self.target, self.draft, self.template, self.pace = spec, target, draft, template, pace

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        """The conversation so far in the target's template, with the generation prompt and its pictures."""
        try:
            return self.template.prompt(messages, enable_thinking=THINKING[self.spec.thinking])
        except Reject as reject:
            raise UserError(f"{self.spec.target}: {reject.detail} Measure with another --chat-template-type.") from None

    def generate(self, side: str, prompt: Prompt, *, max_new_tokens: int, seed: int, trace: bool = False) -> Generation:
        """One answer; side `eagle` decodes speculatively, except in an A/A run. Traces need exact shapes."""
        spec = self.spec
        sampling = dataclasses.replace(spec.sampling, seed=seed)
        draft = None if side == "baseline" or spec.mode == "aa" else self.draft
        fixed = uses_fixed_shapes(
            spec.shapes, self.target, self.draft, pictures=bool(prompt.model_inputs),
            adaptive=decides_rounds(self.pace), trace=trace,
        )  # fmt: skip
        return generate(
            self.target, draft, prompt.ids, tree=spec.tree, max_new_tokens=max_new_tokens, sampling=sampling,
            eos_token_ids=self.eos_token_ids(), trace=trace, model_inputs=prompt.model_inputs,
            budget=self.pace if draft is not None else None, shapes="auto" if fixed else "exact",
        )  # fmt: skip

    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.template.stop_token_ids

    def text(self, token_ids: list[int]) -> str:
        """An answer as text, without the template's control tokens, up to a stop string."""
        return answer_text(self.target.tokenizer, token_ids, self.spec.sampling.stop)

    def coloured_rounds(self, generation: Generation) -> list[dict[str, Any]]:
        """A traced generation as text pieces: per round the drafts kept, the first path refused there, the bonus, and
        beside them what was promised."""
        said = generation.token_ids[:1]
        first = {"kept": [], "refused": "", "bonus": self.text(said), "promised": []}
        rounds: list[dict[str, Any]] = [first]
        for one in generation.rounds or []:
            kept = [one.token_ids[node] for node in one.accepted[1:]]
            pieces = self._pieces(said, kept)
            said = said + kept
            refused = "".join(self._pieces(said, refused_path(one)))
            bonus = [] if one.bonus is None else [one.bonus]
            rounds.append({
                "kept": pieces, "refused": refused, "bonus": "".join(self._pieces(said, bonus)),
                "promised": promised(one),
            })  # fmt: skip
            said = said + bonus
        return rounds

    def _pieces(self, said: list[int], more: list[int]) -> list[str]:
        """What each further token adds to the text; a character split over tokens shows with its last one."""
        texts = [self.text(said + more[:count]).removesuffix("\ufffd") for count in range(len(more) + 1)]
        return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]

    @torch.inference_mode()
    def top2(self, prompt: Prompt, token_ids: list[int], chosen: Sequence[int] = ()) -> dict[str, Any]:
        """The gap of the target's two best next logits, how far behind the best the `chosen` tokens are at most, and
        how far rounding moves gaps in this text. All logits under the repetition penalty, if there is one.

        The gaps of the last NOISE_TOKENS tokens are computed twice: all tokens in one pass, and one by one as plain
        decoding does. `noise` is the largest move; 0 where sums are taken in one order.
        """
        whole = prompt.followed_by(token_ids)
        one_by_one = min(NOISE_TOKENS, len(token_ids) if prompt.model_inputs else len(whole) - 1)
        together = self._penalised(whole, self._logits(whole, last=one_by_one + 1))
        alone = self._penalised(whole, self._logits_one_by_one(whole, one_by_one))
        best = together.topk(2, dim=-1)
        gaps = best.values[:, 0] - best.values[:, 1]
        moved = alone.gather(-1, best.indices)
        noise = (gaps - (moved[:, 0] - moved[:, 1])).abs().max()
        behind = max((best.values[-1, 0] - together[-1, token]).item() for token in chosen or best.indices[-1].tolist())
        return {"gap": gaps[-1].item(), "behind": behind, "noise": 0.0 if is_exact(self.target) else noise.item()}

    @torch.inference_mode()
    def mean_log_likelihood(self, prompt: Prompt, token_ids: list[int]) -> float:
        """Mean log-probability of the answer's tokens under the target, at temperature 1."""
        logits = self._logits(prompt.followed_by(token_ids[:-1]), last=len(token_ids)).float()
        log_probs = logits.log_softmax(dim=-1)
        answer = torch.tensor(token_ids, device=log_probs.device)
        return log_probs.gather(-1, answer[:, None]).mean().item()

    def peak_memory_bytes(self) -> int:
        """Most GPU memory allocated so far, or the process's largest resident size on CPU."""
        if self.spec.num_gpus:
            return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(self.spec.num_gpus))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _logits_one_by_one(self, prompt: Prompt, count: int) -> torch.Tensor:
        """(count + 1, V): after the tokens before the last `count`, then after each of these."""
        ids = torch.tensor(prompt.ids, device=self.target.device)
        verifier = verifier_of(self.target, 1, len(ids))
        first = len(ids) - count
        inputs = prompt.until(first).model_inputs or None
        with verifier.running():
            positions = self.target.positions(ids[:first], inputs) if inputs else None
            read = verifier.prefill(
                slice(0, 1), ids[None, :first], taps=False, positions=positions, model_inputs=inputs
            )  # fmt: skip
            states = [read.last_hidden[0, -1:]]
            for row in range(first, len(ids)):
                trees, lengths = roots_only(ids[None, row : row + 1]), Lengths(ids.new_tensor([row]), (row,))
                states.append(verifier.verify(trees, lengths, row + 1, taps=False).last_hidden[0])
                verifier.keep(lengths, one_node(ids.device))
        return self.target.head(torch.cat(states))

    def _penalised(self, prompt: Prompt, logits: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after the last R beginnings of the prompt, under the repetition penalty: float32."""
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if self.spec.sampling.penalises:
            for row in range(len(logits)):
                before = torch.tensor(prompt.ids[: len(prompt.ids) - len(logits) + row + 1], device=logits.device)
                seen[row, before[before < logits.shape[1]]] = True
        return penalised(logits, seen, self.spec.sampling.repetition_penalty)

    def _logits(self, prompt: Prompt, last: int = 1) -> torch.Tensor:
        ids = torch.tensor(prompt.ids, device=self.target.device)
        positions = self.target.positions(ids, prompt.model_inputs)[..., None, :] if prompt.model_inputs else None
        beside: dict[str, Any] = dict(prompt.model_inputs)
        output = self.target.forward(ids[None], position_ids=positions, taps=False, **beside)
        return self.target.head(output.last_hidden[0, -last:])
