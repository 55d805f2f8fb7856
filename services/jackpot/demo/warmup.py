"""Makes the models of a recipe: supervised warm-up of both, saved as Hugging Face directories, once per machine."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from jackpot.demo.examples import example_batches, prompt_tokens
from jackpot.demo.recipe import MODEL_NAMES, ModelRecipe, Recipe, models_directory
from jackpot.demo.tokenizer import EOS, PAD, TOKEN_IDS, save_tokenizer
from jackpot.errors import DeadlineError

LOCK_TIMEOUT_SECONDS = 600.0
LOCK_POLL_SECONDS = 0.1
LR_WARMUP_STEPS = 20


def make_models(recipe: Recipe, root: Path) -> Path:
    """Make both models unless the cache has them; returns the directory that holds ``policy/`` and ``actor/``.

    Safe for concurrent processes: one makes the models, the others wait for it.

    Raises:
        DeadlineError: another process holds the lock for longer than ten minutes.
    """
    directory = models_directory(recipe, root)
    if directory.is_dir():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_suffix(".lock")):
        if not directory.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
            try:
                _warm_up_both(recipe, aside)
                aside.chmod(0o755)
                aside.rename(directory)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
    return directory


def build_model(shape: ModelRecipe) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 of this shape, from torch's global generator."""
    config = Qwen3Config(
        vocab_size=len(TOKEN_IDS),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


def without_layers(model: Qwen3ForCausalLM, shape: ModelRecipe) -> Qwen3ForCausalLM:
    """A copy that keeps ``shape.num_layers`` of the model's layers, evenly spaced from the first to the last."""
    layers = model.config.num_hidden_layers
    kept = [round(index * (layers - 1) / max(1, shape.num_layers - 1)) for index in range(shape.num_layers)]
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for index, layer in enumerate(kept):
        for name, tensor in model.model.layers[layer].state_dict().items():
            state[f"model.layers.{index}.{name}"] = tensor
    copy = build_model(shape)
    copy.load_state_dict(state)
    return copy


def _warm_up_both(recipe: Recipe, directory: Path) -> None:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # its own bar, for a file of 100 kB
    made: dict[str, Qwen3ForCausalLM] = {}
    for name in MODEL_NAMES:
        shape = recipe.model(name)
        if shape.drop_layers:
            shape = recipe.shallow_actor
            model = without_layers(made["policy"], shape)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                model = build_model(shape)
        made[name] = model
        _warm_up(model, recipe, shape, f"warming up the {name} ({model.num_parameters():,} parameters)")
        target = directory / name
        model.save_pretrained(target)
        generation = {"do_sample": True, "eos_token_id": TOKEN_IDS[EOS], "pad_token_id": TOKEN_IDS[PAD]}
        GenerationConfig(**generation).save_pretrained(target)  # type: ignore[no-untyped-call]
        save_tokenizer(target)
    recipe_text = json.dumps(recipe.settings(), indent=2, sort_keys=True)
    (directory / "recipe.json").write_text(recipe_text + "\n", encoding="utf-8")


def _warm_up(model: Qwen3ForCausalLM, recipe: Recipe, shape: ModelRecipe, title: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / LR_WARMUP_STEPS))
    batches = example_batches(recipe, shape, recipe.batch_size)
    model.train()
    prompt = prompt_tokens(recipe.num_digits)
    for _ in _progress(shape.steps, title):
        tokens = torch.from_numpy(next(batches))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[:, prompt - 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()  # type: ignore[no-untyped-call]


def _progress(steps: int, title: str) -> Iterator[int]:
    """Counts steps, with a bar on a terminal and a plain line per quarter elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            yield from progress.track(range(steps), description=title)
        return
    start = time.monotonic()
    for step in range(steps):
        yield step
        if (step + 1) % max(1, steps // 4) == 0:
            seconds = time.monotonic() - start
            print(f"{title}: step {step + 1}/{steps}, {seconds:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    # A flock ends with its process, so that a killed warm-up never blocks the next one.
    deadline, announced = time.monotonic() + LOCK_TIMEOUT_SECONDS, False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not announced:
                    print("another process is making these models: waiting for it", file=sys.stderr, flush=True)
                    announced = True
                if time.monotonic() > deadline:
                    remedy = f"End the process that holds {path} or choose another JACKPOT_CACHE."
                    raise DeadlineError("another process to make the models", LOCK_TIMEOUT_SECONDS, remedy) from None
                time.sleep(LOCK_POLL_SECONDS)
        yield
