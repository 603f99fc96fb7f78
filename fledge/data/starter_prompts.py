"""A few hundred varied prompts of fledge's own, for the quickstart and for trying things without a data set.

Combinations of requests and subjects rather than a list: small in the package, different in wording and length, and
disjoint from the benchmark's `quick` set.
"""

import itertools
import json
import random
from pathlib import Path

from fledge.outputs import write_file

REQUESTS = (
    "Explain {} to a ten-year-old.",
    "What should a beginner know about {}?",
    "Write a short story about {}.",
    "List five surprising facts about {}.",
    "Give me step-by-step advice on {}.",
    "Write a friendly e-mail to a colleague about {}.",
    "What are the advantages and disadvantages of {}?",
    "Summarise the history of {} in one paragraph.",
    "Describe {} as if you were writing for a travel magazine.",
    "Compose a short poem about {}.",
    "How would you teach a class about {}?",
    "Name three common mistakes people make with {} and how to avoid them.",
    "Write a dialogue between two friends who disagree about {}.",
    "Plan a weekend around {}.",
    "Why does {} matter today?",
    "Draft a short speech on {}.",
)
SUBJECTS = (
    "growing tomatoes on a balcony", "the water cycle", "learning to play the piano", "riding a bicycle in the city",
    "baking sourdough bread", "how volcanoes erupt", "keeping a diary", "the invention of printing", "night trains",
    "saving money as a student", "the life of bees", "public libraries", "learning a second language", "solar panels",
    "coral reefs", "repairing old furniture", "the moon's influence on tides", "working from home", "chess openings",
    "walking in the mountains", "how computers store numbers", "street markets", "taking better photographs",
    "the migration of birds", "making soup from leftovers", "time zones", "planting trees", "board games",
    "sleeping well", "the structure of a good essay", "earthquakes", "running a small bakery", "lighthouses",
    "how vaccines work", "writing thank-you letters", "desert animals", "adopting a dog", "the colour blue",
)  # fmt: skip
CODE = (
    "Write a Python function that {}.",
    "Show me how to {} in Python, with a short explanation.",
)
TASKS = (
    "reverses the words of a sentence", "counts how often each letter occurs in a text",
    "finds the largest of three numbers",
    "checks whether a number is prime", "removes duplicates from a list while keeping the order",
    "converts degrees Celsius to Fahrenheit", "reads a file and prints its longest line", "merges two sorted lists",
    "computes the factorial of a number", "tells whether a word is a palindrome",
)  # fmt: skip
SUMS = (
    "A shop sells pens for {a} cents and notebooks for {b} cents. What do {c} pens and {d} notebooks cost together?",
    "Mira reads {c} pages a day. Her book has {b} pages. How many days does she need, and how many pages on the last?",
    "A train leaves with {b} passengers. At each of {d} stops {c} people get off and {a} get on. How many are on then?",
    "Tom has {b} marbles, gives {c} to each of his {d} friends and finds {a} more. How many does he have now?",
)


def starter_prompts(seed: int = 0) -> list[dict]:
    """Every prompt as a ShareGPT row with a stable id, in a fixed shuffled order."""
    generator = random.Random(seed)
    texts = [request.format(subject) for request, subject in itertools.product(REQUESTS, SUBJECTS)]
    texts += [request.format(task) for request, task in itertools.product(CODE, TASKS)]
    for template in SUMS:
        for _ in range(12):
            a, b, c, d = (generator.randint(*bounds) for bounds in ((2, 30), (60, 240), (3, 20), (2, 6)))
            texts.append(template.format(a=a, b=b, c=c, d=d))
    generator.shuffle(texts)
    return [
        {"id": f"starter-{index}", "conversations": [{"from": "human", "value": text}]}
        for index, text in enumerate(texts)
    ]


def are_starter_prompts(path: Path) -> bool:
    """Whether a file was written by `write_starter_prompts`."""
    return path.is_file() and path.read_bytes().startswith(b'{"id": "starter-0"')


def write_starter_prompts(path: Path, num_prompts: int) -> None:
    """The first `num_prompts` of them as jsonl."""
    rows = starter_prompts()[:num_prompts]
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
