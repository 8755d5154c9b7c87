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

from tools import fail, parse

SETUP_ERRORS = (
    gym.error.Error,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


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
        script = json.loads(Path(run_dir, "config.json").read_text(encoding="utf-8"))["script"]
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
    """Play an episode in each environment.

    Returns the returns, the lengths, and which episodes came to their end, (N,) each.
    """
    torch.manual_seed(args.seed)
    next_obs, _ = envs.reset(seed=args.seed)
    returns = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs, int)
    finished = np.zeros(envs.num_envs, bool)
    for _ in range(args.max_steps):
        obs = torch.from_numpy(next_obs)
        actions = policy(obs).mode if args.mode else policy.sample(obs)
        next_obs, reward, terminated, truncated, _ = envs.step(policy.head.to_env(actions))
        returns += reward * ~finished
        lengths += ~finished
        finished |= terminated | truncated
        if finished.all():
            break
    envs.close()
    return returns, lengths, finished


def load_policy(script, trained, checkpoint, envs):
    """The policy as it was saved, observation statistics included."""
    space = envs.single_observation_space
    normalizer = script.Normalizer(space.shape, trained.normalize_obs, space.dtype)
    policy = script.Policy(normalizer, envs.single_action_space, trained.hidden_size)
    policy.load_state_dict(checkpoint["policy"])
    return policy


def make_stage(script, trained, space, record_video):
    """One environment whose episodes are filmed; its observations are those of the space."""
    options = dict(vectorization_mode="sync", render_mode="rgb_array")
    if "ALE/" in trained.env_id and not trained.wrappers:
        # Atari's own vectorized environment cannot be filmed: wrappers prepare the frames
        single = without_frame_options(trained)
        wrappers = [record_video, *frame_wrappers(space.shape)]
        stage = script.make_envs(single, 1, wrappers, frameskip=1, **options)
    else:
        stage = script.make_envs(trained, 1, [record_video], **options)
    if stage.single_observation_space.shape != space.shape:
        fail(f"cannot film {trained.env_id} with observations of the shape {space.shape}")
    return stage


def without_frame_options(trained):
    """The arguments, less the options that only Atari's vectorized environment knows."""
    kwargs = json.loads(trained.env_kwargs)
    for name in ("img_height", "img_width", "stack_num"):
        kwargs.pop(name, None)
    return replace(trained, env_kwargs=json.dumps(kwargs))


def frame_wrappers(shape):
    """Wrappers that turn the frames of an Atari game into stacks of this shape."""
    stack, height, width = shape
    resize = partial(gym.wrappers.AtariPreprocessing, screen_size=(width, height))
    return [resize, partial(gym.wrappers.FrameStackObservation, stack_size=stack)]


def set_up(script, trained, checkpoint, args):
    """The environments, the policy, and the environment that is filmed, if one is."""
    stage = None
    try:
        envs = script.make_envs(trained, args.episodes)
        policy = load_policy(script, trained, checkpoint, envs)
        if args.video:
            record_video = partial(
                gym.wrappers.RecordVideo,
                video_folder=str(Path(args.run_dir, "video")),
                name_prefix=f"step{checkpoint['progress'][1]}",
                disable_logger=True,
            )
            stage = make_stage(script, trained, envs.single_observation_space, record_video)
    except SETUP_ERRORS as error:
        fail(f"cannot set up {trained.env_id}: {error}")
    return envs, policy, stage


def append_row(path, row):
    """Add a line to a CSV file, and the header before it if the file is new."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        fail(f"cannot write {path}: {error}")


def film(stage, policy, args, env_id):
    """Play one episode in the filmed environment, and say where its video is."""
    try:
        (episode_return,), _, _ = play(stage, policy, args)
    except Exception as error:  # renderers raise errors of any type
        fail(f"cannot film {env_id}: {type(error).__name__}: {error}")
    videos = Path(args.run_dir, "video").glob("*.mp4")
    newest = max(videos, key=lambda path: path.stat().st_mtime)
    print(f"video: {newest}, of an episode of return {episode_return:.5g}")


def main(args):
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo then draws without a display
    if args.episodes < 1 or args.max_steps < 1:
        fail("--episodes and --max-steps must be at least 1")
    script, trained, checkpoint = load(args.run_dir)
    envs, policy, stage = set_up(script, trained, checkpoint, args)
    returns, lengths, finished = play(envs, policy, args)
    actions = "mode" if args.mode else "sampled"
    mean, std = returns.mean(), returns.std()
    print("returns:", " ".join(f"{x:.5g}" for x in returns))
    print(
        f"{args.episodes} episodes, {actions} actions: "
        f"return {mean:.5g} ± {std:.3g}, length {lengths.mean():.1f}"
    )
    if args.output:
        row = dict(
            env_id=trained.env_id,
            script=script.__name__,
            seed=trained.seed,
            step=checkpoint["progress"][1],
            episodes=args.episodes,
            actions=actions,
            return_mean=f"{mean:.9g}",
            return_std=f"{std:.9g}",
            length_mean=lengths.mean(),
        )
        append_row(args.output, row)
    if not finished.all():
        print(f"{(~finished).sum()} of them were cut off at --max-steps {args.max_steps}")
    if args.video:
        film(stage, policy, args, trained.env_id)


if __name__ == "__main__":
    main(parse(Args))
