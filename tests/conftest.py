"""Fixtures for every test: a tokenizer and a tiny model that need no download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SENTENCE = "the river runs past an old stone mill where two sisters kept bees and sold honey to travellers"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that results compare bit for bit between processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test draws the same numbers, alone or in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Every byte is a token; `<|...|>` marks are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token="<|begin|>")
    found.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture(scope="session")
def prose() -> str:
    """12,000 characters of words in paragraphs, no two alike."""
    words = SENTENCE.split()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (2200,), generator=generator).tolist()
    paragraphs = [" ".join(words[i] for i in picks[start : start + 100]) for start in range(0, len(picks), 100)]
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of a random two-layer Llama with tied embeddings and the byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny_llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
