"""Medusa heads in the Trainer, on bases with adapters, and under wrappers for several devices."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_trainer import dataset
from tiny import Operators, assert_same_gradients, batch, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from liger_ops.medusa import MedusaCallback, MedusaModel, add_medusa_heads, parameter_groups
from liger_ops.transformers import install, patch, uninstall

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture
def arguments(tmp_path, device):
    def make(**changes):
        quick = dict(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        made = TrainingArguments(**quick | changes)
        # With more the Trainer would take DataParallel, whose threads a dispatch mode does not see.
        made._n_gpu = min(made.n_gpu, 1)
        return made

    return make


def medusa(device, stage=1, **options):
    base = tiny("llama", device)
    patch(base, strict=True)
    return add_medusa_heads(base, num_heads=2, stage=stage, **options)


def run(model, arguments, callback=True, resume=None, **changes):
    callbacks = [MedusaCallback()] if callback else []
    trainer = Trainer(model, arguments, train_dataset=dataset(), callbacks=callbacks, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_trainer(stage, accumulation, arguments, device):
    model = medusa(device, stage)
    before = weights(model)
    trainer = run(model, arguments(gradient_accumulation_steps=accumulation))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    losses, first, second = (entries(trainer, name) for name in ("loss", "head_1_loss", "head_2_loss"))
    weighed = [0.8 * a + 0.64 * b for a, b in zip(first, second, strict=True)]
    if stage == 2:
        weighed = [w + b for w, b in zip(weighed, entries(trainer, "base_loss"), strict=True)]
    else:
        assert not entries(trainer, "base_loss")
    assert losses == pytest.approx(weighed, rel=1e-4)


def test_accumulated_steps_are_whole_batches(arguments, device):
    """Rows have different numbers of labels, so means of means would differ."""
    whole = run(medusa(device), arguments(per_device_train_batch_size=4))
    parts = run(medusa(device), arguments(per_device_train_batch_size=2, gradient_accumulation_steps=2))
    for name in ("loss", "head_1_loss", "head_2_loss"):
        assert entries(parts, name) == pytest.approx(entries(whole, name), rel=1e-4)


def test_logged_losses_are_means_over_the_steps(arguments, device):
    each = run(medusa(device), arguments())
    pairs = run(medusa(device), arguments(logging_steps=2))
    first = entries(each, "head_1_loss")
    expected = [(first[0] + first[1]) / 2, (first[2] + first[3]) / 2]
    assert entries(pairs, "head_1_loss") == pytest.approx(expected, rel=1e-4)


def test_schedule_follows_the_trainer(arguments, device):
    model = medusa(device, 2, schedule="linear")
    trainer = run(model, arguments())
    losses, base = entries(trainer, "loss"), entries(trainer, "base_loss")
    heads = [
        0.8 * a + 0.64 * b
        for a, b in zip(entries(trainer, "head_1_loss"), entries(trainer, "head_2_loss"), strict=True)
    ]
    expected = [b + h * factor for b, h, factor in zip(base, heads, (0, 0.25, 0.5, 0.75), strict=True)]
    assert losses == pytest.approx(expected, rel=1e-4)
    with pytest.raises(RuntimeError, match="give the Trainer a MedusaCallback"):
        run(medusa(device, schedule="linear"), arguments(), callback=False)


@pytest.mark.parametrize("stage", [1, 2])
def test_resume(stage, arguments, device, tmp_path, caplog):
    options = dict(save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    straight = run(medusa(device, stage, schedule="linear"), arguments(**options))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    names = load_file(checkpoint / "model.safetensors").keys()
    assert all(name.startswith("heads.") for name in names) == (stage == 1)
    resumed = run(medusa(device, stage, schedule="linear"), arguments(**options), resume=str(checkpoint))
    for (name, p), q in zip(resumed.model.named_parameters(), straight.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert "missing keys" not in caplog.text
    assert entries(resumed, "head_1_loss")[-2:] == pytest.approx(entries(straight, "head_1_loss")[-2:])
    loaded = MedusaModel.from_pretrained(
        tmp_path / "out" / "checkpoint-4", tiny("llama", device), stage=stage
    )
    inputs = batch(device)
    torch.testing.assert_close(loaded.eval()(**inputs).loss, straight.model.eval()(**inputs).loss)


@pytest.mark.parametrize(
    "options",
    [
        dict(bf16=True),
        dict(fp16=True),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)),
        dict(eval_strategy="steps", eval_steps=2),
        dict(torch_compile=True, torch_compile_backend="aot_eager"),
    ],
    ids=["bf16", "fp16", "checkpointing", "reentrant_checkpointing", "evaluation", "compile"],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_trainer_options(stage, options, arguments, device):
    if options.get("fp16") and device == "cpu":
        pytest.skip("the Trainer's float16 needs a GPU")
    extra = {}
    if "eval_strategy" in options:
        extra = dict(
            eval_dataset=dataset(4), compute_metrics=lambda p: {"columns": float(p.predictions[0].shape[-1])}
        )
    model = medusa(device, stage)
    before = weights(model)
    trainer = run(model, arguments(**options), **extra)
    assert all(loss > 0 for loss in entries(trainer, "loss"))
    assert all(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if name.startswith("heads.")
    )
    if extra:
        assert entries(trainer, "eval_columns") == [model.config.vocab_size] * 2


def test_the_trainers_flag_patches_the_base(arguments, device):
    install()
    try:
        model = add_medusa_heads(tiny("llama", device), num_heads=2, stage=2)
        with Operators() as operators:
            run(model, arguments(use_liger=True))
    finally:
        uninstall()
    assert operators.calls["fused_linear_cross_entropy"] == 3 * 4
    assert operators.calls["rms_norm"] == 5 * 4


def test_parameter_groups(arguments, device):
    model = medusa(device, 2)
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "base": (1e-3, 0.1),
        "base_vectors": (1e-3, 0.0),
        "heads": (4e-3, 0.1),
        "heads_vectors": (4e-3, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    model.set_stage(1)
    names = [group["name"] for group in parameter_groups(model, 1e-3, 1e-2)]
    assert names == ["heads_vectors", "heads"] or names == ["heads", "heads_vectors"]
    model.set_stage(2)
    before = weights(model)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0, 1e-2))
    run(model, arguments(), optimizers=(optimizer, None))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if name.startswith("heads.")}


# ---------------------------------------------------------------------------------------------- adapters


def lora(device, **changes):
    peft = pytest.importorskip("peft")
    base = tiny("llama", device)
    patch(base, strict=True)
    torch.manual_seed(3)
    config = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) | changes
    return peft.get_peft_model(base, peft.LoraConfig(**config))


def test_stage_2_trains_adapters(arguments, device, tmp_path):
    model = add_medusa_heads(lora(device), num_heads=2)
    assert all(name.startswith("heads.") for name, p in model.named_parameters() if p.requires_grad)
    model.set_stage(2)
    before = weights(model)
    groups = parameter_groups(model, 1e-3, 1e-3)
    assert {group["name"] for group in groups} == {"base", "heads", "heads_vectors"}
    run(model, arguments(save_strategy="steps", save_steps=4))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("heads.") or "lora_" in name}
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert load_file(checkpoint / "model.safetensors").keys() == changed
    loaded = MedusaModel.from_pretrained(checkpoint, lora(device), stage=2)
    inputs = batch(device)
    torch.testing.assert_close(loaded.eval()(**inputs).loss, model.eval()(**inputs).loss)
    # The adapter is the base's own to save.
    model.base.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_adapter_on_the_head_takes_part(device):
    model = add_medusa_heads(lora(device, target_modules=["q_proj", "lm_head"]), num_heads=2, stage=2)
    out = model.train()(**batch(device))
    out.loss.backward()
    weighed = out.base_loss[0] + (out.head_losses * model.coefficients).sum()
    torch.testing.assert_close(out.loss, weighed)
    adapters = [p for name, p in model.named_parameters() if "lm_head.lora" in name]
    assert len(adapters) == 2 and all(p.grad.abs().max() > 0 for p in adapters)
    hidden = model.causal_model.model(batch(device)["input_ids"]).last_hidden_state
    labels = batch(device)["labels"]
    logits = model.causal_model.lm_head(hidden)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        out.base_loss[0], torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    )
    got = model.eval().generate(batch(device)["input_ids"][:1], max_new_tokens=6, eos_token_id=[])
    model.causal_model.generation_config.eos_token_id = None
    expected = model.base.generate(
        input_ids=batch(device)["input_ids"][:1], max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(got.sequences, expected)


def test_prompt_learning_is_refused(device):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING, which adds tokens of its own: use LoRA"):
        add_medusa_heads(peft.get_peft_model(tiny("llama", device), config))


def test_adapters_on_the_heads_are_refused(device):
    """The loss reads the heads' weights; an adapter there would be left out without a word."""
    peft = pytest.importorskip("peft")
    model = medusa(device)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r"heads\.0\.1"), model)
    with pytest.raises(NotImplementedError, match="head 0 of the Medusa heads has a Linear in place"):
        model(**batch(device))


# ------------------------------------------------------------------------------------------- many devices


@pytest.fixture
def process_group(tmp_path, device):
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, forward=None):
    model.zero_grad()
    loss = (forward or model)(**batch(next(model.parameters()).device)).loss
    loss.backward()
    whole = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {
        n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in whole.items()
    }


@pytest.mark.parametrize("stage", [1, 2])
def test_distributed_data_parallel(stage, process_group, device):
    model = medusa(device, stage).train()
    expected = gradients(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        loss, got = gradients(model, wrapped)
        torch.testing.assert_close(loss, expected[0])
        assert_same_gradients(got, expected[1])


@pytest.mark.parametrize("stage", [1, 2])
def test_fully_shard(stage, process_group, device):
    expected = gradients(medusa(device, stage).train())
    model = medusa(device, stage).train()
    mesh = init_device_mesh(device, (1,))
    for layer in model.causal_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, got = gradients(model)
    torch.testing.assert_close(loss, expected[0])
    assert_same_gradients(got, expected[1])


def replicated(module):
    """What ``DataParallel`` makes of a module for another device: plain tensors in place of parameters."""
    copy = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            copy._parameters[name] = None
        else:
            setattr(copy, name, parameter * 1)
    for name, child in module._modules.items():
        copy._modules[name] = replicated(child)
    return copy


@pytest.mark.parametrize("stage", [1, 2])
def test_data_parallel_replicas(stage, device):
    model = medusa(device, stage).train()
    expected = gradients(model)
    forward = replicated(model) if device == "cpu" else torch.nn.DataParallel(model, device_ids=[0])
    loss, got = gradients(model, forward)
    torch.testing.assert_close(loss.reshape(-1)[0], expected[0])
    assert_same_gradients(got, expected[1])


def test_checkpoint_without_the_file_of_the_heads(arguments, device, tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    run(medusa(device), arguments(**options))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.move(checkpoint / "model.safetensors", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        run(medusa(device), arguments(**options), resume=str(checkpoint))
