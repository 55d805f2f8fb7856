"""The demo's vocabulary: one token per character, saved in the format that ``AutoTokenizer`` loads."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jackpot.demo.task import DIGITS, SEPARATORS

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY: tuple[str, ...] = (PAD, EOS, UNKNOWN, *DIGITS, *SEPARATORS, "=")
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character-level tokenizer: text → ids → the same text, for all characters of the task."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save_pretrained(directory)
