"""Importance-sampled policy gradient (Schulman et al. 2015, eq. 14, without its constraint).

    maximize  E[ ρ A ],  ρ = π(a|s) / π_old(a|s)

Run: python is_pg.py --env-id CartPole-v1
"""

import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam

from common.networks import Normalizer, Policy, Value
from common.returns import RewardScaler, gae
from common.workers import average_gradients, average_metrics, gather

# Numbers with a range: `check` applies the test, and quotes the words where it fails
Seed = Annotated[int, "from 0 to 2**53", lambda x: 0 <= x <= 2**53]
AtLeast1 = Annotated[int, "at least 1", lambda x: x >= 1]
AtLeast2 = Annotated[int, "at least 2", lambda x: x >= 2]
ZeroToOne = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "above 0, to 1e38 or inf", lambda x: 0 < x < 1e38 or x == math.inf]


@dataclass
class Args:
    # the task
    env_id: str = "CartPole-v1"  # Gymnasium id, or module:id to import a module first
    env_kwargs: str = "{}"  # options of the environment, as JSON: '{"gravity": -5}'
    wrappers: tuple[str, ...] = ()  # module:Class of each wrapper around each environment
    vectorization_mode: Literal["sync", "async"] | None = None  # as in gym.make_vec
    num_envs: AtLeast1 = 8  # environments stepped together in each process, N
    total_steps: AtLeast1 = 200_000  # environment steps to train for, in all processes
    seed: Seed = 1  # fixes weights, environments and actions
    gamma: ZeroToOne = 0.995  # discount, γ
    # what is learned from, and how
    gae_lambda: ZeroToOne = 0.95  # from low variance (0) to low bias (1) in the advantages, λ
    normalize_obs: bool = True  # by their running mean and standard deviation
    normalize_rewards: bool = True  # by the running standard deviation of discounted returns
    hidden_size: AtLeast1 = 64  # units per hidden layer (always 512 for images from 36 pixels)
    value_lr: ZeroToOne = 1e-3  # Adam learning rate of the value function
    value_epochs: AtLeast1 = 10  # passes over each batch to fit the value function
    minibatch_size: AtLeast1 = 256  # transitions in a gradient step, in each process
    max_grad_norm: Positive = 0.5  # gradients with a larger norm are scaled down to it
    anneal_lr: bool = True  # learning rates fall linearly to 0 at total_steps
    # the run
    run_dir: str = ""  # default: runs/ENV/SCRIPT/seedSEED; a name already taken gets a suffix
    resume: str = ""  # folder of a run to continue; its own options are the defaults
    checkpoint_interval: Positive = 60.0  # seconds between checkpoints
    tensorboard: bool = False  # also write event files (pip install tensorboard)
    device: str = "cpu"  # where the networks are: cpu, cuda, cuda:1
    num_threads: AtLeast1 = 1  # CPU threads of PyTorch; more than 1 helps only wide networks
    # the policy
    num_steps: AtLeast2 = 128  # steps of each environment in a rollout, T
    policy_lr: ZeroToOne = 2e-3  # Adam learning rate of the policy
    policy_epochs: AtLeast1 = 4  # passes over each batch to improve the policy
    entropy_coef: ZeroToOne = 0.0  # weight of the entropy bonus
    weighting: Literal["step", "trajectory", "per-decision"] = "step"  # what weights correct
    weight_cap: Positive = math.inf  # larger importance weights are cut down to this


class Batch(NamedTuple):
    """The B transitions of a rollout in time-major order, and the policy that acted."""

    obs: Tensor  # (B, …)
    actions: Tensor  # (B, …)
    advantages: Tensor  # (B,): mean 0, standard deviation 1
    returns: Tensor  # (B,): λ-returns, A + V
    values: Tensor  # (B,): V(s) before the update
    old_dist: Distribution  # π_old(·|s) of batch shape (B,), without gradient
    old_log_probs: Tensor  # (B,): log π_old(a|s)
    valid: Tensor  # (T, N): which steps are transitions; only is_pg.py needs it
    done: Tensor  # (T, N): which steps ended an episode; only is_pg.py needs it
    fewest: int  # B in the worker with the fewest transitions, for minibatches


# --- algorithm


def entropy_bonus(dist: Distribution, args: Args) -> Tensor | float:
    return args.entropy_coef * dist.entropy().mean() if args.entropy_coef else 0.0


def weighted_advantages(log_ratio: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Importance weights w_t and weighted advantages, which multiply ∇log π(a_t|s_t); both (B,).
    step           w_t = ρ_t              w_t A_t
    trajectory     w_t = Π_{k≤t} ρ_k      w_t A_t
    per-decision   w_t = Π_{k≤t} ρ_k      Σ_{l≥t} (γλ)^{l−t} w_l δ_l, with δ_t = A_t − γλ A_{t+1}
    Products start anew with each episode and each rollout."""
    log_weights = log_ratio.new_zeros(batch.valid.shape).masked_scatter(batch.valid, log_ratio)
    if args.weighting != "step":
        for t in range(1, len(log_weights)):
            log_weights[t] += log_weights[t - 1] * ~batch.done[t - 1]
    weights = log_weights.exp().clamp(max=args.weight_cap)
    advantages = torch.zeros_like(weights).masked_scatter(batch.valid, batch.advantages)
    weighted = weights * advantages
    if args.weighting == "per-decision":  # (Precup et al. 2000)
        for t in reversed(range(len(weighted) - 1)):
            decay = args.gamma * args.gae_lambda * ~batch.done[t]
            later = weighted[t + 1] - weights[t] * advantages[t + 1]
            weighted[t] += decay * later  # now it is w_t δ_t + γλ weighted_{t+1}
    return weights[batch.valid], weighted[batch.valid]


def update_policy(policy: Policy, optimizer: Adam, batch: Batch, args: Args) -> dict:
    """Improve the policy on a batch. Returns metrics that only this algorithm has."""
    for _ in range(args.policy_epochs):
        dist = policy(batch.obs)
        log_ratio = dist.log_prob(batch.actions) - batch.old_log_probs
        weights, weighted = weighted_advantages(log_ratio.detach(), batch, args)
        if args.weighting == "step" and args.weight_cap == math.inf:
            ratio = log_ratio.exp()  # exactly 1 in the first epoch
            objective = (ratio * batch.advantages).mean()  # its gradient is E[ ρ A ∇log π ]
        else:  # the gradient with the weighted advantage in place of ρ A
            objective = (dist.log_prob(batch.actions) * weighted).mean()
        minimize(-(objective + entropy_bonus(dist, args)), optimizer, len(batch.obs), args)
    return {"weight_ess": weights.double().mean() ** 2 / weights.double().square().mean()}


# --- shared by every script


def update_value(value: Value, optimizer: Adam, batch: Batch, args: Args) -> None:
    """Regress V(s) on the λ-returns."""
    for _ in range(args.value_epochs):
        for idx in minibatches(batch, args):
            loss = (value(batch.obs[idx]) - batch.returns[idx]).square().mean()
            minimize(loss, optimizer, len(idx), args)


def minibatches(batch: Batch, args: Args) -> tuple[Tensor, ...]:
    """Shuffled indices into a batch, in parts of minibatch_size.

    Workers with more transitions take larger parts, so all take the same number of steps.
    """
    cuts = range(args.minibatch_size, batch.fewest, args.minibatch_size)
    stretched = [cut * len(batch.obs) // batch.fewest for cut in cuts]
    return torch.randperm(len(batch.obs)).tensor_split(stretched)


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
    The step after `done` only resets the environment (autoreset mode NEXT_STEP): it ignores its
    action and pays nothing. It is not a transition, so the batch leaves it out.
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
        all_done[t + 1] = terminated[t] | truncated
    ended = all_done[1:]  # (T, N): which steps ended an episode
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
    ratio = (dist.log_prob(batch.actions) - batch.old_log_probs).double().exp()
    error = batch.returns - batch.values
    metrics = {
        "kl": kl_divergence(batch.old_dist, dist).mean(),
        "entropy": dist.entropy().mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": max(gather(ratio.max().item())),  # of all workers
        "ess": ratio.mean() ** 2 / ratio.square().mean(),
        "explained_variance": 1 - error.var() / batch.returns.var(),
        "value_loss": error.square().mean(),
    }
    return average_metrics(metrics, len(batch.obs))


def main(args: Args) -> int:
    """Collect, update, log and save until total_steps or a signal. Returns the exit code."""
    check(args)
    torch.set_num_threads(min(args.num_threads, os.cpu_count()))
    run = Run(args)
    envs, obs, done = run.start_envs()
    # The same weights in all workers; on a GPU, not the same noise again after a resume
    torch.manual_seed(args.seed + 2**32 * run.iteration)
    space = envs.single_observation_space
    try:
        normalizer = Normalizer(space.shape, args.normalize_obs, space.dtype)
        policy = Policy(normalizer, envs.single_action_space, args.hidden_size).to(args.device)
    except ValueError as error:
        fail(f"cannot set up {args.env_id}: {error}")
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
        policy_optimizer.param_groups[0]["lr"] = lr_factor * args.policy_lr
        value_optimizer.param_groups[0]["lr"] = lr_factor * args.value_lr
        own_metrics = update_policy(policy, policy_optimizer, batch, args)
        update_value(value, value_optimizer, batch, args)
        run.refuse_nan(policy, value)
        metrics = measure(policy, batch)
        normalizer.update(batch.obs)  # only now, since it changes the policy too
        # Log and save
        metrics["learning_rate"] = policy_optimizer.param_groups[0]["lr"]
        run.log(batch, envs, metrics, average_metrics(own_metrics, len(batch.obs)))
        run.save()
    envs.close()
    return run.finish()


# --- the run


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one sentence and exit, with code 2 for bad input and 1 for trouble in training."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    if torch.distributed.is_initialized():
        os._exit(code)  # gloo's threads may abort a normal exit
    raise SystemExit(code)


def check(args: Args) -> None:
    """Refuse numbers that are out of range."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        if hasattr(hint, "__metadata__"):
            range_in_words, is_in_range = hint.__metadata__
            x = getattr(args, name)
            if not is_in_range(x):
                fail(f"--{name.replace('_', '-')} must be {range_in_words}, not {x}")


def make_envs(args: Args, num_envs: int, wrappers: list | tuple = (), **kwargs: Any) -> VectorEnv:
    """Environments that step together, with observations in one Box and returns recorded."""
    options = json.loads(args.env_kwargs) | kwargs
    mode = options.setdefault("vectorization_mode", args.vectorization_mode)
    all_wrappers = [resolve_name(name) for name in args.wrappers] + list(wrappers)
    if all_wrappers:  # an environment's own vector form does not take them
        options |= {"wrappers": all_wrappers, "vectorization_mode": mode or "sync"}
    elif "ALE/" in args.env_id and not mode:
        options["reward_clipping"] = False  # else returns would be sums of signs
    envs = gym.make_vec(args.env_id, num_envs, **options)
    autoreset = envs.metadata.get("autoreset_mode")
    if autoreset != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"autoreset_mode is {autoreset}, not NEXT_STEP")
    if not isinstance(envs.single_observation_space, gym.spaces.Box):
        envs = FlattenObservation(envs)
    # Room for an end at each step, under a key that environments do not use themselves
    return RecordEpisodeStatistics(envs, num_envs * args.num_steps, stats_key="sums")


def load_checkpoint(run_dir: str) -> dict:
    """Read the checkpoint of a run of this script. Nothing in it is executed."""
    path = Path(run_dir, "checkpoint.pt")
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load ignores the checksums
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, "cpu", weights_only=True)
        if checkpoint["script"] != Path(__file__).stem:
            fail(f"{run_dir} is a run of {checkpoint['script']}.py: give it to that script")
        return checkpoint | {"args": vars(Args(**checkpoint["args"]))}  # refuses unknown options
    except Exception as error:  # a damaged file can raise anything
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        fail(f"{run_dir} has no checkpoint.pt that can be read ({first_line})")


class Run:
    """The progress of training, and the folder in which the first worker records it."""

    def __init__(self, args: Args):
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        self.num_workers = int(os.environ.get("WORLD_SIZE", 1))
        self.saved = load_checkpoint(args.resume) if args.resume else {}
        progress = self.saved.get("progress", (0, 0, 0.0, [], 0))
        self.iteration, self.step, self.seconds, self.recent_returns, self.csv_size = progress
        self.is_over = self.step >= args.total_steps
        self.seed = np.random.SeedSequence([args.seed, self.iteration]).generate_state(1).item()
        env = args.env_id.replace("/", "-").replace(":", "-")
        default = f"runs/{env}/{Path(__file__).stem}/seed{args.seed}"
        self.folder = Path(args.resume or args.run_dir or default)
        for option in ("env-id", "hidden-size", "run-dir"):
            name = option.replace("-", "_")
            if args.resume and getattr(args, name) != self.saved["args"][name]:
                fail(f"--{option} cannot change when a run resumes: start a new one")
        self.signals = []
        self.old_handlers = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.old_handlers[signum] = signal.signal(signum, self.stop)

    def stop(self, signum: int, frame: Any) -> None:
        """The first signal ends training after this iteration; a second one kills."""
        self.signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    def start_envs(self) -> tuple[VectorEnv, np.ndarray, np.ndarray]:
        """Make environments, join the workers, and reset. Returns envs, obs and done."""
        args = self.args
        try:
            envs = make_envs(args, args.num_envs)
            if self.num_workers > 1:  # nccl fails where there is no GPU
                backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
                torch.distributed.init_process_group(backend)
            if self.num_workers > 1 and args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            first_seed = self.seed % (2**31 - self.num_workers * args.num_envs)  # all < 2**31
            obs, _ = envs.reset(seed=first_seed + self.rank * args.num_envs)  # env i adds i
            # Fail before there is a folder if memory or the device is insufficient
            np.empty((args.num_steps + 1) * getattr(obs, "nbytes", 0), np.uint8)
            torch.empty(args.hidden_size, args.hidden_size)
            torch.ones(1, device=args.device).cpu()
        except Exception as error:  # environments can raise anything
            hint = "try --wrappers"  # MiniGrid's observations fail without a message
            reason = f"{type(error).__name__}: {str(error) or hint}"
            fail(f"cannot set up {args.env_id}: {reason}")
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
        (self.folder / "config.tmp").write_text(json.dumps(self.config, indent=2) + "\n")
        os.replace(self.folder / "config.tmp", self.folder / "config.json")
        self.csv = open(self.folder / "metrics.csv", "a", buffering=1)  # line by line
        self.csv.truncate(min(self.csv_size, self.csv.tell()))  # to the rows of the checkpoint
        self.events = writer(self.folder, purge_step=self.step + 1) if writer else None

    def restore(self) -> None:
        """Load the state of each part, and of the random number generator."""
        try:
            for name, part in self.parts.items():
                part.load_state_dict(self.saved[name])
            torch.set_rng_state(self.saved["rng"])
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            fail(f"the checkpoint in {self.folder} does not fit: {error}")

    def make_folder(self) -> None:
        """Make a folder, with a suffix if its name is taken; a resumed run has one."""
        name = self.folder
        for suffix in count(2):
            try:
                self.folder.mkdir(parents=True, exist_ok=bool(self.args.resume))
                return
            except FileExistsError:
                self.folder = Path(f"{name}-{suffix}")

    def refuse_nan(self, *networks: nn.Module) -> None:
        """End the run before NaN or infinity is logged or saved."""
        if all(x.isfinite().all() for network in networks for x in network.parameters()):
            return
        saved = f"the last checkpoint is in {self.folder}" if self.iteration else "nothing is saved"
        advice = "check rewards or lower the learning rates"
        fail(f"NaN or infinity at step {self.step}: {advice}; {saved}", 1)

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
                self.show(row)

    def write(self, row: dict) -> None:
        """Add a row to metrics.csv, where NaN is left empty, and to the event files."""
        if self.csv.tell() == 0:
            self.csv.write(",".join(row) + "\n")
        numbers = ["" if math.isnan(x) else f"{x:.9g}" for x in row.values()]
        self.csv.write(",".join(numbers) + "\n")
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
        if sys.stdout.isatty():
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
        with open(self.folder / "checkpoint.tmp", "wb", buffering=0) as file:  # unbuffered
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")
        self.next_save = time.time() + self.args.checkpoint_interval

    def finish(self) -> int:
        """Restore signal handlers, and say where the run is. Returns the exit code."""
        for signum, handler in self.old_handlers.items():
            signal.signal(signum, handler)
        if self.num_workers > 1:
            torch.distributed.destroy_process_group()
        if self.rank == 0:
            print(f"\nrun: {self.folder}")
            if Path("tools/evaluate.py").exists():
                print(f"evaluate it: python -m tools.evaluate {self.folder}")
        return 128 + self.signals[0] if self.signals else 0


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:  # parse again, with that run's options as defaults
        args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
    try:
        code = main(args)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not torch.distributed.is_initialized():
            raise  # a bug: show where
        fail(f"disk, memory or a worker failed: {error}; --resume goes on where it was saved", 1)
    if int(os.environ.get("RANK", 0)) > 0:
        os._exit(code)  # gloo's threads again, see fail
    sys.exit(code)
