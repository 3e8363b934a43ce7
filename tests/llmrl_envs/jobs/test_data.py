"""The data of a whole task, from what a person wrote to batches."""

import numpy as np
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data import IGNORED, batch_indices, load_task_data
from llmrl_envs.jobs.task import FineTuningTask

SENTENCES = [{"en": f"dog {i}", "de": f"Hund {i}", "label": i % 3} for i in range(60)]


def load(tokenizer, data, **settings):
    return load_task_data(FineTuningTask(**{"data": data, "max_length": 32, **settings}), tokenizer)


def decoded(tokenizer, split):
    return [tokenizer.decode(tokens) for tokens in split.input_ids]


def test_one_file_becomes_three_separate_splits(tokenizer, write_lines):
    data = {"train": str(write_lines(SENTENCES)), "fields": {"prompt": "To German: {en}", "completion": "de"}}
    found = load(tokenizer, data, objective="instruction")
    texts = {split: set(decoded(tokenizer, getattr(found, split))) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in texts.items()} == {"train": 48, "validation": 6, "test": 6}
    assert texts["train"] | texts["validation"] | texts["test"] == {
        f"To German: dog {i}\nHund {i}</s>" for i in range(60)
    }
    assert found.num_labels is None
    batch = found.train.collate(batch_indices(len(found.train), 8, seed=0, step=0))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert (batch["labels"] == IGNORED).any(dim=1).all()


def test_loading_twice_gives_the_same_tokens(tokenizer, write_lines):
    data = {"train": str(write_lines(SENTENCES)), "fields": {"text": "{en} {de}"}}
    first, second = (load(tokenizer, data, batch_size=2) for _ in range(2))
    assert decoded(tokenizer, first.train) == decoded(tokenizer, second.train)
    assert decoded(tokenizer, first.test) == decoded(tokenizer, second.test)


def test_classes_are_counted_over_all_splits(tokenizer, write_lines):
    rows = [{"text": row["en"], "label": row["label"]} for row in SENTENCES]
    train = write_lines([row for row in rows if row["label"] < 2], "corpus/train.jsonl")
    write_lines(rows[:3], "corpus/valid.jsonl")
    found = load(tokenizer, str(train.parent), objective="classification")
    assert found.num_labels == 3
    assert found.validation.labels.tolist() == [0, 1, 2]


def test_classes_are_named_by_the_labels_file(tokenizer, write_lines):
    path = write_lines([{"text": row["en"], "label": row["label"]} for row in SENTENCES], "corpus/data.jsonl")
    (path.parent / "labels.json").write_text('["a", "b", "c", "d"]')
    found = load(tokenizer, str(path), objective="classification")
    assert found.label_names == ("a", "b", "c", "d")
    assert found.num_labels == 4


def test_the_labels_file_names_no_other_column(tokenizer, write_lines):
    path = write_lines(
        [{"text": r["en"], "label": r["label"], "odd": r["label"] % 2} for r in SENTENCES], "c/data.jsonl"
    )
    (path.parent / "labels.json").write_text('["a", "b", "c"]')
    found = load(tokenizer, {"train": str(path), "fields": {"label": "odd"}}, objective="classification")
    assert found.num_labels == 2


def test_max_examples_limits_every_split_and_keeps_all_classes(tokenizer, write_lines):
    path = write_lines([{"text": row["en"], "label": row["label"]} for row in SENTENCES])
    found = load(tokenizer, {"train": str(path), "max_examples": 4}, objective="classification", batch_size=4)
    assert (len(found.train), len(found.validation), len(found.test)) == (4, 4, 4)
    assert found.num_labels == 3


def test_text_is_cut_into_blocks_per_split(tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"paragraph {i} " + "x" * 60 for i in range(100)))
    found = load(tokenizer, str(path))
    assert {len(tokens) for tokens in found.train.input_ids} == {32}
    assert len(found.train) > 5 * len(found.validation) > 0


def test_a_built_in_corpus_trains(tokenizer):
    found = load(tokenizer, "builtin:json")
    assert len(found.train) > 100


def test_a_training_split_smaller_than_a_batch_is_told(tokenizer, write_lines):
    data = {"train": str(write_lines(SENTENCES[:10])), "fields": {"prompt": "en", "completion": "de"}}
    with pytest.raises(UserError, match="smaller than a batch") as caught:
        load(tokenizer, data, objective="instruction", batch_size=16)
    assert caught.value.expected.startswith("at least 16 examples")
    assert caught.value.got == 8
    assert caught.value.where == data["train"]


def test_a_label_out_of_range_is_told_with_file_and_line(tokenizer, write_lines):
    path = write_lines([{"text": f"t{i}", "label": 5 if i == 7 else i % 2} for i in range(20)])
    with pytest.raises(UserError, match="label out of range") as caught:
        load(tokenizer, str(path), objective="classification", num_labels=2)
    assert caught.value.where == f"{path}:8"
    assert caught.value.got == 5


def test_little_training_data_leaves_the_other_splits_whole(tokenizer, write_lines):
    path = write_lines([{"text": row["en"], "label": row["label"]} for row in SENTENCES])
    data = {"train": str(path), "max_train_examples": 9}
    found = load(tokenizer, data, objective="classification", batch_size=4)
    assert (len(found.train), len(found.validation), len(found.test)) == (9, 6, 6)
    both = load(tokenizer, {**data, "max_examples": 5}, objective="classification", batch_size=4)
    assert (len(both.train), len(both.validation), len(both.test)) == (5, 5, 5)
    few = load(tokenizer, {"train": "builtin:json", "max_train_examples": 3})
    assert len(few.train) < 0.1 * len(load(tokenizer, "builtin:json").train)


def test_noise_moves_labels_of_training_examples_and_of_no_others(tokenizer, write_lines):
    path = write_lines([{"text": f"text {i}", "label": i % 7} for i in range(400)])

    def labels(noise):
        found = load(tokenizer, {"train": str(path), "label_noise": noise}, objective="classification")
        return found, np.asarray(found.train.labels)

    clean, before = labels(0.0)
    noisy, after = labels(0.25)
    assert decoded(tokenizer, clean.train) == decoded(tokenizer, noisy.train)
    assert (before != after).mean() == pytest.approx(0.25 * 6 / 7, abs=0.05)
    for split in ("validation", "test"):
        assert getattr(clean, split).labels.tolist() == getattr(noisy, split).labels.tolist()
    assert (labels(0.25)[1] == after).all()


def test_noise_gives_prompts_the_completions_of_others(tokenizer, write_lines):
    data = {"train": str(write_lines(SENTENCES)), "fields": {"prompt": "en", "completion": "de"}}
    clean, noisy = (
        decoded(tokenizer, load(tokenizer, {**data, "label_noise": noise}, objective="instruction").train)
        for noise in (0.0, 0.5)
    )
    moved = [(old, new) for old, new in zip(clean, noisy, strict=True) if old != new]
    assert len(moved) == 24
    assert {new.split("\n")[1] for _, new in moved} <= {text.split("\n")[1] for text in clean}
    assert all(old.split("\n")[0] == new.split("\n")[0] for old, new in moved)
