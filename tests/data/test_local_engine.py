"""The engine in this process: the same command, no server."""

import asyncio
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_vlm import picture_file, save_vlm

import fledge
from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.data.rejects import Reject
from fledge.data.sampling import ExtraSampling
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.errors import UserError
from fledge.regeneration.engine import PromptAnswer, PromptRequest
from fledge.regeneration.local_engine import LocalEngine, split_calls
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings

QUESTION = PromptRequest([{"role": "user", "content": "x"}], 6, 0.0, 1.0, 0)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory, make_tokenizer) -> Path:
    """A tiny llama with a byte tokenizer, saved as a checkpoint. Random weights, so answers are noise of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_of_several_turns_carry_their_tokens(tiny_dir, tmp_path):
    turns = [("human", "first"), ("gpt", "OLD"), ("human", "second"), ("gpt", "OLD")]
    rows = [{"id": f"r{i}", "conversations": [{"from": r, "value": f"{v} {i}"} for r, v in turns]} for i in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerate(
        RegenerateArgs(
            prompts=PromptSourceSettings(data=str(tmp_path / "in.jsonl"), max_reject_share=1.0),
            output_dir=tmp_path / "out",
            answers=AnswerSettings(max_new_tokens=8, temperature="1.0"),
            engines=EngineSettings(engine="transformers", model=str(tiny_dir), batch_size=5),
        )
    )
    found = [json.loads(line) for line in (tmp_path / "out" / "shard-00000.jsonl").read_text().splitlines()]
    rejected = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert len(found) + len(rejected) == 12 and len(found) >= 8
    template = ChatTemplate.from_pretrained(str(tiny_dir))
    for row in found:
        said = [{"role": "user", "content": row["conversations"][0]["value"]}]
        if len(row["conversations"]) == 4 and "input_ids" not in row:
            continue  # random bytes are tokenised otherwise in the second prompt
        ids = row.get("input_ids") or row["prompt_token_ids"] + row["token_ids"]
        assert ids[: len(template.prompt_ids(said))] == template.prompt_ids(said)
        assert "OLD" not in json.dumps(row)


def test_greedy_answers_are_the_models_own(tiny_dir):
    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=4, device="cpu") as engine:
            requests = [PromptRequest([{"role": "user", "content": f"q{i}"}], 6, 0.0, 1.0, 0, None) for i in range(6)]
            answers = await asyncio.gather(*(engine.answer(r) for r in requests), return_exceptions=True)
            return [a for a in answers if not isinstance(a, Reject)], engine._session.target.model

    answers, model = asyncio.run(ask())
    assert len(answers) >= 3
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.output_ids])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].argmax(-1).tolist()
        assert expected[len(answer.prompt_ids) - 1 : -1] == answer.output_ids


def seeded(number: int) -> list[PromptRequest]:
    """Prompts and answers of different lengths, greedy and sampled."""
    return [
        PromptRequest([{"role": "user", "content": "q" * (1 + 7 * i % 40)}], 3 + 5 * i % 17, i % 3 / 2, 0.9, seed=i)
        for i in range(number)
    ]


def test_a_row_gets_the_same_answer_in_any_company(tiny_dir):
    """Rows join as others finish; each is what `generate` says to its prompt alone."""

    async def ask(batch_size: int):
        async with LocalEngine(str(tiny_dir), batch_size=batch_size, device="cpu") as engine:
            found = await asyncio.gather(*(engine.answer(each) for each in seeded(14)), return_exceptions=True)
            stops = engine.template.stop_token_ids
            return [None if isinstance(one, Reject) else one for one in found], engine._session.target, stops

    (many, target, stops), (single, *_) = asyncio.run(ask(5)), asyncio.run(ask(1))
    answered = [(each, one) for each, one in zip(seeded(14), many, strict=True) if one is not None]
    assert many == single and len(answered) >= 10 and len({tuple(one.output_ids) for _, one in answered}) >= 8
    for each, one in answered:
        alone = generate(
            target, None, one.prompt_ids, max_new_tokens=each.max_tokens, eos_token_ids=stops,
            sampling=Sampling(each.temperature, each.top_p, seed=each.seed),
        )  # fmt: skip
        assert (one.output_ids, one.finish_reason) == (alone.token_ids, alone.finish_reason)


def test_a_stop_string_cuts_the_text_and_leaves_the_tokens_out(tiny_dir):
    """The tokens hold the stop string and no end of turn: training takes such an answer as text."""

    async def ask(**changes):
        async with LocalEngine(str(tiny_dir), batch_size=2, device="cpu") as engine:
            return await engine.answer(replace(QUESTION, max_tokens=20, **changes))

    free = asyncio.run(ask())
    stop = next(free.text[at] for at in range(2, len(free.text)) if free.text[at] not in "\ufffd" + free.text[:at])
    cut = asyncio.run(ask(extra=ExtraSampling(stop=(stop,))))
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.output_ids is None and free.output_ids[: cut.num_output_tokens] != free.output_ids


def test_questions_about_pictures_are_answered(tmp_path):
    """A server was needed for them, though the engine decodes such targets; text beside them is not disturbed."""
    folder = save_vlm(tmp_path / "target")
    part = {"type": "image", "image": str(picture_file(tmp_path))}
    asked = [[part, {"type": "text", "text": "seen"}], "seen", [part, {"type": "text", "text": "more seen"}]]

    async def ask(batch_size: int):
        async with LocalEngine(str(folder), batch_size=batch_size, device="cpu") as engine:
            requests = [PromptRequest([{"role": "user", "content": each}], 8, 0.0, 1.0, 0) for each in asked]
            found = await asyncio.gather(*(engine.answer(each) for each in requests))
            return found, fledge.load(str(folder), device="cpu")

    (together, pair), (alone, _) = asyncio.run(ask(3)), asyncio.run(ask(1))
    expected = [pair.generate([{"role": "user", "content": each}], max_new_tokens=8).token_ids for each in asked]
    assert [one.output_ids for one in together] == [one.output_ids for one in alone] == expected
    assert expected[0] != expected[1], "the picture matters"


def test_pictures_for_a_target_without_eyes_are_rejected(tiny_dir, tmp_path):
    part = {"type": "image", "image": str(picture_file(tmp_path))}

    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=2) as engine:
            await engine.answer(PromptRequest([{"role": "user", "content": [part]}], 6, 0.0, 1.0, 0))

    with pytest.raises(Reject):
        asyncio.run(ask())


def test_a_request_that_nobody_waits_for_leaves_the_session(tiny_dir):
    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=1, device="cpu") as engine:
            left = asyncio.ensure_future(engine.answer(replace(QUESTION, max_tokens=None)))
            while not engine._session.num_live:
                await asyncio.sleep(0.001)
            (state,) = engine._futures
            following = asyncio.ensure_future(engine.answer(QUESTION))
            left.cancel()
            found = await asyncio.gather(left, following, return_exceptions=True)
            return state, [type(one) for one in found]

    state, found = asyncio.run(ask())
    assert state.cancelled and not state.stopped and state.room > 0
    assert found[0] is asyncio.CancelledError and found[1] in (PromptAnswer, Reject)


def test_a_prompt_beyond_the_context_is_rejected(tiny_dir):
    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=2) as engine:
            await engine.answer(PromptRequest([{"role": "user", "content": "x" * 300}], 6, 0.0, 1.0, 0, None))

    with pytest.raises(Reject, match="context length"):
        asyncio.run(ask())


def test_a_failing_model_reaches_everybody_who_waits(tiny_dir):
    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=2) as engine:
            engine._session.step = None  # as an out-of-memory error would: the decoding thread dies
            return await asyncio.gather(*(engine.answer(QUESTION) for _ in range(5)), return_exceptions=True)

    assert all(isinstance(answer, TypeError) for answer in asyncio.run(ask()))


def test_a_failure_reaches_requests_that_nobody_has_read(tiny_dir):
    """Requests put while the decoding thread dies once waited for ever: they were in neither of its lists."""

    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=2) as engine:
            late: list[asyncio.Task] = []

            def die():
                def put():
                    late.extend(asyncio.ensure_future(engine.answer(QUESTION)) for _ in range(3))

                engine._loop.call_soon_threadsafe(put)
                while len(late) < 3 or engine._inbox.empty():
                    time.sleep(0.01)
                raise MemoryError

            engine._session.step = die
            with pytest.raises(MemoryError):
                await engine.answer(QUESTION)
            return await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), timeout=30)

    assert all(isinstance(answer, MemoryError) for answer in asyncio.run(ask()))


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match="needs --target"):
        (tmp_path / "in.jsonl").write_text('{"id": "a", "conversations": [{"from": "human", "value": "x"}]}\n')
        regenerate(
            RegenerateArgs(
                prompts=PromptSourceSettings(data=str(tmp_path / "in.jsonl")), output_dir=tmp_path / "out",
                engines=EngineSettings(engine="transformers"),
            )
        )  # fmt: skip


def test_calls_in_the_text_become_tool_calls():
    written = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    words, calls = split_calls(written)
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert (words, calls) == ("I look.", [{"id": "call_0", "type": "function", "function": function}])
    assert split_calls("no call") == ("no call", None)
    broken = '<tool_call>\n{"name": "weather", "arguments": \n</tool_call>'
    assert split_calls(broken) == (broken, None)


def test_template_variables_tools_and_extra_sampling_reach_the_model(tiny_dir, make_tokenizer, tmp_path):
    """The engine in this process rendered neither tools nor the row's template variables, and sampled without what
    generation_config asks for."""
    template = (
        "{% if tools %}<tool_call> {{ tools[0].function.name }}\n{% endif %}{{ effort }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    folder = tmp_path / "target"
    shutil.copytree(tiny_dir, folder)
    make_tokenizer(template=template).save_pretrained(folder)
    messages, tools = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "weather"}}]

    async def ask():
        async with LocalEngine(str(folder), batch_size=2, device="cpu") as engine:
            plain = PromptRequest(messages, 12, 0.0, 1.0, 0)
            told = replace(plain, chat_template_kwargs={"effort": "high"}, tools=tools)
            wild = replace(plain, temperature=50.0)
            tamed = replace(wild, extra=ExtraSampling(top_k=1))
            return [await engine.answer(each) for each in (plain, told, wild, tamed)], engine.template.tokenizer

    (plain, told, wild, tamed), tokenizer = asyncio.run(ask())
    assert tokenizer.decode(plain.prompt_ids) == "hi:"
    assert tokenizer.decode(told.prompt_ids) == "<tool_call> weather\nhighhi:"
    assert tamed.output_ids == plain.output_ids != wild.output_ids


def test_tools_of_a_template_whose_calls_are_not_read_are_refused(tiny_dir):
    async def ask():
        async with LocalEngine(str(tiny_dir), batch_size=2) as engine:
            await engine.answer(PromptRequest([{"role": "user", "content": "x"}], 6, 0.0, 1.0, 0, tools=[{}]))

    with pytest.raises(Reject, match="reads calls written as <tool_call> JSON"):
        asyncio.run(ask())
