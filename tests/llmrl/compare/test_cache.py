from pathlib import Path

import pytest

from llmrl.compare.cache import CurvePoint, Fingerprints, RunResult, RunStore, run_key
from llmrl.run_directory import atomic_write_json

RESULT = RunResult(
    loss_initial=3.0, loss_test=None, accuracy_test=None, diverged=True, seconds=1.5, tokens_trained=7,
    tokens_evaluated=0,
)  # fmt: skip


def test_results_come_back(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    assert store.read("abc") is None
    store.write("abc", {"task": "t"}, RESULT)
    assert store.read("abc") == RESULT
    assert [path.name for path in store.directory.iterdir()] == ["abc.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"result": {}}', '{"result": {"loss_test": "low"}}', "\udcff"])
def test_a_damaged_file_is_no_result(tmp_path: Path, content: str) -> None:
    store = RunStore(tmp_path)
    (tmp_path / "abc.json").write_bytes(content.encode(errors="surrogateescape"))
    assert store.read("abc") is None


def key_of(task, **changes) -> str:
    values = {"method_digest": "m", "learning_rate": 1e-3, "seed": 0, "device_type": "cpu", **changes}
    return run_key(task, fingerprints=Fingerprints().of_task(task), **values)


def test_what_changes_a_run_changes_its_key(make_config) -> None:
    task = make_config().tasks[0]
    keys = {
        key_of(task),
        key_of(task, method_digest="n"),
        key_of(task, learning_rate=2e-3),
        key_of(task, learning_rate=None),
        key_of(task, seed=1),
        key_of(task, device_type="cuda"),
        key_of(task.with_steps(9)),
    }
    assert len(keys) == 7


def test_names_and_default_rates_do_not(make_config) -> None:
    task = make_config().tasks[0]
    assert key_of(task.model_copy(update={"name": "other", "learning_rate": 5.0})) == key_of(task)


def test_edited_data_is_other_data(make_config, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    task = make_config().tasks[0].model_copy(update={"data": make_config().tasks[0].data.model_copy(
        update={"train": str(path)})})  # fmt: skip
    before = key_of(task)
    assert key_of(task) == before
    path.write_text('{"text": "b"}\n')
    assert key_of(task) != before


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    new = {"curve", "tokens_measured", "peak_memory_bytes", "num_trials", "events"}
    store = RunStore(tmp_path)
    atomic_write_json(tmp_path / "abc.json", {"task": "t", "result": RESULT.model_dump(exclude=new)})
    found = store.read("abc")
    assert found == RESULT
    assert (found.curve, found.num_trials, found.events) == ((), 1, {})


def test_curves_come_back(tmp_path: Path) -> None:
    curve = (CurvePoint(0, 3.0), CurvePoint(4, None, 2.5, 1e-3))
    result = RESULT.model_copy(update={"curve": curve, "events": {"spikes": 2}, "peak_memory_bytes": 5})
    RunStore(tmp_path).write("abc", {}, result)
    assert RunStore(tmp_path).read("abc") == result
