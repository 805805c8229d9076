"""Sharpness-aware minimization for PyTorch, as fused Triton kernels with a torch reference."""

from . import theory
from .adagrad_norm import AdaGradNorm
from .adaptive import AdaSAM, LightSAM
from .batch_norm import frozen_batch_norm
from .flatness import sharpness
from .landscape import Landscape, loss_landscape
from .lets import LETS
from .ratio import SharpnessRatio
from .replicas import per_replica
from .sam import ASAM, SAM, SSAM, USAM, UnifiedSAM
from .samar import SAMAR
from .vasso import VaSSO

__version__ = "0.1.0"
__all__ = ["ASAM", "LETS", "SAM", "SAMAR", "SSAM", "USAM", "AdaGradNorm", "AdaSAM", "Landscape",
           "LightSAM", "SharpnessRatio", "UnifiedSAM", "VaSSO", "frozen_batch_norm",
           "loss_landscape", "per_replica", "sharpness", "theory"]  # fmt: skip
