"""Named templates: each renders its family's public format, and none is used on a tokenizer it does not fit."""

import shutil

import pytest

from fledge.cli import run_command
from fledge.data.conversations import Conversation
from fledge.data.templates import ALIASES, OWN, TEMPLATES, fitting_template, read_template, template_name
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError

CHATML = ("<|im_start|>", "<|im_end|>")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
RENDERED = {  # user a, assistant b, user c, with the generation prompt, after the system message s
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
              "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    "hunyuan_dense": "<｜hy_begin▁of▁sentence｜>s<｜hy_place▁holder▁no▁3｜><｜hy_User｜>a<｜hy_Assistant｜>b"
                     "<｜hy_place▁holder▁no▁2｜><｜hy_User｜>c<｜hy_Assistant｜>",
    "hunyuan_moe": "<|startoftext|>s<|extra_4|>a<|extra_0|>b<|eos|><|startoftext|>c<|extra_0|>",
    "llama3": "<|begin_of_text|>" + HEADER.format("system") + "s<|eot_id|>" + HEADER.format("user") + "a<|eot_id|>"
              + HEADER.format("assistant") + "b<|eot_id|>" + HEADER.format("user") + "c<|eot_id|>"
              + HEADER.format("assistant"),
    "gemma": "<bos><start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
             "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
    "gpt_oss": "<|start|>system<|message|>s<|end|><|start|>user<|message|>a<|end|>"
               "<|start|>assistant<|channel|>final<|message|>b<|end|><|start|>user<|message|>c<|end|><|start|>assistant",
    "deepseek": "<｜begin▁of▁sentence｜>s<｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜>",
    "mistral": "<s>[INST] s\n\na [/INST] b</s>[INST] c [/INST]",
    "plain": "s\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant:",
}  # fmt: skip
RENDERED |= dict.fromkeys(("qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl", "smollm2"), RENDERED["chatml"])
VARIANTS = [(name, file, control) for name, files in TEMPLATES.items() for file, control in files]


@pytest.mark.parametrize(("name", "file", "control"), VARIANTS, ids=[v[1] for v in VARIANTS])
def test_the_public_format(make_tokenizer, talk, name, file, control):
    template = ChatTemplate(make_tokenizer(control, None, eos=None), name)
    assert template.render(talk("a", "b", "c", system="s"), True) == RENDERED[file]


@pytest.mark.parametrize(("name", "who"), [("qwen2", "You are Qwen"), ("smollm2", "named SmolLM"),
                                             ("qwen2_5_vl", "You are a helpful assistant.")])  # fmt: skip
def test_families_with_a_default_system_message(make_tokenizer, talk, name, who):
    _, control = TEMPLATES[name][0]
    assert who in ChatTemplate(make_tokenizer(control, None), name).render(talk("a"))


def test_a_name_overrides_the_tokenizers_own(make_tokenizer, talk):
    tokenizer = make_tokenizer(template="own {{ messages[0].content }}")
    own, chatml = ChatTemplate(tokenizer), ChatTemplate(tokenizer, "chatml")
    assert own.render(talk("a")) == "own a" and chatml.render(talk("a")).startswith("<|im_start|>")
    assert own.fingerprint != chatml.fingerprint and (own.name, chatml.name) == ("own", "chatml")


@pytest.mark.parametrize("name", ["Qwen2.5", "SmolLM2", "QWEN", *sorted(ALIASES.keys() - {"hunyuan_vl"})])
def test_spellings(make_tokenizer, name):
    every = [token for files in TEMPLATES.values() for _, control in files for token in control]
    assert read_template(name, make_tokenizer(sorted(set(every)), None, eos=None))


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "qwen3_vl", "hunyuan", "hunyuan-7b", "hunyuan_7b", "hunyuan_vl",
                                  "qwen2_audio"])  # fmt: skip
def test_every_name_of_angelslim_is_known(name):
    assert template_name(name) in {*TEMPLATES, OWN}


def test_a_name_that_means_the_models_own(make_tokenizer, talk):
    template = ChatTemplate(make_tokenizer(template="own {{ messages[0].content }}"), "hunyuan_vl")
    assert template.render(talk("a")) == "own a" and template.name == template_name(None) == "own"


def test_a_wrong_name_is_told_before_the_target_is_loaded(tiny_model_dir, tmp_path, capsys):
    """The weights were read first, and they may take minutes."""
    shutil.copytree(tiny_model_dir, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--target", str(tmp_path / "target"), "--prompt", "a", "--chat-template-type"]
    assert run_command("decode", [*words, "quen3"]) == 2
    assert "did you mean 'qwen3'" in capsys.readouterr().err
    assert run_command("decode", [*words, "llama3"]) == 1
    assert "'llama3' does not fit this tokenizer" in capsys.readouterr().err
    assert run_command("decode", [*words, "chatml"]) == 1  # control: what fits goes on to the weights, and has none
    assert "could not be loaded" in capsys.readouterr().err


def test_an_unknown_name_names_the_nearest(make_tokenizer):
    with pytest.raises(UserError, match="'quen3' is unknown .did you mean 'qwen3'.*Known: chatml, "):
        ChatTemplate(make_tokenizer(), "quen3")


def test_a_template_of_another_family_must_not_train(make_tokenizer):
    """Its control tokens would be taken apart into ordinary text: loss falls, the head is worthless."""
    with pytest.raises(
        UserError, match="'llama3' does not fit this tokenizer: '<|begin_of_text|>'.*are no control token"
    ):
        ChatTemplate(make_tokenizer(), "llama3")
    with pytest.raises(UserError, match="'<think>', '</think>'"):
        ChatTemplate(make_tokenizer(), "qwen3")


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral", "plain"])
def test_a_template_for_a_tokenizer_without_one(make_tokenizer, talk, name):
    """Of a base model; GPT-2's tokenizer, for one, has no control token but the end of a text."""
    ((_, control),) = TEMPLATES[name]
    tokenizer = make_tokenizer(control, None)
    assert fitting_template(tokenizer) == name
    assert ChatTemplate(tokenizer, name).render(talk("a"), True)


def test_plain_text_ends_as_the_model_ends_it(make_tokenizer, talk):
    """And what is learned from it are the answers with their end."""
    template = ChatTemplate(make_tokenizer(("<|endoftext|>",), None, eos="<|endoftext|>"), "plain")
    assert template.render(talk("a", "b")) == "User: a\n\nAssistant: b<|endoftext|>\n\n"
    sample = template.encode(Conversation("c", talk("a", "b")))
    assert template.tokenizer.decode(sample.input_ids[sample.loss_mask]) == " b<|endoftext|>"


def test_hunyuan_takes_the_format_whose_tokens_exist(make_tokenizer, talk):
    for file, control in TEMPLATES["hunyuan"]:
        template = ChatTemplate(make_tokenizer(control, None, eos=None), "hunyuan")
        assert template.render(talk("a", "b", "c", system="s"), True) == RENDERED[file]
