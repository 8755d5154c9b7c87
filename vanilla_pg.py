"""Vanilla policy gradient (Williams 1992; Sutton et al. 2000; Schulman et al. 2017, eq. 2).

    maximize  E[ log π(a|s) A ]

Run: python vanilla_pg.py --env-id CartPole-v1
"""

import json
import math
import os
import signal
import sys
import time
import traceback
import zipfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from common.networks import Normalizer, Policy, Value, make_head
from common.returns import RewardScaler, gae
from common.workers import average_gradients, average_metrics, gather

# Numbers with a range: `check` calls the test, and prints the words if it fails
Seed = Annotated[int, "from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32]
AtLeast1 = Annotated[int, "at least 1", lambda x: x >= 1]
AtLeast2 = Annotated[int, "at least 2", lambda x: x >= 2]
ZeroToOne = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "above 0 (below 1e38, or inf)", lambda x: 0 < x < 1e38 or x == math.inf]


@dataclass
class Args:
    # the task
    env_id: str = "CartPole-v1"  # Gymnasium id, or module:id to import a module first
    env_kwargs: str = "{}"  # options of the environment, as JSON; LunarLander: '{"gravity": -5}'
    wrappers: tuple[str, ...] = ()  # wrappers around each environment, as module:Class
    vectorization_mode: Literal["sync", "async"] | None = None  # in turn or in processes
    num_envs: AtLeast1 = 8  # environments stepped together in each process, N
    total_steps: AtLeast1 = 200_000  # environment steps to train for, in all processes
    seed: Seed = 1  # of the weights, the environments and the actions
    gamma: ZeroToOne = 0.995  # discount, γ
    # what is learned from, and how
    gae_lambda: ZeroToOne = 0.95  # GAE's λ: 0 for low variance of the advantages, 1 for low bias
    normalize_obs: bool = True  # with their running mean and standard deviation
    normalize_rewards: bool = True  # with the running standard deviation of discounted returns
    hidden_size: AtLeast1 = 64  # units per hidden layer (512 for images of at least 36 × 36)
    value_lr: ZeroToOne = 1e-3  # learning rate of V (capped for large images)
    value_epochs: AtLeast1 = 10  # passes over each batch to fit the value function
    minibatch_size: AtLeast1 = 256  # transitions in a minibatch, in each process
    max_grad_norm: Positive = 0.5  # larger gradient norms are scaled down to this
    anneal_lr: bool = True  # learning rates fall linearly to 0 at total_steps
    # the run
    run_dir: str = ""  # default: runs/ENV/SCRIPT/seedSEED; a name already taken gets a suffix
    resume: str = ""  # folder of a run to continue, with its options as defaults
    checkpoint_interval: Positive = 60.0  # seconds between checkpoints
    tensorboard: bool = False  # also write event files (pip install tensorboard)
    device: str = "cpu"  # device of the networks: cpu, cuda, cuda:1
    num_threads: AtLeast1 = 1  # CPU threads of PyTorch; more than 1 helps only wide networks
    # the policy
    num_steps: AtLeast2 = 32  # steps of each environment in a rollout, T
    policy_lr: ZeroToOne = 3e-3  # learning rate of the policy (capped for large images)
    policy_epochs: AtLeast1 = 1  # passes over each batch to improve the policy
    entropy_coef: ZeroToOne = 0.0  # weight of the entropy bonus


class Batch(NamedTuple):
    """The B transitions of a rollout in time-major order, and the policy that acted."""

    obs: Tensor  # (B, …)
    actions: Tensor  # (B, …)
    advantages: Tensor  # (B,): mean 0, standard deviation 1 over all workers
    returns: Tensor  # (B,): λ-returns, V + A before A is normalized
    values: Tensor  # (B,): V(s) before the update
    old_dist: Distribution  # π_old(·|s) of batch shape (B,), without gradient
    old_log_probs: Tensor  # (B,): log π_old(a|s)
    valid: Tensor  # (T, N): which steps are transitions; only is_pg.py needs it
    done: Tensor  # (T, N): which steps ended an episode; only is_pg.py needs it
    fewest: int  # B in the worker with the fewest transitions, for minibatches


# --- algorithm


def entropy_bonus(dist: Distribution, args: Args) -> Tensor | float:
    return args.entropy_coef * dist.entropy().mean() if args.entropy_coef else 0.0


def update_policy(policy: Policy, optimizer: Adam, batch: Batch, args: Args) -> dict:
    """Improve the policy on a batch. Returns metrics that only this algorithm has."""
    for _ in range(args.policy_epochs):
        dist = policy(batch.obs)  # π_old in the first epoch; then the batch is off-policy
        objective = (dist.log_prob(batch.actions) * batch.advantages).mean()
        minimize(-(objective + entropy_bonus(dist, args)), optimizer, len(batch.obs), args)
    return {}


# --- shared by every script


def update_value(value: Value, optimizer: Adam, batch: Batch, args: Args) -> None:
    """Regress V(s) on the λ-returns."""
    for _ in range(args.value_epochs):
        for part in minibatches(batch, args):
            loss = (value(part.obs) - part.returns).square().mean()
            minimize(loss, optimizer, len(part.obs), args)


def minibatches(batch: Batch, args: Args) -> list[Batch]:
    """Split at random into parts of minibatch_size (but not old_dist, valid and done).
    Workers with more transitions take larger parts, so all take the same number of steps.
    """
    cuts = range(args.minibatch_size, batch.fewest, args.minibatch_size)
    stretched = [cut * len(batch.obs) // batch.fewest for cut in cuts]
    names = ("obs", "actions", "advantages", "returns", "values", "old_log_probs")
    parts = []
    for rows in torch.randperm(len(batch.obs)).tensor_split(stretched):
        columns = {name: getattr(batch, name)[rows] for name in names}
        parts.append(batch._replace(**columns))
    return parts


def minimize(loss: Tensor, optimizer: Adam, num_transitions: int, args: Args) -> None:
    """One step down the gradient of a loss, averaged over all workers, then clipped."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    average_gradients(parameters, num_transitions)
    clip_grad_norm_(parameters, args.max_grad_norm, foreach=False)  # faster on a CPU
    optimizer.step()


@torch.no_grad()
def collect(
    envs: VectorEnv,
    obs: np.ndarray,
    done: np.ndarray,
    policy: Policy,
    value: Value,
    reward_scaler: RewardScaler,
    args: Args,
) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Act for T steps from obs (N, …) and done (N,). Returns a batch and the last obs and done.
    The step after `done` only resets (autoreset mode NEXT_STEP), so the batch leaves it out.
    """
    # Act
    all_obs = np.empty((args.num_steps + 1, *obs.shape), obs.dtype)  # (T+1, N, …)
    rewards = np.empty((args.num_steps, args.num_envs))  # (T, N)
    terminated = np.empty(rewards.shape, bool)  # (T, N)
    all_done = np.empty((args.num_steps + 1, args.num_envs), bool)  # (T+1, N)
    actions = []
    all_obs[0] = obs
    all_done[0] = done
    for t in range(args.num_steps):
        action = policy.sample(torch.from_numpy(all_obs[t]).to(args.device))
        obs, rewards[t], terminated[t], truncated, _ = envs.step(policy.head.to_env(action))
        actions.append(action)
        all_obs[t + 1] = obs
        all_done[t + 1] = np.logical_or(terminated[t], truncated)
    ended = all_done[1:]  # (T, N): which steps ended an episode, Batch.done
    valid = ~all_done[:-1]  # (T, N): the step after an end only resets
    # Estimate advantages
    flat_obs = torch.from_numpy(all_obs).to(args.device).flatten(0, 1)
    values = value(flat_obs).numpy(force=True).reshape(-1, args.num_envs)  # (T+1, N)
    if "ALE/" in args.env_id:
        np.sign(rewards, out=rewards)  # Atari games pay in very different units
    scaled_rewards = reward_scaler(rewards, ended, valid)
    advantages = gae(scaled_rewards, values, terminated, ended, args.gamma, args.gae_lambda)
    # Keep the transitions
    pooled = np.concatenate(gather(advantages[valid]))  # of all workers

    def flat(x: np.ndarray | Tensor) -> Tensor:  # (T, N, …) to (B, …)
        return torch.as_tensor(x[valid], device=args.device)

    batch_obs = flat(all_obs[:-1])
    batch_actions = flat(torch.stack(actions))
    old_dist = policy(batch_obs)
    batch = Batch(
        obs=batch_obs,
        actions=batch_actions,
        advantages=flat((advantages - pooled.mean()) / (pooled.std() + 1e-8)).float(),
        returns=flat(advantages + values[:-1]).float(),
        values=flat(values[:-1]),
        old_dist=old_dist,
        old_log_probs=old_dist.log_prob(batch_actions),
        valid=torch.from_numpy(valid).to(args.device),
        done=torch.from_numpy(ended).to(args.device),
        fewest=min(gather(len(batch_obs))),
    )
    return batch, obs, all_done[-1]


@torch.no_grad()
def measure(policy: Policy, batch: Batch) -> dict[str, float]:
    """How far the update has moved the policy, and how good V was before it."""
    dist = policy(batch.obs)
    log_ratio = dist.log_prob(batch.actions) - batch.old_log_probs
    ratio = log_ratio.clamp(max=20).double().exp()  # finite, even if squared
    error = batch.returns - batch.values
    is_constant = batch.returns.min() == batch.returns.max()  # nothing to explain
    metrics = {
        "kl": kl_divergence(batch.old_dist, dist).mean(),
        "entropy": dist.entropy().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": max(gather(ratio.max().item())),  # of all workers
        "ess": ratio.mean() ** 2 / ratio.square().mean(),
        "explained_variance": math.nan if is_constant else 1 - error.var() / batch.returns.var(),
        "value_loss": error.square().mean(),
    }
    return average_metrics(metrics, len(batch.obs))


def main(args: Args) -> int:
    """Collect, update, log and save until total_steps or a signal. Returns the exit code."""
    check(args)
    with Run(args) as run:
        envs, obs, done = run.start_envs()
        # Same first weights in all workers. A GPU's noise is not saved, so each resume has its own
        torch.manual_seed(args.seed + 2**32 * run.iteration)
        space = envs.single_observation_space
        normalizer = Normalizer(space.shape, args.normalize_obs, space.dtype)
        policy = Policy(normalizer, envs.single_action_space, args.hidden_size).to(args.device)
        value = Value(normalizer, args.hidden_size).to(args.device)
        reward_scaler = RewardScaler(args.num_envs, args.gamma, args.normalize_rewards)
        policy_optimizer = Adam(policy.parameters(), args.policy_lr, eps=1e-5, fused=True)
        value_optimizer = Adam(value.parameters(), args.value_lr, eps=1e-5, fused=True)
        optimizers = {"value_optimizer": value_optimizer, "policy_optimizer": policy_optimizer}
        run.open({"policy": policy, "value": value, "scaler": reward_scaler} | optimizers)
        while not run.is_over:
            # Collect
            batch, obs, done = collect(envs, obs, done, policy, value, reward_scaler, args)
            # Update
            lr_factor = 1 - run.step / args.total_steps if args.anneal_lr else 1
            limit = value.net.lr_limit  # infinite, except for images
            policy_optimizer.param_groups[0]["lr"] = lr_factor * min(args.policy_lr, limit)
            value_optimizer.param_groups[0]["lr"] = lr_factor * min(args.value_lr, limit)
            own_metrics = update_policy(policy, policy_optimizer, batch, args)
            update_value(value, value_optimizer, batch, args)
            run.refuse_nan(batch)
            metrics = measure(policy, batch)
            normalizer.update(batch.obs)  # only now, since it changes the policy too
            # Log and save
            metrics["learning_rate"] = policy_optimizer.param_groups[0]["lr"]
            run.log(batch, envs, metrics, average_metrics(own_metrics, len(batch.obs)))
            run.save()
        return run.finish()


# --- the run


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one sentence and exit, with code 2 for bad input and 1 for trouble in training."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def describe(error: BaseException) -> str:
    """The first line of an error, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    first_line = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{first_line} ({Path(place.filename).name}, line {place.lineno})"


def check(args: Args) -> None:
    """Refuse numbers that are out of range."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        if hasattr(hint, "__metadata__"):
            range_in_words, is_in_range = hint.__metadata__
            x = getattr(args, name)
            if not is_in_range(x):
                fail(f"--{name.replace('_', '-')} must be {range_in_words}, not {x}")


def end_processes(others: list) -> None:
    """End the processes that environments have started; others were there before."""
    for process in torch.multiprocessing.active_children():
        if process not in others:
            process.kill()
            process.join()


class Guard(VectorWrapper):
    """Turns an error in a step into a sentence, and leaves no process behind."""

    has_failed = False

    def step(self, actions: np.ndarray) -> tuple:
        try:
            return self.env.step(actions)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            reason = f"its process ended, perhaps for lack of memory ({describe(error)})"
        except (Exception, SystemExit) as error:  # environments can raise anything
            reason = describe(error)
        self.has_failed = True
        fail(f"an environment failed: {reason}; --resume continues from a checkpoint, if any", 1)

    def close(self, **kwargs: Any) -> None:
        processes = getattr(self.unwrapped, "processes", [])  # if mode is async
        are_alive = all(process.is_alive() for process in processes)
        if processes and (self.has_failed or not are_alive):
            for process in processes:  # they would wait for the one that is lost
                process.kill()
                process.join()
            self.closed = True  # nothing is left for env.close to do
        self.env.close(**kwargs)


def ignore_signals(env: gym.Env, run_pid: int) -> gym.Env:
    """Have the process of an environment leave Ctrl-C and SIGTERM to the run."""
    if os.getpid() != run_pid:  # Gymnasium also makes one in the run's own process
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
    return env


def make_envs(args: Args, num_envs: int, wrappers: list | tuple = (), **kwargs: Any) -> VectorEnv:
    """Environments that step together, with observations in one Box and returns recorded."""
    options = json.loads(args.env_kwargs) | kwargs
    mode = options.setdefault("vectorization_mode", args.vectorization_mode)
    all_wrappers = [resolve_name(name) for name in args.wrappers] + list(wrappers)
    handler = getattr(signal.getsignal(signal.SIGTERM), "__func__", None)
    if mode == "async" and handler is Run.stop:  # during a run
        run_pid = os.getpid()
        all_wrappers.insert(0, lambda env: ignore_signals(env, run_pid))
    if all_wrappers:  # an environment's own vector form does not take them
        options |= {"wrappers": all_wrappers, "vectorization_mode": mode or "sync"}
    elif "ALE/" in args.env_id and mode in (None, "vector_entry_point"):
        options["reward_clipping"] = False  # else returns would be sums of signs
    envs = gym.make_vec(args.env_id, num_envs, **options)
    autoreset = envs.metadata.get("autoreset_mode")
    if autoreset != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"autoreset_mode is {autoreset}, not NEXT_STEP")
    if not isinstance(envs.single_observation_space, gym.spaces.Box):
        envs = FlattenObservation(envs)
    if envs.single_observation_space.shape is None:
        raise ValueError("observations must have a fixed size: no Graph, no Sequence")
    make_head(envs.single_action_space)  # refuses a space for which there is no policy
    # A queue with room for an end at each step, and a key that no environment uses
    most_ends = num_envs * args.num_steps
    return RecordEpisodeStatistics(Guard(envs), most_ends, stats_key="sums")


def load_checkpoint(run_dir: str) -> dict:
    """Read the checkpoint of a run of this script. Nothing in it is executed."""
    path = Path(run_dir, "checkpoint.pt")
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load ignores the checksums
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, "cpu", weights_only=True)
        script, options = checkpoint["script"], dict(checkpoint["args"])
    except Exception as error:  # a damaged file can raise anything
        fail(f"{run_dir} has no checkpoint.pt that can be read: {describe(error)}")
    if script != Path(__file__).stem:
        fail(f"{run_dir} is a run of {script}.py: give it to that script")
    known = {field.name for field in fields(Args)}
    if unknown := options.keys() - known:
        missing = known - options.keys()
        fail(f"{run_dir} has the options {unknown}, unknown here, and lacks {missing or 'none'}")
    return checkpoint | {"args": vars(Args(**options))}  # with defaults for newer options


class Run(ExitStack):
    """The progress of training, and the folder in which the first worker records it.
    At its end it gives back what it has taken: environments, files, signal handlers, threads.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.num_workers = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ["RANK"]) if self.num_workers > 1 else 0
        self.saved = load_checkpoint(args.resume) if args.resume else {}
        progress = self.saved.get("progress", (0, 0, 0.0, [], 0))
        self.iteration, self.step, self.seconds, self.recent_returns, self.csv_size = progress
        self.is_over = self.step >= args.total_steps
        self.seed = np.random.SeedSequence([args.seed, self.iteration]).generate_state(1).item()
        env = args.env_id.replace("/", "-").replace(":", "-")
        default = f"runs/{env}/{Path(__file__).stem}/seed{args.seed}"
        self.folder = Path(args.resume or args.run_dir or default)
        for name in ("env_id", "hidden_size", "run_dir"):
            if args.resume and getattr(args, name) != self.saved["args"][name]:
                fail(f"--{name.replace('_', '-')} cannot change: start a new run")
        self.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(min(args.num_threads, os.cpu_count()))
        self.signals = []
        for signum in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # in a thread that is not the main one
                old_handler = signal.signal(signum, self.stop)
                self.callback(signal.signal, signum, old_handler or signal.SIG_DFL)

    def stop(self, signum: int, frame: Any) -> None:
        """The first signal ends training after this iteration; repeating it kills."""
        self.signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    def start_envs(self) -> tuple[VectorEnv, np.ndarray, np.ndarray]:
        """Make environments, join the workers, and reset. Returns envs, obs and done."""
        args = self.args
        others = torch.multiprocessing.active_children()
        try:
            self.callback(end_processes, others)
            envs = make_envs(args, args.num_envs)
            self.callback(envs.close)
            if self.num_workers > 1:  # nccl fails where there is no GPU
                backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
                torch.distributed.init_process_group(backend)
            if self.num_workers > 1 and args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            first_seed = self.seed % (2**31 - self.num_workers * args.num_envs)  # all < 2**31
            obs, _ = envs.reset(seed=first_seed + self.rank * args.num_envs)  # env i adds i
            # Fail before there is a folder if memory or the device is insufficient
            np.empty((args.num_steps + 1) * obs.nbytes, np.uint8)
            torch.empty(args.hidden_size, args.hidden_size)
            torch.ones(1, dtype=torch.float64, device=args.device).cpu()
        except gym.error.Error as error:
            fail(f"cannot set up {args.env_id}: {type(error).__name__}: {error}")
        except (Exception, SystemExit) as error:  # environments can raise anything
            end_processes(others)  # envs.close would wait for one that is lost
            hint = "; try --wrappers" if isinstance(error, NotImplementedError) else ""  # MiniGrid
            fail(f"cannot set up {args.env_id}: {describe(error)}{hint}")
        return envs, obs, np.zeros(args.num_envs, bool)

    def open(self, parts: dict) -> None:
        """Restore the parts of a run that resumes, and open the files of its folder."""
        self.parts = parts
        self.start = time.time() - self.seconds  # as if it had never stopped
        self.next_line = self.next_save = 0.0  # when status and checkpoint are due
        if self.args.resume:
            self.restore()
        if self.rank > 0:
            torch.manual_seed(self.seed + self.rank)  # each samples its own actions
            return
        try:
            name = "torch.utils.tensorboard:SummaryWriter"
            writer = resolve_name(name) if self.args.tensorboard else None
            self.make_folder()
        except (ImportError, OSError) as error:
            fail(f"cannot set up the folder of the run: {error}")
        script = Path(__file__).stem
        self.config = {"script": script, "args": vars(self.args), "workers": self.num_workers}
        self.config |= {"torch": str(torch.__version__), "gym": gym.__version__}
        text = json.dumps(self.config, indent=2) + "\n"
        (self.folder / "config.tmp").write_text(text, encoding="utf-8")
        os.replace(self.folder / "config.tmp", self.folder / "config.json")
        file = open(self.folder / "metrics.csv", "a", encoding="utf-8", buffering=1)  # by lines
        self.csv = self.enter_context(file)
        self.csv.truncate(min(self.csv_size, self.csv.tell()))  # to the rows of the checkpoint
        self.events = writer(self.folder, purge_step=self.step + 1) if writer else None
        if self.events:
            self.callback(self.events.close)

    def restore(self) -> None:
        """Load the state of each part, and of the random number generator."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            torch.set_rng_state(self.saved["rng"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            fail(f"the run {self.folder} does not fit: {' '.join(str(error).split())}")

    def make_folder(self) -> None:
        """Make a folder, with a suffix if its name is taken; a resumed run keeps its own."""
        name = self.folder
        name.parent.mkdir(parents=True, exist_ok=True)
        for suffix in count(2):
            try:
                self.folder.mkdir(exist_ok=bool(self.args.resume))
                return
            except FileExistsError:
                self.folder = Path(f"{name}-{suffix}")

    def refuse_nan(self, batch: Batch) -> None:
        """End the run before NaN or infinity is logged or saved."""
        self.folder = gather(self.folder)[0]  # the first worker may have added a suffix
        tensors = {"observations": batch.obs, "rewards or last observations": batch.returns}
        for name in ("scaler", "policy", "value"):
            tensors |= self.parts[name].state_dict(prefix=f"{name}.")
        saved = f"the last checkpoint is in {self.folder}" if self.iteration else "nothing is saved"
        for name, x in tensors.items():
            if x.is_floating_point() and not x.float().isfinite().all():
                place = (~x.float().isfinite()).nonzero()[0].tolist()
                if "observations" in name:
                    place = place[1:]  # the first is the transition
                trouble = f"NaN or infinity at step {self.step} in {name}{place or ''}"
                fail(f"{trouble}: check the environment or lower the learning rates; {saved}", 1)

    def log(self, batch: Batch, envs: VectorEnv, metrics: dict, own_metrics: dict) -> None:
        """Count an iteration of all workers, and have the first one report it."""
        self.iteration += 1
        self.step += sum(gather(len(batch.obs)))
        self.seconds = time.time() - self.start
        self.is_over = any(gather(bool(self.signals))) or self.step >= self.args.total_steps
        returns = [float(x) for queue in gather(envs.return_queue) for x in queue]
        lengths = [float(x) for queue in gather(envs.length_queue) for x in queue]
        envs.return_queue.clear()
        envs.length_queue.clear()
        self.recent_returns = [*self.recent_returns, *returns][-100:]
        row = {
            "iteration": self.iteration,
            "step": self.step,
            "episodes": len(returns),
            "return_mean": np.mean(returns) if returns else math.nan,
            "return_min": min(returns, default=math.nan),
            "return_max": max(returns, default=math.nan),
            "length_mean": np.mean(lengths) if lengths else math.nan,
            "return_last100": np.mean(self.recent_returns) if self.recent_returns else math.nan,
            **metrics,
            "steps_per_second": self.step / self.seconds,
            "seconds": self.seconds,
            **own_metrics,
        }
        if self.rank == 0:
            self.write(row)
            if self.is_over or time.time() > self.next_line:
                with suppress(OSError):  # whoever read the output may be gone
                    self.show(row)

    def write(self, row: dict) -> None:
        """Add a row to metrics.csv, where NaN is left empty, and to the event files."""
        if self.csv.tell() == 0:
            self.csv.write(",".join(row) + "\n")
        numbers = [f"{x:.9g}" if isinstance(x, float) else f"{x}" for x in row.values()]
        self.csv.write(",".join(numbers).replace("nan", "") + "\n")
        if self.events:
            for name, x in row.items():
                self.events.add_scalar(name, x, self.step)

    def show(self, row: dict) -> None:
        """Print a line of status; in a terminal it replaces the last one."""
        total = self.args.total_steps
        speed = row["steps_per_second"]
        minutes = max(total - self.step, 0) / speed / 60
        status = f"step {self.step:,}/{total:,} ({self.step / total:.0%})  ETA {minutes:.1f} min  "
        status += f"return {row['return_last100']:.1f}  KL {row['kl']:.4f}  {speed:,.0f} steps/s"
        if sys.stdout and sys.stdout.isatty():
            width = os.get_terminal_size().columns - 1
            print(f"\r\x1b[K{status[:width]}", end="", flush=True)
            self.next_line = time.time() + 0.1
        else:
            print(status, flush=True)
            self.next_line = time.time() + 10

    def save(self) -> None:
        """Save a checkpoint if one is due. A crash leaves the old one or the new one intact."""
        is_due = self.is_over or time.time() > self.next_save
        if self.rank > 0 or not is_due:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        progress = self.iteration, self.step, self.seconds, self.recent_returns, self.csv.tell()
        checkpoint = self.config | states | {"progress": progress, "rng": torch.get_rng_state()}
        with open(self.folder / "checkpoint.tmp", "wb") as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")
        self.next_save = time.time() + self.args.checkpoint_interval

    def finish(self) -> int:
        """Say where the run is. Returns the exit code."""
        if self.num_workers > 1:
            torch.distributed.destroy_process_group()
        if self.rank == 0:
            where = f"\nrun: {self.folder}"
            if Path("tools/evaluate.py").exists():
                where += f"\nevaluate: python -m tools.evaluate {self.folder}"
            with suppress(OSError):
                print(where, flush=True)
        return 128 + self.signals[0] if self.signals else 0


if __name__ == "__main__":
    with suppress(AttributeError):  # a replacement for stdout may lack it
        sys.stdout.reconfigure(errors="replace")  # prints ? if γ cannot be encoded
    args = tyro.cli(Args)
    if args.resume:  # parse again, with that run's options as defaults
        args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    except (OSError, MemoryError, RuntimeError) as error:
        is_known = "allocate" in str(error) or torch.distributed.is_initialized()
        if isinstance(error, RuntimeError) and not is_known:
            raise  # a bug: show where
        text = f"{Path(__file__).name}: disk, memory or a worker failed: {describe(error)}"
        print(f"{text}; --resume continues from a checkpoint, if any", file=sys.stderr)
        code = 1
    if "RANK" in os.environ:
        os._exit(code)  # gloo's threads may abort a normal exit
    sys.exit(code)
