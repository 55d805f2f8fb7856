from pathlib import Path

import pytest

from jackpot.errors import JackpotError
from jackpot.storage.batch_manifests import Manifest, ManifestLog


def test_a_written_manifest_is_read_back(tmp_path: Path) -> None:
    log = ManifestLog(tmp_path / "manifests")
    manifest = Manifest(batch=3, start_step=6, group_ids=("job.s0.e0.p0.a0", "job.s1.e0.p1.a0"))
    log.write(manifest)
    assert ManifestLog(tmp_path / "manifests").read(3) == manifest
    assert log.read(4) is None


def test_discarding_forgets_the_batch_and_all_later_ones(tmp_path: Path) -> None:
    log = ManifestLog(tmp_path)
    for batch in range(4):
        log.write(Manifest(batch, batch, (f"job.s{batch}.e0.p0.a0",)))
    log.discard_from(2)
    assert [manifest.batch for manifest in log.between(0, 4)] == [0, 1]


def test_a_damaged_manifest_names_its_file(tmp_path: Path) -> None:
    log = ManifestLog(tmp_path)
    (tmp_path / "00000000.json").write_text('{"batch": 0')
    with pytest.raises(JackpotError, match=r"00000000\.json is damaged"):
        log.read(0)
