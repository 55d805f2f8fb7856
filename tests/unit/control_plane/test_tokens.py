"""Tokens: hashed at rest, expiring, revocable."""

from datetime import timedelta
from pathlib import Path

import pytest

from jackpot.control_plane.tokens import Scope, TokenFile, parse_lifetime, without_hash
from jackpot.errors import ConfigError


def test_a_token_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.json")
    assert not file.exists
    token = file.create("me", Scope.WRITE, timedelta(hours=1))
    text = (tmp_path / "tokens.json").read_text()
    assert token not in text and token.split("_", 2)[2] not in text
    assert (tmp_path / "tokens.json").stat().st_mode & 0o077 == 0
    record = file.check(token)
    assert record is not None and (record.name, record.scope) == ("me", "write")
    assert "sha256" not in without_hash(record)
    for wrong in ("", "jp", token[:-1] + ("a" if token[-1] != "a" else "b"), token + "a", token.replace("jp_", "jq_")):
        assert file.check(wrong) is None


def test_expired_and_revoked_tokens_are_refused_at_once_also_by_another_reader(tmp_path: Path) -> None:
    reader, writer = TokenFile(tmp_path / "tokens.json"), TokenFile(tmp_path / "tokens.json")
    expired = writer.create("old", Scope.ADMIN, timedelta(microseconds=1))
    kept = writer.create("new", Scope.READ, None)
    assert reader.check(expired) is None and reader.check(kept) is not None
    writer.revoke(kept.split("_")[1])
    assert reader.check(kept) is None
    assert reader.exists  # the last token's end opens nothing
    with pytest.raises(ConfigError, match="token list"):
        writer.revoke("nobody")


def test_lifetimes_and_scopes_are_checked() -> None:
    assert parse_lifetime("90s") == timedelta(seconds=90) and parse_lifetime("30d") == timedelta(days=30)
    assert parse_lifetime("never") is None
    for text in ("", "0d", "5", "d", "-1d", "1y"):
        with pytest.raises(ConfigError, match="30d"):
            parse_lifetime(text)
    with pytest.raises(ConfigError, match="read, write or admin"):
        Scope.of("root")


def test_a_damaged_file_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenFile(tmp_path / "tokens.json").check("jp_00000000_" + "a" * 43)
