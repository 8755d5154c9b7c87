"""A device of its own on any machine: tensors are elsewhere, as on a GPU.

The arithmetic is the processor's, so a run there has to give the very figures of one here. As on
a GPU, tensors of two places cannot meet in an operation (unless one is a single number, or indexes
the other), and NumPy takes none from elsewhere that is not brought here by force. The device's
name is "meta", which PyTorch knows everywhere.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "meta"
MEETING = "aten::copy_", "aten::_to_copy", "aten::index"


class Elsewhere(torch.Tensor):
    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=NAME
        )

    def __init__(self, here):
        self.here = here

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("NumPy has no tensors from elsewhere: bring it here first")
        return self.here.detach().numpy()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.here = other.here

    def __format__(self, spec):
        return format(self.item(), spec)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """An operation on the numbers themselves; what comes out is where what went in is."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim() > 0]
    if there and here and operation._schema.name not in MEETING:
        raise RuntimeError(f"tensors of two places meet in {operation}")
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}

    def unwrap(x):
        return x.here if isinstance(x, Elsewhere) else x

    in_place = {id(x.here): x for x in there}

    def wrap(x):
        if not isinstance(x, torch.Tensor) or not goes_there:
            return x
        return in_place[id(x)] if id(x) in in_place else Elsewhere(x)

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


class Device(TorchDispatchMode):
    """While it is entered, the device is there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})
