"""A GPU that is not there, for what goes wrong without one as well: tensors of two devices mixed, a host made to wait.

Its tensors say that they are on `GPU` and keep their numbers in the CPU's memory, where every operator runs. What a GPU
would refuse raises `Mixed`; where waiting is forbidden, what the host would wait for raises `Waits`. It has no kernels,
streams, memory or compiler: of these only a GPU can tell.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Whose result the host needs: a number, or how large the result is.
_READ = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave"}
_BETWEEN_DEVICES = {"_to_copy", "copy_"}
_waiting = SimpleNamespace(forbidden=False)


class Waits(RuntimeError):
    """The host would wait until the GPU has done all that was queued."""


class Mixed(RuntimeError):
    """An operator was given tensors of both devices."""


@contextmanager
def waiting_is_an_error():
    """As `torch.cuda.set_sync_debug_mode("error")`."""
    _waiting.forbidden = True
    try:
        yield
    finally:
        _waiting.forbidden = False


def _wait(why):
    if _waiting.forbidden:
        raise Waits(why)


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; `numbers` is the CPU's."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        # To torch's C++ it is the CPU's: a CUDA tensor would have autograd ask the driver for a stream.
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CPU,
        )
        tensor.numbers = inner
        return tensor

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What C++ would do by itself with the device that it believes in."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and not any(isinstance(each, torch.Tensor) for each in args[1:]):
            options = {key: value for key, value in kwargs.items() if key != "copy"}
            return _to(args[0], *torch._C._nn._parse_to(*args[1:], **options), copy=kwargs.get("copy", False))
        if func is torch.Tensor.cpu:
            return _to(args[0], CPU)
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            _wait("tolist")
            return args[0].numbers.tolist()
        return func(*args, **kwargs)


def _to(tensor, device, dtype=None, non_blocking=False, layout=None, copy=False):
    device, dtype, layout = device or tensor.device, dtype or tensor.dtype, layout or torch.preserve_format
    laid_out = layout is torch.preserve_format or tensor.is_contiguous(memory_format=layout)
    if tensor.device.type == device.type and tensor.dtype == dtype and laid_out and not copy:
        return tensor
    options = {"dtype": dtype, "device": device, "non_blocking": non_blocking, "memory_format": layout}
    return torch.ops.aten._to_copy.default(tensor, **options)


def _run(func, args, kwargs):
    """Run an operator on the CPU, as if where its tensors are."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    gpus = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    # What autograd makes by itself, C++ makes on the CPU; there is no backward pass of anything else here.
    backward = torch._C._current_graph_task_id() != -1
    device = kwargs.get("device")
    there = bool(gpus) or backward
    if device is not None:
        there = backward or torch.device(device).type == "cuda"
        kwargs = {**kwargs, "device": CPU}
    both = any(tensor.dim() > 0 and not isinstance(tensor, OnGpu) for tensor in tensors) and bool(gpus)
    if name in _BETWEEN_DEVICES:
        non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        if not non_blocking and (both or bool(gpus) != there):
            _wait(f"a copy of {tuple(tensors[0].shape)}")
    elif both and not backward:
        raise Mixed(f"{name} of {[(type(tensor).__name__, tuple(tensor.shape)) for tensor in tensors]}")
    if gpus and (name in _READ or (name == "index" and any(t.dtype == torch.bool for t in tensors[1:]))):
        _wait(name)
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def placed(leaf):
        if not isinstance(leaf, torch.Tensor) or not there:
            return leaf
        return gpus[id(leaf)] if id(leaf) in gpus else OnGpu(leaf)  # the same one, if it was changed in place

    return tree_map(placed, found)


def _inner(leaf):
    return leaf.numbers if isinstance(leaf, OnGpu) else leaf


class _Autocast(torch.autocast):
    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def pretended_gpu(monkeypatch):
    """Within the block torch has one GPU."""
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
        "default_generators": (torch.Generator(),),
        "get_device_capability": lambda device=None: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    idle = SimpleNamespace(is_capturing=lambda: False)  # asked by torch 2.14
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: idle)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    grouped = clip_grad._group_tensors_by_device_and_dtype  # by C++

    def on_gpu(lists):
        return {(GPU, dtype): found for (_, dtype), found in grouped(lists).items()}

    monkeypatch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", on_gpu)
    # Else a module that is moved would keep parameters of its own class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Operators(), _Functions():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
