"""A real vLLM server and our own decoding side by side: texts, and acceptance by position from /metrics.

Everything runs in fp32 and at temperature 0, so the two sides should agree draft by draft; what remains is the last
bits of two kernels. The server is `fledge serve --draft HEAD`, as a user would start it.

One convention differs and is evened out here: vLLM counts every accepted draft token, our records stop at the length
limit. `chain` therefore decodes past the limit and keeps the rounds that begin before it.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch

from fledge.bench.client import acceptance_of, metrics_between, parse_metrics
from fledge.bench.prompts import load_questions
from fledge.cli import run_command
from fledge.data.starter_prompts import write_starter_prompts
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape
from fledge.target.model import Target

PORT = 8191
NUM_PROMPTS, NEW_TOKENS = 12, 48
NEAR_TIE = 1e-3  # logits closer than this are a matter of kernels
UNROLLED = ("--ttt_steps", "3", "--num_train_epochs", "4")


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many rounds kept at least so many draft tokens; reached[0] counts the rounds."""

    reached: list[int]

    def at(self, position: int) -> float:
        return self.reached[position + 1] / self.reached[0]


class Reference:
    """Our side: the target in fp32, its greedy answers, and chains of any head."""

    def __init__(self, target_dir: Path, tap_layers: tuple[int, ...] | None = None) -> None:
        self.dir = target_dir
        self.target = Target.from_pretrained(str(target_dir), dtype=torch.float32, device="cpu", tap_layers=tap_layers)
        template = ChatTemplate(self.target.tokenizer, eos_token_ids=self.target.eos_token_ids)
        questions = load_questions("quick", end=NUM_PROMPTS)
        self.prompts = [template.prompt_ids([{"role": "user", "content": q.turns[0]}]) for q in questions]
        self.answers = [self.plain(prompt) for prompt in self.prompts]

    def plain(self, prompt: list[int]) -> list[int]:
        return generate(self.target, None, prompt, max_new_tokens=NEW_TOKENS, sampling=Sampling(), eos_token_ids=()
        ).token_ids  # fmt: skip

    def chain(self, head: Path, length: int) -> Counts:
        """Rounds of a chain of `length` drafts that begin within the limit."""
        return chain(self.target, self.prompts, head, length)

    @torch.inference_mode()
    def gap(self, prompt: list[int], answer: list[int], other: list[int]) -> float:
        """How far apart the two tokens were, in logits, where two answers part."""
        place = next(i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b)
        ids = torch.tensor([prompt + answer[:place]])
        logits = self.target.head(self.target.forward(ids, taps=False).last_hidden[0, -1])
        return abs(float(logits[answer[place]] - logits[other[place]]))


def chain(target: Target, prompts: list[list[int]], head: Path, length: int) -> Counts:
    files = read_drafter(str(head))
    assert files.tap_layers == target.tap_layers
    draft = files.bind(target)
    tree = TreeShape(total_token=length + 1, depth=length - 1, top_k=1)
    reached = [0] * (length + 1)
    for prompt in prompts:
        found = generate(
            target, draft, prompt, tree=tree, max_new_tokens=NEW_TOKENS + length + 1, sampling=Sampling(),
            eos_token_ids=(),
        )  # fmt: skip
        emitted = 1  # the prefill's token
        for accepted in found.accepted:
            if emitted < NEW_TOKENS:
                for count in range(accepted + 1):
                    reached[count] += 1
            emitted += accepted + 1
    return Counts(reached)


@contextlib.contextmanager
def serving(program: str, target: Path, folder: Path, *flags: str) -> Iterator[str]:
    """`fledge serve` as a program of its own, answering within the block, stopped after it."""
    command = [
        sys.executable, "-m", "fledge", "serve", "--model-name-or-path", str(target), "--vllm", program,
        "--base-port", str(PORT), "--num-servers", "1", "--max-model-len", "512", "--log-dir", str(folder),
        *flags, "--", "--dtype", "float32", "--enforce-eager",
        "--no-enable-prefix-caching", "--served-model-name", "target",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / "fledge.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=folder)
    try:
        while "Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{PORT}"
    finally:
        process.terminate()  # as Ctrl-C does; a background job may be deaf to the latter
        status = process.wait(120)
    assert status == 0, log.read_text()[-3000:]


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {"model": "target", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["token_ids"]


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        return parse_metrics(response.read().decode())


def deviation(ours: Counts, theirs: Counts, position: int) -> float:
    """The difference of two shares in standard errors of one sample of this size."""
    p, n = ours.at(position), ours.reached[0]
    share = (ours.reached[position + 1] + theirs.reached[position + 1] + 1) / (n + theirs.reached[0] + 2)
    return abs(theirs.at(position) - p) / math.sqrt(share * (1 - share) / n)


def served(
    program: str, draft: Path, length: int, reference: Reference, folder: Path
) -> tuple[list[list[int]], Counts]:
    """vLLM's answers with this draft, and what its counters say of the rounds."""
    flags = ("--draft", str(draft), "--num-speculative-tokens", str(length))
    with serving(program, reference.dir, folder, *flags) as url:
        before = scrape(url)
        answers = [complete(url, prompt) for prompt in reference.prompts]
        measured = acceptance_of(metrics_between(before, scrape(url)))
    assert measured is not None, "the server drafted nothing"
    rounds = measured["rounds"]
    return answers, Counts([rounds, *(round(share * rounds) for share in measured["by_position"])])


def same_rounds(mine: Counts, theirs: Counts, title: str, *, least: float = 0.1) -> None:
    """The comparison, printed; an AssertionError where the rounds are not alike, or fewer than `least` kept a draft."""
    print(f"\n{title}; {NUM_PROMPTS} prompts x {NEW_TOKENS} tokens, T = 0, fp32")
    print(f"  rounds       ours {mine.reached[0]:5d}   vLLM {theirs.reached[0]:5d}")
    assert len(theirs.reached) == len(mine.reached)
    for position in range(len(mine.reached) - 1):
        print(
            f"  position {position + 1}   ours {mine.at(position):.4f}  vLLM {theirs.at(position):.4f}"
            f"   {deviation(mine, theirs, position):.2f} standard errors"
        )
    assert mine.at(0) > least, "a head this weak would compare nothing"
    assert abs(theirs.reached[0] - mine.reached[0]) <= 0.03 * mine.reached[0]
    assert all(deviation(mine, theirs, position) < 2 for position in range(len(mine.reached) - 1))


def answers_of(cache: Path, target: str) -> Path:
    """The target's greedy answers to some prompts, kept here."""
    prompts, answers = cache / "prompts.jsonl", cache / "answers"
    if not prompts.is_file():
        write_starter_prompts(prompts, 64)
    run(
        "regenerate", "--data-name-or-path", str(prompts), "--output-dir", str(answers), "--engine", "transformers",
        "--model", target, "--max-tokens", "64", "--temperature", "0.0", "--dtype", "float32",
    )  # fmt: skip
    return answers


def run(*words: str) -> None:
    """A fledge command in this process."""
    assert run_command(words[0], words[1:]) == 0, f"fledge {' '.join(words)} failed"
