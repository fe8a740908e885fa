"""The Trainer flag, from construction to evaluation."""

import copy
import dataclasses
import inspect
import logging
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from tiny import TEXT, Operators, tiny, twin
from transformers import (
    HfArgumentParser,
    Qwen3Config,
    Qwen3ForCausalLM,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import liger

from liger_ops.transformers import install, uninstall
from liger_ops.transformers.trainer import reports

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")

ALL = {"rms_norm", "rope", "swiglu", "fused_linear_cross_entropy"}


@pytest.fixture
def installed():
    install()
    yield
    uninstall()


@pytest.fixture
def arguments(tmp_path, device):
    """Training arguments for a few quick steps, with changes."""

    def make(cls=TrainingArguments, **changes):
        quick = dict(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=0,
        )
        return cls(**quick | changes)

    return make


def dataset(rows=12):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(rows):
        ids = torch.randint(3, TEXT["vocab_size"], (12,), generator=generator)
        labels = ids.clone()
        # A different number of labels in each row, so that means of means differ from the mean.
        labels[: 1 + row % 7] = -100
        examples.append(dict(input_ids=ids, labels=labels))
    return examples


def run(model, arguments, **changes):
    trainer = Trainer(model, arguments, train_dataset=dataset(), **changes)
    with Operators() as operators:
        trainer.train()
    return trainer, operators.calls, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("flag", ["use_liger", "use_liger_kernel"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training(installed, arguments, device, flag, accumulation):
    model = tiny(device=device)
    stock, initial = twin(model), twin(model)
    options = dict(gradient_accumulation_steps=accumulation)
    _, calls, losses = run(model, arguments(**options, **{flag: True}))
    assert set(calls) >= ALL
    assert calls["fused_linear_cross_entropy"] == 3 * accumulation
    _, calls, stock_losses = run(stock, arguments(**options))
    assert not set(calls) & (ALL - {"rope"})
    assert losses == pytest.approx(stock_losses, rel=1e-4)
    for (name, p), q, start in zip(
        model.named_parameters(), stock.parameters(), initial.parameters(), strict=True
    ):
        # Adam divides by the gradient's size, so a few gradients near zero move differently.
        assert (p - q).norm() <= 2e-2 * (q - start).norm(), name


OPTIONS = {
    "bf16": dict(bf16=True),
    "fp16": dict(fp16=True),
    "checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=False)
    ),
    "reentrant_checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True)
    ),
    "accumulated_checkpointing": dict(gradient_checkpointing=True, gradient_accumulation_steps=2, bf16=True),
    "own_tokens_only": dict(average_tokens_across_devices=False),
    "clipping_and_adafactor": dict(max_grad_norm=0.1, optim="adafactor"),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", OPTIONS)
def test_training_options(installed, arguments, device, name):
    options = OPTIONS[name]
    if "fp16" in options and device == "cpu":
        pytest.skip("float16 with loss scaling is for CUDA")
    model = tiny(device=device)
    stock = twin(model)
    trainer, calls, losses = run(model, arguments(use_liger=True, **options))
    assert set(calls) >= ALL
    if "gradient_checkpointing" in options:
        # Each layer once more in backward; the norm behind the layers and the head are not recomputed.
        batches = 3 * options.get("gradient_accumulation_steps", 1)
        assert calls["rms_norm"] == 9 * batches and calls["fused_linear_cross_entropy"] == batches
    _, _, stock_losses = run(stock, arguments(**options))
    assert losses == pytest.approx(stock_losses, rel=1e-2 if {"bf16", "fp16"} & set(options) else 1e-4)


def test_accumulation_is_one_mean_over_all_tokens(installed, arguments, device):
    """Rows differ in their number of labels: a mean of the batches' means would be another loss."""
    histories = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        options = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        _, _, losses = run(tiny(device=device), arguments(use_liger=True, **options))
        histories.append(losses)
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)
    assert histories[2] == pytest.approx(histories[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel(installed, arguments):
    """The Trainer's ``nn.DataParallel`` of a process that sees several GPUs."""
    model = tiny(device="cuda")
    stock = twin(model)
    options = dict(use_cpu=False)
    trainer, _, losses = run(model, arguments(use_liger=True, **options))
    assert trainer.args.n_gpu >= 2
    _, _, stock_losses = run(stock, arguments(**options))
    assert losses == pytest.approx(stock_losses, rel=1e-4)


def test_replica_with_the_trainers_arguments(installed, arguments, device):
    """What ``nn.DataParallel`` does with a model and its arguments, without the devices."""
    model = tiny(device=device)
    stock = twin(model)
    run(model, arguments(use_liger=True, max_steps=1))
    stock.load_state_dict(model.state_dict())
    inputs = {key: torch.stack([row[key] for row in dataset(2)]).to(device) for key in dataset(1)[0]}
    # The Trainer's number of items, expanded to one row for each device and scattered.
    number = torch.tensor(17, device=device).expand(2, 1)[:1]
    replica = model._replicate_for_data_parallel()
    with Operators() as operators:
        loss = replica.train()(**inputs, num_items_in_batch=number).loss
    assert operators.calls["fused_linear_cross_entropy"] == 1
    expected = stock.train()(**inputs, num_items_in_batch=number[0, 0]).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_label_smoothing(installed, arguments, device):
    """The Trainer takes the labels away and computes the loss from logits itself."""
    model = tiny(device=device)
    stock = twin(model)
    options = dict(label_smoothing_factor=0.1)
    trainer, calls, losses = run(model, arguments(use_liger=True, **options), eval_dataset=dataset(4))
    assert "fused_linear_cross_entropy" not in calls and calls["rms_norm"]
    reference, _, stock_losses = run(stock, arguments(**options), eval_dataset=dataset(4))
    assert losses == pytest.approx(stock_losses, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-4)


def test_evaluate_and_predict(installed, arguments, device):
    model = tiny(device=device)
    stock = twin(model)
    trainer, _, _ = run(model, arguments(use_liger=True), eval_dataset=dataset(6))
    reference, _, _ = run(stock, arguments(), eval_dataset=dataset(6))
    with Operators() as operators:
        metrics = trainer.evaluate()
    # Nobody reads logits here, so none are computed.
    assert operators.calls["fused_linear_cross_entropy"] and not operators.calls["cross_entropy"]
    assert metrics["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-4)
    prediction, expected = trainer.predict(dataset(6)), reference.predict(dataset(6))
    assert prediction.predictions.shape == (6, 12, TEXT["vocab_size"])
    np.testing.assert_allclose(prediction.predictions, expected.predictions, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction_loss_only", [True, False])
def test_prediction_loss_only(installed, arguments, device, prediction_loss_only):
    options = dict(prediction_loss_only=prediction_loss_only)
    trainer, _, _ = run(tiny(device=device), arguments(use_liger=True, **options), eval_dataset=dataset(6))
    with Operators() as operators:
        loss = trainer.evaluate()["eval_loss"]
    # Without metrics nobody reads the logits, whatever the argument says.
    assert operators.calls["fused_linear_cross_entropy"] and not operators.calls["cross_entropy"]
    with Operators() as operators:
        prediction = trainer.predict(dataset(6))
    if prediction_loss_only:
        assert operators.calls["fused_linear_cross_entropy"] and prediction.predictions is None
    else:
        assert operators.calls["cross_entropy"] and prediction.predictions.shape[-1] == TEXT["vocab_size"]
    assert prediction.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_evaluate_before_training(installed, arguments, device):
    """The Trainer patches in ``train()``: until then the model is the stock one."""
    model = tiny(device=device)
    stock = twin(model)
    trainer = Trainer(
        model, arguments(use_liger=True, eval_on_start=True), train_dataset=dataset(), eval_dataset=dataset(6)
    )
    with Operators() as operators:
        before = trainer.evaluate()["eval_loss"]
    assert not operators.calls
    reference = Trainer(stock, arguments(), train_dataset=dataset(), eval_dataset=dataset(6))
    assert before == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-6)
    trainer.train()
    reference.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=1e-4)


def test_compute_metrics_gets_logits(installed, arguments, device):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer, _, _ = run(
        tiny(device=device),
        arguments(use_liger=True),
        eval_dataset=dataset(6),
        compute_metrics=compute_metrics,
    )
    assert "eval_accuracy" in trainer.evaluate()
    assert shapes == [(6, 12, TEXT["vocab_size"])]


def test_training_twice(installed, arguments, device):
    model = tiny(device=device)
    stock = twin(model)
    trainer, _, _ = run(model, arguments(use_liger=True, bf16=True))
    with Operators() as operators:
        trainer.train()
    reference, _, _ = run(stock, arguments(bf16=True))
    reference.train()
    histories = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, reference))
    assert next(histories) == pytest.approx(next(histories), rel=1e-2)
    assert operators.calls["fused_linear_cross_entropy"] == 3
    first, second = reports()
    assert not any(row.already for row in first.patched)
    assert all(row.already for row in second.patched) and not second.skipped


def test_configuration_goes_to_patch(installed, arguments, device):
    off = dict(rope=False, fused_linear_cross_entropy=False)
    _, calls, _ = run(tiny(device=device), arguments(use_liger=True, liger_kernel_config=off))
    assert calls["rms_norm"] and calls["swiglu"]
    assert not calls["rope"] and not calls["fused_linear_cross_entropy"]
    with pytest.raises(TypeError, match="unknown option ropes; the options of llama are"):
        run(tiny(device=device), arguments(use_liger=True, liger_kernel_config=dict(ropes=True)))


def test_lean_activations(installed, arguments, device):
    """The same losses, and norms that are computed again."""
    _, plain, losses = run(tiny(device=device), arguments(use_liger=True))
    options = dict(use_liger=True, liger_kernel_config=dict(lean_activations=True))
    _, calls, lean_losses = run(tiny(device=device), arguments(**options))
    assert lean_losses == losses
    # Two norms in each of two layers and three steps.
    assert calls["rms_norm"] - plain["rms_norm"] == 12
    assert [row.count for row in reports()[-1].patched if row.option == "lean_activations"] == [2]


def test_model_init(installed, arguments, device):
    trainer = Trainer(
        model_init=lambda: tiny(device=device), args=arguments(use_liger=True), train_dataset=dataset()
    )
    with Operators() as operators:
        trainer.train()
    assert operators.calls["fused_linear_cross_entropy"] == 3


def test_skipped_parts_are_logged(installed, arguments, device, caplog):
    with caplog.at_level(logging.INFO, logger="liger_ops"):
        run(tiny(device=device), arguments(use_liger=True))
        assert [record.levelname for record in caplog.records if "liger_ops on" in record.message] == ["INFO"]
        caplog.clear()
        run(tiny(device=device, hidden_act="relu"), arguments(use_liger=True))
    (record,) = (record for record in caplog.records if "liger_ops on" in record.message)
    assert record.levelname == "WARNING"
    assert "the activation is ReLU, not SiLU or GELU" in record.message
    assert "\n" not in record.message


def test_models_without_a_record(installed, arguments, device):
    """Nothing is recognised behind the user's back, and everything when asked for."""
    config = Qwen3Config(**TEXT, head_dim=8)
    with pytest.warns(UserWarning, match="model type 'qwen3' is not supported"):
        _, calls, losses = run(Qwen3ForCausalLM(config), arguments(use_liger=True))
    assert not calls
    asked = arguments(use_liger=True, liger_kernel_config=dict(recognize=True))
    _, calls, losses = run(Qwen3ForCausalLM(config), asked)
    assert set(calls) >= {"rms_norm", "rope", "swiglu", "cross_entropy"}


def test_torch_compile(installed, arguments, device):
    torch.compiler.reset()
    options = dict(use_liger=True, torch_compile=True, torch_compile_backend="aot_eager")
    model = tiny(device=device)
    stock = twin(model)
    _, _, losses = run(model, arguments(**options))
    _, _, stock_losses = run(stock, arguments())
    assert losses == pytest.approx(stock_losses, rel=1e-4)


def test_torch_compile_of_layers(installed, arguments, device, monkeypatch):
    """Accelerate compiles each layer by itself, in a copy of the model that shares its modules' state."""
    torch.compiler.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    options = dict(use_liger=True, torch_compile=True, torch_compile_backend="aot_eager")
    model = tiny(device=device)
    stock = twin(model)
    trainer, _, losses = run(model, arguments(**options))
    _, _, stock_losses = run(stock, arguments())
    layers = trainer.model_wrapped.model.layers
    assert {type(layer).__name__ for layer in layers} == {"OptimizedModule"}
    assert losses == pytest.approx(stock_losses, rel=1e-4)


@pytest.mark.slow
def test_torch_compile_by_inductor(installed, arguments, device):
    torch.compiler.reset()
    model = tiny(device=device)
    stock = twin(model)
    _, _, losses = run(model, arguments(use_liger=True, torch_compile=True))
    _, _, stock_losses = run(stock, arguments())
    assert losses == pytest.approx(stock_losses, rel=1e-4)


def saving(folder, **changes):
    return dict(output_dir=str(folder), save_strategy="steps", save_steps=2, max_steps=4, **changes)


def test_resume_from_checkpoint(installed, arguments, device, tmp_path):
    _, _, straight = run(tiny(device=device), arguments(use_liger=True, **saving(tmp_path / "one")))
    # Another model: everything comes from the checkpoint.
    other = tiny(device=device)
    other.lm_head.weight.data.zero_()
    trainer = Trainer(other, arguments(use_liger=True, **saving(tmp_path / "two")), train_dataset=dataset())
    with Operators() as operators:
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert operators.calls["fused_linear_cross_entropy"] == 2
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert resumed == pytest.approx(straight, rel=1e-5)


def test_checkpoints_switch_between_stock_and_liger(installed, arguments, device, tmp_path):
    _, _, expected = run(tiny(device=device), arguments(**saving(tmp_path / "stock")))
    for start, end in ((False, True), (True, False)):
        folder = tmp_path / f"{start}"
        run(tiny(device=device), arguments(use_liger=start, **saving(folder)))
        uninstall()
        install()
        trainer = Trainer(
            tiny(device=device), arguments(use_liger=end, **saving(folder)), train_dataset=dataset()
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == pytest.approx(expected, rel=1e-4)


LOAD = """
import sys
sys.modules["liger_ops"] = None
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.arange(3, 15).view(1, 12)
print(model(input_ids=ids, labels=ids).loss.item())
arguments = torch.load(folder + "/training_args.bin", weights_only=False)
assert type(arguments) is TrainingArguments and arguments.use_liger_kernel
torch.load(folder + "/optimizer.pt"), torch.load(folder + "/scheduler.pt")
"""


def test_checkpoints_load_without_liger_ops(installed, arguments, device, tmp_path):
    model = tiny(device=device)
    stock = twin(model)
    run(model, arguments(use_liger=True, **saving(tmp_path)))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not any("_liger" in key for key in model.config.to_dict())
    stock.load_state_dict(model.state_dict(), strict=True)
    ids = torch.arange(3, 15, device=device).view(1, 12)
    expected = stock.eval()(input_ids=ids, labels=ids).loss.item()
    checkpoint = tmp_path / "checkpoint-4"
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".bin", ".pt"):
            assert b"liger_ops" not in file.read_bytes(), file.name
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint)], capture_output=True, text=True, check=True
    )
    assert float(loaded.stdout) == pytest.approx(expected, rel=1e-5)


def test_peft(installed, arguments, device):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(device=device), config)
    stock = copy.deepcopy(model)
    _, calls, losses = run(model, arguments(use_liger=True))
    assert set(calls) >= ALL
    _, _, stock_losses = run(stock, arguments())
    assert losses == pytest.approx(stock_losses, rel=1e-4)


def test_without_install_the_stock_behaviour_stays(arguments):
    with pytest.raises(TypeError, match="use_liger"):
        arguments(use_liger=True)


def state():
    classes = (TrainingArguments, Seq2SeqTrainingArguments)
    return (
        [vars(cls).get("__init__") for cls in classes],
        [inspect.signature(cls) for cls in classes],
        liger.apply_liger_kernel,
        transformers.trainer.apply_liger_kernel,
        transformers.integrations.apply_liger_kernel,
    )


def test_install_and_uninstall(arguments, device):
    before = state()
    install()
    once = state()
    install()
    assert state() == once
    assert all(changed is not stock for changed, stock in zip(once[2:], before[2:], strict=True))
    assert "use_liger" in inspect.signature(TrainingArguments).parameters
    model = tiny(device=device)
    run(model, arguments(use_liger=True))
    uninstall()
    assert state() == before
    with Operators() as operators:
        model(input_ids=torch.tensor([[3, 4, 5]], device=device))
    assert not operators.calls
    with pytest.raises(TypeError, match="use_liger"):
        arguments(use_liger=True)
    uninstall()
    assert state() == before


def test_arguments_stay_ordinary_dataclasses(installed, arguments, tmp_path):
    made = arguments(use_liger=True)
    assert made.use_liger_kernel is True and not hasattr(made, "use_liger")
    assert arguments(use_liger=False).use_liger_kernel is False
    assert arguments(use_liger=None).use_liger_kernel is False
    assert "use_liger" not in made.to_dict()
    assert pickle.loads(pickle.dumps(made)).use_liger_kernel
    assert copy.deepcopy(made).use_liger_kernel
    assert dataclasses.replace(made, seed=3).use_liger_kernel
    assert TrainingArguments(str(tmp_path), use_liger=True).use_liger_kernel
    assert arguments(Seq2SeqTrainingArguments, use_liger=True).use_liger_kernel
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_liger_kernel", "True"]
    )
    assert parsed.use_liger_kernel


def test_contradiction(installed, arguments):
    with pytest.raises(ValueError, match="the same option, got True and False"):
        arguments(use_liger=True, use_liger_kernel=False)
    assert arguments(use_liger=True, use_liger_kernel=True).use_liger_kernel


def test_own_use_liger_field_keeps_its_meaning(arguments):
    @dataclass
    class Own(TrainingArguments):
        use_liger: str = "mine"

    class HandWritten(TrainingArguments):
        def __init__(self, *args, use_liger="mine", **kwargs):
            super().__init__(*args, **kwargs)
            self.wish = use_liger

    class PassingOn(TrainingArguments):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    install()
    try:
        own = arguments(Own, use_liger="other")
        assert own.use_liger == "other" and not own.use_liger_kernel
        assert arguments(HandWritten, use_liger="other").wish == "other"
        assert arguments(PassingOn, use_liger=True).use_liger_kernel
    finally:
        uninstall()


def test_subclass_defined_after_install(installed, arguments):
    @dataclass
    class Later(TrainingArguments):
        extra: int = 0

    with pytest.raises(TypeError, match="use_liger"):
        arguments(Later, use_liger=True)
    install()
    assert arguments(Later, use_liger=True, extra=3).use_liger_kernel


def test_trainer_is_not_imported_and_picks_it_up_later():
    code = """
import sys
from liger_ops.transformers import install, uninstall
install()
assert "transformers.trainer" not in sys.modules
from transformers import trainer
from liger_ops.transformers.trainer import apply_liger_kernel
assert trainer.apply_liger_kernel is apply_liger_kernel
uninstall()
assert trainer.apply_liger_kernel.__module__ == "transformers.integrations.liger"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
