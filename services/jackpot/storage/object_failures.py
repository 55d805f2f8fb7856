"""Translates the S3 client's errors into ours, which name the problem, the object and the remedy."""

from __future__ import annotations

from typing import Any

from jackpot.errors import (
    ObjectConflictError,
    ObjectMissingError,
    ObjectRefusedError,
    ObjectStoreError,
    ObjectUnavailableError,
)

_CREDENTIALS = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or give pod or machine a role), and "
    "AWS_ENDPOINT_URL where the store is not AWS's."
)
_NO_BUCKET = "Create it, or correct weights.store; for a store that is not AWS's set AWS_ENDPOINT_URL."
NO_RIGHT = "Allow s3:GetObject, PutObject, DeleteObject, AbortMultipartUpload on the prefix, ListBucket on the bucket."
NO_CONDITIONS = "Use a store that supports conditional writes (If-Match, If-None-Match)."
_REMEDIES = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": "Renew the session token.",
    "RequestTimeTooSkewed": "Set this machine's clock.",
    "NotImplemented": NO_CONDITIONS,
}


def failures() -> tuple[type[Exception], ...]:
    """The client's errors when the store, the network or the credentials are at fault."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    return (BotoCoreError, ClientError, Boto3Error, RetriesExceededError)


def translated(error: Exception, done: str, where: str) -> ObjectStoreError:
    """One of :func:`failures` as our own error, with its remedy.

    Args:
        error: the client's error.
        done: the attempted operation on the object, as a participle: ``read``, ``written``, …
        where: the object's address.
    """
    from botocore import exceptions as botocore

    if isinstance(error, botocore.ClientError):
        return _of_answer(error, done, where)
    no_credentials = (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError,
        botocore.ProfileNotFound,
        botocore.TokenRetrievalError,
    )
    if isinstance(error, no_credentials):
        return ObjectRefusedError(f"{where} cannot be {done}: no credentials ({flat(error)}). {_CREDENTIALS}")
    if isinstance(error, (botocore.ParamValidationError, botocore.NoRegionError, botocore.InvalidRegionError)):
        return ObjectRefusedError(f"{where} cannot be {done} ({flat(error)}). Correct the AWS_* variables.")
    return ObjectUnavailableError(
        f"{where} cannot be {done} now ({flat(error)}). Check that the store is up, and AWS_ENDPOINT_URL"
    )


def _of_answer(error: Any, done: str, where: str) -> ObjectStoreError:
    """Our error for the store's answer."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in ("PreconditionFailed", "ConditionalRequestConflict") or status == 412:
        return ObjectConflictError(f"{where} was written by somebody else meanwhile")
    if code not in _REMEDIES and (code in ("NoSuchKey", "404") or status == 404):
        return ObjectMissingError(f"{where} is not there")
    passing = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException")
    if code in passing or status == 429 or (status >= 500 and code != "NotImplemented"):
        return ObjectUnavailableError(f"{where} cannot be {done} now (the store answers {status} {code})")
    return ObjectRefusedError(
        f"{where} cannot be {done} (the store answers {status} {code}). {_REMEDIES.get(code, NO_RIGHT)}"
    )


def flat(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split()).rstrip(".")[:300]
