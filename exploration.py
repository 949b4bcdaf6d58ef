"""Behaviours that collect data, behind the interface of `models.ActorCritic`: `actor(feat)` and `update(...)`.

'greedy' is the task policy itself, so it needs nothing here.
"""

import math

import torch
from torch import Tensor, nn

import tools
from hrssm import Branches
from models import ActorCritic, WorldModel, autocast, frozen
from networks import MLP, OneHot, bound_action


class Uniform:
    """Uniform over [-1, 1]^A, one draw for each row of `like` (..., A)."""

    def __init__(self, like: Tensor):
        self.mode = torch.zeros_like(like)

    def sample(self) -> Tensor:
        return torch.rand_like(self.mode) * 2.0 - 1.0


class Random(nn.Module):
    """Uniform policy; for continuous actions over [-1, 1], the range every environment presents."""

    def __init__(self, actions: int, discrete: bool):
        super().__init__()
        self.actions, self.discrete = actions, discrete

    def actor(self, feat: Tensor) -> Uniform | OneHot:
        zeros = feat.new_zeros(*feat.shape[:-1], self.actions)
        return OneHot(zeros) if self.discrete else Uniform(zeros)

    def update(self, world_model: WorldModel, branches: Branches, action: Tensor) -> dict[str, Tensor]:
        return {}


class Plan2Explore(nn.Module):
    """Seek states on which an ensemble of one-step predictors disagrees (Sekar et al., 2020).

    The ensemble regresses `target` ('stoch', 'deter' or 'feat' of the raw posterior, or the mask branch's 'embed'),
    `offset` steps ahead, from the mask branch's features. Intrinsic reward: log of the standard deviation over the
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
        self.target, self.offset, self.log, self.action_cond = target, offset, log, action_cond
        self.intr_scale, self.extr_scale, self.bf16 = intr_scale, extr_scale, bf16
        inputs = sizes["feat"] + (actions if action_cond else 0)
        self.ensemble = nn.ModuleList(
            MLP(inputs, sizes[target], layers=layers, units=units, act=act, norm=norm) for _ in range(models)
        )
        self.optimizer = tools.Optimizer("explorer", self.ensemble.parameters(), **optimizer)

    @property
    def actor(self):
        return self.behavior.actor

    def update(self, world_model: WorldModel, branches: Branches, action: Tensor) -> dict[str, Tensor]:
        """Train the ensemble on a batch (B,T,*), then the exploring actor-critic on the disagreement it predicts."""
        loss = self.ensemble_loss(branches, action)
        metrics = self.optimizer.step(loss)

        def reward_fn(feat: Tensor, action: Tensor) -> Tensor:
            reward = self.intr_scale * self.disagreement(feat, action)
            if self.extr_scale:
                reward = reward + self.extr_scale * world_model.reward_head(feat).mode.squeeze(-1)
            return reward

        with frozen(self.ensemble):
            return metrics | self.behavior.update(world_model, branches.raw_post, reward_fn)

    def inputs(self, feat: Tensor, action: Tensor) -> Tensor:
        return torch.cat([feat, bound_action(action)], -1) if self.action_cond else feat

    def ensemble_loss(self, branches: Branches, action: Tensor) -> Tensor:
        """Negative log-likelihood of Normal(prediction, 1), averaged over the ensemble."""
        raw = branches.raw_post
        targets = {"stoch": raw.stoch.flatten(2), "deter": raw.deter, "feat": raw.feat, "embed": branches.embed}
        target = targets[self.target].detach()[:, self.offset :]
        steps = branches.embed.shape[1] - self.offset
        inputs = self.inputs(branches.post.feat.detach(), action)[:, :steps]
        with autocast(inputs, self.bf16):
            predictions = [head(inputs) for head in self.ensemble]
        errors = [0.5 * ((prediction - target) ** 2).sum(-1).mean() for prediction in predictions]
        return torch.stack(errors).mean() + 0.5 * target.shape[-1] * math.log(2.0 * math.pi)

    def disagreement(self, feat: Tensor, action: Tensor) -> Tensor:
        """(..., F), (..., A) -> (...)."""
        inputs = self.inputs(feat, action)
        spread = torch.stack([head(inputs) for head in self.ensemble]).std(0).mean(-1)
        return torch.log(spread) if self.log else spread
