"""AngelSlim's PyTorch engine (the EAGLE repository's tree decoding) as a process that answers requests, a line each.

    python benchmarks/decode_peers_worker.py --model SMOLLM2_DIR --head HEAD --dtype float32 --threads 2

Run by decode_peers.py with the Python of an environment that has angelslim 0.5.0 (its top therefore needs torch,
transformers and safetensors only). {"prompt": ids, "tree": [total_token, depth, top_k], "new_tokens": n, "as_released":
false} is answered by {"token_ids", "accepted", "prefill_s", "decode_s"}. The engine's classes and its `eagle_generate`
are used unchanged. What stands around them here, and why:

- the package's `__init__` files are skipped: they import all of its compressors, one of which (`compressor.qat`) the
  0.5.0 wheel does not contain;
- target and head are made by their constructors and filled from the safetensors files. The package's `from_pretrained`
  asks the tokenizer for names that current checkpoints no longer have, reads the embedding from a sharded checkpoint
  only, leaves it random where the head's config has `target_hidden_size`, and knows no `rope_parameters`;
- of a beam's children the release scores each by what its place is worth under the *first* beam row
  (`Llama3Eagle3Drafter._get_topk_tokens`), so it verifies other trees than EAGLE's; unless `as_released` is asked for,
  each row's own scores are used, as EAGLE published it, and then every round keeps as many tokens as ours does;
- a tokenizer that holds the two ids the loop looks at, neither of which occurs: every way decodes the same number of
  tokens, without an end of text;
- the clock is read once more behind the prompt's forward (`initialize_tree`, which also drafts the first tree; the
  loop drafts a tree after its last round instead, so the rounds' time holds as many drafts as rounds, as ours does).
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

EAGLE3 = "angelslim.compressor.speculative.inference.models.eagle3"
SKIPPED = ("angelslim", "angelslim.compressor", "angelslim.compressor.speculative", "angelslim.utils")
NO_TOKEN = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the package prints is no answer
    peer = Peer(args)
    print(json.dumps(conditions()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.answer(json.loads(line))), file=answers, flush=True)


class Peer:
    """The engine with a target and a head."""

    def __init__(self, args: argparse.Namespace) -> None:
        skip_package_inits()
        self._code = importlib.import_module(f"{EAGLE3}.eagle3_model")
        dtype = getattr(torch, args.dtype)
        target = self._target(args.model, dtype)
        self._head = self._filled_head(args.head, target)
        tokenizer = types.SimpleNamespace(eos_token_id=NO_TOKEN, stop_think_id=NO_TOKEN)
        self._engine = self._code.Eagle3Model(target, tokenizer, self._head).eval()
        self._prefilled = 0.0
        prefill = self._code.initialize_tree

        def timed(*given: Any) -> Any:
            made = prefill(*given)
            self._prefilled = time.perf_counter()
            return made

        self._code.initialize_tree = timed  # type: ignore[attr-defined]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One prompt: at least `new_tokens` tokens, the last round's surplus included."""
        total_token, depth, top_k = request["tree"]
        head = self._head
        if (head.total_tokens + 1, head.depth, head.top_k) != (total_token, depth, top_k):
            head.total_tokens, head.depth, head.top_k = total_token - 1, depth, top_k
            head.init_tree()
        head.as_released = request["as_released"]
        prompt = torch.tensor([request["prompt"]])
        begin = time.perf_counter()
        # The prefill's token is not among those it counts, and it goes on while the count is not above the limit.
        found, _, _, accepted = self._engine.eagle_generate(
            prompt, max_new_tokens=request["new_tokens"] - 2, log=True
        )  # fmt: skip
        end = time.perf_counter()
        return {
            "token_ids": found[0, prompt.shape[1] :].tolist(), "accepted": accepted,
            "prefill_s": self._prefilled - begin, "decode_s": end - self._prefilled,
        }  # fmt: skip

    def _target(self, folder: Path, dtype: torch.dtype) -> Any:
        config = llama_config(folder)
        model = self._code.KVLlamaForCausalLM(config)
        weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        fill(model, weights)
        return model.to(dtype)

    def _filled_head(self, folder: Path, target: Any) -> Any:
        given = json.loads((folder / "config.json").read_text())
        fields = ("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings",
                  "rope_theta")  # fmt: skip
        config = self._code.Eagle3Config(**{name: given[name] for name in fields})
        assert config.rope_scaling is None and config.rope_theta == given["rope_theta"], config
        head = with_eagle_scores(self._code)(config, load_emb=False)
        weights = load_file(folder / "model.safetensors")
        weights["embed_tokens.weight"] = target.model.embed_tokens.weight
        fill(head, weights)
        head.to(target.dtype).init_tree()
        return head


def with_eagle_scores(code: types.ModuleType) -> Any:
    """The head, with every beam row's own scores unless asked for those of the release."""

    class EagleScores(code.Llama3Eagle3Drafter):  # type: ignore[name-defined]
        as_released = False

        def _get_topk_tokens(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self.as_released:
                return super()._get_topk_tokens(hidden)
            best = self.logsoftmax(self.lm_head(self.norm(hidden))).topk(self.top_k, dim=-1)
            return best.indices, best.values[0] if len(best.values) == 1 else best.values

    return EagleScores


def skip_package_inits() -> None:
    """Packages that lead to the engine as bare folders."""
    found = importlib.util.find_spec("angelslim")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("angelslim is not installed here: pip install --no-deps angelslim==0.5.0")
    root = Path(next(iter(found.submodule_search_locations))).parent
    for name in SKIPPED:
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = package


def llama_config(folder: Path) -> Any:
    """The target's config with the rope fields the engine reads."""
    config = LlamaConfig.from_pretrained(folder)
    given = json.loads((folder / "config.json").read_text())
    rope = given.get("rope_parameters") or {"rope_theta": given["rope_theta"], "rope_type": "default"}
    assert rope["rope_type"] == "default", rope
    config.rope_theta = rope["rope_theta"]
    config.rope_scaling = None
    return config


def fill(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """All weights, each where it belongs; only what the module computes itself may be absent."""
    missing, unknown = module.load_state_dict(weights, strict=False)
    absent = [name for name in missing if "rotary_emb" not in name]
    assert not absent and not unknown, f"{absent=} {unknown=}"


def conditions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("angelslim", "torch", "transformers")}


if __name__ == "__main__":
    main()
