"""What `fledge bench` measures, and how.

Knows what can be said about the settings without loading a model: which sides a mode measures, what contradicts what.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fledge.bench.sandbox import Isolation, refuse_without_sandbox
from fledge.data.settings import PromptSettings
from fledge.decoding.settings import DraftingSettings, SamplingSettings
from fledge.errors import UserError
from fledge.http_client import base_url
from fledge.outputs import OverwriteSettings
from fledge.ranges import Count, Natural, check_ranges
from fledge.servers.settings import ApiKeySettings, SpeculationSettings
from fledge.target.settings import DtypeSettings, TargetSettings

Mode = Literal["both", "eagle", "baseline", "aa"]
SIDES: dict[str, tuple[str, ...]] = {
    "both": ("baseline", "eagle"),
    "eagle": ("eagle",),
    "baseline": ("baseline",),
    "aa": ("baseline", "eagle"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(TargetSettings, DtypeSettings, DraftingSettings, PromptSettings):
    """What is measured: a target, plainly and with a draft head."""

    model_id: str | None = None
    """A name for this run in files and reports. None: the last part of the head's (or target's) path."""
    mode: Mode = "both"
    """both: plain and speculative decoding, interleaved. aa: plain against plain, which shows this machine's noise."""


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """What is asked."""

    bench_name: tuple[str, ...] = ("mt_bench",)
    """One or several of mt_bench, humaneval, gsm8k, alpaca, qa, sum, math500, spec_bench, speed_bench (also _1k, _2k,
    _8k, _16k, _32k), quick, or a path to data in any format that training reads; for vision-language targets also
    textvqa, mmmu, mmstar."""
    bench_dir: Path | None = None
    """Folder with <name>/question.jsonl. None: the variable FLEDGE_BENCH_DIR, else the hub."""
    question_begin: Natural | None = None
    """First question of every set, counted from 0."""
    question_end: Natural | None = None
    """Question to stop before."""
    repeats: Count = 1
    """How often every question is measured; the median over repeats is reported."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Where it runs."""

    num_gpus_per_model: Count = 1
    """GPUs one copy of the model is spread over."""
    num_gpus_total: Natural = 1
    """GPUs used in all; more than one group starts one worker per group (needs Ray). 0: CPU."""
    num_workers: Count = 1
    """Workers on CPU (with --num-gpus-total 0); several need Ray, and slow each other down on few cores."""
    max_gpu_memory: str | None = None
    """Memory the target may take on each GPU, such as 40GiB."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings(OverwriteSettings):
    """What is written."""

    output_dir: Path | None = None
    """Folder of results.jsonl, summary.json, report.md and report.html. None: outputs/bench/<model id>."""
    no_metrics: bool = False
    """Only generate and write results.jsonl: no quality checks, no summary, no report."""
    samples: Natural = 2
    """Answers per set shown in the report with kept and refused draft tokens coloured (generated apart, untimed)."""
    run_code: bool = False
    """Run the code the model wrote for humaneval against its unit tests (pass@1), in a sandbox: bubblewrap."""
    run_code_unsandboxed: bool = False
    """The same without a sandbox: the model's code may read, write and send whatever you may."""

    @property
    def code_isolation(self) -> Isolation | None:
        """How a model's code is run; None: not at all."""
        if self.run_code_unsandboxed:
            return "none"
        return "bwrap" if self.run_code else None


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Finding the best tree for this machine and head."""

    tune: bool = False
    """Measure costs and acceptance, choose the tree with most expected tokens per second, write the profile, stop."""
    profile_path: Path | None = None
    """Profile that --tune writes and --total-token auto reads. None: tree_profile.json beside the head."""


@dataclass(frozen=True, kw_only=True)
class ServedSettings(ApiKeySettings, SpeculationSettings):
    """Measuring OpenAI-compatible servers (vLLM, SGLang) instead of decoding in this process."""

    backend: Literal["local", "server"] = "local"
    """local: decode in this process. server: send the prompts to servers with and without the head."""
    baseline_url: str | None = None
    """Server without the head, such as http://localhost:8000. None: one is started through `fledge serve`."""
    eagle_url: str | None = None
    """Server with the head. None: one is started through `fledge serve`."""
    concurrency: tuple[Count, ...] = (1,)
    """Requests in flight; several numbers make a sweep."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Plain against speculative decoding on the same prompts."""

    model: ModelSettings
    prompts: QuestionSettings = QuestionSettings()
    sampling: SamplingSettings = SamplingSettings()
    workers: WorkerSettings = WorkerSettings()
    output: ReportSettings = ReportSettings()
    tuning: TuneSettings = TuneSettings()
    server: ServedSettings = ServedSettings()

    @property
    def model_id(self) -> str:
        """The run's name: given, or the last part of the head's or target's path."""
        path = self.model.draft or self.model.target
        return self.model.model_id or Path(path).resolve().name

    @property
    def output_dir(self) -> Path:
        """Where everything of this run is written."""
        return self.output.output_dir or Path("outputs/bench") / self.model_id.replace("/", "_")

    @property
    def needs_head(self) -> bool:
        """Whether a draft head has to be loaded."""
        return self.model.mode in ("both", "eagle") or self.tuning.tune

    def check(self) -> None:
        """Refuse flags that contradict each other, before anything is loaded."""
        check_ranges(self)
        if self.needs_head and not self.model.draft and not self.server.eagle_url:
            raise UserError(
                f"--mode {self.model.mode} measures a draft head but --draft is not given. Give the head's "
                f"folder, or measure the target alone with --mode baseline."
            )
        if self.model.adaptive and (self.model.mode not in ("both", "eagle") or self.tuning.tune):
            flag = "--tune" if self.tuning.tune else f"--mode {self.model.mode}"
            raise UserError(f"--adaptive adapts the trees of speculative decoding; {flag} has none to adapt. Drop one.")
        in_process = {
            "--adaptive": self.model.adaptive, "--shapes": self.model.shapes != "auto", "--exact": self.model.exact
        }  # fmt: skip
        if self.server.backend == "server" and any(in_process.values()):
            flag = next(name for name, asked in in_process.items() if asked)
            raise UserError(f"{flag} is about decoding in this process; a server decodes its own way. Drop {flag}.")
        if not self.server.concurrency:
            raise UserError("--concurrency was given without a number; it needs at least one.")
        for url in (self.server.baseline_url, self.server.eagle_url):
            if url is not None:
                base_url(url)
        self._check_run_code()
        total, group = self.workers.num_gpus_total, self.workers.num_gpus_per_model
        if total and total % group:
            raise UserError(
                f"--num-gpus-total {total} is not a multiple of --num-gpus-per-model {group}: "
                f"{total % group} GPU(s) would stay idle. Use {total - total % group or group}."
            )
        if total == 0 and self.workers.max_gpu_memory:
            raise UserError("--max-gpu-memory limits GPUs, but --num-gpus-total 0 uses none. Leave one of them out.")
        if total > 0 and self.workers.num_workers > 1:
            raise UserError(
                f"--num-workers {self.workers.num_workers} is for CPU: add --num-gpus-total 0. On GPUs the number of "
                f"workers is --num-gpus-total / --num-gpus-per-model."
            )

    def _check_run_code(self) -> None:
        """Code is run only where it was asked for, in the way it was asked for."""
        flag = "--run-code-unsandboxed" if self.output.run_code_unsandboxed else "--run-code"
        if self.output.run_code and self.output.run_code_unsandboxed:
            raise UserError("--run-code and --run-code-unsandboxed exclude each other. Give one of them.")
        if self.output.code_isolation and self.server.backend == "server":
            raise UserError(f"{flag} scores answers that are decoded in this process; a server's are not. Drop {flag}.")
        if self.output.code_isolation == "bwrap":
            refuse_without_sandbox()
