"""`--own-prompts`: the target writes the prompts."""

import asyncio

import pytest
from fakes.openai_server import MODEL, FakeServer, ServerThread
from regenerating import rejects_of, rows_of
from stock_templates import FAMILIES, stock_tokenizer

from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.data.conversations import read_conversations
from fledge.data.rejects import Rejects
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError
from fledge.regeneration.engine import PromptRequest
from fledge.regeneration.local_engine import LocalEngine
from fledge.regeneration.own_prompts import OPENINGS
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings


def written(body: dict) -> dict:
    """How the server goes on: a draw in three has no end, one in three is a word."""
    seed = body["seed"] % 3
    text = [f" goes on until {body['seed']}", " so", " goes on and on"][seed]
    return {"message": {"content": text}, "finish_reason": "length" if seed == 2 else "stop"}


@pytest.fixture
def server():
    thread = ServerThread(FakeServer(reply=written))
    yield thread
    thread.stop()


def write_prompts(out, url, number=30, seed=42, **prompts):
    regenerate(RegenerateArgs(
        prompts=PromptSourceSettings(own_prompts=number, **prompts), output_dir=out,
        answers=AnswerSettings(temperature="1.0", seed=seed), engines=EngineSettings(server=(url,)),
    ))  # fmt: skip
    return rows_of(out)


def test_the_target_is_asked_to_go_on_with_a_users_turn(server, tmp_path):
    rows = write_prompts(tmp_path / "out", server.url, system="Be short.")
    bodies = {body["seed"]: body for body in server.server.bodies}
    assert len(bodies) == 30 and len({body["messages"][-1]["content"] for body in bodies.values()}) > 10
    for body in bodies.values():
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["messages"][1]["content"] in OPENINGS
    for row in rows:
        body = bodies[row["sampling"]["seed"]]
        assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0, "seed": body["seed"]} and row["model"] == MODEL
        said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        assert said == [
            ("system", "Be short."),
            ("human", body["messages"][1]["content"] + written(body)["message"]["content"]),
        ]
    ends = {"prompt without an end": 2, "prompt too short": 1}
    found = rejects_of(tmp_path / "out")
    assert len(rows) + len(found) == 30 and {reason for _, reason in found} == set(ends)
    for reason, remainder in ends.items():
        assert sum(name == reason for _, name in found) == sum(seed % 3 == remainder for seed in bodies)


def test_what_was_written_is_data_for_a_second_run(server, tmp_path):
    rows = write_prompts(tmp_path / "prompts", server.url)
    read = list(read_conversations(str(tmp_path / "prompts"), rejects=Rejects()))
    assert [one.id for one in read] == [row["id"] for row in rows] and all(one.num_answers == 0 for one in read)
    server.server.reply = None
    regenerate(RegenerateArgs(
        prompts=PromptSourceSettings(data=str(tmp_path / "prompts"), deduplicate=True), output_dir=tmp_path / "out",
        engines=EngineSettings(server=(server.url,)),
    ))  # fmt: skip
    answered = rows_of(tmp_path / "out")
    assert [row["conversations"][0] for row in answered] == [row["conversations"][0] for row in rows]
    assert all(row["conversations"][1]["from"] == "gpt" for row in answered)


def test_a_run_is_continued_only_as_it_was_begun(server, tmp_path):
    first = write_prompts(tmp_path / "out", server.url)
    asked = len(server.server.bodies)
    assert write_prompts(tmp_path / "out", server.url) == first and len(server.server.bodies) == asked
    for changed in ({"number": 31}, {"seed": 43}, {"system": "Be long."}):
        with pytest.raises(UserError, match="output-dir"):
            write_prompts(tmp_path / "out", server.url, **changed)
    assert write_prompts(tmp_path / "other", server.url, seed=43) != first


@pytest.mark.parametrize(
    ("prompts", "said"),
    [({}, "--own-prompts N"), ({"data": "d", "own_prompts": 2}, "give one of"),
     ({"own_prompts": 2, "deduplicate": True}, "--deduplicate, --thinking: for the run that answers"),
     ({"own_prompts": 2, "columns": ("a=b",), "max_samples": 1, "system": "s"}, "--max-samples")],
)  # fmt: skip
def test_flags_of_the_other_run_are_refused(tmp_path, prompts, said):
    """Every flag that a run of prompts would not obey."""
    with pytest.raises(UserError, match=said):
        regenerate(RegenerateArgs(
            prompts=PromptSourceSettings(**prompts), output_dir=tmp_path / "out", answers=AnswerSettings(thinking="on")
        ))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_in_process_the_prompt_ends_within_the_users_turn(tiny_model_dir):
    """The tokens are those of the template's text up to the opening; the answer is their continuation."""

    async def ask():
        async with LocalEngine(str(tiny_model_dir), batch_size=2, device="cpu") as engine:
            request = PromptRequest([{"role": "user", "content": "Write"}], 6, 0.0, 1.0, 0, continues=True)
            answer = await engine.answer(request)
            whole = engine.template.render([{"role": "user", "content": "Write"}])
            return answer, engine._session.target, whole

    answer, target, whole = asyncio.run(ask())
    text = target.tokenizer.decode(answer.prompt_ids)
    assert text.endswith("Write") and whole.startswith(text) and len(whole) > len(text)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_template_can_be_left_unfinished(name, make_tokenizer):
    """A template that strips or moves a user's words would lose the place where they end."""
    template = ChatTemplate(stock_tokenizer(name, make_tokenizer))
    ids = template.unfinished_ids([{"role": "user", "content": "Tell me"}])
    text = template.tokenizer.decode(ids)
    assert text.endswith("Tell me") and template.render([{"role": "user", "content": "Tell me"}]).startswith(text)
