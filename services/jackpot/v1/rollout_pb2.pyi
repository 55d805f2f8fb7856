from jackpot.v1 import trajectory_pb2 as _trajectory_pb2
from jackpot.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "max_tokens", "stop_token_ids", "top_logprobs", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("group_id", "prompt_token_ids", "num_trajectories", "sampling", "min_version")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TRAJECTORIES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    prompt_token_ids: bytes
    num_trajectories: int
    sampling: SamplingParams
    min_version: int
    def __init__(self, group_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., num_trajectories: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., min_version: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("trajectories",)
    TRAJECTORIES_FIELD_NUMBER: _ClassVar[int]
    trajectories: _containers.RepeatedCompositeFieldContainer[_trajectory_pb2.Trajectory]
    def __init__(self, trajectories: _Optional[_Iterable[_Union[_trajectory_pb2.Trajectory, _Mapping]]] = ...) -> None: ...

class RolloutServiceLoadWeightsRequest(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.LoadWeightsRequest
    def __init__(self, weights: _Optional[_Union[_weights_pb2.LoadWeightsRequest, _Mapping]] = ...) -> None: ...

class RolloutServiceLoadWeightsResponse(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.LoadWeightsResponse
    def __init__(self, weights: _Optional[_Union[_weights_pb2.LoadWeightsResponse, _Mapping]] = ...) -> None: ...

class RolloutServiceGetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RolloutServiceGetStatusResponse(_message.Message):
    __slots__ = ("engine", "role", "version", "num_running", "num_waiting", "tokens_generated", "transfer_session")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_SESSION_FIELD_NUMBER: _ClassVar[int]
    engine: str
    role: str
    version: int
    num_running: int
    num_waiting: int
    tokens_generated: int
    transfer_session: str
    def __init__(self, engine: _Optional[str] = ..., role: _Optional[str] = ..., version: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., tokens_generated: _Optional[int] = ..., transfer_session: _Optional[str] = ...) -> None: ...

class JoinTransferRequest(_message.Message):
    __slots__ = ("session", "transport", "master_address", "master_port", "rank_offset", "world_size", "packed", "packed_buffer_size_bytes", "packed_num_buffers")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    RANK_OFFSET_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    PACKED_BUFFER_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKED_NUM_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    session: str
    transport: str
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    packed: bool
    packed_buffer_size_bytes: int
    packed_num_buffers: int
    def __init__(self, session: _Optional[str] = ..., transport: _Optional[str] = ..., master_address: _Optional[str] = ..., master_port: _Optional[int] = ..., rank_offset: _Optional[int] = ..., world_size: _Optional[int] = ..., packed: bool = ..., packed_buffer_size_bytes: _Optional[int] = ..., packed_num_buffers: _Optional[int] = ...) -> None: ...

class JoinTransferResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TensorLayout(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class TransferStart(_message.Message):
    __slots__ = ("tensors",)
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorLayout]
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorLayout, _Mapping]]] = ...) -> None: ...

class TransferUpdate(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WeightProbe(_message.Message):
    __slots__ = ("token_ids", "logprobs", "initial_logprobs", "dtype")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    initial_logprobs: _containers.RepeatedScalarFieldContainer[float]
    dtype: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., initial_logprobs: _Optional[_Iterable[float]] = ..., dtype: _Optional[str] = ...) -> None: ...

class TransferFinish(_message.Message):
    __slots__ = ("probe",)
    PROBE_FIELD_NUMBER: _ClassVar[int]
    probe: WeightProbe
    def __init__(self, probe: _Optional[_Union[WeightProbe, _Mapping]] = ...) -> None: ...

class TransferWeightsRequest(_message.Message):
    __slots__ = ("session", "version", "start", "update", "finish")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    session: str
    version: int
    start: TransferStart
    update: TransferUpdate
    finish: TransferFinish
    def __init__(self, session: _Optional[str] = ..., version: _Optional[int] = ..., start: _Optional[_Union[TransferStart, _Mapping]] = ..., update: _Optional[_Union[TransferUpdate, _Mapping]] = ..., finish: _Optional[_Union[TransferFinish, _Mapping]] = ...) -> None: ...

class TransferWeightsResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...
