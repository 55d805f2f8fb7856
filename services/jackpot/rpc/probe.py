"""Checks the health of a local service, for a container's health check: ``python -m jackpot.rpc.probe [URL]``.

Without a URL it uses ``JACKPOT_PROBE_URL``, which the images set.
``grpc://host:port/readiness`` asks gRPC's health service (the plaintext port of ``JACKPOT_HEALTH_LISTEN``),
``http://`` and ``https://`` expect a status below 400. Exit code 0 is healthy, 1 unhealthy, 2 an unusable URL.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 4.0


def main(arguments: Sequence[str]) -> int:
    """Check the URL in ``arguments``; the exit code. Writes to stderr what is wrong."""
    url = arguments[0] if len(arguments) == 1 else "" if arguments else os.environ.get("JACKPOT_PROBE_URL", "")
    parts = urlsplit(url)
    if not parts.hostname or not parts.port or parts.scheme not in ("grpc", "http", "https"):
        print("usage: python -m jackpot.rpc.probe [(grpc|http|https)://host:port/path]", file=sys.stderr)
        return 2
    path = parts.path.strip("/")
    problem = (
        _ask_grpc(f"{parts.hostname}:{parts.port}", path)
        if parts.scheme == "grpc"
        else _ask_http(parts.hostname, parts.port, path, tls=parts.scheme == "https")
    )
    if problem:
        print(f"{url}: {problem}", file=sys.stderr)
    return 1 if problem else 0


def _ask_grpc(address: str, service: str) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_SECONDS).status
        except grpc.RpcError as error:
            return str(error.code().name)
    serving = health_pb2.HealthCheckResponse.SERVING
    return "" if status == serving else str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))


def _ask_http(host: str, port: int, path: str, *, tls: bool) -> str:
    connection: http.client.HTTPConnection
    if tls:
        # The process probes itself at an address that its certificate need not carry; no secret is sent.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", f"/{path}")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if status < 400 else f"status {status}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
