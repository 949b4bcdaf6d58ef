"""Train or evaluate an HRSSM agent: `python dreamer.py --configs dmc_vision --task dmc_walker_stand --logdir ./log`.

The only script. `Agent` holds the networks and knows how to act and how to learn from a batch; `train` is the loop:
evaluate if due, act, step, add, run the updates owed, log if due, save if due. Running the same command again resumes.

Counters: `policy_step` counts decisions of the policy summed over environments, `step` environment frames
(policy_step x action_repeat), `update` gradient updates, `episode` finished training episodes. The options `steps`,
`eval_every`, `log_every` and `time_limit` are given in frames, `prefill` and `dataset_size` in policy steps.
"""

import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import envs
import exploration
import hrssm
import models
import networks
import tools
from networks import State


class Carry(NamedTuple):
    """What the policy remembers between steps: latent state (n,*) and last action (n,A)."""

    state: State
    action: Tensor


class Agent(nn.Module):
    """World model, task behaviour and exploration behaviour. Build it with `make_agent`."""

    def __init__(
        self,
        world_model: models.WorldModel,
        actor_critic: models.ActorCritic,
        explorer: exploration.Random | exploration.Plan2Explore | None,
        *,
        actions: int,
        discrete: bool,
        expl_until: int,
        expl_amount: float,
        eval_noise: float,
        eval_state_mean: bool,
        collect_dyn_sample: bool,
    ):
        super().__init__()
        self.world_model, self.actor_critic, self.explorer = world_model, actor_critic, explorer
        self.actions, self.discrete = actions, discrete
        self.should_explore = tools.Until(expl_until)
        self.expl_amount, self.eval_noise = expl_amount, eval_noise
        self.eval_state_mean, self.collect_dyn_sample = eval_state_mean, collect_dyn_sample

    @property
    def device(self) -> torch.device:
        return self.world_model.rssm.prior_head.weight.device

    @property
    def optimizers(self) -> dict[str, tools.Optimizer]:
        found = {"model": self.world_model.optimizer}
        found |= {"actor": self.actor_critic.actor_optimizer, "value": self.actor_critic.value_optimizer}
        if isinstance(self.explorer, exploration.Plan2Explore):
            behavior = self.explorer.behavior
            found |= {"explorer": self.explorer.optimizer}
            found |= {"expl_actor": behavior.actor_optimizer, "expl_value": behavior.value_optimizer}
        return found

    def initial(self, n: int) -> Carry:
        action = torch.zeros(n, self.actions, device=self.device)
        return Carry(self.world_model.rssm.initial((n,)), action)

    @torch.no_grad()
    def policy(self, obs: dict[str, np.ndarray], carry: Carry | None, step: int = 0, training: bool = True):
        """Observations of n environments -> action (n,A) tensor and the new carry.

        The online networks look at clean frames. Training samples the action (from the exploring behaviour while it is
        on), evaluation takes its mode; the latent is sampled in both.
        """
        data = self.world_model.preprocess(obs)
        carry = self.initial(len(data["is_first"])) if carry is None else carry
        embed = self.world_model.hybrid.encoder(data)
        rssm = self.world_model.rssm
        state = rssm.obs_step(carry.state, carry.action, embed, data["is_first"], self.collect_dyn_sample)
        if self.eval_state_mean and not training:
            state = state._replace(stoch=rssm.dist(state.logit).mode)
        if not training:
            action = self.actor_critic.actor(state.feat).mode
        else:
            explore = self.explorer is not None and self.should_explore(step)
            action = (self.explorer if explore else self.actor_critic).actor(state.feat).sample()
        action = self.add_noise(action, self.expl_amount if training else self.eval_noise)
        return action, Carry(state, action)

    def add_noise(self, action: Tensor, amount: float) -> Tensor:
        if amount == 0:
            return action
        if self.discrete:
            return networks.draw_onehot(amount / self.actions + (1.0 - amount) * action)
        return (action + amount * networks.draw_normal(action)).clamp(-1.0, 1.0)

    def update(self, batch: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
        """One update of everything from a batch (B,T,*) of replay: world model, actor, critic, exploration.

        Imagination starts from the raw branch's posterior. `mask` (T,H,W) bool replaces the random cube mask.
        """
        branches, metrics = self.world_model.update(batch, mask)
        metrics |= self.actor_critic.update(self.world_model, branches.raw_post)
        if self.explorer is not None:
            action = batch["action"].to(branches.embed)
            found = self.explorer.update(self.world_model, branches, action)
            metrics |= {f"expl_{key}": value for key, value in found.items()}
        return metrics

    def load_upstream(self, state: dict[str, Tensor]) -> int:
        """Load the state dict of an upstream `latest.pt`; returns the number of tensors.

        Raises UserError naming the keys that do not fit. Upstream saves neither optimisers nor return statistics.
        """
        theirs = upstream_names(state)
        ours = {k: v for k, v in self.state_dict().items() if isinstance(v, Tensor) and "return_norm" not in k}
        wrong = [k for k in ours if k not in theirs or theirs[k].shape != ours[k].shape]
        extra = [k for k in theirs if k not in ours]
        if wrong or extra:
            shape = {k: f"{tuple(v.shape)}" for k, v in theirs.items()}
            listed = [f"{k} {tuple(ours[k].shape)} here, {shape.get(k, 'absent')} there" for k in wrong]
            listed += [f"{k} absent here, {shape[k]} there" for k in extra]
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            raise tools.UserError(
                f"the weights do not fit this configuration: {'; '.join(listed[:3])}{more}. "
                "Use the --configs and sizes they were trained with"
            )
        self.load_state_dict(theirs, strict=False)
        return len(theirs)


UPSTREAM_NAMES = [
    (r"^_wm\.encoder\.", "world_model.hybrid.encoder."),
    (r"^_wm\.MBR\.target_encoder\.", "world_model.hybrid.raw_encoder."),
    (r"^_wm\.dynamics\.", "world_model.hybrid.rssm."),
    (r"^_wm\.target_dynamics\.", "world_model.hybrid.raw_rssm."),
    (r"^_wm\.heads\.(reward|cont)\.", r"world_model.\1_head."),
    (r"^_task_behavior\.(?=actor|value|_slow_value)", "actor_critic."),
    (r"^_expl_behavior\._behavior\.(?=actor|value|_slow_value)", "explorer.behavior."),
    (r"^_expl_behavior\._networks\.", "explorer.ensemble."),
    (r"\._slow_value\.", ".slow_critic."),
    (r"\.value\.", ".critic."),
    (r"\._cnn\.", ".cnn."),
    (r"\._mlp\.layers\.", ".mlp."),
    (r"\.W$", ".initial_deter"),
    (r"\._inp_layers\.", ".input."),
    (r"\._cell\._layer\.", ".cell.linear."),
    (r"\._cell\._norm\.", ".cell.norm."),
    (r"\._img_out_layers\.", ".prior_hidden."),
    (r"\._ims_stat_layer\.", ".prior_head."),
    (r"\._obs_out_layers\.", ".post_hidden."),
    (r"\._obs_stat_layer\.", ".post_head."),
    (r"\._cont_feat_layers\.0\.", ".projector."),
    (r"\._pre_layers\.", ".layers."),
    (r"\.(mean_layer|_dist_layer)\.", ".out."),
]


def upstream_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an upstream state dict, with or without `_orig_mod.`; repeated tensors are dropped."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("_orig_mod.", "")
        for pattern, replacement in UPSTREAM_NAMES:
            key = re.sub(pattern, replacement, key)
        if not key.startswith("_"):
            renamed[key] = value
    return renamed


def make_agent(config, obs_space: gymnasium.spaces.Dict, act_space: gymnasium.Space, device="cpu") -> Agent:
    """The one place where option names become constructor keywords. Raises UserError for values that cannot work."""
    try:
        return _make_agent(config, obs_space, act_space).to(device)
    except ValueError as error:
        raise tools.UserError(str(error)) from error


def _make_agent(config, obs_space: gymnasium.spaces.Dict, act_space: gymnasium.Space) -> Agent:
    discrete = isinstance(act_space, gymnasium.spaces.Discrete)
    if discrete != (config.actor_dist == "onehot"):
        hint = "--actor_dist onehot --imag_gradient reinforce" if discrete else "--actor_dist normal"
        raise ValueError(f"{config.task} has {'discrete' if discrete else 'continuous'} actions: use {hint}")
    if config.batch_length < 2:
        raise ValueError(f"--batch_length must be at least 2, not {config.batch_length}")
    actions = int(act_space.n) if discrete else act_space.shape[0]
    shapes = {key: space.shape for key, space in obs_space.items()}
    block = {"act": config.act, "norm": config.norm}
    bf16 = config.precision == 16

    encoder = networks.Encoder(shapes, **config.encoder)
    rssm = networks.RSSM(
        actions=actions,
        embed=encoder.outdim,
        stoch=config.dyn_stoch,
        classes=config.dyn_discrete,
        deter=config.dyn_deter,
        hidden=config.dyn_hidden,
        input_layers=config.dyn_input_layers,
        output_layers=config.dyn_output_layers,
        rec_depth=config.dyn_rec_depth,
        shared=config.dyn_shared,
        temp_post=config.dyn_temp_post,
        cell=config.dyn_cell,
        unimix=config.unimix_ratio,
        initial=config.initial,
        mean_act=config.dyn_mean_act,
        std_act=config.dyn_std_act,
        min_std=config.dyn_min_std,
        projection=config.dyn_cont_stoch_size,
        **block,
    )
    hybrid = hrssm.HybridRSSM(
        encoder,
        rssm,
        mask={"patch": config.patch_size, "block": config.block_size, "ratio": config.mask_ratio},
        augmentation=config.augmentation,
        aug_prob=config.aug_prob,
        encoder_tau=config.encoder_tau,
        dynamics_tau=config.dynamics_tau,
    )
    optimizer = {"weight_decay": config.weight_decay, "opt": config.opt}
    model_optimizer = {"lr": config.model_lr, "eps": config.opt_eps, "clip": config.grad_clip, **optimizer}

    def scalar_head(dist: str, layers: int, outscale: float) -> networks.ScalarHead:
        size = {"layers": layers, "units": config.units, "outscale": outscale}
        return networks.ScalarHead(rssm.feat_size, dist=dist, **size, **block)

    def actor_critic() -> models.ActorCritic:
        actor = networks.ActorHead(
            rssm.feat_size,
            actions,
            dist=config.actor_dist,
            layers=config.actor_layers,
            units=config.units,
            min_std=config.actor_min_std,
            max_std=config.actor_max_std,
            unimix=config.action_unimix_ratio,
            **block,
        )
        return models.ActorCritic(
            actor,
            scalar_head(config.value_head, config.value_layers, 0.0),
            imag_horizon=config.imag_horizon,
            imag_gradient=config.imag_gradient,
            imag_gradient_mix=config.imag_gradient_mix,
            imag_sample=config.imag_sample,
            discount=config.discount,
            discount_lambda=config.discount_lambda,
            actor_entropy=config.actor_entropy,
            actor_state_entropy=config.actor_state_entropy,
            future_entropy=config.future_entropy,
            behavior_stop_grad=config.behavior_stop_grad,
            return_norm=config.reward_EMA,
            slow_value_target=config.slow_value_target,
            slow_target_update=config.slow_target_update,
            slow_target_fraction=config.slow_target_fraction,
            value_decay=config.value_decay,
            bf16=bf16,
            actor_optimizer={
                "lr": config.actor_lr,
                "eps": config.ac_opt_eps,
                "clip": config.actor_grad_clip,
                **optimizer,
            },
            value_optimizer={
                "lr": config.value_lr,
                "eps": config.ac_opt_eps,
                "clip": config.value_grad_clip,
                **optimizer,
            },
        )

    world_model = models.WorldModel(
        hybrid,
        scalar_head(config.reward_head, config.reward_layers, 0.0),
        scalar_head("binary", config.cont_layers, 1.0),
        dyn_scale=config.dyn_scale,
        rep_scale=config.rep_scale,
        kl_free=config.kl_free,
        reward_scale=config.reward_scale,
        cont_scale=config.cont_scale,
        mbr_scale=config.mbr_scale,
        simsr_scale=config.simsr_scale,
        simsr_discount=config.simsr_discount,
        simsr_reward_scale=hrssm.bisimulation_reward_scale(config.task),
        nomlr=config.nomlr,
        nosimsr=config.nosimsr,
        grad_heads=config.grad_heads,
        bf16=bf16,
        optimizer=model_optimizer,
    )
    task_behavior = actor_critic()
    explorer = None
    if config.expl_behavior == "random":
        explorer = exploration.Random(actions, discrete)
    elif config.expl_behavior == "plan2explore":
        explorer = exploration.Plan2Explore(
            actor_critic(),
            actions=actions,
            sizes={
                "stoch": rssm.stoch_size,
                "deter": rssm.deter,
                "feat": rssm.feat_size,
                "embed": encoder.outdim,
            },
            target=config.disag_target,
            offset=config.disag_offset,
            models=config.disag_models,
            layers=config.disag_layers,
            units=config.disag_units,
            log=config.disag_log,
            action_cond=config.disag_action_cond,
            intr_scale=config.expl_intr_scale,
            extr_scale=config.expl_extr_scale,
            bf16=bf16,
            optimizer=model_optimizer,
            **block,
        )
    return Agent(
        world_model,
        task_behavior,
        explorer,
        actions=actions,
        discrete=discrete,
        expl_until=config.expl_until // config.action_repeat,
        expl_amount=config.expl_amount,
        eval_noise=config.eval_noise,
        eval_state_mean=config.eval_state_mean,
        collect_dyn_sample=config.collect_dyn_sample,
    )
