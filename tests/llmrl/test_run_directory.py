import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from llmrl_envs.errors import UserError

from llmrl.run_directory import (
    JsonlWriter,
    atomic_write_json,
    atomic_write_text,
    create_run_directory,
    read_jsonl,
    to_json_value,
)


def test_makes_the_directory_and_its_parents(tmp_path: Path) -> None:
    path = create_run_directory(tmp_path / "a" / "b")
    assert path.is_dir()
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_accepts_an_empty_directory(tmp_path: Path, resume: bool) -> None:
    assert create_run_directory(tmp_path, resume=resume) == tmp_path


def test_refuses_a_directory_with_files_and_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not empty") as caught:
        create_run_directory(tmp_path)
    assert "--resume" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert create_run_directory(tmp_path, resume=True) == tmp_path


@pytest.mark.parametrize("below", ["", "inner"])
def test_refuses_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(UserError, match="is a file"):
        create_run_directory(file / below)


def test_says_when_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot write") as caught:
        create_run_directory(tmp_path)
    assert "Permission denied" in str(caught.value)


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    atomic_write_text(path, "a long first content\n")
    atomic_write_text(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert os.listdir(tmp_path) == ["config.yaml"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    atomic_write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_json_is_strict(tmp_path: Path) -> None:
    value = {
        "loss": np.float64("nan"),
        "rates": np.array([1.0, np.inf]),
        "where": tmp_path,
        "ok": np.bool_(True),
        3: (),
    }
    atomic_write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"loss": None, "rates": [1.0, None], "where": str(tmp_path), "ok": True, "3": []}
    assert to_json_value(read) == read


def test_rows_are_readable_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.5})
        assert read_jsonl(path) == [{"step": 1, "loss": 0.5}]
        assert writer.offset == path.stat().st_size
        writer.write({"step": 2, "loss": float("inf")})
    assert read_jsonl(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


def test_truncating_to_a_checkpoint_repeats_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1})
        offset = writer.offset
        writer.write({"step": 2})
        writer.write({"step": 3})
    with JsonlWriter(path) as writer:
        writer.truncate_to(offset)
        writer.write({"step": 2})
        assert writer.offset == path.stat().st_size
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("torn", ['{"step": 2', "{", '{"step": 2, "text": "\xc3'])
def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode("latin-1"))
    assert read_jsonl(path) == [{"step": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_truncating_beyond_the_end_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1})
        writer.truncate_to(10_000)
        writer.write({"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{step: 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)
