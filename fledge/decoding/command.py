"""`fledge decode`: one prompt, answered as it streams, with what the draft head was worth.

Text goes to stdout, figures to stderr. On a terminal the tokens the head guessed right are green.
"""

import sys
from dataclasses import dataclass

from fledge.console import say
from fledge.decoding.answering import Answerer, ModelArgs, rendered, speed_line, tokens_per_s
from fledge.decoding.records import Generation, Sampling
from fledge.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecodeArgs(ModelArgs):
    prompt: str
    """What the user says; - reads it from stdin."""
    raw: bool = False
    """Feed the prompt as it is, without the chat template."""
    compare: bool = False
    """Decode plainly too, and show both speeds and whether the outputs agree."""


def decode(args: DecodeArgs) -> None:
    """Answer one prompt with a draft head, streaming, and show what the head was worth."""
    answerer = Answerer(args)
    prompt_ids = prompt_of(args, answerer)
    if args.compare:  # the first forward of a process is slow; neither side should pay for it
        answerer.plainly(prompt_ids, max_new_tokens=min(4, args.max_new_tokens))
    found, _ = answerer.answer(prompt_ids, sys.stdout)
    if args.compare and answerer.draft is not None:
        show_comparison(found, answerer.plainly(prompt_ids), answerer.sampling)


def prompt_of(args: DecodeArgs, answerer: Answerer) -> list[int]:
    """Token ids of the prompt."""
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if args.raw:
        if args.system is not None:
            raise UserError("--raw feeds the prompt without a template, so --system has no place in it. Drop one.")
        return answerer.target.tokenizer(text)["input_ids"]
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    return rendered(answerer.template(), [*messages, {"role": "user", "content": text}])


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
