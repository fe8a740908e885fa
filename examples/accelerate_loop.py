"""A training loop of one's own with accelerate: fused operators by one call to `patch`.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --mixed-precision bf16

Patch before `prepare`, which keeps the forward that it finds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _small_model
import torch
from accelerate import Accelerator

from liger_ops.transformers import patch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2, help="batches in one step")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--output", type=Path, default=Path("outputs/accelerate_loop"))
    options = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate
    )
    torch.manual_seed(0)
    texts = _small_model.documents()
    tokenizer = _small_model.tokenizer(texts, options.output)
    blocks = _small_model.blocks(texts, tokenizer)
    model = _small_model.model(tokenizer)
    accelerator.print(patch(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = torch.utils.data.DataLoader(blocks, batch_size=options.batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for _ in range(options.epochs):
        for index, ids in enumerate(loader):
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if index % 20 == 0:
                accelerator.print(f"batch {index:4d}  loss {loss.item():.4f}")

    # Every process takes part in gathering what FSDP and ZeRO-3 have spread; one writes.
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        options.output, is_main_process=accelerator.is_main_process, state_dict=weights
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
