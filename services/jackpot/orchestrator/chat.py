"""Renders chat templates as Hugging Face does, in a sandbox because a template comes with a downloaded model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jackpot.errors import ConfigError


class ChatTemplate:
    """One compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: ``bos_token``, ``eos_token``, …: templates refer to them by these names.

    Raises:
        ConfigError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                "policy.model", "chat template", f"does not compile ({error})", "Set task.chat_template to never."
            ) from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation up to the assistant's answer.

        Raises:
            ConfigError: the template refuses the messages, for instance because it supports no system message.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                "task.chat_template",
                [message.get("role") for message in messages],
                f"the policy's chat template refuses these messages ({error})",
                "Drop task.system_prompt, or set task.chat_template to never.",
            ) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's protocol

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
