"""Trust region policy optimization (Schulman et al. 2015, eq. 14 and appendix C).

    maximize  E[ ρ A ]  subject to  E[ KL(π_old ‖ π) ] ≤ δ,  ρ = π(a|s) / π_old(a|s)

Run: python trpo.py --env-id CartPole-v1
"""

import itertools
import json
import math
import os
import pkgutil
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics
from torch.distributions import kl_divergence
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.optim import Adam

from common.networks import Normalizer, Policy, Value, gather
from common.returns import RewardScaler, gae

Count = Annotated[int, "at least 1", lambda x: x >= 1]
Fraction = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Positive = Annotated[float, "above 0, to 1e38 or inf", lambda x: 0 < x < 1e38 or x == math.inf]


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium environment id, or module:id to import its module first
    env_kwargs: str = "{}"  # options of the environment, as JSON: '{"gravity": -5}'
    wrappers: tuple[str, ...] = ()  # module:Class of each to put around every environment
    vectorization_mode: Literal["sync", "async"] | None = None  # async: in processes of their own
    seed: int = 1  # fixes weights, environments and actions
    total_steps: Count = 200_000  # environment steps to train for, of all processes together
    num_envs: Count = 8  # environments stepped together in each process, N
    gamma: Fraction = 0.995  # discount, γ
    gae_lambda: Fraction = 0.95  # less bias (1) or less variance (0) in the advantages, λ
    hidden_size: Count = 64  # units in each hidden layer; 512 for images from 36 pixels a side
    normalize_obs: bool = True  # by their running mean and standard deviation
    normalize_rewards: bool = True  # by the running standard deviation of the discounted return
    value_lr: Fraction = 1e-3  # Adam step size of the value function
    value_epochs: Count = 10  # passes over the batch per update of the value function
    minibatch_size: Count = 256  # transitions of each process a step, where not the whole batch is
    max_grad_norm: Positive = 0.5  # longer gradients are scaled down to this length
    anneal_lr: bool = True  # step sizes fall linearly, to 0 at total_steps
    device: str = "cpu"  # where the networks are: cpu, cuda, cuda:1
    num_threads: Count = 1  # CPU threads, at most one a core; more pay off for wide networks only
    run_dir: str = ""  # if empty runs/ENV/SCRIPT/seedSEED; a name that is taken gets a suffix
    resume: str = ""  # run to go on with, at its own options; environments start new episodes
    checkpoint_interval: Positive = 60.0  # seconds from one checkpoint to the next
    tensorboard: bool = False  # write event files too (pip install tensorboard)
    num_steps: Annotated[int, "at least 2", lambda x: x >= 2] = 256  # steps in a rollout, T
    max_kl: Positive = 0.005  # radius of the trust region, δ
    cg_iters: Count = 10  # conjugate-gradient iterations at most
    cg_tolerance: Fraction = 1e-5  # they end at a residual this small, relative to the gradient
    cg_damping: Fraction = 0.1  # multiple of the identity added to the Fisher matrix
    backtrack_iters: Count = 10  # step lengths that the line search tries at most
    backtrack_coef: Fraction = 0.8  # from one step length to the next


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, …): the real transitions of a rollout, in time-major order
    actions: torch.Tensor  # (B, …)
    advantages: torch.Tensor  # (B,): mean 0, standard deviation 1
    returns: torch.Tensor  # (B,): λ-returns
    values: torch.Tensor  # (B,): V(s) before the update
    valid: torch.Tensor  # (T, N): which steps of the rollout are real, B of them
    done: torch.Tensor  # (T, N): which steps ended an episode
    cuts: list[int]  # between minibatches, of which all workers have as many


# --- algorithm


def flat_grad(output, parameters, **kwargs):
    """Gradient of a scalar, (P,), where P is the number of parameters."""
    gradients = torch.autograd.grad(output, parameters, **kwargs)
    return torch.cat([gradient.flatten() for gradient in gradients])


def conjugate_gradient(matvec, b, iters, tolerance):
    """Solve A x = b for a symmetric positive definite A, of which only x -> A x is known.

    Ends after `iters` iterations or at ‖b − A x‖ ≤ tolerance ‖b‖ (Hestenes & Stiefel 1952).
    Returns x and the relative residual it has.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(iters):
        if residual.norm() <= tolerance * b.norm():
            break
        product, residual_sq = matvec(direction), residual @ residual
        step = residual_sq / (direction @ product)
        x += step * direction
        residual -= step * product
        direction = residual + (residual @ residual) / residual_sq * direction
    return x, (residual.norm() / b.norm().clamp(min=1e-30)).item()


def update_policy(policy, batch, old_dist, args):
    """Improve the policy on a batch that old_dist acted in. Returns metrics of its own."""
    parameters = list(policy.parameters())
    old_parameters = parameters_to_vector(parameters).detach()
    old_log_probs = old_dist.log_prob(batch.actions)

    def surrogate_and_kl():
        dist = policy(batch.obs)
        ratio = (dist.log_prob(batch.actions) - old_log_probs).exp()  # exactly 1 at π_old
        return (ratio * batch.advantages).mean(), kl_divergence(old_dist, dist).mean()

    # (F + damping) x ≈ g. At π_old KL and its gradient are 0, and its Hessian is Fisher's matrix F
    objective, kl = surrogate_and_kl()
    gradient = flat_grad(objective, parameters, retain_graph=True)
    kl_gradient = flat_grad(kl, parameters, create_graph=True)
    average([objective, gradient], len(batch.obs))

    def fisher_vector_product(v):
        product = flat_grad(kl_gradient @ v, parameters, retain_graph=True)
        return average([product], len(batch.obs))[0] + args.cg_damping * v

    direction, residual = conjugate_gradient(
        fisher_vector_product, gradient, args.cg_iters, args.cg_tolerance
    )
    metrics = {"step_fraction": 0.0, "cg_residual": residual, "line_search_failed": 0.0}
    curvature = direction @ fisher_vector_product(direction)
    if not curvature > 0:  # no gradient, or F is not positive definite in floating point
        return metrics
    full_step = (2 * args.max_kl / curvature).sqrt() * direction  # ½ sᵀ(F + damping) s = δ

    # The longest of the tried steps that improves the surrogate and keeps the true KL within δ
    with torch.no_grad():
        for fraction in (args.backtrack_coef**i for i in range(args.backtrack_iters)):
            vector_to_parameters(old_parameters + fraction * full_step, parameters)
            new_objective, kl = average(surrogate_and_kl(), len(batch.obs))
            if new_objective > objective and kl <= args.max_kl:
                return metrics | {"step_fraction": fraction}
    vector_to_parameters(old_parameters, parameters)
    return metrics | {"line_search_failed": 1.0}


# --- shared by every script


def average(tensors, weight):
    """Turn tensors into their weighted means over the workers that torchrun has started."""
    if torch.distributed.is_initialized():
        sums = weight * parameters_to_vector([*tensors, tensors[0].new_ones(1)]).detach()
        torch.distributed.all_reduce(sums)
        vector_to_parameters(sums / sums[-1], tensors)
    return tensors


def update_value(value, optimizer, batch, args):
    """Regress V(s) on the λ-returns."""
    for _ in range(args.value_epochs):
        for idx in torch.randperm(len(batch.obs)).tensor_split(batch.cuts):
            loss = (value(batch.obs[idx]) - batch.returns[idx]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            average([x.grad for x in optimizer.param_groups[0]["params"]], len(idx))
            clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm, foreach=False)
            optimizer.step()


@torch.no_grad()
def collect(envs, policy, value, scaler, state, args):
    """Act for T steps from a state: obs (N, …) and done (N,).

    The step after `done` merely resets the environment (autoreset NEXT_STEP): it is not valid.
    Returns the Batch, π_old on it, the next state, and (return, length) of all ended episodes.
    """
    obs, done = state
    all_obs = np.empty((args.num_steps + 1, *obs.shape), obs.dtype)  # (T+1, N, …)
    rewards = np.empty((args.num_steps, args.num_envs))  # (T, N), as the masks
    terminated, ended, valid = np.empty((3, *rewards.shape), bool)
    actions, episodes, all_obs[0] = [], [], obs
    for t in range(args.num_steps):
        actions.append(policy.sample(torch.from_numpy(all_obs[t]).to(args.device)))
        step = envs.step(policy.head.to_env(actions[t]))
        all_obs[t + 1], rewards[t], terminated[t], truncated, info = step
        valid[t] = ~done
        ended[t] = done = terminated[t] | truncated
        episodes += zip(*(info["sums"][k][done].tolist() for k in "rl")) if done.any() else []
    values = value(torch.from_numpy(all_obs).to(args.device).flatten(0, 1))
    values = values.numpy(force=True).reshape(-1, args.num_envs)  # (T+1, N)
    scaled = scaler(np.sign(rewards) if "ALE/" in args.env_id else rewards, ended, valid)
    advantages = gae(scaled, values, terminated, ended, args.gamma, args.gae_lambda)
    returns = advantages + values[:-1]
    everyone = gather(advantages[valid])
    least, pooled = min(map(len, everyone)), np.concatenate(everyone)
    advantages = (advantages - pooled.mean()) / (pooled.std() + 1e-8)
    cuts = [i * valid.sum() // least for i in range(0, least, args.minibatch_size)][1:]
    actions = torch.stack(actions).numpy(force=True)
    grids = all_obs[:-1], actions, np.float32(advantages), np.float32(returns), values[:-1]
    arrays = [*(grid[valid] for grid in grids), valid, ended]
    batch = Batch(*(torch.from_numpy(array).to(args.device) for array in arrays), cuts)
    return batch, policy(batch.obs), (all_obs[-1], done), [*itertools.chain(*gather(episodes))]


def fail(message, code=2):
    """One sentence, and the exit code: 2 for bad input, 1 for trouble in training."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    if torch.distributed.is_initialized():
        os._exit(code)  # threads of gloo's may abort an orderly exit
    raise SystemExit(code)


def load_checkpoint(run_dir):
    """Read the checkpoint of a run of this script. Nothing in it is executed."""
    try:
        if damaged := zipfile.ZipFile(Path(run_dir, "checkpoint.pt")).testzip():
            raise ValueError(damaged)  # torch.load does not look at the checksums
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), "cpu", weights_only=True)
        if checkpoint["script"] != Path(__file__).stem:
            fail(f"{run_dir} is a run of {checkpoint['script']}.py: give it to that script")
        return checkpoint | dict(args=vars(Args(**checkpoint["args"])))
    except Exception as error:  # of any type, as the damage has it
        fail(f"{run_dir} has no checkpoint.pt that can be read ({type(error).__name__})")


def make_envs(args, num_envs, wrappers=(), **kwargs):
    """Environments stepped together; observations in one Box, and sums of whole episodes."""
    kwargs = dict(vectorization_mode=args.vectorization_mode) | json.loads(args.env_kwargs) | kwargs
    if wrappers := [*map(pkgutil.resolve_name, args.wrappers), *wrappers]:
        kwargs |= dict(wrappers=wrappers, vectorization_mode=kwargs["vectorization_mode"] or "sync")
    elif "ALE/" in args.env_id and not kwargs["vectorization_mode"]:
        kwargs["reward_clipping"] = False  # it would be done before the returns are counted
    envs = RecordEpisodeStatistics(gym.make_vec(args.env_id, num_envs, **kwargs), stats_key="sums")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise ValueError(f"autoreset_mode is {envs.metadata.get('autoreset_mode')}, not NEXT_STEP")
    is_box = isinstance(envs.single_observation_space, gym.spaces.Box)
    return envs if is_box else FlattenObservation(envs)


def main(args):
    """Check, set up or resume; then collect, update, log and save until done or interrupted."""
    for name, hint in Args.__annotations__.items():
        rule, holds = getattr(hint, "__metadata__", ("", lambda x: True))
        if not holds(getattr(args, name)):
            fail(f"--{name.replace('_', '-')} must be {rule}, not {getattr(args, name)}")
    checkpoint = load_checkpoint(args.resume) if args.resume else {"args": vars(args)}
    iteration, step, seconds, recent, size = checkpoint.get("progress", (0, 0, 0.0, [], 0))
    for name in ("env_id", "hidden_size", "run_dir"):
        if getattr(args, name) != checkpoint["args"][name]:
            fail(f"--{name.replace('_', '-')} cannot change when a run resumes: start a new one")
    torch.set_num_threads(min(args.num_threads, os.cpu_count()))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    stop = []  # signals that came: the iteration is finished and saved, but a second one kills
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in handlers:  # before there are environments that inherit it
        signal.signal(signum, lambda s, _: stop.append(s) or signal.signal(s, signal.SIG_DFL))
    try:
        torch.manual_seed(args.seed + 2**32 * iteration)  # the CPU's is restored below
        envs = make_envs(args, args.num_envs)
        if world > 1:
            backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
            torch.distributed.init_process_group(backend)
        if world > 1 and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        space = envs.single_observation_space
        normalizer = Normalizer(space.shape, args.normalize_obs, space.dtype)
        policy = Policy(normalizer, envs.single_action_space, args.hidden_size)
        value = Value(normalizer, args.hidden_size)
        policy, value = policy.to(args.device), value.to(args.device)
        scaler = RewardScaler(args.num_envs, args.gamma, args.normalize_rewards)
        value_optimizer = Adam(value.parameters(), args.value_lr, eps=1e-5, fused=True)
        optimizers = dict(value_optimizer=value_optimizer)
        parts = dict(policy=policy, value=value, scaler=scaler) | optimizers
        for name in parts if args.resume else ():
            parts[name].load_state_dict(checkpoint[name])
        draw = np.random.SeedSequence([args.seed, iteration]).generate_state(1)[0].item()
        seed = draw % (2**31 - world * args.num_envs) + rank * args.num_envs
        state = envs.reset(seed=seed)[0], np.zeros(args.num_envs, bool)
        np.empty((args.num_steps + 1, *state[0].shape), space.dtype)  # a rollout must fit
        value(torch.from_numpy(state[0]).to(args.device)).numpy(force=True)  # and the device work
        writer = args.tensorboard and pkgutil.resolve_name("torch.utils.tensorboard:SummaryWriter")
        script, env = Path(__file__).stem, args.env_id.replace("/", "-").replace(":", "-")
        name = Path(args.run_dir or f"runs/{env}/{script}/seed{args.seed}")
        run_dir = Path(args.resume or name)
        for suffix in itertools.count(2) if rank == 0 and not args.resume else ():
            try:
                run_dir.mkdir(parents=True)  # no name is used again
                break
            except FileExistsError:
                run_dir = Path(f"{name}-{suffix}")
    except Exception as e:  # of any type, as the environment has it
        fail(f"cannot set up {args.env_id}: {type(e).__name__}: {str(e) or 'try --wrappers'}")
    torch.set_rng_state(checkpoint.get("rng", torch.get_rng_state()))
    if rank > 0:
        torch.manual_seed(draw + rank)  # actions of its own
    config = dict(script=script, args=vars(args), workers=world)
    config |= dict(torch=str(torch.__version__), gym=gym.__version__)
    if rank == 0:
        (run_dir / "config.tmp").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(run_dir / "config.tmp", run_dir / "config.json")
        metrics = open(run_dir / "metrics.csv", "a", buffering=1)  # flushed at each line
        metrics.truncate(min(size, metrics.tell()))  # rows from after the checkpoint
        events = writer and writer(run_dir, purge_step=step + 1)
    width = os.get_terminal_size().columns - 1 if sys.stdout.isatty() else None
    start, next_line, next_save = time.time() - seconds, 0.0, 0.0
    over = step >= args.total_steps
    while not over:
        # Collect
        batch, old_dist, state, episodes = collect(envs, policy, value, scaler, state, args)
        # Update
        for optimizer in optimizers.values():
            lr = optimizer.defaults["lr"] * (1 - step / args.total_steps if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = lr
        own_metrics = update_policy(policy, batch, old_dist, args)
        update_value(value, value_optimizer, batch, args)
        if not all(x.isfinite().all() for x in [*policy.parameters(), *value.parameters()]):
            saved = f"the last checkpoint is in {run_dir}" if iteration else "nothing is saved yet"
            fail(f"NaN or infinity at step {step}: check rewards or lower step sizes; {saved}", 1)
        # Log
        with torch.no_grad():
            dist = policy(batch.obs)
        ratio = (dist.log_prob(batch.actions) - old_dist.log_prob(batch.actions)).double().exp()
        error, variance, mean = batch.returns - batch.values, batch.returns.var(), ratio.mean()
        kl, entropy = kl_divergence(old_dist, dist).mean(), dist.entropy().mean()
        returns, lengths = zip(*episodes) if episodes else ([math.nan], [math.nan])
        recent = [*recent, *(episode[0] for episode in episodes)][-100:]
        sizes, ratios, stops = zip(*gather((len(batch.obs), ratio.max().item(), bool(stop))))
        iteration, step, seconds = iteration + 1, step + sum(sizes), time.time() - start
        last100, speed = np.mean(recent or math.nan), step / seconds
        row = dict(iteration=iteration, step=step, episodes=len(episodes))
        row |= dict(return_mean=np.mean(returns), return_min=min(returns), return_max=max(returns))
        row |= dict(length_mean=np.mean(lengths), return_last100=last100, kl=kl, entropy=entropy)
        row |= dict(ratio_mean=mean, ratio_max=max(ratios), ess=mean**2 / ratio.square().mean())
        row |= dict(explained_variance=1 - error.var() / variance, value_loss=error.square().mean())
        row |= dict(learning_rate=lr, steps_per_second=speed, seconds=seconds) | own_metrics
        means = torch.tensor([*map(float, row.values())], dtype=torch.float64)
        row = dict(zip(row, average([means], len(batch.obs))[0].tolist()))
        normalizer.update(batch.obs)
        over = step >= args.total_steps or any(stops)
        if rank > 0:
            continue  # the first worker alone writes
        metrics.write(",".join(row) + "\n" if metrics.tell() == 0 else "")
        metrics.write(",".join("" if math.isnan(x) else f"{x:.9g}" for x in row.values()) + "\n")
        for name in row if events else ():
            events.add_scalar(name, row[name], step)
        if over or time.time() > next_line:
            eta = max(args.total_steps - step, 0) / speed / 60
            line = f"step {step:,}/{args.total_steps:,} ({step / args.total_steps:.0%})  ETA "
            line += f"{eta:.1f} min  return {last100:.1f}  KL {row['kl']:.4f}  {speed:,.0f} steps/s"
            print("\r\x1b[K" * bool(width) + line[:width], end="" if width else "\n", flush=True)
            next_line = time.time() + (0.1 if width else 10)
        # Save
        if over or time.time() > next_save:
            checkpoint = config | {name: part.state_dict() for name, part in parts.items()}
            progress = iteration, step, seconds, recent, metrics.tell()
            with open(run_dir / "checkpoint.tmp", "wb", buffering=0) as file:
                torch.save(checkpoint | dict(progress=progress, rng=torch.get_rng_state()), file)
                os.fsync(file.fileno())
            os.replace(file.name, run_dir / "checkpoint.pt")  # the old one or the new, never half
            next_save = time.time() + args.checkpoint_interval
    envs.close()
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        print(f"\nrun: {run_dir}")
        if Path("tools/evaluate.py").exists():
            print(f"evaluate it: python -m tools.evaluate {run_dir}")
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    resume = tyro.cli(Args).resume
    saved = load_checkpoint(resume)["args"] if resume else {}  # the defaults of a resumed run
    try:
        code = main(tyro.cli(Args, default=Args(**saved)))
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not torch.distributed.is_initialized():
            raise  # an error in the code
        fail(f"disk, memory or a worker failed: {error}; --resume goes on where it was saved", 1)
    if int(os.environ.get("RANK", 0)) > 0:
        os._exit(code)  # as in fail
    sys.exit(code)
