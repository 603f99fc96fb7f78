"""Settings of decoding: how tokens are chosen, what is drafted."""

from dataclasses import dataclass
from typing import Literal

from fledge.data.sampling import ExtraSampling
from fledge.decoding.law import FromConfig, law_of
from fledge.decoding.records import Sampling
from fledge.ranges import Count, Natural, NotNegative, Positive, PositiveShare, Seed, Share, TreeNodes


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are chosen: the same law with a draft head and without."""

    max_new_tokens: Count = 1024
    """Longest answer (of each turn), in tokens."""
    temperature: NotNegative = 0.0
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
    stop: tuple[str, ...] | None = None
    """Strings that end an answer, wherever tokens begin and end; its text ends before them."""
    generation_config: FromConfig = "apply"
    """ignore: the flags alone decide. Servers apply it by themselves."""
    seed: Seed = 42
    """Seed of the draws."""

    @property
    def extra(self) -> ExtraSampling:
        """The flags beyond temperature and top_p."""
        return ExtraSampling(self.repetition_penalty, self.sample_top_k, self.min_p, self.stop)

    def law(self, target: str) -> Sampling:
        """How tokens of this target are chosen."""
        return law_of(
            target, temperature=self.temperature, top_p=self.top_p, flags=self.extra, seed=self.seed,
            from_config=self.generation_config,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DraftingSettings:
    """What is drafted, and in which shapes it is computed."""

    draft: str | None = None
    """Draft head: the folder that training wrote, or `lookup` for prompt lookup."""
    total_token: TreeNodes | Literal["auto"] | None = None
    """Tree nodes the target checks per round, root included. auto: the profile that `fledge bench --tune` wrote. None,
    and no --depth and --top-k: the engine's own choice, never slower than plain decoding by much; on a CPU also of what
    the text repeats. With them, 60."""
    depth: Natural | None = None
    """Draft rounds after the first level of the tree. None: 5."""
    top_k: Count | None = None
    """Children per tree node and beam width; 1 drafts a chain. None: 10."""
    adaptive: bool = False
    """Draft only as deep and as wide as it pays, or what the text repeats (prompt lookup), or nothing; the tree flags
    are then the most that is drafted. Costs come from the profile that `fledge bench --tune` wrote."""
    shapes: Literal["auto", "exact", "fixed"] = "auto"
    """fixed: rounds of fixed shapes, captured into CUDA graphs on a GPU. exact: shapes as they come, every kind of
    target. auto: fixed on a GPU wherever it can be."""
    exact: bool = False
    """Take all sums in one order, so that the text is the same with and without a draft, alone and in a batch, bit for
    bit, in bf16 too. On a CPU, where it is on without the flag if it costs nothing (bf16, layers like Llama's, a C
    compiler); on a GPU with Triton for layers like Llama's in bf16 or fp16. A self-test says where it cannot be."""

    @property
    def own_choice(self) -> bool:
        """Whether the engine chooses what is drafted (`default_tree.py`)."""
        named = any(flag is not None for flag in (self.total_token, self.depth, self.top_k))
        return not named and not self.adaptive and self.shapes != "fixed"
