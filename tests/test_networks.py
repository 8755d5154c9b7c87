"""Distributions, samples and normalization, against enumeration, closed forms, SciPy and NumPy."""

import copy
import csv
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, stats
from torch.distributions import kl_divergence

import ppo
import trpo
from common.networks import Normalizer, Policy, Value, make_head

DISCRETE = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-2),
    spaces.MultiDiscrete([2, 4, 1]),
    spaces.MultiDiscrete([3, 2], start=[-5, 7]),
    spaces.MultiDiscrete([[2, 3], [1, 2]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
]
UNITS = {"head.unit", "head.center"}
BOX = [
    spaces.Box(-1, 2, ()),
    spaces.Box(np.array([-1, -2, 0]), np.array([1, 2, 5]), dtype=np.float64),
    spaces.Box(-1, 2, (2, 2)),
    spaces.Box(-np.inf, np.inf, (2,)),
]
OBS = torch.zeros(1, 2)
LARGEST = 2**63 - 1  # of 64-bit integers


def make(space, seed):
    """A policy that is the same for every observation, and the NumPy numbers that make it up."""
    policy, rng = Policy(Normalizer((2,)), space, hidden_size=8), np.random.default_rng(seed)
    outputs = rng.normal(size=policy.net.layers[-1].bias.shape)
    policy.net.layers[-1].weight.data.zero_()
    policy.net.layers[-1].bias.data = torch.tensor(outputs, dtype=torch.float32)
    if not isinstance(space, spaces.Box):
        return policy, outputs
    std = rng.uniform(0.3, 2, space.shape)
    policy.head.log_std.data = torch.tensor(np.log(std), dtype=torch.float32)
    return policy, (outputs.reshape(space.shape), std)


def enumerate_actions(space, outputs):
    """All joint actions counted from 0, (J, *shape), and the probability of each."""
    if isinstance(space, spaces.MultiBinary):
        rows = [[1 - p, p] for p in 1 / (1 + np.exp(-outputs))]
    else:
        sizes = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
        rows = [np.exp(row[:n]) for row, n in zip(outputs.reshape(len(sizes), -1), sizes)]
        rows = [row / row.sum() for row in rows]
    joint = list(itertools.product(*(range(len(row)) for row in rows)))
    probs = [math.prod(row[a] for row, a in zip(rows, action)) for action in joint]
    return np.reshape(joint, (-1, *space.shape)), np.array(probs)


@pytest.mark.parametrize("space", [*DISCRETE, *BOX], ids=str)
def test_nan_is_no_error_in_acting(space):
    """The last observation of an episode may be NaN, and the action there is not taken."""
    policy, _ = make(space, seed=0)
    actions = policy.sample(torch.full((1, 2), math.nan))
    assert policy.head.to_env(actions).shape == (1, *space.shape)


@pytest.mark.parametrize("space", DISCRETE, ids=str)
def test_discrete_distributions_by_enumeration(space):
    (policy, outputs), (other, other_outputs) = make(space, seed=0), make(space, seed=1)
    (actions, p), (_, q) = (
        enumerate_actions(space, outputs),
        enumerate_actions(space, other_outputs),
    )
    dist = policy(OBS)
    assert dist.batch_shape == (1,)
    log_probs = dist.log_prob(torch.tensor(actions, dtype=policy.sample(OBS).dtype))
    kl, entropy = kl_divergence(dist, other(OBS)), dist.entropy()
    assert_allclose(log_probs.exp().sum().item(), 1, rtol=1e-6)
    assert_allclose(log_probs.detach(), np.log(p), rtol=1e-5)
    assert_allclose(entropy.item(), -(p * np.log(p)).sum(), rtol=1e-5)
    assert_allclose(kl.item(), (p * np.log(p / q)).sum(), rtol=1e-4)
    (kl + entropy + log_probs.sum()).backward()
    assert all(each.net.layers[-1].bias.grad.isfinite().all() for each in (policy, other))


@pytest.mark.parametrize("space", DISCRETE, ids=str)
def test_discrete_samples(space):
    torch.manual_seed(0)
    policy, outputs = make(space, seed=2)
    obs, start = OBS.expand(20_000, 2), getattr(space, "start", 0)
    for sample in (policy.sample(obs), policy(obs).sample()):
        sent = policy.head.to_env(sample)
        assert sent.dtype == space.dtype
        assert all(map(space.contains, np.unique(sent, axis=0)))
        for action, p in zip(*enumerate_actions(space, outputs)):
            frequency = (sent == action + start).reshape(20_000, -1).all(1).mean()
            assert abs(frequency - p) < 5 * math.sqrt(p * (1 - p) / 20_000)


def test_each_observation_has_actions_of_its_own():
    """Three outputs of the network that are as good as certain of three different actions."""
    certain = 50 * torch.eye(3)
    pairs = certain[:, None].expand(3, 2, 3)  # both parts alike
    for space, outputs, expected in [
        (spaces.Discrete(3), certain, [0, 1, 2]),
        (spaces.MultiDiscrete([3, 3]), pairs, [[0, 0], [1, 1], [2, 2]]),
        (spaces.MultiBinary(3), 2 * certain - 50, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (spaces.Box(-1, 1, (2,)), certain[:, :2], [[50, 0], [0, 50], [0, 0]]),
    ]:
        head = make_head(space)
        tolerance = 5 if isinstance(space, spaces.Box) else 0  # ten standard deviations
        for sample in (head.sample(outputs), head(outputs).sample(), head(outputs).mode):
            assert_allclose(sample.detach(), expected, atol=tolerance)


def test_padding_is_never_taken_even_where_its_output_is_the_largest():
    policy, _ = make(spaces.MultiDiscrete([2, 4]), seed=0)
    policy.net.layers[-1].bias.data = torch.tensor([0.0, 0, 50, 50, 0, 0, 0, 0])
    probs = policy(OBS).base_dist.probs[0]
    assert_allclose(probs.detach(), [[0.5, 0.5, 0, 0], [0.25] * 4])
    assert (policy.sample(OBS.expand(1000, 2))[:, 0] < 2).all()


@pytest.mark.parametrize("space", BOX, ids=str)
def test_gaussians_in_closed_form(space):
    (policy, (mean, std)), (other, (mean_2, std_2)) = make(space, seed=0), make(space, seed=1)
    dist, actions = policy(OBS), np.random.default_rng(2).normal(size=(10, *space.shape)) * 3
    assert dist.batch_shape == (1,)
    log_probs = dist.log_prob(torch.tensor(actions, dtype=torch.float32)).detach()
    log_densities = stats.norm(mean, std).logpdf(actions).reshape(10, -1)
    kl = np.log(std_2 / std) + (std**2 + (mean - mean_2) ** 2) / (2 * std_2**2) - 1 / 2
    assert_allclose(log_probs, log_densities.sum(1), rtol=1e-5)
    assert_allclose(dist.entropy().item(), stats.norm(mean, std).entropy().sum(), rtol=1e-5)
    assert_allclose(kl_divergence(dist, other(OBS)).item(), kl.sum(), rtol=1e-5)


def test_gaussian_by_integration():
    dist, other = (make(BOX[0], seed)[0](OBS) for seed in (0, 1))
    grid = torch.linspace(-30, 30, 20_001)
    log_p, log_q = (d.log_prob(grid).detach().double().numpy() for d in (dist, other))
    expected = [1, dist.entropy().item(), kl_divergence(dist, other).item()]
    for function, integral in zip([np.ones_like(log_p), -log_p, log_p - log_q], expected):
        found = integrate.simpson(np.exp(log_p) * function, x=grid.double())
        assert_allclose(found, integral, rtol=1e-4)


@pytest.mark.parametrize("space", BOX, ids=str)
def test_gaussian_samples(space):
    torch.manual_seed(0)
    policy, (mean, std) = make(space, seed=2)
    obs = OBS.expand(20_000, 2)
    for sample in (policy.sample(obs), policy(obs).sample()):
        z = ((sample.detach().numpy() - mean) / std).reshape(20_000, -1).T
        assert all(stats.kstest(component, "norm").pvalue > 1e-4 for component in z)
        correlations = np.atleast_2d(np.corrcoef(z)) - np.eye(len(z))
        assert np.abs(correlations).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("space", "action", "sent"),
    [
        (BOX[0], 9.0, 2),
        (BOX[1], [9.0, -9, 1], [1, -2, 3.5]),  # the middle of 0 to 5 is 2.5
        (BOX[2], [[-9.0, 9], [0.5, -1]], [[-1, 2], [1, -0.5]]),
        (BOX[3], [-1e9, 0.25], [-1e9, 0.25]),
        (spaces.Box(-3, 3, (3,), np.int64), [1.75, -1.75, 9.0], [2, -2, 3]),
        (spaces.Box(-LARGEST, LARGEST, (2,), np.int64), [5.0, -5.25], [5, -5]),
        (spaces.Box(0, 2 * LARGEST + 1, (2,), np.uint64), [5.0, -5.25], [5, 0]),
        (spaces.Box(0, 1, (3,), np.bool), [0.25, -0.25, -1.0], [True, False, False]),
    ],
)
def test_box_actions_are_clipped_to_the_bounds(space, action, sent):
    actions = torch.tensor([action])
    clipped = make(space, seed=0)[0].head.to_env(actions)
    assert_array_equal(clipped, [sent])
    assert clipped.dtype == space.dtype
    assert space.contains(clipped[0, ...])
    assert_array_equal(actions, [action])  # scored as it was sampled


TWO = spaces.Discrete(2)
OTHERS = [spaces.Text(5), spaces.Graph(TWO, None), spaces.Dict(a=TWO), spaces.Tuple([TWO])]


@pytest.mark.parametrize("space", OTHERS, ids=str)
def test_other_action_spaces_are_refused_by_name(space):
    with pytest.raises(ValueError, match=type(space).__name__):
        Policy(Normalizer((2,)), space)


def test_normalizer_limits():
    normalizer, disabled = Normalizer((2,)), Normalizer((1, 2), enabled=False)
    assert_array_equal(normalizer(torch.tensor([[3, -4]])), [[3, -4]])  # nothing known yet
    for _ in range(2):
        normalizer.update(torch.tensor([[0.1, 1], [0.1, -1], [0.1, 1], [0.1, -1]]))
        disabled.update(torch.tensor([[[5.0, 7]], [[1, 2]]]))
    # The first feature never moved; the second has mean 0 and standard deviation 1
    far = normalizer(torch.tensor([[0.1, 9.5], [0.1, 11], [0.1, -99]]))
    assert_allclose(far, [[0, 9.5], [0, 10], [0, -10]], rtol=1e-6)
    assert_array_equal(disabled(torch.tensor([[[99, -5]]])), [[99, -5]])


def test_networks_are_two_tanh_layers_and_a_linear_one():
    torch.manual_seed(0)
    obs, normalizer = torch.randn(5, 3), Normalizer((3,))
    normalizer.update(obs * 2 + 1)
    z = (obs.numpy() - normalizer.mean.numpy()) / normalizer.std.numpy()
    policy, value = Policy(normalizer, spaces.Discrete(4), 8), Value(normalizer, 8)
    for net in (policy.net, value.net):
        for parameter in net.parameters():
            parameter.data.normal_()
        weights, biases = zip(*((x.weight.detach(), x.bias.detach()) for x in net.layers))
        hidden = np.tanh(z @ weights[0].numpy().T + biases[0].numpy())
        hidden = np.tanh(hidden @ weights[1].numpy().T + biases[1].numpy())
        expected = hidden @ weights[2].numpy().T + biases[2].numpy()
        found = policy.outputs(obs) if net is policy.net else value(obs)[:, None]
        assert_allclose(found.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["policy", "value"])
def test_initial_weights_are_orthogonal(network):
    policy, value = Policy(Normalizer((5,)), spaces.Discrete(4), 16), Value(Normalizer((5,)), 16)
    net, gain = (policy.net, 0.01) if network == "policy" else (value.net, 1)
    for linear, size in zip(net.layers, [math.sqrt(2), math.sqrt(2), gain], strict=True):
        short = min(linear.weight.detach() / size, linear.weight.detach().T / size, key=len)
        assert_allclose(short @ short.T, np.eye(len(short)), atol=1e-5)
        assert not linear.bias.any()


def test_first_policy_is_near_uniform_or_half_as_wide_as_its_range():
    torch.manual_seed(0)
    obs, normalizer = torch.randn(100, 5), Normalizer((5,))
    entropy = Policy(normalizer, spaces.MultiDiscrete([4, 2]))(obs).entropy()
    assert_allclose(entropy.detach(), math.log(4 * 2), rtol=1e-4)
    dist = Policy(normalizer, spaces.Box(-1, 1, (3,)))(obs)
    assert_allclose(dist.mean.detach(), np.zeros((100, 3)), atol=0.05)
    assert_allclose(dist.stddev.detach(), np.full((100, 3), 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "mean", "std"),
    [
        ([-2, 0, -0.4], [2, 1, 0.4], [0, 0.5, 0], [1, 0.25, 0.2]),  # a quarter of 4, 1 and 0.8
        ([-3, -np.inf, 0], [3, np.inf, np.inf], [0, 0, 0], [1, 1, 1]),
        ([-3e38, 0, 5], [3e38, 1e-9, 5], [0, 5e-10, 5], [1, 2.5e-10, 0.5]),
        ([0, 7, 300], [255, 9, 330], [127.5, 8, 315], [42.5, 0.5, 5]),  # a third of a wide half
    ],
)
def test_the_first_policy_fits_the_range_of_each_action(low, high, mean, std):
    """In the units of the environment, before the bounds clip it."""
    space = spaces.Box(np.float64(low), np.float64(high), dtype=np.float64)
    head = Policy(Normalizer((2,)), space).head
    assert_allclose(head.center, mean, rtol=1e-6)
    assert_allclose(head.unit * head.log_std.exp().detach(), std, rtol=1e-6)


@pytest.mark.parametrize("bound", [1e-6, 1e-3, 0.4])
def test_the_same_policy_acts_alike_in_other_units(bound):
    """What is sampled and scored is the same; only what the environment gets is scaled."""
    policies, sent = {}, {}
    for limit in (1.0, bound):
        torch.manual_seed(0)
        policies[limit] = policy = Policy(Normalizer((2,)), spaces.Box(-limit, limit, (2,)))
        actions = policy.sample(OBS)
        sent[limit] = policy.head.to_env(actions) / limit
    assert_allclose(sent[bound], sent[1.0], rtol=1e-5)
    here, there = (policy(OBS).log_prob(actions).detach() for policy in policies.values())
    assert_array_equal(here, there)


def test_a_checkpoint_without_units_acts_as_it_did():
    """Before there were units, actions were those of the environment."""
    old, new = (Policy(Normalizer((2,)), spaces.Box(0, 0.01, (2,))) for _ in range(2))
    state = {name: x for name, x in old.state_dict().items() if name not in UNITS}
    new.load_state_dict(state)
    assert_allclose(new.head.to_env(torch.tensor([[0.004, -1]])), [[0.004, 0]], rtol=1e-6)
    new.load_state_dict(old.state_dict())
    assert_allclose(new.head.to_env(torch.tensor([[0.5, -1]])), [[0.0075, 0]], rtol=1e-6)


class Showing(gym.Env):
    """Shows one and the same observation for ever."""

    action_space = spaces.MultiDiscrete([2, 3])

    def __init__(self, space, shown):
        self.observation_space, self.shown = space, shown

    def reset(self, *, seed=None, options=None):
        return copy.deepcopy(self.shown), {}

    def step(self, action):
        return copy.deepcopy(self.shown), 0.0, False, False, {}


gym.register("Showing-v0", Showing)
VECTOR, THREE = np.float32([0.5, -1]), spaces.Discrete(3)
PAIR = spaces.Dict(place=spaces.Box(-1, 1, (2,)), which=THREE)
NESTED = spaces.Dict(pair=PAIR, row=spaces.Tuple([THREE]))


@pytest.mark.parametrize(
    ("space", "shown", "flat"),
    [
        (spaces.Box(-1, 1, ()), np.array(0.5, np.float32), [0.5]),
        (spaces.Box(-1, 1, (2,)), VECTOR, [0.5, -1]),
        (spaces.Box(-9, 9, (2, 2), np.float64), np.array([[1.5, 2], [3, -4]]), [1.5, 2, 3, -4]),
        (spaces.Box(0, 255, (1, 2, 2), np.uint8), np.uint8([[[0, 255], [7, 8]]]), [0, 255, 7, 8]),
        (spaces.Box(-9, 9, (2,), np.int64), np.array([-9, 9]), [-9, 9]),
        (spaces.Box(0, 1, (2,), bool), np.array([True, False]), [1, 0]),
        (THREE, 2, [0, 0, 1]),
        (spaces.Discrete(3, start=2), 2, [1, 0, 0]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
        (spaces.MultiBinary(3), np.int8([1, 0, 1]), [1, 0, 1]),
        (PAIR, {"place": VECTOR, "which": 1}, [0.5, -1, 0, 1, 0]),
        (spaces.Tuple([THREE, spaces.MultiBinary(2)]), (0, np.int8([0, 1])), [1, 0, 0, 0, 1]),
        (NESTED, {"pair": {"place": VECTOR, "which": 2}, "row": (1,)}, [0.5, -1, 0, 0, 1, 0, 1, 0]),
    ],
)
def test_every_observation_space_reaches_the_networks(space, shown, flat):
    args = ppo.Args(env_id="Showing-v0", num_steps=2, num_envs=3)
    envs = ppo.make_envs(args, 3, space=space, shown=shown)
    normalizer = Normalizer(envs.single_observation_space.shape, enabled=False)
    policy, value = Policy(normalizer, envs.single_action_space), Value(normalizer)
    obs, done = envs.reset(seed=0)[0], np.zeros(3, bool)
    scaler = lambda rewards, *_: rewards  # noqa: E731
    batch, *_ = ppo.collect(envs, obs, done, policy, value, scaler, args)
    assert_array_equal(normalizer(batch.obs), [flat] * 6)
    assert batch.actions.shape == (6, 2)
    assert batch.values.shape == (6,)


def test_observations_without_a_size_are_refused():
    space, shown = spaces.Dict(which=THREE, many=spaces.Sequence(THREE)), {"which": 1, "many": (1,)}
    with pytest.raises(ValueError, match="fixed size"):
        ppo.make_envs(ppo.Args(env_id="Showing-v0"), 3, space=space, shown=shown)


def image_networks(shape, **options):
    """A policy and a value function for images of a shape, with biases that are not 0."""
    torch.manual_seed(0)
    normalizer = Normalizer(shape, dtype=np.uint8)
    networks = Policy(normalizer, THREE, **options), Value(normalizer, **options)
    for parameter in itertools.chain(*(network.parameters() for network in networks)):
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return networks


def convolve(image, weight, bias):
    """(C, H, W) to (channels, H−2, W−2), a pixel at a time."""
    output = np.empty((len(weight), image.shape[1] - 2, image.shape[2] - 2))
    for _, i, j in np.ndindex(output.shape):
        output[:, i, j] = np.einsum("cxy,ocxy->o", image[:, i : i + 3, j : j + 3], weight) + bias
    return output


def test_small_images_go_through_two_convolutions_and_two_layers():
    images = np.random.default_rng(0).integers(0, 256, (2, 7, 6, 3)).astype(np.uint8)
    for network in image_networks((7, 6, 3), hidden_size=5):
        weights = [parameter.detach().double().numpy() for parameter in network.parameters()]
        for image, output in zip(images, network.net(torch.from_numpy(images))):
            x = np.moveaxis(image, -1, 0) / 255
            for weight, bias in (weights[0:2], weights[2:4]):
                x = convolve(x, weight, bias).clip(0)
            x = (weights[4] @ x.flatten() + weights[5]).clip(0)
            assert len(x) == 5
            assert_allclose(output.detach(), weights[6] @ x + weights[7], rtol=1e-4, atol=1e-4)


def test_initial_weights_for_images_are_orthogonal():
    normalizer = Normalizer((40, 40, 3), dtype=np.uint8)
    for network, gain in [(Policy(normalizer, THREE), 0.01), (Value(normalizer), 1)]:
        *hidden, last = (layer for layer in network.net.layers if hasattr(layer, "weight"))
        for layer, size in [*((layer, math.sqrt(2)) for layer in hidden), (last, gain)]:
            weight = layer.weight.detach().flatten(1) / size
            rows = min(weight, weight.T, key=len)
            assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
            assert not layer.bias.any()


def test_a_row_of_bytes_is_no_image():
    normalizer, obs = Normalizer((128,), dtype=np.uint8), torch.arange(256).reshape(2, 128).byte()
    policy = Policy(normalizer, THREE)
    normalizer.update(obs)
    assert policy.outputs(obs).shape == (2, 3)
    assert_allclose(normalizer(obs), np.repeat([[-1.0], [1]], 128, 1), rtol=1e-6)


TABLES = [(3, 3), (4, 4), (100, 2), (4, 4, 9), (8, 4, 10), (17, 4, 8), (9, 4, 6, 3), (9, 3, 6, 4)]


@pytest.mark.parametrize("shape", [*TABLES, (5, 5), (1, 5, 5), (5, 5, 9), (9, 5, 5), (9, 5, 4)])
def test_a_table_of_bytes_with_no_room_for_convolutions_is_no_image(shape):
    images = image_networks(shape)[0]
    assert images.net.normalizer.is_image == (5 in shape)
    assert images.outputs(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 3)


def test_large_images_go_through_the_network_of_mnih_et_al():
    for network, outputs in zip(image_networks((4, 84, 84)), [3, 1]):
        sizes = [tuple(x.shape) for x in network.parameters() if x.dim() > 1]
        convolutions = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
        assert sizes == [*convolutions, (512, 64 * 7 * 7), (outputs, 512)]
        kinds = [type(layer).__name__ for layer in network.net.layers]
        assert kinds == ["Conv2d", "ReLU"] * 3 + ["Flatten", "Linear", "ReLU", "Linear"]
        assert [layer.stride for layer in network.net.layers[:6:2]] == [(4, 4), (2, 2), (1, 1)]


def test_channels_may_come_first_or_last_or_in_a_stack_of_frames():
    frames = torch.randint(0, 256, (5, 2, 40, 44, 3), dtype=torch.uint8)  # (B, S, H, W, C)
    policy, _ = image_networks((6, 40, 44))
    expected = policy.outputs(frames.movedim(-1, 2).reshape(5, 6, 40, 44))
    for shape, images in [
        ((2, 40, 44, 3), frames),
        ((40, 44, 6), frames.permute(0, 2, 3, 1, 4).flatten(3)),
        ((2, 3, 40, 44), frames.movedim(-1, 2)),
    ]:
        other, _ = image_networks(shape)
        other.load_state_dict(policy.state_dict() | normalizer_state(other))
        assert_allclose(other.outputs(images).detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    for shape in [(7, 7, 20), (20, 7, 7), (7, 7, 7), (2, 7, 7, 20)]:  # a board and its planes
        pictures = image_networks(shape)[0].net.to_images(torch.zeros(5, *shape))
        assert pictures.shape[2:] == (7, 7)
    grey, _ = image_networks((40, 44))
    assert grey.outputs(frames[:, 0, :, :, 0]).shape == (5, 3)


def test_many_images_give_what_each_gives_alone():
    images = torch.randint(0, 256, (600, 6, 7, 3), dtype=torch.uint8)
    for network in image_networks((6, 7, 3), hidden_size=5):
        with torch.no_grad():
            together = network.net(images)
        alone = torch.cat([network.net(image) for image in images.split(1)])
        assert_allclose(together, alone.detach(), rtol=1e-4, atol=1e-5)


def normalizer_state(policy):
    return {name: x for name, x in policy.state_dict().items() if "normalizer" in name}


def test_images_stay_bytes_until_they_are_in_the_network():
    space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    args = ppo.Args(env_id="Showing-v0", num_steps=2, num_envs=3)
    envs = ppo.make_envs(args, 3, space=space, shown=np.full((8, 8, 3), 51, np.uint8))
    normalizer = Normalizer(space.shape, True, space.dtype)
    policy, value = Policy(normalizer, envs.single_action_space, 8), Value(normalizer, 8)
    obs, done = envs.reset(seed=0)[0], np.zeros(3, bool)
    scaler = lambda rewards, *_: rewards  # noqa: E731
    batch, *_ = ppo.collect(envs, obs, done, policy, value, scaler, args)
    assert batch.obs.dtype == torch.uint8
    normalizer.update(batch.obs)
    # Shifted by the mean of each pixel, 51, and divided by the largest byte, also 51
    assert_allclose(normalizer(batch.obs + 51), np.ones((6, 192)), rtol=1e-6)
    disabled = Normalizer(space.shape, False, space.dtype)
    assert_allclose(disabled(batch.obs), np.full((6, 192), 0.2), rtol=1e-6)  # a first guess, 255
    disabled.update(batch.obs)
    assert_allclose(disabled(batch.obs), np.ones((6, 192)), rtol=1e-6)


def test_moments_do_not_forget():
    """150,000 zeros and 50,000 ones: the mean is a quarter, the variance 3/16."""
    normalizer = Normalizer((1,))
    normalizer.update(torch.zeros(150_000, 1))
    normalizer.update(torch.ones(50_000, 1))
    assert_allclose(normalizer.mean, [1 / 4])
    assert_allclose(normalizer.std, [3**0.5 / 4])


@pytest.mark.parametrize(
    ("shape", "dtype", "is_image"),
    [
        ((5, 5), np.uint8, True),
        ((2, 5, 9), np.uint8, True),
        ((9, 9, 3), np.uint8, True),
        ((5, 4), np.uint8, False),
        ((25,), np.uint8, False),
        ((9, 9), np.float32, False),
        ((9, 9), np.int16, False),
    ],
)
def test_only_bytes_in_two_dimensions_are_an_image(shape, dtype, is_image):
    normalizer = Normalizer(shape, True, dtype)
    assert normalizer.is_image == is_image
    obs = np.ones((4, *shape), dtype)
    obs[0] = 3  # the mean is 1.5 and the variance 0.75
    normalizer.update(torch.from_numpy(obs))
    assert_allclose(normalizer.std.flatten()[0], 3 if is_image else 0.75**0.5)


def test_images_are_divided_by_the_largest_byte_that_was_ever_seen():
    """A board of zeros and ones, then one with a byte of 7, then ones again."""
    normalizer = Normalizer((5, 5), True, np.uint8)
    boards = torch.zeros(3, 2, 5, 5, dtype=torch.uint8)
    boards[:, :, 0, 0] = torch.tensor([[1, 1], [7, 0], [1, 1]])
    for board, scale, mean in zip(boards, [1, 7, 7], [1, 9 / 4, 11 / 6]):
        normalizer.update(board)
        assert_allclose(normalizer.std, np.full(25, scale))
        assert_allclose(normalizer.mean[0], mean, rtol=1e-6)
    normalizer = Normalizer((5, 5), True, np.uint8)
    normalizer.update(0 * boards[0])
    assert_allclose(normalizer.std, np.ones(25))  # not 0


@pytest.mark.parametrize(
    ("shape", "dtype", "first", "later"),
    [
        ((3,), np.float32, np.inf, np.inf),
        ((8, 8), np.uint8, 0, np.inf),
        ((36, 36), np.uint8, 0, 5e-4),  # the wide network
        ((63, 80), np.uint8, 0, 5e-4),
        ((80, 64), np.uint8, 0, 2.5e-4),  # with more than 1,000 features
    ],
)
def test_images_are_centered_before_anything_is_learned_from_them(shape, dtype, first, later):
    normalizer = Normalizer(shape, True, dtype)
    value = Value(normalizer, 8)
    assert value.net.lr_limit == first
    normalizer.update(torch.zeros(2, *shape))
    assert value.net.lr_limit == later


@pytest.mark.parametrize("script", [ppo, trpo])  # trpo.py logs that of the value function
@pytest.mark.parametrize(("lr", "used"), [(0.01, 5e-4), (2e-4, 2e-4)])
def test_learning_rates_of_images(script, lr, used, tmp_path):
    """0 in the first iteration, then what the limit leaves, annealed: 8 × 16 steps of 4 × 128."""
    gym.registry.pop("Wide-v0", None)
    space = spaces.Box(0, 255, (36, 36), np.uint8)
    shown = dict(space=space, shown=np.zeros((36, 36), np.uint8))
    gym.register("Wide-v0", Showing, kwargs=shown)
    options = dict(num_envs=8, num_steps=16, value_epochs=1, total_steps=512)
    options |= {"policy_lr" if script is ppo else "value_lr": lr, "run_dir": str(tmp_path / "run")}
    script.main(script.Args(env_id="Wide-v0", **options))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert_allclose(rates, [0, used * 3 / 4, used / 2, used / 4], rtol=1e-6)
