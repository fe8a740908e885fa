"""Patched models under ``torch.compile``."""

import pytest
import torch
from tiny import BATCH, LENGTH, batch, pair, tiny, train, twin

from liger_ops.transformers import patch

# The families whose forwards differ from each other's. Qwen2-VL's own vision tower breaks the graph: it asks
# the images for their sizes.
DIFFERENT = ("llama", "gemma2", "phi3", "mllama", "qwen2_vl")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "backend"), [("llama", "inductor"), *((family, "aot_eager") for family in DIFFERENT)]
)
def test_trains_like_eager(family, backend, device):
    model, _ = pair(family, device)
    eager = twin(model)
    patch(eager)
    if backend == "aot_eager":
        model.gradient_checkpointing_enable()
        # transformers warns about the cache with checkpointing, and dynamo breaks on the warning.
        model.config.get_text_config().use_cache = False
    compiled = torch.compile(model, fullgraph=family != "qwen2_vl", backend=backend)
    losses = train(model, 4, forward=compiled, device=device, family=family)
    assert losses == pytest.approx(train(eager, 4, device=device, family=family), rel=1e-4)


def test_with_num_items(device):
    model, _ = pair("llama", device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for items in (16, 7):
        count = torch.tensor(items, device=device)
        loss = compiled(**batch(device), num_items_in_batch=count).loss
        torch.testing.assert_close(loss, model(**batch(device), num_items_in_batch=count).loss)
        # What the Trainer does to the loss before backward.
        loss *= 2
        loss.backward()


def test_in_evaluation_returns_logits(device):
    model, _ = pair("llama", device)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, expected = compiled(**batch(device)), model(**batch(device))
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.logits.shape == (BATCH, LENGTH, model.config.vocab_size)


def test_patch_and_undo_reach_a_compiled_model(device):
    model = tiny(device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(**batch(device)).logits is not None
    report = patch(model)
    assert compiled(**batch(device)).logits is None
    report.undo()
    assert compiled(**batch(device)).logits is not None
