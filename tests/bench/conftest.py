"""A benchmark without a model: a byte tokenizer and a lookup-table model with scripted times."""

import dataclasses
import os
import random
from pathlib import Path

import pytest

from fledge.bench.run import Placement, run
from fledge.bench.settings import BenchSettings, ModelSettings, QuestionSettings, ReportSettings, WorkerSettings
from fledge.data.samples import Prompt
from fledge.decoding.records import Generation
from fledge.decoding.settings import SamplingSettings
from fledge.errors import UserError

EOS = 0
PLAIN_S, VERIFY_S, DRAFT_S, OTHER_S, PREFILL_S = 0.010, 0.012, 0.003, 0.001, 0.005
DEPTH = 3


@dataclasses.dataclass
class FakeEngine:
    """Token t is followed by TABLE[t]; the draft knows the table with a seeded probability per position."""

    slowdown: float = 1.0  # of the speculative side
    jitter: float = 0.05
    mode: str = "both"
    max_answer: int = 60
    die_on: str | None = None  # kill the process at this question, once per `marker`
    marker: str = ""
    always_die: bool = False
    disagree: bool = False  # the speculative side answers something else
    calls: list = dataclasses.field(default_factory=list)

    def load(self) -> "FakeEngine":
        if self.mode == "refuse":
            raise UserError("no such head")
        return self

    def prompt(self, messages):
        if self.die_on and any(self.die_on in message["content"] for message in messages):
            if self.always_die:
                os._exit(1)
            if not os.path.exists(self.marker):
                Path(self.marker).touch()
                os._exit(1)
        return Prompt(list("|".join(f"{message['role'][0]}:{message['content']}" for message in messages).encode()))

    def generate(self, side, prompt, *, max_new_tokens, seed, trace=False):
        prompt_ids = prompt.ids
        self.calls.append((side, tuple(prompt_ids), max_new_tokens, seed, trace))
        answers = random.Random(f"{sum(prompt_ids)}-{len(prompt_ids)}")
        wanted = answers.randint(self.max_answer // 2, self.max_answer)
        ids, last = [], prompt_ids[-1]
        while len(ids) < min(wanted, max_new_tokens):
            last = (last * 5 + 7) % 91 + 32
            ids.append(last)
        if len(ids) < max_new_tokens:
            ids.append(EOS)
        if self.disagree and side == "eagle":
            ids[len(ids) // 2] = 33
        reason = "stop" if ids[-1] == EOS else "length"
        clock = random.Random(f"{seed}-{side}-{len(self.calls)}")
        noise = 1 + self.jitter * clock.uniform(-1, 1)
        if side == "baseline" or self.mode == "aa":
            slow = self.slowdown if side == "eagle" else 1.0
            seconds = PLAIN_S * (len(ids) - 1) * noise * slow
            return Generation(
                ids, [], 0, reason, PREFILL_S, seconds, {"prefill": PREFILL_S, "verify": seconds}, len(ids) - 1
            )
        accepted, left = [], len(ids) - 1
        luck = random.Random(f"{seed}-luck")
        while left > 0:
            kept = 0
            while kept < DEPTH and luck.random() < 0.6:
                kept += 1
            accepted.append(min(kept, left - 1))
            left -= accepted[-1] + 1
        rounds = len(accepted)
        parts = {"verify": VERIFY_S, "draft": DRAFT_S, "accept": OTHER_S / 2, "other": OTHER_S / 2}
        phases = {name: cost * rounds * noise * self.slowdown for name, cost in parts.items()}
        return Generation(
            ids, accepted, DEPTH, reason, PREFILL_S, sum(phases.values()), {"prefill": PREFILL_S, **phases}, rounds,
            [] if trace else None,
        )  # fmt: skip

    def text(self, token_ids):
        return bytes(token for token in token_ids if token != EOS).decode(errors="replace")

    def top2(self, prompt, token_ids, chosen=()):
        return {"gap": 0.5, "behind": 0.5, "noise": 0.001}

    def mean_log_likelihood(self, prompt, token_ids):
        return -1.0 - 0.01 * (len(token_ids) % 7)

    def eos_token_ids(self):
        return (EOS,)

    def coloured_rounds(self, generation):
        kept = {"kept": ["<b>", " kept"], "refused": " refused & gone", "bonus": " bonus"}
        return [{**kept, "promised": [0.75, 0.25, 0.125]}, {**kept, "kept": [], "promised": [0.5]}]

    def peak_memory_bytes(self):
        return 1_000_000


@pytest.fixture
def make_args(tmp_path):
    """BenchSettings from flat keywords, writing to a temporary folder."""

    def make(**flags) -> BenchSettings:
        flags = {"target": "target", "draft": "head", "model_id": "fake", "temperature": 0.0,
                 "max_new_tokens": 100, "bench_name": ("quick",), "output_dir": tmp_path / "out", **flags}  # fmt: skip
        groups = {"model": ModelSettings, "prompts": QuestionSettings, "sampling": SamplingSettings,
                  "workers": WorkerSettings, "output": ReportSettings}  # fmt: skip
        made = {}
        for name, group in groups.items():
            own = {field.name for field in dataclasses.fields(group)}
            made[name] = group(**{key: flags.pop(key) for key in list(flags) if key in own})
        assert not flags, f"unknown flags {flags}"
        return BenchSettings(**made)

    return make


@pytest.fixture
def fake_run():
    """Run the benchmark with a fake engine; returns the folder."""

    def go(
        args: BenchSettings, engine: FakeEngine | None = None, *, num_workers: int = 1, settings: dict | None = None
    ):
        plain = {"mode": args.model.mode, "depth": args.model.depth, **dataclasses.asdict(args.sampling)}
        run(args, engine or FakeEngine(mode=args.model.mode), Placement(num_workers, 0), settings or plain)
        return args.output_dir

    return go


@pytest.fixture
def fake_engine():
    """The class itself: a fixture because test folders are no packages."""
    return FakeEngine
