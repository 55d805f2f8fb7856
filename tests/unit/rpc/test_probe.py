"""The health check of the images, on real servers."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jackpot.rpc.probe import main
from jackpot.rpc.server import create_server


class Handler(BaseHTTPRequestHandler):
    """/well answers 200, everything else 503."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/well" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_http(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert main([f"{url}/well"]) == 0
        monkeypatch.setenv("JACKPOT_PROBE_URL", f"{url}/well")
        assert main([]) == 0
        assert main([f"{url}/ill"]) == 1
        assert capsys.readouterr().err == f"{url}/ill: status 503\n"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert main([f"{url}/well"]) == 1
    assert "refused" in capsys.readouterr().err


async def test_grpc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = create_server(f"unix:{tmp_path}/s.sock", lambda _: None, [], health_listen="127.0.0.1:0")
    await server.start()
    url = f"grpc://{server.health_address}"
    assert await asyncio.to_thread(main, [f"{url}/liveness"]) == 0
    assert await asyncio.to_thread(main, [f"{url}/readiness"]) == 1
    await server.health.set_ready(True)
    assert await asyncio.to_thread(main, [f"{url}/readiness"]) == 0
    assert await asyncio.to_thread(main, [f"{url}/unknown"]) == 1
    await server.stop(0)
    assert await asyncio.to_thread(main, [f"{url}/readiness"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == ["NOT_SERVING", "NOT_FOUND", "UNAVAILABLE"]


@pytest.mark.parametrize("arguments", [[], ["localhost:1"], ["ftp://h:1/x"], ["http://h/x"], ["http://h:1", "x"]])
def test_what_cannot_be_asked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err
