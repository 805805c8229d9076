"""How a tensor lies in memory, and whether another tensor or variable refers to it."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


#: Not part of torch's public interface: without it no memory counts as alone.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def references(x: Tensor) -> int:
    """How many tensors share the memory of ``x``, up to a constant."""
    return 0 if _use_count is None else int(_use_count(x.untyped_storage()._cdata))


#: What ``references`` gives where there is one.
ALONE = references(torch.empty(1, device="cpu")) or -1


def is_alone(x: Tensor) -> bool:
    """Whether no other tensor shares the memory of ``x``."""
    return references(x) == ALONE


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have one layout; a dimension of one element has any stride."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    first, second = x.stride(), y.stride()
    return first == second or all(
        a == b for a, b, size in zip(first, second, x.shape, strict=True) if size != 1
    )


def owns_memory(param: Tensor) -> bool:
    """Whether the parameter fills memory that is torch's own and that no other tensor sees.

    Subclasses such as DTensor look after their memory themselves; memory that cannot be resized
    belongs to numpy, say, or to another process.
    """
    storage = param.untyped_storage()
    return (
        type(param) in (torch.nn.Parameter, Tensor)
        and storage.nbytes() == param.numel() * param.element_size()
        and storage.resizable()
        and not _is_shared(storage)
        and is_dense(param)
        and is_alone(param)
    )


def still_owns_memory(param: Tensor) -> bool:
    """Whether a parameter that owned its memory does so, at the same address in the same shape."""
    storage = param.untyped_storage()
    return (
        is_alone(param)
        and storage.resizable()
        and not _is_shared(storage)
        and param.is_contiguous()  # if it lies in another order, all is asked again
    )


def _is_shared(storage: torch.UntypedStorage) -> bool:
    """Whether processes share it; all memory of a GPU can be, so that nothing follows there."""
    return storage.device.type == "cpu" and storage.is_shared()


def uses(storages: Sequence[torch.UntypedStorage]) -> list[int]:
    """Of each storage what ``references`` gives of a tensor: ``ALONE`` where it has but one."""
    if _use_count is None:
        return [0] * len(storages)
    return list(map(_use_count, [storage._cdata for storage in storages]))


class Owned:
    """Tensors that nobody else should hold, and a quick look at whether that is so.

    Args:
        tensors: Fresh ones. The caller keeps no other list of them.
        holders: How many references to each the caller has otherwise.
    """

    def __init__(self, tensors: list[Tensor], holders: int = 0) -> None:
        self.tensors = tensors
        self._storages = [x.untyped_storage() for x in tensors]
        self._addresses = [storage._cdata for storage in self._storages]
        self._holders = holders

    def is_alone(self) -> bool:
        """Whether nobody else holds one of the tensors or sees its memory."""
        if _use_count is None:
            return False
        alone = UNHELD + self._holders
        return set(map(sys.getrefcount, self.tensors)) <= {alone} and set(
            map(_use_count, self._addresses)
        ) <= {ALONE_WITH_STORAGE}


def _of_owned() -> tuple[int, int]:
    owned = Owned([torch.empty(1, device="cpu")])
    counts = 0 if _use_count is None else int(_use_count(owned._addresses[0]))
    return next(iter(set(map(sys.getrefcount, owned.tensors)))), counts


#: What ``Owned`` finds where nobody else holds its tensors: references to one, and to its memory.
UNHELD, ALONE_WITH_STORAGE = _of_owned()


def holders(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor of a list is referred to, up to a constant of the interpreter's."""
    return list(map(sys.getrefcount, tensors))


def _of_a_gradient() -> int:
    param = torch.empty(0, requires_grad=True, device="cpu")
    param.grad = torch.empty_like(param)
    return holders([param.grad])[0]


#: What ``holders`` gives of a gradient that is a parameter's, and in one list.
UNSHARED_GRADIENT = _of_a_gradient()
