"""The paper: "Learning Latent Dynamic Robust Representations for World Models" (ICML 2024).

Two branches of one RSSM look at the same experience:

* the **mask branch** (trained) sees frames with random space-time cubes greyed out and unrolls the recurrence;
* the **raw branch** (an exponential moving average of the mask branch, never trained) sees the clean frames. It shares
  the mask branch's history: its posterior sits on the mask branch's recurrent state, its prior is one step from there.

Two losses tie them: the **latent-reconstruction loss** (masked features predict clean ones, in a projected space) and
the **bisimulation loss** (distances between features match differences in reward plus distances between what comes
next). Neither needs a pixel decoder, so nothing asks the latent to remember the background. Without this file a
decoder-free Dreamer remains. Shape letters as in `models.py`.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tools
from networks import RSSM, Encoder, Representation, State, draw_normal, full, init_truncated

# Rewards of these tasks are scaled inside the bisimulation loss so that their intended maximum is 2. The reward head
# and the returns see raw rewards. Tasks not listed, `rms_pick_cube` included, are not scaled.
REWARD_MAX = {
    "rms_push_cube": 6.5,
    "rms_lift_cube": 6.5,
    "rms_turn_faucet": 10.0,
    "rms_assembling_kits": 10.0,
    "rms_panda_avoid_obstacles": 10.0,
    "rms_peg_insertion_side": 25.0,
    "rms_plug_charger": 50.0,
}


def bisimulation_reward_scale(task: str, reward_max: float = 0.0) -> float:
    """Factor that `bisimulation_loss` applies to rewards of at most `reward_max`; 0: upstream's number for `task`."""
    return 2.0 / (reward_max or REWARD_MAX.get(task, 2.0))


# --- masks and augmentation -----------------------------------------------------------------------------------------


class CubeMask:
    """Random space-time cubes: cells of a coarse grid, hidden for `block` consecutive frames.

    The grid has (height // patch) x (width // patch) cells, of which int(ratio * cells) are hidden, drawn uniformly
    without replacement and independently for each block. A pixel belongs to its nearest grid cell. One mask serves all
    rows of a batch.
    """

    def __init__(self, height: int, width: int, *, patch: int, block: int, ratio: float):
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"--mask_ratio must be between 0 and 1, not {ratio}")
        if not 1 <= patch <= min(height, width):
            raise ValueError(f"--patch_size must be between 1 and the image size {min(height, width)}, not {patch}")
        if block < 1:
            raise ValueError(f"--block_size must be at least 1 frame, not {block}")
        self.size, self.block = (height, width), block
        self.grid = (height // patch, width // patch)
        self.hidden = int(ratio * math.prod(self.grid))

    def draw(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """A fresh mask for `steps` frames, bool (T, H, W), True = hidden. The last block may be cut short."""
        blocks, cells = math.ceil(steps / self.block), math.prod(self.grid)
        # The ranks of uniform noise are a random permutation: exactly `hidden` cells have a rank below `hidden`.
        ranks = torch.rand(blocks, cells, device=device).argsort(-1).argsort(-1)
        return self.expand((ranks < self.hidden).reshape(blocks, *self.grid), steps)

    def expand(self, grids: Tensor, steps: int) -> Tensor:
        """Blow grids up, bool (blocks, rows, columns) -> (T, H, W)."""
        rows, columns = (
            torch.arange(size, device=grids.device) * cells // size
            for size, cells in zip(self.size, self.grid, strict=True)
        )
        pixels = grids[:, rows[:, None], columns[None, :]]
        return pixels.repeat_interleave(self.block, 0)[:steps]


class GuidedMask(CubeMask):
    """Cubes drawn in proportion to the relevance of what they hide, at the same ratio (an open question of the paper).

    `by` says what is relevant: 'motion', or what moves the predicted 'reward' or 'value'. See `Agent.draw_mask`.
    """

    def __init__(self, *args, by: str, **options):
        super().__init__(*args, **options)
        self.by = by

    def draw_by(self, relevance: Tensor) -> Tensor:
        """A mask (T,H,W) bool from relevances (B,T,H,W) >= 0; cells are drawn without replacement."""
        steps = relevance.shape[1]
        # (T, 1, H, W) -> (T, rows, columns); the last block is filled up with zeros
        cells = F.adaptive_avg_pool2d(relevance.mean(0).unsqueeze(1), self.grid).squeeze(1)
        cells = F.pad(cells, (0, 0, 0, 0, 0, -steps % self.block))
        # (blocks, rows * columns); a little of everything, lest nothing is relevant
        weight = cells.unflatten(0, (-1, self.block)).sum(1).flatten(1)
        weight = weight + 1e-3 * weight.mean(1, keepdim=True) + 1e-20
        # Exponential waiting times with these rates end in the order of such draws.
        ranks = (torch.empty_like(weight).exponential_() / weight).argsort(-1).argsort(-1)
        return self.expand((ranks < self.hidden).unflatten(1, self.grid), steps)


def motion(image: Tensor, is_first: Tensor) -> Tensor:
    """How much each pixel (B,T,H,W) of images (B,T,H,W,C) changed since the frame before."""
    change = (image[:, 1:] - image[:, :-1]).abs().mean(-1)
    return F.pad(torch.where(is_first[:, 1:, None, None], 0.0, change), (0, 0, 0, 0, 1, 0))


def influence(image: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """How much each pixel (B,T,H,W) moves `score(image)`: the absolute gradient, summed over channels."""
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        return torch.autograd.grad(score(image).sum(), image)[0].abs().sum(-1)


def _intensity(x: Tensor) -> Tensor:
    noise = draw_normal(x[:, :1, :1, :1]).clamp(-2.0, 2.0)
    return x * (1.0 + 0.05 * noise)


def _affine(x: Tensor) -> Tensor:
    """Rotation and shear up to 5 degrees, translation up to 14% of the image, scale 0.9 to 1.1."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(x), device=x.device, dtype=x.dtype).uniform_(low, high)

    angle, shear = uniform(-5, 5).deg2rad(), uniform(-5, 5).deg2rad().tan()
    scale, dx, dy = uniform(0.9, 1.1), uniform(-0.28, 0.28), uniform(-0.28, 0.28)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack([cos, cos * shear - sin, dx, sin, sin * shear + cos, dy], -1).reshape(-1, 2, 3)
    x = x.permute(0, 3, 1, 2)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False).permute(
        0, 2, 3, 1
    )


def _blur(x: Tensor) -> Tensor:
    """Gaussian blur, 5 x 5, standard deviation 1.5 pixels."""
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3, device=x.device, dtype=x.dtype) / 1.5) ** 2)
    kernel = kernel / kernel.sum()
    x, channels = x.permute(0, 3, 1, 2), x.shape[-1]
    weight = (kernel[:, None] * kernel).expand(channels, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), weight, groups=channels).permute(0, 2, 3, 1)


def _shift(x: Tensor) -> Tensor:
    """Random translation by up to 4 pixels, borders replicated."""
    height, width = x.shape[1:3]
    padded = F.pad(x.permute(0, 3, 1, 2), (4, 4, 4, 4), "replicate").permute(0, 2, 3, 1)
    rows, columns = torch.randint(0, 9, (2, len(x)), device=x.device)
    rows = rows[:, None] + torch.arange(height, device=x.device)
    columns = columns[:, None] + torch.arange(width, device=x.device)
    index = torch.arange(len(x), device=x.device)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


AUGMENTATIONS = {"none": lambda x: x, "intensity": _intensity, "affine": _affine, "blur": _blur, "shift": _shift}


def augment(image: Tensor, names: list[str], prob: float = 1.0) -> Tensor:
    """Apply named augmentations in order to images (..., H, W, C), drawn per frame, each with probability `prob`."""
    x = image.reshape(-1, *image.shape[-3:])
    for name in names:
        changed = AUGMENTATIONS[name](x)
        if prob < 1.0:
            keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= prob
            changed = torch.where(keep, x, changed)
        x = changed
    return x.reshape(image.shape)


# --- losses ---------------------------------------------------------------------------------------------------------


def latent_reconstruction_loss(projected: Tensor, raw_projected: Tensor) -> Tensor:
    """Masked features must predict clean ones: mean of 2 - 2 cos over (B,T,P) projections of both branches."""
    online = F.normalize(projected, dim=-1, eps=1e-3)
    target = F.normalize(raw_projected.detach(), dim=-1, eps=1e-3)
    return ((online - target) ** 2).sum(-1).mean()


def bisimulation_loss(
    post_feat: Tensor,
    raw_post_feat: Tensor,
    prior_feat: Tensor,
    raw_prior_feat: Tensor,
    reward: Tensor,
    discount: float,
) -> Tensor:
    """Distances between features match reward differences plus discounted distances between successors.

    Features (B,T,F), reward (B,T). Over all pairs i, j of the N = B (T-1) steps, with d(x, y) = 1 - cos(x, y):

        mean_ij Huber( d(post_i, raw_post_j) - [ |r_i - r_j| + discount d(prior_i', raw_prior_j') ] )

    where ' is the next step. Gradient reaches `post_feat` alone. As upstream, the reward is that on arrival at step t,
    and pairs across episode boundaries count. With several ranks j runs over the batches of all.
    """

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1).flatten(0, 1)

    post, raw_post = unit(post_feat[:, :-1]), unit(raw_post_feat[:, :-1].detach())
    prior, raw_prior = unit(prior_feat[:, 1:].detach()), unit(raw_prior_feat[:, 1:].detach())
    reward = reward[:, :-1].flatten()
    raw_post, raw_prior, other_reward = map(tools.gather_ranks, (raw_post, raw_prior, reward))
    # (N, F) x (F, N) -> (N, N)
    distance = 1.0 - post @ raw_post.T
    successor = 1.0 - prior @ raw_prior.T
    target = (reward[:, None] - other_reward[None, :]).abs() + discount * successor
    return F.smooth_l1_loss(distance, target)


# --- the two branches -----------------------------------------------------------------------------------------------


class Branches(NamedTuple):
    """`networks.Filtered` of both branches, all (B,T,*). Only the first four, of the mask branch, carry gradients."""

    embed: Tensor
    post: State
    prior: State
    feat: Tensor
    raw_post: State
    raw_prior: State
    raw_feat: Tensor

    @property
    def start(self) -> State:
        """Imagination begins from what the raw branch makes of the clean frames."""
        return self.raw_post


class HybridRSSM(Representation):
    """Mask branch and raw branch over one encoder and one RSSM, with the two losses that tie them.

    Keywords carry upstream's flag names. `mbr_scale` weighs the latent-reconstruction loss, which `nomlr` drops, and
    `simsr_scale` the bisimulation loss, which `nosimsr` drops. Its rewards are scaled by `task` or `simsr_reward_max`.
    `dyn_cont_stoch_size` is the width P of the projection in which latents are reconstructed.
    """

    def __init__(
        self,
        encoder: Encoder,
        dynamics: RSSM,
        *,
        mask_ratio: float,
        mask_by: str,
        patch_size: int,
        block_size: int,
        augmentation: list[str],
        aug_prob: float,
        encoder_tau: float,
        dynamics_tau: float,
        dyn_cont_stoch_size: int,
        mbr_scale: float,
        nomlr: bool,
        simsr_scale: float,
        simsr_discount: float,
        nosimsr: bool,
        simsr_reward_max: float,
        task: str,
    ):
        super().__init__(encoder, dynamics)
        for name in augmentation:
            if name not in AUGMENTATIONS:
                raise ValueError(f"unknown --augmentation {name!r}: use {', '.join(AUGMENTATIONS)} (size is kept)")
        self.projector = nn.Linear(dynamics.feat_size, dyn_cont_stoch_size, bias=False)
        init_truncated(self.projector)
        self.raw_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.raw_dynamics = copy.deepcopy(dynamics).requires_grad_(False)
        self.raw_projector = copy.deepcopy(self.projector).requires_grad_(False)
        sizes = [shape[:2] for shape in encoder.image_shapes.values()]
        kind = CubeMask if mask_by == "uniform" else functools.partial(GuidedMask, by=mask_by)
        self.cube_mask = kind(*sizes[0], patch=patch_size, block=block_size, ratio=mask_ratio) if sizes else None
        self.augmentation = augmentation
        self.aug_prob = aug_prob
        self.encoder_tau = encoder_tau
        self.dynamics_tau = dynamics_tau
        self.nomlr = nomlr
        self.nosimsr = nosimsr
        self.simsr_discount = simsr_discount
        self.reward_scale = bisimulation_reward_scale(task, simsr_reward_max)
        self.scales = {"mbr": mbr_scale, "simsr": simsr_scale}

    def forward(self, data: dict[str, Tensor], mask: Tensor | None = None) -> Branches:
        """Both branches over preprocessed `data`: observations (B,T,*), action (B,T,A), is_first (B,T) bool.

        `mask` (T,H,W) bool, True = hidden, is drawn when not given. Vector observations are never masked.
        """
        embed = self.encoder(self.hide(data, mask))
        post, prior = self.dynamics.observe(embed, data["action"], data["is_first"])
        raw_post, raw_prior = self.raw_branch(data, post.detach())
        return Branches(embed, post, prior, post.feat, raw_post, raw_prior, raw_post.feat)

    def hide(self, obs: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        """The mask branch's view: hidden pixels become 0 (mid grey), then augmentation."""
        if self.cube_mask is None:
            return obs
        image = next(iter(self.encoder.image_shapes))
        if mask is None:
            mask = self.cube_mask.draw(obs[image].shape[1], obs[image].device)
        hidden = dict(obs)
        for key in self.encoder.image_shapes:
            # (B, T, H, W, C) * (T, H, W, C): along the batch alone a product broadcasts fast
            visible = (~mask).to(obs[key].dtype).unsqueeze(-1).expand(obs[key].shape[1:]).contiguous()
            hidden[key] = augment(obs[key] * visible, self.augmentation, self.aug_prob)
        return hidden

    @torch.no_grad()
    def raw_branch(self, data: dict[str, Tensor], post: State) -> tuple[State, State]:
        """Clean frames, EMA weights and the mask branch's history -> posterior and prior (B,T,*), no recurrence.

        The posterior of step t is q(z | h_t, clean frame) on the mask branch's h_t. The prior of step t is one
        transition from the raw posterior of step t-1 (the initial state where an episode starts).
        """
        dynamics, is_first = self.raw_dynamics, data["is_first"]
        action = data["action"].masked_fill(is_first.unsqueeze(-1), 0.0)
        embed = self.raw_encoder(data)
        if dynamics.shared:
            raw_post = dynamics.img_step(dynamics.shift(post, is_first), action, embed=embed)
        else:
            raw_post = dynamics.posterior(post.deter, embed)._replace(memory=post.memory)
        return raw_post, dynamics.img_step(dynamics.shift(raw_post, is_first), action)

    def predict(self, filtered: Branches) -> dict[str, Tensor]:
        """Projections (B,T,P) of both branches' features."""
        if self.nomlr:
            return {}
        projected, raw_projected = self.projector(filtered.feat), self.raw_projector(filtered.raw_feat)
        return {"projected": full(projected), "raw_projected": full(raw_projected)}

    def losses(self, data: dict[str, Tensor], filtered: Branches, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = {}
        if not self.nomlr:
            losses["mbr"] = latent_reconstruction_loss(predicted["projected"], predicted["raw_projected"])
        if not self.nosimsr:
            prior_feat, raw_prior_feat = filtered.prior.feat, filtered.raw_prior.feat
            reward = data["reward"] * self.reward_scale
            losses["simsr"] = bisimulation_loss(
                filtered.feat, filtered.raw_feat, prior_feat, raw_prior_feat, reward, self.simsr_discount
            )
        return losses

    def after_update(self) -> None:
        """Move the raw branch towards the mask branch."""
        tools.ema_update(self.raw_encoder, self.encoder, self.encoder_tau)
        tools.ema_update(self.raw_dynamics, self.dynamics, self.dynamics_tau)
        tools.ema_update(self.raw_projector, self.projector, self.dynamics_tau)
