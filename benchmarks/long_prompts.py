"""Long prompts from short ones: what a head needs to see of contexts beyond its usual samples.

    python benchmarks/long_prompts.py answers.jsonl --out long.jsonl --reading 300 --talking 120
    fledge regenerate --engine transformers --target TARGET --data long.jsonl --output-dir long \\
        --temperature 0.0:0.5,0.7:0.5 --max-new-tokens 256

`answers.jsonl` holds single questions with the target's answers. Two kinds are made of them: *reading*
quotes several of those texts and asks for something about them; *talking* asks several questions at once.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from fledge.data.conversations import Conversation, read_conversations
from fledge.data.rejects import Rejects
from fledge.errors import UserError

TURNS = (4, 6)
TASKS = (
    "Summarize the texts above in a few sentences.",
    "List the most important points of the texts above.",
    "What do these texts have in common, and where do they differ?",
    "Which of the texts above is the most useful one? Explain why.",
    "Write a short introduction to a book that contains these texts.",
    "Explain the first text to a ten-year-old.",
    "Rewrite the last text in your own words.",
    "Write three questions that can be answered from these texts, and answer them.",
    "Find mistakes in the texts above and correct them.",
    "Continue the last text.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="single questions with answers, in any format that training reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reading", type=int, default=300, help="prompts that quote texts")
    parser.add_argument("--talking", type=int, default=120, help="prompts of several questions")
    parser.add_argument("--words", type=int, nargs=2, default=(350, 1000), help="of a quotation, least and most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        pairs = [pair for row in read_conversations(str(args.answers), rejects=Rejects()) if (pair := pair_of(row))]
    except UserError as error:
        sys.exit(f"error: {error}")
    if len(pairs) < TURNS[1]:
        sys.exit(f"error: {args.answers}: {len(pairs)} questions with an answer; at least {TURNS[1]} are needed.")
    draw = random.Random(args.seed)
    rows = [(f"reading-{n}", [reading(draw, pairs, args.words)]) for n in range(args.reading)]
    rows += [(f"talking-{n}", talking(draw, pairs)) for n in range(args.talking)]
    with args.out.open("w", encoding="utf-8") as file:
        for name, turns in rows:
            file.write(json.dumps({"id": name, "conversations": [{"from": "human", "value": one} for one in turns]}))
            file.write("\n")


def pair_of(row: Conversation) -> tuple[str, str] | None:
    """The first question and its answer."""
    first = [message["content"] for message in row.messages if message["role"] in ("user", "assistant")][:2]
    return (first[0], first[1]) if len(first) == 2 else None


def reading(draw: random.Random, pairs: Sequence[tuple[str, str]], words: Sequence[int]) -> str:
    """Texts up to a length that is drawn, with a task behind them."""
    room = draw.randint(*words)
    texts: list[str] = []
    while room > 0:
        question, answer = draw.choice(pairs)
        text = answer if draw.random() < 0.7 else f"Question: {question}\nAnswer: {answer}"
        texts.append(f"Text {len(texts) + 1}:\n{text}")
        room -= len(text.split())
    return "\n\n".join([*texts, draw.choice(TASKS)])


def talking(draw: random.Random, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Turns of a user that nobody answers in between: one prompt."""
    return [question for question, _ in draw.sample(pairs, draw.randint(*TURNS))]


if __name__ == "__main__":
    main()
