"""Policy and value networks, from any Gymnasium space that a vector of numbers can stand for."""

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal


def gather(x):
    """What each worker that torchrun has started has of x, by rank; [x] where there is one."""
    if not torch.distributed.is_initialized():
        return [x]
    workers = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(workers, x)
    return workers


class Normalizer(nn.Module):
    """Flattens observations, and shifts and scales them by the moments of all seen so far.

    The moments move in `update` alone, not while a batch is collected and learned from. Images,
    uint8 of 5 × 5 and more, are divided by 255. With enabled=False no moments are used.
    """

    def __init__(self, shape, enabled=True, dtype=np.float32):
        super().__init__()
        if shape is None:
            raise ValueError("observations must have a fixed size, so no Graph and no Sequence")
        self.shape, self.is_image = shape, dtype == np.uint8 and sorted((0, 0, *shape))[-2] >= 5
        self.enabled, self.clip = enabled, 10.0 if enabled else math.inf  # in standard deviations
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.full_like(self.mean, 255.0 if self.is_image else 1.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, obs):
        """obs: (B, *shape) of any dtype. Returns (B, size) floats."""
        mean = self.mean
        obs = obs.reshape(obs.shape[0], -1).to(mean.dtype)
        return (obs - mean).div_(self.std).clamp_(-self.clip, self.clip)

    def update(self, obs):
        """Merge the moments of obs, (B, *shape), of every worker (Chan et al. 1979)."""
        if not self.enabled:
            return
        obs = obs.reshape(len(obs), -1).to(torch.float32 if self.is_image else torch.float64)
        own = [obs.mean(0)] if self.is_image else [obs.mean(0), obs.var(0, correction=0)]
        for size, moments in gather((len(obs), torch.stack(own).cpu())):
            mean, *var = moments.to(self.mean.device)
            self.count += size
            new = size / self.count.item()  # shares of the merged sample, in double precision
            old, delta = 1 - new, mean - self.mean
            if not self.is_image:  # where a pixel that hardly ever changes would outshine all
                var = old * self.std.double() ** 2 + new * var[0] + old * new * delta**2
                self.std.copy_(var.sqrt().clamp(min=1e-8))  # 0 for what never moves
            self.mean += new * delta


class CategoricalHead(nn.Module):
    """Discrete and MultiDiscrete actions: a categorical for each, padded to the widest."""

    def __init__(self, space):
        super().__init__()
        sizes = torch.as_tensor(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        self.start, self.dtype = space.start, space.dtype
        self.shape = (*space.shape, int(sizes.max()))
        missing = torch.arange(self.shape[-1]) >= sizes.unsqueeze(-1)
        # Finite, so that no gradient is 0 · inf; yet the probability is exactly 0
        self.register_buffer("padding", missing * -1e9 if missing.any() else None)

    def logits(self, outputs):
        return outputs if self.padding is None else outputs + self.padding

    def forward(self, outputs):
        dist = Categorical(logits=self.logits(outputs), validate_args=False)
        joint = len(self.shape) - 1  # 0 for Discrete
        return Independent(dist, joint, validate_args=False) if joint else dist

    def sample(self, outputs):
        logits = self.logits(outputs)
        return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)  # Gumbel-max

    def to_env(self, actions):
        return np.add(actions.numpy(force=True), self.start, dtype=self.dtype)


class BernoulliHead(nn.Module):
    """MultiBinary actions: a Bernoulli for each."""

    def __init__(self, space):
        super().__init__()
        self.shape, self.dtype = space.shape, space.dtype

    def forward(self, outputs):
        dist = Bernoulli(logits=outputs, validate_args=False)
        return Independent(dist, len(self.shape), validate_args=False)

    def sample(self, outputs):
        return torch.bernoulli(outputs.sigmoid())

    def to_env(self, actions):
        return actions.numpy(force=True).astype(self.dtype)


class GaussianHead(nn.Module):
    """Box actions: independent normals, with one learned standard deviation for all states."""

    def __init__(self, space):
        super().__init__()
        self.shape, self.dtype = space.shape, space.dtype
        std = np.clip(space.high / 4 - space.low / 4, 1e-3, 1)  # a quarter of the range, at most 1
        self.log_std = nn.Parameter(torch.tensor(np.log(std).tolist()))
        self.low, self.high = space.low, space.high

    def forward(self, outputs):
        dist = Normal(outputs, self.log_std.exp(), validate_args=False)
        return Independent(dist, len(self.shape), validate_args=False)

    def sample(self, outputs):
        return outputs + self.log_std.exp() * torch.randn_like(outputs)

    def to_env(self, actions):
        actions = np.clip(actions.numpy(force=True), self.low, self.high)
        return (actions.round() if self.dtype.kind in "iu" else actions).astype(self.dtype)


HEADS = {spaces.Discrete: CategoricalHead, spaces.MultiDiscrete: CategoricalHead}
HEADS |= {spaces.MultiBinary: BernoulliHead, spaces.Box: GaussianHead}


class MLP(nn.Module):
    """Two tanh layers and a linear one, on normalized observations; orthogonal weights."""

    def __init__(self, normalizer, hidden_size, num_outputs, output_gain):
        super().__init__()
        self.normalizer = normalizer
        sizes = [len(normalizer.mean), hidden_size, hidden_size, num_outputs]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        for layer, gain in zip(self.layers, [2**0.5, 2**0.5, output_gain]):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, obs):
        x, (first, second, last) = self.normalizer(obs), self.layers
        # Functions, for a module call takes longer than the arithmetic of a small layer
        x = torch.tanh(nn.functional.linear(x, first.weight, first.bias))
        x = torch.tanh(nn.functional.linear(x, second.weight, second.bias))
        return nn.functional.linear(x, last.weight, last.bias)


class CNN(nn.Module):
    """Convolutions (Mnih et al. 2015; smaller ones for images of less than 36 pixels a side) and
    two linear layers, on images of either channel order; orthogonal weights."""

    def __init__(self, normalizer, hidden_size, num_outputs, output_gain):
        super().__init__()
        self.normalizer = normalizer
        large = sorted(normalizer.shape)[-2] >= 36  # height and width are the largest sizes
        sizes = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if large else [(32, 3, 1), (64, 3, 1)]
        parts = [part for size in sizes for part in (nn.LazyConv2d(*size), nn.ReLU())]
        parts += [nn.Flatten(), nn.LazyLinear(512 if large else hidden_size), nn.ReLU()]
        self.layers = nn.Sequential(*parts, nn.LazyLinear(num_outputs))
        self(torch.zeros(1, *normalizer.shape))  # the lazy layers take their sizes from it
        for x in self.parameters():
            nn.init.orthogonal_(x, 2**0.5) if x.dim() > 1 else nn.init.zeros_(x)
        nn.init.orthogonal_(self.layers[-1].weight, output_gain)

    def forward(self, obs):
        if len(obs) > 256 and not torch.is_grad_enabled():  # in parts, as all take much memory
            return torch.cat([self(part) for part in obs.split(256)])
        x = self.normalizer(obs).reshape(-1, 1, *self.normalizer.shape)  # (B, 1, …, H, W, C)
        x = (x.movedim(-1, -3) if x.shape[-1] < x.shape[-3] else x).flatten(1, -3)
        return self.layers(x.to(memory_format=torch.channels_last))  # (B, C, H, W), faster so


class Policy(nn.Module):
    """π(a|s): a batch of observations to a torch Distribution over actions.

    Raises ValueError for an action space that none of the heads above can stand for.
    """

    def __init__(self, normalizer, action_space, hidden_size=64):
        super().__init__()
        heads = [head for space, head in HEADS.items() if isinstance(action_space, space)]
        if not heads:
            supported = ", ".join(space.__name__ for space in HEADS)
            raise ValueError(f"no policy for the action space {action_space}, only for {supported}")
        self.head = heads[0](action_space)
        # Outputs near 0: the first policy is close to uniform (Andrychowicz et al. 2021)
        network = CNN if normalizer.is_image else MLP
        self.net = network(normalizer, hidden_size, math.prod(self.head.shape), output_gain=0.01)

    def outputs(self, obs):
        return self.net(obs).reshape(-1, *self.head.shape)

    def forward(self, obs):
        """obs: (B, …). Returns a Distribution whose batch shape is (B,)."""
        return self.head(self.outputs(obs))

    def sample(self, obs):
        """The same draw as forward(obs).sample(), (B, …), without the cost of the Distribution."""
        return self.head.sample(self.outputs(obs))


class Value(nn.Module):
    """V(s): observations (B, …) to state values (B,), in units of the scaled reward."""

    def __init__(self, normalizer, hidden_size=64):
        super().__init__()
        network = CNN if normalizer.is_image else MLP
        self.net = network(normalizer, hidden_size, 1, output_gain=1.0)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)
