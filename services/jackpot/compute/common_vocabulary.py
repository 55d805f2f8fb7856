"""The token ids that policy and actor share. Reads only JSON; no torch: the control plane looks, too.

Models of one family share a tokenizer, but may pad its vocabulary to different numbers of rows (151,936 and 152,064 in
Qwen2.5). A row that one of the two lacks has probability 0 in that one, so that no id there can be sampled, accepted
or learned from. The first rows that both have are therefore the vocabulary: everywhere, of both models, the softmax is
over these.
"""

from __future__ import annotations

from pathlib import Path

from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import text_part
from jackpot.storage.model_files import COMPLETE, read_json


def common_vocabulary(job: JobSpec) -> int:
    """V, the number of token ids that policy and actor have both; the policy's where it samples for itself.

    Args:
        job: the job as resolved: models are directories.

    Raises:
        ConfigError: a config.json does not state vocab_size.
    """
    policy = vocabulary_rows("policy.model", job.policy.model)
    return policy if isinstance(job.actor, str) else min(policy, vocabulary_rows("actor.model", job.actor.model))


def vocabulary_rows(field: str, model: str) -> int:
    """Rows of a model's output layer, padding included, by its config.json.

    Args:
        field: the setting that names the model, for the message.
        model: its directory.

    Raises:
        ConfigError: it is no directory, or its config.json cannot be read or does not state vocab_size.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(field, model, "is not a directory", "Give a directory in Hugging Face format.")
    rows = text_part(read_json(field, directory / "config.json")).get("vocab_size")
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(field, model, "its config.json does not state vocab_size", COMPLETE)
    return rows
