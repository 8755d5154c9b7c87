"""Play episodes with the policy of a run, and film one.

Run: python -m tools.evaluate runs/CartPole-v1/ppo/seed1 --episodes 20 --video
"""

import csv
import importlib
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from tools import fail


@dataclass
class Args:
    run_dir: Annotated[str, tyro.conf.Positional]  # a run of any of the scripts
    episodes: int = 10  # to play; all at once, each in an environment of its own
    mode: bool = False  # take the most likely action, not a sampled one
    seed: int = 0  # of the environments and the actions
    max_steps: int = 10_000  # an episode that lasts longer is cut off there
    video: bool = False  # film one more episode, to RUN_DIR/video (pip install moviepy)
    output: str = ""  # CSV that a line is added to, of what the episodes came to


def load(run_dir):
    """The script module, the arguments and the checkpoint of a run."""
    try:
        script = json.loads(Path(run_dir, "config.json").read_text())["script"]
    except (OSError, ValueError, LookupError, TypeError):
        fail(f"{run_dir} is not a run: it has no config.json that names its script")
    scripts = [path.stem for path in Path(__file__).parents[1].glob("*.py")]
    if script not in scripts:
        fail(f"{run_dir} is a run of {script}.py, and there is no such script here")
    module = importlib.import_module(script)
    checkpoint = module.load_checkpoint(run_dir)
    return module, module.Args(**checkpoint["args"]), checkpoint


@torch.no_grad()
def play(envs, policy, args):
    """An episode in each environment. Returns the returns, the lengths and who finished, (N,)."""
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    finished = np.zeros(envs.num_envs, bool)
    for _ in range(args.max_steps):
        obs = torch.from_numpy(obs)
        actions = policy(obs).mode if args.mode else policy.sample(obs)
        obs, reward, terminated, truncated, _ = envs.step(policy.head.to_env(actions))
        returns += reward * ~finished
        lengths += ~finished
        finished |= terminated | truncated
        if finished.all():
            break
    envs.close()
    return returns, lengths, finished


def main(args):
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a display then
    if args.episodes < 1 or args.max_steps < 1:
        fail("--episodes and --max-steps must be at least 1")
    script, trained, checkpoint = load(args.run_dir)
    folder = Path(args.run_dir, "video")
    film = partial(
        gym.wrappers.RecordVideo,
        video_folder=str(folder),
        name_prefix=f"step{checkpoint['progress'][1]}",
        disable_logger=True,
    )
    try:
        envs = script.make_envs(trained, args.episodes)
        space = envs.single_observation_space
        normalizer = script.Normalizer(space.shape, trained.normalize_obs, space.dtype)
        policy = script.Policy(normalizer, envs.single_action_space, trained.hidden_size)
        policy.load_state_dict(checkpoint["policy"])
        if args.video:
            wrappers, options = [film], dict(vectorization_mode="sync", render_mode="rgb_array")
            if "ALE/" in trained.env_id and not trained.wrappers:
                # What Atari's own vectorized environment does to the frames, which it cannot film
                stack, height, width = space.shape
                kwargs = json.loads(trained.env_kwargs)
                for name in kwargs.keys() & {"img_height", "img_width", "stack_num"}:
                    del kwargs[name]
                trained = replace(trained, env_kwargs=json.dumps(kwargs))
                size = dict(screen_size=(width, height))
                wrappers += [partial(gym.wrappers.AtariPreprocessing, **size)]
                wrappers += [partial(gym.wrappers.FrameStackObservation, stack_size=stack)]
                options["frameskip"] = 1
            stage = script.make_envs(trained, 1, wrappers, **options)
            if stage.single_observation_space.shape != space.shape:
                fail(f"cannot film {trained.env_id} with observations of the shape {space.shape}")
    except (
        gym.error.Error,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        fail(f"cannot set up {trained.env_id}: {error}")

    returns, lengths, finished = play(envs, policy, args)
    actions, mean, std = "mode" if args.mode else "sampled", returns.mean(), returns.std()
    print("returns:", " ".join(f"{x:.5g}" for x in returns))
    print(
        f"{args.episodes} episodes, {actions} actions: "
        f"return {mean:.5g} ± {std:.3g}, length {lengths.mean():.1f}"
    )
    if args.output:
        row = dict(env_id=trained.env_id, script=script.__name__, seed=trained.seed)
        row |= dict(step=checkpoint["progress"][1], episodes=args.episodes, actions=actions)
        row |= dict(return_mean=f"{mean:.9g}", return_std=f"{std:.9g}", length_mean=lengths.mean())
        try:
            with open(args.output, "a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            fail(f"cannot write {args.output}: {error}")
    if not finished.all():
        print(f"{(~finished).sum()} of them were cut off at --max-steps {args.max_steps}")
    if args.video:
        try:
            (filmed,), _, _ = play(stage, policy, args)
        except Exception as error:  # of any type, as the renderer has it
            fail(f"cannot film {trained.env_id}: {type(error).__name__}: {error}")
        print(f"video: {max(folder.glob('*.mp4'), key=lambda path: path.stat().st_mtime)}", end="")
        print(f", of an episode of return {filmed:.5g}")


if __name__ == "__main__":
    main(tyro.cli(Args))
