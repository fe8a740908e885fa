"""Text for the example: the Python standard library, a local file or folder, or a data set of the Hub."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import torch

END_OF_TEXT = "<|endoftext|>"

# Generated tables and test suites teach a language model little; installed packages differ from machine to
# machine.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def standard_library_files() -> list[Path]:
    """Python's own sources and language reference (`pydoc_data`), in the same order everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    if not files:
        raise SystemExit(f"no Python sources under {root}: name a text file or folder with --dataset")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_documents(files: list[Path], limit: int) -> list[str]:
    """Whole files up to `limit` characters together; what is not UTF-8 text is skipped."""
    documents: list[str] = []
    size = 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if size + len(text) > limit:
            # One huge file is still better than nothing.
            documents += [] if documents else [text[:limit]]
            break
        documents.append(text)
        size += len(text)
    return [text for text in documents if text.strip()]


def hub_documents(name: str, column: str, limit: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit(
            f"--dataset {name}: no such file or folder, and a Hub data set needs `pip install datasets`"
        ) from None
    documents: list[str] = []
    size = 0
    for row in load_dataset(name, split="train", streaming=True):
        if column not in row:
            raise SystemExit(
                f"--dataset {name} has no column {column!r}; --text-column takes: {', '.join(row)}"
            )
        documents.append(row[column])
        size += len(row[column])
        if size >= limit:
            break
    return documents


def load_documents(dataset: str | None, column: str, limit: int) -> list[str]:
    if dataset is None:
        return read_documents(standard_library_files(), limit)
    path = Path(dataset).expanduser()
    if path.is_file():
        return read_documents([path], limit)
    if path.is_dir():
        return read_documents(sorted(p for p in path.rglob("*") if p.is_file()), limit)
    return hub_documents(dataset, column, limit)


def train_tokenizer(documents: list[str], vocabulary: int, folder: Path):
    """A byte-level BPE tokenizer of these documents, kept in `folder` until they or its size change."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fingerprint = hashlib.sha256("\0".join([str(vocabulary), *documents]).encode()).hexdigest()
    file, stamp = folder / "tokenizer.json", folder / "tokenizer.made_from.json"
    if file.exists() and stamp.exists() and json.loads(stamp.read_text()) == fingerprint:
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    stamp.write_text(json.dumps(fingerprint))
    return tokenizer


def to_blocks(encoded: list[list[int]], end_of_text: int | None, length: int) -> torch.Tensor:
    """All documents in one row, each ended by the end-of-text token, cut into sequences of equal length."""
    separator = [] if end_of_text is None else [end_of_text]
    tokens = torch.tensor([token for document in encoded for token in (*document, *separator)])
    count = len(tokens) // length
    if not count:
        raise SystemExit(f"the text has {len(tokens)} tokens, fewer than one sequence of {length}")
    return tokens[: count * length].view(count, length)
