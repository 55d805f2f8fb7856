from jackpot.v1 import trajectory_pb2 as _trajectory_pb2
from jackpot.v1 import weights_pb2 as _weights_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TokenScores(_message.Message):
    __slots__ = ("target_logprobs", "acceptance_probs", "mask", "normalizer_head", "normalizer_tail", "topk_mass")
    TARGET_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTANCE_PROBS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    NORMALIZER_HEAD_FIELD_NUMBER: _ClassVar[int]
    NORMALIZER_TAIL_FIELD_NUMBER: _ClassVar[int]
    TOPK_MASS_FIELD_NUMBER: _ClassVar[int]
    target_logprobs: bytes
    acceptance_probs: bytes
    mask: bytes
    normalizer_head: bytes
    normalizer_tail: bytes
    topk_mass: bytes
    def __init__(self, target_logprobs: _Optional[bytes] = ..., acceptance_probs: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., normalizer_head: _Optional[bytes] = ..., normalizer_tail: _Optional[bytes] = ..., topk_mass: _Optional[bytes] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: _trajectory_pb2.Group
    def __init__(self, group: _Optional[_Union[_trajectory_pb2.Group, _Mapping]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("group_id", "scores", "obrs_lambda", "policy_version", "normalizer")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    OBRS_LAMBDA_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    NORMALIZER_FIELD_NUMBER: _ClassVar[int]
    group_id: str
    scores: _containers.RepeatedCompositeFieldContainer[TokenScores]
    obrs_lambda: float
    policy_version: int
    normalizer: str
    def __init__(self, group_id: _Optional[str] = ..., scores: _Optional[_Iterable[_Union[TokenScores, _Mapping]]] = ..., obrs_lambda: _Optional[float] = ..., policy_version: _Optional[int] = ..., normalizer: _Optional[str] = ...) -> None: ...

class ScoringServiceLoadWeightsRequest(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.LoadWeightsRequest
    def __init__(self, weights: _Optional[_Union[_weights_pb2.LoadWeightsRequest, _Mapping]] = ...) -> None: ...

class ScoringServiceLoadWeightsResponse(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _weights_pb2.LoadWeightsResponse
    def __init__(self, weights: _Optional[_Union[_weights_pb2.LoadWeightsResponse, _Mapping]] = ...) -> None: ...

class ScoringServiceGetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScoringServiceGetStatusResponse(_message.Message):
    __slots__ = ("version", "obrs_lambda", "tokens_scored")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OBRS_LAMBDA_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SCORED_FIELD_NUMBER: _ClassVar[int]
    version: int
    obrs_lambda: float
    tokens_scored: int
    def __init__(self, version: _Optional[int] = ..., obrs_lambda: _Optional[float] = ..., tokens_scored: _Optional[int] = ...) -> None: ...
