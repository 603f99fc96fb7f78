"""Pictures in conversations: where they come from, which tokens they become, what is refused. No hub."""

import base64
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.text import Text as RichText
from tiny_vlm import NAMES, VLMS, picture, picture_file, tiny_processor, write_image_conversations
from torch.utils.data import DataLoader

from fledge.data.conversations import Conversation
from fledge.data.dataset import TokenizedData
from fledge.data.inspect import colour, figures
from fledge.data.rejects import Reject
from fledge.data.samples import Drop, Sample
from fledge.data.tokenize import ChatTemplate
from fledge.data.vision import Vision, load_vision
from fledge.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def template_for(name: str, **limits) -> ChatTemplate:
    vision = Vision(tiny_processor(name), **limits)
    return ChatTemplate(vision.tokenizer, vision=vision)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return template_for("qwen2_5_vl")


def image(path: Path | str) -> dict:
    return {"type": "image", "image": str(path)}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def ask(*parts, answer: str = "a red one") -> tuple:
    return ({"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer})


def supervised(template: ChatTemplate, sample: Sample) -> str:
    return template.tokenizer.decode(sample.input_ids[sample.loss_mask])


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_processors_and_only_the_answers_are_supervised(name, tmp_path):
    template = template_for(name)
    first, second = picture_file(tmp_path, 1), picture_file(tmp_path, 2, 20, 36)
    messages = (*ask(words("look: "), image(first), words(" and "), image(second), words("?"), answer="both are noise"),
                *ask(words("sure?"), answer="yes"))  # fmt: skip
    sample = template.load(template.encode(Conversation("c", messages)))
    assert supervised(template, sample) == "both are noise<|im_end|>yes<|im_end|>"

    processor = template.vision.processor
    text = processor.apply_chat_template([{**m, "content": m["content"] if isinstance(m["content"], list)
                                           else [words(m["content"])]} for m in messages], tokenize=False)  # fmt: skip
    opened = [Image.open(path) for path in (first, second)]
    theirs = processor(text=[text], images=opened, return_tensors="pt", add_special_tokens=False)
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    for key in set(theirs) - {"input_ids", "attention_mask"}:
        assert torch.equal(sample.model_inputs[key], theirs[key]), key

    assert [(ref.width, ref.height) for ref in sample.images] == [(40, 24), (20, 36)]
    inside = torch.zeros(len(sample.input_ids), dtype=torch.bool)
    for ref in sample.images:
        inside[ref.begin : ref.end] = True
    marks = sample.input_ids == template.vision.image_token_id
    assert marks.any() and not (marks & ~inside).any() and not (inside & sample.loss_mask).any()


def test_the_order_of_pictures_is_the_order_of_the_parts(template, tmp_path):
    """The negative control of the comparison above: pictures swapped, pixels swapped."""
    one, two = image(picture_file(tmp_path, 1)), image(picture_file(tmp_path, 2))
    samples = [template.load(template.encode(Conversation("c", ask(*parts, words("?"))))) for parts in
               ((one, two), (two, one))]  # fmt: skip
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)
    assert not torch.equal(samples[0].model_inputs["pixel_values"], samples[1].model_inputs["pixel_values"])


def test_a_template_that_wants_parts_gets_parts():
    """LLaVA's and SmolVLM's templates walk over parts; a string content would silently vanish."""
    assert all(template_for(name).renderer.only_parts == VLMS[name].parts_only for name in ("llava", "qwen3_vl"))
    template = template_for("llava")
    sample = template.encode(
        Conversation("c", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}))
    )
    assert template.tokenizer.decode(sample.input_ids).startswith("<|im_start|>user\nHi<|im_end|>")
    template.renderer.only_parts = False
    assert "Hi" not in template.render([{"role": "user", "content": "Hi"}])


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_every_spelling_of_a_picture_is_the_same_sample(template, tmp_path):
    path = picture_file(tmp_path, 3)
    coded = base64.b64encode(path.read_bytes()).decode()
    parts = (
        image(path), image(path.name), {"type": "image_url", "image_url": {"url": data_url(path)}},
        {"type": "image", "base64": coded}, {"type": "input_image", "image_url": f"file://{path}"},
    )  # fmt: skip
    rows: list[dict] = [{"messages": ask(part, words("what?"))} for part in parts]
    rows.append({"messages": ask({"type": "image"}, words("what?")), "images": [path.name]})
    marked = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red one"}]
    rows.append({"conversations": marked, "image": path.name})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = list(TokenizedData.from_path(str(file), template, cache_dir=None).loaded())
    assert len(samples) == len(rows)
    for sample in samples:
        assert torch.equal(sample.input_ids, samples[0].input_ids)
        assert torch.equal(sample.model_inputs["pixel_values"], samples[0].model_inputs["pixel_values"])
        assert sample.images[0].digest == samples[0].images[0].digest


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "broken image"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "broken image"),
        (lambda path: path.write_bytes(b"no picture"), "broken image"),
        (lambda path: Image.new("RGB", (2000, 5)).save(path), "refused by the processor"),
    ],
)
def test_a_bad_picture_rejects_its_row_with_the_reason(template, tmp_path, damage, reason):
    data = write_image_conversations(tmp_path / "data.jsonl", 6)
    damage(picture_file(tmp_path, 3))
    found = TokenizedData.from_path(str(data), template, max_reject_share=0.5)
    assert found.report.rejected == {reason: 1} and found.report.kept == 5
    assert "row-3" not in found.ids
    with pytest.raises(UserError, match="1 of 6 rows"):
        TokenizedData.from_path(str(data), template, max_reject_share=0.01, cache_dir=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([words("<|image_pad|> what?")], "0 images, but the rendered text has 1"),
        ([{"type": "image"}, words("?")], "needs a path, URL or base64 text"),
        ([{"type": "video", "video": "x.mp4"}, words("?")], "type 'video'"),
    ],
)
def test_pictures_and_marks_must_agree(template, content, message):
    result = template.encode_many([Conversation("c", ask(*content))])[0]
    assert isinstance(result, Reject) and message in result.detail


def test_a_row_with_pictures_is_no_row_for_a_text_target(template, tmp_path):
    text_only = ChatTemplate(template.tokenizer)
    result = text_only.encode_many([Conversation("c", ask(image(picture_file(tmp_path)), words("?")))])[0]
    assert isinstance(result, Reject) and result.reason == "not text"


def test_half_a_picture_is_cut_whole(template, tmp_path):
    turns = (*ask(image(picture_file(tmp_path, 1)), words("one?"), answer="first"),
             *ask(image(picture_file(tmp_path, 2)), words("two?"), answer="second"))  # fmt: skip
    conversation = Conversation("c", turns)
    whole = template.encode(conversation)
    first, second = whole.images
    for length in (second.begin + 1, second.end - 1):
        cut = template.load(template.encode(conversation, max_length=length))
        assert len(cut.input_ids) == second.begin and cut.images == (first,) and cut.truncated
        assert len(cut.model_inputs["image_grid_thw"]) == 1
        assert cut.model_inputs["mm_token_type_ids"].shape == (1, second.begin)
    assert len(template.encode(conversation, max_length=second.end + 2).images) == 2
    with pytest.raises(Drop):
        template.encode(conversation, max_length=first.end - 1)


def test_max_pixels_makes_pictures_cheaper(tmp_path):
    conversation = Conversation("c", ask(image(picture_file(tmp_path, 5, 64, 48)), words("?")))
    tokens = [template_for("qwen3_vl", max_pixels=most).encode(conversation).images[0].num_tokens
              for most in (None, 512, 256)]  # fmt: skip
    assert tokens[0] > tokens[1] > tokens[2]
    assert template_for("qwen3_vl", max_pixels=256).fingerprint != template_for("qwen3_vl").fingerprint
    little = Conversation("c", ask(image(picture_file(tmp_path, 6, 8, 8)), words("?")))
    small = template_for("qwen3_vl", min_pixels=900).encode(little)
    assert small.images[0].num_tokens > 9
    with pytest.raises(UserError, match="needed is 0 < min <= max"):
        template_for("qwen3_vl", max_pixels=10)
    with pytest.raises(UserError, match="CLIPImageProcessorPil resizes to a fixed size"):
        template_for("llava", max_pixels=256)


def test_pictures_text_and_workers(template, tmp_path):
    """Pictures, two at a time and none, in one file; decoded by loader workers; tokenised by spawned processes."""
    data = write_image_conversations(tmp_path / "data.jsonl", 8)
    one = TokenizedData.from_path(str(data), template, cache_dir=None)
    many = TokenizedData.from_path(str(data), template, cache_dir=None, num_proc=2)
    assert [len(sample.images) for sample in one] == [1, 2, 0, 1, 2, 1, 1, 2]
    assert one.images == many.images and one.ids == many.ids
    assert all(not sample.model_inputs for sample in one)
    loader = DataLoader(one.loaded(), batch_size=2, num_workers=2, collate_fn=list)
    for here, there in zip(one.loaded(), (sample for batch in loader for sample in batch), strict=True):
        assert here.model_inputs.keys() == there.model_inputs.keys() and bool(here.images) == bool(here.model_inputs)
        assert all(torch.equal(value, there.model_inputs[key]) for key, value in here.model_inputs.items())


def test_inspect_shows_what_pictures_cost(template, tmp_path):
    data = write_image_conversations(tmp_path / "data.jsonl", 8)
    found = TokenizedData.from_path(str(data), template)
    document = figures(found, str(data))["images"]
    assert document["images"] == 10 and document["samples_without"] == 1
    assert document["per_sample"] == {"0": 1, "1": 4, "2": 3} and document["sizes"] == {"40 x 24": 7, "20 x 36": 3}
    assert document["tokens"]["max"] == max(ref.num_tokens for refs in found.images for ref in refs)
    assert 0 < document["share_of_tokens"] < 1
    shown: RichText = colour(found[1], template.tokenizer)
    tokens = found[1].images[0].num_tokens
    assert f"[40 x 24, {tokens} tokens]" in shown.plain and "<|image_pad|>" not in shown.plain
    assert "what is number 1?" in shown.plain and "it is picture 1 of 8" in shown.plain


def test_a_picture_that_changed_since_is_found(template, tmp_path):
    data = write_image_conversations(tmp_path / "data.jsonl", 4)
    found = TokenizedData.from_path(str(data), template)
    assert TokenizedData.from_path(str(data), template).folder == found.folder, "the same state, the same folder"
    picture(99).save(path := picture_file(tmp_path, 0))
    with pytest.raises(UserError, match="the picture changed while the data was in use. Run again"):
        found.loaded()[0]
    again = TokenizedData.from_path(str(data), template)
    assert again.folder != found.folder and again.loaded()[0].model_inputs
    path.unlink()
    with pytest.raises(UserError, match="no such file.*put it back"):
        again.loaded()[0]
    assert TokenizedData.from_path(str(data), template, max_reject_share=0.5).report.rejected == {"broken image": 1}


def test_processors_load_without_torchvision_and_travel(tmp_path):
    """Qwen's processors want a video processor, which wants torchvision; pictures need neither."""
    from tiny_vlm import save_vlm
    from transformers import AutoConfig

    folder = save_vlm(tmp_path / "vlm", "qwen3_vl")
    vision = load_vision(str(folder), AutoConfig.from_pretrained(folder), max_pixels=512)
    again = pickle.loads(pickle.dumps(vision))
    assert vision.fingerprint == again.fingerprint and again.image_token == "<|image_pad|>"
    template, other = (
        ChatTemplate.from_pretrained(str(folder), max_pixels=512),
        ChatTemplate(again.tokenizer, vision=again),
    )
    assert template.fingerprint == other.fingerprint and template.vision is not None
    with pytest.raises(UserError, match="sees no pictures"):
        load_vision("x", AutoConfig.for_model("llama"), max_pixels=512)


def test_named_templates_write_pictures(tmp_path):
    vision = Vision(tiny_processor("qwen3_vl"))
    own = ChatTemplate(vision.tokenizer, vision=vision)
    named = ChatTemplate(vision.tokenizer, "qwen3_vl", vision=vision)
    older = ChatTemplate(vision.tokenizer, "qwen2_vl", vision=vision)
    conversation = Conversation("c", ask(words("a "), image(picture_file(tmp_path)), words("?")))
    assert named.encode(conversation).input_ids.tolist() == own.encode(conversation).input_ids.tolist()
    assert older.tokenizer.decode(older.encode(conversation).input_ids).startswith(
        "<|im_start|>system\nYou are a helpful"
    )
    deaf = ChatTemplate(vision.tokenizer, "chatml", vision=vision)
    result = deaf.encode_many([conversation])[0]
    assert isinstance(result, Reject), "a template that cannot write pictures must not lose them"
