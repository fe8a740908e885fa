"""What the short examples train: a small LLaMA with random weights, on the text of ``_text.py``."""

from __future__ import annotations

from pathlib import Path

import torch
from _text import END_OF_TEXT, read_documents, standard_library_files, to_blocks, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LENGTH = 64
VOCABULARY = 2000


def documents() -> list[str]:
    """Some 100 kB of the Python standard library."""
    return read_documents(standard_library_files(), 100_000)


def tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer trained on these texts, and kept in ``folder``."""
    core = train_tokenizer(texts, VOCABULARY, folder)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The texts as sequences of ``LENGTH`` tokens."""
    return to_blocks(tokenizer(texts)["input_ids"], tokenizer.eos_token_id, LENGTH)


def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
