"""How it learns: `WorldModel` (representation -> losses), the baselines, `ActorCritic` (imagination -> losses).

Shape letters: `B` batch, `T` time, `H` imagination length, `N` flattened B*T, `A` action, `E` embed, `D` deter,
`S` categorical groups, `K` classes, `F` feature = S*K + D, `P` projection.

Time convention. A row holds an observation and the action that led to it:

    t            0        1        2        3    | 0'         row t: obs_t, action_t = a_{t-1 -> t}, reward_t on arrival
    action       0       a0       a1       a2    | 0          rssm.obs_step(state_{t-1}, action_t, embed_t, is_first_t)
    obs         o0       o1       o2       o3    | o0'         heads predict reward_t and cont_t from feat_t
    reward       0       r1       r2       r3    | 0          is_first_t = 1: state_{t-1} and action_t are discarded
    is_first     1        0        0        0    | 1

Each learner has a `loss` that reads tensors and returns scalars, and an `update` that takes one optimiser step. Metrics
are 0-d tensors that stay on the device.
"""

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import tools
from networks import (
    RSSM,
    ActorHead,
    Decoder,
    Encoder,
    Filtered,
    Normal,
    OneHot,
    Representation,
    ScalarHead,
    State,
    bound_action,
    full,
    init_truncated,
    stack_states,
)


def autocast(reference: Tensor, enabled: bool) -> torch.autocast:
    """bfloat16 matrix products inside; parameters, norms, losses and statistics keep full precision."""
    return torch.autocast(reference.device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def frozen(*modules: nn.Module):
    """Gradients flow through these modules, but their parameters collect none."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


Metrics = dict[str, Tensor | float]


def tensor_stats(name: str, x: Tensor) -> dict[str, Tensor]:
    (std, mean), (low, high) = torch.std_mean(x.detach()), torch.aminmax(x.detach())
    return {f"{name}_mean": mean, f"{name}_std": std, f"{name}_min": low, f"{name}_max": high}


# --- KL terms -------------------------------------------------------------------------------------------------------


class FreeBits(nn.Module):
    """KL balancing with free nats (DreamerV3): dyn_scale E[max(dyn, free)] + rep_scale E[max(rep, free)]."""

    def __init__(self, *, dyn_scale: float, rep_scale: float, kl_free: float):
        super().__init__()
        self.dyn_scale = dyn_scale
        self.rep_scale = rep_scale
        self.kl_free = kl_free

    def forward(self, dyn: Tensor, rep: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        """Weighted losses and metrics from KL(sg(post) || prior) and KL(post || sg(prior)), both (B,T) in nats."""
        rep_loss, dyn_loss = rep.clamp(min=self.kl_free).mean(), dyn.clamp(min=self.kl_free).mean()
        metrics: Metrics = {"kl_free": self.kl_free, "dyn_scale": self.dyn_scale, "rep_scale": self.rep_scale}
        metrics |= {"dyn_loss": dyn_loss.detach(), "rep_loss": rep_loss.detach()}
        return {"dyn": self.dyn_scale * dyn_loss, "rep": self.rep_scale * rep_loss}, metrics

    def after_update(self, kl: Tensor) -> dict[str, Tensor]:
        """Called once after each optimiser step with the mean KL from before it."""
        return {}


class KLConstraint(nn.Module):
    """RePo (Zhu et al., 2023): KL <= kl_target nats, enforced by a dual variable beta.

    The loss is sg(beta) (KL - kl_target) with KL = E[balance dyn + (1 - balance) rep]; log beta then takes one step of
    gradient ascent on the violation. There are no free nats.
    """

    def __init__(self, *, kl_target: float, kl_balance: float, beta_init: float, beta_lr: float):
        super().__init__()
        self.target = kl_target
        self.balance = kl_balance
        self.log_beta = nn.Parameter(torch.tensor(beta_init, dtype=torch.get_default_dtype()).log())
        self.optimizer = tools.Optimizer("beta", [self.log_beta], lr=beta_lr, eps=1e-8, clip=0.0)

    def forward(self, dyn: Tensor, rep: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        """Weighted losses and metrics, as in `FreeBits.forward`."""
        dyn_loss, rep_loss, beta = dyn.mean(), rep.mean(), self.log_beta.detach().exp()
        kl = self.balance * dyn_loss + (1.0 - self.balance) * rep_loss
        metrics: Metrics = {"beta": beta, "dyn_loss": dyn_loss.detach(), "rep_loss": rep_loss.detach()}
        return {"kl": beta * (kl - self.target)}, metrics

    def after_update(self, kl: Tensor) -> dict[str, Tensor]:
        """One step of log beta; over several ranks it follows the mean violation."""
        return self.optimizer.step(-self.log_beta * (kl - self.target))


# --- representations of other methods -------------------------------------------------------------------------------


class Reconstruction(Representation):
    """DreamerV3 (Hafner et al., 2023): the latent reproduces what was observed."""

    def __init__(
        self,
        encoder: Encoder,
        dynamics: RSSM,
        *,
        decoder: dict,
        decoder_scale: float = 1.0,
        motion_weight: float = 0.0,
    ):
        super().__init__(encoder, dynamics)
        self.motion_weight = motion_weight
        self.decoder = Decoder(dynamics.feat_size, encoder.shapes, **decoder)
        if not self.decoder.keys:
            keys = ", ".join(f"{k} {tuple(v)}" for k, v in encoder.shapes.items())
            raise ValueError(f"no observation matches --decoder.cnn_keys or --decoder.mlp_keys; there are: {keys}")
        self.scales = dict.fromkeys(self.decoder.keys, decoder_scale)

    def predict(self, filtered: Filtered) -> dict[str, Tensor]:
        """Reconstructions (B,T,...) of each key."""
        return self.decoder(filtered.feat)

    def losses(self, data: dict[str, Tensor], filtered: Filtered, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {}
        if self.motion_weight:
            keys = self.decoder.image_shapes
            weights = {key: pixel_weights(data[key], data["is_first"], self.motion_weight) for key in keys}
        return {key: loss.mean() for key, loss in self.decoder.losses(predicted, data, weights).items()}


MOVED = 0.1  # of a pixel from 0 to 1, in any channel: it shows something that moves


def pixel_weights(image: Tensor, is_first: Tensor, motion_weight: float) -> Tensor:
    """Weights (B,T,H,W,1), of mean 1 in each picture, of the pixels of `image` (B,T,H,W,C) in a squared error.

    A pixel that has changed by more than `MOVED` since the row before counts 1 + motion_weight times as much as another
    one. Nothing is known of the first row and of those where an episode begins.
    """
    moved = (image[:, 1:] - image[:, :-1]).abs().amax(-1, keepdim=True) > MOVED
    moved &= ~is_first[:, 1:, None, None, None]
    weights = 1.0 + motion_weight * torch.cat([torch.zeros_like(moved[:, :1]), moved], 1).to(image)
    return weights / weights.mean((2, 3), keepdim=True)


def barlow_twins_loss(x: Tensor, y: Tensor, off_diagonal: float) -> Tensor:
    """Barlow Twins (Zbontar et al., 2021) of x and y (N,E): features agree with their twins and no two are redundant.

    With C the cross-correlation (E,E) of the columns, standardised over the batch:

        sum_i (C_ii - 1)^2 + off_diagonal sum_{i != j} C_ij^2

    With several ranks the statistics cover all batches. Only `x` gets gradients.
    """

    def standardise(z: Tensor) -> Tensor:
        return (z - z.mean(0)) / (z.std(0) + 1e-8)

    x, y = standardise(tools.gather_ranks(x, gradient=True)), standardise(tools.gather_ranks(y.detach()))
    samples, features = x.shape
    diagonal = (x * y).sum(0) / samples
    # |x^T y|^2 = <x x^T, y y^T>: products of (N,N) where they are smaller than (E,E)
    squares = ((x @ x.T) * (y @ y.T)).sum() if samples < features else (x.T @ y).square().sum()
    squares = squares / samples**2
    return (diagonal - 1.0).square().sum() + off_diagonal * (squares - diagonal.square().sum())


def infonce_loss(x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al., 2018) of x and y (N,E): each x identifies its y among all of the batch.

    Mean cross-entropy of the logits x_i . y_j with label i. With several ranks j runs over all batches. Only `x` gets
    gradients.
    """
    y = y.detach()
    # Not `F.cross_entropy`, which has no deterministic implementation on CUDA.
    return ((x @ tools.gather_ranks(y).T).logsumexp(1) - (x * y).sum(1)).mean()


class EmbeddingPrediction(Representation):
    """Base of methods that tie projected features to the embedding of the same frame."""

    def __init__(self, encoder: Encoder, dynamics: RSSM):
        super().__init__(encoder, dynamics)
        self.projector = nn.Linear(dynamics.feat_size, encoder.outdim, bias=False)
        init_truncated(self.projector)

    def predict(self, filtered: Filtered) -> dict[str, Tensor]:
        """Projected features (B,T,E)."""
        return {"projected": full(self.projector(filtered.feat))}


class RedundancyReduction(EmbeddingPrediction):
    """R2-Dreamer: Barlow Twins between projected features and embeddings."""

    def __init__(self, encoder: Encoder, dynamics: RSSM, *, barlow_scale: float = 0.05, barlow_lambda: float = 5e-4):
        super().__init__(encoder, dynamics)
        self.off_diagonal = barlow_lambda
        self.scales = {"barlow": barlow_scale}

    def losses(self, data: dict[str, Tensor], filtered: Filtered, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        projected, embed = predicted["projected"].flatten(0, 1), filtered.embed.flatten(0, 1)
        return {"barlow": barlow_twins_loss(projected, embed, self.off_diagonal)}


class InfoNCE(EmbeddingPrediction):
    """InfoNCE between projected features and embeddings."""

    def __init__(self, encoder: Encoder, dynamics: RSSM, *, infonce_scale: float = 1.0):
        super().__init__(encoder, dynamics)
        self.scales = {"infonce": infonce_scale}

    def losses(self, data: dict[str, Tensor], filtered: Filtered, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"infonce": infonce_loss(predicted["projected"].flatten(0, 1), filtered.embed.flatten(0, 1))}


# --- autoencoder ----------------------------------------------------------------------------------------------------

# --autoencoder: what the world model observes, what its decoder draws from a latent, and what that must match.
#   internal   the picture    the picture o      o
#   external   the code c     the code c'        c
#   frozen     the code c     the code c'        o, by the autoencoder's decoder, whose weights are constants
REGIMES = ("none", "internal", "external", "frozen")


class Autoencoder(nn.Module):
    """Picture <-> code (..., K) on single frames, with an optimiser of its own. The world model's losses never move it.

    Outside, codes are standardised by a running mean and deviation, since their scale drifts while it learns.
    """

    mean: Tensor
    variance: Tensor
    updates: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        ae_code: int,
        ae_batch: int,
        encoder: dict,
        decoder: dict,
        bf16: bool,
        optimizer: dict,
    ):
        super().__init__()
        image = {"cnn_keys": "image$", "mlp_keys": "$^"}
        self.encoder = Encoder({"image": shape}, **encoder | image)
        self.bottleneck = nn.Linear(self.encoder.outdim, ae_code)
        self.decoder = Decoder(ae_code, {"image": shape}, **decoder | image)
        init_truncated(self.bottleneck)
        self.batch, self.bf16 = ae_batch, bf16
        self.register_buffer("mean", torch.zeros(ae_code))
        self.register_buffer("variance", torch.ones(ae_code))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.optimizer = tools.Optimizer("ae", self.parameters(), **optimizer)

    def raw_code(self, image: Tensor) -> Tensor:
        """(..., H, W, C) in [-0.5, 0.5] -> (..., K)."""
        with autocast(image, self.bf16):
            return full(self.bottleneck(self.encoder({"image": image})))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """(..., H, W, C) -> standardised code (..., K), a constant."""
        return (self.raw_code(image) - self.mean) / self.deviation

    def decode(self, code: Tensor) -> Tensor:
        """Standardised code (..., K) -> (..., H, W, C). Gradient reaches the code, never the decoder's weights."""
        weights = {name: weight.detach() for name, weight in self.decoder.named_parameters()}
        raw = code * self.deviation + self.mean
        with autocast(code, self.bf16):
            return torch.func.functional_call(self.decoder, weights, (raw,))["image"]

    @property
    def deviation(self) -> Tensor:
        return self.variance.sqrt().clamp(min=1e-3)

    def update(self, image: Tensor) -> dict[str, Tensor]:
        """One step on `ae_batch` frames drawn at random from (..., H, W, C), or on all if there are not more."""
        frames = image.flatten(0, -4)
        if len(frames) > self.batch:
            frames = frames[torch.rand(len(frames), device=frames.device).argsort()[: self.batch]]
        code = self.raw_code(frames)
        with autocast(code, self.bf16):
            drawn = self.decoder(code)["image"]
        metrics = self.optimizer.step((drawn - frames).square().sum((-3, -2, -1)).mean())
        code = tools.gather_ranks(code.detach())
        self.updates += 1
        rate = (1.0 / self.updates).clamp(min=0.01)
        self.mean.lerp_(code.mean(0), rate.to(code))
        self.variance.lerp_((code - self.mean).square().mean(0), rate.to(code))
        return metrics


# --- world model ----------------------------------------------------------------------------------------------------


class WorldModel(nn.Module):
    """A representation with its KL term, reward head and continuation head.

    The loss is reward + continuation + KL + whatever the representation adds, each term times its weight. Heads outside
    `grad_heads` train on detached features.

    With a `decoder` of features (see REGIMES) a reconstruction loss is added: of the picture, or with an `autoencoder`
    of its code, which with `frozen` is compared by what it looks like. The representation then observes `code`.
    """

    def __init__(
        self,
        representation: Representation,
        kl_term: FreeBits | KLConstraint,
        reward_head: ScalarHead,
        cont_head: ScalarHead,
        *,
        reward_scale: float,
        cont_scale: float,
        grad_heads: list[str],
        bf16: bool,
        optimizer: dict,
        decoder: Decoder | None = None,
        decoder_scale: float = 1.0,
        motion_weight: float = 0.0,
        autoencoder: Autoencoder | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        for name in grad_heads:
            if name not in ("reward", "cont", "decoder"):  # a method's decoder always trains the representation
                raise ValueError(f"unknown --grad_heads {name!r}: there are reward, cont and decoder")
        self.representation = representation
        self.reward_head = reward_head
        self.cont_head = cont_head
        self.kl_term = kl_term
        self.scales = {"reward": reward_scale, "cont": cont_scale} | representation.scales
        self.grad_heads = grad_heads
        self.bf16 = bf16
        self.decoder, self.autoencoder, self.frozen = decoder, autoencoder, frozen
        self.motion_weight = motion_weight
        trained = [*representation.parameters(), *reward_head.parameters(), *cont_head.parameters()]
        if decoder is not None:
            self.scales["code" if autoencoder is not None and not frozen else "image"] = decoder_scale
            trained += decoder.parameters()
        self.optimizer = tools.Optimizer("model", [p for p in trained if p.requires_grad], **optimizer)

    @property
    def dynamics(self) -> RSSM:
        return self.representation.dynamics

    @property
    def device(self) -> torch.device:
        return self.reward_head.out.weight.device

    def preprocess(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
        """Fresh tensors on the model's device: uint8 images to [-0.5, 0.5], flags to bool, the rest to floats."""
        dtype, data = torch.get_default_dtype(), {}
        for key, value in batch.items():
            value = tools.to_device(torch.as_tensor(value), self.device)
            if key.startswith("is_"):
                data[key] = value.bool()
            elif value.dtype == torch.uint8:
                data[key] = self.pixels(value)
            else:
                data[key] = value.to(dtype)
        if self.autoencoder is not None and "image" in data:
            data["code"] = self.autoencoder.encode(data["image"])
        return data

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 to [-0.5, 0.5], on the model's device."""
        return tools.to_device(image, self.device).to(torch.get_default_dtype()).div_(255.0).sub_(0.5)

    def loss(self, batch: dict[str, Tensor], mask: Tensor | None = None) -> tuple[Tensor, Filtered, dict[str, Tensor]]:
        """Total loss, the filtered batch and metrics.

        `batch`: image (B,T,H,W,C) uint8 and/or vectors, action (B,T,A), reward (B,T), is_first and is_terminal (B,T).
        `mask` (T,H,W) bool replaces the random cube mask of HRSSM.
        """
        data, dynamics = self.preprocess(batch), self.dynamics
        with autocast(data["reward"], self.bf16):
            filtered = self.representation(data, mask)
            # (B, T, F)
            feat = filtered.feat
            reward = self.reward_head(feat if "reward" in self.grad_heads else feat.detach())
            cont = self.cont_head(feat if "cont" in self.grad_heads else feat.detach())
            predicted = self.representation.predict(filtered)
            decoded = None if self.decoder is None else self.decoder(feat)

        # (B, T)
        post, prior = dynamics.dist(filtered.post.logit), dynamics.dist(filtered.prior.logit)
        rep, dyn = dynamics.kl(post, prior.detach()), dynamics.kl(post.detach(), prior)
        kl_losses, metrics = self.kl_term(dyn, rep)

        losses = {
            "reward": -reward.log_prob(data["reward"]).mean(),
            "cont": -cont.log_prob((~data["is_terminal"]).to(feat.dtype).unsqueeze(-1)).mean(),
        }
        losses |= self.representation.losses(data, filtered, predicted)
        if decoded is not None:
            losses |= self.reconstruction_loss(decoded, data)
        # Weights of 1 cost nothing.
        losses = {k: loss if self.scales[k] == 1.0 else loss * self.scales[k] for k, loss in losses.items()}
        total = sum((*losses.values(), *kl_losses.values()))

        metrics |= {f"{name}_loss": loss.detach() for name, loss in losses.items()}
        metrics |= {"kl": rep.detach().mean()}
        metrics["min_reward"], metrics["max_reward"] = torch.aminmax(data["reward"])
        metrics["prior_ent"] = dynamics.entropy(prior.detach()).mean()
        metrics["post_ent"] = dynamics.entropy(post.detach()).mean()
        return total, filtered, metrics

    def reconstruction_loss(self, decoded: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared error of the picture or of the code, summed over its entries, mean over B and T."""
        if "code" in decoded and not self.frozen:
            return {"code": (decoded["code"] - data["code"]).square().sum(-1).mean()}
        error = (self.picture(decoded) - data["image"]).square()
        if self.motion_weight:
            error = error * pixel_weights(data["image"], data["is_first"], self.motion_weight)
        return {"image": error.sum((-3, -2, -1)).mean()}

    @property
    def draws(self) -> bool:
        """Whether it can draw what a latent shows by a decoder of its own."""
        own = isinstance(self.representation, Reconstruction) and "image" in self.representation.decoder.keys
        return own or self.decoder is not None

    def draw(self, feat: Tensor) -> Tensor:
        """Pictures (...,H,W,C) in [-0.5, 0.5] of features (...,F)."""
        if self.decoder is None:
            assert isinstance(self.representation, Reconstruction)
            return self.representation.decoder(feat)["image"]
        return self.picture(self.decoder(feat))

    def picture(self, decoded: dict[str, Tensor]) -> Tensor:
        """What the decoder of features drew, by way of the autoencoder if that was a code."""
        return self.autoencoder.decode(decoded["code"]) if self.autoencoder is not None else decoded["image"]

    def update(self, batch: dict[str, Tensor], mask: Tensor | None = None) -> tuple[Filtered, dict[str, Tensor]]:
        """One optimiser step, then what follows it. Returns the batch as filtered before the step, detached."""
        loss, filtered, metrics = self.loss(batch, mask)
        metrics |= self.optimizer.step(loss)
        metrics |= self.kl_term.after_update(metrics["kl"])
        self.representation.after_update()
        return type(filtered)(*(x.detach() for x in filtered)), metrics  # type: ignore[arg-type]


# --- actor and critic -----------------------------------------------------------------------------------------------


class ReturnNorm(nn.Module):
    """Running 5% and 95% quantiles of the returns; the scale is their distance, at least 1 (DreamerV3)."""

    quantiles: Tensor
    LEVELS = (0.05, 0.95)

    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        self.register_buffer("quantiles", torch.zeros(2))

    def forward(self, returns: Tensor) -> tuple[Tensor, Tensor]:
        """Update from `returns` (any shape), then give offset and scale, both 0-d."""
        ordered = tools.gather_ranks(returns.detach().flatten()).sort().values
        last, found = len(ordered) - 1, []
        for level in self.LEVELS:
            below = int(level * last)
            found.append(torch.lerp(ordered[below], ordered[min(below + 1, last)], level * last - below))
        self.quantiles.lerp_(torch.stack(found), self.rate)
        low, high = self.quantiles.clone().unbind()
        return low, (high - low).clamp(min=1.0)


class DiscountedSum(torch.autograd.Function):
    """y_k = x_k + d_k y_{k+1} for k = H-1 .. 0, from x and d (H,N) and y_H = `last` (N,)."""

    @staticmethod
    def forward(ctx, x: Tensor, d: Tensor, last: Tensor) -> Tensor:
        sums = [last]
        for x_k, d_k in zip(reversed(x.unbind()), reversed(d.unbind()), strict=True):
            sums.append(torch.addcmul(x_k, d_k, sums[-1]))
        y = torch.stack(sums[::-1])
        ctx.save_for_backward(d, y)
        return y[:-1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        d, y = ctx.saved_tensors
        totals = [gradient[0]]
        for gradient_k, d_k in zip(gradient[1:].unbind(), d[:-1].unbind(), strict=True):
            totals.append(torch.addcmul(gradient_k, d_k, totals[-1]))
        total = torch.stack(totals)
        return total, total * y[1:], total[-1] * d[-1]


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lambda_: float) -> Tensor:
    """G_k = r_{k+1} + d_{k+1} [(1 - lambda) v_{k+1} + lambda G_{k+1}], bootstrapped by the last value.

    All inputs are (H, N) along one imagined trajectory; the result is (H - 1, N).
    """
    known = reward[1:] + (1.0 - lambda_) * discount[1:] * value[1:]
    return DiscountedSum.apply(known, lambda_ * discount[1:], value[-1])


class ActorCritic(nn.Module):
    """Actor and critic trained on imagined trajectories.

    `imag_gradient`: 'dynamics' maximises normalised advantages by back-propagation through the model, 'reinforce' uses
    the score function, 'both' mixes raw returns (share `imag_gradient_mix`) and the score function. As upstream, the
    latter two take returns that are not normalised, and the scored action keeps its gradient.
    """

    updates: Tensor

    def __init__(
        self,
        actor: ActorHead,
        critic: ScalarHead,
        *,
        imag_horizon: int,
        imag_starts: int = 0,
        imag_gradient: str,
        imag_gradient_mix: float,
        imag_sample: bool,
        discount: float,
        discount_lambda: float,
        actor_entropy: float,
        actor_state_entropy: float,
        future_entropy: bool,
        behavior_stop_grad: bool,
        return_norm: bool,
        slow_value_target: bool,
        slow_target_update: int,
        slow_target_fraction: float,
        value_decay: float,
        bf16: bool,
        actor_optimizer: dict,
        value_optimizer: dict,
    ):
        super().__init__()
        if imag_gradient not in ("dynamics", "reinforce", "both"):
            raise ValueError(f"unknown --imag_gradient {imag_gradient!r}: use dynamics, reinforce or both")
        if imag_horizon < 2:
            raise ValueError(f"--imag_horizon must be at least 2, not {imag_horizon}")
        self.actor, self.critic = actor, critic
        self.slow_critic = copy.deepcopy(critic).requires_grad_(False) if slow_value_target else None
        self.return_norm = ReturnNorm() if return_norm else None
        self.imag_horizon = imag_horizon
        self.imag_starts = imag_starts
        self.imag_gradient = imag_gradient
        self.imag_gradient_mix = imag_gradient_mix
        self.imag_sample = imag_sample
        self.behavior_stop_grad = behavior_stop_grad
        self.discount = discount
        self.discount_lambda = discount_lambda
        self.actor_entropy = actor_entropy
        self.actor_state_entropy = actor_state_entropy
        self.future_entropy = future_entropy
        self.value_decay = value_decay
        self.bf16 = bf16
        self.slow_target_update = slow_target_update
        self.slow_target_fraction = slow_target_fraction
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64), persistent=False)
        self.actor_optimizer = tools.Optimizer("actor", actor.parameters(), **actor_optimizer)
        self.value_optimizer = tools.Optimizer("value", critic.parameters(), **value_optimizer)

    def imagine(
        self, dynamics: RSSM, start: State, leaves: list | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor, Normal | OneHot]:
        """Roll the policy out from `start` (N,*): H logits (N,*), features (H,N,F), actions (H,N,A), policies (H,N).

        Into a list `leaves` go (action, draw) of each step, and no gradient leads from an action to the actor.
        """
        states, feats, actions, outputs, at_once = [start], [], [], [], leaves is not None
        # On a CPU what it keeps of many large states would leave the cache, and cost more than it saves.
        fits = start.deter.device.type != "cpu" or start.deter.numel() <= 2**17
        by_hand = at_once and self.imag_sample and dynamics.default_structure and fits
        layers = dynamics.recorded_layers(self.imag_horizon - 1, len(start.deter)) if by_hand else None
        with self.actor.record() if at_once else contextlib.nullcontext() as recorded:
            for k in range(self.imag_horizon):
                feats.append(states[k].feat)
                with torch.no_grad() if at_once else contextlib.nullcontext():
                    outputs.append(self.actor.outputs(feats[k].detach() if self.behavior_stop_grad else feats[k]))
                    policy = self.actor.distribution(outputs[k])
                    draw = policy.draw()
                    actions.append(policy.sample(draw))
                if leaves is not None:
                    leaves.append((actions[k].requires_grad_(), draw))
                if k < self.imag_horizon - 1:
                    step = (states[k], actions[k])
                    recorded_step = dynamics.recorded_step
                    states.append(
                        recorded_step(*step, layers) if layers else dynamics.img_step(*step, self.imag_sample)
                    )
        feat, logits = torch.stack(feats), [state.logit for state in states]
        if layers:
            feat, logit = dynamics.imagined(feat, torch.stack(actions[:-1]), layers)
            logits = [start.logit, *logit]
        out = self.actor.repeat(feat.detach(), recorded) if recorded else torch.stack(outputs)
        return logits, feat, bound_action(torch.stack(actions)), self.actor.distribution(out)

    def loss(
        self, world_model: WorldModel, start: State, reward_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Actor loss, critic loss and metrics from start states (N,*) without gradient. Needs a `frozen` world model.

        `reward_fn(feat, action)` -> (H,N) replaces the reward head.
        """
        with autocast(start.deter, self.bf16):
            # Step by step the actor's backward pass would take as many small operations as there are steps.
            at_once = self.behavior_stop_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
            leaves: list | None = [] if at_once else None
            # (H, N, F), (H, N, A)
            logits, feat, action, policy = self.imagine(world_model.dynamics, start, leaves)
            entropy = policy.entropy()
            reward = reward_fn(feat, action) if reward_fn else world_model.reward_head(feat).mode.squeeze(-1)
            discount = self.discount * world_model.cont_head(feat).mean.squeeze(-1)
            # Shared by both losses; each optimiser only takes gradients of its own parameters.
            critic_out = self.critic.outputs(feat)
        value = self.critic.distribution(critic_out).mode.squeeze(-1)
        state_entropy = None
        if self.actor_state_entropy > 0:
            state_entropy = world_model.dynamics.entropy(world_model.dynamics.dist(torch.stack(logits)))
        if self.future_entropy:
            reward = reward + self.actor_entropy * entropy
            if state_entropy is not None:
                reward = reward + self.actor_state_entropy * state_entropy
        # (H-1, N)
        returns = lambda_return(reward, value, discount, self.discount_lambda)
        weight = torch.cat([torch.ones_like(discount[:1]), discount[:-2]]).cumprod(0).detach()
        metrics = {}

        baseline = value[:-1]
        advantage = returns - baseline
        if self.return_norm is not None:
            offset, scale = self.return_norm(returns)
            advantage = advantage / scale  # the difference of both after normalisation
            metrics |= tensor_stats("normed_target", (returns.detach() - offset) / scale)
            metrics["EMA_005"], metrics["EMA_095"] = self.return_norm.quantiles.clone().unbind()
        if self.imag_gradient == "dynamics":
            objective = advantage
        else:
            objective = policy.log_prob(action)[:-1] * (returns - baseline).detach()
            if self.imag_gradient == "both":
                objective = self.imag_gradient_mix * returns + (1.0 - self.imag_gradient_mix) * objective
                metrics["imag_gradient_mix"] = self.imag_gradient_mix
        if not self.future_entropy:
            objective = objective + self.actor_entropy * entropy[:-1]
            if state_entropy is not None:
                objective = objective + self.actor_state_entropy * state_entropy[:-1]
        actor_loss = -(weight * objective).mean()
        if leaves:
            actions, draws = zip(*leaves, strict=True)
            slopes = torch.autograd.grad(actor_loss, actions, retain_graph=True, materialize_grads=True)
            # A zero with the gradient that reaches the actor through its actions
            by_actions = (torch.stack(slopes) * policy.sample(torch.stack(draws))).sum()
            actor_loss = actor_loss + (by_actions - by_actions.detach())

        critic = self.critic.distribution(critic_out[:-1])
        targets = [returns.detach()]
        if self.slow_critic is not None:
            with torch.no_grad(), autocast(start.deter, self.bf16):
                targets.append(self.slow_critic(feat[:-1]).mode.squeeze(-1))
        log_likelihood = critic.log_prob(torch.stack(targets)).sum(0)
        value_loss = (weight * -log_likelihood).mean()
        if self.value_decay:
            value_loss = value_loss + self.value_decay * (weight * critic.mode.squeeze(-1)).mean()

        metrics |= tensor_stats("value", baseline) | tensor_stats("target", returns)
        metrics |= tensor_stats("imag_reward", reward)
        discrete = self.actor.dist == "onehot"
        metrics |= tensor_stats("imag_action", action.argmax(-1).to(reward.dtype) if discrete else action)
        metrics["actor_entropy"] = entropy.detach().mean()
        if state_entropy is not None:
            metrics["actor_state_entropy"] = self.actor_state_entropy * state_entropy[:-1].detach().mean()
        return actor_loss, value_loss, metrics

    def update(
        self, world_model: WorldModel, start: State, reward_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step for actor and critic from start states (B,T,*), or from `imag_starts` of them drawn at random."""
        self.update_slow_critic()
        start = start.detach().flatten()
        if 0 < self.imag_starts < len(start.deter):
            chosen = torch.rand(len(start.deter), device=start.deter.device).argsort()[: self.imag_starts]
            start = start.select(chosen)
        with frozen(world_model):
            actor_loss, value_loss, metrics = self.loss(world_model, start, reward_fn)
        metrics |= self.actor_optimizer.step(actor_loss, retain_graph=True)
        metrics |= self.value_optimizer.step(value_loss)
        return metrics

    def update_slow_critic(self) -> None:
        """Move the slow critic if due. The counter is a tensor, so that a recorded update can count."""
        if self.slow_critic is not None:
            rate: float | Tensor = self.slow_target_fraction
            if self.slow_target_update > 1:
                rate = rate * (self.updates % self.slow_target_update == 0)
            tools.ema_update(self.slow_critic, self.critic, rate)
        self.updates += 1

    def get_extra_state(self) -> int:
        return int(self.updates)

    def set_extra_state(self, updates: int) -> None:
        self.updates.fill_(updates)


class Probe(nn.Module):
    """A decoder on detached features that shows what the latent state contains; it does not affect the world model.

    It reconstructs `clean_image` if the environment provides it, else the observation, from the states in which
    imagination begins.
    """

    def __init__(self, decoder: Decoder, optimizer: dict):
        super().__init__()
        if not decoder.image_shapes:
            raise ValueError("--video_pred_log needs pictures: set --decoder.cnn_keys image")
        self.decoder = decoder
        self.optimizer = tools.Optimizer("probe", decoder.parameters(), **optimizer)

    def update(self, world_model: WorldModel, batch: dict[str, Tensor], state: State) -> dict[str, Tensor]:
        """One step on a batch (B,T,*) of replay and the latent states (B,T,*) of its rows."""
        target = self.target(world_model.preprocess(batch))
        losses = self.decoder.losses(self.decoder(state.feat.detach()), target)
        return self.optimizer.step(sum(losses.values()).mean())

    def target(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**data, "image": data.get("clean_image", data.get("image"))}

    def draw(self, feat: Tensor) -> Tensor:
        """Pictures (...,H,W,C) in [-0.5, 0.5] of features (...,F)."""
        return self.decoder(feat)[next(iter(self.decoder.image_shapes))]

    def open_loop(self, world_model: WorldModel, batch: dict[str, Tensor], context: int = 10) -> Tensor:
        """`open_loop_video` of what the probe draws."""
        key = "clean_image" if "clean_image" in batch else next(iter(self.decoder.image_shapes))
        return open_loop_video(world_model, self.draw, batch, key, context)


@torch.no_grad()
def open_loop_video(
    world_model: WorldModel,
    draw: Callable[[Tensor], Tensor],
    batch: dict[str, Tensor],
    target: str,
    context: int = 10,
) -> Tensor:
    """Open-loop prediction: frames (B,T,H,W,C) uint8, with several pictures stacked vertically.

    The model filters `context` steps of `batch` (B,T,*), then predicts the rest from the actions alone. From the top:
    observed (if `target`, the truth, is the picture without distraction), truth, model, error (grey means none).
    """
    data = world_model.preprocess(batch)
    truth, model = data[target], draw(open_loop(world_model, data, context).feat).clamp(-0.5, 0.5)
    pictures = [truth, model, (model - truth) / 2.0]
    if target == "clean_image":
        pictures.insert(0, data["image"])
    # (B, T, n H, W, C)
    return ((torch.cat(pictures, 2) + 0.5) * 255.0).round().to(torch.uint8)


def open_loop(world_model: WorldModel, data: dict[str, Tensor], context: int) -> State:
    """Latents (B,T,*) of preprocessed `data`: `context` rows are filtered, the rest is imagined from the actions alone.

    Latents are modes, so the result is deterministic.
    """
    dynamics, steps = world_model.dynamics, data["is_first"].shape[1]
    seen = {key: values[:, :context] for key, values in data.items()}
    # (B, context, E)
    embed = world_model.representation.encoder(seen)
    state, states = dynamics.initial(embed.shape[:1]), []
    for t in range(steps):
        action = data["action"][:, t]
        if t < context:
            state = dynamics.obs_step(state, action, embed[:, t], data["is_first"][:, t], sample=False)
        else:
            state = dynamics.img_step(state, action, sample=False)
        states.append(state)
    return stack_states(states, 1)


# --- held-out episodes ----------------------------------------------------------------------------------------------
# `N` windows of CONTEXT + HORIZON rows, of which the model sees the first CONTEXT and imagines the others.

CONTEXT, HORIZON = 10, 90
HORIZONS = (1, 5, 10, 20, 50, 90)  # of the metrics; openloop.csv has all
WINDOWS = 100  # a large held-out set is evaluated on this many, evenly spread


def choose_windows(lengths: list[int]) -> list[tuple[int, int]]:
    """(episode, first row) of the windows: every CONTEXT rows of each episode, with at least one row to imagine."""
    found = [(e, start) for e, rows in enumerate(lengths) for start in range(0, rows - CONTEXT, CONTEXT)]
    kept = np.linspace(0, len(found) - 1, min(WINDOWS, len(found))).round().astype(int)
    return [found[i] for i in kept]


def cut_window(episodes: list[dict[str, np.ndarray]], number: int, start: int) -> dict[str, np.ndarray]:
    """A window (CONTEXT + HORIZON, ...): what is after the end is the last row, `valid` (HORIZON,) says which is not.

    `other_action` are the actions of another episode, one row later, so that the zeros of its row 0 are not among them.
    """
    rows = np.arange(start, start + CONTEXT + HORIZON)
    own, other = episodes[number], episodes[(number + 1) % len(episodes)]["action"]
    length = len(own["action"])
    window = {key: values[np.minimum(rows, length - 1)] for key, values in own.items()}
    # A single episode lends its actions of half an episode later. Row 0 has none.
    later = rows + (length // 2 if len(episodes) == 1 else 0)
    window["other_action"] = other[1 + later % (len(other) - 1)]
    window["is_first"] = rows == start
    return window | {"valid": rows[CONTEXT:] < length}


@torch.no_grad()
def measure_windows(
    world_model: WorldModel,
    draw: Callable[[Tensor], Tensor] | None,
    episodes: list[dict[str, np.ndarray]],
    mean_frame: Tensor | None = None,
    target: str = "image",
    state: str = "",
    part: "ObjectRule | None" = None,
    background: Tensor | None = None,
    chunk: int = 20,
) -> dict[str, np.ndarray]:
    """What the model makes of held-out `episodes` (T,...): arrays (N,HORIZON), NaN after the end of an episode.

    `kl`, `prior_ent`, `post_ent` (nats), `reward` and `reward_pred` of the filter; `feat` (N,HORIZON,F) in imagination
    and `closed_feat` of the filter, the vector observation named by `state` (N,HORIZON,S), and `episode` (N,). With
    `draw`, which maps features (...,F) to pictures in [-0.5, 0.5], also the errors of pixels in [0, 1] against
    `target`: `closed_*` of the filter, `open_*` in imagination, `shuffled_mse` the same with the actions of another
    episode, `copy_mse` of the last picture seen, `mean_mse` of `mean_frame` (H,W,C), and the part of `open_mse` on
    pixels that have just changed by more than MOVED (`moving_mse`, with the baselines `copy_moving_mse` and
    `mean_moving_mse`) and on the others (`still_mse`). Latents are modes: nothing is drawn at random.

    `part` (see `object_rule`) finds an object in the truth: `object_mse` is `open_mse` on its pixels, `rest_mse` on the
    others, `copy_object_mse` and `mean_object_mse` are the baselines there, and `object_presence` says how much of its
    difference from `background` (H,W,C) is drawn in imagination, `closed_object_presence` by the filter: 1 all, 0
    nothing. A `state` that is the place of the object is NaN where it is not in the picture.
    """
    windows = choose_windows([len(episode["action"]) for episode in episodes])
    if not windows:
        raise tools.UserError(f"no held-out episode has more than {CONTEXT} rows, the context of an open loop")
    parts = []
    for i in range(0, len(windows), chunk):
        cut = [cut_window(episodes, *window) for window in windows[i : i + chunk]]
        batch = {key: torch.from_numpy(np.stack([window[key] for window in cut])) for key in cut[0]}
        valid = batch.pop("valid")
        data = world_model.preprocess(batch)
        values = _measure_batch(world_model, draw, data, mean_frame, target, part, background)
        if state:
            values["state"] = batch[state][:, CONTEXT:]
            if part is not None and part.place == state:
                away = ~within(values["state"]).unsqueeze(-1)
                values["state"] = values["state"].masked_fill(away, math.nan)
        # The axes of a vector come last.
        hidden = {key: ~valid.reshape(*valid.shape, *[1] * (x.dim() - 2)) for key, x in values.items()}
        parts.append({key: x.cpu().masked_fill(hidden[key], math.nan) for key, x in values.items()})
    found = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
    return found | {"episode": np.array([number for number, _ in windows])}


def _measure_batch(
    world_model: WorldModel,
    draw: Callable[[Tensor], Tensor] | None,
    data: dict[str, Tensor],
    mean_frame: Tensor | None,
    target: str,
    part: "ObjectRule | None",
    background: Tensor | None,
) -> dict[str, Tensor]:
    dynamics = world_model.dynamics
    other = data | {"action": data["other_action"]}
    embed = world_model.representation.encoder(data)
    states = dynamics.observe(embed, data["action"], data["is_first"], sample=False)
    post, prior = (dynamics.dist(state.logit[:, CONTEXT:]) for state in states)
    # (N, HORIZON, F)
    closed, imagined = states[0].feat[:, CONTEXT:], open_loop(world_model, data, CONTEXT).feat[:, CONTEXT:]
    values = {"feat": imagined, "closed_feat": closed, "kl": dynamics.kl(post, prior)}
    values |= {"prior_ent": dynamics.entropy(prior), "post_ent": dynamics.entropy(post)}
    values["reward"] = data["reward"][:, CONTEXT:]
    values["reward_pred"] = world_model.reward_head(closed).mode.squeeze(-1)
    if draw is None:
        return values

    def mean_over(values: Tensor, mask: Tensor) -> Tensor:
        return (values * mask).sum((-2, -1)) / mask.sum((-2, -1))

    # (N, HORIZON, H, W, C)
    truth, before = data[target][:, CONTEXT:], data[target][:, CONTEXT - 1 : -1]
    moving = (truth - before).abs().amax(-1) > MOVED
    shown = None if part is None else part.mask(truth, {key: x[:, CONTEXT:] for key, x in data.items()})
    pictures = {"open": draw(imagined), "closed": draw(closed), "copy": before[:, :1]}
    pictures["shuffled"] = draw(open_loop(world_model, other, CONTEXT).feat[:, CONTEXT:])
    if mean_frame is not None:
        pictures["mean"] = mean_frame.to(truth) - 0.5
    for name, picture in pictures.items():
        picture = picture.clamp(-0.5, 0.5)
        error = (picture - truth).square().mean(-1)
        values[f"{name}_mse"] = error.mean((-2, -1))
        if name in ("open", "copy", "mean"):
            baseline = "" if name == "open" else f"{name}_"
            values[f"{baseline}moving_mse"] = mean_over(error, moving)
            if shown is not None:
                values[f"{baseline}object_mse"] = mean_over(error, shown)
        if name in ("open", "closed"):
            values[f"{name}_psnr"] = -10.0 * values[f"{name}_mse"].clamp(min=1e-10).log10()
            values[f"{name}_ssim"] = ssim(picture, truth)
        if name == "open":
            values["still_mse"] = mean_over(error, ~moving)
            if shown is not None:
                values["rest_mse"] = mean_over(error, ~shown)
        if name in ("open", "closed") and shown is not None and background is not None:
            empty = background.to(truth) - 0.5
            drawn, there = (((x - empty) * (truth - empty)).sum(-1) for x in (picture, truth))
            presence = (drawn * shown).sum((-2, -1)) / (there * shown).sum((-2, -1))
            values["object_presence" if name == "open" else "closed_object_presence"] = presence
    return values


class ObjectRule(NamedTuple):
    """Where an object is. `mask`: pictures (...,H,W,C) in [-0.5, 0.5] and data (...,*) of the same rows -> (...,H,W)
    bool. `place`: the vector that holds its position, if it is found by that."""

    mask: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    place: str = ""


def object_rule(text: str) -> ObjectRule:
    """The rule of `--offline_object`, of one of two kinds.

    `r-b>40`: where red is more than 40 of 255 above blue. `ball:5`: the square of 5 pixels around the position in the
    vector `ball`: x from 0 (left) to 1 (right) and y from 0 (top) to 1 (bottom); nowhere if it is outside.
    """
    colour = re.fullmatch(r"([rgb])-([rgb])>(\d+)", text.replace(" ", ""))
    square = re.fullmatch(r"(\w+):(\d+)", text)
    if colour:
        more, less, least = "rgb".index(colour[1]), "rgb".index(colour[2]), int(colour[3]) / 255.0

        def coloured(picture: Tensor, data: Mapping[str, Tensor]) -> Tensor:
            if picture.shape[-1] < 3:
                raise tools.UserError(f"--offline_object {text}: the pictures of these episodes have no colours")
            return picture[..., more] - picture[..., less] > least

        return ObjectRule(coloured)
    if square and int(square[2]) % 2:
        return ObjectRule(
            lambda picture, data: around(data, square[1], int(square[2]), picture.shape[-3:-1]), square[1]
        )
    raise tools.UserError(
        f"{text!r} is no rule for an object: write its colour as r-b>40, or the vector that holds its position and an "
        "odd number of pixels as ball:5"
    )


def around(data: Mapping[str, Tensor], key: str, edge: int, size: Sequence[int]) -> Tensor:
    """Square of `edge` pixels around the positions (...,2) in `data[key]`, in pictures of `size` (H, W): (...,H,W)."""
    if key not in data or data[key].shape[-1] != 2:
        raise tools.UserError(
            f"--offline_object {key}:{edge}: the episodes hold no vector {key} of two numbers, x and y"
        )
    places, (height, width) = data[key], size
    column, row = (places * places.new_tensor([width, height])).floor().unsqueeze(-1).unbind(-2)
    columns, rows = torch.arange(width).to(places), torch.arange(height).to(places)
    near_columns, near_rows = (columns - column).abs() <= edge // 2, (rows - row).abs() <= edge // 2
    return near_rows.unsqueeze(-1) & near_columns.unsqueeze(-2) & within(places)[..., None, None]


def within(places: Tensor) -> Tensor:
    """Whether positions (...,2) are in the picture."""
    return ((places >= 0.0) & (places < 1.0)).all(-1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (...) of pictures (...,H,W,C) whose values span 1 (Wang et al., 2004).

    Gaussian windows of 11 x 11 pixels (or the picture's size), standard deviation 1.5, K 0.01 and 0.03, of each
    channel; mean over all positions where the window fits, and over channels.
    """
    edge = min(11, *x.shape[-3:-1])
    kernel = torch.exp(-0.5 * ((torch.arange(edge).to(x) - (edge - 1) / 2) / 1.5) ** 2)
    kernel = kernel / kernel.sum()

    # (H - edge + 1, H) and (W - edge + 1, W): as products, several times as fast on a CPU as convolutions.
    rows, columns = (torch.eye(size).to(x).unfold(0, edge, 1) @ kernel for size in x.shape[-3:-1])

    def blur(z: Tensor) -> Tensor:
        return rows @ z @ columns.T

    # (..., C, H, W)
    x, y = x.movedim(-1, -3), y.movedim(-1, -3)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, covariance = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean((-3, -2, -1))


def summarise_windows(found: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Metrics of `measure_windows`, and the mean curves (horizons,) of its errors, as far as there are episodes."""

    def mean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
        known = np.isfinite(x)
        return np.where(known, x, 0.0).sum(axis) / np.where(known.any(axis), known.sum(axis), math.nan)

    horizons = np.count_nonzero(np.isfinite(found["kl"]).any(0))
    others = ("feat", "closed_feat", "state", "episode", "reward", "reward_pred")
    curves = {key: mean(values[:, :horizons], 0) for key, values in found.items() if key not in others}
    metrics = {key: float(mean(found[key])) for key in ("kl", "prior_ent", "post_ent")}
    reward, wrong = found["reward"], np.nansum((found["reward"] - found["reward_pred"]) ** 2)
    if spread := np.nansum((reward - np.nanmean(reward)) ** 2):
        metrics["reward_r2"] = float(1.0 - wrong / spread)
    if "open_mse" not in found:
        return metrics, curves
    metrics |= {f"recon_{name}": float(mean(found[f"closed_{name}"])) for name in ("mse", "psnr", "ssim")}
    apart = ("moving_mse", "still_mse", "object_mse", "rest_mse", "object_presence", "closed_object_presence")
    apart += ("copy_moving_mse", "mean_moving_mse", "copy_object_mse", "mean_object_mse")
    for key in ("open_mse", "copy_mse", "mean_mse", "shuffled_mse", *apart):
        if key in curves:
            metrics[key] = float(mean(curves[key]))
    for key in ("open_mse", "open_psnr", "open_ssim", "copy_mse", "mean_mse"):
        if key in curves:
            metrics |= {f"{key}_{h}": float(curves[key][h - 1]) for h in HORIZONS if h <= len(curves[key])}
    return metrics, curves


def readout_r2(train: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, float]:
    """R^2 of a linear readout of `state` (N,HORIZON,S) from features (N,HORIZON,F), on `test`.

    "h" at each of HORIZONS from `feat` in imagination, by one regression on all rows of `train`; "0" from `closed_feat`
    of the filter. Ridge regression on standardised features, with the penalty by which every other episode of `train`
    (`episode` (N,)) is predicted best from the rest. R^2 over the standardised entries together, and of a vector of two
    or three entries, which is a place, also of each entry i by itself, "h_i".
    """
    state, found = torch.from_numpy(test["state"]).double(), {}
    for name, horizons in (("closed_feat", (0,)), ("feat", HORIZONS)):
        known = torch.from_numpy(np.isfinite(train[name]).all(-1) & np.isfinite(train["state"]).all(-1))
        x, y = (torch.from_numpy(train[key]).double()[known] for key in (name, "state"))
        number = torch.from_numpy(train["episode"])[:, None].expand_as(known)[known].unique(return_inverse=True)[1]
        target, other = standardise(y, y), number % 2 == 1
        penalty = best_penalty(x[~other], target[~other], x[other], target[other])
        (predicted,) = ridge(x, target, torch.from_numpy(test[name]).double(), [penalty])
        for h in horizons:
            rows = slice(h - 1, h) if h else slice(None)
            truth, guess = standardise(state, y)[:, rows], predicted[:, rows]
            kept = truth.isfinite().all(-1) & guess.isfinite().all(-1)
            truth, guess = truth[kept], guess[kept]
            if len(truth) > 1:
                wrong, spread = (truth - guess).square().sum(0), (truth - truth.mean(0)).square().sum(0)
                found[f"{h}"] = float(1.0 - wrong.sum() / spread.sum())
                if 2 <= len(wrong) <= 3:
                    found |= {f"{h}_{i}": float(x) for i, x in enumerate(1.0 - wrong / spread)}
    return found


# --- diagnostics ----------------------------------------------------------------------------------------------------
# What a latent knows of the state, and how much a distraction changes it, the action and the value. Measured on E
# episodes of T states, without distraction and under K draws of it, as `envs.paired.render` returns them.
#
# States within an episode depend on each other, so intervals come from resampling episodes. Each measure takes weights
# (R,E) of the episodes and returns one value (R,) for each row of weights.

ACPC_STEPS = 8  # imagined steps of ACPC
START_EVERY = 4  # states between the starts of these imaginations
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # of the ridge probe, beside features of unit variance
FOLDS = 4
NEGLIGIBLE = 1e-6  # a standard deviation or distance below this share of the size is rounding: there is no variation

DIAGNOSTICS = {
    "denoising_factor": "1: the latent depends on the state alone; 0: a distraction moves it as much as another state",
    "acpc": f"0: {ACPC_STEPS} steps imagined from clean and distracted histories agree; 1.41: as of unrelated states",
    "invariance_radius": "0: the same of 95% of them; 1: they reach as far as another state is",
    "probe_r2": "what a linear probe reads of the physical state: 1 all, 0 nothing",
    "reward_r2": "what the reward head explains of the rewards in new episodes: 1 all, 0 or less nothing",
    "action_agreement": "1: the distraction does not change the policy's action; 0: it alone decides",
    "value_agreement": "the same of the critic's value",
}


class Estimate(NamedTuple):
    """A measure with its 95% interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


class Reaction(NamedTuple):
    """What an agent makes of observations (...,E,T,*): float64, on the CPU.

    latent: (...,E,T,F) class probabilities or means, and the recurrent state. imagined: (...,E,M,H,F) latents H steps
    ahead of M of the states. action (...,E,T,A), value and reward (...,E,T,1): policy's mode, critic, reward head.
    """

    latent: Tensor
    imagined: Tensor
    action: Tensor
    value: Tensor
    reward: Tensor


def diagnose(
    world_model: WorldModel,
    actor_critic: ActorCritic,
    clean: dict[str, np.ndarray],
    distracted: dict[str, np.ndarray] | None,
    actions: np.ndarray,
    rewards: np.ndarray,
) -> dict[str, Estimate]:
    """`DIAGNOSTICS` of an agent, from 1000 bootstrap samples of the episodes. Deterministic; draws no random numbers.

    `clean` (E,T,...) and `distracted` (K,E,T,...) are observations of the same states, `actions` (E,T,A) and `rewards`
    (E,T) what led to them. The physical state is all vectors in `clean`, whether the agent sees them or not. A measure
    is NaN where what it relates to does not vary (a constant latent has no denoising factor), as are the agreements of
    an actor that has not been trained. With `distracted` None, only R^2 of probe and reward head on the clean pictures.
    """
    reference, weights = react(world_model, actor_critic, clean, actions), episode_weights(len(actions))
    seen = Reaction(*(x[None] for x in reference))
    if distracted is not None:
        draws = [{key: value[k] for key, value in distracted.items()} for k in range(len(distracted["image"]))]
        reactions = [react(world_model, actor_critic, draw, actions) for draw in draws]
        seen = Reaction(*(torch.stack(parts) for parts in zip(*reactions, strict=True)))
    state = torch.cat([torch.as_tensor(clean[key]) for key in sorted(clean) if not key.endswith("image")], -1)
    # Nothing is earned on arrival at the first state.
    earned = torch.as_tensor(rewards)[:, 1:, None].double()
    values = {
        "probe_r2": probe_r2(seen.latent, state.double(), weights),
        "reward_r2": r2(seen.reward[:, :, 1:], earned, weights),
    }
    if distracted is not None:
        acpc, radius = prediction_consistency(reference.imagined, seen.imagined, weights)
        values |= {"acpc": acpc, "invariance_radius": radius}
        values["denoising_factor"] = denoising_factor(seen.latent, weights)
        trained = int(actor_critic.updates) > 0
        for name, x in (("action_agreement", seen.action), ("value_agreement", seen.value)):
            values[name] = agreement(x if trained else x * torch.nan, weights)
    return {name: estimate(values[name]) for name in DIAGNOSTICS if name in values}


def episode_weights(episodes: int, samples: int = 1000) -> Tensor:
    """Weights (1+samples,E): all episodes once, then how often each is in a bootstrap sample. Always the same."""
    drawn = torch.randint(episodes, (samples, episodes), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(samples, episodes, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return torch.cat([torch.ones(1, episodes, dtype=torch.float64), counts])


def estimate(values: Tensor) -> Estimate:
    """The first of `values` (1+samples,), and the interval of the others."""
    value, drawn = values[0].item(), values[1:][values[1:].isfinite()]
    if math.isnan(value) or not len(drawn):
        return Estimate(math.nan, math.nan, math.nan)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Estimate(value, low, high)


@torch.no_grad()
def react(
    world_model: WorldModel, actor_critic: ActorCritic, obs: dict[str, np.ndarray], actions: np.ndarray
) -> Reaction:
    """Filter observations (E,T,...) as the policy does, with the mode of every latent, and imagine along `actions`.

    All differences between draws come from the picture. Imaginations begin at every `START_EVERY`-th state that is
    followed by `ACPC_STEPS` others (by as many as there are, if episodes are shorter).
    """
    episodes, steps = actions.shape[:2]
    horizon, dynamics = min(ACPC_STEPS, steps - 1), world_model.dynamics
    is_first = (torch.arange(steps) == 0).repeat(episodes, 1)
    data = world_model.preprocess({**obs, "action": actions, "is_first": is_first})
    embed = world_model.representation.encoder(data)
    state, _ = dynamics.observe(embed, data["action"], data["is_first"], sample=False)

    def expected(state: State) -> Tensor:
        dist = dynamics.dist(state.logit)
        return state._replace(stoch=dist.log_probs.exp() if dynamics.classes else dist.mode).feat

    starts = torch.arange(steps - 1 - horizon, -1, -START_EVERY)
    # (E*M,): states among all E*T
    chosen = (torch.arange(episodes)[:, None] * steps + starts).flatten().to(embed.device)
    ahead, along, imagined = state.flatten().select(chosen), data["action"].flatten(0, 1), []
    for k in range(1, horizon + 1):
        ahead = dynamics.img_step(ahead, along[chosen + k], sample=False)
        imagined.append(expected(ahead).unflatten(0, (episodes, len(starts))))
    feat = state.feat
    outputs = actor_critic.actor(feat).mode, actor_critic.critic(feat).mode, world_model.reward_head(feat).mode
    return Reaction(*(x.double().cpu() for x in (expected(state), torch.stack(imagined, 2), *outputs)))


def denoising_factor(latent: Tensor, weights: Tensor) -> Tensor:
    """(other - same) / (other + same) from latents (K,E,T,F), with mean distances (Luo et al., 2025).

    `same` is the distance between latents of one state under different draws, `other` between different states.
    """
    draws, episodes, steps = latent.shape[:3]
    points, states = latent.flatten(0, 2), episodes * steps
    distance = torch.cdist(points, points).reshape(draws, states, draws, states)
    # (K, K, S): distances within one state, zero between a draw and itself
    within = distance.diagonal(dim1=1, dim2=3)
    same = within.sum((0, 1)).reshape(episodes, steps).mean(1) / (draws * (draws - 1))
    same = weights @ same / weights.sum(1)
    other = mean_distance(distance.mean((0, 2)), episodes, weights)
    factor = (other - same) / (other + same)
    return factor.where(other > NEGLIGIBLE * points.norm(dim=-1).mean(), torch.nan)


def mean_distance(distance: Tensor, episodes: int, weights: Tensor) -> Tensor:
    """Mean over pairs of different states, from distances (S,S) of states that are sorted by episode."""
    block = len(distance) // episodes
    distinct = (1.0 - torch.eye(len(distance), dtype=distance.dtype)).reshape(episodes, block, episodes, block)
    sums = (distance.reshape(distinct.shape) * distinct).sum((1, 3))
    # An episode that was drawn twice is no other episode to itself.
    pairs = weights[:, :, None] * weights[:, None, :]
    pairs = pairs - torch.diag_embed(weights.square() - weights)
    return (pairs * sums).sum((1, 2)) / (pairs * distinct.sum((1, 3))).sum((1, 2))


def prediction_consistency(clean: Tensor, distracted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """ACPC and invariance radius from imagined latents, `clean` (E,M,H,F) and `distracted` (K,E,M,H,F).

    ACPC_H = (mean over k = 1..H of |P(z_k) - P(z~_k)|^2)^(1/2), averaged over starts and draws, where z and z~ are
    imagined from the clean and the distracted history of a state under the same actions. P is the expected latent in
    units of its spread over states (root of the total variance of the clean imaginations), so it has no scale that a
    method could shrink, and is the same for all of them: imaginations of unrelated states are sqrt(2) apart. The radius
    is the 95% quantile of these distances divided by the mean distance between clean imaginations of different states.
    """
    episodes, starts, horizon, _ = clean.shape
    # (K, E, M)
    distance = (distracted - clean).square().sum(-1).mean(-1).sqrt()
    paths = clean.flatten(2).flatten(0, 1) / math.sqrt(horizon)
    other = mean_distance(torch.cdist(paths, paths), episodes, weights)
    spread = total_variance(clean.flatten(1, 2)[None], weights).sqrt()
    varies = other > NEGLIGIBLE * paths.norm(dim=-1).mean()
    acpc = weights @ distance.mean((0, 2)) / weights.sum(1) / spread
    ordered, order = distance.transpose(0, 1).flatten().sort()
    share = weights.repeat_interleave(len(distracted) * starts, 1)[:, order].cumsum(1)
    quantile = ordered[torch.searchsorted(share, 0.95 * share[:, -1:]).squeeze(1)]
    return acpc.where(varies, torch.nan), (quantile / other).where(varies, torch.nan)


def total_variance(x: Tensor, weights: Tensor) -> Tensor:
    """Variance over draws and states of x (K,E,T,D), summed over D."""
    x = x - x.mean((0, 1, 2))
    total = weights.sum(1)
    mean = weights @ x.mean((0, 2)) / total[:, None]
    squares = weights @ x.square().sum(-1).mean((0, 2)) / total
    points = total * len(x) * x.shape[2]
    return (squares - mean.square().sum(1)) * points / (points - 1)


def agreement(x: Tensor, weights: Tensor) -> Tensor:
    """1 - (variance over draws) / (total variance) of x (K,E,T,D); NaN if x is constant."""
    within = weights @ x.var(0).sum(-1).mean(1) / weights.sum(1)
    total = total_variance(x, weights)
    return (1.0 - within / total).where(total > NEGLIGIBLE**2 * x.square().sum(-1).mean(), torch.nan)


def r2(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """1 - (squared error) / (squared deviation from the mean), summed over D: (K,E,T,D) predict (E,T,D)."""
    error = weights @ (predicted - target).square().sum(-1).mean((0, 2)) / weights.sum(1)
    variance = total_variance(target[None], weights)
    return (1.0 - error / variance).where(variance > NEGLIGIBLE**2 * target.square().sum(-1).mean(), torch.nan)


def probe_r2(latent: Tensor, state: Tensor, weights: Tensor) -> Tensor:
    """R^2 of a linear probe that reads the state (E,T,D) from latents (K,E,T,F) of episodes that it was not fitted to.

    Each of up to `FOLDS` parts of the episodes is predicted by ridge regression on the others, half of which chose the
    penalty for the other half. All coordinates of the state that vary count alike. NaN for less than three episodes.
    """
    draws, episodes = latent.shape[:2]
    if episodes < 3:
        return torch.full((len(weights),), torch.nan, dtype=latent.dtype)
    state = standardise(state, state.flatten(0, 1))
    target, predicted = state.expand(draws, *state.shape), torch.empty(draws, *state.shape, dtype=latent.dtype)
    number = torch.arange(episodes)
    for fold in range(min(FOLDS, episodes)):
        held_out = number % min(FOLDS, episodes) == fold
        rest = number[~held_out]
        half, other = rest[::2], rest[1::2]
        best = best_penalty(latent[:, half], target[:, half], latent[:, other], target[:, other])
        (predicted[:, held_out],) = ridge(latent[:, rest], target[:, rest], latent[:, held_out], [best])
    return r2(predicted, state, weights)


def standardise(x: Tensor, sample: Tensor) -> Tensor:
    """x (...,F) by mean and deviation of `sample` (N,F); features that do not vary there become 0."""
    mean, std = sample.mean(0), sample.std(0)
    varies = std > NEGLIGIBLE * sample.abs().amax(0)
    return torch.where(varies, (x - mean) / std.where(varies, 1.0), 0.0)


def ridge(x: Tensor, y: Tensor, new: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Fit y (...,D) to standardised x (...,F) for each penalty, and predict from `new` (...,F)."""
    fitted, y = x.flatten(0, -2), y.flatten(0, -2)
    new, fitted = standardise(new, fitted), standardise(fitted, fitted)
    mean, diagonal = y.mean(0), torch.eye(fitted.shape[-1], dtype=x.dtype)
    gram, cross = fitted.T @ fitted / len(fitted), fitted.T @ (y - mean) / len(fitted)
    return [mean + new @ torch.linalg.solve(gram + penalty * diagonal, cross) for penalty in penalties]


def best_penalty(x: Tensor, y: Tensor, new: Tensor, truth: Tensor) -> float:
    """Of `PENALTIES` the one with which `ridge` predicts `truth` (...,D) from `new` best; the first without rows."""
    errors = [(guess - truth).square().mean().item() for guess in ridge(x, y, new, PENALTIES)]
    return PENALTIES[int(np.nanargmin(errors))] if np.isfinite(errors).any() else PENALTIES[0]


def fit_probe(probe: Probe, world_model: WorldModel, batches: Iterable[dict[str, Tensor]]) -> float:
    """Train `probe` alone on replay `batches` (B,T,*) of the unmasked filter; mean loss of the last tenth of them."""
    losses, heartbeat = [], tools.Heartbeat()
    for batch in batches:
        if losses and heartbeat.due():
            tools.say(f"probe: update {len(losses)} | probe_loss {losses[-1]:.4g}")
        with torch.no_grad():
            data = world_model.preprocess(batch)
            embed = world_model.representation.encoder(data)
            post, _ = world_model.dynamics.observe(embed, data["action"], data["is_first"])
        losses.append(probe.update(world_model, batch, post)["probe_loss"].item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
