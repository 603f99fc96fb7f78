"""What servers say when prompt and answer do not fit, in their own words, and what is asked next."""

import pytest

from fledge.data.rejects import Reject
from fledge.regeneration.chat_completions import CONTEXT_ERROR, ContextTooLong, room, shorter
from fledge.regeneration.engine import PromptRequest

# (who says it, the whole message, room for the answer)
WORDINGS = [
    (
        "vLLM 0.6",
        "This model's maximum context length is 16384 tokens. However, you requested 22946 tokens (12946 in the "
        "messages, 10000 in the completion). Please reduce the length of the messages or completion.",
        3438,
    ),
    (
        "vLLM 0.9",
        "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is 10240 "
        "tokens and your request has 531 input tokens (32000 > 10240 - 531).",
        9709,
    ),
    (
        "vLLM 0.15",
        "This model's maximum context length is 2048 tokens. However, your request has 8 input tokens plus 2045 "
        "'max_tokens'. Please reduce one or the other. (parameter=input_tokens, max_tokens, value=(8, 2045))",
        2040,
    ),
    (
        "SGLang",
        "Requested token count exceeds the model's maximum context length of 262144 tokens. You requested a total of"
        " 337844 tokens: 206772 tokens from the input messages and 131072 tokens for the completion. Please reduce "
        "the number of tokens in the input messages or the completion to fit within the limit.",
        55372,
    ),
    (
        "SGLang, answer",
        "max_completion_tokens is too large: 9000.This model supports at most 8192 completion tokens.",
        8192,
    ),
    (
        "TGI",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1887 `inputs` tokens and"
        " 1024 `max_new_tokens`",
        161,
    ),
    (
        "TGI, answer",
        "Input validation error: `max_new_tokens` must be <= 192. Given: 1024",
        192,
    ),
    (
        "OpenAI",
        "This model's maximum context length is 4097 tokens. However, you requested 4203 tokens (3703 in the "
        "messages, 500 in the completion). Please reduce the length of the messages or completion.",
        394,
    ),
    (
        "OpenAI, tools",
        "This model's maximum context length is 4097 tokens. However, you requested 4697 tokens (3500 in the "
        "messages, 197 in the functions, and 1000 in the completion).",
        400,
    ),
    (
        "OpenAI, prompt",
        "This model's maximum context length is 2049 tokens, however you requested 2254 tokens (1749 in your prompt;"
        " 505 for the completion). Please reduce your prompt; or completion length.",
        300,
    ),
    (
        "OpenAI, answer",
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens, whereas you provided "
        "100000.",
        16384,
    ),
    (
        "llama.cpp",
        "request (4000 tokens) exceeds the available context size (4096 tokens), try increasing it",
        96,
    ),
]
HOPELESS = [
    (
        "vLLM, V0 and V1",
        "The decoder prompt (length 12324) is longer than the maximum model length of 8192. Make sure that "
        "`max_model_len` is no smaller than the number of text tokens.",
    ),
    (
        "vLLM 0.15",
        "This model's maximum context length is 32768 tokens. However, your request has 40000 input tokens. Please "
        "reduce the length of the input messages.",
    ),
    (
        "vLLM 0.20",
        "This model's maximum context length is 1024 tokens. However, you requested 0 output tokens and your prompt "
        "contains at least 1025 input tokens, for a total of at least 1025 tokens. Please reduce the length of the "
        "input prompt or the number of requested output tokens. (parameter=input_tokens, value=1025)",
    ),
    (
        "SGLang",
        "The input (516368 tokens) is longer than the model's context length (262144 tokens).",
    ),
    (
        "SGLang, memory",
        "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens). Use a shorter input or "
        "enable --allow-auto-truncate.",
    ),
    (
        "TGI",
        "Input validation error: `inputs` must have less than 1024 tokens. Given: 1168",
    ),
    (
        "OpenAI",
        "This model's maximum context length is 8192 tokens. However, your messages resulted in 8202 tokens. Please "
        "reduce the length of the messages.",
    ),
]
PARTLY_COUNTED = [
    "This model's maximum context length is 128000 tokens. However, you requested 65535 output tokens and your "
    "prompt contains at least 62466 input tokens, for a total of at least 128001 tokens. Please reduce the length of"
    " the input prompt or the number of requested output tokens. (parameter=input_tokens, value=62466)",
    "You passed 98305 input tokens and requested 32768 output tokens. However, the model's context length is only "
    "131072 tokens, resulting in a maximum input length of 98304 tokens. Please reduce the length of the input "
    "prompt.",
]


def request(max_tokens: int | None = 200_000) -> PromptRequest:
    return PromptRequest([{"role": "user", "content": "q"}], max_tokens, 0.7, 1.0, 0)


@pytest.mark.parametrize("text, left", [case[1:] for case in WORDINGS], ids=[case[0] for case in WORDINGS])
def test_the_answer_gets_the_room_that_is_left(text, left):
    """SGLang's and TGI's words were not understood: rows near the limit were rejected, or asked again and again with
    half the length each time."""
    assert CONTEXT_ERROR.search(text) and room(text) == left
    assert shorter(request(), ContextTooLong(text, room(text))).max_tokens == left


@pytest.mark.parametrize("text", [case[1] for case in HOPELESS], ids=[case[0] for case in HOPELESS])
def test_a_prompt_that_cannot_fit_is_rejected_at_once(text):
    assert CONTEXT_ERROR.search(text)
    with pytest.raises(Reject, match="context length"):
        shorter(request(1000), ContextTooLong(text, room(text)))


@pytest.mark.parametrize("text", PARTLY_COUNTED, ids=["vLLM 0.20", "vLLM 0.18"])
def test_a_prompt_that_was_counted_in_part_is_asked_for_all_that_is_left(text):
    """vLLM's count ends one token above what fits: taken as the prompt's length it cost a request per token."""
    assert CONTEXT_ERROR.search(text)
    again = shorter(request(), ContextTooLong(text, room(text)))
    assert again.max_tokens is None
    with pytest.raises(Reject, match="context length"):
        shorter(again, ContextTooLong(text, room(text)))


def test_unknown_words_halve_the_answer_until_it_is_hopeless():
    unknown = ContextTooLong("too many tokens", None)
    assert shorter(request(1000), unknown).max_tokens == 500
    with pytest.raises(Reject, match="context length"):
        shorter(request(31), unknown)


@pytest.mark.parametrize("text", ["temperature must be at least 0", "Unknown model: x", "invalid tool schema"])
def test_other_refusals_are_no_context_errors(text):
    assert not CONTEXT_ERROR.search(text) and room(text) is None
