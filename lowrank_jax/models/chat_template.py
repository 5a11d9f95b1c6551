"""Chat templates: from a conversation to pieces of text, with who wrote each.

Templates come with downloaded weights, so they run in Jinja's sandbox, which keeps them from Python's
internals.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

ASSISTANT = "assistant"


class Piece(NamedTuple):
    """A stretch of rendered text and whether the assistant wrote it."""

    text: str
    by_assistant: bool


def render_pieces(
    template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], *, reply: bool = False
) -> list[Piece]:
    """Renders a conversation and cuts it where the assistant begins and ends.

    Args:
        template: Jinja source.
        messages: mappings with 'role' and 'content'.
        special: variables for the template, such as 'eos_token'.
        reply: end with the header of an assistant's message.
    Returns:
        pieces whose texts, joined, are the rendered conversation.
    Raises:
        ValueError: a faulty template or message, or a template that changes earlier text as messages are
            added.

    Example:
        >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
        ...     "{% if add_generation_prompt %}<assistant>{% endif %}")
        >>> chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        >>> render_pieces(template, chat, {})
        [Piece(text='<user>2+2?<assistant>', by_assistant=False), Piece(text='4', by_assistant=True)]
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message needs 'role' and 'content', both strings; got {dict(message)!r}.")
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            for end, header, by_assistant in ((index, True, False), (index + 1, False, True)):
                text = _render(template, messages[:end], special, header)
                pieces.append(Piece(_rest(done, text), by_assistant))
                done = text
    if reply or not messages or messages[-1]["role"] != ASSISTANT:
        pieces.append(Piece(_rest(done, _render(template, messages, special, reply)), False))
    return [piece for piece in pieces if piece.text]


def _rest(done: str, text: str) -> str:
    if not text.startswith(done):
        raise ValueError(
            "the chat template rewrites earlier text as messages are added, so the assistant's part cannot be "
            "told. Train on single exchanges, or with plain prompts."
        )
    return text[len(done) :]


def _render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], reply: bool) -> str:
    import jinja2

    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=reply, **special)
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
