"""What `fledge decode` and `fledge chat` share: their flags, a loaded target with its head, and text as it streams."""

from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from fledge.console import say, show_table
from fledge.data.detokenize import Detokenizer
from fledge.data.image_urls import AllowImageUrls, allow_image_urls
from fledge.data.rejects import Reject
from fledge.data.samples import Prompt
from fledge.data.sampling import ExtraSampling
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.law import FromConfig, law_of
from fledge.decoding.records import Generation
from fledge.errors import UserError
from fledge.escaping import printable
from fledge.ranges import Count, Natural, NotNegative, Positive, PositiveShare, Seed, Share, TreeNodes

GREEN, NORMAL = "\033[32m", "\033[0m"
READ_BYTES = 256 << 20  # read once to learn the memory's speed


@dataclass(frozen=True, kw_only=True)
class TreeArgs:
    """The draft tree of every round."""

    total_token: TreeNodes = 60
    """Tree nodes the target checks per round, root included."""
    depth: Natural = 5
    """Draft rounds after the first level of the tree."""
    top_k: Count = 10
    """Children per tree node and beam width; 1 drafts a chain."""


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """How tokens are chosen; the same law with and without a head."""

    temperature: NotNegative = 0.0
    """0 takes the most likely token, 1 samples from the target's own distribution."""
    top_p: PositiveShare = 1.0
    """Sample only from the most likely tokens that hold this share of the probability."""
    sample_top_k: Natural | None = None
    """Sample only from this many most likely tokens; 0 for all. (--top-k is the draft tree's.) None, here and below:
    what the target's generation_config asks for."""
    min_p: Share | None = None
    """Least probability of a sampled token, relative to the likeliest."""
    repetition_penalty: Positive | None = None
    """Divisor of the logits of tokens that prompt or answer hold already; at temperature 0 as well."""
    generation_config: FromConfig = "apply"
    """ignore: the flags alone decide."""
    seed: Seed | None = None
    """Seed of the draws. None draws differently every time."""


@dataclass(frozen=True, kw_only=True)
class ModelPairArgs:
    target: str
    """Target model: a folder or a hub name."""
    draft: str | None = None
    """Draft head: the folder that training wrote, or `lookup` for prompt lookup. None decodes plainly."""
    system: str | None = None
    """System turn before everything else."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    adaptive: bool = False
    """Draft only as deep and as wide as it pays, or not at all; the tree flags are then the most that is drafted. Costs
    come from the head's tree profile (`fledge bench --tune`)."""
    shapes: Literal["auto", "exact", "fixed"] = "auto"
    """fixed: rounds of fixed shapes, captured into CUDA graphs on a GPU. exact: shapes as they come, every kind of
    target. auto: fixed on a GPU wherever it can be."""
    profile: bool = False
    """After an answer, show the time of a round by phase and the memory bandwidth it amounts to."""
    tree: TreeArgs = field(default_factory=TreeArgs)
    sampling: SamplingArgs = field(default_factory=SamplingArgs)
    chat_template_type: str | None = None
    """Named chat template instead of the tokenizer's own (qwen3, hunyuan, llama3, gemma, gpt_oss, chatml ...)."""
    enable_thinking: bool | None = None
    """Passed to templates that know thinking modes."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights; auto takes the checkpoint's own."""
    device: str | None = None
    """Where to run, such as cpu or cuda:1. None takes the accelerator when there is one."""
    max_pixels: Count | None = None
    """Vision-language targets: area to which larger pictures are reduced. None: the processor's own."""
    min_pixels: Count | None = None
    """Vision-language targets: area to which smaller pictures are enlarged. None: the processor's own."""
    allow_image_urls: AllowImageUrls = False


class Answerer:
    """A loaded target, with its head when there is one, that answers by the flags."""

    def __init__(self, args: ModelPairArgs) -> None:
        import torch

        from fledge.decoding.adaptive import AdaptiveBudget
        from fledge.decoding.tree_profile import profile_path, read_profile
        from fledge.drafters.registry import read_drafter
        from fledge.drafters.tree import TreeShape
        from fledge.target.model import Target

        allow_image_urls(args.allow_image_urls)
        sampling = args.sampling
        self.args = args
        self.tree = TreeShape(args.tree.total_token, args.tree.depth, args.tree.top_k)
        self.budget = None
        if args.adaptive:
            if args.draft is None:
                raise UserError("--adaptive adapts the draft tree; give the head with --draft.")
            self.budget = AdaptiveBudget.from_profile(read_profile(profile_path(args.draft, None)), self.tree)
        files = read_drafter(args.draft) if args.draft else None  # before the target: a bad head costs no loading
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        self.target = Target.from_pretrained(
            args.target, dtype=dtype, device=args.device, tap_layers=files.tap_layers if files else None,
            min_pixels=args.min_pixels, max_pixels=args.max_pixels,
        )  # fmt: skip
        self.draft = files.bind(self.target.embedding_weight) if files else None
        self.sampling = law_of(
            args.target, temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed,
            flags=ExtraSampling(sampling.repetition_penalty, sampling.sample_top_k, sampling.min_p),
            from_config=sampling.generation_config,
        )  # fmt: skip
        self.stops = self.target.eos_token_ids

    def template(self) -> ChatTemplate:
        """The chat template; its end-of-turn tokens end answers from now on."""
        template = ChatTemplate(
            self.target.tokenizer, self.args.chat_template_type, eos_token_ids=self.target.eos_token_ids,
            enable_thinking=self.args.enable_thinking, vision=self.target.vision,
        )  # fmt: skip
        self.stops = tuple(template.stop_token_ids)
        return template

    def answer(self, prompt: Prompt, out: TextIO) -> tuple[Generation, str]:
        """Stream an answer, with its line of figures on stderr; also returns its text."""
        stream = Stream(self.target.tokenizer, out)
        try:
            found = self._generate(self.draft, prompt, on_tokens=stream.write)
        finally:
            text = stream.close()
        say(speed_line("plain" if self.draft is None else "speculative", found))
        if self.args.profile:
            show_profile(found, self.target)
        return found, text

    def plainly(self, prompt: Prompt, **changes: Any) -> Generation:
        """The same without the head, in the same shapes."""
        return self._generate(None, prompt, **changes)

    def answers(self, draft: Any, prompts: list[Prompt], batch_size: int, **changes: Any) -> list[Generation]:
        """Answers to several prompts of text, `batch_size` of them at a time."""
        from fledge.decoding.generate import generate_batch

        if self.budget is not None or any(prompt.model_inputs for prompt in prompts):
            if batch_size > 1:
                say("one prompt after another: --adaptive and pictures decide for one sequence at a time")
            return [self._generate(draft, prompt, **changes) for prompt in prompts]
        return generate_batch(
            self.target, draft, [prompt.ids for prompt in prompts], batch_size=batch_size,
            **{**self._options(), **changes},
        )  # fmt: skip

    def _generate(self, draft: Any, prompt: Prompt, **changes: Any) -> Generation:
        """One answer, with a drafter or without. Both sides of a comparison go through the same shapes."""
        from fledge.decoding.generate import generate

        budget = self.budget if draft is not None else None
        options = {**self._options(), "budget": budget, "model_inputs": prompt.model_inputs, **changes}
        return generate(self.target, draft, prompt.ids, **options)

    def _options(self) -> dict[str, Any]:
        from fledge.decoding.generate import uses_fixed_shapes

        fixed = uses_fixed_shapes(self.args.shapes, self.target, self.draft, adaptive=self.budget is not None)
        return {
            "max_new_tokens": self.args.max_new_tokens, "sampling": self.sampling, "eos_token_ids": self.stops,
            "tree": self.tree, "shapes": "auto" if fixed else "exact",
        }  # fmt: skip


def rendered(template: ChatTemplate, messages: list[dict[str, Any]]) -> Prompt:
    """The prompt of a conversation."""
    try:
        return template.prompt(messages)
    except Reject as reject:
        raise UserError(f"the prompt cannot be rendered ({reject.detail}). Change it, or use --raw.") from None


class Stream:
    """Writes text as its tokens arrive."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._detokenizer, self._out = Detokenizer(tokenizer), out
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
    ended = "at a stop token" if generation.finish_reason == "stop" else "at the length limit"
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
    import time

    import torch

    block = torch.ones(READ_BYTES // 4, device=device)
    wait: Any = torch.cuda.synchronize if block.is_cuda else (lambda: None)
    best = float("inf")
    for _ in range(6):
        wait()
        start = time.perf_counter()
        block.sum()
        wait()
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best
