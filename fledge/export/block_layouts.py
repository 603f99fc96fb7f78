"""How engines name and configure a block draft (DFlash, DSpark): one row per reader.

fledge's own folder is what vLLM reads; its z-lab part is what SGLang reads. Two traps are closed by always writing the
fields: `sample_from_anchor`, which absent means one block layout in DSpark files and the other in DFlash files, and the
taps, which these files name by outputs of layers and the speculators layout by inputs.
"""

from dataclasses import dataclass
from typing import Any

from fledge.drafters.dspark.checkpoint import BlockHead
from fledge.drafters.dspark.config import BlockConfig, to_json
from fledge.errors import UserError

JSON = dict[str, Any]


@dataclass(frozen=True)
class BlockLayout:
    """One way to write a block draft. The same members as `fledge.export.layouts.Layout`."""

    name: str
    reader: str = "vLLM"
    serve: str = ""
    whole_vocab: bool = False
    """Its reader takes the target's own head, whatever the file brings."""

    def describe(self, config: BlockConfig, dtype: str, target: str) -> JSON:
        """config.json"""
        return to_json(config, dtype=dtype)

    def tensor_name(self, ours: str) -> str:
        return ours

    def command(self, config: BlockConfig) -> str:
        """`serve` with what depends on the draft."""
        method = "dspark" if config.markov_rank else "dflash"
        return (
            self.serve.replace("METHOD", method).replace("ALGORITHM", method.upper())
            .replace("DRAFTS", str(config.num_drafts)).replace("SLOTS", str(config.block_size))
        )  # fmt: skip

    def refuse(self, head: BlockHead) -> None:
        if head.config.sample_from_anchor and not head.config.markov_rank:
            raise UserError(
                f"the draft has no Markov head and drafts from its anchor, and {self.reader} reads the slots of a "
                f"DFlash draft at their own places: every token would be one place off. Train it with a Markov head or "
                f"with sample_from_anchor false."
            )
        if self.whole_vocab and not head.config.full_vocab:
            raise UserError(
                f"the draft proposes {head.config.draft_vocab_size} of {head.config.vocab_size} tokens, and the reader "
                f"of the {self.name} layout takes the target's whole head: every token would be another one. Train "
                f"with --draft-vocab-size 0, or export it for vLLM."
            )


class SpeculatorsBlockLayout(BlockLayout):
    """The layout of speculators: the layers' config inside, taps as inputs of layers, no model_type on top."""

    def describe(self, config: BlockConfig, dtype: str, target: str) -> JSON:
        kind = "dspark" if config.markov_rank else "dflash"
        layer = to_json(config, dtype=dtype)
        outer = ("architectures", "dflash_config", "block_size", "mask_token_id", "target_layer_ids", "fledge",
                 "sample_from_anchor", "num_target_layers", "draft_vocab_size", "markov_rank", "markov_head_type",
                 "enable_confidence_head", "confidence_head_with_markov")  # fmt: skip
        written = {key: layer.pop(key) for key in outer}
        markov = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
        return {
            "architectures": ["DSparkSpeculator" if config.markov_rank else "DFlashSpeculator"],
            "speculators_model_type": kind,
            "speculators_version": "0.9.0",
            "speculators_config": {
                "algorithm": kind,
                "default_proposal_method": "greedy",
                "proposal_methods": [
                    {"proposal_type": "greedy", "speculative_tokens": config.num_drafts, "verifier_accept_k": 1,
                     "accept_tolerance": 0.0}
                ],
                "verifier": {"name_or_path": target, "architectures": []},
            },
            "draft_vocab_size": config.draft_vocab_size,
            "target_hidden_size": config.hidden_size,
            "aux_hidden_state_layer_ids": list(config.tap_layers),
            "mask_token_id": config.mask_token_id,
            "block_size": config.block_size,
            "sample_from_anchor": config.sample_from_anchor,
            "sliding_window_non_causal": not config.causal,
            **({key: written[key] for key in markov} if config.markov_rank else {}),
            "transformer_layer_config": layer,
            "tie_word_embeddings": False,
            "dtype": dtype,
        }  # fmt: skip


VLLM = (
    "vllm serve TARGET --speculative-config "
    """'{"method": "METHOD", "model": "HEAD", "num_speculative_tokens": DRAFTS}'"""
)
SGLANG = (
    "python3 -m sglang.launch_server --model-path TARGET --speculative-algorithm ALGORITHM "
    "--speculative-draft-model-path HEAD --speculative-num-draft-tokens SLOTS"
)
BLOCK_LAYOUTS = {
    layout.name: layout
    for layout in (
        BlockLayout("vllm", serve=VLLM),
        BlockLayout("sglang", reader="SGLang", serve=SGLANG, whole_vocab=True),
        SpeculatorsBlockLayout("speculators", serve="vllm serve HEAD"),
    )
}
