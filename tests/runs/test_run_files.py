"""A file is the old one or the new one, and what is not ours is refused by name."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import refusal

from cs324dist.runs.files import read_json, read_record, replaced, write_json, write_record

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(content=st.dictionaries(st.text(), values, max_size=5))
def test_json_is_read_back_as_it_was_written(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "settings.json"
    write_json(path, content)
    assert read_json(path) == content
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


@dataclass(frozen=True)
class Row:
    name: str
    values: tuple[float, ...] = ()


def test_a_record_is_read_back_and_what_is_wrong_with_one_is_named(tmp_path):
    path = tmp_path / "row.json"
    write_record(path, Row("a", (0.5, 1e300)))
    assert read_json(path) == {"name": "a", "values": [0.5, 1e300]}
    assert read_record(Row, path) == Row("a", (0.5, 1e300))
    write_json(path, {"name": "a", "values": ["0.5"]})
    assert refusal(read_record, Row, path) == f"{path}: values.0 is 0.5"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
    ids=["empty", "cut short", "not UTF-8", "deeply nested", "list", "null"],
)
def test_what_is_no_json_object_of_ours_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "odd.json"
    path.write_bytes(content)
    assert_refused(path, said)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    assert_refused(tmp_path / "absent.json", "cannot be read: No such file")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file" / "below.json", "cannot be read: Not a directory")


def assert_refused(path: Path, said: str) -> None:
    line = refusal(read_json, path)
    assert line.startswith(f"{path} ")
    assert said in line
