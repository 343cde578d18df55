"""What a source names, and what is said of one that names nothing."""

import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from moe_ext.data import Columns, Source, batches
from moe_ext.data.sources import parse_source, sources_of
from tests.support.letters import letter_tokenizer

NEEDS = "needs the extra data: pip install '.[test]'"
datasets = pytest.importorskip("datasets", reason=NEEDS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "a.txt",
        "chats/train-0.jsonl",
        "chats/test-0.jsonl",
        "code/x/one.py",
        "code/two.py",
        "code/.git/no.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "odd:name@2").write_text("a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "name", "place", "split", "weight"),
    [
        ("a.txt", "a", "a.txt", None, None),
        ("a.txt@0.5", "a", "a.txt", None, 0.5),
        ("chats:train", "chats", "chats", "train", None),
        ("talk=chats:train@2", "talk", "chats", "train", 2.0),
        ("code:**/*.py@1e-1", "code", "code", "**/*.py", 0.1),
        ("odd:name@2", "odd:name@2", "odd:name@2", None, None),
        ("allenai/c4:en/train@3", "c4", "allenai/c4", "en/train", 3.0),
        ("squad", "squad", "squad", None, None),
        ("math=allenai/tulu-3-sft-personas-math", "math", "allenai/tulu-3-sft-personas-math", None, None),
    ],
)
def test_a_source_is_read_as_it_is_meant(
    here: Path, given: str, name: str, place: str, split: str | None, weight: float | None
) -> None:
    assert parse_source(given) == Source(name, place, split, weight)


def test_a_folder_is_its_files_by_name_or_those_of_a_split_or_a_pattern(here: Path) -> None:
    def files(given: str) -> list[str]:
        return [str(file.relative_to(given.split(":")[0])) for file in parse_source(given).files()]

    assert files("chats") == ["test-0.jsonl", "train-0.jsonl"]
    assert files("chats:train") == ["train-0.jsonl"]
    assert files("code:**/*.py") == ["two.py", "x/one.py"]
    (here / "chats" / "train").mkdir()
    (here / "chats" / "train" / "new.txt").write_text("b")
    assert files("chats:train") == ["train/new.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected one or more sources, got none"),
        ("missing.jsonl", "data missing.jsonl does not exist"),
        ("./missing", "data ./missing does not exist"),
        (Path("missing"), "data missing does not exist"),
        ("a.txt:train", "a.txt is one file and has no split 'train'"),
        ("chats:dev", "holds no .txt, .* file of a split 'dev'"),
        ("code", r"holds no .* file; others are named by a pattern, such as code:\*\*/\*.py"),
        ("code:*.rs", r"holds no file like \*.rs"),
        ("a.txt@0", "expected a weight above 0, got 0.0"),
        ("a.txt@1.2.3", "expected a weight above 0 after @, got 1.2.3"),
        ("squad:", r"expected \[NAME=\]SOURCE\[:split\]\[@weight\]"),
        (["a.txt", "a=chats"], "two sources are named 'a'; give one another name: NAME=SOURCE"),
    ],
)
def test_a_source_that_is_not_there_is_refused_before_anything_is_read(here: Path, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(given, letter_tokenizer(bos=False))


def test_columns_are_of_all_sources_or_of_one(here: Path) -> None:
    sources = sources_of(["a.txt", "chats"], ["text=body", "chats:prompt=q,response=a"])
    assert [source.columns for source in sources] == [Columns(text="body"), Columns(prompt="q", response="a")]
    with pytest.raises(ValueError, match="there is no source 'chat', only"):
        sources_of("chats", "chat:text=a")
    with pytest.raises(ValueError, match="given twice for all sources"):
        sources_of("chats", ["text=a", "text=b"])
    for wrong in ("body", "texts=body", "text=a,text=b", "prompt=q", "text=a,messages=b"):
        with pytest.raises(ValueError, match="columns: "):
            Columns.parse(wrong)


def test_a_data_set_on_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stream(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list([{"text": "ab"}, {"text": "cd"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert [row.content for row in parse_source("allenai/c4:en/validation").rows()] == [{"text": "ab"}, {"text": "cd"}]
    assert [row.where for row in parse_source("squad").rows()] == ["squad, row 1", "squad, row 2"]
    assert asked == [
        (("allenai/c4", "en"), {"split": "validation", "streaming": True}),
        (("squad", None), {"split": "train", "streaming": True}),
    ]


def test_without_the_package_or_a_network_one_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries for a while
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"data allenai/c4 .*, split train: cannot be opened .*; files on this machine"):
        list(parse_source("allenai/c4").rows())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"takes the package datasets: pip install 'moe_ext\[data\]'"):
        parse_source("allenai/c4").check()


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_format_whose_package_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    (tmp_path / name).write_text("")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{name} takes {package}: pip install 'moe_ext\[data\]'"):
        batches(tmp_path / name, letter_tokenizer(bos=False))
