"""Fixtures shared by all tests: tiny random models, made on the spot, and a server for the trajectory bus."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from architectures import write_random_model

# Whoever imports Triton first decides whether its interpreter takes the compiler's place: here, before anybody does.
# Not beside vLLM, which has programs of its own.
if not any(Path("/dev").glob("nvidia[0-9]*")) and importlib.util.find_spec("vllm") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Otherwise Triton 3.9 warns that the default will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

MakeModel = Callable[..., Path]

# Characters of the tiny tokenizer, after <s>, </s> and <pad>.
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/= .,?:"


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An embedded server that all tests share: each takes a job id of its own."""
    from jackpot.bus.server import EmbeddedServer

    server = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Directories in Hugging Face format with a random tiny model and a character tokenizer; each is made once.

    ``make_model("qwen3", seed=1, num_hidden_layers=2)``; architectures: those of
    architectures.py, such as qwen3 (tied embeddings) and llama (untied).
    Token ids: 0 <s>, 1 </s> (end of sequence), 2 <pad>, then one per character.
    """
    made: dict[str, Path] = {}

    def make(architecture: str = "qwen3", seed: int = 0, **settings: int) -> Path:
        key = f"{architecture}-{seed}-{sorted(settings.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp(architecture)
            _write_model(made[key], architecture, seed, settings)
        return made[key]

    return make


def _write_model(directory: Path, architecture: str, seed: int, settings: dict[str, int]) -> None:
    write_random_model(directory, architecture, seed, **{"vocab_size": 3 + len(CHARACTERS), **settings})
    _write_tokenizer(directory)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}'
    )
