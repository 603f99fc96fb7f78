"""What `fledge decode` and `fledge chat` share: their flags, a loaded target with its head, and text as it streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from fledge.console import say, show_table
from fledge.data.detokenize import Detokenizer, answer_text
from fledge.data.image_urls import allow_image_urls
from fledge.data.rejects import Reject
from fledge.data.settings import PromptSettings
from fledge.decoding.records import Generation
from fledge.decoding.settings import DraftingSettings, SamplingSettings
from fledge.errors import UserError
from fledge.escaping import printable
from fledge.target.settings import DeviceSettings, TargetSettings

if TYPE_CHECKING:  # they import torch, which `--help` has no time for
    from fledge.data.samples import Prompt
    from fledge.data.tokenize import ChatTemplate

GREEN, NORMAL = "\033[32m", "\033[0m"
READ_BYTES = 256 << 20  # read once to learn the memory's speed


@dataclass(frozen=True, kw_only=True)
class AnswerArgs(TargetSettings, DeviceSettings, DraftingSettings, SamplingSettings, PromptSettings):
    """How answers are given."""

    system: str | None = None
    """System turn before everything else."""
    profile: bool = False
    """After an answer, show the time of a round by phase and the memory bandwidth it amounts to."""


MAIN = (
    "target", "draft", "system", "max_new_tokens", "temperature", "top_p", "seed", "total_token", "depth", "top_k",
    "adaptive", "thinking", "chat_template_type", "dtype", "device",
)  # fmt: skip


class Answerer:
    """A loaded target, with its head when there is one, that answers by the flags."""

    def __init__(self, args: AnswerArgs) -> None:
        import torch

        from fledge.decoding.adaptive import AdaptiveBudget, TreeChoice
        from fledge.decoding.default_tree import default_tree
        from fledge.decoding.exact import want_exact
        from fledge.decoding.tree_profile import profile_path, read_profile, resolve_tree
        from fledge.drafters.registry import read_drafter
        from fledge.target.model import Target

        allow_image_urls(args.allow_image_urls)
        self.args = args
        self.tree = resolve_tree(args.total_token, args.depth, args.top_k, head=args.draft)
        self.budget: AdaptiveBudget | TreeChoice | None = None
        if args.adaptive:
            if args.draft is None:
                raise UserError("--adaptive adapts the draft tree; give the head with --draft.")
            self.budget = AdaptiveBudget.from_profile(read_profile(profile_path(args.draft, None)), self.tree)
        files = read_drafter(args.draft) if args.draft else None  # before the target: a bad head costs no loading
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        self.target = Target.from_pretrained(
            args.target, dtype=dtype, device=args.device, tap_layers=(files.tap_layers if files else None) or (),
            min_pixels=args.min_pixels, max_pixels=args.max_pixels, chat_template=args.chat_template_type,
        )  # fmt: skip
        want_exact(self.target, args.exact)
        self.draft = files.bind(self.target) if files else None
        if args.own_choice:
            self.tree, self.budget = default_tree(self.target, self.draft)
        self.sampling = args.law(args.target)
        self.stops = self.target.eos_token_ids

    def template(self) -> "ChatTemplate":
        """The chat template; its end-of-turn tokens end answers from now on."""
        from fledge.data.tokenize import ChatTemplate

        template = ChatTemplate(
            self.target.tokenizer, self.args.chat_template_type, eos_token_ids=self.target.eos_token_ids,
            enable_thinking=self.args.enable_thinking, vision=self.target.vision,
        )  # fmt: skip
        self.stops = tuple(template.stop_token_ids)
        return template

    def answer(self, prompt: "Prompt", out: TextIO) -> tuple[Generation, str]:
        """Stream an answer, with its line of figures on stderr; also returns its text."""
        stream = Stream(self.target.tokenizer, out, self.sampling.stop)
        try:
            found = self._generate(self.draft, prompt, on_tokens=stream.write)
        finally:
            text = stream.close()
        say(speed_line("plain" if self.draft is None else "speculative", found))
        if self.args.profile:
            show_profile(found, self.target)
        return found, text

    def plainly(self, prompt: "Prompt", **changes: Any) -> Generation:
        """The same without the head, in the same shapes."""
        return self._generate(None, prompt, **changes)

    def answers(self, draft: Any, prompts: "list[Prompt]", batch_size: int, **changes: Any) -> list[Generation]:
        """Answers to several prompts of text, `batch_size` of them at a time."""
        from fledge.decoding.adaptive import decides_rounds
        from fledge.decoding.default_tree import default_tree
        from fledge.decoding.generate import generate_batch

        if batch_size > 1 and self.args.own_choice:
            changes["tree"], _ = default_tree(self.target, draft, at_once=batch_size)
        elif decides_rounds(self.budget) or (self.budget is not None and batch_size == 1):
            if batch_size > 1:
                say("one prompt after another: --adaptive decides for one sequence at a time")
            return [self._generate(draft, prompt, **changes) for prompt in prompts]
        return generate_batch(
            self.target, draft, [prompt.ids for prompt in prompts], batch_size=batch_size,
            model_inputs=[prompt.model_inputs for prompt in prompts], **{**self._options(), **changes},
        )  # fmt: skip

    def _generate(self, draft: Any, prompt: "Prompt", **changes: Any) -> Generation:
        """One answer, with a drafter or without. Both sides of a comparison go through the same shapes."""
        from fledge.decoding.generate import generate

        budget = self.budget if draft is not None else None
        options = {**self._options(), "budget": budget, "model_inputs": prompt.model_inputs, **changes}
        return generate(self.target, draft, prompt.ids, **options)

    def text(self, generation: Generation) -> str:
        """What an answer says."""
        return answer_text(self.target.tokenizer, generation.token_ids, self.sampling.stop)

    def _options(self) -> dict[str, Any]:
        from fledge.decoding.adaptive import decides_rounds
        from fledge.decoding.generate import uses_fixed_shapes

        fixed = uses_fixed_shapes(self.args.shapes, self.target, self.draft, adaptive=decides_rounds(self.budget))
        return {
            "max_new_tokens": self.args.max_new_tokens, "sampling": self.sampling, "eos_token_ids": self.stops,
            "tree": self.tree, "shapes": "auto" if fixed else "exact",
        }  # fmt: skip


def rendered(template: "ChatTemplate", messages: list[dict[str, Any]]) -> "Prompt":
    """The prompt of a conversation."""
    try:
        return template.prompt(messages)
    except Reject as reject:
        raise UserError(f"the prompt cannot be rendered ({reject.detail}). Change it, or use --raw.") from None


class Stream:
    """Writes text as its tokens arrive."""

    def __init__(self, tokenizer: Any, out: TextIO, stop: Sequence[str] = ()) -> None:
        self._detokenizer, self._out = Detokenizer(tokenizer, stop), out
        self._colour = out.isatty()

    def write(self, new: list[int]) -> None:
        """One round: the drafts that were kept, then the target's own token."""
        for index, token in enumerate(new):
            piece = self._detokenizer.add(token)
            kept = self._colour and index < len(new) - 1
            piece = printable(piece) if self._colour else piece  # a terminal obeys control characters
            self._out.write(f"{GREEN}{piece}{NORMAL}" if kept and piece else piece)
        self._out.flush()

    def close(self) -> str:
        """What was held back, and a line end. The whole text."""
        rest = self._detokenizer.rest()
        self._out.write((printable(rest) if self._colour else rest) + "\n")
        self._out.flush()
        return self._detokenizer.text


def speed_line(name: str, generation: Generation) -> str:
    """Tokens, tau, tokens per second after the first, time to the first."""
    tau = f", tau {generation.tau:.2f}" if generation.drafted_depth and generation.num_forwards else ""
    ended = "at a stop" if generation.finish_reason == "stop" else "at the length limit"
    return (
        f"{name}: {len(generation.token_ids)} tokens, ended {ended}{tau}, {generation.tokens_per_s:.1f} tok/s, "
        f"first token after {1000 * generation.ttft_s:.0f} ms"
    )


def show_profile(generation: Generation, target: Any) -> None:
    """Where a round's time goes, and how near it is to reading the weights once."""
    rounds = max(generation.num_forwards, 1)
    parts = {phase: seconds for phase, seconds in generation.phases_s.items() if phase != "prefill"}
    total = sum(parts.values()) or 1.0
    rows = [(phase, f"{1000 * seconds / rounds:.2f}", f"{seconds / total:.0%}") for phase, seconds in parts.items()]
    show_table(f"a round ({generation.num_forwards} rounds)", ("phase", "ms", "share"), rows)
    weights = sum(p.numel() * p.element_size() for p in target.model.parameters())
    speed, fastest = weights / (parts["verify"] / rounds or 1.0), read_speed(target.device)
    say(
        f"verification reads {weights / 1e9:.2f} GB of weights per round at {speed / 1e9:.1f} GB/s; this machine reads "
        f"{fastest / 1e9:.1f} GB/s, so plain decoding cannot pass {fastest / weights:.1f} tok/s"
    )


def read_speed(device: Any) -> float:
    """Bytes per second of a plain read of memory, the best of five."""
    import torch

    from fledge.decoding.capture import Timer

    block = torch.ones(READ_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(6):
        timer = Timer(block.device)
        timer.lap("begin")
        block.sum()
        timer.lap("read")
        best = min(best, timer.seconds()["read"])
    return READ_BYTES / best
