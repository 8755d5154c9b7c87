"""Play episodes with the policy of a run, and film one.

Run: python -m tools.evaluate runs/CartPole-v1/ppo/seed1 --episodes 20 --video
"""

import importlib
import json
import os
import sys
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from tools import fail, keep_row, parse, refuse_missing_folder

OPENGL = {"egl": "EGL", "osmesa": "OSMesa"}  # MuJoCo without a display: the library it needs
NOOP, FIRE = 0, 1  # buttons of Atari
# Options of Atari's vectorized environment: those that a single game has too, and those of which
# the wrappers that replace it in a film know nothing
OF_A_GAME = ["repeat_action_probability", "full_action_space", "max_num_frames_per_episode"]
OF_A_GAME += ["continuous", "continuous_action_threshold"]
NOT_IN_A_FILM = {"maxpool": False, "life_loss_info": True}


@dataclass
class Args:
    run_dir: Annotated[str, tyro.conf.Positional]  # a run of any of the scripts
    episodes: int = 10  # number of episodes, each in an environment of its own
    mode: bool = False  # take the most likely action, not a sampled one
    seed: int = 0  # seed of the first episode; the next ones follow (CartPole has one for all)
    max_steps: int = 10_000  # longer episodes are cut off here
    video: bool = False  # film one more episode, to RUN_DIR/video (pip install moviepy)
    output: str = ""  # CSV file to which a line with the results is added


def kind_of_actions(args):
    return "mode" if args.mode else "sampled"


def in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
    """Play an episode in each environment, and close them.

    Returns the returns, the lengths, and which episodes came to their end, (N,) each.
    """
    returns = np.zeros(envs.num_envs)
    lengths = np.zeros(envs.num_envs, int)
    finished = np.zeros(envs.num_envs, bool)
    states = random_states(args.seed, envs.num_envs)
    played = unguarded(envs)
    try:
        obs, _ = played.reset(seed=args.seed)
        while not finished.all() and lengths.max() < args.max_steps:
            actions = act(policy, torch.from_numpy(np.asarray(obs)), args.mode, states)
            obs, reward, terminated, truncated, _ = played.step(policy.head.to_env(actions))
            returns += np.where(finished, 0, reward)  # of a next episode, or NaN
            lengths += ~finished
            finished |= np.logical_or(terminated, truncated)  # flags of any type
    except BaseException:  # Ctrl-C too
        end_processes(envs)
        raise
    finally:
        envs.close()
    return returns, lengths, finished


def unguarded(envs):
    """The environments without the script's Guard, whose sentence on errors is for training."""
    is_guarded = isinstance(envs, gym.wrappers.vector.RecordEpisodeStatistics)
    return envs.env.env if is_guarded else envs


def end_processes(envs):
    """End the processes of environments in mode async, which may be in the middle of a step.

    Closing them would wait for all answers, and some may have been read already.
    """
    for process in getattr(envs.unwrapped, "processes", []):
        process.kill()
        process.join()


def random_states(seed, count):
    """States of PyTorch's generator, one for each episode."""
    states = []
    for i in range(count):
        torch.manual_seed(seed + i)
        states.append(torch.get_rng_state())
    return states


def act(policy, obs, mode, states):
    """An action in each environment, (N, …). The random states go on.

    One by one, for then neither random numbers nor rounding depend on how many there are.
    """
    actions = []
    for i, state in enumerate(states):
        torch.set_rng_state(state)
        one = obs[i : i + 1]
        # The mode of a Bernoulli of 1/2 is NaN
        actions.append(policy(one).mode.nan_to_num() if mode else policy.sample(one))
        states[i] = torch.get_rng_state()
    return torch.cat(actions)


def load_policy(script, trained, checkpoint, envs):
    """The policy as it was saved, observation statistics included."""
    space = envs.single_observation_space
    normalizer = script.Normalizer(space.shape, trained.normalize_obs, space.dtype)
    policy = script.Policy(normalizer, envs.single_action_space, trained.hidden_size)
    policy.load_state_dict(checkpoint["policy"])
    return policy


def mode_of(trained):
    """The vectorization mode that was asked for, None if none was."""
    return json.loads(trained.env_kwargs).get("vectorization_mode", trained.vectorization_mode)


def is_vectorized_atari(trained):
    """Whether make_envs has made Atari's own vectorized environment."""
    own_form = mode_of(trained) in (None, "vector_entry_point")
    return "ALE/" in trained.env_id and not trained.wrappers and own_form


def make_stage(script, trained, space, record_video):
    """One environment whose episodes are filmed; its observations are those of the space."""
    options = dict(vectorization_mode="sync", render_mode="rgb_array")
    if is_vectorized_atari(trained):  # it cannot be filmed: wrappers do what it does
        wrappers = [record_video, *atari_wrappers(trained, space.shape)]
        stage = script.make_envs(one_game(trained), 1, wrappers, frameskip=1, **options)
    else:
        stage = script.make_envs(trained, 1, [record_video], **options)
    if stage.single_observation_space.shape != space.shape:
        stage.close()
        fail(f"cannot film {trained.env_id} with observations of the shape {space.shape}")
    return stage


def one_game(trained):
    """The arguments, less the options that only Atari's vectorized environment knows."""
    kwargs = json.loads(trained.env_kwargs)
    known = {name: kwargs[name] for name in OF_A_GAME if name in kwargs}
    return replace(trained, env_kwargs=json.dumps(known))


def atari_wrappers(trained, shape):
    """Wrappers that make a single game start and look as in Atari's vectorized environment."""
    given = json.loads(trained.env_kwargs)
    stack_size, height, width = shape[:3]
    start = partial(
        AtariStart,
        noop_max=given.get("noop_max", 30),
        use_fire_reset=given.get("use_fire_reset", True),
    )
    prepare = partial(
        gym.wrappers.AtariPreprocessing,
        noop_max=0,  # AtariStart has waited
        frame_skip=given.get("frameskip", 4),
        screen_size=(width, height),
        terminal_on_life_loss=given.get("episodic_life", False),
        grayscale_obs=given.get("grayscale", True),
    )
    stack = partial(gym.wrappers.FrameStackObservation, stack_size=stack_size, padding_type="zero")
    return [start, prepare, stack]


class AtariStart(gym.Wrapper):
    """Starts a game as Atari's vectorized environment does.

    It presses FIRE, if the game has it, and then waits: fewer than `noop_max` frames in all.
    """

    def __init__(self, env, noop_max, use_fire_reset):
        super().__init__(env)
        self.noop_max = noop_max
        self.fires = use_fire_reset and "FIRE" in env.unwrapped.get_action_meanings()

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        ale = self.unwrapped.ale
        frames = self.unwrapped.np_random.integers(max(self.noop_max, 1))
        if self.fires:
            ale.act(FIRE)
            frames -= 1
        for _ in range(frames):
            ale.act(NOOP)
            if ale.game_over():
                ale.reset_game()
        return obs, info  # of before the start: AtariPreprocessing reads the screen anew


def set_up(script, trained, checkpoint, args, opened):
    """The environments, the policy, and the environment that is filmed, if one is.

    `opened` closes the environments if anything goes wrong before they have been played in.
    """
    stage = None
    try:
        envs = script.make_envs(trained, args.episodes)
        opened.callback(envs.close)
        policy = load_policy(script, trained, checkpoint, envs)
        if args.video:
            # Not in RUN_DIR/video yet, where an unfinished film could replace a whole one
            unfinished = opened.enter_context(TemporaryDirectory(prefix="video", dir=args.run_dir))
            step = checkpoint["progress"][1]
            record_video = partial(
                gym.wrappers.RecordVideo,
                video_folder=str(Path(unfinished, "video")),
                name_prefix=f"step{step}-{kind_of_actions(args)}-seed{args.seed}",
                disable_logger=True,
            )
            stage = make_stage(script, trained, envs.single_observation_space, record_video)
            opened.callback(stage.close)
    except Exception as error:  # environments can raise anything
        fail(f"cannot set up {trained.env_id}: {in_one_line(error)}")
    return envs, policy, stage


def choose_opengl():
    """Have MuJoCo draw without a display, on Linux. Returns a sentence if it cannot.

    Only now, when MuJoCo is imported: on other systems, and without the library, the import would
    fail, though nothing but a film needs it.
    """
    if sys.platform != "linux" or {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        return ""
    for backend, library in OPENGL.items():
        if find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return ""
    return "without a display MuJoCo draws with the library EGL or OSMesa, and neither is there"


def refuse_to_film(trained):
    """Exit if a film would leave out an option of Atari's vectorized environment."""
    given = json.loads(trained.env_kwargs) if is_vectorized_atari(trained) else {}
    for name, value in NOT_IN_A_FILM.items():
        if given.get(name) == value:
            option = f"{name}={value}"
            fail(f"cannot film {trained.env_id} with {option}, which only its vectorized form has")


def film(stage, policy, args, trained):
    """Play one episode in the filmed environment, and say where its video is."""
    refuse_to_film(trained)
    (folder,) = stage.unwrapped.get_attr("video_folder")
    missing = choose_opengl() if "mujoco" in sys.modules else ""
    try:
        (episode_return,), _, _ = play(stage, policy, args)
    except Exception as error:  # renderers raise errors of any type
        fail(f"cannot film {trained.env_id}: {missing or in_one_line(error)}")
    films = list(Path(folder).glob("*.mp4"))
    if not films:
        fail(f"cannot film {trained.env_id}: its render() gives no pictures")
    video = Path(args.run_dir, "video", films[0].name)
    video.parent.mkdir(exist_ok=True)
    os.replace(films[0], video)
    print(f"video: {video}, of an episode of return {episode_return:.5g}")


def reason(script, error):
    """Why an episode broke off."""
    described = script.describe(error)
    if isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
        return f"a process ended, perhaps for lack of memory ({described})"
    return described


def report(returns, lengths, finished, args):
    """Print what the episodes came to."""
    print("returns:", " ".join(f"{x:.5g}" for x in returns))
    print(
        f"{len(returns)} episodes, {kind_of_actions(args)} actions: "
        f"return {returns.mean():.5g} ± {returns.std():.3g}, length {lengths.mean():.1f}"
    )
    if not finished.all():
        print(f"{(~finished).sum()} of them were cut off at --max-steps {args.max_steps}")


def main(args):
    if args.episodes < 1 or args.max_steps < 1:
        fail("--episodes and --max-steps must be at least 1")
    if not 0 <= args.seed < 2**31 - args.episodes:
        fail("--seed must be from 0 to 2**31, less the number of episodes")
    if args.output:
        refuse_missing_folder(args.output)
    script, trained, checkpoint = load(args.run_dir)
    with ExitStack() as opened:
        envs, policy, stage = set_up(script, trained, checkpoint, args, opened)
        try:
            returns, lengths, finished = play(envs, policy, args)
        except Exception as error:  # environments can raise anything
            fail(f"cannot play {trained.env_id}: {reason(script, error)}", 1)
        report(returns, lengths, finished, args)
        if args.output:
            row = dict(
                env_id=trained.env_id,
                script=script.__name__,
                seed=trained.seed,
                step=checkpoint["progress"][1],
                episodes=args.episodes,
                actions=kind_of_actions(args),
                return_mean=f"{returns.mean():.9g}",
                return_std=f"{returns.std():.9g}",
                length_mean=lengths.mean(),
            )
            keep_row(args.output, row, row)
        if stage:
            film(stage, policy, args, trained)


if __name__ == "__main__":
    main(parse(Args))
