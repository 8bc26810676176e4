"""What families with a language model for their text encoder share: the words around a caption, and their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from audit.models.families.base import Condition, ModelFamily

if TYPE_CHECKING:
    import torch

# What the published tokenizers' templates make of such messages, written out here: a template is a program, and those
# of a stranger's files are not run
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% set text = message['content'][0]['text'] %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


class Chatting(ModelFamily):
    """A family that asks its text encoder as one asks a chat model; ``template`` is what stands around a caption."""

    template: ClassVar[str] = QWEN

    def settle(self, pipeline: Any) -> None:
        """Let the tokenizers have the published template, whatever comes with the files."""
        for name in self.tokenizers:
            getattr(pipeline, name).chat_template = self.template

    def messages(self, pipeline: Any, caption: str) -> list[dict[str, Any]]:
        """The conversation that ``caption`` stands in."""
        return [{"role": "user", "content": caption}]

    def limit(self, pipeline: Any) -> int:
        """Tokens that the encoder reads, those around a caption included."""
        return min(int(getattr(pipeline, self.tokenizers[0]).model_max_length), self.longest_caption)

    def caption_tokens(self, pipeline: Any) -> int:
        """Tokens of a caption that the encoder reads."""
        return self.limit(pipeline) - self._tokens(pipeline, "")

    def is_truncated(self, pipeline: Any, caption: str) -> bool:
        """Whether the text encoder sees only the beginning of ``caption``."""
        return self._tokens(pipeline, caption) > self.limit(pipeline)

    def _tokens(self, pipeline: Any, caption: str) -> int:
        tokenizer = getattr(pipeline, self.tokenizers[0])
        text = tokenizer.apply_chat_template(
            self.messages(pipeline, caption), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(tokenizer(text, add_special_tokens=False).input_ids)


def of_their_lengths(states: Sequence[torch.Tensor], tokens: int) -> Condition:
    """The condition of captions' states [their own tokens, width], padded with zeros to ``tokens``."""
    import torch

    padded = [torch.nn.functional.pad(one, (0, 0, 0, tokens - len(one))) for one in states]
    return Condition(torch.stack(padded), lengths=tuple(len(one) for one in states))
