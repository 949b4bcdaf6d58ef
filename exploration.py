"""How experience is collected: exploring behaviours, and `Rollout`, which acts them out.

Behaviours have the interface of `models.ActorCritic`: `actor(feat)` and `update(...)`. 'greedy' is the task policy
itself, so it needs nothing here.
"""

import math
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import envs
import tools
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
