"""Rows of files in every format, each written by its own library, and what is said of damaged ones."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ext.data import files
from moe_ext.data.files import rows_of
from moe_ext.data.rows import UnreadableRowError

NEEDS = "needs the extra data: pip install '.[test]'"
datasets = pytest.importorskip("datasets", reason=NEEDS)
pyarrow = pytest.importorskip("pyarrow", reason=NEEDS)
zstandard = pytest.importorskip("zstandard", reason=NEEDS)

ROWS: list[dict[str, Any]] = [
    {"text": f"é {number}", "messages": [{"role": "user", "content": "a\nb"}], "n": number} for number in range(700)
]


def json_lines() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def written(folder: Path, name: str) -> Path:
    """``ROWS`` in a file, by the library of its format."""
    file = folder / name
    if name.endswith(".jsonl"):
        datasets.Dataset.from_list(ROWS).to_json(file)
    elif name.endswith(".jsonl.gz"):
        file.write_bytes(gzip.compress(json_lines()))
    elif name.endswith(".jsonl.zst"):
        with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
            stream.write(json_lines())
    elif name == "list.json":
        file.write_text(json.dumps(ROWS))
    elif name == "lines.json":
        datasets.Dataset.from_list(ROWS).to_json(file, lines=True)
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    elif name == "stream.arrow":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
        (folder / "saved" / "data-00000-of-00001.arrow").rename(file)
    else:
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return file


NAMES = (
    *("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "list.json", "lines.json", "a.parquet", "stream.arrow", "footer.arrow"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_rows_in_order(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name)
    rows = list(rows_of(file))
    assert [row.content for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1, len(ROWS) + 1))
    assert rows[4].where == f"{file}, {rows[4].unit} 5"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lines.json"])
def test_a_file_that_ends_too_soon_is_named(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, name)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    if name == "a.jsonl":  # whose last line is a bad row
        assert isinstance(list(rows_of(file))[-1].content, UnreadableRowError)
        return
    with pytest.raises(ValueError, match=str(file)):
        list(rows_of(file))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.json"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"[no such thing]" * 9)
    with pytest.raises(ValueError, match=f"{tmp_path / name}.*(damaged|not JSON)"):
        list(rows_of(tmp_path / name))


def test_lines_are_counted_as_editors_count_them_and_bad_ones_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n[1]\n{"text": \n\xff\xfe\n{"text": "b"}')
    found = [(row.number, str(row.content)) for row in rows_of(file)]
    assert [number for number, _ in found] == [1, 3, 4, 5, 6]
    assert "holds list; expected a JSON object" in found[1][1]
    assert all("truncated, or not JSON" in text for _, text in found[2:4])


def test_frames_of_zstandard_may_follow_each_other(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(b"".join(zstandard.compress(b'{"text": "%d"}\n' % number) for number in range(5)))
    assert [row.content for row in rows_of(file)] == [{"text": str(number)} for number in range(5)]


@given(
    text=st.text(st.sampled_from("aé☃\n"), max_size=200), piece=st.integers(1, 40), suffix=st.sampled_from(["", ".gz"])
)
def test_a_long_text_comes_in_pieces_that_end_with_lines(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, suffix: str
) -> None:
    file = tmp_path_factory.mktemp("texts") / f"a.txt{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE", piece)
        found = [str(row.content) for row in rows_of(file)]
    assert "".join(found) == text
    for part in found[:-1]:
        assert part.endswith("\n") or "\n" not in part


@pytest.mark.parametrize("name", ["a.csv", "a.npy", "a.jsonl.bz2", "a.PDF"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is {name.split('.')[-1].lower()}, which is not read; give text"):
        list(rows_of(tmp_path / name))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        list(rows_of(tmp_path / "a.txt"))
