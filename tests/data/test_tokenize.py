"""The mask, token by token: decoding what is supervised gives what the assistant wrote and its end of turn, no more."""

import json
import pickle

import numpy as np
import pytest
import torch

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.data.samples import Drop, Sample, conversation_id, fit, token_mask
from fledge.data.templates import TEMPLATES
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError

CHATML = ("<|im_start|>", "<|im_end|>")
END_OF_TURN = {"plain": "", 
    "hunyuan_dense": "<｜hy_place▁holder▁no▁2｜>", "hunyuan_moe": "<|eos|>", "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>", "gpt_oss": "<|return|>", "deepseek": "<｜end▁of▁sentence｜>", "mistral": "</s>",
}  # fmt: skip
VARIANTS = [(name, file, control) for name, files in TEMPLATES.items() for file, control in files]
WORDS = "¡Señor! 你好 👩‍👩‍👧\n\n```py\nx = 1\n```"


def conversation(messages, **meta) -> Conversation:
    return Conversation("c", tuple(messages), meta)


def supervised(template: ChatTemplate, sample: Sample) -> str:
    return template.tokenizer.decode(sample.input_ids[sample.loss_mask])


def runs(template: ChatTemplate, sample: Sample) -> list[str]:
    """The supervised tokens, one text per turn."""
    edges = np.flatnonzero(np.diff(np.r_[0, sample.loss_mask.numpy().astype(int), 0]))
    return [template.tokenizer.decode(sample.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.fixture
def named(make_tokenizer):
    """named(template name, its control tokens): the template over a tokenizer without one of its own."""

    def make(name: str, control, **kwargs) -> ChatTemplate:
        plain = [token for token in control if "think" in token]
        special = [token for token in control if token not in plain] + ["<｜hy_place▁holder▁no▁3｜>"]
        return ChatTemplate(make_tokenizer(special, None, eos=None, words=plain), name, **kwargs)

    return make


@pytest.mark.parametrize(("name", "file", "control"), VARIANTS, ids=[v[1] for v in VARIANTS])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_named_template_masks_exactly_the_answers(named, talk, name, file, control, system):
    template = named(name, control)
    end = END_OF_TURN.get(file, "<|im_end|>")
    lead = "<|channel|>final<|message|>" if file == "gpt_oss" else " " if file in ("mistral", "plain") else ""
    samples = template.samples(conversation(talk("One?", WORDS, "Two?", "Yes.", system=system)))
    answers = [run for sample in samples for run in runs(template, sample)]
    assert sorted(answers) == sorted([lead + WORDS + end, lead + "Yes." + end])
    for sample in samples:
        text = template.tokenizer.decode(sample.input_ids)
        assert text.count("One?") == 1 and (system is None or text.count(system) == 1)


@pytest.mark.parametrize(("name", "file", "control"), VARIANTS, ids=[v[1] for v in VARIANTS])
def test_generation_is_fed_exactly_what_precedes_the_answer(named, talk, name, file, control):
    template = named(name, control)
    sample = template.samples(conversation(talk("One?", "a", "Two?", "b", system="s")))[0]
    prompt = template.prompt_ids(talk("One?", "a", "Two?", system="s"))
    edges = np.flatnonzero(np.diff(sample.loss_mask.numpy().astype(int)))
    last = next(edge for edge in edges[::-1] if not sample.loss_mask[edge]) + 1
    thought = 6 if file == "qwen3" else 0  # <think>, 2 newlines, </think>, 2 newlines: the template's filler
    assert sample.input_ids[: last - thought].tolist() == prompt


def test_the_prompt_and_the_newline_after_the_turn_are_not_supervised(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    sample = template.encode(conversation(talk("Hi", "Hello")))
    ids = sample.input_ids.tolist()
    start = len(template.prompt_ids(talk("Hi")))
    assert sample.loss_mask.tolist() == [False] * start + [True] * (len("Hello") + 1) + [False]
    assert ids[-2] == template.end_of_turn and template.tokenizer.decode(ids[-1]) == "\n"


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_would_be_caught(make_tokenizer, talk, shift):
    """The negative control of this file: the check that holds everywhere else fails for a shifted mask."""
    template = ChatTemplate(make_tokenizer())
    sample = template.encode(conversation(talk("Hi", "Hello")))
    assert supervised(template, sample) == "Hello<|im_end|>"
    shifted = Sample("c", sample.input_ids, sample.loss_mask.roll(shift))
    assert supervised(template, shifted) != "Hello<|im_end|>"


PLAIN_TEXT = (
    "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


def test_tokens_that_merge_over_a_border_are_not_supervised(make_tokenizer, talk):
    """`Ġ` + `b` merge the prompt's space with the answer's first letter, `!` + newline its last with the template's."""
    merges = [("Ġ", "b"), ("!", "Ċ")]
    template = ChatTemplate(make_tokenizer((), PLAIN_TEXT, eos=None, merges=merges))
    sample = template.encode(conversation(talk("a", "bcd!", "e", "xyz")))
    assert runs(template, sample) == ["cd", "xyz"]
    template = ChatTemplate(make_tokenizer((), PLAIN_TEXT, eos=None))
    assert runs(template, template.encode(conversation(talk("a", "bcd!", "e", "xyz")))) == ["bcd!", "xyz"]


def test_bytes_of_one_character_are_masked_together():
    """Byte tokens of 'é' share the character's offsets; the zero-width token at a span's start belongs to it."""
    offsets = [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)]
    assert token_mask(offsets, [(1, 3)]).tolist() == [False, True, True, True, False]
    assert token_mask([], [(0, 1)]).tolist() == []


def test_an_answer_cut_by_the_length_limit_keeps_no_end_of_turn(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    cut = template.encode(conversation(talk("a", "bcd"), finish_reason="length"))
    whole = template.encode(conversation(talk("a", "bcd"), finish_reason="stop"))
    assert supervised(template, cut) == "bcd" and supervised(template, whole) == "bcd<|im_end|>"


def test_qwen3_thoughts(named, talk):
    """Each turn is supervised as the target wrote it: the earlier one in a sample of its own, with its thought."""
    template = named("qwen3", dict((f, c) for _, f, c in VARIANTS)["qwen3"])
    first, second = "<think>\n1\n</think>\n\nb", "<think>\n2\n</think>\n\nd"
    samples = template.samples(conversation(talk("a", first, "c", second)))
    assert [s.id for s in samples] == ["c", "c#turn1"] and [conversation_id(s.id) for s in samples] == ["c", "c"]
    assert [runs(template, s) for s in samples] == [[second + "<|im_end|>"], [first + "<|im_end|>"]]
    assert "1" not in template.tokenizer.decode(samples[0].input_ids)


def test_thinking_off_puts_the_empty_thought_into_the_prompt(named, talk):
    template = named("qwen3", dict((f, c) for _, f, c in VARIANTS)["qwen3"], enable_thinking=False)
    assert template.render(talk("a"), True).endswith("assistant\n<think>\n\n</think>\n\n")
    assert template.prompt_ids(talk("a")) != template.prompt_ids(talk("a"), enable_thinking=True)
    assert runs(template, template.samples(conversation(talk("a", "b")))[0]) == ["b<|im_end|>"]


HUNYUAN = [(file, control) for name, file, control in VARIANTS if name == "hunyuan"]
SLOW = "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>"


@pytest.mark.parametrize(("file", "control"), HUNYUAN, ids=[file for file, _ in HUNYUAN])
def test_hunyuan_slow_thinking_is_what_the_target_wrote(named, talk, file, control):
    """Thought and answer are one text of the assistant; asking for it with /think or /no_think is the user's text."""
    template = named("hunyuan", control)
    sample = template.encode(conversation(talk("/think One?", SLOW)))
    assert runs(template, sample) == [SLOW + END_OF_TURN[file]]


@pytest.mark.parametrize(("file", "control"), HUNYUAN, ids=[file for file, _ in HUNYUAN])
def test_hunyuan_fast_thinking_puts_the_empty_thought_into_the_prompt(named, talk, file, control):
    template = named("hunyuan", control, enable_thinking=False)
    filler = "<think>\n\n</think>\n"
    assert template.render(talk("One?"), True).endswith(filler)
    sample = template.encode(conversation(talk("One?", "Yes.")))
    assert runs(template, sample) == ["Yes." + END_OF_TURN[file]]
    start = int(sample.loss_mask.int().argmax())
    assert sample.input_ids[:start].tolist() == template.prompt_ids(talk("One?"))
    assert template.tokenizer.decode(sample.input_ids[:start]).endswith(filler)
    written = filler + "<answer>\nYes.\n</answer>"  # a row that holds the empty thought itself is not given a second
    assert template.render(talk("One?", written)).count("<think>") == 1


TOKENS = {  # file -> the tokens of user "a", assistant "b"; what is in [] is supervised
    "llama3": "<|begin_of_text|> <|start_header_id|> u s e r <|end_header_id|> \n \n a <|eot_id|> <|start_header_id|> "
              "a s s i s t a n t <|end_header_id|> \n \n [b <|eot_id|>]",
    "gemma": "<bos> <start_of_turn> u s e r \n a <end_of_turn> \n <start_of_turn> m o d e l \n [b <end_of_turn>] \n",
    "gpt_oss": "<|start|> u s e r <|message|> a <|end|> <|start|> a s s i s t a n t "
               "[<|channel|> f i n a l <|message|> b <|return|>]",
    "hunyuan_dense": "<｜hy_begin▁of▁sentence｜> <｜hy_User｜> a <｜hy_Assistant｜> [b <｜hy_place▁holder▁no▁2｜>]",
    "hunyuan_moe": "<|startoftext|> a <|extra_0|> [b <|eos|>]",
    "qwen3": "<|im_start|> u s e r \n a <|im_end|> \n <|im_start|> a s s i s t a n t \n <think> \n \n </think> \n \n "
             "[b <|im_end|>] \n",
}  # fmt: skip


@pytest.mark.parametrize("file", TOKENS)
def test_the_mask_token_by_token(named, talk, file):
    name, control = next((name, control) for name, f, control in VARIANTS if f == file)
    template = named(name, control)
    sample = template.encode(conversation(talk("a", "b")))
    inside, wanted, mask = False, [], []
    for word in TOKENS[file].split(" "):
        inside = inside or word.startswith("[")
        wanted.append(word.strip("[]"))
        mask.append(inside)
        inside = inside and not word.endswith("]")
    assert [template.tokenizer.decode([id]) for id in sample.input_ids.tolist()] == wanted
    assert sample.loss_mask.tolist() == mask


def test_gpt_oss_thoughts_are_supervised_on_their_channel(named, talk):
    """The analysis channel is part of what the target writes; the tokens between the channels are its own, too."""
    template = named("gpt_oss", dict((f, c) for _, f, c in VARIANTS)["gpt_oss"])
    messages = talk("a", "b")
    messages[-1]["reasoning_content"] = "hm"
    (written,) = runs(template, template.encode(conversation(messages)))
    assert written == (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"
    )


LEAVES_THE_PROMPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def test_a_row_that_cannot_be_masked_is_rejected_with_what_was_found(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer(template=LEAVES_THE_PROMPT))
    with pytest.raises(Reject, match="cannot be masked.*turn 1: the prompt renders as .*model.*--chat-template-type"):
        template.encode(conversation(talk("a", "b")))


def test_rows_with_token_ids_need_no_template_that_can_be_masked(make_tokenizer):
    """A probe of the template once stopped runs on rows that never went through it."""
    template = ChatTemplate(make_tokenizer(template=LEAVES_THE_PROMPT))
    sample = template.encode(Conversation("c", (), {"prompt_token_ids": [5, 6], "token_ids": [7, 8]}))
    assert sample.loss_mask.tolist() == [False, False, True, True]


def test_a_system_text_that_moves_into_the_last_message_stays_there(make_tokenizer, talk):
    """Mistral's templates write it before the last message if that is the user's: the rendered answer lacks it, and
    every row with a system text was refused."""
    late = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ messages[0].content if loop.last and "
        "m.role == 'user' and messages[0].role == 'system' else '' }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    template = ChatTemplate(make_tokenizer(template=late))
    sample = template.encode(conversation(talk("Hi", "<Six>", system="Brief. ")))
    assert template.tokenizer.decode(sample.input_ids).startswith("<|im_start|>Brief. Hi<|im_end|>")
    assert sample.input_ids[: len(sample.input_ids) - int(sample.loss_mask.sum())].tolist() == template.prompt_ids(
        talk("Hi", system="Brief. ")
    )


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ BEFORE }}{{ m.content }}{{ BEHIND }}"
    "{% endgeneration %}{{ REST }}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
)
HEAD, END = "'<|im_start|>assistant\n'", "'<|im_end|>\n'"


@pytest.mark.parametrize(
    ("before", "behind", "rest"),
    [(HEAD, END, "''"), (HEAD, "''", END), (HEAD, "'<|im_end|>'", "'\n'")],
    ids=["the whole turn", "without its end", "as it should be"],
)
@pytest.mark.parametrize(
    "prompt", ["<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", "<|im_start|>model\n"]
)
def test_generation_markers_of_any_width(make_tokenizer, talk, before, behind, rest, prompt):
    """SmolLM3's and trl's markers hold the header or the newline behind the turn, which the target does not write."""
    text = MARKED.replace("BEFORE", before).replace("BEHIND", behind).replace("REST", rest).replace("PROMPT", prompt)
    tokenizer = make_tokenizer(template=text)
    template = ChatTemplate(tokenizer, eos_token_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    wanted = ["b<|im_end|>", "d<|im_end|>"]
    if "model" in prompt:  # the prompt tells nothing, so the markers are believed
        wanted = ["<|im_start|>assistant\n" + words for words in wanted]
    assert runs(template, template.encode(conversation(talk("a", "b", "c", "d")))) == wanted
    cut = template.encode(conversation(talk("a", "b", "c", "d"), finish_reason="length"))
    assert runs(template, cut) == [wanted[0], wanted[1].removesuffix("<|im_end|>")]


def test_what_a_template_does_not_mark_is_not_supervised(make_tokenizer, talk):
    text = MARKED.replace("{{ BEFORE }}", HEADER_OUTSIDE).replace("{{ BEHIND }}", "").replace("REST", END)
    text = text.replace("PROMPT", "<|im_start|>assistant\n").replace("{% generation %}", "", 1)
    template = ChatTemplate(make_tokenizer(template=text))
    assert runs(template, template.encode(conversation(talk("a", "bcd")))) == ["cd<|im_end|>"]


HEADER_OUTSIDE = "<|im_start|>assistant\n{{ m.content[0] }}{% generation %}{% set m = {'content': m.content[1:]} %}"


def test_answers_that_a_row_excludes_are_context(make_tokenizer, talk):
    """`weight: 0` and `train: false` were ignored: the head was trained on answers marked as bad."""
    template, messages = ChatTemplate(make_tokenizer()), talk("a", "bc", "d", "ef")
    messages[1]["train"] = False
    sample = template.encode(conversation(messages))
    assert runs(template, sample) == ["ef<|im_end|>"] and "bc" in template.tokenizer.decode(sample.input_ids)
    messages[3]["train"] = False
    with pytest.raises(Drop, match="not supervised"):
        template.encode(conversation(messages))


def test_the_last_turn_only(make_tokenizer, talk):
    template, last = ChatTemplate(make_tokenizer()), ChatTemplate(make_tokenizer(), last_turn_only=True)
    row = conversation(talk("a", "bc", "d", "ef"))
    assert runs(template, template.encode(row)) == ["bc<|im_end|>", "ef<|im_end|>"]
    assert runs(last, last.encode(row)) == ["ef<|im_end|>"]
    assert last.encode(row).input_ids.tolist() == template.encode(row).input_ids.tolist()
    ids = Conversation("c", (), {"input_ids": list(range(7)), "loss_mask": [0, 1, 1, 0, 1, 1, 0]})
    assert last.encode(ids).loss_mask.tolist() == [False, False, False, False, True, True, False]
    assert last.fingerprint != template.fingerprint


def test_a_template_that_refuses_a_row_rejects_it(make_tokenizer, talk):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = ChatTemplate(make_tokenizer(template=refuses + PLAIN_TEXT))
    with pytest.raises(Reject, match="refused by the template.*System role not supported"):
        template.encode(conversation(talk("a", "b", system="s")))
    assert supervised(template, template.encode(conversation(talk("a", "bc")))) == "bc"


def test_truncation_is_stated_and_never_silent(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    whole = template.encode(conversation(talk("a", "bcdefg")))
    start = int(whole.loss_mask.nonzero()[0])
    cut = template.encode(conversation(talk("a", "bcdefg")), max_length=start + 3)
    assert (len(cut.input_ids), cut.truncated, cut.num_cut) == (start + 3, True, 4)
    assert supervised(template, cut) == "bcd" and not whole.truncated
    with pytest.raises(Drop, match=f"cut off: 1 of 7 supervised tokens lie within the first {start + 1}"):
        template.encode(conversation(talk("a", "bcdefg")), max_length=start + 1)
    newline_only = template.encode(conversation(talk("a", "bcdefg")), max_length=len(whole.input_ids) - 1)
    assert newline_only.truncated and newline_only.num_cut == 0


def test_too_few_supervised_tokens_are_dropped():
    sample = Sample("c", torch.arange(4), torch.tensor([False, False, False, True]))
    with pytest.raises(Drop, match="too short: 1 supervised tokens, at least 2"):
        fit(sample, None)
    assert fit(sample, None, min_supervised=1) is sample


def test_prompts_without_answers_and_images_are_rejected(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    with pytest.raises(Reject, match="no answer.*fledge regenerate"):
        template.encode(conversation(talk("Hi")))
    messages = [{"role": "user", "content": [{"type": "image"}]}, *talk("Hi", "Hello")[1:]]
    with pytest.raises(Reject, match="not text: message 0 has parts"):
        template.encode(conversation(messages))


def test_one_bad_conversation_does_not_disturb_its_batch(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer())
    results = template.encode_many(
        [conversation(talk("a", "bc")), conversation(talk("a")), conversation(talk("d", "ef"))]
    )
    assert [isinstance(r, Reject) for r in results] == [False, True, False]
    assert supervised(template, results[2][0]) == "ef<|im_end|>"


def test_the_models_eos_wins_over_the_tokenizers(make_tokenizer):
    """SmolLM2's GGUF tokenizer once called <|im_start|> its eos: generation would never have stopped."""
    wrong = make_tokenizer(eos="<|im_start|>")
    end = wrong.convert_tokens_to_ids("<|im_end|>")
    assert ChatTemplate(wrong).stop_token_ids == (end,)
    assert ChatTemplate(wrong, eos_token_ids=[end, 3]).stop_token_ids == (3, end)


def test_a_tokenizer_without_a_template_asks_for_one(make_tokenizer):
    with pytest.raises(UserError, match="no .*chat template. Name one with --chat-template-type"):
        ChatTemplate(make_tokenizer(template=None))


def test_slow_tokenizers_are_refused():
    with pytest.raises(UserError, match="slow tokenizer .* no character offsets"):
        ChatTemplate(object())


def test_loading_a_target(target_dir, tmp_path, talk):
    template = ChatTemplate.from_pretrained(str(target_dir))
    assert template.stop_token_ids == (template.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    with pytest.raises(UserError, match="no such folder"):
        ChatTemplate.from_pretrained(str(tmp_path / "nowhere"))
    (target_dir / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        ChatTemplate.from_pretrained(str(target_dir))


def test_rejects_survive_the_way_between_processes():
    for kind in (Reject, Drop):
        copy = pickle.loads(pickle.dumps(kind("reason", "detail")))
        assert type(copy) is kind and (copy.reason, copy.detail) == ("reason", "detail")


def test_smollm2_as_it_answered(smollm2_dir, shared_data, talk):
    """Rows vLLM generated: the mask has the tokens vLLM counted, up to re-tokenising text (9 of 10 to the token)."""
    template = ChatTemplate.from_pretrained(str(smollm2_dir))
    assert template.stop_token_ids == (2,)
    lines = (shared_data / "smollm2_regen.jsonl").read_text().splitlines()[:200]
    exact = 0
    for row in map(json.loads, lines):
        user, gpt = (turn["value"] for turn in row["conversations"])
        sample = template.encode(conversation(talk(user, gpt), finish_reason=row["finish_reason"]))
        end = "<|im_end|>" if row["finish_reason"] == "stop" else ""
        assert supervised(template, sample).strip() == (gpt.rstrip() + end).strip()
        exact += int(sample.loss_mask.sum()) == row["n"]
    assert exact > 170
