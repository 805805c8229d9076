"""Sharpness-aware minimization for PyTorch, as fused Triton kernels with a torch reference."""

from .adagrad_norm import AdaGradNorm
from .sam import ASAM, SAM, SSAM, USAM, UnifiedSAM

__version__ = "0.1.0"
__all__ = ["ASAM", "SAM", "SSAM", "USAM", "AdaGradNorm", "UnifiedSAM"]
