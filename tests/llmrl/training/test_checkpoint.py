"""Checkpoints are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrl.training.checkpoint import is_whole, latest_checkpoint, save_checkpoint


def write(folder: Path) -> None:
    (folder / "agent").mkdir()
    (folder / "agent" / "weights.bin").write_bytes(b"12345678")


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, {"at": number}, write)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"at": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000002", "000000003"]


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest"])
def test_a_torn_one_is_passed_over(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, {"at": 1}, write)
    torn = save_checkpoint(tmp_path, 2, {"at": 2}, write)
    weights = torn / "agent" / "weights.bin"
    if damage == "truncate":
        weights.write_bytes(b"1234")
    elif damage == "change":
        weights.write_bytes(b"12345679")
    elif damage == "remove":
        weights.unlink()
    else:
        (torn / "manifest.json").write_text("{")
    assert not is_whole(torn)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"at": 1}


def test_a_full_disk_leaves_the_last_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"at": 1}, write)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, {"at": 2}, fail)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1] == {"at": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["000000001"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
