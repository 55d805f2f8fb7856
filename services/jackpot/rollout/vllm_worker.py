"""Inside vLLM's worker process: new weights from a directory of safetensors, in place.

vLLM's own transfer backends need CUDA. This one follows the same lifecycle (start, update, finish; see
``vllm.distributed.weight_transfer``), so that NCCL can stand in its place. Nothing in the model is touched before the
whole payload has been read and checked; what fails afterwards is rolled back while generation is still paused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from jackpot.errors import WeightCorruptError
from jackpot.runtime.models import WEIGHTS_FILE, read_state

LOG = logging.getLogger(__name__)

BACKEND = "jackpot_store"
EXTENSION = f"{__name__}.WeightReading"


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed upon beforehand."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """Which directory's weights to apply; it has been given to :meth:`WeightReading.read_weights`."""

    directory: str


@dataclass
class _Reading:
    """One directory being read by a thread, while sampling goes on."""

    directory: str
    thread: threading.Thread | None = None
    state: dict[str, Tensor] | None = None
    outcome: tuple[str, str] = ("reading", "")
    files: list[BinaryIO] = field(default_factory=list)


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Applies directories of the weight store to the model of this worker."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._reading: _Reading | None = None
        self._layout: Any = None
        # Open files outlive their names: the version held can be read again even after the store has pruned it.
        files = sorted(Path(self.model_config.model).glob("*.safetensors"))
        self._held: list[BinaryIO] = [path.open("rb") for path in files]
        self._touched = False

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: the model stays whole until the payload has been checked."""

    def finish_weight_update(self) -> None:
        """Nothing to do: :meth:`receive_weights` leaves a whole model."""

    def shutdown(self) -> None:
        """Close files."""
        for file in self._held:
            file.close()

    def read(self, directory: str) -> None:
        """Begin to read and check a directory, in a thread of its own."""
        reading = _Reading(directory)
        reading.thread = threading.Thread(target=self._read, args=(reading,), name="read-weights", daemon=True)
        self._reading = reading
        reading.thread.start()

    def outcome(self) -> tuple[str, str]:
        """``reading``, ``ready``, ``corrupt``, ``missing`` or ``failed``, with the error's message."""
        return self._reading.outcome if self._reading else ("failed", "no weights are being read")

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        """Apply what was read. On an error the model may be half updated: :meth:`roll_back`."""
        reading, self._reading = self._reading, None
        if reading is None or reading.directory != update_info.directory:
            raise RuntimeError(f"{update_info.directory} was not read before")
        assert reading.thread is not None
        reading.thread.join()
        if reading.state is None:
            raise RuntimeError(reading.outcome[1])
        self._touched = True
        self._apply(reading.state.items())
        self._touched = False
        self.shutdown()
        self._held = reading.files

    def roll_back(self) -> None:
        """Hold the previous weights again, from the files that they came from."""
        self._reading = None
        if not self._touched:
            return
        for file in self._held:
            file.seek(0)
        self._apply(pair for file in self._held for pair in safetensors.torch.load(file.read()).items())
        self._touched = False
        LOG.warning("the previous weights were restored")

    def _read(self, reading: _Reading) -> None:
        try:
            reading.files = [(Path(reading.directory) / WEIGHTS_FILE).open("rb")]
            reading.state = read_state(self._expected(), Path(reading.directory))
            reading.outcome = ("ready", "")
        except WeightCorruptError as error:
            reading.outcome = ("corrupt", str(error))
        except FileNotFoundError as error:
            reading.outcome = ("missing", str(error))
        except Exception as error:  # the border of the thread: whoever waits must hear of it
            LOG.exception("reading %s failed", reading.directory)
            reading.outcome = ("failed", f"{type(error).__name__}: {error}")

    def _expected(self) -> Any:
        """Names and shapes of the model as its trainer sees it (vLLM fuses and packs its own), without memory."""
        if self._layout is None:
            auto: Any = AutoModelForCausalLM
            config = AutoConfig.from_pretrained(self.model_config.model, local_files_only=True)
            with torch.device("meta"):
                self._layout = auto.from_config(config)
        return self._layout

    def _apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        wanted = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        try:
            loaded = self.model.load_weights(tensors)
        finally:
            # Also after a failure: otherwise parameters stay without memory and the next attempt starts from those.
            finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.quantization is None and loaded is not None and wanted - loaded:
            raise RuntimeError(f"vLLM did not take up {sorted(wanted - loaded)[:5]}")
        self._pack_output_layer()

    def _pack_output_layer(self) -> None:
        """Make the output layer's packed copy anew. vLLM's reload forgets it where embeddings are tied (CPU)."""
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


class WeightReading:
    """Methods added to vLLM's worker class; called with ``collective_rpc``."""

    weight_transfer_engine: StoreTransferEngine
    _weight_update_active: bool

    def read_weights(self, directory: str) -> None:
        """Begin to read and check a directory; sampling goes on meanwhile."""
        self.weight_transfer_engine.read(directory)

    def weights_read(self) -> tuple[str, str]:
        """How far reading is: see :meth:`StoreTransferEngine.outcome`."""
        return self.weight_transfer_engine.outcome()

    def roll_back_weights(self) -> None:
        """Undo an update that failed."""
        self._weight_update_active = False
        self.weight_transfer_engine.roll_back()


def _prepare_process() -> None:
    """What has to be in place before the model is made, in whichever process imports this."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StoreTransferEngine)
    # It warns at each update of layers that have no weights of their own; we check by name what was not taken up.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    if current_platform.is_cpu():
        from jackpot.rollout.vllm_head_sizes import pad_head_sizes

        pad_head_sizes()


_prepare_process()
