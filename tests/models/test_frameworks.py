"""What training frameworks import from ``liger_kernel`` and how they call it, on the alias.

Names and call patterns are those of the versions in ``VERSIONS``; docs/frameworks.md says the same in words.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import MODELS, Operators, batch, tiny

from liger_ops.compat import install_liger_kernel_alias, uninstall_liger_kernel_alias
from liger_ops.compat.alias import VERSION

if importlib.util.find_spec("liger_kernel") is not None:
    pytest.skip("the real liger-kernel is installed", allow_module_level=True)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "frameworks.md").read_text()
VERSIONS = {
    "axolotl": "0.19.0",
    "LLaMA-Factory": "0.9.5",
    "ms-swift": "4.6.0",
    "verl": "0.9.1",
    "TRL": "1.16.0",
}

FAMILIES = (
    "gemma gemma2 gemma3 gemma3_text glm4 glm4v glm4v_moe gpt_oss granite internvl llama llama4 llava "
    "mistral mixtral mllama olmo2 paligemma phi3 qwen2 qwen2_vl qwen2_5_vl qwen3 qwen3_moe qwen3_next qwen3_5"
)
PATCHERS = FAMILIES.split()
OURS = ["gemma", "gemma2", "llama", "mistral", "mixtral", "mllama", "phi3", "qwen2", "qwen2_vl"]

# (module, names) by project: those that the alias has, and those that it has not.
SERVED = {
    "axolotl": [
        ("transformers.cross_entropy", "LigerCrossEntropyLoss"),
        ("transformers.functional", "liger_cross_entropy"),
        ("transformers.layer_norm", "LigerLayerNorm"),
        ("transformers.monkey_patch", "MODEL_TYPE_TO_APPLY_LIGER_FN"),
        ("transformers.rms_norm", "LigerRMSNorm LigerRMSNormForGemma2"),
        ("transformers.rope", "liger_rotary_pos_emb"),
        ("transformers.swiglu", "LigerSwiGLUMLP"),
        ("transformers.geglu", "LigerGEGLUMLP"),
        ("transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"),
        ("transformers.model.loss_utils", "LigerForCausalLMLoss"),
        (
            "ops.fused_linear_cross_entropy",
            "fused_linear_cross_entropy_forward fused_linear_cross_entropy_backward",
        ),
    ],
    "LLaMA-Factory": [("transformers", f"apply_liger_kernel_to_{name}") for name in OURS],
    "ms-swift": [
        ("transformers.model", "loss_utils"),
        ("transformers.model.loss_utils", "LigerForCausalLMLoss"),
    ],
    "verl": [("transformers.monkey_patch", "_apply_liger_kernel_to_instance")],
}
REFUSED = {
    "axolotl": [
        ("transformers.trainer.orpo_trainer", "_FSDPForwardRedirection"),
        ("transformers.rms_norm", "LigerRMSNormForGemma4"),
        ("transformers", "apply_liger_kernel_to_granite"),
        ("chunked_loss.fused_linear_distillation", "LigerFusedLinearDistillationBase"),
        ("ops.grpo_loss", "fused_selective_log_softmax"),
        ("ops.backends.registry", "IMPL_REGISTRY"),
    ],
    "LLaMA-Factory": [
        ("transformers", f"apply_liger_kernel_to_{name}") for name in PATCHERS if name not in OURS
    ],
    "ms-swift": [("chunked_loss", "LigerFusedLinearGRPOLoss LigerFusedLinearJSDLoss")],
    "verl": [("ops", "LigerFusedLinearScaledCrossEntropyFunction")],
}


def pairs(table):
    return [
        pytest.param(module, name, id=f"{project}-{name}")
        for project, imports in table.items()
        for module, names in imports
        for name in names.split()
    ]


@pytest.fixture(autouse=True)
def alias():
    install_liger_kernel_alias()
    yield
    uninstall_liger_kernel_alias()


def test_page_names_these_versions():
    for project, version in VERSIONS.items():
        assert re.search(rf"{project} {re.escape(version)}\b", PAGE), (
            f"docs/frameworks.md: {project} {version}"
        )


@pytest.mark.parametrize("module, name", pairs(SERVED))
def test_served(module, name):
    exec(f"from liger_kernel.{module} import {name}")


@pytest.mark.parametrize("module, name", pairs(REFUSED))
def test_refused(module, name):
    with pytest.raises(ImportError, match="liger_kernel is an alias of liger_ops"):
        exec(f"from liger_kernel.{module} import {name}")


@pytest.mark.parametrize("spelling", ["liger-kernel", "liger_kernel", "Liger.Kernel"])
def test_version_lookup(spelling):
    """LLaMA-Factory, ms-swift (GRPO) and `trl env` ask for the distribution's version."""
    from transformers.utils.versions import require_version

    assert importlib.metadata.version(spelling) == VERSION
    require_version("liger-kernel>=0.7.0", "")
    uninstall_liger_kernel_alias()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(spelling)


def test_distribution_listing():
    names = [dist.metadata["Name"] for dist in importlib.metadata.distributions()]
    assert names.count("liger-kernel") == 1
    assert importlib.metadata.packages_distributions()["liger_kernel"] == ["liger-kernel"]
    assert importlib.metadata.files("liger-kernel") is None


@pytest.mark.parametrize("family", MODELS)
def test_verl(family):
    """The same options whatever the model is; the head stays the model's."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    model = tiny(family).train()
    report = _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, swiglu=True)
    try:
        assert not report.skipped
        with Operators() as operators:
            assert model(**batch(family=family)).logits is not None
        assert not {name for name in operators.calls if "cross_entropy" in name}
        assert operators.calls["swiglu"] + operators.calls["geglu"] + operators.calls["swiglu_packed"]
    finally:
        report.undo()


def test_unknown_options_stay_errors():
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    with pytest.raises(TypeError, match="unknown option swigloo"):
        _apply_liger_kernel_to_instance(model=tiny(), swigloo=True)


AXOLOTL_FLAGS = dict(
    rope=True, cross_entropy=None, fused_linear_cross_entropy=True, rms_norm=True, layer_norm=None
)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2_vl", "mllama", "phi3", "mixtral"])
def test_axolotl(model_type):
    """The family's function, class-wide, with the flags that its signature names; unset ones are None."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    parameters = inspect.signature(apply).parameters
    flags = {name: value for name, value in AXOLOTL_FLAGS.items() if name in parameters}
    flags["geglu" if "geglu" in parameters else "swiglu"] = True
    report = apply(**flags)
    try:
        model = tiny(model_type).train()
        with Operators() as operators:
            model(**batch(family=model_type)).loss.backward()
        assert any(name.startswith("fused_linear_cross_entropy") for name in operators.calls)
        assert operators.calls["rms_norm"] and operators.calls["rope"] + operators.calls["mrope"]
    finally:
        report.undo()


def test_axolotl_wraps_the_fused_loss_for_compile():
    """With torch_compile it replaces two functions of the module, which the operators do not go through."""
    import liger_kernel.ops.fused_linear_cross_entropy as module

    wrapped = torch.compiler.disable(module.fused_linear_cross_entropy_forward)
    module.fused_linear_cross_entropy_forward = wrapped
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    x, head = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x, head):
        return LigerFusedLinearCrossEntropyFunction.apply(x, head, torch.arange(4))[0]

    loss(x, head).backward()
    assert x.grad is not None


@pytest.mark.parametrize("reward_stage", [False, True])
@pytest.mark.parametrize("family", OURS)
def test_llama_factory(family, reward_stage):
    """Class-wide, and from logits for the stages that need them."""
    transformers = importlib.import_module("liger_kernel.transformers")
    apply = getattr(transformers, f"apply_liger_kernel_to_{family}")
    assert "fused_linear_cross_entropy" in inspect.signature(apply).parameters
    report = apply(**({"fused_linear_cross_entropy": False, "cross_entropy": True} if reward_stage else {}))
    try:
        losses = {row.option for row in report.patched} & {"cross_entropy", "fused_linear_cross_entropy"}
        assert losses == {"cross_entropy" if reward_stage else "fused_linear_cross_entropy"}
    finally:
        report.undo()


def test_ms_swift():
    """It looks for the package, wraps a function that patched heads do not call, and packs sequences."""
    assert importlib.util.find_spec("liger_kernel") is not None
    from liger_kernel.transformers.model import loss_utils

    loss_utils.LigerForCausalLMLoss = lambda *args, **kwargs: pytest.fail("called")
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    model, inputs = tiny().train(), batch()
    expected = model(**inputs).loss
    report = _apply_liger_kernel_to_instance(model=model)
    lengths = torch.tensor([0, 12, 24], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=12, max_length_k=12)
    try:
        torch.testing.assert_close(model(**inputs, **packed).loss, expected)
    finally:
        report.undo()


# A file that a framework imports in its own processes, then the framework.
PLUGIN = "import liger_ops.compat.auto"
TRAINING = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("plugin", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils import is_liger_kernel_available
assert is_liger_kernel_available()
arguments, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
    ["--output_dir", sys.argv[2], "--use_liger_kernel", "--max_steps", "1", "--use_cpu", "true",
     "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"])
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
rows = [dict(input_ids=torch.arange(6), labels=torch.arange(6)) for _ in range(8)]
Trainer(model, arguments, train_dataset=rows).train()
from liger_ops.transformers.trainer import reports
print(*reports())
"""


@pytest.mark.parametrize("real", [False, True], ids=["alone", "beside_the_real_package"])
def test_imported_as_a_plugin(tmp_path, real):
    """ms-swift's --external_plugins, verl's external_lib, and the flag on a command line."""
    if real:
        (tmp_path / "liger_kernel").mkdir()
        (tmp_path / "liger_kernel" / "__init__.py").write_text("raise SystemExit('the real package')")
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "train.py").write_text(TRAINING)
    command = [sys.executable, tmp_path / "train.py", tmp_path / "plugin.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"swiglu +LlamaMLP +1 +liger::swiglu", done.stdout)


@pytest.mark.slow
def test_trl_command(tmp_path):
    """`accelerate launch -m liger_ops run -m trl.scripts.sft`."""
    for package in ("trl", "datasets"):
        pytest.importorskip(package)
    import json

    from transformers import PreTrainedTokenizerFast

    examples = Path(__file__).resolve().parents[2] / "examples"
    sys.path.insert(0, str(examples))
    try:
        from _text import END_OF_TEXT, train_tokenizer
    finally:
        sys.path.remove(str(examples))
    text = "The quick brown fox jumps over the lazy dog. " * 20
    core = train_tokenizer([text], 300, tmp_path / "tokenizer")
    model = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    ).save_pretrained(model)
    tiny(vocab_size=300).save_pretrained(model)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([json.dumps({"text": text})] * 8))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["-m", "liger_ops", "run", "--verbose", "-m", "trl.scripts.sft"]
    command += ["--use_liger_kernel"]
    command += ["--model_name_or_path", model, "--dataset_name", tmp_path / "data", "--max_steps", "1"]
    command += [
        "--output_dir",
        tmp_path / "out",
        "--report_to",
        "none",
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rms_norm (LlamaRMSNorm x5)" in done.stderr
