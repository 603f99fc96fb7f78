"""`fledge decode`: one prompt, answered as it streams, with what the draft head was worth.

Text goes to stdout, figures to stderr. On a terminal the tokens the head guessed right are green.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from fledge.console import say
from fledge.data.rejects import Reject
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.records import Generation, Sampling, TreeShape
from fledge.errors import UserError

GREEN, NORMAL = "\033[32m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class TreeArgs:
    """The draft tree of every round."""

    total_token: int = 60
    """Tree nodes the target checks per round, root included."""
    depth: int = 5
    """Draft rounds after the first level of the tree."""
    top_k: int = 10
    """Children per tree node and beam width; 1 drafts a chain."""


@dataclass(frozen=True, kw_only=True)
class SamplingArgs:
    """How tokens are chosen; the same law with and without a head."""

    temperature: float = 0.0
    """0 takes the most likely token, 1 samples from the target's own distribution."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that hold this share of the probability."""
    sample_top_k: int = 0
    """Sample only from this many most likely tokens; 0 for all. (--top-k is the draft tree's.)"""
    seed: int | None = None
    """Seed of the draws. None draws differently every time."""


@dataclass(frozen=True, kw_only=True)
class DecodeArgs:
    target: str
    """Target model: a folder or a hub name."""
    draft: Path | None = None
    """Draft head: the folder that training wrote. None decodes plainly."""
    prompt: str
    """What the user says; - reads it from stdin."""
    system: str | None = None
    """System turn before it."""
    raw: bool = False
    """Feed the prompt as it is, without the chat template."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    compare: bool = False
    """Decode plainly too, and show both speeds and whether the outputs agree."""
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


def decode(args: DecodeArgs) -> None:
    """Answer one prompt with a draft head, streaming, and show what the head was worth."""
    import torch

    from fledge.decoding.generate import generate_plain, generate_speculative
    from fledge.draft.checkpoint import load_draft
    from fledge.draft.config import from_json
    from fledge.target.model import Target

    sampling = Sampling(args.sampling.temperature, args.sampling.top_p, args.sampling.sample_top_k, args.sampling.seed)
    tree = TreeShape(args.tree.total_token, args.tree.depth, args.tree.top_k)
    taps = from_json(args.draft / "config.json").tap_layers if args.draft else None
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    target = Target.from_pretrained(args.target, dtype=dtype, device=args.device, tap_layers=taps)
    draft = load_draft(args.draft, target.embedding_weight) if args.draft else None
    prompt_ids, stops = prompt_of(args, target)
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens, "sampling": sampling, "eos_token_ids": stops,
    }  # fmt: skip
    if args.compare:  # the first forward of a process is slow; neither side should pay for it
        generate_plain(target, prompt_ids, **{**options, "max_new_tokens": min(4, args.max_new_tokens)})
    stream = Stream(target.tokenizer, sys.stdout)
    if draft is None:
        show_speed("plain", generate_plain(target, prompt_ids, on_tokens=stream.write, **options), stream)
        return
    found = generate_speculative(target, draft, prompt_ids, tree=tree, on_tokens=stream.write, **options)
    show_speed("speculative", found, stream)
    if args.compare:
        show_comparison(found, generate_plain(target, prompt_ids, **options), sampling)


def prompt_of(args: DecodeArgs, target: Any) -> tuple[list[int], tuple[int, ...]]:
    """Token ids of the prompt, and the ids that end the answer."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.raw:
        if args.system is not None:
            raise UserError("--raw feeds the prompt without a template, so --system has no place in it. Drop one.")
        return target.tokenizer(text)["input_ids"], target.eos_token_ids
    template = ChatTemplate(
        target.tokenizer, args.chat_template_type, eos_token_ids=target.eos_token_ids,
        enable_thinking=args.enable_thinking,
    )  # fmt: skip
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    try:
        ids = template.prompt_ids([*messages, {"role": "user", "content": text}])
    except Reject as reject:
        raise UserError(f"the prompt cannot be rendered ({reject.detail}). Change it, or use --raw.") from None
    return ids, tuple(template.stop_token_ids)


class Stream:
    """Writes text as its tokens arrive; a character split over several tokens waits for its last one."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._colour = out.isatty()
        self._token_ids: list[int] = []
        self._shown = ""

    def write(self, new: list[int]) -> None:
        """One round: the drafts that were kept, then the target's own token."""
        for index, token in enumerate(new):
            self._token_ids.append(token)
            text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
            if text.endswith("\ufffd") or not text.startswith(self._shown):
                continue
            piece, self._shown = text[len(self._shown) :], text
            kept = self._colour and index < len(new) - 1
            self._out.write(f"{GREEN}{piece}{NORMAL}" if kept else piece)
        self._out.flush()

    def close(self) -> None:
        """What was held back, and a line end."""
        text = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        rest = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._out.write(rest + "\n")
        self._out.flush()


def show_speed(name: str, generation: Generation, stream: Stream) -> None:
    """One line of figures below the answer."""
    stream.close()
    say(speed_line(name, generation))


def speed_line(name: str, generation: Generation) -> str:
    """Tokens, tau, tokens per second after the first, time to the first."""
    tau = f", tau {generation.tau:.2f}" if generation.drafted_depth and generation.num_forwards else ""
    ended = "at a stop token" if generation.finish_reason == "stop" else "at the length limit"
    return (
        f"{name}: {len(generation.token_ids)} tokens, ended {ended}{tau}, {tokens_per_s(generation):.1f} tok/s, "
        f"first token after {1000 * generation.ttft_s:.0f} ms"
    )


def tokens_per_s(generation: Generation) -> float:
    """Decoding speed: the tokens after the first over the time after the first."""
    return (len(generation.token_ids) - 1) / generation.decode_s if generation.decode_s else 0.0


def show_comparison(found: Generation, plain: Generation, sampling: Sampling) -> None:
    """Both sides, and whether they agree where they must."""
    say(speed_line("plain", plain))
    if plain.decode_s and found.decode_s:
        say(f"speed-up: {tokens_per_s(found) / tokens_per_s(plain):.2f}x")
    if sampling.temperature:
        say("outputs: both follow the target's law; the draws differ")
    elif found.token_ids == plain.token_ids:
        say("outputs identical")
    else:
        pairs = zip(found.token_ids, plain.token_ids, strict=False)
        shorter = min(len(found.token_ids), len(plain.token_ids))
        first = next((index for index, (one, other) in enumerate(pairs) if one != other), shorter)
        say(
            f"outputs differ from token {first} on. In bfloat16 and float16 the target's two best tokens can tie "
            f"within rounding; --dtype float32 tells a tie from a fault."
        )
