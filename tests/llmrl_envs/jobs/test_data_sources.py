"""Finding the splits that a source holds."""

import json

import datasets
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs import data_sources
from llmrl_envs.jobs.data_sources import load_tables
from llmrl_envs.jobs.task import DataSpec


def texts(tables):
    return {split: [row["text"] for row in table.rows] for split, table in tables.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "valid.jsonl", "test.jsonl"),
        ("train.jsonl", "dev.jsonl"),
        ("training.jsonl", "validation.jsonl"),
    ],
)
def test_a_directory_offers_the_files_named_after_splits(write_lines, names):
    for name in names:
        path = write_lines([{"text": name}], f"corpus/{name}")
    (path.parent / "labels.json").write_text(json.dumps(["a"]))
    found = texts(load_tables(DataSpec(train=str(path.parent))))
    assert found == dict(zip(["train", "validation", "test"], [[name] for name in names], strict=False))


def test_a_source_of_its_own_replaces_the_directory_s_split(write_lines):
    folder = write_lines([{"text": "train"}], "corpus/train.jsonl").parent
    write_lines([{"text": "valid"}], "corpus/valid.jsonl")
    other = write_lines([{"text": "other"}], "other.jsonl")
    found = texts(load_tables(DataSpec(train=str(folder), validation=str(other), test=str(folder / "valid.jsonl"))))
    assert found == {"train": ["train"], "validation": ["other"], "test": ["valid"]}


def test_a_saved_dataset_offers_its_splits_and_class_names(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "topic": datasets.ClassLabel(names=["x", "y"])})
    splits = {
        "train": datasets.Dataset.from_list([{"text": "a", "topic": 1}], features=features),
        "dev": datasets.Dataset.from_list([{"text": "b", "topic": 0}], features=features),
        "extra": datasets.Dataset.from_list([{"text": "c", "topic": 0}], features=features),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    tables = load_tables(DataSpec(train=str(tmp_path / "both")))
    assert texts(tables) == {"train": ["a"], "validation": ["b"]}
    assert tables["train"].class_names == {"topic": ("x", "y")}
    assert str(tables["train"].place(0)) == f"{tmp_path / 'both'}[train], row 1"
    splits["train"].save_to_disk(tmp_path / "one")
    assert texts(load_tables(DataSpec(train=str(tmp_path / "one")))) == {"train": ["a"]}


def test_a_built_in_corpus_has_its_fixed_splits():
    tables = load_tables(DataSpec(train="builtin:json"))
    assert list(tables) == ["train", "validation", "test"]
    assert all(len(table) > 0 for table in tables.values())


def problem(**sources):
    with pytest.raises(UserError) as caught:
        load_tables(DataSpec(**sources))
    return caught.value


def test_an_unknown_built_in_corpus_is_told_with_its_neighbour():
    assert "did you mean 'json'?" in problem(train="builtin:jsn").got


@pytest.mark.parametrize("source", ["nowhere/train.jsonl", "./nowhere", "a/b/c", "train.csv"])
def test_a_missing_path_is_told_as_a_path(source):
    assert problem(train=source).what == "data file not found"


@pytest.mark.parametrize("source", ["nobody/nothing", "nobody/nothing:part"])
def test_an_unreachable_hub_id_says_what_was_looked_for_and_what_to_do(source, monkeypatch):
    monkeypatch.setattr(data_sources, "hub_is_reachable", lambda: False)
    error = problem(train=source)
    assert error.what == "data set not found"
    assert error.where == source
    assert "save_to_disk" in error.expected
    assert "nobody/nothing" in error.expected
    assert error.got == "not in the local cache, and the Hub does not answer"


def test_a_directory_without_data_is_told(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    error = problem(train=str(tmp_path))
    assert error.what == "directory holds no data"
    assert error.got == "notes.md"


def test_two_files_for_one_split_are_told(write_lines):
    folder = write_lines([{"text": "a"}], "corpus/train.jsonl").parent
    (folder / "train.csv").write_text("text\na\n")
    assert problem(train=str(folder)).got == "train.csv, train.jsonl"


def test_a_source_without_a_training_split_is_told(write_lines):
    folder = write_lines([{"text": "a"}], "corpus/test.jsonl").parent
    assert problem(train=str(folder)).what == "source has no training split"


def test_a_source_of_several_other_splits_is_told(write_lines):
    train = write_lines([{"text": "a"}], "train.jsonl")
    folder = write_lines([{"text": "a"}], "corpus/train.jsonl").parent
    write_lines([{"text": "a"}], "corpus/test.jsonl")
    error = problem(train=str(train), validation=str(folder))
    assert error.what == "source has no validation split"
    assert error.got == "train, test"
