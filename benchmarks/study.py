"""Which drafter, at equal data and at equal training time? Each as chain and as tree, several seeds, on one engine.

    fledge extract --target TARGET --data answers.jsonl --output-dir states --tap-layers 2 9 15 21 27 28 \\
        --model-max-length 1024 --last-storage supervised --dtype bfloat16
    python benchmarks/study.py --target TARGET --states states --out work --bench-dir bench --tokens 100000
    python benchmarks/study.py (the same) --seconds 600     equal training time in place of equal passes
    python benchmarks/study.py (the same) --costs           what rounds cost here, for the speeds; an idle machine
    python benchmarks/study.py (the same) --tables          tables and pictures of what is there so far

The store holds the union of all drafters' taps. Every drafter is trained by `fledge train` on the same records in the
same order for its seed. Tau is that of decoding the four sets (`replay.py`), each drafter's rounds counted in the same
answers of the target; the sets are never trained on. Prompt lookup, which learns nothing, is the floor. What is done is
not done again, so a study may grow: by seeds, sizes, drafters, questions of another --out.

Speeds are modelled: tau times the time of a plain step, over the time of a round, whose parts are measured here. Beside
them, what a machine would show whose passes cost what their bytes cost (large GPUs tend to it).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from replay import Answer, Round, columns, recorded, replay, tau
from study_tables import FLOOR, mean, picture, table

from fledge import provenance
from fledge.bench import charts
from fledge.bench.prompts import load_questions
from fledge.cli import run_command
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.costs import draft_times, verify_times
from fledge.drafters.base import Drafter
from fledge.drafters.dspark.config import usual_block_taps
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.storage.states.describe import read_text_config
from fledge.storage.states.reader import HiddenStore
from fledge.target.model import Target
from fledge.target.record import default_tap_layers

SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca")
BLOCK = ("--draft-layers", "2", "--num-anchors", "128")  # as many trained parameters as an EAGLE-3 head, Markov apart
DRAFTERS: dict[str, tuple[str, ...]] = {
    "eagle3": ("--draft-type", "eagle3"),
    "eagle3.1": ("--draft-type", "eagle3.1"),
    "eagle3.1 of two layers": ("--draft-type", "eagle3.1", "--draft-layers", "2"),
    "dflash": ("--draft-type", "dflash", "--block-size", "8", *BLOCK),
    "dspark": ("--draft-type", "dspark", "--block-size", "7", *BLOCK),
}
ALIKE = ("eagle3", "eagle3.1", "dflash", "dspark")  # in their number of parameters
BLOCK_DRAFTERS = ("dflash", "dspark")  # one pass a block
SHAPES = {
    "chain 3": TreeShape(4, 2, 1), "chain 5": TreeShape(6, 4, 1), "chain 7": TreeShape(8, 6, 1),
    "tree 8": TreeShape(8, 6, 4), "tree 16": TreeShape(16, 6, 6), "tree 32": TreeShape(32, 6, 8),
    "tree 60": TreeShape(60, 6, 10),
}  # fmt: skip
ENTROPIES = (0.0, 0.3, 1.0, 2.0, float("inf"))  # nats: from what the target is sure of to what it is not
PREFIX = 128  # tokens of the text behind which costs are measured


@dataclass(frozen=True)
class Run:
    """One head of the study."""

    drafter: str
    tokens: int  # supervised, of the data
    seed: int
    budget: str  # "2 passes" or "600 s"

    @property
    def name(self) -> str:
        return f"{self.drafter.replace(' ', '_')}-{self.tokens}-{self.budget.replace(' ', '')}-{self.seed}"


def main() -> None:
    args = parse_args()
    try:
        run_study(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def run_study(args: argparse.Namespace) -> None:
    """Whatever is not there yet, then the tables."""
    study = Study(args)
    if args.costs:
        study.measure_costs()
    elif not args.tables:
        for run in study.runs():
            study.train(run)
            for temperature in args.temperatures:
                study.judge(run.name, temperature)
        for temperature in args.temperatures:
            study.judge(FLOOR, temperature)
    args.out.joinpath("study.md").write_text(study.text(), encoding="utf-8")
    study.draw()
    provenance.write_json(args.out / "study.json", study.document())
    print(study.text())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="target folder")
    parser.add_argument("--states", type=Path, required=True, help="hidden states made by `fledge extract`")
    parser.add_argument("--out", type=Path, required=True, help="heads and results; started again, it goes on")
    parser.add_argument("--bench-dir", type=Path, help="folder of the four sets; default: FLEDGE_BENCH_DIR")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=list(ALIKE))
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000], help="supervised tokens to train on")
    parser.add_argument("--passes", type=int, default=2, help="over the data")
    parser.add_argument("--seconds", type=int, help="train for so long by this machine's clock instead of --passes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--tasks", nargs="+", default=list(SETS), help="named sets or question files")
    parser.add_argument("--questions", type=int, default=40, help="of each set")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--costs", action="store_true", help="only measure what rounds cost")
    parser.add_argument("--tables", action="store_true", help="only write tables and pictures of what is there")
    return parser.parse_args()


class Study:
    """What is trained and judged, with its results in files."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)
        self.store = HiddenStore(args.states)
        self._target: Target | None = None
        self._answers: dict[tuple[str, float], list[Answer]] = {}

    def runs(self) -> Iterator[Run]:
        """Seeds outside: a study that is stopped leaves whole comparisons."""
        budget = f"{self.args.seconds} s" if self.args.seconds else f"{self.args.passes} passes"
        for tokens in self.args.tokens:
            for seed in self.args.seeds:
                for drafter in self.args.drafters:
                    yield Run(drafter, tokens, seed, budget)

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, run: Run) -> None:
        """`fledge train`, unless its head is there."""
        folder = self.args.out / run.name
        if (folder / "model.safetensors").is_file():
            return
        words: list[Any] = [
            "--states", self.args.states, "--output-dir", folder, "--max_samples", self.samples(run.tokens), "--seed",
            run.seed, "--draft-vocab-size", self.args.draft_vocab_size, "--save-strategy", "no", "--logging_steps", 20,
            "--disable_tqdm", True, "--tap-layers", *self.taps(run.drafter), *DRAFTERS[run.drafter],
        ]  # fmt: skip
        if self.args.seconds:
            words += ["--max_steps", self.steps_in(run)]
        else:
            words += ["--num_train_epochs", self.args.passes]
        if run_command("train", [str(word) for word in words]):
            sys.exit(f"{run.name}: training failed, see above; the same command goes on")

    def taps(self, drafter: str) -> tuple[int, ...]:
        """The usual ones of its kind."""
        usual = usual_block_taps if drafter in BLOCK_DRAFTERS else default_tap_layers
        return tuple(usual(read_text_config(self.store.identity).num_hidden_layers))

    def samples(self, tokens: int) -> int:
        """How many of the first records hold so many supervised tokens."""
        total = 0
        for number, supervised in enumerate((one.supervised for one in self.store.planned.values()), start=1):
            total += supervised
            if total >= tokens:
                return number
        sys.exit(f"{self.args.states}: {total} supervised tokens, {tokens} are asked for")

    def steps_in(self, run: Run) -> int:
        """Steps in --seconds at the speed of the same drafter's run of equal passes, which comes first."""
        folder = self.args.out / Run(run.drafter, run.tokens, run.seed, f"{self.args.passes} passes").name
        if not (folder / "provenance.json").is_file():
            sys.exit(f"{folder}: not there; run the equal passes first: they tell how long a step takes")
        return max(1, round(self.args.seconds / self.seconds_of(folder)[1]))

    @staticmethod
    def seconds_of(folder: Path) -> tuple[float, float]:
        """Of a whole training run, and of one step."""
        run = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        return run["metrics"]["train_runtime"], run["metrics"]["train_runtime"] / run["steps"]

    # -- judging -------------------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        if self._target is None:
            self._target = Target.from_pretrained(
                self.args.target, dtype=getattr(torch, self.args.dtype), tap_layers=self.store.identity.tap_layers
            )
        return self._target

    def answers(self, task: str, temperature: float) -> list[Answer]:
        """The target's, made once."""
        if (task, temperature) not in self._answers:
            template = ChatTemplate(self.target.tokenizer, None, eos_token_ids=self.target.eos_token_ids)
            questions = load_questions(task, bench_dir=self.args.bench_dir, end=self.args.questions)
            prompts = [template.prompt_ids([{"role": "user", "content": one.turns[0]}]) for one in questions]
            name = f"answers-{Path(task).stem}-{self.args.questions}-{self.args.max_new_tokens}-T{temperature:g}.json"
            self._answers[task, temperature] = recorded(
                self.target, prompts, stops=template.stop_token_ids, most=self.args.max_new_tokens,
                temperature=temperature, kept=self.args.out / name,
            )  # fmt: skip
        return self._answers[task, temperature]

    def drafter(self, name: str) -> Drafter:
        return read_drafter(name if name == FLOOR else str(self.args.out / name)).bind(self.target)

    def judge(self, name: str, temperature: float) -> None:
        """Tau of every shape on every set, and where chains of 7 and trees of 60 are accepted."""
        kept = self.file_of(name, temperature)
        if kept.is_file():
            return
        drafter = self.drafter(name)
        shapes = {key: shape for key, shape in SHAPES.items() if name != FLOOR or shape.top_k == 1}
        found: dict[str, Any] = {}
        every: dict[str, list[tuple[Answer, list[Round]]]] = {shape: [] for shape in shapes}
        for task in self.args.tasks:
            answers = self.answers(task, temperature)
            seen = columns(answers, self.target.tap_layers, drafter.tap_layers)
            for shape, tree in shapes.items():
                rounds = replay(drafter, tree, seen)
                found.setdefault(Path(task).stem, {})[shape] = tau(rounds)
                every[shape] += zip(answers, rounds, strict=True)
        found["all"] = {shape: tau([rounds for _, rounds in pairs]) for shape, pairs in every.items()}
        about = {"by_position": by_position(every["chain 7"], 7), "by_entropy": by_entropy(every["chain 7"])}
        provenance.write_json(kept, {"tau": found, **about})

    def file_of(self, name: str, temperature: float) -> Path:
        return self.args.out / f"tau-{name}-T{temperature:g}.json"

    # -- what rounds cost ----------------------------------------------------------------------------------------------

    def measure_costs(self) -> None:
        """Seconds of a verification by nodes and of a drafting by levels and width, of one head of each drafter."""
        tokens = torch.randint(self.target.vocab_size, (PREFIX,), generator=torch.Generator().manual_seed(0)).tolist()
        sizes = sorted({1, *(shape.total_token for shape in SHAPES.values())})
        costs: dict[str, Any] = {
            "verify_s": {str(nodes): seconds for nodes, seconds in verify_times(self.target, tokens, sizes).items()}
        }
        weights = bytes_of(self.target.model)
        for run in {run.drafter: run for run in self.runs()}.values():
            drafter: Any = self.drafter(run.name)
            own = Target(self.target.model, self.target.tokenizer, tap_layers=drafter.tap_layers)
            costs[run.drafter] = {
                "draft_s": {
                    shape: draft_times(own, drafter, tokens, tree.top_k)[tree.levels] for shape, tree in SHAPES.items()
                },
                "passes": {
                    shape: 1 if run.drafter in BLOCK_DRAFTERS else tree.levels for shape, tree in SHAPES.items()
                },
                "bytes_share": bytes_of(drafter) / weights,
            }  # fmt: skip
        provenance.write(self.args.out / "costs.json", {}, command="python benchmarks/study.py --costs", costs=costs)

    # -- what was found ------------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Everything, for a program."""
        results = {
            f"{name} T{temperature:g}": json.loads(file.read_text(encoding="utf-8"))
            for name in (*(run.name for run in self.runs()), FLOOR)
            for temperature in self.args.temperatures
            if (file := self.file_of(name, temperature)).is_file()
        }
        return {
            "results": results, "shapes": {name: str(shape) for name, shape in SHAPES.items()},
            "drafters": DRAFTERS, "tokens": self.args.tokens, "seeds": self.args.seeds,
            "questions": self.args.questions, "max_new_tokens": self.args.max_new_tokens,
            "hardware": provenance.hardware(), "versions": provenance.versions(), "commit": provenance.commit(),
        }  # fmt: skip

    def text(self) -> str:
        """Tables: tau by shape, by set, by position and by entropy; speeds where costs are known."""
        lines = []
        for temperature in self.args.temperatures:
            for tokens in self.args.tokens:
                lines += [*self._tables(tokens, temperature), ""]
        return "\n".join(lines)

    def draw(self) -> None:
        """Two pictures of the first size and temperature: tau by shape, and what is accepted where."""
        temperature = self.args.temperatures[0]
        groups = self._groups(self.args.tokens[0], temperature)
        pictures = {
            "tau": (SHAPES, "tau by the shape of the draft", lambda found, shape: found["tau"]["all"].get(shape)),
            "positions": (range(1, 5), "accepted at a position if those before it were, chain of 7",
                          lambda found, at: found["by_position"][at - 1]),
        }  # fmt: skip
        for name, (keys, title, value) in pictures.items():
            series = [
                charts.Line(drafter, [mean([value(one, key) for one in found]) for key in keys])
                for drafter, found in groups.items()
            ]
            if series:
                title += f", T = {temperature:g}"
                text = picture(series, [str(key) for key in keys], title, percent=name == "positions")
                (self.args.out / f"{name}.svg").write_text(text, encoding="utf-8")

    def _groups(self, tokens: int, temperature: float) -> dict[str, list[dict[str, Any]]]:
        """Drafter -> what was found of its seeds."""
        groups: dict[str, list[dict[str, Any]]] = {}
        names = [(run.drafter, run.name) for run in self.runs() if run.tokens == tokens]
        for drafter, name in (*names, (FLOOR, FLOOR)):
            if (file := self.file_of(name, temperature)).is_file():
                groups.setdefault(drafter, []).append(json.loads(file.read_text(encoding="utf-8")))
        return groups

    def _tables(self, tokens: int, temperature: float) -> Iterator[str]:
        groups = self._groups(tokens, temperature)
        if not groups:
            return
        yield f"## {tokens:,} tokens, {next(self.runs()).budget}, T = {temperature:g}\n"
        yield from table("tau", SHAPES, groups, lambda found, shape: found["tau"]["all"].get(shape))
        sets = [Path(task).stem for task in self.args.tasks]
        yield from table("tree 16", sets, groups, lambda found, task: found["tau"][task].get("tree 16"))
        yield from table("chain 7: accepted at", range(1, 8), groups, lambda found, at: found["by_position"][at - 1])
        bands = [f"{low:g} to {high:g}" for low, high in zip(ENTROPIES, ENTROPIES[1:], strict=False)]
        yield from table("first draft accepted, by the target's entropy (nats)", bands, groups,
                         lambda found, band: found["by_entropy"][bands.index(band)])  # fmt: skip
        if (file := self.args.out / "costs.json").is_file():
            costs = json.loads(file.read_text(encoding="utf-8"))["costs"]
            trained = {name: rows for name, rows in groups.items() if name in costs}
            for title, speed in (("modelled: times plain on this CPU", on_this_machine), ("by bytes alone", by_bytes)):
                rows = {name: [speed(found, costs, name) for found in rows] for name, rows in trained.items()}
                yield from table(title, SHAPES, rows, lambda found, shape: found[shape])


def on_this_machine(found: dict[str, Any], costs: dict[str, Any], drafter: str) -> dict[str, float]:
    """Times plain decoding, by shape: what a round brings over what it costs."""
    plain = costs["verify_s"]["1"]
    return {
        shape: found["tau"]["all"][shape] * plain
        / (costs["verify_s"][str(tree.total_token)] + costs[drafter]["draft_s"][shape])
        for shape, tree in SHAPES.items()
    }  # fmt: skip


def by_bytes(found: dict[str, Any], costs: dict[str, Any], drafter: str) -> dict[str, float]:
    """The same where a pass costs the bytes of its weights, whatever its rows."""
    share = costs[drafter]["bytes_share"]
    return {shape: found["tau"]["all"][shape] / (1 + costs[drafter]["passes"][shape] * share) for shape in SHAPES}


def by_position(pairs: Sequence[tuple[Answer, list[Round]]], length: int) -> list[float | None]:
    """Of the rounds with room for it whose earlier drafts were accepted, the share whose next one was, too."""
    rounds = [one for _, answer in pairs for one in answer if one.room > length]
    shares = []
    for position in range(length):
        reached = [one.accepted > position for one in rounds if one.accepted >= position]
        shares.append(sum(reached) / len(reached) if reached else None)
    return shares


def by_entropy(pairs: Sequence[tuple[Answer, list[Round]]]) -> list[float | None]:
    """Share of first drafts that were accepted, by how sure the target was of its token."""
    seen = [(float(answer.entropies[one.place]), one.accepted > 0) for answer, rounds in pairs for one in rounds]
    shares = []
    for low, high in zip(ENTROPIES, ENTROPIES[1:], strict=False):
        inside = [accepted for entropy, accepted in seen if low <= entropy < high]
        shares.append(sum(inside) / len(inside) if inside else None)
    return shares


def bytes_of(model: torch.nn.Module) -> int:
    """Of the weights that a pass reads: embeddings are looked up, tied ones count once as the head."""
    looked_up = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    heads = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Linear)}
    known = {id(one): one for one in model.parameters() if id(one) not in looked_up - heads}
    return sum(one.numel() * one.element_size() for one in known.values())


if __name__ == "__main__":
    main()
