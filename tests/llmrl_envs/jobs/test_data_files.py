"""Reading files: every kind gives the same examples, and what is wrong with a file is told with its line."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.data_files import read_table

ROWS = [{"text": "one, two", "label": 1}, {"text": "drei\u2028\u00e4\nvier", "label": 0}]


def write_json_lines(path):
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8")


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_csv(path):
    path.write_bytes('\ufefftext,label\r\n"one, two",1\r\n"drei\u2028\u00e4\nvier",0\r\n'.encode())


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.jsonl", write_json_lines, [":1", ":3"]),
        ("a.json", write_json, [":2", ":6"]),
        ("a.json", write_json_lines, [":1", ":3"]),
        ("a.csv", write_csv, [":2", ":3"]),
        ("a.parquet", write_parquet, [", row 1", ", row 2"]),
    ],
)
def test_every_kind_of_file_gives_the_same_examples_with_their_places(tmp_path, name, write, places):
    path = tmp_path / name
    write(path)
    table = read_table(path)
    rows = [{**row, "label": int(row["label"])} for row in table.rows]
    assert rows == ROWS
    assert table.columns == ("text", "label")
    assert [str(table.place(i)) for i in range(2)] == [f"{path}{place}" for place in places]


def test_documents_of_a_text_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n one\nmore\n \t\n\ntwo\r\n\r\nthree", encoding="utf-8")
    table = read_table(path)
    assert [row["text"] for row in table.rows] == ["one\nmore", "two", "three"]
    assert table.place(0).number == 1
    assert table.place(1).number == 6
    assert table.place(2).number == 8


def test_a_labels_file_beside_the_data_names_the_classes(tmp_path):
    write_json(tmp_path / "a.json")
    (tmp_path / "labels.json").write_text('["no", "yes"]')
    assert read_table(tmp_path / "a.json").class_names == {"label": ("no", "yes")}


def problem(path):
    with pytest.raises(UserError) as caught:
        read_table(path)
    return caught.value


def test_a_missing_file_is_told_with_its_neighbour(tmp_path):
    write_json(tmp_path / "train.json")
    error = problem(tmp_path / "trian.json")
    assert error.where == str(tmp_path / "trian.json")
    assert f"did you mean {tmp_path / 'train.json'}?" in str(error)
    assert "no directory" in str(problem(tmp_path / "nowhere" / "train.json"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_empty_file_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert problem(tmp_path / name).what == "data file holds no examples"


def test_an_unknown_extension_is_told_with_the_known_ones(tmp_path):
    (tmp_path / "a.xls").write_bytes(b"x")
    error = problem(tmp_path / "a.xls")
    assert error.expected == ".jsonl, .json, .csv, .parquet, .txt"
    assert error.got == ".xls"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_text_that_is_not_utf8_is_told_with_line_and_byte(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    error = problem(tmp_path / name)
    assert error.where == f"{tmp_path / name}:2"
    assert error.got == "byte 0xe9 at offset 27"


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', 2, "malformed JSON: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "not a JSON object"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', 3, "malformed JSON: Expecting ':'"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}\n]', 3, "Expecting ',' or ']'"),
        ("a.json", '[{"a": 1},\n 7]', 2, "not a JSON object"),
        ("a.json", '[{"a": 1},\n', 2, "malformed JSON: Expecting value"),
        ("a.json", '{\n "data": [1]}', 1, "malformed JSON"),
        ("a.csv", "a,b\n1,2\n\n3\n", 4, "CSV row of another length"),
        ("a.csv", 'a,b\n"1\n1",2\n1,2,3\n', 4, "CSV row of another length"),
        ("a.csv", "a,a\n1,2\n", 1, "twice"),
    ],
)
def test_a_malformed_line_is_told_with_its_number(tmp_path, name, text, line, message):
    (tmp_path / name).write_text(text)
    error = problem(tmp_path / name)
    assert error.where == f"{tmp_path / name}:{line}"
    assert message in error.what


def test_an_open_quote_and_a_broken_parquet_file_are_told(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n"1,2\n')
    assert "malformed CSV" in problem(tmp_path / "a.csv").what
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    assert "Parquet" in problem(tmp_path / "a.parquet").what


def test_label_names_must_be_a_list_of_strings(tmp_path):
    write_json(tmp_path / "a.json")
    (tmp_path / "labels.json").write_text('{"no": 0}')
    assert re.search("not a list of strings", problem(tmp_path / "a.json").what)


def test_a_very_long_csv_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_table(tmp_path / "a.csv").rows[0]["text"]) == 200_000
