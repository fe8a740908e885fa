"""The model shapes that benchmarks know by name. Adding a model is adding a line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's layers that decide how long its operators take."""

    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES: dict[str, Shape] = {
    # Finishes in milliseconds: for the tests of the benchmark itself, meaningless as a measurement.
    "tiny": Shape(64, 160, 500, 4, 2, 16),
    # So little work that a call costs what the host spends on it.
    "host": Shape(1024, 1024, 1024, 8, 8, 128),
    # LLaMA proportions with the LLaMA 2 vocabulary, sized for a CPU with few cores.
    "llama-h512": Shape(512, 1408, 32000, 8, 8, 64),
    "llama-h1024": Shape(1024, 2816, 32000, 16, 8, 64),
    "llama-h2048": Shape(2048, 5632, 32000, 32, 8, 64),
    "llama-2-7b": Shape(4096, 11008, 32000, 32, 32, 128),
    "llama-3.2-1b": Shape(2048, 8192, 128256, 32, 8, 64),
    "llama-3.1-8b": Shape(4096, 14336, 128256, 32, 8, 128),
    "llama-3.1-70b": Shape(8192, 28672, 128256, 64, 8, 128),
    "mistral-7b": Shape(4096, 14336, 32000, 32, 8, 128),
    "qwen2.5-7b": Shape(3584, 18944, 152064, 28, 4, 128),
    "gemma-2-9b": Shape(3584, 14336, 256000, 16, 8, 256),
}
