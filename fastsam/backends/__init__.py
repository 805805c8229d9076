"""Three ways to run the same step: ``reference`` (to read), ``torch``, ``triton`` (to be fast).

Each serves one interface, :class:`Backend`, and gives the same results within rounding. (The
modules ``torch`` and ``triton`` would shadow the packages here, hence ``interface``.)
"""

from .devices import SeveralDevices
from .interface import Backend, Backup, create, new_scalars, resolve
from .reference import keep_rejected, write_grads
from .scratch import is_alone

__all__ = ["Backend", "Backup", "SeveralDevices", "create", "is_alone", "keep_rejected",
           "new_scalars", "resolve", "write_grads"]  # fmt: skip
