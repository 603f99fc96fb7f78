"""Thinking on or off, in the words of the target's chat template.

Every family has a switch of its own. Which one a template understands is found by rendering a question both ways: the
switch is the first whose two prompts differ.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fledge.data.rejects import Reject
from fledge.errors import UserError

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate

QUESTION = [{"role": "user", "content": "First question"}]


@dataclass(frozen=True)
class ThinkingSwitch:
    """What a chat template is told, to think and not to think."""

    on: dict[str, Any]
    off: dict[str, Any]

    @classmethod
    def of(cls, template: "ChatTemplate") -> "ThinkingSwitch":
        """The switch that this template understands; UserError when it has none."""
        switch = next((switch for switch in SWITCHES if switch._changes_the_prompt(template)), None)
        if switch is None:
            names = dict.fromkeys(name for switch in SWITCHES for name in switch.on)
            raise UserError(
                f"--thinking: the prompt of chat template {template.name!r} is the same with thinking on and off "
                f"(tried {', '.join(names)}). Leave --thinking at default, or choose another template."
            )
        return switch

    def kwargs(self, thinking: bool | None) -> dict[str, Any]:
        """Variables of the template for this choice; none where the template decides."""
        return {} if thinking is None else self.on if thinking else self.off

    def _changes_the_prompt(self, template: "ChatTemplate") -> bool:
        try:
            return template.render(QUESTION, True, **self.on) != template.render(QUESTION, True, **self.off)
        except Reject:  # a template may refuse values it does not know
            return False


SWITCHES = (
    ThinkingSwitch({"enable_thinking": True}, {"enable_thinking": False}),  # Qwen, GLM, Hunyuan, Gemma 4, Nemotron 3
    ThinkingSwitch({"thinking": True}, {"thinking": False}),  # DeepSeek V3.1, Granite, Kimi
    ThinkingSwitch({"reasoning": True}, {"reasoning": False}),  # Command A
    ThinkingSwitch({"reasoning_effort": "high"}, {"reasoning_effort": "low"}),  # gpt-oss, which always thinks
    ThinkingSwitch({"reasoning_effort": "high"}, {"reasoning_effort": "none"}),  # Mistral
)
# For a server whose template cannot be read here: a template passes over variables that it does not know.
BOOLEAN_SWITCHES = ThinkingSwitch(
    {"enable_thinking": True, "thinking": True}, {"enable_thinking": False, "thinking": False}
)
