"""Lets the processes that torchrun has started train as one."""

import torch
from torch import Tensor


def gather(x: object) -> list:
    """x of each worker, in the order of their ranks; [x] in a single process."""
    if not torch.distributed.is_initialized():
        return [x]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, x)
    return everyone


def average(x: Tensor, weight: float) -> Tensor:
    """The weighted mean of a tensor over the workers; x itself in a single process."""
    if not torch.distributed.is_initialized():
        return x
    sums = weight * torch.cat([x.detach().flatten(), x.new_ones(1)])  # last: the weights
    torch.distributed.all_reduce(sums)
    return (sums[:-1] / sums[-1]).view_as(x)


def average_gradients(parameters: list[Tensor], weight: float) -> None:
    """Set gradients to their weighted means over the workers, in one message."""
    if torch.distributed.is_initialized():
        gradients = torch.cat([parameter.grad.flatten() for parameter in parameters])
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, mean in zip(parameters, average(gradients, weight).split(sizes)):
            parameter.grad = mean.view_as(parameter)


def average_metrics(metrics: dict, weight: float) -> dict[str, float]:
    """The weighted mean of each metric over the workers."""
    numbers = torch.tensor([float(x) for x in metrics.values()], dtype=torch.float64)
    return dict(zip(metrics, average(numbers, weight).tolist()))
