"""Pictures our own code draws, with a caption that says what is in them: coloured shapes in cells, and a digit.

    picture     a grid of 4 x 4 cells, two groups of equal shapes in different colours, one digit; noise behind them
    caption     the picture shows three red circles and one blue square , and the digit is seven .

Every word of the caption that is not fixed can be read off the picture and off nothing else, so a model whose captions
are right looks at its pictures. Groups are told in the order of COLOURS: one picture, one caption. A smaller TASK has
fewer cells, colours and digits, for a test.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CELL = 16
COLOURS = {
    "red": (220, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 220), "yellow": (235, 200, 20),
    "purple": (140, 40, 170), "orange": (240, 120, 10),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "what does the picture show ?"
PROBED = "First question first answer Second question second answer"  # what fledge tries a chat template on
WORDS = sorted(
    {*QUESTION.split(), *"the picture shows and , digit is .".split(), *COLOURS, *COUNTS, *DIGITS,
     *SHAPES, *(f"{shape}s" for shape in SHAPES), "user", "assistant", *PROBED.split()}
)  # fmt: skip
BITMAPS = (
    "111 101 101 101 111", "010 110 010 010 111", "111 001 111 100 111", "111 001 111 001 111", "101 101 111 001 001",
    "111 100 111 001 111", "111 100 111 101 111", "111 001 010 010 010", "111 101 111 101 111", "111 101 111 001 111",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """How much there is to see."""

    grid: int = 4
    colours: int = len(COLOURS)
    digits: int = len(DIGITS)

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return CELL * self.grid


def draw(seed: int, task: Task) -> tuple[Image.Image, str]:
    """A picture and its caption; the same seed, the same picture."""
    chance = random.Random(seed)
    background = np.random.default_rng(seed).integers(215, 256, (task.size, task.size, 3), dtype=np.uint8)
    image = Image.fromarray(background)
    pen = ImageDraw.Draw(image)
    cells = [(cell % task.grid * CELL, cell // task.grid * CELL) for cell in chance.sample(range(task.grid**2), 7)]
    groups = []
    for colour in sorted(chance.sample(list(COLOURS)[: task.colours], 2), key=list(COLOURS).index):
        count, shape = chance.randint(1, 3), chance.choice(SHAPES)
        for _ in range(count):
            x, y = cells.pop()
            _shape(pen, shape, COLOURS[colour], x + chance.randint(1, 3), y + chance.randint(1, 3))
        groups.append(f"{COUNTS[count - 1]} {colour} {shape}{'s' if count > 1 else ''}")
    digit = chance.randrange(task.digits)
    x, y = cells.pop()
    _digit(pen, digit, x + 3, y + 3)  # not jittered: digits are the slowest to learn
    return image, f"the picture shows {groups[0]} and {groups[1]} , and the digit is {DIGITS[digit]} ."


def noise(seed: int, task: Task) -> Image.Image:
    """A picture of nothing."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (task.size, task.size, 3), dtype=np.uint8))


def write_rows(folder: Path, name: str, seeds: range, task: Task, *, with_answers: bool) -> Path:
    """Pictures as PNG files, and rows that show them: conversations to train on, or questions to ask."""
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        image, caption = draw(seed, task)
        image.save(pictures / f"{seed}.png")
        content = [{"type": "image", "image": f"{name}/{seed}.png"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": caption}]
        question = {"question_id": seed, "category": name, "turns": [content], "reference": [caption]}
        rows.append({"id": f"{name}-{seed}", "messages": messages} if with_answers else question)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _shape(pen: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], x: int, y: int) -> None:
    box = (x, y, x + 11, y + 11)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x + 5, y), (x, y + 11), (x + 11, y + 11)], fill=colour)


def _digit(pen: ImageDraw.ImageDraw, digit: int, x: int, y: int) -> None:
    """Three by five dots of two pixels each."""
    for row, dots in enumerate(BITMAPS[digit].split()):
        for column, dot in enumerate(dots):
            if dot == "1":
                left, top = x + 3 * column, y + 2 * row
                pen.rectangle((left, top, left + 2, top + 1), fill=(0, 0, 0))
