"""Rules of one's own: what an ascent, a descent and a base update are declared with.

A rule is a few Triton functions and a declaration. ``docs/adding_a_method.md`` has three worked
examples; ``fastsam.testing.check_method`` checks a method made of them.
"""

from .arithmetic import gives_direction, over_root, where
from .bases import register_base
from .optimizer import SharpnessAwareOptimizer
from .step.arguments import Flag, Number
from .step.rule import Ascent, Base, Descent

__all__ = ["Ascent", "Base", "Descent", "Flag", "Number", "SharpnessAwareOptimizer",
           "gives_direction", "over_root", "register_base", "where"]  # fmt: skip
