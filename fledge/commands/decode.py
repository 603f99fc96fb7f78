"""`fledge decode`: a prompt, answered as it streams, or several at once, with what the draft head was worth.

Text goes to stdout, figures to stderr. On a terminal the tokens the head guessed right are green.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fledge.commands import answering
from fledge.commands.answering import AnswerArgs, Answerer, rendered, speed_line
from fledge.console import say
from fledge.decoding.records import Generation, Sampling
from fledge.errors import UserError
from fledge.escaping import printable
from fledge.ranges import Count

if TYPE_CHECKING:  # it imports torch, which `--help` has no time for
    from fledge.data.samples import Prompt

MAIN = ("prompt", *answering.MAIN, "image", "raw", "compare", "batch_size")


@dataclass(frozen=True, kw_only=True)
class DecodeArgs(AnswerArgs):
    """The prompts."""

    prompt: tuple[str, ...]
    """What the user says; - reads it from stdin. Several are answered one after another, or --batch-size at a time."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    batch_size: Count = 1
    """Prompts decoded at once; a finished one makes room for the next."""
    image: tuple[str, ...] = ()
    """Pictures shown before it, for vision-language targets: paths, URLs or base64."""
    raw: bool = False
    """Feed the prompt as it is, without the chat template."""
    compare: bool = False
    """Decode plainly too, and show both speeds and whether the outputs agree."""


def decode(args: DecodeArgs) -> None:
    """Answer prompts with a draft head, streaming a single one, and show what the head was worth."""
    if not args.prompt:
        raise UserError("--prompt was given without a text; it needs at least one.")
    if args.image and len(args.prompt) > 1:
        raise UserError(f"--image belongs to one prompt; --prompt has {len(args.prompt)}. Ask them one by one.")
    answerer = Answerer(args)
    prompts = prompts_of(args, answerer)
    if len(prompts) > 1:
        return decode_several(args, answerer, prompts)
    prompt = prompts[0]
    if args.compare:  # the first forward of a process is slow; neither side should pay for it
        answerer.plainly(prompt, max_new_tokens=min(4, args.max_new_tokens))
    found, _ = answerer.answer(prompt, sys.stdout)
    if args.compare and answerer.draft is not None:
        show_comparison(found, answerer.plainly(prompt), answerer.sampling)


def decode_several(args: DecodeArgs, answerer: Answerer, prompts: "list[Prompt]") -> None:
    """Answer all, then show them in order, with what each and all of them together cost."""
    sides = [answerer.draft, None] if args.compare and answerer.draft is not None else [answerer.draft]
    made, speeds = [], []
    for head in sides:
        if args.compare:
            answerer.answers(head, prompts, args.batch_size, max_new_tokens=min(4, args.max_new_tokens))
        start = time.perf_counter()
        made.append(answerer.answers(head, prompts, args.batch_size))
        speeds.append(sum(len(one.token_ids) for one in made[-1]) / (time.perf_counter() - start))
    for text, one in zip(args.prompt, made[0], strict=True):
        say(f"> {text}")
        answer = answerer.text(one)
        print(printable(answer) if sys.stdout.isatty() else answer)
        say(speed_line("plain" if answerer.draft is None else "speculative", one))
    say(f"{len(prompts)} prompts, {args.batch_size} at a time: {speeds[0]:.1f} tok/s in all, prompts included")
    if len(sides) > 1:
        say(f"speed-up of all: {speeds[0] / speeds[1]:.2f}x")
        for number, (found, plain) in enumerate(zip(*made, strict=True), start=1):
            say(f"prompt {number}:")
            show_comparison(found, plain, answerer.sampling)


def prompts_of(args: DecodeArgs, answerer: Answerer) -> "list[Prompt]":
    """Token ids of the prompts, and the pixels of their pictures."""
    from fledge.data.samples import Prompt

    texts = [_standard_input() if text == "-" else text for text in args.prompt]
    if args.raw:
        if args.system is not None or args.image:
            flag = "--image" if args.image else "--system"
            raise UserError(f"--raw feeds the prompt without a template, so {flag} has no place in it. Drop one.")
        return [Prompt(answerer.target.tokenizer(text)["input_ids"]) for text in texts]
    template = answerer.template()
    messages: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system is not None else []
    pictures = [{"type": "image", "image": source} for source in args.image]
    contents: list[Any] = [[*pictures, {"type": "text", "text": text}] if pictures else text for text in texts]
    return [rendered(template, [*messages, {"role": "user", "content": content}]) for content in contents]


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt -: what was read from stdin is not {error.encoding.upper()} ({error}).") from None


def show_comparison(found: Generation, plain: Generation, sampling: Sampling) -> None:
    """Both sides, and whether they agree where they must."""
    say(speed_line("plain", plain))
    if plain.decode_s and found.decode_s:
        say(f"speed-up: {found.tokens_per_s / plain.tokens_per_s:.2f}x")
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
