"""Every code block of the README and of docs/ runs, in order, on the demo model and a little text."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ext.bench import measure
from moe_ext.checkpoints.load_save import load_checkpoint
from moe_ext.commands.main import main
from moe_ext.runtime.batches import read_domains, token_batches
from tests.support.paths import DEMO_MODEL, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BIG_MODELS = ("mistralai/Mixtral-8x7B-v0.1", "./Mixtral-8x7B-v0.1")  # what readers have and tests have not
# Data sets on the Hub, and a row of each as it is there.
DATA_SETS: dict[str, dict[str, Any]] = {
    "allenai/c4:en/train": {
        "text": "A page about bread. " * 40,
        "timestamp": "2019-04-25",
        "url": "https://example.org",
    },
    "theblackcat102/evol-codealpaca-v1": {"instruction": "Add two numbers.", "output": "def add(a, b): return a + b"},
    "allenai/tulu-3-sft-personas-math": {
        "id": "personas-1",
        "prompt": "What is 2 + 2?",
        "messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}],
        "constraints": [],
    },
}
# Lines that others run: they install the package, or run the demo and these tests (CI), or several processes
# (test_processes.py), or servers (test_vllm_server.py, test_transformers_serve.py).
BY_OTHERS = (
    "make demo",
    "make test",
    "pip install ",
    "torchrun ",
    "vllm serve ",
    "python engines/transformers/serve.py ",
)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the texts that the pages name."""
    for name, source in (("my_texts", "calibration"), ("held_out", "held_out")):
        (tmp_path / name).mkdir()
        for domain, text in list(read_domains([DEMO_MODEL / source]).items())[:2]:
            (tmp_path / name / f"{domain}.txt").write_text(text[:1200])
    (tmp_path / "hub").mkdir()
    (tmp_path / "my_code").mkdir()
    (tmp_path / "my_code" / "add.py").write_text(DATA_SETS["theblackcat102/evol-codealpaca-v1"]["output"] * 20)
    for name, row in DATA_SETS.items():
        (tmp_path / local(name)).write_text((json.dumps(row) + "\n") * 8)
    chat = {"messages": DATA_SETS["allenai/tulu-3-sft-personas-math"]["messages"]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 24)
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "CACHE_BYTES", 1 << 20)
    return tmp_path


def local(data_set: str) -> str:
    """The file that stands for a data set on the Hub."""
    return f"hub/{re.sub('[^a-z0-9]', '-', data_set)}.jsonl"


def run_shell(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the `moe-ext` lines of a block in this process, as starting one takes seconds."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words or line.startswith(BY_OTHERS):
            continue
        assert words[0] == "moe-ext", f"no test knows how to run {line!r}"
        if "--tasks" in words:
            pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'moe_ext[eval]'")
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, line


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What a page's Python blocks share: `batches` is the reader's own."""
    _, tokenizer = load_checkpoint(DEMO_MODEL)
    texts = {domain: text[:1200] for domain, text in read_domains([DEMO_MODEL / "calibration"]).items()}
    yield {"batches": list(token_batches(texts, tokenizer, window=128))}
    torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_blocks_of_a_page_run(
    page: Path, folder: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, text in blocks(page):
        for model in BIG_MODELS:
            text = text.replace(model, str(DEMO_MODEL))
        for data_set in DATA_SETS:
            text = text.replace(data_set, local(data_set))
        if language == "bash":
            run_shell(text, monkeypatch)
        elif language == "python":
            exec(compile(text, f"{page.name}", "exec"), names)
        else:
            assert language == "", f"{page.name}: no test runs {language}"


# Beside the pages whose code runs, those that name files as well.
WITH_PATHS = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG", "benchmarks/README"))]
FOLDERS = (".ci", ".github", "benchmarks", "csrc", "docs", "engines", "examples", "moe_ext", "tests", "tools")
needs_source = pytest.mark.skipif(not (ROOT / "moe_ext").exists(), reason="some paths lead to the package's source")


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@needs_source
@pytest.mark.parametrize("page", WITH_PATHS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            missing.append(link)
    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    paths = [word for word in words if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*", word)]
    assert missing + [path for path in paths if not (ROOT / path).exists()] == []


@needs_source
def test_the_map_lists_every_wing_in_the_order_of_the_import_rule() -> None:
    mapped = re.findall(r"^\| \[(\w+)\]\(\.\./moe_ext/\1\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE)
    assert sorted(mapped) == sorted(path.parent.name for path in (ROOT / "moe_ext").glob("*/__init__.py"))
    layers = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert layers is not None
    # `a | b` are two wings that do not know each other: their order is free.
    ranks = {wing: -rank for rank, line in enumerate(layers[1].splitlines()) for wing in re.findall(r"\w+", line)}
    assert [ranks[wing] for wing in mapped] == sorted(ranks[wing] for wing in mapped)


def test_every_page_is_listed() -> None:
    listed = re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_every_promise_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "| `" in line]
    assert len(rows) > 10
    without = []
    for row in rows:
        promise, held_by = row.strip("| ").split(" | ")
        tests = re.findall(r"`([\w/]+\.(?:py|cpp))::(\w+)`", held_by)
        without += [
            f"{promise} {path}::{name}"
            for path, name in tests or [("", "no test")]
            if not re.search(rf"\b{name}\(", (ROOT / path).read_text(encoding="utf-8") if path else "")
        ]
    assert without == []
