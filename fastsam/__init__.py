"""Sharpness-aware minimization for PyTorch, as fused Triton kernels with a torch reference."""

from . import rules, theory
from .agreement import compare_ranks
from .analysis.flatness import sharpness
from .analysis.landscape import Landscape, loss_landscape
from .bases.adagrad_norm import AdaGradNorm
from .batch_norm import frozen_batch_norm
from .frozen import frozen_updates
from .graphs import graphed
from .methods.adasam import AdaSAM
from .methods.gsam import GSAM
from .methods.lets import LETS
from .methods.lightsam import LightSAM
from .methods.ratio import SharpnessRatio
from .methods.sam import ASAM, SAM, SSAM, USAM, UnifiedSAM
from .methods.samar import SAMAR
from .methods.vasso import VaSSO
from .replicas import per_replica

__version__ = "0.1.0"
__all__ = ["ASAM", "GSAM", "LETS", "SAM", "SAMAR", "SSAM", "USAM", "AdaGradNorm", "AdaSAM", "Landscape",
           "LightSAM", "SharpnessRatio", "UnifiedSAM", "VaSSO", "compare_ranks",
           "frozen_batch_norm", "frozen_updates", "graphed", "loss_landscape", "per_replica",
           "rules", "sharpness", "theory"]  # fmt: skip
