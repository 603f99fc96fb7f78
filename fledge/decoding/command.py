"""`fledge decode`: one prompt, answered as it streams, with what the draft head was worth.

Text goes to stdout, figures to stderr. On a terminal the tokens the head guessed right are green.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from fledge.console import say
from fledge.data.samples import Prompt
from fledge.decoding.answering import Answerer, ModelArgs, rendered, speed_line, tokens_per_s
from fledge.decoding.records import Generation, Sampling
from fledge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecodeArgs(ModelArgs):
    prompt: str
    """What the user says; - reads it from stdin."""
    image: list[str] = field(default_factory=list)
    """Pictures shown before it, for vision-language targets: paths, URLs or base64."""
    raw: bool = False
    """Feed the prompt as it is, without the chat template."""
    compare: bool = False
    """Decode plainly too, and show both speeds and whether the outputs agree."""


def decode(args: DecodeArgs) -> None:
    """Answer one prompt with a draft head, streaming, and show what the head was worth."""
    answerer = Answerer(args)
    prompt = prompt_of(args, answerer)
    if args.compare:  # the first forward of a process is slow; neither side should pay for it
        answerer.plainly(prompt, max_new_tokens=min(4, args.max_new_tokens))
    found, _ = answerer.answer(prompt, sys.stdout)
    if args.compare and answerer.draft is not None:
        show_comparison(found, answerer.plainly(prompt), answerer.sampling)


def prompt_of(args: DecodeArgs, answerer: Answerer) -> Prompt:
    """Token ids of the prompt, and the pixels of its pictures."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.raw:
        if args.system is not None or args.image:
            flag = "--image" if args.image else "--system"
            raise UserError(f"--raw feeds the prompt without a template, so {flag} has no place in it. Drop one.")
        return Prompt(answerer.target.tokenizer(text)["input_ids"])
    messages: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system is not None else []
    content: Any = text
    if args.image:
        pictures = [{"type": "image", "image": source} for source in args.image]
        content = [*pictures, {"type": "text", "text": text}]
    return rendered(answerer.template(), [*messages, {"role": "user", "content": content}])


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
