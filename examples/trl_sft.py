"""Supervised fine-tuning with TRL's `SFTTrainer`, on fused norms, rotary embedding and MLPs.

    python examples/trl_sft.py

SFTTrainer computes the loss with a head of its own that holds no logits either, so the flag replaces the
layers and leaves the head to TRL. `--head liger` computes it with ours instead: the same loss, in one pass
over the vocabulary rather than two, without TRL's entropy and token accuracy in the log.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _small_model
import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import liger_ops.transformers
from liger_ops.transformers.trainer import reports

# After TRL is imported, so that SFTConfig accepts `use_liger` too.
liger_ops.transformers.install()


class LigerHeadTrainer(SFTTrainer):
    """Takes the loss that the patched model returns, as transformers' Trainer does."""

    compute_loss = Trainer.compute_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--head", choices=("trl", "liger"), default="trl", help="what computes the loss")
    parser.add_argument("--lora", action="store_true", help="train adapters of PEFT only")
    parser.add_argument("--output", type=Path, default=Path("outputs/trl_sft"))
    options = parser.parse_args()

    torch.manual_seed(0)
    texts = _small_model.documents()
    tokenizer = _small_model.tokenizer(texts, options.output)
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    adapters = None
    if options.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=8, target_modules="all-linear")
    cuda = torch.cuda.is_available() and not options.cpu
    model = _small_model.model(tokenizer)
    if options.head == "liger":
        # SFTTrainer keeps the flag away from the head, so the model is patched here.
        print(liger_ops.transformers.patch(model))
    trainer = (LigerHeadTrainer if options.head == "liger" else SFTTrainer)(
        model=model,
        args=SFTConfig(
            output_dir=str(options.output),
            use_liger=True,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=2e-3,
            max_length=_small_model.LENGTH,
            packing=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=cuda,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
        ),
        train_dataset=Dataset.from_dict({"text": paragraphs}),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.train()
    print(*reports(), sep="\n")
    trainer.save_model(str(options.output))


if __name__ == "__main__":
    main()
