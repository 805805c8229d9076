"""torch's operators on the stand-in: computed by its CPU kernels, on the same memory.

What torch's CUDA build launches cannot be executed. So a dispatch mode takes every operator on
CUDA tensors, gives it CPU tensors on their memory, and writes what is new to memory of the device.
It runs at once, or later: in the stream's queue with ``FAKE_ASYNC``, in the graph under capture.
"""

import ctypes
import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from standin.driver import lib, synchronize

ASYNC = os.environ.get("FAKE_ASYNC", "0") != "0"

#: Operators that launch nothing: torch runs them itself.
NATIVE = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
    "aten::new_empty_strided", "aten::_pin_memory", "aten::pin_memory", "aten::is_pinned",
    "aten::record_stream",
}  # fmt: skip
#: Operators whose result has a shape, or a value on the host, that depends on what is computed.
READING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "index", "unique",
    "_unique2", "masked_scatter", "index_put_", "_index_put_impl_", "repeat_interleave", "bincount",
}  # fmt: skip
#: Parts of the names of operators that draw random numbers.
RANDOM = ("rand", "normal", "uniform", "bernoulli", "dropout", "multinomial", "exponential")

CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def span(x):
    """Elements from the first of a tensor to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(x.size(), x.stride(), strict=True))


def alias(x):
    """A CPU tensor on the memory of one on the stand-in."""
    if x.numel() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    count = span(x)
    memory = (ctypes.c_char * (count * x.element_size())).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype, count=count).as_strided(x.size(), x.stride())


def is_plain_copy(name, args, kwargs):
    """Whether an operator only moves memory, which the driver does by itself."""
    if name == "aten::copy_":
        x, y = args[:2]
        if isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.shape == y.shape:
            return x.is_contiguous() and y.is_contiguous()
    if name == "aten::_to_copy":
        return (
            kwargs.get("dtype") in (None, args[0].dtype)
            and kwargs.get("memory_format") in (None, torch.preserve_format)
            and args[0].is_contiguous()
        )
    return False


def on_cpu(keyword, value, down):
    """A keyword argument for the CPU's operator."""
    if keyword == "pin_memory":
        return False
    if keyword == "device":
        return None if value is None else torch.device("cpu")
    return tree_map(down, value)


class Operators(TorchDispatchMode):
    """Runs operators on CUDA tensors; ``counts`` says how often each was called."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.kept = []  # calls that queues and graphs point at
        self.generators = {}  # by the identity of the device's: that, its seed, and the CPU's

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, overload = operator._schema.name, operator._schema.overload_name
        name += "." + overload if overload else ""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        device = next((x.device for x in tensors if x.is_cuda), None)
        elsewhere = device is None and (target is None or target.type != "cuda")
        if elsewhere or operator.is_view or name in NATIVE or name.startswith("aten::set_"):
            return operator(*args, **kwargs)
        self.counts[name] = self.counts.get(name, 0) + 1
        if is_plain_copy(name, args, kwargs):
            return operator(*args, **kwargs)
        out = target or device
        if torch.cuda.is_current_stream_capturing():
            assert name != "aten::_local_scalar_dense", "the host asks the device under capture"
            return self._later(operator, args, kwargs, out, tensors, captures=True)
        if ASYNC:
            if not self._waits(operator, args, out, tensors):
                return self._later(operator, args, kwargs, out, tensors)
            synchronize()
        return self._now(operator, args, kwargs, out)

    @property
    def reads(self):
        """How often the host asked for a value on a device."""
        return self.counts.get("aten::_local_scalar_dense", 0)

    def _on_cpu(self, x):
        """What an argument that is no tensor is to the CPU's operator."""
        if isinstance(x, torch.Generator) and x.device.type == "cuda":
            known = self.generators.get(id(x))
            if known is None or known[1] != x.initial_seed():
                ours = torch.Generator().manual_seed(x.initial_seed())
                known = self.generators[id(x)] = x, x.initial_seed(), ours
            return known[2]
        return torch.device("cpu") if isinstance(x, torch.device) else x

    # --- at once ---

    def _now(self, operator, args, kwargs, out):
        ours = {}  # by the identity of theirs

        def down(x):
            if isinstance(x, torch.Tensor) and x.is_cuda:
                if id(x) not in ours:
                    ours[id(x)] = alias(x), x
                return ours[id(x)][0]
            return self._on_cpu(x)

        given = {key: on_cpu(key, value, down) for key, value in kwargs.items()}
        result = operator(*tree_map(down, args), **given)
        theirs = {id(ours): x for ours, x in ours.values()}

        def up(y):
            if not isinstance(y, torch.Tensor) or out.type != "cuda":
                return y
            if id(y) in theirs:  # written in place
                return theirs[id(y)]
            x = torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=out)
            if y.numel():
                ctypes.memmove(x.data_ptr(), y.data_ptr(), span(y) * y.element_size())
            return x

        return tree_map(up, result)

    # --- later ---

    def _waits(self, operator, args, out, tensors):
        """Whether an operator cannot wait in a queue."""
        short = operator._schema.name.removeprefix("aten::")
        if short in READING or out.type != "cuda" or (short == "copy_" and not args[0].is_cuda):
            return True
        if any(word in short for word in RANDOM) and written(operator):
            return True
        # indices, whose values may not be there yet
        return any(x.is_cuda and not x.is_floating_point() and x.numel() > 1 for x in tensors)

    def _later(self, operator, args, kwargs, out, tensors, captures=False):
        """Put an operator into the queue or graph: results get memory now, and values then."""
        ours = {}

        def down(x):  # what waits holds addresses, as on a GPU, and copies of host memory
            if isinstance(x, torch.Tensor):
                if id(x) not in ours:
                    ours[id(x)] = (alias(x.detach()) if x.is_cuda else x.detach().clone()), x
                return ours[id(x)][0]
            return self._on_cpu(x)

        cpu_args = tree_map(down, args)
        cpu_kwargs = {key: on_cpu(key, value, down) for key, value in kwargs.items()}
        names = written(operator)
        if names:
            arguments = operator._schema.arguments
            result = tuple(
                args[i] if i < len(args) else kwargs[argument.name]
                for i, argument in enumerate(arguments)
                if argument.name in names
            )
            returned = len(operator._schema.returns)
            result = result[0] if returned == 1 else result if returned else None

            def run():
                operator(*cpu_args, **cpu_kwargs)
        else:
            first = operator(*probes(operator, cpu_args), **cpu_kwargs)  # for its shapes
            places = []

            def up(y):
                if not isinstance(y, torch.Tensor):
                    return y
                x = torch.empty_strided(y.size(), y.stride(), dtype=y.dtype, device=out)
                places.append(alias(x))
                return x

            result = tree_map(up, first)
            random = any(word in operator._schema.name for word in RANDOM)
            once = random or not any(x.is_cuda for x in tensors)
            held = tensors if captures else ()  # as a graph's pool of memory does

            def run():
                values = first if once else operator(*cpu_args, **cpu_kwargs)
                new = [y for y in tree_leaves(values) if isinstance(y, torch.Tensor)]
                for place, y in zip(places, new, strict=True):
                    if y.numel():
                        place.copy_(y)
                return held

        self._submit(run, out, captures)
        return result

    def _submit(self, run, out, captures):
        def call(_):
            with torch.no_grad(), _disable_current_modes():
                run()

        if not captures and len(self.kept) > 200_000:
            synchronize()  # then no queue points at them; graphs may, which are few
            self.kept = [x for x in self.kept if x[1]]
        call = CALL(call)
        self.kept.append((call, captures))
        with torch.cuda.device(out):
            stream = torch.cuda.current_stream(out).cuda_stream
            lib.fake_host_node(stream, ctypes.cast(call, ctypes.c_void_p), None)


def probes(operator, args):
    """The arguments, or copies where an operator writes to some and its schema does not say so."""
    if "batch_norm" not in operator._schema.name:
        return args
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, args)


def written(operator):
    """The names of the arguments that an operator writes to."""
    arguments = operator._schema.arguments
    return {x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write}


def print_from_cpu():
    """Let CUDA tensors be printed, for which torch turns dispatch modes off."""
    printed = torch._tensor_str._str

    def text(x, *, tensor_contents=None):
        if not x.is_cuda or type(x) not in (torch.Tensor, torch.nn.Parameter):
            return printed(x, tensor_contents=tensor_contents)
        with _disable_current_modes():
            synchronize()
            body = printed(alias(x.detach()), tensor_contents=tensor_contents)
        return f"{body[:-1]}, device='{x.device}')"

    torch._tensor_str._str = text


print_from_cpu()
torch.backends.cudnn.enabled = False  # its operators have no CPU kernels
