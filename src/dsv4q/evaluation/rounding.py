"""Which inputs of an artifact's linears an evaluation rounds: what `--activations` takes.

Whether a kernel rounds inputs depends on the GPU, not on the artifact alone. vLLM 0.33.0 multiplies NVFP4 linears in
FP4 on SM 10.0 and later; on SM 9.0 it has weight-only kernels for them (Humming, Marlin), which leave inputs BF16. FP8
linears go to DeepGEMM on both, with scales that are powers of two on both (`utils/deep_gemm.py`,
`DeepGemmQuantScaleFMT`).
"""

from __future__ import annotations

from enum import StrEnum

from dsv4q.verify.schemes import NVFP4, StoredScheme


class Emulation(StrEnum):
    """Whose rounding of inputs is emulated."""

    KERNELS = "kernels"
    WEIGHT_ONLY_NVFP4 = "weight-only-nvfp4"
    NONE = "none"

    @property
    def meaning(self) -> str:
        """What is rounded, for people."""
        return {
            Emulation.KERNELS: "all inputs that the schemes round, as a server on SM 10.0 or later",
            Emulation.WEIGHT_ONLY_NVFP4: "all but those of NVFP4 linears, as a server on SM 9.0",
            Emulation.NONE: "no input; what differs is due to the weights",
        }[self]

    def rounds(self, scheme: StoredScheme) -> bool:
        """Whether inputs of a linear of this scheme are rounded, if the scheme has them rounded at all."""
        return self is Emulation.KERNELS or (self is Emulation.WEIGHT_ONLY_NVFP4 and scheme.format != NVFP4)
