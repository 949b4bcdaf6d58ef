"""How experience is collected: exploring behaviours, `Rollout`, which acts them out, and episodes logged before.

Behaviours have `actor(feat)` and `update(world_model, filtered, action)`. 'greedy' is the task policy itself, so it
needs nothing here.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import envs
import tools
from envs.episodes import File, find_files, hold_out, load_episodes
from envs.vector import FLAGS
from models import ActorCritic, WorldModel, autocast, frozen
from networks import MLP, Filtered, Memory, OneHot, State, bound_action


class Uniform:
    """Uniform over [-1, 1]^A, one draw for each row of `like` (..., A)."""

    def __init__(self, like: Tensor):
        self.mode = torch.zeros_like(like)

    def sample(self) -> Tensor:
        return torch.rand_like(self.mode) * 2.0 - 1.0


class Random(nn.Module):
    """Uniform policy; continuous actions are drawn from [-1, 1], the range of every environment."""

    def __init__(self, actions: int, discrete: bool):
        super().__init__()
        self.actions, self.discrete = actions, discrete

    def actor(self, feat: Tensor) -> Uniform | OneHot:
        zeros = feat.new_zeros(*feat.shape[:-1], self.actions)
        return OneHot(zeros) if self.discrete else Uniform(zeros)

    def update(self, world_model: WorldModel, filtered: Filtered, action: Tensor) -> dict[str, Tensor]:
        return {}


class Plan2Explore(nn.Module):
    """Explore states where an ensemble of one-step predictors disagrees (Sekar et al., 2020).

    The ensemble regresses `target` ('stoch', 'deter' or 'feat' of the states where imagination begins, or 'embed'),
    `offset` steps ahead, from the posterior's features. Intrinsic reward: log of the standard deviation over the
    ensemble, averaged over dimensions.
    """

    def __init__(
        self,
        behavior: ActorCritic,
        *,
        actions: int,
        sizes: dict[str, int],
        target: str,
        offset: int,
        models: int,
        layers: int,
        units: int,
        act: str,
        norm: str,
        log: bool,
        action_cond: bool,
        intr_scale: float,
        extr_scale: float,
        bf16: bool,
        optimizer: dict,
    ):
        super().__init__()
        if target not in sizes:
            raise ValueError(f"unknown --disag_target {target!r}: use {', '.join(sizes)}")
        self.behavior = behavior
        self.target = target
        self.offset = offset
        self.log = log
        self.action_cond = action_cond
        self.intr_scale = intr_scale
        self.extr_scale = extr_scale
        self.bf16 = bf16
        inputs = sizes["feat"] + (actions if action_cond else 0)
        self.ensemble = nn.ModuleList(
            MLP(inputs, sizes[target], layers=layers, units=units, act=act, norm=norm) for _ in range(models)
        )
        self.optimizer = tools.Optimizer("explorer", self.ensemble.parameters(), **optimizer)

    @property
    def actor(self):
        return self.behavior.actor

    def update(self, world_model: WorldModel, filtered: Filtered, action: Tensor) -> dict[str, Tensor]:
        """Train the ensemble on a batch (B,T,*), then the exploring actor-critic on the disagreement it predicts."""
        loss = self.ensemble_loss(filtered, action)
        metrics = self.optimizer.step(loss)

        def reward_fn(feat: Tensor, action: Tensor) -> Tensor:
            reward = self.intr_scale * self.disagreement(feat, action)
            if self.extr_scale:
                reward = reward + self.extr_scale * world_model.reward_head(feat).mode.squeeze(-1)
            return reward

        with frozen(self.ensemble):
            return metrics | self.behavior.update(world_model, filtered.start, reward_fn)

    def inputs(self, feat: Tensor, action: Tensor) -> Tensor:
        # As upstream, in training this is the action that led to `feat`, in imagination the one taken there.
        return torch.cat([feat, bound_action(action)], -1) if self.action_cond else feat

    def ensemble_loss(self, filtered: Filtered, action: Tensor) -> Tensor:
        """Negative log-likelihood of Normal(prediction, 1), averaged over the ensemble."""
        start = filtered.start
        targets = {"stoch": start.stoch.flatten(2), "deter": start.deter, "feat": start.feat, "embed": filtered.embed}
        target = targets[self.target].detach()[:, self.offset :]
        steps = filtered.embed.shape[1] - self.offset
        inputs = self.inputs(filtered.feat.detach(), action)[:, :steps]
        with autocast(inputs, self.bf16):
            predictions = [head(inputs) for head in self.ensemble]
        errors = [0.5 * ((prediction - target) ** 2).sum(-1).mean() for prediction in predictions]
        return torch.stack(errors).mean() + 0.5 * target.shape[-1] * math.log(2.0 * math.pi)

    def disagreement(self, feat: Tensor, action: Tensor) -> Tensor:
        """(..., F), (..., A) -> (...)."""
        inputs = self.inputs(feat, action)
        spread = torch.stack([head(inputs) for head in self.ensemble]).std(0).mean(-1)
        return torch.log(spread) if self.log else spread


# --- acting ---------------------------------------------------------------------------------------------------------


class Carry(NamedTuple):
    """What the policy remembers between steps: latent state (n,*) and last action (n,A)."""

    state: State
    action: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.state[:3], *(self.state.memory or ()), self.action]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> "Carry":
        deter, stoch, logit, *memory, action = tensors
        return cls(State(deter, stoch, logit, Memory(*memory) if memory else None), action)


class Episode(NamedTuple):
    """A finished episode: environment, sum of rewards, policy steps, success at the last step."""

    env: int
    score: float
    length: int
    success: float


class Rollout:
    """The episodes in progress in `n` environments: observations, returns, lengths and the policy's memory `carry`.

    A step is `begin`, a choice of actions from `obs`, `send` and `receive`; between the last two the caller may work
    while the environments move.
    """

    def __init__(self, vec: envs.Vector):
        self.vec = vec
        self.obs = vec.observations()
        self.over = np.ones(vec.num_envs, bool)
        self.score = np.zeros(vec.num_envs)
        self.length = np.zeros(vec.num_envs, int)
        self.carry: Carry | None = None

    def begin(self) -> np.ndarray:
        """Start a new episode where the last one is over; returns the indices of these environments."""
        begun = np.flatnonzero(self.over)
        if len(begun):
            self.obs = self.vec.reset(self.over)
            self.score[begun] = 0.0
            self.length[begun] = 0
            self.over = np.zeros_like(self.over)
        return begun

    def send(self, action: Tensor) -> None:
        """Start a step with actions (n,A), one-hot where they are discrete."""
        discrete = isinstance(self.vec.action_space, gymnasium.spaces.Discrete)
        self.vec.step_async((action.argmax(-1) if discrete else action).cpu().numpy())

    def receive(self) -> tuple[np.ndarray, np.ndarray, list[Episode]]:
        """End the step: reward (n,), whether the environment was lost (n,) bool, and the episodes that ended."""
        self.obs, reward, self.over, info = self.vec.step_wait()
        self.score = self.score + reward
        self.length = self.length + 1
        ended = np.flatnonzero(self.over & ~info["lost"])
        return reward, info["lost"], [Episode(i, self.score[i], self.length[i], info["success"][i]) for i in ended]

    def state_dict(self) -> list:
        carry = None if self.carry is None else self.carry.tensors()
        return [self.over.tolist(), self.score.tolist(), self.length.tolist(), carry]

    def load_state_dict(self, state: list, running: np.ndarray) -> None:
        """Continue the episodes where `running` (n,) is true, after the environments are restored; others are over."""
        _, score, length, carry = state
        self.obs = self.vec.observations()
        self.over = ~running
        self.score = np.array(score)
        self.length = np.array(length)
        self.carry = Carry.from_tensors(carry) if carry else None


# --- logged episodes ------------------------------------------------------------------------------------------------


class Logged(NamedTuple):
    """Logged episodes: those to learn from in replay, those held out, and every file as [name, bytes, rows]."""

    replay: tools.Replay
    held_out: list[dict[str, np.ndarray]]
    files: list[list]
    mean_frames: dict[str, Tensor]  # (H,W,C) in [0, 1] of each picture, over the training episodes
    rewarded: bool
    discrete: bool

    def background(self, key: str) -> Tensor:
        """Median (H,W,C) in [0, 1] of about 200 frames of the training episodes."""
        frames = self.replay.storage[key][: len(self.replay)]
        return frames[:: max(1, len(frames) // 200)].cpu().double().median(0).values / 255.0

    @property
    def act_space(self) -> gymnasium.Space:
        actions = self.replay.storage["action"].shape[-1]
        return gymnasium.spaces.Discrete(actions) if self.discrete else gymnasium.spaces.Box(-1.0, 1.0, (actions,))

    @property
    def spaces(self) -> gymnasium.spaces.Dict:
        box = gymnasium.spaces.Box
        shapes = {key: (tuple(values.shape[1:]), values.dtype) for key, values in self.replay.storage.items()}
        known = {key: kind for key, kind in shapes.items() if key not in ("action", "reward", *FLAGS)}
        return gymnasium.spaces.Dict(
            {
                key: box(0, 255, shape, np.uint8) if dtype == torch.uint8 else box(-np.inf, np.inf, shape, np.float32)
                for key, (shape, dtype) in known.items()
            }
        )


def load_logged(config, device: torch.device | str = "cpu") -> Logged:
    """The episodes of `--offline_traindir` and `--offline_evaldir`, file by file into replay.

    Raises EnvError for what is wrong with a file, UserError for what is wrong with the folders as a whole.
    """
    started, options = time.monotonic(), {"actions": config.offline_actions, "size": tuple(config.size)}
    options["discrete"] = discrete = config.actor_dist == "onehot"
    files = find_files(config.offline_traindir, config.dataset_size)
    lengths = [stop - start for file in files for start, stop in file.pieces]
    # Episodes of a single row are left out below, so they have no number.
    drawn = set() if config.offline_evaldir else hold_out(sum(rows > 1 for rows in lengths), config.seed)
    replay = tools.Replay(
        capacity=sum(lengths) + len(lengths),
        batch_size=config.batch_size,
        batch_length=config.batch_length,
        num_envs=1,
        seed=config.seed,
        device=device,
    )
    held_out, totals, rewarded, found = [], {}, {}, {}

    def read(files: list[File], use: str) -> Iterator[dict[str, np.ndarray]]:
        for path, rows in load_episodes(files, **options):
            found[use, path] = found.get((use, path), 0) + len(rows["action"])
            rewarded[use] = "reward" in rows  # in all of a folder or in none
            yield {"reward": np.zeros(len(rows["action"]), np.float32)} | rows

    for number, rows in enumerate(read(files, "training")):
        if number in drawn:
            held_out.append(rows)
            continue
        if config.reward_smoothing != "none":
            rows["reward"] = tools.smooth_rewards(rows["reward"], config.reward_smoothing)
        replay.extend(rows)
        for key, values in rows.items():
            if values.dtype == np.uint8:
                totals[key] = totals.get(key, 0.0) + values.sum(0, dtype=np.float64)
    if config.offline_evaldir:
        held_out = list(read(find_files(config.offline_evaldir), "held-out"))
    if not held_out or not len(replay):
        raise tools.UserError(
            f"{config.offline_traindir} holds {len(held_out) + replay.num_episodes} episodes: two are needed, one to "
            "learn from and one to hold out, or held-out ones in --offline_evaldir"
        )
    theirs = {key: values.shape[1:] for key, values in held_out[0].items()}
    ours = {key: tuple(values.shape[1:]) for key, values in replay.storage.items()}
    differ = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    differ += ["reward"] * (len({*rewarded.values()}) > 1)
    if differ:
        raise tools.UserError(
            f"{config.offline_evaldir} and {config.offline_traindir} do not fit: {', '.join(differ)} differs in shape "
            "or is in one of them only"
        )
    rows, seconds = sum(found.values()), time.monotonic() - started
    print(
        f"Loaded {replay.num_episodes + len(held_out)} episodes, {len(held_out)} of them held out: {rows:,} rows, "
        f"{rows / seconds:,.0f} per second.",
        flush=True,
    )
    listed = [[f"{use} {path.name}", path.stat().st_size, rows] for (use, path), rows in found.items()]
    means = {key: torch.as_tensor(total / len(replay) / 255.0) for key, total in totals.items()}
    return Logged(replay, held_out, listed, means, rewarded["training"], discrete)


def check_unchanged(before: list[list], now: list[list]) -> None:
    """Raise UserError with the first difference between the files of a run and those it finds when it goes on."""
    old, new = ({name: f"{size} bytes, {rows} rows" for name, size, rows in files} for files in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise tools.UserError(
                f"the logged episodes are not those of this run: {name} had {old.get(name, 'not been there')}, now "
                f"{new.get(name, 'is missing')}. Restore them, or start anew with --fresh"
            )
