"""Train or evaluate an HRSSM agent: `python dreamer.py --configs dmc_vision --task dmc_walker_stand --logdir ./log`.

The only script. `Agent` holds the networks and knows how to act and how to learn from a batch; `train` is the loop:
evaluate if due, act, step, add, run the updates owed, log if due, save if due. Running the same command again resumes.

Counters: `policy_step` counts decisions of the policy summed over environments, `step` environment frames
(policy_step x action_repeat), `update` gradient updates, `episode` finished training episodes. The options `steps`,
`eval_every`, `log_every` and `time_limit` are given in frames, `prefill` and `dataset_size` in policy steps.
"""

import copy
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

import envs
import exploration
import hrssm
import models
import networks
import tools
from envs import paired
from networks import State


class Carry(NamedTuple):
    """What the policy remembers between steps: latent state (n,*) and last action (n,A)."""

    state: State
    action: Tensor

    def tensors(self) -> list[Tensor]:
        return [*self.state, self.action]

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> "Carry":
        return cls(State(*tensors[:-1]), tensors[-1])


class Agent(nn.Module):
    """World model, task behaviour and exploration behaviour. Build it with `make_agent`."""

    def __init__(
        self,
        world_model: models.WorldModel,
        actor_critic: models.ActorCritic,
        explorer: exploration.Random | exploration.Plan2Explore | None,
        probe: models.Probe | None = None,
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
        self.probe = probe
        self.actions, self.discrete = actions, discrete
        self.should_explore = tools.Until(expl_until)
        self.expl_amount, self.eval_noise = expl_amount, eval_noise
        self.eval_state_mean, self.collect_dyn_sample = eval_state_mean, collect_dyn_sample
        self.learn, self.act = self._learn, self._act

    def speed_up(self, mode: str) -> None:
        """`--compile`: 'inductor' compiles both losses; on CUDA all but 'off' record updates and acting as CUDA graphs.

        'True' is 'auto', 'False' is 'off'. To be called once, on the final device.
        """
        if mode == "inductor":
            self.world_model.loss = torch.compile(self.world_model.loss, fullgraph=True, dynamic=False)
            self.actor_critic.loss = torch.compile(self.actor_critic.loss, fullgraph=True, dynamic=False)
        if mode not in ("off", "False") and self.device.type == "cuda":
            for optimizer in self.optimizers.values():
                optimizer.make_capturable()
            self.learn, self.act = tools.CudaGraphs(self._learn), tools.CudaGraphs(self._act)

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
        if self.probe is not None:
            found |= {"probe": self.probe.optimizer}
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
        explore = training and self.explorer is not None and self.should_explore(step)
        found = self.act(data | carry.state._asdict() | {"action": carry.action}, training=training, explore=explore)
        carry = Carry(State(*(found[key] for key in State._fields)), found["action"])
        return carry.action, carry

    def _act(self, data: dict[str, Tensor], training: bool, explore: bool) -> dict[str, Tensor]:
        """One decision from tensors alone: observation and carry (n,*) -> action and latent state."""
        embed = self.world_model.hybrid.encoder(data)
        rssm, state = self.world_model.rssm, State(*(data[key] for key in State._fields))
        state = rssm.obs_step(state, data["action"], embed, data["is_first"], self.collect_dyn_sample)
        if self.eval_state_mean and not training:
            state = state._replace(stoch=rssm.dist(state.logit).mode)
        policy = (self.explorer if explore else self.actor_critic).actor(state.feat)
        action = self.add_noise(
            policy.sample() if training else policy.mode, self.expl_amount if training else self.eval_noise
        )
        return state._asdict() | {"action": action}

    def add_noise(self, action: Tensor, amount: float) -> Tensor:
        if amount == 0:
            return action
        if self.discrete:
            return networks.draw_onehot(amount / self.actions + (1.0 - amount) * action)
        return (action + amount * networks.draw_normal(action)).clamp(-1.0, 1.0)

    def update(self, batch: dict[str, Tensor], mask: Tensor | None = None, behavior: bool = True) -> dict[str, Tensor]:
        """One update of everything from a batch (B,T,*) of replay: world model, actor, critic, exploration.

        Imagination starts from the raw branch's posterior. `mask` (T,H,W) bool replaces the random cube mask; without
        `behavior` the world model learns alone.
        """
        inputs = batch if mask is None else batch | {"mask": mask}
        if behavior:
            self.actor_critic.update_slow_critic()
            if isinstance(self.explorer, exploration.Plan2Explore):
                self.explorer.behavior.update_slow_critic()
        return self.learn(inputs, behavior=behavior)

    def _learn(self, inputs: dict[str, Tensor], behavior: bool) -> dict[str, Tensor]:
        """All of `update` that only reads and writes tensors, always the same ones: it can be recorded."""
        batch = {key: value for key, value in inputs.items() if key != "mask"}
        branches, metrics = self.world_model.update(batch, inputs.get("mask"))
        if self.probe is not None:
            metrics |= self.probe.update(self.world_model, batch, branches.raw_post)
        if not behavior:
            return metrics
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
        ours = {k: v for k, v in ours.items() if not k.startswith("probe.")}
        wrong = [k for k in ours if k in theirs and theirs[k].shape != ours[k].shape]
        wrong += [k for k in ours if k not in theirs]
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
    # The agent must not see the picture without distraction; only the probe learns to draw it.
    shapes = {key: space.shape for key, space in obs_space.items() if key != "clean_image"}
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
    probe = None
    if config.video_pred_log:
        # The draws of its weights must not change those of the run.
        with torch.random.fork_rng(devices=[]):
            probe = models.Probe(networks.Decoder(rssm.feat_size, shapes, **config.decoder), model_optimizer)
    return Agent(
        world_model,
        task_behavior,
        explorer,
        probe,
        actions=actions,
        discrete=discrete,
        expl_until=config.expl_until // config.action_repeat,
        expl_amount=config.expl_amount,
        eval_noise=config.eval_noise,
        eval_state_mean=config.eval_state_mean,
        collect_dyn_sample=config.collect_dyn_sample,
    )


# --- running --------------------------------------------------------------------------------------------------------


class Run:
    """Everything a training run consists of and a checkpoint restores.

    Of several ranks each has an equal share of the environments, of replay and of every batch, and a folder of its own;
    counters count for all of them. Rank 0 evaluates.
    """

    def __init__(self, config, logdir: Path, device: torch.device, rank: int = 0, ranks: int = 1):
        self.config, self.logdir, self.rank, self.ranks = config, logdir, rank, ranks
        self.checkpoint_path = logdir / "latest.pt"
        checkpoint = load_common_checkpoint(self.checkpoint_path, device)
        # A resumed run continues with fresh episodes rather than repeating those of its start.
        resumed_at = checkpoint["count"]["policy_step"] if checkpoint else 0
        n = config.envs // ranks
        self.train_envs = make_envs(config, "train", resumed_at, n=n, first=rank * n)
        tasks = eval_tasks(config) if config.eval_episode_num > 0 and rank == 0 else {}
        self.eval_envs = {name: make_envs(config, "eval", resumed_at, task) for name, task in tasks.items()}
        self.agent = make_agent(config, self.train_envs.observation_space, self.train_envs.action_space, device)
        if rank:
            tools.seed_everything(config.seed + rank)  # equal weights, other draws
        if ranks == 1:  # recorded communication between ranks is untried
            self.agent.speed_up(config.compile)
        # A run cannot fill more than this, so a short one does not reserve the memory of a long one.
        frames = config.steps + config.eval_every + (config.prefill + 1) * config.action_repeat
        self.replay = tools.Replay(
            capacity=min(config.dataset_size, frames // config.action_repeat + config.envs) // ranks,
            batch_size=config.batch_size // ranks,
            batch_length=config.batch_length,
            num_envs=n,
            seed=config.seed + rank,
            extra_rows=n * (config.time_limit // config.action_repeat + 1),
            device=device,
        )
        self.should_train = tools.Every(config.batch_size * config.batch_length / config.train_ratio)
        self.should_pretrain = tools.Once()
        self.should_log = tools.Every(config.log_every // config.action_repeat)
        self.should_reset = tools.Every(config.reset_every)
        # Until this many policy steps actions are random; the first evaluation comes right after.
        self.prefill = max(config.prefill, config.envs)
        self.count = {"policy_step": 0, "update": 0, "episode": 0, "next_eval": self.prefill, "evaluated": -1}
        # Updates still to do at this step, undone because of NaN, and environment workers that were replaced.
        self.count |= {"owed": 0, "skipped": 0, "worker_restarts": 0}
        # The episodes in progress: whether over (n,), return so far (n,), length so far (n,), the policy's memory.
        self.live = np.ones(n, bool), np.zeros(n), np.zeros(n, int), None
        options = {key: value for key, value in tools.flatten(vars(config)).items() if key != "logdir"}
        self.logger = tools.Logger(logdir, simple=config.simple_log, total_steps=config.steps, options=options)
        if checkpoint:
            self.restore(checkpoint)
        elif config.init_from:
            load_weights(self.agent, config.init_from)
        self.note_evaluation_state()
        self.saved_at = time.monotonic()
        self.trace = tools.start_trace(logdir / "trace.json", config.profile) if config.profile else None

    @property
    def step(self) -> int:
        """Environment frames, action repeat included."""
        return self.count["policy_step"] * self.config.action_repeat

    @property
    def finished(self) -> bool:
        """The last evaluation, at `steps` frames or soon after, ends the run."""
        return self.count["evaluated"] * self.config.action_repeat >= self.config.steps

    @property
    def clocks(self) -> dict:
        return {k: getattr(self, k) for k in ("should_train", "should_pretrain", "should_log", "should_reset")}

    def updates_owed(self) -> int:
        return self.config.pretrain if self.should_pretrain() else self.should_train(self.count["policy_step"])

    def write(self, only: str = "") -> None:
        for vec in (self.train_envs, *self.eval_envs.values()):
            self.count["worker_restarts"] += vec.restarts
            vec.restarts = 0
        counters = {k: self.count[k] for k in ("policy_step", "update", "episode")}
        counters |= {k: self.count[k] for k in ("skipped", "worker_restarts") if self.count[k]}
        with tools.writing(self.logdir):
            self.logger.write(self.step, only=only, **counters)

    def learned(self) -> dict:
        """All that an update changes."""
        optimizers = {k: v.state_dict() for k, v in self.agent.optimizers.items()}
        return {"agent": self.agent.state_dict(), "optimizers": optimizers}

    def restore_learned(self, state: dict) -> None:
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    def note_evaluation_state(self) -> None:
        """Where the next evaluation begins, for the checkpoint: one that is cut short begins anew."""
        ended = np.zeros(self.config.envs, bool)
        self.eval_states = {name: vec.state_dict(ended) for name, vec in self.eval_envs.items()}

    def save(self) -> None:
        done, score, length, carry = self.live
        state = self.learned() | {
            "clocks": {k: v.state_dict() for k, v in self.clocks.items()},
            "count": dict(self.count),
            "live": [done.tolist(), score.tolist(), length.tolist(), None if carry is None else carry.tensors()],
            "envs": json.dumps({"train": self.train_envs.state_dict(~done), "eval": self.eval_states}),
            "logger": self.logger.state_dict(),
            "rng": tools.rng_state(),
        }
        with tools.writing(self.logdir):
            state["replay"] = self.replay.save(self.logdir / "replay")
            tools.save_checkpoint(self.checkpoint_path, state)
        self.saved_at = time.monotonic()

    def restore(self, state: dict) -> None:
        self.restore_learned(state)
        for name, clock in self.clocks.items():
            clock.load_state_dict(state["clocks"][name])
        self.count = dict(state["count"])
        self.logger.load_state_dict(state["logger"])
        self.replay.load(self.logdir / "replay", state["replay"])
        saved = json.loads(state["envs"])
        for name in self.eval_envs.keys() & saved["eval"].keys():
            self.eval_envs[name].load_state_dict(saved["eval"][name])
        running = self.train_envs.load_state_dict(saved["train"])
        # An episode goes on if both its environment and its rows in replay came back.
        running &= [i in self.replay.open for i in range(len(running))]
        for i in np.flatnonzero(~running):
            self.replay.end(i)
        _, score, length, carry = state["live"]
        self.live = ~running, np.array(score), np.array(length), carry and Carry.from_tensors(carry)
        tools.set_rng_state(state["rng"])
        print(f"Resumed {self.logdir} at step {self.step} (update {self.count['update']}).", flush=True)

    def close(self) -> None:
        if self.trace is not None:
            self.trace.stop()
        self.logger.close()
        self.train_envs.close()
        for vec in self.eval_envs.values():
            vec.close()


def env_options(config) -> dict:
    return {
        "size": tuple(config.size),
        "action_repeat": config.action_repeat,
        "time_limit": config.time_limit // config.action_repeat,
        "resource_files": config.resource_files,
        "img_source": config.img_source,
        "total_frames": config.total_frames,
        "ds_resource_path": config.ds_resource_path,
        "distracting_cs_intensity": config.distracting_cs_intensity,
        "distracting_cs_dynamic": config.distracting_cs_dynamic,
        "scene_files": config.scene_files,
        "clean_image": config.video_pred_log,
    }


def eval_tasks(config) -> dict[str, str]:
    """What is evaluated: a name for its metrics and the task string; the training task has the name ""."""
    if not config.eval_task:
        return {"": config.task}
    trained, tasks = envs.parse_task(config.task), {}
    for task in config.eval_task:
        other = envs.parse_task(task)
        if (other.suite, other.domain) != (trained.suite, trained.domain):
            raise tools.UserError(f"--eval_task {task}: the agent of {config.task} can act in {trained.domain} only")
        variant = other.variant or "clean"
        tasks[variant if other.name == trained.name else f"{other.name}_{variant}"] = task
    return tasks


def make_envs(config, stream: str, start: int = 0, task: str = "", n: int = 0, first: int = 0) -> envs.Vector:
    return envs.make_vector(
        task or config.task,
        n or config.envs,
        first=first,
        seed=config.seed,
        stream=stream,
        start=start,
        shared_seed=config.shared_env_seed,
        parallel=config.parallel,
        timeout=config.worker_timeout,
        niceness=19 if config.overlap else 0,  # what takes longer, learning, goes first
        **env_options(config),
    )


def load_common_checkpoint(path: Path, device: torch.device) -> dict | None:
    """The latest checkpoint that all ranks have: a kill may fall between their saves."""

    def steps(checkpoint: dict | None) -> Tensor:
        return tools.gather_ranks(torch.tensor([checkpoint["count"]["policy_step"] if checkpoint else -1]))

    checkpoint = tools.load_checkpoint(path, device)
    found = steps(checkpoint)
    if checkpoint and checkpoint["count"]["policy_step"] > found.min():
        checkpoint = tools.load_checkpoint(path.with_suffix(".prev.pt"), device)
    if len(steps(checkpoint).unique()) > 1:
        raise tools.UserError(f"the ranks have no checkpoint in common beside {path}: start anew in another --logdir")
    return checkpoint


def load_agent(agent: Agent, state: dict) -> None:
    """Weights of a checkpoint of ours, from a run with or without a probe, which is left as it is."""
    kept = {key: value for key, value in agent.state_dict().items() if key.startswith("probe.")}
    agent.load_state_dict({key: value for key, value in state.items() if not key.startswith("probe.")} | kept)


def load_weights(agent: Agent, path: str) -> None:
    """`--init_from`: an upstream `latest.pt` or a checkpoint of ours."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise tools.UserError(f"--init_from {path}: no such file")
    state = tools.load_checkpoint(file, agent.device)
    if "agent" in state:
        try:
            load_agent(agent, state["agent"])
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise tools.UserError(f"--init_from {path} does not fit this configuration: {first}") from error
        print(f"Loaded the weights of {path}.", flush=True)
    else:
        count = agent.load_upstream(state)
        print(f"Loaded {count} tensors of upstream from {path}; optimisers and return statistics start afresh.")


def grouped(metrics: dict) -> dict:
    """Upstream's metric names, sorted into TensorBoard groups."""

    def group(name: str) -> str:
        return "loss" if name.endswith("_loss") else "opt" if name.endswith("_grad_norm") else "train"

    return {f"{group(name)}/{name}": value for name, value in metrics.items()}


def env_action(agent: Agent, action: Tensor) -> np.ndarray:
    action = action.argmax(-1) if agent.discrete else action
    return action.cpu().numpy()


@torch.no_grad()
def evaluate(
    agent: Agent, vec: envs.Vector, episodes: int, stopped=lambda: False, seen: list[dict] | None = None
) -> tuple[dict, np.ndarray | None]:
    """Mean over the first `episodes` episodes to finish, and the frames (T,H,W,C) of one of them.

    `seen` collects the rows of that one: observation and the action that led to it.
    """
    done, carry = np.ones(vec.num_envs, bool), None
    score, length = np.zeros(vec.num_envs), np.zeros(vec.num_envs, int)
    finished, frames, recording = [], [], True
    while len(finished) < episodes and not stopped():
        if done.any():
            obs = vec.reset(done)
            score[done], length[done] = 0.0, 0
        if recording and vec.render_mode == "rgb_array":
            frames.append(vec.render(0))
            recording = frames[-1] is not None
        elif recording and "image" in obs:
            frames.append(obs["image"][0])
        if recording and seen is not None:
            before = np.zeros(agent.actions, np.float32) if carry is None else carry.action[0].cpu().numpy()
            seen.append({**{key: value[0] for key, value in obs.items()}, "action": before})
        action, carry = agent.policy(obs, carry, training=False)
        obs, reward, done, info = vec.step(env_action(agent, action))
        score, length = score + reward, length + 1
        recording = recording and not done[0]
        finished += [(score[i], length[i], info["success"][i]) for i in np.flatnonzero(done & ~info["lost"])]
    if len(finished) < episodes:
        return {}, None
    returns, lengths, successes = np.array(finished[:episodes], np.float64).T
    metrics = {"return": returns.mean(), "return_std": returns.std(), "length": lengths.mean()}
    metrics |= {"success": successes.mean(), "episodes": episodes}
    frames = [frame for frame in frames if frame is not None]
    return {k: float(v) for k, v in metrics.items()}, np.stack(frames) if frames else None


def distracted_tasks(config) -> dict[str, str]:
    """Variant -> task of the control suite, of those that the run is trained and evaluated on."""
    parsed = {task: envs.parse_task(task) for task in (config.task, *config.eval_task)}
    return {found.variant: task for task, found in parsed.items() if found.suite == "dmc" and found.variant}


def robustness_due(config, step: int) -> bool:
    """Whether a multiple of `robustness_every` frames was passed since the evaluation before this one."""
    every = config.robustness_every
    return every > 0 and step // every > (step - config.eval_every) // every


def measure_robustness(agent: Agent, config) -> dict[str, float]:
    """`robustness/<variant>/...` on each distracted task of the run. Takes no random numbers from the run."""
    metrics, options = {}, env_options(config) | {"clean_image": False}
    for variant, task in distracted_tasks(config).items():
        values = models.measure_robustness(agent.world_model, agent.actor_critic, *paired.render(task, options))
        metrics |= {f"robustness/{variant}/{name}": values[name] for name in models.ROBUSTNESS}
    return metrics


def open_loop(agent: Agent, rows: list[dict], length: int = 60) -> np.ndarray:
    """Open-loop video (T,n H,W,C) of the first `length` rows of an episode, see `models.Probe.open_loop`."""
    batch = {key: torch.as_tensor(np.stack([row[key] for row in rows[:length]])[None]) for key in rows[0]}
    return agent.probe.open_loop(agent.world_model, batch)[0].cpu().numpy()


def train(run: Run, stopped) -> None:
    """Collect and learn until the run is finished; `stopped()` ends it early."""
    config, agent, replay, logger, count = run.config, run.agent, run.replay, run.logger, run.count
    vec = run.train_envs
    # Ranks stop together, at the beginning of a step.
    at_once = stopped if run.ranks == 1 else lambda: False
    random, unchecked = exploration.Random(agent.actions, agent.discrete), []
    done, score, length, carry = run.live
    obs = vec.observations()

    def save() -> None:
        check_updates(run, unchecked)
        run.live = done, score, length, carry
        run.save()

    while not (run.finished or tools.any_rank(stopped())):
        if count["policy_step"] >= count["next_eval"]:
            check_updates(run, unchecked)
            found, rng = {}, tools.rng_state()
            for name, eval_vec in run.eval_envs.items():
                seen = None if agent.probe is None else []
                found[name] = *evaluate(agent, eval_vec, config.eval_episode_num, at_once, seen), seen
            if at_once():
                tools.set_rng_state(rng)
                break
            for name, (metrics, frames, seen) in found.items():
                prefix = f"eval/{name}/" if name else "eval/"
                logger.scalars({prefix + key: value for key, value in metrics.items()})
                if frames is not None:
                    logger.video(f"{prefix}policy", frames)
                if seen:
                    logger.video(f"{prefix}openloop", open_loop(agent, seen), fps=10, strip=5)
            run.note_evaluation_state()
            run.write(only="eval/")
            if run.rank == 0 and robustness_due(config, run.step):
                logger.scalars(measure_robustness(agent, config))
                run.write(only="robustness/")
            count["next_eval"] += config.eval_every // config.action_repeat
            count["evaluated"] = count["policy_step"]
            save()
            continue
        if config.save_every and tools.any_rank(time.monotonic() - run.saved_at > 60 * config.save_every):
            save()
        if done.any():
            obs = vec.reset(done)
            score[done], length[done] = 0.0, 0
            blank = {"action": np.zeros((vec.num_envs, agent.actions), np.float32)}
            blank["reward"] = np.zeros(vec.num_envs, np.float32)
            replay.add(rows(obs, **blank, chosen=done), np.flatnonzero(done))
            done = np.zeros_like(done)
        if count["policy_step"] < run.prefill:
            action, overlap = random.actor(torch.zeros(vec.num_envs, 1)).sample(), False
        else:
            # The first updates may be many; they stay where they can be broken off, and some are left if they were.
            overlap = config.overlap and count["update"] > 0 and not count["owed"]
            count["owed"] = count["owed"] or run.updates_owed()
            if not overlap and not learn(run, at_once, unchecked):
                break
            if run.should_log(count["policy_step"]):
                run.write()
            carry = None if run.should_reset(count["policy_step"]) else carry
            action, carry = agent.policy(obs, carry, count["policy_step"])
        chosen_action = env_action(agent, action)
        check_updates(run, unchecked)  # after the copy of the action has waited for the device anyway
        vec.step_async(chosen_action)
        if run.trace is not None and count["update"]:
            run.trace.step()
        if overlap:
            # Not to be broken off: the environments are ahead of what a checkpoint would hold.
            learn(run, lambda: False, unchecked)
        obs, reward, done, info = vec.step_wait()
        kept = ~info["lost"]
        replay.add(rows(obs, action=action.cpu().numpy(), reward=reward, chosen=kept), np.flatnonzero(kept))
        count["policy_step"] += vec.num_envs * run.ranks
        score, length = score + reward, length + 1
        for i in np.flatnonzero(~kept):
            replay.discard(i)
        for i in np.flatnonzero(done & kept):
            replay.end(i)
            count["episode"] += 1
            episode = {"return": score[i], "length": length[i], "success": info["success"][i]}
            episode |= {"replay_steps": replay.num_transitions, "replay_episodes": replay.num_episodes}
            logger.scalars({f"episode/{k}": float(v) for k, v in episode.items()})
        if done.any():
            run.write(only="episode/")
        logger.progress(run.step)
    if not run.finished:
        save()


def rows(obs: dict[str, np.ndarray], *, action: np.ndarray, reward: np.ndarray, chosen: np.ndarray) -> dict:
    """What replay keeps of a vector step (n, ...), of the environments where `chosen` (n,) is true."""
    found = {**{k: v for k, v in obs.items() if k != "is_last"}, "action": action, "reward": reward}
    return {key: values[chosen] for key, values in found.items()}


def learn(run: Run, stopped, unchecked: list) -> bool:
    """Do the updates that are owed; false if `stopped()` ended that early."""
    for batch in run.replay.batches(run.count["owed"]):
        update(run, batch, unchecked)
        run.count["owed"] -= 1
        if stopped():
            break
    return not run.count["owed"]


EXTREMES = ("train/min_reward", "train/max_reward")


def update(run: Run, batch: dict[str, Tensor], unchecked: list) -> None:
    """One update and its metrics. With `--on_nan skip` it is undone if it is not finite, else `unchecked` gets it."""
    config, count = run.config, run.count
    before = copy.deepcopy(run.learned()) if config.on_nan == "skip" else None
    metrics = grouped(run.agent.update(batch, behavior=count["update"] >= config.actor_start))
    # A distribution over buckets gives a NaN reward a finite loss.
    watched = {k: v for k, v in metrics.items() if k.startswith(("loss/", "opt/")) or k in EXTREMES}
    finite = torch.stack(list(watched.values())).isfinite()
    count["update"] += 1
    if before is None:
        unchecked.append((run.step, count["update"], batch, list(watched), finite))
        # Batches take memory, and on the CPU there is nothing to wait for.
        if finite.device.type == "cpu" or len(unchecked) > 3:
            check_updates(run, unchecked)
    elif tools.any_rank(not finite.all()):
        run.restore_learned(before)
        count["skipped"] += 1
        tools.warn(f"{not_finite(run.step, count['update'], watched, finite)}: undone")
        return
    run.logger.scalars(metrics)


def check_updates(run: Run, unchecked: list) -> None:
    """Raise UserError for the first of the `unchecked` updates that is not finite, and keep its batch in the logdir."""
    while unchecked:
        step, number, batch, names, finite = unchecked.pop(0)
        if not finite.all():
            path = run.logdir / f"nan_{number}.npz"
            with tools.writing(run.logdir):
                np.savez(path, **{key: value.cpu().numpy() for key, value in batch.items()})
            raise tools.UserError(
                f"{not_finite(step, number, names, finite)}; its batch is in {path}. The last checkpoint "
                "is from before it: the same command goes on from there, with --on_nan skip such updates are undone"
            )


def not_finite(step: int, number: int, names: Iterable[str], finite: Tensor) -> str:
    bad = [name.split("/")[1] for name, good in zip(names, finite.tolist(), strict=True) if not good]
    return f"update {number} at step {step} is not finite ({', '.join(bad)})"


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise tools.UserError(f"--device {name}: no CUDA device is available here; use --device auto or cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def run(argv: list[str]) -> int:
    config = tools.load_config(argv)
    if not config.logdir:
        raise tools.UserError("--logdir is missing: say where the run is kept, for example --logdir ./log")
    # Finds out now, before workers start, whether the task, its files and rendering are in order.
    for task in {config.task, *eval_tasks(config).values()}:
        envs.prepare(task, **env_options(config) | {"total_frames": 1})
    if config.robustness_every and not distracted_tasks(config):
        raise tools.UserError("--robustness_every needs a --task or --eval_task with distraction: dmc_..._video")
    device, logdir = pick_device(config.device), Path(config.logdir).expanduser()
    tools.keep_memory()
    busy = config.envs if config.overlap and config.parallel else 0
    torch.set_num_threads(config.threads or tools.default_threads(busy))
    if config.precision == 16 and device.type == "cpu" and not tools.has_bfloat16():
        tools.warn("--precision 16 is slower than 32 on this CPU: it has no bfloat16 instructions")
    tools.seed_everything(config.seed)
    if config.deterministic_run:
        tools.enable_deterministic()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it anyway
    if config.eval_only:
        return evaluate_only(config, logdir, device)
    rank, ranks = tools.start_ranks(device)
    for option in ("batch_size", "envs"):
        if getattr(config, option) % ranks:
            raise tools.UserError(f"--{option} {getattr(config, option)} cannot be shared evenly by {ranks} ranks")
    if rank == 0:
        tools.check_config(config, logdir)
    else:
        logdir, config.simple_log = logdir / f"rank{rank}", True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    lock = tools.lock(logdir)
    print(f"{config.task} on {device} with {torch.get_num_threads()} threads, logdir {logdir}", flush=True)

    received = []

    def note(number: int, _) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt  # somebody does not want to wait
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    training = Run(config, logdir, device, rank, ranks)
    if rank == 0:
        # Only now is it known that the options work; a mistyped one must not claim the folder.
        tools.save_config(config, logdir, argv)
    try:
        train(training, lambda: bool(received))
    except KeyboardInterrupt:
        print("Stopped at once; what came after the last checkpoint is lost. The same command goes on.", flush=True)
        return 128 + signal.SIGINT
    finally:
        training.close()
        os.close(lock)
    if received:
        print(f"Stopped by {signal.Signals(received[0]).name}; saved. The same command goes on.", flush=True)
        return 128 + received[0]
    return 0


def evaluate_only(config, logdir: Path, device: torch.device) -> int:
    checkpoint = tools.load_checkpoint(logdir / "latest.pt", device)
    if checkpoint is None and not config.init_from:
        raise tools.UserError(f"{logdir}/latest.pt does not exist: train first, or give weights with --init_from")
    agent, rows = None, []
    for task in eval_tasks(config).values():
        vec = make_envs(config, "eval", task=task)
        try:
            if agent is None:
                agent = make_agent(config, vec.observation_space, vec.action_space, device)
                if checkpoint:
                    load_agent(agent, checkpoint["agent"])
                else:
                    load_weights(agent, config.init_from)
            metrics, _ = evaluate(agent, vec, config.eval_episode_num)
        finally:
            vec.close()
        rows.append((task, *(metrics[key] for key in ("episodes", "return", "return_std")), interval(metrics)))
        rows[-1] += (metrics["success"], metrics["length"])
    width = max(len(task) for task, *_ in rows)
    print(f"{'task':{width}}  episodes   return      std  95% interval       success  length")
    for task, episodes, mean, std, (low, high), success, length in rows:
        spread = f"{mean:7.1f}  {std:7.1f}  {low:7.1f} {high:7.1f}"
        print(f"{task:{width}}  {episodes:8.0f}  {spread}  {success:12.2f}  {length:6.0f}")
    return 0


def interval(metrics: dict[str, float]) -> tuple[float, float]:
    """Where the mean return lies with 95% confidence: Student's t over episodes (no number from one episode)."""
    n, mean = metrics["episodes"], metrics["return"]
    if n < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, n - 1) * metrics["return_std"] / math.sqrt(n - 1)
    return mean - half, mean + half


def main(argv: list[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except (tools.UserError, envs.EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
