"""Builds the one compiled library of liger-ops, `liger_ops/_C.abi3.so`.

Environment:
  LIGER_OPS_FORCE_CUDA=1   fail when the CUDA kernels cannot be built
  LIGER_OPS_CPU_ONLY=1     leave the CUDA kernels out
  TORCH_CUDA_ARCH_LIST     GPU architectures, for instance "8.0;9.0+PTX"
  MAX_JOBS                 parallel compiler processes
"""

import json
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
# sm_75 is the oldest architecture that nvcc 13 knows; the last entry carries PTX for newer GPUs.
DEFAULT_ARCH_LIST = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def enabled(name: str) -> bool:
    return os.environ.get(name, "0").lower() in {"1", "true", "yes", "on"}


if int(setuptools.__version__.split(".")[0]) < 77:
    # Older ones fail on pyproject.toml with a sentence about its license.
    sys.exit(
        f"liger-ops needs setuptools 77 or newer, found {setuptools.__version__}:\n"
        "  pip install 'setuptools>=77,<82'"
    )

try:
    import torch
except ImportError:
    sys.exit(
        "liger-ops compiles against the torch it will run with. Install torch first, then\n"
        "  pip install --no-build-isolation .\n"
        "(without --no-build-isolation pip hides the installed torch from this build)."
    )


def wheel_cuda_home() -> Path | None:
    """The CUDA toolkit that the `nvidia/cu13` wheels install beside torch, if its compiler is there."""
    home = Path(torch.__file__).resolve().parent.parent / "nvidia" / "cu13"
    return home if (home / "bin" / "nvcc").is_file() else None


# torch.utils.cpp_extension reads CUDA_HOME when it is imported.
if "CUDA_HOME" not in os.environ and "CUDA_PATH" not in os.environ and shutil.which("nvcc") is None:
    home = wheel_cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def decide_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and the reason to print."""
    if enabled("LIGER_OPS_CPU_ONLY"):
        return False, "LIGER_OPS_CPU_ONLY is set"
    if torch.version.cuda is None:
        missing = "this torch was built without CUDA"
    elif CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        missing = (
            "no nvcc found (PATH, CUDA_HOME, nvidia/cu13 wheels); for a compiler from wheels: "
            "pip install 'cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.2'"
        )
    else:
        return True, f"nvcc in {CUDA_HOME}"
    if enabled("LIGER_OPS_FORCE_CUDA"):
        sys.exit(f"LIGER_OPS_FORCE_CUDA is set, but {missing}.")
    return False, missing


def arch_list() -> str:
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCH_LIST
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def local_version(with_cuda: bool) -> str:
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
    major, minor = torch.__version__.split(".")[:2]
    return f"{VERSION}+{cuda}torch{major}.{minor}"


def sources(with_cuda: bool) -> list[str]:
    # Relative paths: setuptools puts them into sdists as they are.
    found = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/ops/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if with_cuda:
        found += ROOT.glob("csrc/cuda/*.cu")
    return sorted(str(path.relative_to(ROOT)) for path in found)


def headers() -> list[str]:
    found = [p for pattern in ("*.h", "*.cuh") for p in ROOT.glob(f"csrc/**/{pattern}")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def make_extension(with_cuda: bool):
    warnings = ["-Wall", "-Wno-sign-compare", "-Wno-unknown-pragmas"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fopenmp", *warnings]
    extension = (CUDAExtension if with_cuda else CppExtension)(
        "liger_ops._C",
        sources=sources(with_cuda),
        depends=headers(),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("LIGER_WITH_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]},
        # at::parallel_for is an OpenMP pragma in a header: without the flag it would run on one thread.
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    if with_cuda and not any(Path(d, "libcudart.so").exists() for d in extension.library_dirs):
        # The CUDA wheels ship libcudart.so.13 without the development symlink.
        extension.libraries = [":libcudart.so.13" if lib == "cudart" else lib for lib in extension.libraries]
        extension.library_dirs.append(str(Path(CUDA_HOME) / "lib"))
    return extension


class Build(BuildExtension):
    """Prints what is built, and records it for `liger_ops.build_info()` and the load-time check."""

    def finalize_options(self):
        super().finalize_options()
        # Editable installs compile in a temporary folder, from nothing each time. In one folder of the
        # checkout, ninja compiles what has changed.
        self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}")

    def run(self):
        print(
            "\n".join(["", "liger-ops build", *(f"  {key:<14}{value}" for key, value in SUMMARY.items()), ""])
        )
        super().run()
        directory = ROOT / "liger_ops" if self.inplace else Path(self.build_lib) / "liger_ops"
        (directory / "_build_info.json").write_text(json.dumps(BUILD_INFO, indent=2) + "\n")


WITH_CUDA, REASON = decide_cuda()
BUILD_INFO = {
    "version": local_version(WITH_CUDA),
    "torch": torch.__version__,
    "cuda": torch.version.cuda if WITH_CUDA else None,
    "arch_list": arch_list() if WITH_CUDA else None,
    "cuda_reason": REASON,
}
SUMMARY = {
    "version": BUILD_INFO["version"],
    "torch": torch.__version__,
    "CUDA kernels": f"yes ({REASON})" if WITH_CUDA else f"no: {REASON}",
    **({"architectures": BUILD_INFO["arch_list"]} if WITH_CUDA else {}),
}

packages, package_dir = find_namespace_packages(include=["liger_ops*"]), {}
if "editable_wheel" not in sys.argv:
    # `python -m liger_ops bench`, and the references that it checks with. A checkout has them in place.
    package_dir = {"liger_ops.benchmarks": "benchmarks", "liger_ops.benchmarks.reference": "tests/reference"}
    packages += list(package_dir)

setup(
    packages=packages,
    package_dir=package_dir,
    # An sdist fits every torch; a build fits the one it was compiled against.
    version=VERSION if "sdist" in sys.argv else local_version(WITH_CUDA),
    ext_modules=[make_extension(WITH_CUDA)],
    cmdclass={"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
