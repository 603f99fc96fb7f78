"""Prompts that the target writes itself: a chat model that is given the beginning of a user's turn goes on with it
(Magpie, arXiv 2406.08464). For whom has no data, or wants prompts as the target expects them.

A prompt begins with one of OPENINGS and ends where the target ends the user's turn; one that does not end, or is hardly
more than its opening, is rejected. Which opening it is follows from `--seed` and the row's id.
"""

from typing import Any

from fledge.data.conversations import Conversation
from fledge.data.rejects import Reject
from fledge.data.sampling import ExtraSampling, TemperatureMixture, fraction
from fledge.regeneration.engine import Engine, PromptRequest
from fledge.regeneration.settings import AnswerSettings, PromptSourceSettings

LONGEST = 256  # tokens
SHORTEST = 10  # characters of what follows the opening
UNENDED, SHORT = "prompt without an end", "prompt too short"
OPENINGS = (
    "Analyze", "Are", "Calculate", "Can you", "Classify", "Compare", "Compose", "Convert", "Could you", "Create",
    "Define", "Describe", "Design", "Discuss", "Do", "Edit", "Explain", "Find", "Generate", "Give", "Given", "Help me",
    "How", "I", "I'm", "Identify", "Imagine", "In", "Is", "List", "Make", "My", "Name", "Outline", "Please", "Propose",
    "Provide", "Rewrite", "Should", "Suggest", "Summarize", "Tell me", "The", "Translate", "What", "When", "Which",
    "Who", "Why", "Write",
)  # fmt: skip


class PromptWriter:
    """Writes the rows of a run as `turns.Asker` answers them."""

    def __init__(
        self, prompts: PromptSourceSettings, answers: AnswerSettings, engine: Engine, extra: ExtraSampling
    ) -> None:
        self._system, self._answers, self._engine, self._extra = prompts.system, answers, engine, extra
        self._mixture = TemperatureMixture.parse(answers.temperature)

    async def row(self, conversation: Conversation) -> dict[str, Any]:
        """A conversation of one user's turn; `conversation` gives the id alone. Raises Reject where none came about."""
        id, answers = conversation.id, self._answers
        opening = OPENINGS[int(fraction("opening", answers.seed, id) * len(OPENINGS))]
        system = [self._system] if self._system else []
        messages = [*({"role": "system", "content": text} for text in system), {"role": "user", "content": opening}]
        request = PromptRequest(
            messages, min(answers.max_new_tokens, LONGEST),
            self._mixture.draw(answers.seed, id), answers.top_p, int(fraction("seed", answers.seed, id) * 2**31),
            extra=self._extra, continues=True,
        )  # fmt: skip
        written = await self._engine.answer(request)
        if written.finish_reason == "length":
            raise Reject(UNENDED, f"{written.num_output_tokens} tokens: {opening}{written.text[:80]}")
        if len(written.text.strip()) < SHORTEST:
            raise Reject(SHORT, opening + written.text)
        return {
            "id": id,
            "conversations": [
                *({"from": "system", "value": text} for text in system),
                {"from": "human", "value": (opening + written.text).strip()},
            ],
            "finish_reason": written.finish_reason,
            "num_prompt_tokens": written.num_prompt_tokens,
            "num_output_tokens": written.num_output_tokens,
            "sampling": {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed},
            "thinking": None,
            "model": self._engine.model,
        }
