"""TRL's trainers: they keep a fused head of their own, and our layers run under it."""

import warnings

import pytest
import torch
from tiny import TEXT, Operators, tiny, twin
from transformers import PreTrainedTokenizerFast, Trainer

from liger_ops.transformers import install, patch, uninstall
from liger_ops.transformers.trainer import reports

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LAYERS = {"rms_norm", "rope", "swiglu"}
HEADS = {"fused_linear_cross_entropy", "cross_entropy"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*use_liger_kernel.*:FutureWarning"),
]


@pytest.fixture
def installed():
    install()
    yield
    uninstall()


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word, as many as the tiny models know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(TEXT["vocab_size"] - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def words(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(100, (count,), generator=generator).tolist())


def arguments(cls, folder, device, **changes):
    quick = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_length=32,
        seed=0,
    )
    return cls(**quick | changes)


def losses(trainer) -> tuple[set[str], list[float]]:
    """What ran, and the loss of each step."""
    with Operators() as operators, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3
    return set(operators.calls), history


@pytest.fixture
def sft(tokenizer, tmp_path, device):
    texts = {"text": [words(row, 6 + row) for row in range(8)]}

    def train(model, cls=trl.SFTTrainer, peft_config=None, **changes):
        trainer = cls(
            model,
            arguments(trl.SFTConfig, tmp_path, device, **changes),
            train_dataset=datasets.Dataset.from_dict(texts),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        return losses(trainer)

    return train


@pytest.fixture
def dpo(tokenizer, tmp_path, device):
    pairs = {
        "prompt": [words(row, 4) for row in range(8)],
        "chosen": [words(100 + row, 5 + row % 3) for row in range(8)],
        "rejected": [words(200 + row, 6) for row in range(8)],
    }

    def train(model, **changes):
        trainer = trl.DPOTrainer(
            model,
            ref_model=twin(model),
            args=arguments(trl.DPOConfig, tmp_path, device, **changes),
            train_dataset=datasets.Dataset.from_dict(pairs),
            processing_class=tokenizer,
        )
        return losses(trainer)

    return train


def test_sft_flag(installed, sft, device):
    model = tiny(device=device)
    stock = twin(model)
    ran, history = sft(model, use_liger_kernel=True)
    assert ran >= LAYERS and not ran & HEADS
    (report,) = reports()
    assert {row.option for row in report.patched} == LAYERS and not report.skipped
    ran, expected = sft(stock)
    assert history == pytest.approx(expected, rel=1e-4)


def test_sft_flag_under_its_other_name(installed, sft, device):
    ran, _ = sft(tiny(device=device), use_liger=True)
    assert ran >= LAYERS and not ran & HEADS


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("options", [{}, dict(fused_linear_cross_entropy=False)], ids=["all", "layers"])
def test_sft_of_a_patched_model(sft, device, options, loss_type):
    """TRL's head calls the backbone itself; our head is what it falls back to."""
    model = tiny(device=device)
    stock = twin(model)
    patch(model, **options)
    ran, history = sft(model, loss_type=loss_type)
    assert ran >= LAYERS and not ran & HEADS
    _, expected = sft(stock, loss_type=loss_type)
    assert history == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_with_our_loss(sft, device, accumulation):
    """The Trainer's own ``compute_loss`` in place of SFTTrainer's: then our fused head computes the loss."""

    class OurLoss(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    model = tiny(device=device)
    stock = twin(model)
    patch(model)
    options = dict(gradient_accumulation_steps=accumulation)
    ran, history = sft(model, cls=OurLoss, **options)
    assert ran >= LAYERS | {"fused_linear_cross_entropy"}
    _, expected = sft(stock, **options)
    assert history == pytest.approx(expected, rel=1e-4)


def test_sft_with_lora(installed, sft, device):
    peft = pytest.importorskip("peft")
    model = tiny(device=device)
    stock = twin(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    ran, history = sft(model, peft_config=config, use_liger_kernel=True)
    assert ran >= LAYERS and not ran & HEADS
    torch.manual_seed(0)
    _, expected = sft(stock, peft_config=config)
    assert history == pytest.approx(expected, rel=1e-4)


def test_dpo_flag(installed, dpo, device):
    model = tiny(device=device)
    stock = twin(model)
    ran, history = dpo(model, use_liger_kernel=True)
    assert ran >= LAYERS and not ran & HEADS
    _, expected = dpo(stock)
    assert history == pytest.approx(expected, rel=1e-4)


def test_dpo_of_a_patched_model(dpo, device):
    model = tiny(device=device)
    stock = twin(model)
    patch(model)
    ran, history = dpo(model)
    assert ran >= LAYERS and not ran & HEADS
    _, expected = dpo(stock)
    assert history == pytest.approx(expected, rel=1e-4)
