"""The light tokenizer against Hugging Face's own, on the same directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jackpot.errors import ConfigError
from jackpot.orchestrator.tokenizer import PromptTokenizer

CORPUS = ["What is 12 + 34? The answer is 46.", "user assistant system\n\n", "Grüße, 世界! Does it  keep spaces?"]
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if tools is not none %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}\n"
    "{% if loop.index0 > 9 %}{% break %}{% endif %}\n"
    "{% set kept = namespace(text=message['content']) %}"
    "[{{ message['role'] }}] {{ {'t': kept.text} | tojson }} {% generation %}{{ eos_token }}{% endgeneration %}"
    "{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": "Be <brief> & right."},
    {"role": "user", "content": "What is 12 + 34? Grüße "},
]


def byte_level(directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    """A GPT-2 or Qwen-like tokenizer: byte-level BPE, no beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def with_bos(directory: Path, template: str | None) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer: the post-processor puts ``<s>`` before plain prompts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


@pytest.mark.parametrize(("make", "template"), [(byte_level, CHATML), (with_bos, LLAMA)])
def test_chat_prompts_are_hugging_faces(tmp_path, make, template):
    make(tmp_path, template)
    reference = AutoTokenizer.from_pretrained(tmp_path)

    encoded = PromptTokenizer(tmp_path).encode_prompt(MESSAGES)

    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encoded.tolist() == expected
    assert encoded.dtype == np.uint32


@pytest.mark.parametrize("make", [byte_level, with_bos])
@pytest.mark.parametrize("text", ["What is 12 + 34?", "  two  spaces\n", "Grüße, 世界! 🎲", "<s>in</s> <|im_end|>"])
def test_plain_prompts_and_completions_are_hugging_faces(tmp_path, make, text):
    make(tmp_path, None)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = PromptTokenizer(tmp_path)

    encoded = tokenizer.encode_prompt(text)

    assert encoded.tolist() == reference(text)["input_ids"]
    assert tokenizer.decode(encoded) == reference.decode(encoded.tolist(), skip_special_tokens=True)


def test_never_writes_plain_prompts_although_there_is_a_template(tmp_path):
    make = with_bos(tmp_path, LLAMA)
    tokenizer = PromptTokenizer(tmp_path, "never")
    assert tokenizer.encode_prompt("12 + 34").tolist() == make("12 + 34")["input_ids"]


def test_the_system_prompt_comes_first(tmp_path):
    byte_level(tmp_path, CHATML)
    tokenizer = PromptTokenizer(tmp_path, system_prompt=MESSAGES[0]["content"])
    expected = PromptTokenizer(tmp_path).encode_prompt(MESSAGES)
    assert tokenizer.encode_prompt(MESSAGES[1]["content"]).tolist() == expected.tolist()


@pytest.mark.parametrize("place", ["jinja file", "config string", "config list", "legacy file"])
def test_templates_are_found_where_models_keep_them(tmp_path, place):
    byte_level(tmp_path, None)
    config_file = tmp_path / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    if place == "jinja file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    elif place == "legacy file":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        config_file.write_text(json.dumps(config | {"chat_template": CHATML if place == "config string" else named}))

    encoded = PromptTokenizer(tmp_path, "always").encode_prompt("Hi")

    assert PromptTokenizer(tmp_path, "never").decode(encoded) == "user\nHi\nassistant\n"


def test_a_missing_tokenizer_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json\. Save the model with a fast tokenizer") as caught:
        PromptTokenizer(tmp_path)
    assert (caught.value.field, caught.value.value) == ("policy.model", str(tmp_path))


def test_a_damaged_tokenizer_is_a_config_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        PromptTokenizer(tmp_path)


def test_always_needs_a_template(tmp_path):
    byte_level(tmp_path, None)
    with pytest.raises(ConfigError, match="has no chat template"):
        PromptTokenizer(tmp_path, "always")
    with pytest.raises(ConfigError, match="no chat template is in use"):
        PromptTokenizer(tmp_path).encode_prompt(MESSAGES)


def test_a_template_that_refuses_says_why(tmp_path):
    with_bos(tmp_path, LLAMA)
    with pytest.raises(ConfigError, match="system comes first"):
        PromptTokenizer(tmp_path).encode_prompt(list(reversed(MESSAGES)))


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    byte_level(tmp_path, "{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ConfigError, match="unsafe"):
        PromptTokenizer(tmp_path).encode_prompt("Hi")


def test_stop_strings_are_single_tokens(tmp_path):
    fast = byte_level(tmp_path, None)
    tokenizer = PromptTokenizer(tmp_path)
    eos, newline = fast.convert_tokens_to_ids("<|im_end|>"), fast("\n")["input_ids"][0]

    assert tokenizer.stop_token_ids(("\n",)) == tuple(sorted((eos, newline)))
    with pytest.raises(ConfigError, match="is 3 tokens of the policy's tokenizer") as caught:
        tokenizer.stop_token_ids(("zzz",))
    assert (caught.value.field, caught.value.value) == ("sampling.stop", "zzz")


def test_every_end_of_sequence_stops(tmp_path):
    fast = byte_level(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    eos = fast.convert_tokens_to_ids("<|im_end|>")
    assert PromptTokenizer(tmp_path).eos_token_ids == tuple(sorted({0, 7, eos}))
