"""Limits, and where a server may listen."""

from pathlib import Path

import pytest

from jackpot.control_plane.api.guard import MAX_CLIENTS, TokenBucket
from jackpot.control_plane.settings import ServeSettings
from jackpot.errors import ConfigError


def test_a_bucket_lets_a_burst_pass_and_refills_with_time() -> None:
    bucket = TokenBucket(rate=2.0, burst=3)
    assert [bucket.take("a", 0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert bucket.take("b", 0.0) == 0  # everybody has a bucket of their own
    assert bucket.take("a", 0.5) == 0 and bucket.take("a", 0.5) > 0
    assert [bucket.take("a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5]  # never more than a burst
    assert TokenBucket(rate=0, burst=1).take("a", 0.0) == 0


def test_buckets_of_clients_long_gone_are_forgotten() -> None:
    bucket = TokenBucket(rate=1.0, burst=1)
    for index in range(MAX_CLIENTS + 10):
        bucket.take(str(index), 0.0)
    assert len(bucket._levels) == MAX_CLIENTS


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_nothing(tmp_path: Path, host: str) -> None:
    settings = ServeSettings(data_dir=tmp_path, host=host).with_roots(None)
    settings.check()
    assert settings.admission.roots is None


def test_anywhere_else_needs_tokens_and_tls_and_takes_no_path_by_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token create"):
        ServeSettings(data_dir=tmp_path, host="0.0.0.0").check()
    with pytest.raises(ConfigError, match="--tls-cert"):
        ServeSettings(data_dir=tmp_path, host="0.0.0.0", token_required=True).check()
    with pytest.raises(ConfigError, match="both"):
        ServeSettings(data_dir=tmp_path, tls_key=tmp_path).check()
    proxied = ServeSettings(data_dir=tmp_path, host="::", token_required=True, tls_elsewhere=True).with_roots(None)
    proxied.check()
    assert proxied.admission.roots == () and proxied.url == "http://[::]:8700"


def test_tokens_lie_in_the_data_directory_unless_a_file_is_named(tmp_path: Path) -> None:
    assert ServeSettings(data_dir=tmp_path).tokens == tmp_path / "tokens.json"
    assert ServeSettings(data_dir=tmp_path, token_file=tmp_path / "secret").tokens == tmp_path / "secret"
