"""Heads for Qwen3-VL and Qwen2.5-VL in vLLM itself, pictures in the prompts: its answers and its acceptance are ours.

Targets of test size that vLLM's CPU kernels take (head_dim 32), taught for half a minute to look at drawn pictures, and
a head trained for each and exported. vLLM runs in a program of its own with the head, at T = 0 in fp32; half of the
pictures are noise. Its Qwen processors ask for torchvision, which setup_vllm.sh puts beside its environment.

vLLM 0.32 stores the key of a draft step behind the first at the slot of its *rope* position, which behind a picture is
smaller than its index (llm_base_proposer.py, `_update_positions_dependent_metadata`): drafts past the first are then
worse than the head can do, the text never. So the figures of all positions are compared with that one step set right
(`slots_by_index`), and as vLLM is, the answers and the first draft.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fledge.data.tokenize import ChatTemplate
from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.tree import TreeShape
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings
from fledge.target.model import Target

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
FAMILIES = {"qwen3_vl": "Qwen3VLVideoProcessor", "qwen2_5_vl": "Qwen2VLVideoProcessor"}
NEW_TOKENS, DRAFTS, TOLERANCE = 17, 3, 0.03
ASKED = range(300_000, 300_024)
RUN = """
import json, sys
def main():
    asked = json.load(sys.stdin)
    import transformers
    # vLLM makes the whole processor, videos included
    video = getattr(transformers, asked["video_processor"])(patch_size=8, merge_size=2, temporal_patch_size=1)
    video.save_pretrained(asked["target"])
    from PIL import Image
    from vllm import LLM, SamplingParams
    if asked["slots_by_index"]:
        from vllm.v1.spec_decode import llm_base_proposer
        update = llm_base_proposer.eagle_step_update_slot_mapping_and_metadata
        def by_index(positions_1d, seq_lens, out_clamped_positions, **others):
            rope = positions_1d.clone()
            update(positions_1d=(seq_lens[: len(rope)] - 1).to(rope.dtype), seq_lens=seq_lens,
                   out_clamped_positions=out_clamped_positions, **others)
            out_clamped_positions.copy_(rope + 1)
        llm_base_proposer.eagle_step_update_slot_mapping_and_metadata = by_index
    engine = LLM(
        asked["target"], dtype="float32", enforce_eager=True, max_model_len=128, max_num_batched_tokens=512,
        max_num_seqs=4, limit_mm_per_prompt={"image": 1, "video": 0}, enable_prefix_caching=False,
        disable_log_stats=False, speculative_config={
            "method": "eagle3", "model": asked["head"], "num_speculative_tokens": asked["drafts"]})
    prompts = [{"prompt": asked["prompt"], "multi_modal_data": {"image": Image.open(path).convert("RGB")}}
               for path in asked["pictures"]]
    options = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True)
    found = engine.generate(prompts, options)
    counted = {m.name: getattr(m, "value", None) or getattr(m, "values", None) for m in engine.get_metrics()
               if m.name.startswith("vllm:spec_decode")}
    print("FOUND " + json.dumps({
        "prompts": [list(one.prompt_token_ids) for one in found], "counted": counted,
        "answers": [list(one.outputs[0].token_ids) for one in found]}))
main()
"""


@pytest.fixture(scope="module")
def torchvision_folder(vllm_program) -> Path:
    folder = Path(vllm_program).resolve().parents[1] / "for-pictures"
    folder = Path(os.environ.get("FLEDGE_VLLM_TORCHVISION") or folder)
    if not (folder / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {folder}: run tests/engines/setup_vllm.sh or set FLEDGE_VLLM_TORCHVISION")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """(family, folder with target, head and pictures): taught, trained, drawn."""
    folder = tmp_path_factory.mktemp(request.param)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(folder / "cache"))
        try:
            from drawn_pictures import Task, draw, noise
            from learned_pictures import Schooling, make

            task = Task(grid=3, colours=4, digits=5)
            school = Schooling(steps=240, batch=16, pictures=4096)
            make(folder, task, school, answered=range(200_000, 200_192), head_epochs=6, family=request.param)
        finally:
            sys.path.pop(0)
            for name in ("learned_pictures", "looking_target", "drawn_pictures"):
                sys.modules.pop(name, None)
    for seed in ASKED:
        (draw(seed, task)[0] if seed % 2 else noise(seed, task)).save(folder / f"{seed}.png")
    return request.param, folder


@dataclasses.dataclass
class Ours:
    """Our decoding of the same questions."""

    folder: Path

    def __post_init__(self) -> None:
        self.target = Target.from_pretrained(str(self.folder / "target"), dtype=torch.float32, device="cpu")
        template = ChatTemplate(self.target.tokenizer, vision=self.target.vision)
        question = {"type": "text", "text": "what does the picture show ?"}
        pictures = [{"type": "image", "image": str(self.folder / f"{seed}.png")} for seed in ASKED]
        messages = [[{"role": "user", "content": [picture, question]}] for picture in pictures]
        self.text = template.render(messages[0], add_generation_prompt=True)
        self.prompts = [template.prompt(message) for message in messages]

    def answers(self) -> list[list[int]]:
        return [
            generate(self.target, None, prompt.ids, max_new_tokens=NEW_TOKENS, sampling=Sampling(), eos_token_ids=(),
                           model_inputs=prompt.model_inputs).token_ids
            for prompt in self.prompts
        ]  # fmt: skip

    def reached(self, draft: DraftModel) -> list[int]:
        """How many rounds kept at least so many drafts. Drafts past the limit count, as they do in vLLM."""
        counts = [0] * (DRAFTS + 1)
        for prompt in self.prompts:
            found = generate(
                self.target, draft, prompt.ids, tree=TreeShape(DRAFTS + 1, DRAFTS - 1, 1), eos_token_ids=(),
                max_new_tokens=NEW_TOKENS + DRAFTS + 1, sampling=Sampling(), model_inputs=prompt.model_inputs,
            )  # fmt: skip
            emitted = 1  # the prefill's token
            for accepted in found.accepted:
                if emitted < NEW_TOKENS:
                    for count in range(accepted + 1):
                        counts[count] += 1
                emitted += accepted + 1
        return counts


def shares(reached: list[int]) -> list[float]:
    return [count / reached[0] for count in reached[1:]]


def asked_of_vllm(vllm_program: str, torchvision: Path, folder: Path, **asked) -> dict:
    environment = {
        **os.environ, "PYTHONPATH": str(torchvision), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    run = subprocess.run(
        [str(Path(vllm_program).resolve().parent / "python"), "-c", RUN], input=json.dumps(asked), text=True,
        capture_output=True, timeout=400, cwd=folder, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return json.loads(run.stdout.split("FOUND ")[1].splitlines()[0])


def test_vllm_drafts_behind_pictures_as_we_do(made, vllm_program, torchvision_folder, tmp_path, capsys):
    family, folder = made
    export_head(ExportSettings(head=str(folder / "head"), to="vllm", output_dir=tmp_path / "out", target="T"))
    ours = Ours(folder)
    answers = ours.answers()
    assert len({tuple(answer) for answer in answers}) > len(ASKED) // 2, "the control: answers follow the picture"
    head = load_draft(folder / "head", ours.target.embedding_weight)
    mine = ours.reached(head)
    assert shares(mine)[0] > 0.5, "a head this weak would compare nothing"

    for slots_by_index in (False, True):
        found = asked_of_vllm(
            vllm_program, torchvision_folder, tmp_path, target=str(folder / "target"), head=str(tmp_path / "out"),
            video_processor=FAMILIES[family], prompt=ours.text, drafts=DRAFTS, new_tokens=NEW_TOKENS,
            pictures=[str(folder / f"{seed}.png") for seed in ASKED], slots_by_index=slots_by_index,
        )  # fmt: skip
        assert found["prompts"] == [prompt.ids for prompt in ours.prompts]
        assert found["answers"] == answers
        counted = found["counted"]
        theirs = [counted["vllm:spec_decode_num_drafts"], *counted["vllm:spec_decode_num_accepted_tokens_per_pos"]]
        with capsys.disabled():
            print(
                f"\n{family}, slots_by_index {slots_by_index}, rounds that kept at least 0, 1, .. of {DRAFTS} drafts:"
            )
            print(f"  ours {mine}, vLLM's {theirs}")
        compared = DRAFTS if slots_by_index else 1
        for a, b in zip(shares(theirs)[:compared], shares(mine)[:compared], strict=True):
            assert abs(a - b) <= TOLERANCE
        assert abs(theirs[0] - mine[0]) <= TOLERANCE * mine[0] or not slots_by_index

    with torch.no_grad():  # the control: the same head, deaf to the target's states
        head.fc.weight.zero_()
    deaf = shares(ours.reached(head))
    assert max(abs(a - b) for a, b in zip(deaf, shares(mine), strict=True)) > 3 * TOLERANCE
