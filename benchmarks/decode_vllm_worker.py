"""vLLM's side of decode_vllm.py, run by the Python of its own environment: a line of JSON in, a line out."""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    facts: dict[str, Any] = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")  # what vLLM prints goes to stderr
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    options: dict[str, Any] = {}
    if facts["head"]:
        options["speculative_config"] = {
            "method": "eagle3", "model": facts["head"], "num_speculative_tokens": facts["chain"],
        }  # fmt: skip
    engine = LLM(
        model=facts["model"], dtype=facts["dtype"], max_model_len=2048, max_num_seqs=max(facts["at_once"], 4),
        enable_prefix_caching=False, disable_log_stats=True, **options,
    )  # fmt: skip
    say(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(
            temperature=facts["temperature"], seed=0, max_tokens=asked["new_tokens"], ignore_eos=True
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        say(answers, {"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]})


def say(answers: Any, document: dict[str, Any]) -> None:
    answers.write(json.dumps(document) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
