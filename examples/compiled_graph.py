"""The operators inside `torch.compile`'s graphs: what is captured, forward and backward, and in an export.

    python examples/compiled_graph.py

Each call of `torch.ops.liger` is one node with known shapes. Nothing breaks the graph, nothing is traced
into, and sizes stay symbolic.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import liger_ops  # noqa: F401  (registers torch.ops.liger)

liger = torch.ops.liger


class Block(nn.Module):
    """A norm, a gated MLP and the loss of a head."""

    def __init__(self, hidden: int = 32, intermediate: int = 64, classes: int = 100) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)
        self.head = nn.Parameter(torch.randn(classes, hidden) / hidden**0.5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y, _ = liger.rms_norm(x, self.norm)
        gate, up = self.gate_up(y).chunk(2, dim=-1)
        x = x + self.down(liger.swiglu(gate, up))
        return liger.fused_linear_cross_entropy(x, self.head, target)[0]


def calls(graph: torch.fx.GraphModule) -> Counter:
    """How often each operator of liger_ops is in a graph."""
    return Counter(
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("liger.")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", action="store_true", help="print the whole forward graph")
    options = parser.parse_args()

    torch.manual_seed(0)
    block = Block()
    captured: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str):
        def compiler(graph: torch.fx.GraphModule, inputs):
            captured[name] = graph
            return make_boxed_func(graph)

        return compiler

    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for rows in (8, 24):
        x, target = torch.randn(rows, 32), torch.randint(100, (rows,))
        loss = compiled(x, target)
        loss.backward()
        torch.testing.assert_close(loss, block(x, target))
    print("torch.compile: one graph for 8 and for 24 rows")
    for name, graph in captured.items():
        print(f"{name}:")
        for operator, count in sorted(calls(graph).items()):
            print(f"  {operator}  x{count}")
    if options.graph:
        captured["forward"].print_readable()

    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(block, (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    print("torch.export:")
    for operator, count in sorted(calls(exported.graph_module).items()):
        print(f"  {operator}  x{count}")


if __name__ == "__main__":
    main()
