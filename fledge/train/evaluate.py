"""Evaluation by real decoding while a head trains: tau on held-out prompts, and the best head so far kept in `best/`.

The loss keeps falling after the accept length has peaked, so checkpoints are chosen by what they are for. A prompt is a
held-out conversation up to its first answer, as token ids: no template is applied again. What decodes is a copy of the
head in the target's dtype, made from gathered weights, so sharded training evaluates alike; building it does not touch
the random state, so a run with evaluation trains as one without.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fledge.console import NO_BAR, ProgressBar, say, warn
from fledge.data.samples import Prompt
from fledge.decoding.generate import generate
from fledge.drafters.bound_head import BoundHead
from fledge.drafters.head_files import WEIGHTS, save_draft
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.outputs import delete, staged, write_json
from fledge.parsing import read_python_json
from fledge.target.model import Target
from fledge.train.resume import BEST

RECORD = "best.json"
TREE, MAX_NEW_TOKENS = TreeShape(), 64


@dataclasses.dataclass(frozen=True)
class Decoded:
    """One evaluation."""

    step: int
    tau: float  # tokens per target forward, pooled over the prompts
    tokens: int
    seconds: float


class DecodingEvaluation:
    """Decodes a fixed set of prompts greedily with whatever head it is given."""

    def __init__(self, target: Target, prompts: Sequence[Prompt], tree: TreeShape, max_new_tokens: int) -> None:
        self.target, self.prompts, self.tree, self.max_new_tokens = target, list(prompts), tree, max_new_tokens

    def run(self, draft: BoundHead, step: int, bar: ProgressBar = NO_BAR) -> Decoded:
        """Tau of this head: the same prompts, tree and limit every time."""
        start, tokens, forwards = time.monotonic(), 0, 0
        for prompt in self.prompts:
            made = generate(
                self.target, draft, prompt.ids, tree=self.tree, max_new_tokens=self.max_new_tokens,
                model_inputs=prompt.model_inputs,
            )  # fmt: skip
            tokens, forwards = tokens + len(made.token_ids) - 1, forwards + made.num_forwards
            bar.advance()
        return Decoded(step, tokens / max(forwards, 1), tokens, time.monotonic() - start)


def held_out_prompts(dataset: Any, number: int, longest: int, picture_token: int | None = None) -> list[Prompt]:
    """The first turns of the first `number` held-out samples (or records) that leave room to answer.

    Left out: prompts with pictures whose pixels are gone (stored records hold `picture_token`s and no pixels), and
    samples that show more pictures after the first answer, since pixels come for all of a sample at once.
    """
    prompts: list[Prompt] = []
    for index in range(len(dataset)):
        item = dataset[index]
        answers = item.loss_mask.nonzero()
        first = int(answers[0]) if len(answers) else 0
        ids, inputs = item.input_ids[:first].tolist(), getattr(item, "model_inputs", {})
        gone = picture_token in ids and not inputs
        later = any(image.begin >= first for image in getattr(item, "images", ()))
        if 0 < first <= longest and not gone and not later:
            prompts.append(Prompt(item.input_ids.tolist(), inputs).until(first))
        if len(prompts) == number:
            break
    return prompts


def copy_for_decoding(draft: BoundHead, weights: dict[str, Tensor], target: Target) -> BoundHead:
    """A head with these weights in the target's dtype."""
    with torch.random.fork_rng(devices=[]):  # fresh modules draw random numbers
        copy = draft.fresh(target)
    copy.set_vocab(draft.d2t.to("cpu"), draft.t2d.to("cpu"))
    copy.load_state_dict(weights, strict=False)
    return copy.to(target.device, target.dtype).eval().requires_grad_(False)


class DecodingCallback(TrainerCallback):
    """Every `every` steps: decode, log `decode_tau`, and keep the head in `best/` when it is the best so far.

    `trainer` is a DraftTrainer. Rank 0 decodes; the others wait for it at the next collective call.
    """

    def __init__(self, trainer: Any, evaluation: DecodingEvaluation, every: int) -> None:
        self.trainer, self.evaluation, self.every = trainer, evaluation, every
        self.folder = Path(trainer.args.output_dir) / BEST
        self.last_step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A fresh run does not inherit the best head of another."""
        if state.global_step == 0 and self.folder.exists() and self.trainer.is_world_process_zero():
            delete([self.folder])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.evaluate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != self.last_step:
            self.evaluate(state.global_step)

    def evaluate(self, step: int) -> None:
        """Decode with the weights of now."""
        self.last_step = step
        weights = self.trainer.gathered_weights()  # every rank takes part in gathering
        if self.trainer.is_world_process_zero():
            draft = copy_for_decoding(self.trainer.draft, weights, self.evaluation.target)
            with self.trainer.shown.bar("decoding", len(self.evaluation.prompts)) as bar:
                found = self.evaluation.run(draft, step, bar)
            self.trainer.not_training(found.seconds)
            self.keep(found, weights)
            wanted = self.trainer.control.should_log  # logging here would count as the step's own log
            self.trainer.log({"decode_tau": found.tau, "decode_tokens": found.tokens, "decode_s": found.seconds})
            self.trainer.control.should_log = wanted
        self.trainer.accelerator.wait_for_everyone()

    def keep(self, decoded: Decoded, weights: dict[str, Tensor]) -> None:
        """Save the head when it is better than the one in `best/`, together with its record."""
        before = read_best(self.folder.parent)
        if before is not None and decoded.tau <= before.tau:
            return
        with staged(self.folder) as building:
            save_draft(self.trainer.draft, building, dtype=self.trainer.save_dtype, weights=weights)
            write_json(building / RECORD, dataclasses.asdict(decoded))

    def make_best_final(self) -> None:
        """Put the best head where the last one was saved; the model in memory follows where it is whole."""
        best, output_dir = read_best(self.folder.parent), self.folder.parent
        if best is None:
            return
        say(f"the head of step {best.step} is the best by decoding (tau {best.tau:.3f}); it becomes the final one")
        if self.trainer.is_world_process_zero():
            with staged(output_dir) as building:
                for name in ("config.json", WEIGHTS):
                    shutil.copyfile(self.folder / name, building / name)
        self.trainer.accelerator.wait_for_everyone()
        if not self.trainer.sharded:
            self.trainer.load_head(output_dir)


def read_best(output_dir: Path) -> Decoded | None:
    """Which head lies in `best/`; None when there is none or its record is torn."""
    try:
        return read_python_json(output_dir / BEST / RECORD, Decoded)
    except UserError:
        return None


def decoding_evaluation(flags: Any, source: Any, open_target: Any) -> DecodingEvaluation | None:
    """What the flags ask for; None without --eval-decode-steps. `open_target()` loads a target where none is."""
    if not flags.eval_decode_steps:
        return None
    if source.eval is None:
        raise UserError(
            "--eval-decode-steps decodes held-out conversations, and there are none: give --eval-data, "
            "--eval-states or --eval-fraction."
        )
    target = source.target if source.target is not None else open_target()
    room = getattr(target.text_config, "max_position_embeddings", 1 << 30) - MAX_NEW_TOKENS
    picture_token = target.vision.image_token_id if target.vision else None
    prompts = held_out_prompts(source.eval, flags.eval_decode_prompts, room, picture_token)
    if not prompts:
        raise UserError(
            "--eval-decode-steps: no held-out conversation has a prompt that leaves room for an answer (with pictures, "
            "stored states have none: pixels are not kept)."
        )
    if len(prompts) < flags.eval_decode_prompts:
        warn(f"--eval_decode_prompts {flags.eval_decode_prompts}: only {len(prompts)} held-out prompts; all are used.")
    say(f"every {flags.eval_decode_steps} steps {len(prompts)} prompts are decoded; {BEST}/ keeps the best head")
    return DecodingEvaluation(target, prompts, TREE, MAX_NEW_TOKENS)
