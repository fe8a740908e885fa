"""FSDP2 in PyTorch alone: shard every block and the whole, train, and save a sharded checkpoint.

    torchrun --nproc-per-node=2 examples/distributed/fsdp2.py
    torchrun --nproc-per-node=2 examples/distributed/fsdp2.py --tensor-parallel 2

`patch` may come before or after sharding. The fused loss runs inside the head's call where the head is
sharded on its own, and from this process's classes where tensor parallelism spreads them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _small_model  # noqa: E402

from liger_ops.transformers import patch  # noqa: E402


def tensor_parallel(model: torch.nn.Module, mesh) -> None:
    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for i in range(len(model.model.layers)):
        layer = f"model.layers.{i}"
        plan |= {f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {f"{layer}.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
        plan |= {f"{layer}.self_attn.o_proj": RowwiseParallel(), f"{layer}.mlp.down_proj": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="sequences for each data-parallel process")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share each layer")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, reduce in float32")
    parser.add_argument("--output", type=Path, default=Path("outputs/fsdp2"))
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    shards = dist.get_world_size() // options.tensor_parallel
    mesh = init_device_mesh(device, (shards, options.tensor_parallel), mesh_dim_names=("fsdp", "tp"))

    torch.manual_seed(0)
    texts = _small_model.documents()
    tokenizer = _small_model.tokenizer(texts, options.output / f"rank{dist.get_rank()}")
    blocks = _small_model.blocks(texts, tokenizer)
    model = _small_model.model(tokenizer).to(device)
    report = patch(model)

    if options.tensor_parallel > 1:
        tensor_parallel(model, mesh["tp"])
    policy = MixedPrecisionPolicy()
    if options.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"], mp_policy=policy)
    # The last norm and the head are used one after the other, and again first in backward.
    fully_shard(
        [model.model.norm, model.lm_head], mesh=mesh["fsdp"], mp_policy=policy, reshard_after_forward=False
    )
    fully_shard(model, mesh=mesh["fsdp"], mp_policy=policy)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(mesh["fsdp"].get_local_rank())
    if dist.get_rank() == 0:
        print(report)
    for step in range(options.steps):
        ids = blocks[torch.randint(len(blocks), (options.batch,), generator=generator)].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step:4d}  loss {mean.item() / dist.get_world_size():.4f}")

    checkpoint.save(get_model_state_dict(model), checkpoint_id=options.output / "checkpoint")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
