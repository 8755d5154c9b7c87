"""Small environments on which something goes wrong: --env-id odd:NAME."""

import multiprocessing
import os
import signal
import sys
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

TWO = spaces.Discrete(2)


class Lost(gym.Env):
    """After 300 steps the environment of an odd seed is killed, exits or fails, or pays NaN."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = TWO
    steps = 0
    is_odd = None

    def __init__(self, how="killed"):
        self.how = how

    def reset(self, *, seed=None, options=None):
        if self.is_odd is None:
            self.is_odd = seed % 2
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = 1.0
        if self.is_odd and self.steps > 300 and self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.is_odd and self.steps > 300 and self.how == "string":
            reward = "one"
        if self.is_odd and self.steps > 300 and self.how == "error":
            raise KeyError("no such room")
        if self.is_odd and self.steps > 300 and self.how == "socket":
            raise ConnectionRefusedError("no simulator")
        if self.is_odd and self.steps > 300 and self.how == "exit":
            sys.exit()  # as environments do whose window was closed
        if self.is_odd and self.steps > 300 and self.how == "nan":
            reward = np.nan
        return np.zeros(2, np.float32), reward, self.steps % 9 == 0, False, {}


class Deaf(gym.Env):
    """Where the seed is odd, it is cut off from the run when it is reset, and lives on."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = TWO

    def reset(self, *, seed=None, options=None):
        if seed % 2:
            os.closerange(3, 256)
            time.sleep(60)
        return np.zeros(2, np.float32), {}


class Flags(gym.vector.VectorEnv):
    """Episodes of 4 steps, the flags of which are of any type."""

    single_observation_space = spaces.Box(0, 9, (1,))
    single_action_space = TWO

    def __init__(self, num_envs, flags="bool", **kwargs):
        self.num_envs, self.flags = num_envs, flags
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def reset(self, *, seed=None, options=None):
        self.count = np.zeros(self.num_envs, np.float32)
        return self.count[:, None], {}

    def step(self, actions):
        resets = self.count == 4
        self.count = np.where(resets, 0, self.count + 1).astype(np.float32)
        is_over = (self.count == 4).astype(self.flags)
        return self.count[:, None], np.where(resets, 0.0, 1.0), 0 * is_over, is_over, {}


class Starting(gym.vector.VectorEnv):
    """Fails when it has started a process."""

    def __init__(self, num_envs, **kwargs):
        multiprocessing.Process(target=time.sleep, args=(60,)).start()
        raise ValueError("no room")


class Foreign:
    """An array of another library, as those of JAX: NumPy can read it, PyTorch cannot."""

    def __init__(self, x):
        self.x = np.asarray(x)
        self.shape, self.dtype, self.nbytes = self.x.shape, self.x.dtype, self.x.nbytes

    def __array__(self, dtype=None, copy=None):
        return self.x.astype(dtype or self.dtype)

    def __getitem__(self, key):
        return Foreign(self.x[key])


class ForeignFlags(Flags):
    """All that it returns are arrays of another library."""

    def reset(self, **kwargs):
        return Foreign(super().reset(**kwargs)[0]), {}

    def step(self, actions):
        return *map(Foreign, super().step(actions)[:4]), {}


class Shown(gym.Env):
    """Episodes that pay the action; what is observed at the given time is odd."""

    action_space = TWO

    def __init__(self, odd=float("nan"), at=9, truncates=False, reward=1.0, length=9):
        self.odd, self.at = odd, at
        self.truncates, self.reward, self.length = truncates, reward, length
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def observe(self):
        obs = self.np_random.normal(size=3)
        if self.t == self.at:
            obs[1] = self.odd
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        is_over = self.t == self.length
        terminated, truncated = is_over and not self.truncates, is_over and self.truncates
        return self.observe(), self.reward * float(action), terminated, truncated, {}


class Bytes(gym.Env):
    """Pays the action, which is a byte or another integer."""

    observation_space = spaces.Box(-1, 1, (1,))

    def __init__(self, dtype="uint8", many=False):
        dtype = np.dtype(dtype).type
        one = spaces.Discrete(3, start=1, dtype=dtype)
        self.action_space = spaces.MultiDiscrete([3, 2], dtype=dtype) if many else one

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return np.zeros(1, np.float32), float(np.sum(action)), self.t == 9, False, {}


class Buttons(gym.Env):
    """Four numbers and a button for each, which pays 1 if it is right."""

    observation_space = spaces.Box(-np.inf, np.inf, (4,))
    action_space = spaces.MultiBinary(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.numbers = self.np_random.normal(size=4).astype(np.float32)
        return self.numbers, {}

    def step(self, action):
        self.t += 1
        right = float(((self.numbers > 0) == (action == 1)).sum())
        self.numbers = self.np_random.normal(size=4).astype(np.float32)
        return self.numbers, right, self.t == 50, False, {}


gym.register("Lost", Lost)
gym.register("Deaf", Deaf)
gym.register("Flags", vector_entry_point=Flags)
gym.register("ForeignFlags", vector_entry_point=ForeignFlags)
gym.register("Starting", vector_entry_point=Starting)
gym.register("Shown", Shown)
gym.register("Bytes", Bytes)
gym.register("Buttons", Buttons)
gym.register("Same", Shown, kwargs=dict(reward=0.0, length=1))
