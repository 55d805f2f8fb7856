"""Inside vLLM's worker process: new weights in place, from a directory of safetensors or from the learner's broadcast.

vLLM's own transfer backends load tensors as they arrive, and need CUDA. This one follows the same lifecycle (start,
update, finish; see ``vllm.distributed.weight_transfer``), but touches the model only once the whole payload is in
memory and checked. A later failure is rolled back while generation is still paused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from jackpot.compute.hub_format import HubFormat
from jackpot.compute.model_weights import WEIGHTS_FILE, check_layout, hub_format, read_hub_tensors
from jackpot.errors import WeightCorruptError
from jackpot.rollout.vllm.broadcast_staging import Layout, Wire, join_group
from jackpot.rollout.vllm.vocabulary import cut_padding

LOG = logging.getLogger(__name__)

BACKEND = "jackpot_store"
EXTENSION = f"{__name__}.WeightReading"
# The source of a version being read.
STORE, LEARNER = "store", "learner"


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Needs no initial handshake."""


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """Which weights to apply: a directory given to :meth:`WeightReading.read_weights`, or a version received."""

    source: str


@dataclass
class _Reading:
    """One version that a thread reads or receives while sampling continues."""

    source: str
    thread: threading.Thread | None = None
    state: dict[str, Tensor] | None = None
    outcome: tuple[str, str] = ("reading", "")
    files: list[BinaryIO] = field(default_factory=list)


class StoreTransferEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Applies versions from the weight store, or from the learner's broadcast, to the model of this worker."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        cut_padding(model, vllm_config.additional_config)
        self._readings: dict[str, _Reading] = {}  # by source: the store, or the learner
        self._wire: Wire | None = None
        self._names: HubFormat | None = None
        # Open files outlive their names: the version held can be read again even after the store has pruned it.
        files = sorted(Path(self.model_config.model).glob("*.safetensors"))
        self._held: list[BinaryIO] = [path.open("rb") for path in files]
        self._held_state: Mapping[str, Tensor] | None = None  # instead of files, for a version that was broadcast
        self._touched = False
        self._applied: _Reading | None = None  # in the model, and not yet found right

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: the model stays whole until the payload has been checked."""

    def finish_weight_update(self) -> None:
        """Nothing to do: :meth:`receive_weights` leaves a whole model."""

    def shutdown(self) -> None:
        """Close files, leave the group."""
        self._close_files()
        self.leave()

    def read(self, directory: str) -> None:
        """Start reading and checking a directory, in a separate thread."""
        self._begin(STORE, directory, lambda reading: self._read(reading))

    def join(self, info: Mapping[str, Any], timeout_seconds: float) -> None:
        """Start joining a broadcast group, and leave the previous one."""
        self.leave()

        def work(reading: _Reading) -> None:
            wire = join_group(info, self.parallel_config, self.device, timeout_seconds)
            if self._readings.get(LEARNER) is reading:
                self._wire = wire
            else:  # no caller waits for it any more
                wire.close()

        self._begin(LEARNER, "", work)

    def receive(self, source: str, layout: Layout) -> None:
        """Start receiving the learner's broadcast."""

        def work(reading: _Reading) -> None:
            if self._wire is None:
                raise RuntimeError("this worker is in no broadcast group")
            reading.state = self._wire.receive(layout)

        self._begin(LEARNER, source, work)

    def leave(self) -> None:
        """Leave the broadcast group in any state, and drop what was received from it."""
        self._readings.pop(LEARNER, None)
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def check(self, layout: Layout) -> tuple[str, str]:
        """Whether these names and shapes match the model: ``ready``, or ``corrupt`` with the reason."""
        try:
            check_layout(self._expected(), {name: shape for name, _, shape in layout}, "the broadcast: ")
        except WeightCorruptError as error:
            return "corrupt", str(error)
        return "ready", ""

    def outcome(self, origin: str) -> tuple[str, str]:
        """``reading``, ``ready``, ``corrupt``, ``missing`` or ``failed``, with the error's message."""
        reading = self._readings.get(origin)
        return reading.outcome if reading else ("failed", "no weights are being read")

    def receive_weights(self, update_info: StoreUpdateInfo) -> None:
        """Apply what was read or received. On an error the model may be half updated: :meth:`roll_back`."""
        origin = next((o for o, reading in self._readings.items() if reading.source == update_info.source), None)
        if origin is None:
            raise RuntimeError(f"{update_info.source} was not read before")
        reading = self._readings.pop(origin)
        assert reading.thread is not None
        reading.thread.join()
        if reading.state is None:
            raise RuntimeError(reading.outcome[1])
        self._touched = True
        self._applied = reading
        self._apply(reading.state.items())

    def keep(self) -> None:
        """The weights applied last are right: they are what later failures roll back to."""
        if self._applied is None:
            return
        self._close_files()
        self._held = self._applied.files
        self._held_state = None if self._applied.files else self._applied.state
        self._touched, self._applied = False, None

    def roll_back(self) -> None:
        """Restore the previous weights from their source."""
        self._readings.clear()
        if not self._touched:
            return
        if self._held_state is not None:
            self._apply(self._held_state.items())
        else:
            for file in self._held:
                file.seek(0)
            self._apply(pair for file in self._held for pair in safetensors.torch.load(file.read()).items())
        self._touched, self._applied = False, None
        LOG.warning("the previous weights were restored")

    def _begin(self, origin: str, source: str, work: Callable[[_Reading], None]) -> None:
        reading = _Reading(source)
        reading.thread = threading.Thread(target=_report, args=(reading, work), name="read-weights", daemon=True)
        self._readings[origin] = reading
        reading.thread.start()

    def _close_files(self) -> None:
        for file in self._held:
            file.close()

    def _read(self, reading: _Reading) -> None:
        reading.files = [(Path(reading.source) / WEIGHTS_FILE).open("rb")]
        reading.state = read_hub_tensors(Path(reading.source), self._expected())

    def _expected(self) -> HubFormat:
        """Names and shapes of a version's tensors (vLLM fuses and packs its own), without allocating them."""
        if self._names is None:
            auto: Any = AutoModelForCausalLM
            config = AutoConfig.from_pretrained(self.model_config.model, local_files_only=True)
            # vLLM has put its own layers into the models of its transformers backend, and they look for its settings.
            with torch.device("meta"), set_current_vllm_config(self.vllm_config):
                self._names = hub_format(auto.from_config(config))
        return self._names

    def _apply(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        wanted = {name for name, _ in self.model.named_parameters()}
        with self._input_embeddings_unpacked():
            initialize_layerwise_reload(self.model)
            try:
                loaded = self.model.load_weights(tensors)
            finally:
                # Also after a failure: otherwise parameters stay unallocated, and the next attempt fails.
                finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.quantization is None and loaded is not None and wanted - loaded:
            raise RuntimeError(f"vLLM did not load {sorted(wanted - loaded)[:5]}")
        self._pack_output_layer()

    @contextmanager
    def _input_embeddings_unpacked(self) -> Iterator[None]:
        """Skip packing embeddings that are only looked up; vLLM packs them as if for matrix multiplication (CPU).

        That is a quarter of the work of a reload, with half a billion parameters and a large vocabulary.
        """
        if not any(isinstance(module, ParallelLMHead) for module in self.model.modules()):
            yield  # the embeddings are the output layer
            return
        pack = UnquantizedEmbeddingMethod.process_weights_after_loading

        def pack_outputs(method: Any, layer: torch.nn.Module) -> None:
            if isinstance(layer, ParallelLMHead):
                pack(method, layer)

        UnquantizedEmbeddingMethod.process_weights_after_loading = pack_outputs
        try:
            yield
        finally:
            UnquantizedEmbeddingMethod.process_weights_after_loading = pack

    def _pack_output_layer(self) -> None:
        """Rebuild the output layer's packed copy, which vLLM's reload omits for tied embeddings (CPU)."""
        embeddings = [module for module in self.model.modules() if isinstance(module, VocabParallelEmbedding)]
        inputs = {module.weight.data_ptr() for module in embeddings if not isinstance(module, ParallelLMHead)}
        for module in embeddings:
            tied = isinstance(module, ParallelLMHead) and module.weight.data_ptr() in inputs
            if tied and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


class WeightReading:
    """Methods added to vLLM's worker class; called with ``collective_rpc``."""

    weight_transfer_engine: StoreTransferEngine
    _weight_update_active: bool

    def read_weights(self, directory: str) -> None:
        """Start reading and checking a directory while sampling continues."""
        self.weight_transfer_engine.read(directory)

    def weights_read(self, origin: str) -> tuple[str, str]:
        """The state of reading, joining or receiving; see :meth:`StoreTransferEngine.outcome`."""
        return self.weight_transfer_engine.outcome(origin)

    def join_group(self, info: dict[str, Any], timeout_seconds: float) -> None:
        """Start joining a broadcast group while sampling continues."""
        self.weight_transfer_engine.join(info, timeout_seconds)

    def check_layout(self, layout: Layout) -> tuple[str, str]:
        """See :meth:`StoreTransferEngine.check`."""
        return self.weight_transfer_engine.check(layout)

    def receive_broadcast(self, source: str, layout: Layout) -> None:
        """Start receiving a version while sampling continues."""
        self.weight_transfer_engine.receive(source, layout)

    def leave_group(self) -> None:
        """Leave the broadcast group, even in the middle of a broadcast."""
        self.weight_transfer_engine.leave()

    def keep_weights(self) -> None:
        """See :meth:`StoreTransferEngine.keep`."""
        self.weight_transfer_engine.keep()

    def roll_back_weights(self) -> None:
        """Undo an update that failed."""
        self._weight_update_active = False
        self.weight_transfer_engine.roll_back()


def _report(reading: _Reading, work: Callable[[_Reading], None]) -> None:
    """Run a thread's work and record its outcome."""
    try:
        work(reading)
        reading.outcome = ("ready", "")
    except WeightCorruptError as error:
        reading.outcome = ("corrupt", str(error))
    except FileNotFoundError as error:
        reading.outcome = ("missing", str(error))
    except Exception as error:  # the thread's outermost frame: callers must receive any error
        LOG.exception("reading weights %s failed", reading.source)
        reading.outcome = ("failed", f"{type(error).__name__}: {error}")


def _prepare_process() -> None:
    """Set up the importing process before the model is created."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StoreTransferEngine)
    # It warns at each update about layers without weights of their own; we check by name that every tensor was loaded.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    if current_platform.is_cpu():
        from jackpot.rollout.vllm.expert_packing import pack_experts_at_each_update
        from jackpot.rollout.vllm.head_sizes import pad_head_sizes

        pad_head_sizes()
        pack_experts_at_each_update()


_prepare_process()
