"""The policy's tokenizer, using only the ``tokenizers`` library: prompts to ids, completions to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from jackpot.config import JobSpec
from jackpot.errors import ConfigError, PromptError
from jackpot.orchestrator.chat import ChatTemplate
from jackpot.orchestrator.tasks import Message, Prompt

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptTokenizer:
    """Encodes prompts and decodes completions exactly as Hugging Face's tokenizer from the same directory does.

    Args:
        model_dir: the policy's directory, with ``tokenizer.json`` and, if present, ``tokenizer_config.json``,
            ``special_tokens_map.json``, ``chat_template.jinja``, ``generation_config.json``, ``config.json``.
        chat_template: whether prompts go through the chat template; ``auto`` uses it if there is one.
        system_prompt: system message before each prompt in a chat.

    Raises:
        ConfigError: a file is missing or unreadable, or a chat template is required and there is none.
    """

    def __init__(
        self,
        model_dir: Path,
        chat_template: Literal["auto", "always", "never"] = "auto",
        system_prompt: str | None = None,
    ) -> None:
        self._tokenizer = _read_tokenizer(model_dir)
        config = _read_json(model_dir / "tokenizer_config.json")
        named = _read_json(model_dir / "special_tokens_map.json") | config
        special_tokens = {name: _token_text(named[name]) for name in SPECIAL_TOKENS if named.get(name)}
        source = None if chat_template == "never" else _template_source(model_dir, config)
        if source is None and chat_template == "always":
            raise ConfigError("task.chat_template", "always", f"{model_dir} has no chat template", "Use auto or never.")
        self._chat = None if source is None else ChatTemplate(source, special_tokens)
        self._system = () if system_prompt is None else ({"role": "system", "content": system_prompt},)
        self._eos_ids = _eos_ids(model_dir, self._tokenizer, special_tokens)

    @classmethod
    def of_job(cls, job: JobSpec) -> PromptTokenizer:
        """The tokenizer of a job's policy, with the job's chat settings."""
        return cls(Path(job.policy.model), job.task.chat_template, job.task.system_prompt)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every end-of-sequence id in the model's files, ascending."""
        return self._eos_ids

    def encode_prompt(self, prompt: Prompt) -> NDArray[np.uint32]:
        """Token ids [P] of a prompt.

        In a chat, the template adds the special tokens; for a plain prompt, the tokenizer's post-processor does.

        Raises:
            ConfigError: the chat template refuses the messages, or there is none for them.
            PromptError: the text cannot be encoded, or has no tokens.
        """
        if self._chat is not None:
            text, add_special = self._chat.render([*self._system, *_messages(prompt)]), False
        elif isinstance(prompt, str):
            text, add_special = prompt, True
        else:
            raise ConfigError(
                "task.chat_template",
                "never",
                "the task's prompts are chat messages and no chat template is in use",
                "Use a policy with a chat template, or a task with plain prompts.",
            )
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        except (UnicodeError, TypeError) as error:  # half a surrogate pair cannot be encoded
            raise PromptError(f"cannot be encoded ({error})") from None
        if not ids:
            raise PromptError("has no tokens")
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, token_ids: NDArray[np.uint32]) -> str:
        """The text of a completion [T], without special tokens."""
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def stop_token_ids(self, stop: Sequence[str]) -> tuple[int, ...]:
        """The ids that end a completion: the end-of-sequence ids and one id for each stop string.

        Raises:
            ConfigError: a stop string is not exactly one token.
        """
        return tuple(sorted({*self._eos_ids, *(self._single_token(text) for text in stop)}))

    def _single_token(self, text: str) -> int:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == 1:
            return int(ids[0])
        known = self._tokenizer.token_to_id(text)
        if known is None:
            raise ConfigError(
                "sampling.stop",
                text,
                f"is {len(ids)} tokens of the policy's tokenizer",
                "Stop strings must be single tokens; choose one, or end completions with the end-of-sequence token.",
            )
        return int(known)


def _messages(prompt: Prompt) -> Sequence[Message]:
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def _read_tokenizer(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    remedy = "Save the model with a fast tokenizer (AutoTokenizer.from_pretrained(…).save_pretrained(directory))."
    if not path.is_file():
        raise ConfigError("policy.model", str(model_dir), "has no tokenizer.json", remedy)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError("policy.model", str(path), f"cannot be read ({error})", remedy) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("policy.model", str(path), f"cannot be read ({error})", "Restore the file.") from None
    return data if isinstance(data, dict) else {}


def _token_text(token: str | Mapping[str, Any]) -> str:
    # The text, or a serialized AddedToken.
    return token if isinstance(token, str) else str(token["content"])


def _template_source(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(model_dir / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(model_dir: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> tuple[int, ...]:
    # All files count: chat models often name one end in config.json and another in the tokenizer.
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids_of_file = _read_json(model_dir / name).get("eos_token_id")
        ids.update(ids_of_file if isinstance(ids_of_file, list) else [] if ids_of_file is None else [ids_of_file])
    eos = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return tuple(sorted(ids if eos is None else ids | {eos}))
