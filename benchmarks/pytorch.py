"""PyTorch's batch norm, on a CPU or a GPU; x comes features last, and stays so in memory."""

import importlib.util
import os

from benchmarks.contestants import EPSILON, MOMENTUM


def installed():
    return importlib.util.find_spec("torch") is not None


class Layer:
    """Batch norm in training, and relu behind it if asked for, for x of this shape."""

    def __init__(self, shape, dtype, relu=False, device="cpu"):
        import torch

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        if device == "cpu":
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
        # Its momentum weighs the new statistics.
        self.norm = kind(shape[-1], eps=EPSILON, momentum=1 - MOMENTUM).to(device)
        self.relu = relu

    def tensor(self, array):
        """The array with features second, as PyTorch counts, and last in memory."""
        found = self.torch.from_numpy(array).to(self.device, self.dtype)
        return found.movedim(-1, 1) if found.ndim == 4 else found

    def forward(self, x):
        y = self.norm(x)
        return self.torch.relu(y) if self.relu else y

    def step(self, x, dy):
        """y, and the gradients of x and of the parameters, for tensors x and dy."""
        x = x.detach().requires_grad_()
        y = self.forward(x)
        return y.detach(), self.torch.autograd.grad(y, (x, *self.norm.parameters()), dy)

    def array(self, tensor):
        tensor = tensor.movedim(1, -1) if tensor.ndim == 4 else tensor
        return tensor.float().cpu().numpy()


def kept(shape, dtype, relu):
    """Of each tensor that is saved for the backward pass: its shape, its dtype, and the bytes of a value."""
    import numpy as np
    import torch

    layer, saved = Layer(shape, dtype, relu), {}

    def pack(tensor):
        key = (tensor.data_ptr(), tuple(tensor.shape))
        saved[key] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.element_size())
        return tensor

    x = layer.tensor(np.ones(shape, np.float32)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer.forward(x)
    del y
    return list(saved.values())
