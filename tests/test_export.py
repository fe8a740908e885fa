"""torch.export keeps the operators as nodes, and the exported program computes the same."""

import io

import torch
from torch import nn

import liger_ops.functional as LF


class Block(nn.Module):
    """Every operator once, as a tiny model would use them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.randn(32))
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 97)

    def forward(self, x, cos, sin, target):
        q = LF.rms_norm(x, self.norm).unflatten(-1, (4, 8)).transpose(1, 2)
        q, _ = LF.rope(q, q, cos, sin)
        x = x + q.transpose(1, 2).flatten(2)
        x = x + self.down(LF.swiglu(self.gate(x), self.up(x)))
        rows, target = x.flatten(0, 1), target.flatten()
        fused = LF.fused_linear_cross_entropy(rows, self.head.weight, target, self.head.bias)
        return fused, LF.cross_entropy(self.head(rows), target)


def arguments(positions=6):
    angle = torch.randn(1, positions, 8)
    return torch.randn(2, positions, 32), angle.cos(), angle.sin(), torch.randint(97, (2, positions))


def operators_in(program) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("liger")}


def test_export_and_reload():
    module = Block().eval()
    positions = torch.export.Dim("positions", min=2, max=64)
    shapes = ({1: positions}, {1: positions}, {1: positions}, {1: positions})
    program = torch.export.export(module, arguments(), dynamic_shapes=shapes)
    assert {name.split(".")[1] for name in operators_in(program)} >= {"rms_norm", "rope", "swiglu"}
    assert any("cross_entropy" in name for name in operators_in(program))

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    reloaded = torch.export.load(buffer).module()
    inputs = arguments(positions=11)
    for result, expected in zip(reloaded(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(result, expected)


def test_decompositions_leave_the_operators_alone():
    program = torch.export.export(Block().eval(), arguments())
    assert operators_in(program.run_decompositions()) == operators_in(program)
