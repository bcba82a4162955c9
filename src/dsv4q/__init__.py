"""dsv4q: quantize DeepSeek-V4 checkpoints for vLLM, with the MTP draft intact."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dsv4q")
except PackageNotFoundError:  # run from a source folder that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
