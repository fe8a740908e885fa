"""Trains Medusa heads with the Hugging Face Trainer, and shows by how much they speed up greedy decoding.

    python examples/medusa/train.py

A small LLaMA first learns the Python standard library's text; then come stage 1 (heads on the frozen base)
and stage 2 (heads and base together). Before and after each stage the heads propose tokens for held-out text,
and the base verifies them: the acceptance length is what one forward of the base yields.

    python examples/medusa/train.py --shape llama-3-8b --batch 1 --length 8192 --stage-2-steps 0

trains heads for a model of LLaMA 3 8B's shape with random weights: what a real one takes in time and memory.
`--plain` computes the same losses as one would without liger_ops, from the logits of every head.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from liger_ops.medusa import MedusaCallback, MedusaModel, add_medusa_heads, parameter_groups
from liger_ops.transformers import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _text import END_OF_TEXT, load_documents, to_blocks, train_tokenizer  # noqa: E402

GIB = 2**30
# Tables must not fold where the output is a file or a pipe, whose width rich takes for 80.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass
class Size:
    """A model, and how much it is trained on what unless options say otherwise."""

    config: dict
    text: int
    vocabulary: int
    length: int
    batch: int
    base_steps: int
    stage_1_steps: int
    stage_2_steps: int


SIZES = {
    "tiny": Size(
        dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4),
        60_000, 500, 64, 8, base_steps=150, stage_1_steps=80, stage_2_steps=20,
    ),
    "small": Size(
        dict(hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=6),
        600_000, 2000, 128, 8, base_steps=400, stage_1_steps=200, stage_2_steps=60,
    ),
    "llama-3-8b": Size(
        dict(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
            rope_parameters=dict(rope_type="default", rope_theta=5e5),
        ),
        4_000_000, 8000, 2048, 1, base_steps=0, stage_1_steps=8, stage_2_steps=0,
    ),
}  # fmt: skip


class PlainTrainer(Trainer):
    """The loss as code without fused operators has it: logits of each head, cut, then cross entropy."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        medusa = self.accelerator.unwrap_model(model)
        labels = inputs["labels"]
        with torch.set_grad_enabled(medusa.stage == 2):
            hidden = medusa.causal_model.model(inputs["input_ids"], use_cache=False).last_hidden_state
        heads = list(zip(range(2, 2 + len(medusa.heads)), medusa.heads, medusa.coefficients, strict=True))
        if medusa.stage == 2:
            heads.append((1, medusa.causal_model.lm_head, 1.0))
        loss = 0.0
        for ahead, head, coefficient in heads:
            logits = head(hidden)[:, :-ahead].flatten(0, 1)
            total = F.cross_entropy(logits, labels[:, ahead:].flatten(), reduction="sum")
            ramp = medusa.ramp if ahead > 1 else 1.0
            loss = loss + ramp * coefficient * total / num_items_in_batch
        return (loss, {}) if return_outputs else loss


class StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_, **__) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Of a step, without the first two."""
        seconds = sorted(b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False))
        return seconds[len(seconds) // 2] if seconds else float("nan")


def prepare_text(options: argparse.Namespace, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Token blocks to train on, and held-out ones."""
    documents = load_documents(options.dataset, "text", size.text)
    tokenizer = train_tokenizer(documents, size.vocabulary, options.output)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    blocks = to_blocks(encoded, tokenizer.token_to_id(END_OF_TEXT), options.length)
    held_out = max(1, min(8, len(blocks) // 10))
    if len(blocks) <= held_out:
        raise SystemExit(f"the text makes {len(blocks)} sequences of {options.length} tokens: too few")
    # From all over the text: its end is one document.
    chosen = torch.zeros(len(blocks), dtype=torch.bool)
    chosen[torch.linspace(0, len(blocks) - 1, held_out).long()] = True
    return blocks[~chosen], blocks[chosen]


def build_base(options: argparse.Namespace, size: Size) -> LlamaForCausalLM:
    config = LlamaConfig(
        **dict(vocab_size=size.vocabulary, max_position_embeddings=2 * options.length) | size.config
    )
    cuda = options.device == "cuda"
    default = torch.get_default_dtype()
    # Random weights right where and as what they are needed: 8 billion take long to make and to move.
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def train(
    options: argparse.Namespace,
    model: torch.nn.Module,
    blocks: torch.Tensor,
    name: str,
    steps: int,
    rate: float,
) -> dict:
    clock = StepClock()
    medusa = isinstance(model, MedusaModel)
    optimizer = None
    if medusa:
        groups = parameter_groups(model, rate / 4, rate)
        optimizer = torch.optim.AdamW(groups, fused=options.device == "cuda")
    trainer = (PlainTrainer if options.plain and medusa else Trainer)(
        model=model,
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        callbacks=[clock, MedusaCallback()] if medusa else [clock],
        optimizers=(optimizer, None),
        args=TrainingArguments(
            output_dir=str(options.output / name),
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            gradient_checkpointing=options.gradient_checkpointing,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps // 10),
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
            seed=options.seed,
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
            disable_tqdm=True,
        ),
    )
    # One process, one GPU: DataParallel would copy the model to all others at every step.
    trainer.args._n_gpu = min(1, trainer.args.n_gpu)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "steps": steps,
        "losses": [entry["loss"] for entry in logged],
        "head_losses": [[entry[key] for key in sorted(entry) if key.startswith("head_")] for entry in logged],
        "tokens_per_second": options.batch * options.length / clock.median(),
    }
    if options.device == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
    return record


def acceptance(model: MedusaModel, prompts: torch.Tensor, tokens: int) -> dict:
    """Mean tokens per forward on held-out text; every output is compared with the base's own."""
    lengths: list[int] = []
    equal = 0
    model.eval()
    for prompt in prompts:
        prompt = prompt[None, : len(prompt) // 2].to(model.device)
        result = model.generate(prompt, max_new_tokens=tokens)
        own = model.base.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        equal += torch.equal(result.sequences, own)
        lengths += result.acceptance_lengths
    return {
        "acceptance_length": sum(lengths) / max(1, len(lengths)),
        "outputs_equal_to_the_base": equal,
        "prompts": len(prompts),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SIZES, default="small")
    parser.add_argument("--quick", action="store_true", help="the tiny model: does everything work?")
    parser.add_argument("--dataset", help="text file, folder, or Hub name (Python's standard library)")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=1, help="residual blocks in each head (1)")
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--stage-2-coefficient", type=float, default=0.2, help="of the heads' losses (0.2)")
    parser.add_argument(
        "--schedule", choices=("constant", "linear", "sine"), default="sine", help="in stage 2 (sine)"
    )
    parser.add_argument("--base-steps", type=int, help="steps of the base before it gets heads")
    parser.add_argument("--stage-1-steps", type=int)
    parser.add_argument("--stage-2-steps", type=int)
    parser.add_argument("--lora", action="store_true", help="train an adapter of the base in stage 2")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="of the heads; the base has a quarter"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--new-tokens", type=int, default=40, help="generated for each prompt (40)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--plain", action="store_true", help="without liger_ops' operators")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/medusa"))
    options = parser.parse_args()
    if options.quick:
        options.shape = "tiny"
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[options.shape]
    for name in ("batch", "length", "base_steps", "stage_1_steps", "stage_2_steps"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(size, name))
    return options


def main() -> None:
    options = parse()
    size = SIZES[options.shape]
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    blocks, held_out = prepare_text(options, size)
    base = build_base(options, size)
    if not options.plain:
        console.print(patch(base))
    report: dict = {"options": {k: str(v) for k, v in vars(options).items()}}
    table = Table(title="Medusa heads, held-out text", title_justify="left")
    for name in (
        "after",
        "loss",
        "tokens/s",
        "peak GiB",
        "tokens per forward",
        "outputs equal to the base's",
    ):
        table.add_column(name, justify="left" if name == "after" else "right")

    def note(name: str, record: dict, model: MedusaModel | None) -> None:
        if model is not None:
            record |= acceptance(model, held_out, options.new_tokens)
        report[name] = record
        losses = record.get("losses")
        table.add_row(
            name,
            f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "",
            f"{record['tokens_per_second']:,.0f}" if losses else "",
            f"{record['peak_memory_gib']:.1f}" if "peak_memory_gib" in record else "",
            f"{record['acceptance_length']:.2f}" if model else "",
            f"{record['outputs_equal_to_the_base']} of {record['prompts']}" if model else "",
        )

    if options.base_steps:
        note("base", train(options, base, blocks, "base", options.base_steps, 3e-3), None)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        base = get_peft_model(base, adapter)
    model = add_medusa_heads(base, num_heads=options.heads, num_layers=options.layers, decay=options.decay)
    note("heads added", {}, model)
    note(
        "stage 1",
        train(options, model, blocks, "stage_1", options.stage_1_steps, options.learning_rate),
        model,
    )
    model.save_heads(options.output / "heads")
    if options.stage_2_steps:
        model.set_stage(2, heads_coefficient=options.stage_2_coefficient, schedule=options.schedule)
        rate = options.learning_rate / 4
        note("stage 2", train(options, model, blocks, "stage_2", options.stage_2_steps, rate), model)
        model.save_pretrained(options.output / "stage_2")
    console.print(table)
    (options.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"heads and results.json are in {options.output}")


if __name__ == "__main__":
    main()
