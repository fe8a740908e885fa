"""A `LightningModule` around a patched Hugging Face model.

python examples/lightning_module.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _small_model
import lightning
import torch
from transformers import PreTrainedModel

from liger_ops.transformers import patch


class LanguageModel(lightning.LightningModule):
    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        # Before Lightning's strategies (DDP, FSDP, ...) wrap the module.
        self.report = patch(model)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, ids: torch.Tensor, index: int) -> None:
        # In evaluation mode a model returns logits, unless told that nobody reads them.
        self.log("validation_loss", self.model(input_ids=ids, labels=ids, skip_logits=True).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="32-true", help="of Lightning's Trainer, such as bf16-mixed")
    parser.add_argument("--accelerator", default="auto", help="of Lightning's Trainer, such as cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/lightning_module"))
    options = parser.parse_args()

    lightning.seed_everything(0)
    texts = _small_model.documents()
    tokenizer = _small_model.tokenizer(texts, options.output)
    blocks = _small_model.blocks(texts, tokenizer)
    module = LanguageModel(_small_model.model(tokenizer), learning_rate=2e-3)
    print(module.report)

    held_out = len(blocks) // 10
    loaders = [
        torch.utils.data.DataLoader(part, batch_size=options.batch, shuffle=shuffle)
        for part, shuffle in ((blocks[held_out:], True), (blocks[:held_out], False))
    ]
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        accelerator=options.accelerator,
        devices=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=options.output,
        logger=False,
    )
    trainer.fit(module, *loaders)
    print(f"validation loss {trainer.callback_metrics['validation_loss'].item():.4f}")
    module.model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
