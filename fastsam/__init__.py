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
from .methods.bsam import BSAM
from .methods.delayed import DelayedSAM
from .methods.esam import ESAM, select_samples
from .methods.friendly import FriendlySAM
from .methods.functional import FunctionalSAM
from .methods.functional_closures import functional_closures
from .methods.gsam import GSAM
from .methods.hessian import DetSAM, FrobSAM, TraceSAM
from .methods.lesam import LESAM
from .methods.lets import LETS
from .methods.lightsam import LightSAM
from .methods.looksam import LookSAM
from .methods.momentum import MSAM
from .methods.preconditioned import PreconditionedSAM
from .methods.ratio import SharpnessRatio, SharpnessTrend
from .methods.sam import ASAM, SAM, SSAM, USAM, UnifiedSAM
from .methods.samar import SAMAR
from .methods.sps import SAMSPS
from .methods.universal import UniversalSAM
from .methods.vasso import VaSSO
from .methods.weighted import GNP, WSAM
from .monitor import Monitor
from .normalization import normalization_groups
from .replicas import per_replica
from .schedules import LambdaRho, ProportionalRho, RhoScheduler, tail
from .split import split_closures

__version__ = "0.2.0"
__all__ = ["ASAM", "BSAM", "ESAM", "GNP", "GSAM", "LESAM", "LETS", "MSAM", "SAM", "SAMAR",
           "SAMSPS", "SSAM", "USAM", "WSAM", "AdaGradNorm", "AdaSAM", "DelayedSAM", "DetSAM",
           "FriendlySAM", "FrobSAM", "FunctionalSAM", "LambdaRho", "Landscape", "LightSAM",
           "LookSAM", "Monitor", "PreconditionedSAM", "ProportionalRho", "RhoScheduler",
           "SharpnessRatio", "SharpnessTrend", "TraceSAM", "UnifiedSAM", "UniversalSAM", "VaSSO",
           "compare_ranks", "frozen_batch_norm", "frozen_updates", "functional_closures",
           "graphed", "loss_landscape", "normalization_groups", "per_replica", "rules",
           "select_samples", "sharpness", "split_closures", "tail", "theory"]  # fmt: skip
