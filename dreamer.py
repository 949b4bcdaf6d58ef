"""Train or evaluate an agent: `python dreamer.py --configs dmc_vision --task dmc_walker_stand --logdir ./log`.

The only script. `Agent` holds the networks and knows how to act and how to learn from a batch; `train` is the loop:
evaluate if due, act, step, store, learn what is owed, log if due, save if due. Running the same command again resumes.

Counters: `policy_step` counts decisions of the policy summed over environments, `step` environment frames
(policy_step x action_repeat), `update` gradient updates, `episode` finished training episodes. The options `steps`,
`eval_every`, `log_every` and `time_limit` are given in frames, `prefill` and `dataset_size` in policy steps.

With `--offline_traindir` it learns from logged episodes instead (`train_offline`); a step is then an update.
"""

from setup import console  # first: before what takes seconds to import

# isort: split
import copy
import csv
import functools
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from envs import record as recorder
from envs.episodes import next_number, write_episode
from exploration import Carry, Rollout
from setup.tensor_names import current_names, upstream_names

# --method: what shapes the latent state, and how its KL enters the loss.
METHODS = {
    "hrssm": (hrssm.HybridRSSM, models.FreeBits),
    "dreamer": (models.Reconstruction, models.FreeBits),
    "rssm": (networks.Representation, models.FreeBits),
    "repo": (networks.Representation, models.KLConstraint),
    "r2dreamer": (models.RedundancyReduction, models.FreeBits),
    "infonce": (models.InfoNCE, models.FreeBits),
}


# --- agent ----------------------------------------------------------------------------------------------------------


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
        self.world_model = world_model
        self.actor_critic = actor_critic
        self.explorer = explorer
        self.probe = probe
        self.actions = actions
        self.discrete = discrete
        self.should_explore = tools.Until(expl_until)
        self.expl_amount = expl_amount
        self.eval_noise = eval_noise
        self.eval_state_mean = eval_state_mean
        self.collect_dyn_sample = collect_dyn_sample

    def speed_up(self, mode: str) -> None:
        """`--compile`: 'inductor' compiles both losses; on CUDA all but 'off' record updates and acting as CUDA graphs.

        'True' is 'auto', 'False' is 'off'. To be called once, on the final device.
        """
        if mode == "inductor":
            self.world_model.loss = torch.compile(self.world_model.loss, fullgraph=True, dynamic=False)
            self.actor_critic.loss = torch.compile(self.actor_critic.loss, fullgraph=True, dynamic=False)
        if mode not in ("off", "False") and self.device.type == "cuda":
            self.record()

    def record(self) -> None:
        """Make updates and acting CUDA graphs."""
        for optimizer in self.optimizers.values():
            optimizer.make_capturable()
        self.update, self.act = tools.CudaGraphs(self.update), tools.CudaGraphs(self.act)

    @property
    def device(self) -> torch.device:
        return self.world_model.device

    @property
    def optimizers(self) -> dict[str, tools.Optimizer]:
        optimizers = {"model": self.world_model.optimizer}
        optimizers |= {"actor": self.actor_critic.actor_optimizer, "value": self.actor_critic.value_optimizer}
        if self.world_model.autoencoder is not None:
            optimizers["ae"] = self.world_model.autoencoder.optimizer
        if isinstance(self.world_model.kl_term, models.KLConstraint):
            optimizers["beta"] = self.world_model.kl_term.optimizer
        if isinstance(self.explorer, exploration.Plan2Explore):
            behavior = self.explorer.behavior
            optimizers["explorer"] = self.explorer.optimizer
            optimizers |= {"expl_actor": behavior.actor_optimizer, "expl_value": behavior.value_optimizer}
        if self.probe is not None:
            optimizers["probe"] = self.probe.optimizer
        return optimizers

    @torch.no_grad()
    def policy(self, obs: dict[str, np.ndarray], carry: Carry | None, step: int = 0, training: bool = True):
        """Observations of n environments -> action (n,A) tensor and the new carry.

        The online networks look at clean frames. Training samples the action (from the exploring behaviour while it is
        on), evaluation takes its mode; the latent is sampled in both.
        """
        data = self.world_model.preprocess(obs)
        if carry is None:
            n = len(data["is_first"])
            carry = Carry(self.world_model.dynamics.initial((n,)), torch.zeros(n, self.actions, device=self.device))
        explore = training and self.explorer is not None and self.should_explore(step)
        carry = self.act(data, carry, training=training, explore=explore)
        return carry.action, carry

    def act(self, data: dict[str, Tensor], carry: Carry, training: bool, explore: bool) -> Carry:
        """One decision from tensors alone: preprocessed observations and carry (n,*) -> the new carry."""
        dynamics, embed = self.world_model.dynamics, self.world_model.representation.encoder(data)
        state = dynamics.obs_step(carry.state, carry.action, embed, data["is_first"], self.collect_dyn_sample)
        if self.eval_state_mean and not training:
            state = state._replace(stoch=dynamics.dist(state.logit).mode)
        policy = (self.explorer if explore else self.actor_critic).actor(state.feat)
        if training:
            return Carry(state, self.add_noise(policy.sample(), self.expl_amount))
        return Carry(state, self.add_noise(policy.mode, self.eval_noise))

    def add_noise(self, action: Tensor, amount: float) -> Tensor:
        if amount == 0:
            return action
        if self.discrete:
            return networks.draw_onehot(amount / self.actions + (1.0 - amount) * action)
        return (action + amount * networks.draw_normal(action)).clamp(-1.0, 1.0)

    def update(
        self, batch: dict[str, Tensor], mask: Tensor | None = None, behavior: bool = True, codes: bool = True
    ) -> dict[str, Tensor]:
        """One update of everything from a batch (B,T,*) of replay: world model, probe, actor, critic, exploration.

        `mask` (T,H,W) bool replaces HRSSM's random cube mask; without `behavior` the world model learns alone, and
        without `codes` the autoencoder rests. Only tensors are read and written, always the same ones, so it can be
        recorded.
        """
        first = self.update_autoencoder(batch) if codes else {}
        filtered, metrics = self.world_model.update(batch, self.draw_mask(batch) if mask is None else mask)
        metrics |= first
        if self.probe is not None:
            metrics |= self.probe.update(self.world_model, batch, filtered.start)
        if not behavior:
            return metrics
        metrics |= self.actor_critic.update(self.world_model, filtered.start)
        if self.explorer is not None:
            exploring = self.explorer.update(self.world_model, filtered, batch["action"].to(filtered.embed))
            metrics |= {f"expl_{key}": value for key, value in exploring.items()}
        return metrics

    def update_autoencoder(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One step of the autoencoder, if there is one, on frames of a batch (B,T,*)."""
        autoencoder = self.world_model.autoencoder
        return {} if autoencoder is None else autoencoder.update(self.world_model.pixels(batch["image"]))

    def draw_mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The cube mask (T,H,W) of a batch with `--mask_by` motion, reward or value; None: HRSSM draws its own."""
        cubes = getattr(self.world_model.representation, "cube_mask", None)
        if not isinstance(cubes, hrssm.GuidedMask):
            return None
        data, key = self.world_model.preprocess(batch), next(iter(self.world_model.representation.encoder.image_shapes))
        if cubes.by == "motion":
            return cubes.draw_by(hrssm.motion(data[key], data["is_first"]))
        head = self.world_model.reward_head if cubes.by == "reward" else self.actor_critic.critic

        def score(image: Tensor) -> Tensor:
            with models.autocast(image, self.world_model.bf16):
                embed = self.world_model.representation.encoder({**data, key: image})
                post, _ = self.world_model.dynamics.observe(embed, data["action"], data["is_first"])
                return head(post.feat).mode

        return cubes.draw_by(hrssm.influence(data[key], score))

    @property
    def painter(self) -> tuple[Callable[[Tensor], Tensor] | None, str]:
        """What draws features (...,F) as pictures (...,H,W,C), if anything does, and the key that it reproduces."""
        if self.world_model.draws:
            return self.world_model.draw, "image"
        if self.probe is not None:
            return self.probe.draw, "clean_image"
        return None, ""

    def load_state_dict(self, state: dict, *args, **kwargs):
        """Accepts checkpoints written before tensors were renamed, too."""
        return super().load_state_dict(current_names(state), *args, **kwargs)

    def load_upstream(self, state: dict[str, Tensor]) -> int:
        """Load the weights of an upstream or dreamerv3-torch `latest.pt`; returns the number of tensors.

        Raises UserError naming the keys that do not fit. Neither has optimisers of ours, return statistics or beta.
        """
        theirs = upstream_names(state)
        own = ("probe.", "actor_critic.return_norm.", "explorer.behavior.return_norm.", "world_model.kl_term.")
        ours = {k: v for k, v in self.state_dict().items() if isinstance(v, Tensor) and not k.startswith(own)}
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
                "Use the --method, --configs and sizes they were trained with"
            )
        super().load_state_dict(theirs, strict=False)
        return len(theirs)


def action_width(space: gymnasium.Space) -> int:
    """Length of an action as the networks see it; discrete ones are one-hot."""
    return int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else space.shape[0]  # type: ignore[index]


def make_agent(config, obs_space: gymnasium.spaces.Dict, act_space: gymnasium.Space, device="cpu") -> Agent:
    """Build an agent; constructors take their options by name. Raises UserError for values that cannot work."""
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
    method = getattr(config, "method", "hrssm")  # absent from configurations older than the option
    if method not in METHODS:
        raise ValueError(f"unknown --method {method!r}: {tools.did_you_mean(method, METHODS)}")
    make_representation, make_kl_term = METHODS[method]
    actions = action_width(act_space)
    # The agent must not see the picture without distraction; only the probe learns to draw it.
    shapes = {key: space.shape for key, space in obs_space.items() if key != "clean_image"}
    bf16 = config.precision == 16

    def optimizer(lr: float, eps: float, clip: float) -> dict:
        return {"lr": lr, "eps": eps, "clip": clip, "weight_decay": config.weight_decay, "opt": config.opt}

    model_optimizer = optimizer(config.model_lr, config.opt_eps, config.grad_clip)
    regime, autoencoder = getattr(config, "autoencoder", "none"), None
    if regime != "none" and "image" not in shapes:
        raise ValueError(f"--autoencoder {regime} needs pictures, there are: {', '.join(shapes)}")
    observed = {}
    if regime in ("external", "frozen"):
        if make_representation is models.Reconstruction:
            raise ValueError(f"--method dreamer decodes pictures itself: use --method rssm with --autoencoder {regime}")
        ae_optimizer = model_optimizer | {"lr": config.ae_lr}
        options = tools.options_of(models.Autoencoder, config)
        autoencoder = models.Autoencoder(shapes["image"], bf16=bf16, optimizer=ae_optimizer, **options)
        # Vectors that the user chose stay; of pictures there is the code alone.
        shapes |= {"code": (config.ae_code,)}
        observed = {"cnn_keys": "$^", "mlp_keys": f"code$|{config.encoder['mlp_keys']}"}
    encoder = networks.Encoder(shapes, **config.encoder | observed)
    dynamics = make_dynamics(config, actions, encoder.outdim)
    options = tools.options_of(make_representation, config)
    for ablation in ("nomlr", "nosimsr"):
        if ablation not in options and getattr(config, ablation, False):
            raise ValueError(f"--{ablation} is an ablation of --method hrssm: leave it out with --method {method}")
    representation = make_representation(encoder, dynamics, **options)

    def scalar_head(name: str, dist: str, outscale: float) -> networks.ScalarHead:
        options = tools.options_of(networks.ScalarHead, config, name)
        return networks.ScalarHead(dynamics.feat_size, dist=dist, outscale=outscale, **options)

    def actor_critic() -> models.ActorCritic:
        options = tools.options_of(networks.ActorHead, config, "actor", "action")
        return models.ActorCritic(
            networks.ActorHead(dynamics.feat_size, actions, **options),
            scalar_head("value", config.value_head, 0.0),
            return_norm=config.reward_EMA,
            bf16=bf16,
            actor_optimizer=optimizer(config.actor_lr, config.ac_opt_eps, config.actor_grad_clip),
            value_optimizer=optimizer(config.value_lr, config.ac_opt_eps, config.value_grad_clip),
            **tools.options_of(models.ActorCritic, config),
        )

    decoder = None
    if regime != "none" and make_representation is not models.Reconstruction:
        key = "image" if regime == "internal" else "code"
        keys = {"cnn_keys": "image$", "mlp_keys": "code$"}
        decoder = networks.Decoder(dynamics.feat_size, {key: shapes[key]}, **config.decoder | keys)
    options = tools.options_of(models.WorldModel, config) | {"decoder": decoder, "autoencoder": autoencoder}
    world_model = models.WorldModel(
        representation,
        make_kl_term(**tools.options_of(make_kl_term, config)),
        scalar_head("reward", config.reward_head, 0.0),
        scalar_head("cont", "binary", 1.0),
        bf16=bf16,
        optimizer=model_optimizer,
        frozen=regime == "frozen",
        **options,
    )
    task_behavior, explorer, probe = actor_critic(), None, None
    if config.expl_behavior == "random":
        explorer = exploration.Random(actions, discrete)
    elif config.expl_behavior == "plan2explore":
        sizes = {"stoch": dynamics.stoch_size, "deter": dynamics.deter, "feat": dynamics.feat_size}
        explorer = exploration.Plan2Explore(
            actor_critic(),
            actions=actions,
            sizes=sizes | {"embed": encoder.outdim},
            bf16=bf16,
            optimizer=model_optimizer,
            **tools.options_of(exploration.Plan2Explore, config, "disag", "expl"),
        )
    if config.video_pred_log:
        # Initialising the probe must not change the random draws of the run.
        with torch.random.fork_rng(devices=[]):
            drawn = {key: shape for key, shape in shapes.items() if key != "code"}
            probe = models.Probe(networks.Decoder(dynamics.feat_size, drawn, **config.decoder), model_optimizer)
    options = tools.options_of(Agent, config) | {"expl_until": config.expl_until // config.action_repeat}
    return Agent(world_model, task_behavior, explorer, probe, actions=actions, discrete=discrete, **options)


def make_dynamics(config, actions: int, embed: int) -> networks.RSSM:
    """`--dynamics`; options of the RSSM that no TSSM has are refused by it or have no effect on it."""
    options = {"actions": actions, "embed": embed} | tools.options_of(networks.RSSM, config, "dyn")
    if getattr(config, "dynamics", "rssm") == "rssm":  # absent from configurations older than the option
        return networks.RSSM(**options)
    options |= tools.options_of(networks.TSSM, config, "tssm")
    # A batch has no longer distances, so their biases would never be trained.
    return networks.TSSM(**options | {"window": min(config.tssm_window, config.batch_length)})


def load_agent(agent: Agent, state: dict) -> None:
    """Load the weights of our own checkpoint; the probe, which the run may lack, is left unchanged."""
    kept = {key: value for key, value in agent.state_dict().items() if key.startswith("probe.")}
    agent.load_state_dict({key: value for key, value in state.items() if not key.startswith("probe.")} | kept)


def load_weights(agent: Agent, path: str) -> None:
    """`--init_from`: a `latest.pt` of upstream, of dreamerv3-torch or of this code, or a folder of setup/export.py."""
    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise tools.UserError(f"--init_from {path}: no such file")
    state = tools.read_checkpoint(file, agent.device) if file.suffix != ".safetensors" else load_exported(agent, file)
    if "agent" in state:
        with tools.reading(f"--init_from {path} does not fit this configuration", "use the options of its run"):
            load_agent(agent, state["agent"])
        print(f"Loaded the weights of {path}.", flush=True)
    else:
        with tools.reading(f"--init_from {path} is no checkpoint of an agent", "name a latest.pt"):
            count = agent.load_upstream(state.get("agent_state_dict", state))
        print(f"Loaded {count} tensors from {path}; optimisers and return statistics start afresh.")


def load_exported(agent: Agent, file: Path) -> dict:
    """What a checkpoint would hold of the agent; state of training, which no tensor holds, stays as it is."""
    from safetensors import SafetensorError, torch

    try:
        tensors = torch.load_file(file, device=str(agent.device))
    except (SafetensorError, OSError) as error:
        raise tools.UserError(f"cannot read {file}: {error}") from error
    return {
        "agent": {key: value for key, value in agent.state_dict().items() if not isinstance(value, Tensor)} | tensors
    }


# --- environments ---------------------------------------------------------------------------------------------------


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
        "holdout_clips": config.holdout_clips,
        "eval_resource_files": config.eval_resource_files,
        "distracting_cs_split": config.distracting_cs_split,
        "shadow_size": config.shadow_size,
        "unseen": False,
        "clean_image": config.video_pred_log,
    }


def eval_tasks(config) -> dict[str, str]:
    """Tasks to evaluate, by the name in their metrics; the training task has the name ""."""
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


class Evaluated(NamedTuple):
    """A task to evaluate on; one with held-out clips is evaluated on those of training and on the held-out ones."""

    task: str
    clips: str  # "seen", "unseen", or "" if no clips are held out


def evaluations(config) -> dict[str, Evaluated]:
    """What is evaluated, by a name for its metrics; the training task without held-out clips has the name ""."""
    found = {}
    for name, task in eval_tasks(config).items():
        for clips in ("seen", "unseen") if envs.has_unseen(task, **env_options(config)) else ("",):
            found["/".join(filter(None, [name, clips]))] = Evaluated(task, clips)
    return found


def make_eval_envs(config, evaluated: Evaluated, stream: str = "eval", start: int = 0) -> envs.Vector:
    return make_envs(config, stream, start, evaluated.task, unseen=evaluated.clips == "unseen")


def evaluation_metrics(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """`eval/...` of an evaluation called `name`; that on clips of training counts as `eval/return` too."""
    prefixes = ("eval/seen/", "eval/") if name == "seen" else (f"eval/{name}/" if name else "eval/",)
    return {prefix + key: value for prefix in prefixes for key, value in metrics.items()}


def evaluation_states(vecs: dict[str, envs.Vector]) -> dict[str, list[dict]]:
    """State of the evaluation environments for a checkpoint, taken after each evaluation: an interrupted one starts
    over."""
    return {name: vec.state_dict(np.zeros(vec.num_envs, bool)) for name, vec in vecs.items()}


def restore_evaluation(vecs: dict[str, envs.Vector], states: dict[str, list[dict]]) -> None:
    for name in vecs.keys() & states.keys():
        vecs[name].load_state_dict(states[name])


def make_envs(
    config, stream: str, start: int = 0, task: str = "", n: int = 0, first: int = 0, unseen: bool = False
) -> envs.Vector:
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
        **env_options(config) | {"unseen": unseen},
    )


# --- evaluation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    agent: Agent,
    vec: envs.Vector,
    episodes: int,
    stopped: Callable[[], bool] = lambda: False,
    rows: list[dict] | None = None,
    say: Callable[[str], None] = tools.say,
    finished: list[tuple] | None = None,
) -> tuple[dict, np.ndarray | None]:
    """Mean over the first `episodes` episodes to finish, and the frames (T,H,W,C) of one of them.

    `rows` collects what replay would hold of that one: observations and the actions that led to them. `finished`
    collects return, length and success of every episode. `say` reports the progress of a long evaluation.
    """
    rollout, frames, recording, heartbeat = Rollout(vec), [], True, tools.Heartbeat()
    finished = [] if finished is None else finished
    while len(finished) < episodes and not stopped():
        rollout.begin()
        if recording and vec.render_mode == "rgb_array":
            frames.append(vec.render(0))
            recording = frames[-1] is not None
        elif recording and "image" in rollout.obs:
            frames.append(rollout.obs["image"][0])
        if recording and rows is not None:
            carry = rollout.carry
            action = np.zeros(agent.actions, np.float32) if carry is None else carry.action[0].cpu().numpy()
            rows.append({**{key: value[0] for key, value in rollout.obs.items()}, "action": action})
        action, rollout.carry = agent.policy(rollout.obs, rollout.carry, training=False)
        rollout.send(action)
        _, _, ended = rollout.receive()
        recording = recording and not rollout.over[0]
        finished += [(episode.score, episode.length, episode.success) for episode in ended]
        if heartbeat.due():
            say(f"evaluation: {min(len(finished), episodes)} of {episodes} episodes")
    if len(finished) < episodes:
        return {}, None
    returns, lengths, successes = np.array(finished[:episodes], np.float64).T
    metrics = {"return": returns.mean(), "return_std": returns.std(), "length": lengths.mean()}
    metrics |= {"success": successes.mean(), "episodes": episodes}
    frames = [frame for frame in frames if frame is not None]
    return {k: float(v) for k, v in metrics.items()}, np.stack(frames) if frames else None


def distracted_tasks(config) -> dict[str, str]:
    """Distracted tasks of the control suite that the run is trained and evaluated on, by the name in their metrics."""
    named = {envs.parse_task(config.task).variant: config.task} | (eval_tasks(config) if config.eval_task else {})
    parsed = {name: envs.parse_task(task) for name, task in named.items()}
    return {name: named[name] for name, found in parsed.items() if found.suite == "dmc" and found.variant}


def measure_robustness(agent: Agent, config) -> dict[str, float]:
    """`robustness/<variant>/...` on each distracted task of the run, and on its held-out clips apart.

    The measures of figures/robustness.py, without intervals. Takes no random numbers from the run.
    """
    metrics, options = {}, env_options(config) | {"clean_image": False}
    for name, task in distracted_tasks(config).items():
        for clips in ("seen", "unseen") if envs.has_unseen(task, **options) else ("",):
            episodes = paired.render(task, options | {"unseen": clips == "unseen"})
            found = models.diagnose(agent.world_model, agent.actor_critic, *episodes)
            prefix = "/".join(filter(None, ["robustness", name, clips]))
            metrics |= {f"{prefix}/{measure}": estimate.value for measure, estimate in found.items()}
    return metrics


def open_loop(agent: Agent, rows: list[dict], length: int = 60) -> np.ndarray:
    """Open-loop video (T,n H,W,C) of the first `length` rows of an episode, see `models.Probe.open_loop`."""
    batch = {key: torch.as_tensor(np.stack([row[key] for row in rows[:length]])[None]) for key in rows[0]}
    return agent.probe.open_loop(agent.world_model, batch)[0].cpu().numpy()


def use_trained_task(config) -> None:
    """`--eval_only` with another `--task` than the run's evaluates on that task, as `--eval_task` does."""
    saved = None if config.init_from or not config.logdir else tools.read_config(Path(config.logdir).expanduser())
    if saved is None:
        return
    trained = saved["config"]["task"]
    if config.task != trained:
        config.eval_task, config.task = config.eval_task or [config.task], trained


def evaluate_only(config, logdir: Path, device: torch.device) -> int:
    """Evaluate the run in `logdir`, or `--init_from`; print a table, and write eval_only.json and a video per task."""
    if config.eval_episode_num < 1:
        raise tools.UserError("--eval_only needs episodes: set --eval_episode_num to at least 1")
    checkpoint = None if config.init_from else tools.load_checkpoint(logdir / "latest.pt", device)
    if checkpoint is None and not config.init_from:
        raise tools.UserError(f"{logdir}/latest.pt does not exist: train first, or give weights with --init_from")
    changes = {} if config.init_from else tools.differences(config, logdir)
    if shown := [
        text for key, text in changes.items() if key == "eval_task" or not tools.read_options()[0][key].may_change
    ]:
        print(f"Evaluates with other options than those of the run: {'; '.join(shown)}.", flush=True)
    agent, results, labels, films, episodes = None, {}, [], {}, config.eval_episode_num
    for name, evaluated in evaluations(config).items():
        finished: list[tuple] = []
        vec = make_eval_envs(config, evaluated)
        try:
            if agent is None:
                agent = make_agent(config, vec.observation_space, vec.action_space, device)
                if checkpoint:
                    with tools.reading(f"{logdir}/latest.pt does not fit these options", "leave them out"):
                        load_agent(agent, checkpoint["agent"])
                else:
                    load_weights(agent, config.init_from)
            _, frames = evaluate(agent, vec, episodes, finished=finished)
        finally:
            vec.close()
        labels.append(" ".join(filter(None, evaluated)))
        films |= {} if frames is None or config.simple_log else {re.sub(r"[^\w-]", "_", labels[-1]): frames}
        results[f"eval/{name}" if name else "eval"] = describe_evaluation(config, evaluated, finished[:episodes])
    width = max(map(len, labels))
    print(f"{'task':{width}}  episodes   return      std  95% interval       success  length")
    for label, row in zip(labels, results.values(), strict=True):
        low, high = row["mean_interval"] or (math.nan, math.nan)
        spread = f"{row['mean']:7.1f}  {row['std']:7.1f}  {low:7.1f} {high:7.1f}"
        length = np.mean(row["lengths"])
        print(f"{label:{width}}  {episodes:8}  {spread}  {row['success']:12.2f}  {length:6.0f}")
    step = 0
    if checkpoint:
        count = checkpoint["count"]
        step = count["update"] if config.offline_traindir else count["policy_step"] * config.action_repeat
    paths = [logdir / "eval_only.json", *(logdir / "video" / f"eval_only_{name}_{step}.mp4" for name in films)]
    with tools.writing(logdir):
        about = {"weights": config.init_from or str(logdir / "latest.pt"), "options": vars(config)}
        write_evaluations(paths[0], config, step, episodes, results, **about)
        for path, frames in zip(paths[1:], films.values(), strict=True):
            path.parent.mkdir(exist_ok=True)
            tools.save_mp4(path, frames, 30)
    print("Written:", *paths)
    if config.final_episodes:
        final_evaluation(agent, config, logdir, step)
    return 0


class Player:
    """A trained agent to act with: `env` is its task, `act` chooses an action for an observation of it."""

    def __init__(self, agent: Agent, env: gymnasium.Env):
        self.agent, self.env = agent, env
        self.reset()

    def reset(self) -> None:
        """The next observation begins an episode. Implied by the first one."""
        self.carry: Carry | None = None

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray | int:
        """The policy's mode, as `env.step` takes it, for one observation; remembers the episode so far."""
        batch = {key: np.asarray(value)[None] for key, value in obs.items() if not key.startswith("log_")}
        batch["is_first"] = np.array([self.carry is None])
        action, self.carry = self.agent.policy(batch, self.carry, training=False)
        chosen = action[0].cpu().numpy()
        return int(chosen.argmax()) if self.agent.discrete else chosen


def load(logdir: str | Path, device: str = "cpu", **options) -> Player:
    """The agent of a run, with its environment. `options` replace those of the run. Raises UserError."""
    config = tools.run_config(logdir)
    for name in options.keys() - vars(config).keys():
        raise tools.UserError(f"unknown option {name}: {tools.did_you_mean(name, vars(config))}")
    vars(config).update(options | {"logdir": str(logdir), "init_from": None})
    return make_player(config, device)


def make_player(config, device: torch.device | str) -> Player:
    """The weights of `--logdir` or `--init_from`, and an environment of `--task`. Raises UserError."""
    path = Path(config.logdir or "").expanduser() / "latest.pt"
    checkpoint = None if config.init_from else tools.load_checkpoint(path, device)
    if checkpoint is None and not config.init_from:
        raise tools.UserError(f"{config.logdir} holds no checkpoint")
    env = envs.make(config.task, **env_options(config), seed=config.seed)
    agent = make_agent(config, env.observation_space, env.action_space, device)  # type: ignore[arg-type]
    if checkpoint:
        with tools.reading(f"{path} does not fit these options", "leave them out"):
            load_agent(agent, checkpoint["agent"])
    else:
        load_weights(agent, config.init_from)
    return Player(agent, env)


def record(config, device: torch.device) -> int:
    """`--record`: play episodes of `--task` and write them as the next ones of that folder. Returns the exit code.

    The number of an episode decides its seed, so that it does not matter how many calls write them.
    """
    folder, name, heartbeat, returns = Path(config.record).expanduser(), config.record_policy, tools.Heartbeat(), []
    player = make_player(config, device) if name == "agent" else None
    env = player.env if player else envs.make(config.task, **env_options(config), seed=config.seed)
    first = next_number(folder)
    stream = (config.seed, envs.STREAMS.index("record"))
    seeds = (int(np.random.SeedSequence((*stream, k)).generate_state(1)[0]) for k in itertools.count(first))

    def agent(seed: int) -> recorder.Policy:
        torch.manual_seed(seed)
        player.reset()
        return player.act

    if name.startswith("minari:"):
        played = recorder.from_minari(name.removeprefix("minari:"), env, first)
    else:
        begin = agent if player else recorder.make_policy(name, env, config.task)
        played = (recorder.play(env, begin(seed), seed) for seed in seeds)
    for rows in itertools.islice(played, config.record_episodes):
        with tools.writing(folder):
            write_episode(folder, rows)
        returns.append(rows["reward"].sum())
        if heartbeat.due():
            print(f"{len(returns)} of {config.record_episodes} episodes, return {np.mean(returns):.1f}", flush=True)
    env.close()
    print(
        f"{folder}: {len(returns)} episodes from number {first}, return {np.mean(returns):.1f} +- {np.std(returns):.1f}"
    )
    return 0


def final_evaluation(
    agent: Agent, config, logdir: Path, step: int, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Write final_eval.json: `final_episodes` episodes on every task, unless `stopped()` ends it.

    Starts and random numbers are its own and depend on the seed alone, so it repeats whenever it is made.
    """
    tools.seed_everything(config.seed)
    results = {}
    for name, evaluated in evaluations(config).items():
        finished: list[tuple] = []
        vec = make_eval_envs(config, evaluated, "final")
        try:
            evaluate(agent, vec, config.final_episodes, stopped, finished=finished)
        finally:
            vec.close()
        if stopped():
            return
        kept = finished[: config.final_episodes]
        results[f"eval/{name}" if name else "eval"] = describe_evaluation(config, evaluated, kept)
    path = logdir / "final_eval.json"
    with tools.writing(logdir):
        write_evaluations(path, config, step, config.final_episodes, results)
    print(f"Final evaluation: {path}", flush=True)


def describe_evaluation(config, evaluated: Evaluated, finished: list[tuple]) -> dict:
    """What was evaluated, and the results of all episodes, from their (return, length, success)."""
    returns, lengths, successes = np.array(finished, np.float64).T
    options = env_options(config) | {"unseen": evaluated.clips == "unseen"}
    return {
        "task": evaluated.task,
        "clips": {"held_out": options["unseen"], "names": envs.clip_names(evaluated.task, **options)},
        **summarise(returns),
        "success": successes.mean(),
        "returns": returns.tolist(),
        "lengths": lengths.tolist(),
    }


def write_evaluations(path: Path, config, step: int, episodes: int, evaluations: dict[str, dict], **more) -> None:
    """A JSON file of results of `describe_evaluation` by name, and what made them."""
    about = {"task": config.task, "method": config.method, "seed": config.seed, "step": step, "episodes": episodes}
    about |= {"config_hash": tools.config_hash(config), **tools.provenance(config), **more}
    text = json.dumps(about | {"evaluations": evaluations}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    tools.write_atomic(path, lambda file: file.write(text.encode()))


def summarise(returns: np.ndarray) -> dict:
    """Mean, deviation and interquartile mean of returns (n,); 95% intervals from a bootstrap over the episodes.

    A single episode has none: its intervals are None.
    """
    drawn = np.random.default_rng(0).choice(returns, (2000, len(returns)))

    def interval(values: np.ndarray) -> list[float] | None:
        return np.percentile(values, [2.5, 97.5]).tolist() if len(returns) > 1 else None

    return {
        "mean": returns.mean(),
        "mean_interval": interval(drawn.mean(1)),
        "std": returns.std(),
        "iqm": stats.trim_mean(returns, 0.25),
        "iqm_interval": interval(stats.trim_mean(drawn, 0.25, axis=1)),
    }


# --- learning -------------------------------------------------------------------------------------------------------


def add_prefixes(metrics: dict) -> dict:
    """Add TensorBoard groups to upstream's metric names."""

    def group(name: str) -> str:
        return "loss" if name.endswith("_loss") else "opt" if name.endswith("_grad_norm") else "train"

    return {f"{group(name)}/{name}": value for name, value in metrics.items()}


class Learner:
    """Owns the updates owed to the collected experience, and checks each for NaN and infinity."""

    # The two-hot loss of an infinite reward is finite, so rewards are checked as well.
    EXTREMES = ("train/min_reward", "train/max_reward")

    def __init__(self, agent: Agent, replay: tools.Replay, logger: tools.Logger, config: SimpleNamespace):
        self.agent = agent
        self.replay = replay
        self.logger = logger
        self.actor_start = config.actor_start
        self.pretrain = config.pretrain
        self.ae_pretrain = config.ae_pretrain
        self.ae_until = tools.Until(config.ae_until)
        self.undo = config.on_nan == "skip"
        self.should_train = tools.Every(config.batch_size * config.batch_length / config.train_ratio)
        self.should_pretrain = tools.Once()
        self.updates = 0
        self.owed = 0
        self.skipped = 0  # updates undone because of NaN
        self.unchecked = []  # of the latest updates: step, number, batch, names of metrics, whether each is finite

    def owe(self, policy_step: int) -> None:
        """Count the updates due at `policy_step`, unless some are still owed."""
        if not self.owed:
            self.owed = self.pretrain if self.should_pretrain() else self.should_train(policy_step)

    def learn(self, step: int, stopped: Callable[[], bool] = lambda: False, offline: bool = False) -> bool:
        """Do the updates that are owed at frame `step`; false if `stopped()` ended that early.

        In `offline` training every update is a step.
        """
        if self.agent.world_model.autoencoder is not None and not self.pretrain_autoencoder(stopped):
            return False
        for batch in self.replay.batches(self.owed):
            before = copy.deepcopy(self.state_dict()) if self.undo else None
            which = {"behavior": self.updates >= self.actor_start, "codes": self.ae_until(self.updates)}
            metrics = add_prefixes(self.agent.update(batch, **which))
            self.updates += 1
            self.owed -= 1
            step = self.updates if offline else step
            self.logger.progress(step, self.updates)
            watched = [key for key in metrics if key.startswith(("loss/", "opt/")) or key in self.EXTREMES]
            finite = torch.stack([metrics[key] for key in watched]).isfinite()
            if before is not None and tools.any_rank(not finite.all()):
                self.load_state_dict(before)
                self.skipped += 1
                tools.warn(f"{self.not_finite(step, self.updates, watched, finite)}: undone")
            else:
                self.logger.scalars(metrics)
            if before is None:
                self.unchecked.append((step, self.updates, batch, watched, finite))
                # Kept batches take memory; on the CPU checking never waits.
                if finite.device.type == "cpu" or len(self.unchecked) > 3:
                    self.check()
            if stopped():
                break
        return not self.owed

    def pretrain_autoencoder(self, stopped: Callable[[], bool]) -> bool:
        """Its first `ae_pretrain` updates; false if `stopped()` ended them early."""
        done = int(self.agent.world_model.autoencoder.updates)
        for batch in self.replay.batches(max(0, self.ae_pretrain - done)):
            self.logger.scalars(add_prefixes(self.agent.update_autoencoder(batch)))
            if stopped():
                return False
        return True

    def check(self) -> None:
        """Raise UserError for the first unchecked update that is not finite, and keep its batch in the run's folder."""
        while self.unchecked:
            step, number, batch, watched, finite = self.unchecked.pop(0)
            if not finite.all():
                path = self.logger.logdir / f"nan_{number}.npz"
                with tools.writing(path.parent):
                    np.savez(path, **{key: value.cpu().numpy() for key, value in batch.items()})
                raise tools.UserError(
                    f"{self.not_finite(step, number, watched, finite)}; its batch is in {path}. The last checkpoint "
                    "is from before it: the same command goes on from there, with --on_nan skip such updates are undone"
                )

    @staticmethod
    def not_finite(step: int, number: int, watched: list[str], finite: Tensor) -> str:
        bad = [name.split("/")[1] for name, good in zip(watched, finite.tolist(), strict=True) if not good]
        return f"update {number} at step {step} is not finite ({', '.join(bad)})"

    def state_dict(self) -> dict:
        """All that an update changes."""
        optimizers = {k: v.state_dict() for k, v in self.agent.optimizers.items()}
        return {"agent": self.agent.state_dict(), "optimizers": optimizers}

    def load_state_dict(self, state: dict) -> None:
        self.agent.load_state_dict(state["agent"])
        for name, optimizer in self.agent.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


# --- running --------------------------------------------------------------------------------------------------------


class Run:
    """Everything a training run consists of and a checkpoint restores.

    With several ranks, each has an equal share of the environments, of replay and of every batch, and its own folder;
    `step` and `policy_step` count all ranks, episodes and what concerns replay the own share. Rank 0 evaluates.
    """

    def __init__(self, config, logdir: Path, device: torch.device, rank: int = 0, ranks: int = 1):
        self.config, self.logdir, self.rank, self.ranks = config, logdir, rank, ranks
        self.checkpoint_path = logdir / "latest.pt"
        checkpoint = load_common_checkpoint(self.checkpoint_path, device)
        # A resumed run starts new episodes instead of repeating its first ones.
        resumed_at = checkpoint["count"]["policy_step"] if checkpoint else 0
        self.new = checkpoint is None
        if self.new:
            tools.check_checkpoint_lost(logdir)
        n = config.envs // ranks
        self.rollout = Rollout(make_envs(config, "train", resumed_at, n=n, first=rank * n))
        tasks = evaluations(config) if config.eval_episode_num > 0 and rank == 0 else {}
        self.eval_envs = {name: make_eval_envs(config, task, "eval", resumed_at) for name, task in tasks.items()}
        vec = self.rollout.vec
        self.agent = make_agent(config, vec.observation_space, vec.action_space, device)
        if rank:
            tools.seed_everything(config.seed + rank)  # equal weights, other draws
        if ranks == 1:  # recorded communication between ranks is untried
            self.agent.speed_up(config.compile)
        # A short run does not reserve memory that it cannot fill.
        frames = config.steps + config.eval_every + (config.prefill + 1) * config.action_repeat
        self.replay = tools.Replay(
            capacity=min(config.dataset_size, frames // config.action_repeat + config.envs) // ranks,
            batch_size=config.batch_size // ranks,
            batch_length=config.batch_length,
            num_envs=n,
            seed=config.seed + rank,
            extra_rows=n * (config.time_limit // config.action_repeat + 1),
            device=device,
            smoothing=config.reward_smoothing,
        )
        options = {key: value for key, value in tools.flatten(vars(config)).items() if key != "logdir"}
        self.logger = tools.Logger(logdir, simple=config.simple_log, total_steps=config.steps, options=options)
        self.learner = Learner(self.agent, self.replay, self.logger, config)
        self.should_log = tools.Every(config.log_every // config.action_repeat)
        self.should_reset = tools.Every(config.reset_every)
        # Until this many policy steps actions are random; the first evaluation comes right after.
        self.prefill = max(config.prefill, config.envs)
        self.random = exploration.Random(self.agent.actions, self.agent.discrete)
        self.policy_step = 0
        self.episodes = 0
        self.next_eval = self.prefill
        self.evaluated = -1  # policy step of the last evaluation
        self.worker_restarts = 0
        if checkpoint:
            self.restore(checkpoint)
        elif config.init_from:
            load_weights(self.agent, config.init_from)
        self.eval_states = evaluation_states(self.eval_envs)
        self.saved_at = time.monotonic()
        self.trace = tools.start_trace(logdir / "trace.json", config.profile) if config.profile else None

    @property
    def step(self) -> int:
        """Environment frames, action repeat included."""
        return self.policy_step * self.config.action_repeat

    @property
    def finished(self) -> bool:
        """The last evaluation, at `steps` frames, ends the run."""
        return self.evaluated * self.config.action_repeat >= self.config.steps

    @property
    def evaluation_due(self) -> bool:
        """After prefill, every `eval_every` frames, and at `steps`."""
        return self.policy_step >= self.next_eval or self.step >= self.config.steps

    def save_due(self) -> bool:
        every = 60 * self.config.save_every
        return every > 0 and tools.any_rank(time.monotonic() - self.saved_at > every)

    def robustness_due(self) -> bool:
        """Whether a multiple of `robustness_every` frames was passed since the evaluation before this one."""
        every, before = self.config.robustness_every, self.evaluated * self.config.action_repeat
        return every > 0 and self.rank == 0 and self.step // every > before // every

    def write(self, only: str = "") -> None:
        for vec in (self.rollout.vec, *self.eval_envs.values()):
            self.worker_restarts += vec.restarts
            vec.restarts = 0
        counters = {key: self.count[key] for key in ("policy_step", "update", "episode")}
        counters |= {key: self.count[key] for key in ("skipped", "worker_restarts") if self.count[key]}
        with tools.writing(self.logdir):
            self.logger.write(self.step, only=only, **counters)

    def store(self, env_ids: np.ndarray, action: np.ndarray, reward: np.ndarray) -> None:
        """Add to replay what the environments `env_ids` show, with the actions (n,A) and rewards (n,) on arrival."""
        rows = {key: value for key, value in self.rollout.obs.items() if key != "is_last"}
        rows |= {"action": action, "reward": reward}
        self.replay.add({key: values[env_ids] for key, values in rows.items()}, env_ids)

    def begin_episodes(self) -> None:
        begun, vec = self.rollout.begin(), self.rollout.vec
        if len(begun):
            action = np.zeros((vec.num_envs, self.agent.actions), np.float32)
            self.store(begun, action, np.zeros(vec.num_envs, np.float32))

    def choose_action(self) -> Tensor:
        """Actions (n,A) of the policy, at random while replay is filled before learning begins."""
        rollout = self.rollout
        if self.policy_step < self.prefill:
            return self.random.actor(torch.zeros(rollout.vec.num_envs, 1)).sample()
        if self.should_reset(self.policy_step):
            rollout.carry = None
        action, rollout.carry = self.agent.policy(rollout.obs, rollout.carry, self.policy_step)
        return action

    def receive(self, action: Tensor) -> None:
        """Wait for the environments to carry out `action` (n,A); store and count the step, log finished episodes."""
        reward, lost, ended = self.rollout.receive()
        self.store(np.flatnonzero(~lost), action.cpu().numpy(), reward)
        self.policy_step += len(lost) * self.ranks
        for i in np.flatnonzero(lost):
            self.replay.discard(i)
        for episode in ended:
            self.replay.end(episode.env)
            self.episodes += 1
            metrics = {"return": episode.score, "length": episode.length, "success": episode.success}
            metrics |= {"replay_steps": self.replay.num_transitions, "replay_episodes": self.replay.num_episodes}
            self.logger.scalars({f"episode/{k}": float(v) for k, v in metrics.items()})
        if self.rollout.over.any():
            self.write(only="episode/")
        self.logger.progress(self.step)

    def evaluate(self, stopped: Callable[[], bool]) -> bool:
        """Evaluate on every task and save; false if `stopped()` interrupted it and it has to start over."""
        self.learner.check()
        rng, results, agent = tools.rng_state(), {}, self.agent
        for name, vec in self.eval_envs.items():
            rows = None if agent.probe is None else []
            say = functools.partial(self.logger.say, self.step)
            results[name] = *evaluate(agent, vec, self.config.eval_episode_num, stopped, rows, say), rows
        if stopped():
            tools.set_rng_state(rng)
            return False
        for name, (metrics, frames, rows) in results.items():
            prefix = f"eval/{name}/" if name else "eval/"
            self.logger.scalars(evaluation_metrics(name, metrics))
            if frames is not None:
                self.logger.video(f"{prefix}policy", frames)
            if rows:
                self.logger.video(f"{prefix}openloop", open_loop(agent, rows), fps=10, strip=5)
        self.eval_states = evaluation_states(self.eval_envs)
        self.write(only="eval/")
        if self.robustness_due():
            self.logger.scalars(measure_robustness(agent, self.config))
            self.write(only="robustness/")
        if self.policy_step >= self.next_eval:
            self.next_eval += self.config.eval_every // self.config.action_repeat
        self.evaluated = self.policy_step
        self.save()
        return True

    @property
    def count(self) -> dict[str, int]:
        return {
            "policy_step": self.policy_step,
            "update": self.learner.updates,
            "episode": self.episodes,
            "next_eval": self.next_eval,
            "evaluated": self.evaluated,
            "owed": self.learner.owed,
            "skipped": self.learner.skipped,
            "worker_restarts": self.worker_restarts,
            "ranks": self.ranks,
        }

    @property
    def clocks(self) -> dict:
        clocks = {"should_train": self.learner.should_train, "should_pretrain": self.learner.should_pretrain}
        return clocks | {"should_log": self.should_log, "should_reset": self.should_reset}

    def save(self) -> None:
        self.learner.check()
        learner, rollout = self.learner, self.rollout
        state = learner.state_dict() | {
            "clocks": {k: v.state_dict() for k, v in self.clocks.items()},
            "count": self.count,
            "live": rollout.state_dict(),
            "envs": json.dumps({"train": rollout.vec.state_dict(~rollout.over), "eval": self.eval_states}),
            "logger": self.logger.state_dict(),
            "rng": tools.rng_state(),
        }
        with tools.writing(self.logdir):
            state["replay"] = self.replay.save(self.logdir / "replay")
            tools.save_checkpoint(self.checkpoint_path, state)
        self.saved_at = time.monotonic()

    def restore(self, state: dict) -> None:
        learner = self.learner
        fix = "restore it from a copy, or start anew with --fresh"
        with tools.reading(f"{self.checkpoint_path} does not fit this run", fix):
            count = state["count"]
            if count.get("ranks", self.ranks) != self.ranks:  # absent from older checkpoints
                raise tools.UserError(
                    f"{self.logdir} holds a run of {count['ranks']} processes, not {self.ranks}: start it with "
                    f"torchrun --nproc_per_node {count['ranks']}, or anew in another --logdir"
                )
            learner.load_state_dict(state)
            for name, clock in self.clocks.items():
                clock.load_state_dict(state["clocks"][name])
            self.policy_step, self.episodes = count["policy_step"], count["episode"]
            self.next_eval, self.evaluated = count["next_eval"], count["evaluated"]
            self.worker_restarts = count["worker_restarts"]
            learner.updates, learner.owed, learner.skipped = count["update"], count["owed"], count["skipped"]
            self.logger.load_state_dict(state["logger"])
            self.replay.load(self.logdir / "replay", state["replay"])
            saved = json.loads(state["envs"])
        restore_evaluation(self.eval_envs, saved["eval"])
        running = self.rollout.vec.load_state_dict(saved["train"])
        # An episode goes on if both its environment and its rows in replay came back.
        running &= [i in self.replay.open for i in range(len(running))]
        for i in np.flatnonzero(~running):
            self.replay.end(i)
        self.rollout.load_state_dict(state["live"], running)
        tools.set_rng_state(state["rng"])
        print(f"Resumed {self.logdir} at step {self.step} (update {learner.updates}).", flush=True)

    def close(self) -> None:
        self.rollout.vec.close()
        for vec in self.eval_envs.values():
            vec.close()
        if self.trace is not None:
            self.trace.stop()
        with tools.writing(self.logdir):
            self.logger.close()


def load_common_checkpoint(path: Path, device: torch.device) -> dict | None:
    """The latest checkpoint that all ranks have; a kill may come between their saves."""

    def load(path: Path) -> tuple[dict | None, int]:
        fix = "restore it from a copy, or start anew with --fresh"
        with tools.reading(f"{path} is not a checkpoint of a run", fix):
            checkpoint = tools.load_checkpoint(path, device)
            return checkpoint, checkpoint["count"]["policy_step"] if checkpoint else -1

    def steps(step: int) -> Tensor:
        return tools.gather_ranks(torch.tensor([step]))

    previous = path.with_suffix(".prev.pt")
    checkpoint, step = load(path)
    ahead = step > steps(step).min()
    if ahead:
        checkpoint, step = load(previous)
    if len(steps(step).unique()) > 1:
        raise tools.UserError(f"the ranks have no checkpoint in common beside {path}: start anew in another --logdir")
    if ahead:  # else the next save would keep the newer one, which the others do not have
        os.replace(previous, path)
    return checkpoint


def train(run: Run, stopped: Callable[[], bool]) -> None:
    """Collect and learn until the run is finished; `stopped()` ends it early."""
    learner, rollout = run.learner, run.rollout
    # Ranks stop together, at the beginning of a step.
    at_once = stopped if run.ranks == 1 else lambda: False
    if run.new:
        run.save()  # so that a folder with metrics but without a checkpoint has lost it
        run.new = False
    while not (run.finished or tools.any_rank(stopped())):
        if run.evaluation_due:
            if not run.evaluate(at_once):
                break
            continue
        if run.save_due():
            run.save()
        run.begin_episodes()
        overlap = False
        if run.policy_step >= run.prefill:
            # The first updates may be many, so they run where a stop can interrupt them; what is left is done later.
            overlap = run.config.overlap and learner.updates > 0 and not learner.owed
            learner.owe(run.policy_step)
            if not overlap and not learner.learn(run.step, at_once):
                break
            if run.should_log(run.policy_step):
                run.write()
        action = run.choose_action()
        rollout.send(action)
        learner.check()  # sending has waited for the device anyway
        if run.trace is not None and learner.updates:
            run.trace.step()
        if overlap:
            # Not interruptible: the environments are already ahead of what a checkpoint would hold.
            learner.learn(run.step)
        run.receive(action)
    if not run.finished:
        run.save()


# --- offline --------------------------------------------------------------------------------------------------------


class OfflineRun:
    """A run on logged episodes. No environment is built unless `--offline_behavior` asks to evaluate the policy."""

    rank = 0

    def __init__(self, config, logdir: Path, device: torch.device, rank: int = 0, ranks: int = 1):
        if ranks > 1:
            raise tools.UserError("--offline_traindir trains in one process: start it without torchrun")
        self.config, self.logdir, self.checkpoint_path = config, logdir, logdir / "latest.pt"
        checkpoint = tools.load_checkpoint(self.checkpoint_path, device)
        self.new = checkpoint is None
        if self.new:
            tools.check_checkpoint_lost(logdir)
        self.logged = exploration.load_logged(config, device)
        observed, act_space = self.logged.spaces, self.logged.act_space
        self.eval_envs = {}
        if acts(config) and config.eval_episode_num:
            start = checkpoint["count"]["update"] if checkpoint else 0
            tasks = evaluations(config)
            self.eval_envs = {name: make_eval_envs(config, task, "eval", start) for name, task in tasks.items()}
        for vec in self.eval_envs.values():
            theirs = {key: space.shape for key, space in vec.observation_space.items()}
            ours = {key: space.shape for key, space in observed.items()}
            if ours != theirs or action_width(vec.action_space) != action_width(act_space):
                raise tools.UserError(
                    f"{config.task} shows {theirs} and takes actions {vec.action_space}, the logged episodes hold "
                    f"{ours} and {act_space}: name their --task, or evaluate nothing with --eval_episode_num 0"
                )
        options = copy.copy(config)
        if not self.logged.rewarded:
            print("No rewards were logged: neither the reward loss nor the bisimulation loss is used.", flush=True)
            options.reward_scale, options.nosimsr = 0.0, config.nosimsr or config.method == "hrssm"
        self.agent = make_agent(options, observed, act_space, device)
        self.agent.speed_up(config.compile)
        options = {key: value for key, value in tools.flatten(vars(config)).items() if key != "logdir"}
        self.logger = tools.Logger(logdir, simple=config.simple_log, total_steps=config.steps, options=options)
        self.learner = Learner(self.agent, self.logged.replay, self.logger, config)
        if not config.offline_behavior:
            self.learner.actor_start = math.inf
        self.evaluated = -1
        if checkpoint:
            self.restore(checkpoint)
        elif config.init_from:
            load_weights(self.agent, config.init_from)
        self.eval_states = evaluation_states(self.eval_envs)
        self.saved_at = time.monotonic()

    @property
    def step(self) -> int:
        return self.learner.updates

    @property
    def finished(self) -> bool:
        return self.evaluated >= self.config.steps

    @property
    def evaluation_due(self) -> bool:
        due = self.step % self.config.eval_every == 0 or self.step >= self.config.steps
        return due and self.evaluated < self.step

    def save_due(self) -> bool:
        return 0 < 60 * self.config.save_every < time.monotonic() - self.saved_at

    def next(self) -> int:
        """The update at which something else is due."""
        periods = [every for every in (self.config.eval_every, self.config.log_every) if every]
        return min(self.config.steps, *(self.step // every * every + every for every in periods))

    def write(self, only: str = "") -> None:
        skipped = {"skipped": self.learner.skipped} if self.learner.skipped else {}
        with tools.writing(self.logdir):
            self.logger.write(self.step, only=only, update=self.step, **skipped)

    def evaluate(self, stopped: Callable[[], bool]) -> bool:
        """Measure on the held-out episodes and save; false if `stopped()` interrupted it and it has to start over."""
        self.learner.check()
        rng, played = tools.rng_state(), {}
        for name, vec in self.eval_envs.items():
            played[name], _ = evaluate(self.agent, vec, self.config.eval_episode_num, stopped)
        metrics, curves, frames = measure_offline(self.agent, self.logged, self.config)
        if stopped():
            tools.set_rng_state(rng)
            return False
        self.logger.scalars({f"offline/{key}": value for key, value in metrics.items()})
        for name, values in played.items():
            self.logger.scalars(evaluation_metrics(name, values))
        if frames is not None:
            self.logger.video("offline/openloop", frames, fps=10, strip=models.CONTEXT)
        self.write(only="offline/")
        self.write(only="eval/")
        with tools.writing(self.logdir):
            tools.write_atomic(self.logdir / "openloop.csv", functools.partial(self.add_curves, curves))
        self.eval_states = evaluation_states(self.eval_envs)
        self.evaluated = self.step
        self.save()
        return True

    def add_curves(self, curves: dict[str, np.ndarray], file) -> None:
        """Rows of this evaluation after those of earlier ones: update, horizon, the mean of each error."""
        path, rows = self.logdir / "openloop.csv", []
        if path.exists():
            with open(path, newline="") as before:
                rows = [row for row in csv.DictReader(before) if int(row["update"]) < self.step]
        for h, values in enumerate(zip(*curves.values(), strict=True)):
            row = {"update": self.step, "horizon": h + 1}
            rows.append(row | {key: f"{value:.6g}" for key, value in zip(curves, values, strict=True)})
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in reversed(rows) for key in row))  # a resumed run may have others
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.write(text.getvalue().encode())

    def save(self) -> None:
        self.learner.check()
        count = {"policy_step": 0, "update": self.step, "evaluated": self.evaluated, "skipped": self.learner.skipped}
        state = self.learner.state_dict() | {
            "count": count,
            "logged": self.logged.files,
            "envs": json.dumps(self.eval_states),
            "draws": json.dumps(self.logged.replay.rng.bit_generator.state),
            "logger": self.logger.state_dict(),
            "rng": tools.rng_state(),
        }
        with tools.writing(self.logdir):
            tools.save_checkpoint(self.checkpoint_path, state)
        self.saved_at = time.monotonic()

    def restore(self, state: dict) -> None:
        fix = "restore it from a copy, or start anew with --fresh"
        with tools.reading(f"{self.checkpoint_path} does not fit this run", fix):
            exploration.check_unchanged(state["logged"], self.logged.files)
            self.learner.load_state_dict(state)
            count = state["count"]
            self.learner.updates, self.evaluated = count["update"], count["evaluated"]
            self.learner.skipped = count["skipped"]
            self.logger.load_state_dict(state["logger"])
            self.logged.replay.rng.bit_generator.state = json.loads(state["draws"])
            saved = json.loads(state.get("envs", "{}"))  # absent from older checkpoints
        restore_evaluation(self.eval_envs, saved)
        tools.set_rng_state(state["rng"])
        print(f"Resumed {self.logdir} at update {self.step}.", flush=True)

    def close(self) -> None:
        for vec in self.eval_envs.values():
            vec.close()
        with tools.writing(self.logdir):
            self.logger.close()


def measure_held_out(
    agent: Agent, logged: exploration.Logged, state: str = "", rule: str = ""
) -> dict[str, np.ndarray]:
    """`models.measure_windows` with what the agent draws with, on the pictures that this reproduces."""
    draw, target = agent.painter
    target = target if target in logged.held_out[0] else "image"
    part, background = None, None
    if rule:
        part = models.object_rule(rule)
        background = logged.background(target) if draw else None
    mean = logged.mean_frames.get(target)
    return models.measure_windows(agent.world_model, draw, logged.held_out, mean, target, state, part, background)


def open_loop_logged(agent: Agent, logged: exploration.Logged) -> np.ndarray:
    """Open-loop video (T,3H,W,C) of the first window of the held-out episodes."""
    draw, target = agent.painter
    rows = next(rows for rows in logged.held_out if len(rows["action"]) > models.CONTEXT)
    batch = {key: torch.as_tensor(values[None, : models.CONTEXT + models.HORIZON]) for key, values in rows.items()}
    target = target if target in rows else "image"
    return models.open_loop_video(agent.world_model, draw, batch, target)[0].cpu().numpy()


def measure_offline(agent: Agent, logged: exploration.Logged, config) -> tuple[dict, dict, np.ndarray | None]:
    """Metrics on held-out episodes, error curves (horizons,), and the open-loop video (T,3H,W,C) of the first."""
    state = config.offline_state
    vectors = [key for key, space in logged.spaces.items() if len(space.shape) == 1]
    if state and state not in vectors:
        there = ", ".join(vectors) or "no vectors"
        raise tools.UserError(f"--offline_state {state}: these episodes hold {there}, and pictures, rewards and flags")
    found = measure_held_out(agent, logged, state, config.offline_object)
    metrics, curves = models.summarise_windows(found)
    if state:
        numbers = list(logged.replay.episodes)
        chosen = np.linspace(0, len(numbers) - 1, min(32, len(numbers))).astype(int)
        rows = [logged.replay.rows(numbers[i]) for i in chosen]
        part = models.object_rule(config.offline_object) if config.offline_object else None
        train = models.measure_windows(agent.world_model, None, rows, state=state, part=part)
        metrics |= {f"state_r2_{h}": value for h, value in models.readout_r2(train, found).items()}
    return metrics, curves, open_loop_logged(agent, logged) if agent.painter[0] else None


def train_offline(run: OfflineRun, stopped: Callable[[], bool]) -> None:
    """Learn from logged episodes until the run is finished; `stopped()` ends it early."""
    if run.new:
        run.save()
        run.new = False
    while not (run.finished or stopped()):
        if run.evaluation_due:
            if not run.evaluate(stopped):
                break
            continue
        run.learner.owed = run.next() - run.step
        run.learner.learn(run.step, lambda: stopped() or run.save_due(), offline=True)
        # At step 0 the updates of the autoencoder before all others were interrupted.
        if run.config.log_every and run.step and run.step % run.config.log_every == 0:
            run.write()
        if run.save_due():
            run.save()
    if not run.finished:
        run.save()


# --- the command ----------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise tools.UserError(f"--device {name}: no CUDA device is available here; use --device auto or cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    number, count = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        hint = f"there are {count} CUDA devices, cuda:0 to cuda:{count - 1}" if count > 1 else "there is only cuda:0"
        raise tools.UserError(f"--device {name}: there is no cuda:{number} here; {hint}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def warn_idle_options(method: str, argv: list[str], autoencoder: str = "none", dynamics: str = "rssm") -> None:
    """Warn of flags that only other methods, autoencoders or dynamics read."""
    read = {
        name: {key for part in parts for key in inspect.signature(part).parameters} for name, parts in METHODS.items()
    }
    idle = set().union(*read.values()) - read[method] - {"task", "decoder", "nomlr", "nosimsr"}
    idle -= {"decoder_scale", "motion_weight"} if autoencoder != "none" else set()
    if autoencoder in ("external", "frozen") and "mask_ratio" in read[method]:
        tools.warn(f"--autoencoder {autoencoder}: the agent sees codes instead of pictures, so nothing is masked")
    for option in (token[2:].partition("=")[0] for token in argv if token.startswith("--")):
        if option == "motion_weight" and autoencoder == "external":
            tools.warn("--motion_weight has no effect with --autoencoder external: its loss compares codes")
        if option in idle:
            tools.warn(f"--{option} has no effect with --method {method}")
        if option in ("dyn_cell", "dyn_temp_post") if dynamics == "tssm" else option.startswith("tssm_"):
            tools.warn(f"--{option} has no effect with --dynamics {dynamics}")


def acts(config) -> bool:
    """Whether training or evaluation needs the environment."""
    return not config.offline_traindir or config.offline_behavior


def check_tasks(config) -> None:
    """Raise EnvError or UserError if a task of the run cannot be made."""
    for task, clips in {(config.task, ""), *evaluations(config).values()}:
        envs.prepare(task, **env_options(config) | {"total_frames": 1, "unseen": clips == "unseen"})
    held_out = config.holdout_clips or config.eval_resource_files
    if held_out and not any(clips for _, clips in evaluations(config).values()):
        raise tools.UserError(
            "--holdout_clips and --eval_resource_files need a --task or --eval_task that shows clips: dmc_..._video"
        )
    if config.robustness_every and not distracted_tasks(config):
        raise tools.UserError("--robustness_every needs a --task or --eval_task with distraction: dmc_..._video")


def prepare(config) -> torch.device:
    """Check what can be checked before workers start, and set up torch."""
    if not (config.logdir or (config.record and (config.init_from or config.record_policy != "agent"))):
        raise tools.UserError("--logdir is missing: say where the run is kept, for example --logdir ./log")
    device = pick_device(config.device)
    if device.type == "cuda" and (config.device.startswith("cuda:") or "LOCAL_RANK" in os.environ):
        envs.render_on(device.index)  # learn and render on one card
    if acts(config) or config.eval_only:
        check_tasks(config)
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
    return device


def start(config, device: torch.device, argv: list[str]) -> tuple[Run | OfflineRun, int]:
    """The run in `--logdir`, new or resumed, and the lock on its folder."""
    logdir = Path(config.logdir).expanduser()
    rank, ranks = tools.start_ranks(device)
    if config.fresh:
        if rank == 0:
            tools.replace_run(logdir)
        tools.any_rank(False)  # the others wait
        config.fresh = False
    for option in ("batch_size", "envs"):
        if getattr(config, option) % ranks:
            raise tools.UserError(f"--{option} {getattr(config, option)} cannot be shared evenly by {ranks} ranks")
    if rank == 0:
        tools.check_config(config, logdir)
    else:
        logdir, config.simple_log = logdir / f"rank{rank}", True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    lock = tools.lock(logdir)
    source = config.offline_traindir or config.task
    print(f"{source} on {device} with {torch.get_num_threads()} threads, logdir {logdir}", flush=True)
    try:
        run = (OfflineRun if config.offline_traindir else Run)(config, logdir, device, rank, ranks)
        if rank == 0:
            # Written only now that the options are known to work: a mistyped one must not claim the folder.
            tools.save_config(config, logdir, argv)
    except BaseException:
        os.close(lock)
        raise
    return run, lock


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    received = []

    def note(number: int, _) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        received.append(number)

    argv = sys.argv[1:] if argv is None else argv
    try:
        config = tools.load_config(argv)
        if config.eval_only:
            use_trained_task(config)
        warn_idle_options(config.method, argv, config.autoencoder, config.dynamics)
        device = prepare(config)
        if config.record:
            return record(config, device)
        if config.eval_only:
            return evaluate_only(config, Path(config.logdir).expanduser(), device)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs
                signal.signal(number, note)
        run, lock = start(config, device, argv)
        try:
            if isinstance(run, OfflineRun):
                train_offline(run, lambda: bool(received))
            else:
                train(run, lambda: bool(received))
            done = tools.read_final_evaluation(run.logdir)
            missing = done is None or (done["step"], done["episodes"]) != (run.step, config.final_episodes)
            wanted = config.final_episodes and acts(config)
            if run.finished and run.rank == 0 and wanted and missing and not received:
                final_evaluation(run.agent, config, run.logdir, run.step, lambda: bool(received))
        except KeyboardInterrupt:
            print("Stopped at once; what came after the last checkpoint is lost. The same command goes on.", flush=True)
            return 128 + signal.SIGINT
        finally:
            run.close()
            os.close(lock)
        tools.stop_ranks()
    except (tools.UserError, envs.EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if received:
        print(f"Stopped by {signal.Signals(received[0]).name}; saved. The same command goes on.", flush=True)
        return 128 + received[0]
    print(
        f"Finished: {config.logdir} has its --steps {config.steps}. To go on, give a larger --steps; to evaluate, "
        "add --eval_only.",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    console.run(main)
