"""Policy and value networks for any Gymnasium spaces of a fixed size."""

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from common.workers import gather


class Normalizer(nn.Module):
    """Flattens observations and standardizes them by the moments of all seen so far.
    The moments only change in `update`, not while a batch is collected and learned from.
    Images (bytes, at least 5 × 5) are centered by their mean; `std` is then the largest byte.
    With enabled=False nothing is centered, and only images are scaled.
    """

    def __init__(self, shape: tuple[int, ...], enabled: bool = True, dtype: type = np.float32):
        super().__init__()
        self.shape = shape
        self.enabled = enabled
        first, middle, last = (1, 1, 1, *shape)[-3:]
        self.channels_last = first == middle or last < min(first, middle)  # (H, W, C)
        sides = (first, middle) if self.channels_last else (middle, last)
        self.is_image = dtype == np.uint8 and min(sides) >= 5
        self.limit = 10.0 if enabled else math.inf  # in standard deviations
        self.register_buffer("mean", torch.zeros(math.prod(shape)))
        self.register_buffer("std", torch.full_like(self.mean, 255 if self.is_image else 1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, obs: Tensor) -> Tensor:  # (B, *shape) of any dtype to (B, size)
        mean = self.mean  # looking up a buffer takes as long as subtracting it
        obs = obs.reshape(obs.shape[0], -1).to(mean.dtype)
        return (obs - mean).div_(self.std).clamp_(-self.limit, self.limit)

    def update(self, obs: Tensor) -> None:
        """Merge the moments of obs (B, *shape) of every worker (Chan et al. 1979)."""
        if not self.enabled and not self.is_image:
            return
        obs = obs.reshape(len(obs), -1).to(torch.float32 if self.is_image else torch.float64)
        mean = obs.mean(0) if self.enabled else self.mean
        # One scale for all: scaled by itself, a pixel that hardly ever changes would dominate
        spread = obs.max().expand_as(mean) if self.is_image else obs.var(0, correction=0)
        for size, moments in gather((len(obs), torch.stack([mean, spread]).cpu())):
            new_mean, new_spread = moments.to(self.mean.device)
            if self.is_image:
                largest = torch.maximum(new_spread, self.std * (self.count > 0))
                self.std.copy_(largest.clamp(min=1))
            self.count += size
            new = size / self.count.item()  # the share of the new sample in all
            old = 1 - new
            shift = new_mean - self.mean
            if not self.is_image:
                variance = old * self.std.double() ** 2 + new * new_spread + old * new * shift**2
                self.std.copy_(variance.sqrt().clamp(min=1e-8))  # not 0 for what never changes
            self.mean += new * shift


def initialize(layer: nn.Linear | nn.Conv2d, gain: float = 2**0.5) -> None:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """Two tanh layers and a linear one, on normalized observations."""

    def __init__(self, normalizer: Normalizer, hidden_size: int, num_outputs: int, gain: float):
        super().__init__()
        self.lr_limit = math.inf  # none
        self.normalizer = normalizer
        sizes = [len(normalizer.mean), hidden_size, hidden_size, num_outputs]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        for layer, layer_gain in zip(self.layers, [2**0.5, 2**0.5, gain]):
            initialize(layer, layer_gain)

    def forward(self, obs: Tensor) -> Tensor:
        first, second, last = self.layers
        # Functions, since calling a small layer takes longer than its arithmetic
        x = nn.functional.linear(self.normalizer(obs), first.weight, first.bias)
        x = nn.functional.linear(torch.tanh(x), second.weight, second.bias)
        return nn.functional.linear(torch.tanh(x), last.weight, last.bias)


class CNN(nn.Module):
    """The network of Mnih et al. 2015, or a smaller one for images under 36 × 36."""

    def __init__(self, normalizer: Normalizer, hidden_size: int, num_outputs: int, gain: float):
        super().__init__()
        self.normalizer = normalizer
        example = self.to_images(torch.zeros(1, *normalizer.shape))
        channels, height, width = example.shape[1:]
        if min(height, width) >= 36:
            convolutions = [
                nn.Conv2d(channels, 32, kernel_size=8, stride=4),
                nn.Conv2d(32, 64, kernel_size=4, stride=2),
                nn.Conv2d(64, 64, kernel_size=3),
            ]
            hidden_size = 512
            self.lr_if_centered = 5e-4 if min(height, width) < 64 else 2.5e-4
        else:
            self.lr_if_centered = math.inf
            convolutions = [nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)]  # 3 × 3 pixels
        layers = []
        for convolution in convolutions:
            layers += [convolution, nn.ReLU()]
        num_features = nn.Sequential(*layers)(example).numel()
        hidden = nn.Linear(num_features, hidden_size)
        last = nn.Linear(hidden_size, num_outputs)
        for layer in [*convolutions, hidden, last]:
            initialize(layer)
        initialize(last, gain)  # again, with its own gain
        self.layers = nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), last)

    @property
    def lr_limit(self) -> float:
        """A cap, chosen by trial; 0 until `Normalizer.update` has seen the first images."""
        return self.lr_if_centered if self.normalizer.count > 0 else 0.0

    def to_images(self, x: Tensor) -> Tensor:  # (B, …) to (B, channels, height, width)
        x = x.reshape(len(x), 1, *self.normalizer.shape)  # gray images have no channels
        if self.normalizer.channels_last:
            x = x.movedim(-1, -3)
        return x.flatten(1, -3)  # the frames of a stack are channels too

    def forward(self, obs: Tensor) -> Tensor:
        if len(obs) > 256 and not torch.is_grad_enabled():  # to save memory
            return torch.cat([self(part) for part in obs.split(256)])
        images = self.to_images(self.normalizer(obs))
        return self.layers(images.to(memory_format=torch.channels_last))  # the faster format


class StableCategorical(Categorical):
    """Its KL stays finite if a probability underflows to 0, where torch's is inf."""


class StableBernoulli(Bernoulli):
    """Its KL comes from logits, since torch's is inf or wrong for probabilities near 0 or 1."""


@register_kl(StableCategorical, StableCategorical)
def kl_of_categoricals(old: StableCategorical, new: StableCategorical) -> Tensor:
    return (old.probs * (old.logits - new.logits)).sum(-1)


@register_kl(StableBernoulli, StableBernoulli)
def kl_of_bernoullis(old: StableBernoulli, new: StableBernoulli) -> Tensor:
    x, y = old.logits, new.logits
    kl_if_1 = x.sigmoid() * (logsigmoid(x) - logsigmoid(y))
    return kl_if_1 + (-x).sigmoid() * (logsigmoid(-x) - logsigmoid(-y))


class CategoricalHead(nn.Module):
    """Discrete and MultiDiscrete actions: a categorical for each, padded to the widest."""

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete):
        super().__init__()
        self.space = space
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        sizes = torch.as_tensor(np.asarray(sizes).tolist())  # of any integer type
        self.shape = (*space.shape, int(sizes.max()))
        missing = torch.arange(self.shape[-1]) >= sizes.unsqueeze(-1)
        # Finite, so that no gradient is 0 · inf; yet the probability is exactly 0
        self.register_buffer("padding", missing * -1e9 if missing.any() else None)

    def logits(self, outputs: Tensor) -> Tensor:
        return outputs if self.padding is None else outputs + self.padding

    def forward(self, outputs: Tensor) -> Distribution:
        dist = StableCategorical(logits=self.logits(outputs), validate_args=False)
        parts = len(self.shape) - 1  # 0 for Discrete
        return Independent(dist, parts, validate_args=False) if parts else dist

    def sample(self, outputs: Tensor) -> Tensor:
        exponential = torch.empty_like(outputs).exponential_()
        return (self.logits(outputs) - exponential.log_()).argmax(-1)  # the Gumbel-max trick

    def to_env(self, actions: Tensor) -> np.ndarray:
        return (actions.numpy(force=True) + self.space.start).astype(self.space.dtype)


class BernoulliHead(nn.Module):
    """MultiBinary actions: a Bernoulli for each."""

    def __init__(self, space: spaces.MultiBinary):
        super().__init__()
        self.space = space
        self.shape = space.shape

    def forward(self, outputs: Tensor) -> Distribution:
        dist = StableBernoulli(logits=outputs, validate_args=False)
        return Independent(dist, len(self.shape), validate_args=False)

    def sample(self, outputs: Tensor) -> Tensor:
        return torch.bernoulli(outputs.sigmoid().nan_to_num())  # else NaN is an error

    def to_env(self, actions: Tensor) -> np.ndarray:
        return actions.numpy(force=True).astype(self.space.dtype)


class GaussianHead(nn.Module):
    """Box actions: normals, each with one learned standard deviation for all states.
    Actions are in units that put the bounds at ±1 to ±3, so that learning hardly depends on the
    units of the task. The unit is 1 if the bounds are infinite or in this range.
    """

    def __init__(self, space: spaces.Box):
        super().__init__()
        self.space = space
        self.shape = space.shape
        half = space.high / 2 - space.low / 2  # high - low may overflow
        self.log_std = nn.Parameter(torch.tensor(np.log(np.clip(half / 2, 0.5, 1)).tolist()))
        half = np.where(half < 1e15, half, 0)  # 0 stands for (nearly) infinite bounds
        unit = np.where(half > 0, half / np.clip(half, 1, 3), 1)
        center = np.clip(0, space.low + half, space.high - half)  # middle, or nearest 0
        self.register_buffer("unit", torch.tensor(unit.tolist()))
        self.register_buffer("center", torch.tensor(center.tolist()))
        self.register_load_state_dict_pre_hook(self.add_units)

    @staticmethod
    def add_units(head: "GaussianHead", state: dict, prefix: str, *rest: Any) -> None:
        """Checkpoints from before there were units have actions as the environment takes them."""
        state.setdefault(f"{prefix}unit", torch.ones_like(head.unit))
        state.setdefault(f"{prefix}center", torch.zeros_like(head.center))

    def forward(self, outputs: Tensor) -> Distribution:
        dist = Normal(outputs, self.log_std.exp(), validate_args=False)
        return Independent(dist, len(self.shape), validate_args=False)

    def sample(self, outputs: Tensor) -> Tensor:
        return outputs + self.log_std.exp() * torch.randn_like(outputs)

    def to_env(self, actions: Tensor) -> np.ndarray:  # clipped, but scored as sampled
        actions = torch.addcmul(self.center, self.unit, actions).numpy(force=True)
        clipped = np.clip(actions, self.space.low, self.space.high)
        if self.space.dtype.kind in "biu":  # booleans or integers
            clipped = clipped.round()
        return clipped.astype(self.space.dtype)


def make_head(space: spaces.Space) -> nn.Module:
    """What turns outputs of a network (B, *shape) into distributions and samples."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return CategoricalHead(space)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(space)
    if isinstance(space, spaces.Box):
        return GaussianHead(space)
    raise ValueError(f"no policy for {space}, only for Discrete, MultiDiscrete, MultiBinary, Box")


class Policy(nn.Module):
    """π(a|s): a batch of observations (B, …) to a torch Distribution of batch shape (B,)."""

    def __init__(self, normalizer: Normalizer, action_space: spaces.Space, hidden_size: int = 64):
        super().__init__()
        self.head = make_head(action_space)
        network = CNN if normalizer.is_image else MLP
        # Outputs near 0: at first, π is about the same in all states (Andrychowicz et al. 2021)
        self.net = network(normalizer, hidden_size, math.prod(self.head.shape), gain=0.01)

    def outputs(self, obs: Tensor) -> Tensor:
        return self.net(obs).reshape(-1, *self.head.shape)

    def forward(self, obs: Tensor) -> Distribution:
        return self.head(self.outputs(obs))

    def sample(self, obs: Tensor) -> Tensor:  # as forward(obs).sample(), but quicker
        return self.head.sample(self.outputs(obs))


class Value(nn.Module):
    """V(s): observations (B, …) to state values (B,), in units of the scaled reward."""

    def __init__(self, normalizer: Normalizer, hidden_size: int = 64):
        super().__init__()
        network = CNN if normalizer.is_image else MLP
        self.net = network(normalizer, hidden_size, num_outputs=1, gain=1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)
