"""A language model of one's own on `liger_ops.functional`: no transformers, no patching.

    python examples/custom_model.py

A decoder as in LLaMA. The residual stream and the norm after it are one operator (`add_rms_norm`), gate and
up are one matrix (`swiglu_packed`), and the loss comes straight from the hidden states
(`fused_linear_cross_entropy`), so that logits exist for generation only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _text import END_OF_TEXT, read_documents, standard_library_files, to_blocks, train_tokenizer
from torch import Tensor, nn

import liger_ops.functional as LF

VOCABULARY, LENGTH = 2000, 64


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Views into one buffer, [batch, heads, positions, head_dim]; rope reads them where they are.
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split(self.sizes, dim=-1)
        )
        q, k = LF.rope(q, k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    def __init__(self, hidden: int, intermediate: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.attention = Attention(hidden, heads, kv_heads)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, stream: Tensor, branch: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is to be added to it: the next norm does that."""
        x, stream = LF.add_rms_norm(branch, stream, self.attention_norm)
        x, stream = LF.add_rms_norm(self.attention(x, cos, sin), stream, self.mlp_norm)
        return stream, self.down(LF.swiglu_packed(self.gate_up(x)))


class Decoder(nn.Module):
    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        hidden: int = 64,
        intermediate: int = 160,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        length: int = LENGTH,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, intermediate, heads, kv_heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(hidden))
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        head_dim = hidden // heads
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
        # Float32 whatever the model's dtype is.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden_states(self, ids: Tensor) -> Tensor:
        stream = self.embedding(ids)
        branch = torch.zeros_like(stream)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            stream, branch = layer(stream, branch, cos, sin)
        return LF.add_rms_norm(branch, stream, self.norm)[0]

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.hidden_states(ids[:, :-1]).flatten(0, 1)
        return LF.fused_linear_cross_entropy(hidden, self.head.weight, ids[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        for _ in range(count):
            last = self.hidden_states(ids[:, -self.cos.shape[0] :])[:, -1]
            ids = torch.cat([ids, self.head(last).argmax(-1, keepdim=True)], dim=1)
        return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="one graph for the whole loss")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/custom_model"))
    options = parser.parse_args()

    torch.manual_seed(0)
    texts = read_documents(standard_library_files(), 100_000)
    tokenizer = train_tokenizer(texts, VOCABULARY, options.output)
    encoded = [tokenizer.encode(text).ids for text in texts]
    blocks = to_blocks(encoded, tokenizer.token_to_id(END_OF_TEXT), LENGTH)

    model = Decoder().to(options.device)
    loss_of = torch.compile(model.loss, fullgraph=True) if options.compile else model.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = torch.utils.data.DataLoader(blocks, batch_size=options.batch, shuffle=True, drop_last=True)
    step = 0
    for _ in range(options.epochs):
        for ids in loader:
            loss = loss_of(ids.to(options.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                print(f"step {step:4d}  loss {loss.item():.4f}")
            step += 1
    prompt = torch.tensor([tokenizer.encode("def __init__(self").ids], device=options.device)
    print(tokenizer.decode(model.generate(prompt, 12)[0].tolist()))
    torch.save(model.state_dict(), options.output / "model.pt")


if __name__ == "__main__":
    main()
