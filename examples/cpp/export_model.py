"""Compiles a patched model ahead of time into a package that the C++ program ``score`` runs without Python.

    python examples/cpp/export_model.py --output build/cpp
    build/cpp/score build/cpp/model.pt2 build/cpp/tokens.txt

The model is a small LLaMA with random weights, or a local folder or Hub name given with ``--model``. The
package takes token ids (1, S) and returns the mean loss of predicting each from those before it; inside, the
operators of liger_ops are what they are in Python, so the logits are never held. ``tokens.txt`` holds the
token ids of a text, and the number printed here is what ``score`` must print.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from liger_ops.transformers import patch

LONGEST = 4096


class Scorer(nn.Module):
    """Token ids (1, S) to their mean next-token loss, 0-d float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens, skip_logits=True, use_cache=False).loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="local folder or Hub name; default: a small LLaMA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("build/cpp"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    texts = _small_model.documents()
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    else:
        torch.manual_seed(0)
        tokenizer = _small_model.tokenizer(texts, arguments.output)
        model = _small_model.model(tokenizer)
    longest = min(LONGEST, model.config.max_position_embeddings)
    patch(model, strict=True)
    scorer = Scorer(model).to(arguments.device).eval()

    tokens = torch.tensor([tokenizer(texts[0])["input_ids"][:longest]], device=arguments.device)
    length = torch.export.Dim.DYNAMIC(min=2, max=longest)
    with torch.no_grad():
        # Exported at another length than the one that is scored below.
        program = torch.export.export(scorer, (tokens[:, :-3],), dynamic_shapes=({1: length},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(arguments.output / "model.pt2"))
        loss = scorer(tokens).item()
    (arguments.output / "tokens.txt").write_text(" ".join(map(str, tokens[0].tolist())) + "\n")
    print(f"loss {loss:.6f} over {tokens.shape[1] - 1} predictions")


if __name__ == "__main__":
    main()
