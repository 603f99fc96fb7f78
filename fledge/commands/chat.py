"""`fledge chat`: a conversation in the terminal, answers streaming, drafted tokens in green, tau and speed after each.

Lines from a pipe are turns as well. Ctrl-C stops an answer, a second one (or Ctrl-D) ends the conversation.
"""

import re
import sys
from typing import Any

from fledge.commands.answering import MAIN, AnswerArgs, Answerer, rendered
from fledge.console import say, warn
from fledge.errors import UserError

__all__ = ["MAIN", "AnswerArgs", "chat"]

COMMAND = re.compile(r"/[a-z]+")  # a message may begin with a slash and go on: /etc/hosts, "/s means"
HELP = "/help says this, /reset begins a new conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer."


def chat(args: AnswerArgs) -> None:
    """Talk to the target with a draft head: drafted tokens that were kept are green, tau and tok/s follow an answer."""
    answerer = Answerer(args)
    template = answerer.template()
    start: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system is not None else []
    messages = list(start)
    say(HELP)
    while (text := next_turn()) is not None:
        if text == "/reset":
            messages = list(start)
            say("a new conversation")
            continue
        if text == "/help":
            say(HELP)
            continue
        if COMMAND.fullmatch(text):
            say(f"{text}: no such command. {HELP}")
            continue
        asked = [*messages, {"role": "user", "content": text}]
        try:
            _, answer = answerer.answer(rendered(template, asked), sys.stdout)
        except KeyboardInterrupt:
            say("stopped; the turn is left out of the conversation")
            continue
        except UserError as error:  # the conversation outgrew the context, say: the program need not end
            warn(f"{error} /reset begins a new conversation.")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


def next_turn() -> str | None:
    """The next line that says something; None at the end."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"what was read from stdin is not {error.encoding.upper()} ({error}).") from None
        if text in ("/exit", "/quit"):
            return None
        if text:
            return text
