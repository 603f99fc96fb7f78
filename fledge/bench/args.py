"""The flags of `fledge bench` and `tools/spec_benchmark.py`: the documented ones under their documented names.

Knows what can be said about flags without loading a model: which sides a mode measures, what contradicts what.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fledge.bench.sandbox import Isolation, refuse_without_sandbox
from fledge.config import Overwrite
from fledge.data.image_urls import AllowImageUrls
from fledge.data.sampling import ExtraSampling
from fledge.decoding.law import FromConfig, law_of
from fledge.decoding.records import Sampling
from fledge.errors import UserError
from fledge.http_client import base_url
from fledge.ranges import Count, Natural, NotNegative, Positive, PositiveShare, Seed, Share, TreeNodes, check_ranges

Mode = Literal["both", "eagle", "baseline", "aa"]
SIDES: dict[str, tuple[str, ...]] = {
    "both": ("baseline", "eagle"),
    "eagle": ("eagle",),
    "baseline": ("baseline",),
    "aa": ("baseline", "eagle"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """What is measured."""

    base_model_path: Annotated[str, tyro.conf.arg(aliases=["--target"])]
    """Target model: a folder or a hub name."""
    eagle_model_path: Annotated[str | None, tyro.conf.arg(aliases=["--draft"])] = None
    """Draft head: the folder that training wrote, or `lookup` for prompt lookup. Not needed with --mode baseline or
    aa."""
    model_id: str | None = None
    """A name for this run in files and reports. None: the last part of the head's (or target's) path."""
    mode: Mode = "both"
    """both: plain and speculative decoding, interleaved. aa: plain against plain, which shows this machine's noise."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the weights; auto takes the checkpoint's own."""
    chat_template_type: str | None = None
    """A named chat template that overrides the tokenizer's own. None: the tokenizer's own."""
    thinking: Literal["default", "on", "off"] = "default"
    """Thinking mode of the chat template, for models that have one."""
    max_pixels: Count | None = None
    """Vision-language targets: area to which larger pictures are reduced. None: the processor's own."""
    min_pixels: Count | None = None
    """Vision-language targets: area to which smaller pictures are enlarged. None: the processor's own."""
    allow_image_urls: AllowImageUrls = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptArgs:
    """What is asked."""

    bench_name: tuple[str, ...] = ("mt_bench",)
    """One or several of mt_bench, humaneval, gsm8k, alpaca, qa, sum, math500, quick, or a path to a jsonl file; for
    vision-language targets also textvqa, mmmu, mmstar."""
    bench_dir: Path | None = None
    """Folder with <name>/question.jsonl. None: the variable FLEDGE_BENCH_DIR, else the hub."""
    question_begin: Natural | None = None
    """First question of every set, counted from 0."""
    question_end: Natural | None = None
    """Question to stop before."""
    repeats: Count = 1
    """How often every question is measured; the median over repeats is reported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingArgs:
    """How answers are generated: the same for both sides; the tree is the speculative side's."""

    temperature: NotNegative = 1.0
    """0 takes the most likely token, 1 samples from the target's own distribution."""
    top_p: PositiveShare = 1.0
    """Sample only from the most likely tokens that hold this share of the probability."""
    sample_top_k: Natural | None = None
    """Sample only from this many most likely tokens; 0 for all. (--top-k is the draft tree's.) None, here and below:
    what the target's generation_config asks for."""
    min_p: Share | None = None
    """Least probability of a sampled token, relative to the likeliest."""
    repetition_penalty: Positive | None = None
    """Divisor of the logits of tokens that prompt or answer hold already; at temperature 0 as well."""
    generation_config: FromConfig = "apply"
    """ignore: the flags alone decide. Servers apply it by themselves."""
    max_new_token: Annotated[Count, tyro.conf.arg(aliases=["--max-new-tokens"])] = 1024
    """Longest answer per turn, in tokens."""
    total_token: TreeNodes | Literal["auto"] = 60
    """Tree nodes the target checks per round, root included. auto: the profile that --tune wrote."""
    depth: Natural = 5
    """Draft rounds after the first level of the tree."""
    top_k: Count = 10
    """Children per tree node and beam width; 1 drafts a chain."""
    adaptive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draft only as deep and as wide as it pays, or not at all; the tree flags are then the most that is drafted. Costs
    come from the profile that --tune wrote."""
    shapes: Literal["auto", "exact", "fixed"] = "auto"
    """fixed: rounds of fixed shapes, captured into CUDA graphs on a GPU. exact: shapes as they come, every kind of
    target. auto: fixed on a GPU wherever it can be. Both sides are decoded in the same ones."""
    seed: Seed = 42
    """Seed of the sampled answers and of the bootstrap."""

    @property
    def extra(self) -> ExtraSampling:
        """The flags beyond temperature and top_p."""
        return ExtraSampling(self.repetition_penalty, self.sample_top_k, self.min_p)

    def law(self, target: str) -> Sampling:
        """How both sides sample."""
        return law_of(
            target, temperature=self.temperature, top_p=self.top_p, flags=self.extra, seed=self.seed,
            from_config=self.generation_config,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerArgs:
    """Where it runs."""

    num_gpus_per_model: Count = 1
    """GPUs one copy of the model is spread over."""
    num_gpus_total: Natural = 1
    """GPUs used in all; more than one group starts one worker per group (needs Ray). 0: CPU."""
    num_workers: Count = 1
    """Workers on CPU (with --num-gpus-total 0); several need Ray, and slow each other down on few cores."""
    max_gpu_memory: str | None = None
    """Memory the target may take on each GPU, such as 40GiB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """What is written."""

    output_dir: Path | None = None
    """Folder of results.jsonl, summary.json, report.md and report.html. None: outputs/bench/<model id>."""
    overwrite: Overwrite = False
    no_metrics: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only generate and write results.jsonl: no quality checks, no summary, no report."""
    samples: Natural = 2
    """Answers per set shown in the report with kept and refused draft tokens coloured (generated apart, untimed)."""
    run_code: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the code the model wrote for humaneval against its unit tests (pass@1), in a sandbox: bubblewrap."""
    run_code_unsandboxed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same without a sandbox: the model's code may read, write and send whatever you may."""

    @property
    def code_isolation(self) -> Isolation | None:
        """How a model's code is run; None: not at all."""
        if self.run_code_unsandboxed:
            return "none"
        return "bwrap" if self.run_code else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneArgs:
    """Finding the best tree for this machine and head."""

    tune: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure costs and acceptance, choose the tree with most expected tokens per second, write the profile, stop."""
    profile_path: Path | None = None
    """Profile that --tune writes and --total-token auto reads. None: tree_profile.json beside the head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Measuring OpenAI-compatible servers (vLLM, SGLang) instead of decoding in this process."""

    backend: Literal["local", "server"] = "local"
    """local: decode in this process. server: send the prompts to servers with and without the head."""
    baseline_url: str | None = None
    """Server without the head, such as http://localhost:8000. None: one is started through `fledge serve`."""
    eagle_url: str | None = None
    """Server with the head. None: one is started through `fledge serve`."""
    api_key_env: str | None = None
    """Environment variable that holds the servers' API key."""
    concurrency: tuple[Count, ...] = (1,)
    """Requests in flight; several numbers make a sweep."""
    num_speculative_tokens: Count = 3
    """Chain length of a server started here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Plain against speculative decoding on the same prompts."""

    model: ModelArgs
    prompts: PromptArgs = PromptArgs()
    decoding: DecodingArgs = DecodingArgs()
    workers: WorkerArgs = WorkerArgs()
    output: OutputArgs = OutputArgs()
    tuning: TuneArgs = TuneArgs()
    server: ServerArgs = ServerArgs()

    @property
    def model_id(self) -> str:
        """The run's name: given, or the last part of the head's or target's path."""
        path = self.model.eagle_model_path or self.model.base_model_path
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
        if self.needs_head and not self.model.eagle_model_path and not self.server.eagle_url:
            raise UserError(
                f"--mode {self.model.mode} measures a draft head but --eagle-model-path is not given. Give the head's "
                f"folder, or measure the target alone with --mode baseline."
            )
        if self.decoding.adaptive and (self.model.mode not in ("both", "eagle") or self.tuning.tune):
            flag = "--tune" if self.tuning.tune else f"--mode {self.model.mode}"
            raise UserError(f"--adaptive adapts the trees of speculative decoding; {flag} has none to adapt. Drop one.")
        if self.server.backend == "server" and (self.decoding.adaptive or self.decoding.shapes != "auto"):
            flag = "--adaptive" if self.decoding.adaptive else "--shapes"
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
