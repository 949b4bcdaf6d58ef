"""Parts any world-model paper could use: distributions, encoder, decoder, heads, latent dynamics, `Representation`.

Nothing here knows about masks, bisimulation or training. Shape letters: `B` batch, `T` time, `A` action, `E` embed,
`D` deter, `S` categorical groups, `K` classes per group, `F` feature = S*K + D, `...` any leading axes.

All latents and actions are drawn by `draw_onehot` and `draw_normal`; replace them to make these draws reproducible
across implementations. Masks, augmentation and the choice of states are drawn elsewhere. Sizes follow DreamerV3 (Hafner
et al., 2023), on which HRSSM is built.
"""

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-3
# The standard deviation of a standard normal truncated at two sigmas.
TRUNCATED_STD = 0.87962566103423978


# --- random draws ---------------------------------------------------------------------------------------------------


def draw_onehot(probs: Tensor) -> Tensor:
    """One one-hot draw per row of `probs` (..., K), of sum 1, by inverting their cumulative sum. No host sync."""
    cumulative, uniform = probs[..., :-1].cumsum(-1), torch.rand_like(probs[..., :1])
    if few_classes(probs):
        index = (cumulative <= uniform).sum(-1, keepdim=True)
    else:
        index = torch.searchsorted(cumulative, uniform, right=True)
    return torch.zeros_like(probs).scatter_(-1, index, 1.0)


def draw_normal(mean: Tensor) -> Tensor:
    """Standard normal noise in the shape of `mean`."""
    return torch.randn_like(mean)


# --- scalar transforms ----------------------------------------------------------------------------------------------


def symlog(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    return torch.sign(x.detach()) * torch.expm1(torch.abs(x))


def bound_action(action: Tensor) -> Tensor:
    """a / max(1, |a|) with a detached divisor: bounded to [-1, 1], with gradients outside."""
    if not (action.requires_grad and torch.is_grad_enabled()):
        return action.clamp(-1.0, 1.0)
    return action / action.detach().abs().clamp(min=1.0)


def full(x: Tensor) -> Tensor:
    """Cast back to the default dtype: losses and statistics keep full precision under autocast."""
    return x.to(torch.get_default_dtype())


def few_classes(x: Tensor) -> bool:
    """Whether the CPU's kernels along the last axis are slow, as they are for short rows x (..., K)."""
    return not x.is_cuda and x.shape[-1] < 8


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis. For few classes the CPU kernel is five times faster along the first axis."""
    if few_classes(logits):
        return torch.softmax(logits.movedim(-1, 0), 0).movedim(0, -1).contiguous()
    return torch.softmax(logits, -1)


def softmax_backward(gradient: Tensor, probs: Tensor) -> Tensor:
    """The gradient of logits from that of their softmax `probs`."""
    backward = torch.ops.aten._softmax_backward_data.default
    if few_classes(probs):
        return backward(gradient.movedim(-1, 0), probs.movedim(-1, 0), 0, probs.dtype).movedim(0, -1)
    return backward(gradient, probs, -1, probs.dtype)


# --- distributions --------------------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """`apply(value, surrogate)`: the value, with the gradient of the surrogate."""

    @staticmethod
    def forward(ctx, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, gradient


class Pick(torch.autograd.Function):
    """`x.gather(-1, index)` for indices that differ within a row: the gradient is written, not added up."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(-1, index)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).scatter_(-1, index, gradient), None


class OneHot:
    """Categorical over one-hot vectors, `logits` (..., K), mixed with a uniform distribution of weight `unimix`.

    `log_prob` and `entropy` have shape (...). Samples carry straight-through gradients of the mixed probabilities; the
    mode carries those of the mixed log-probabilities (upstream's surrogates, kept).
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0):
        self.logits, self.unimix, self._log_probs = logits, unimix, None
        self.probs = softmax(logits)
        if unimix:
            # (1 - unimix) probs + unimix / K in one operation
            self.probs = torch.rsub(self.probs, unimix / logits.shape[-1], alpha=unimix - 1.0)

    @property
    def log_probs(self) -> Tensor:
        if self._log_probs is None:
            self._log_probs = torch.log(self.probs) if self.unimix else torch.log_softmax(self.logits, -1)
        return self._log_probs

    def detach(self) -> "OneHot":
        """The same distribution without gradients; nothing is recomputed."""
        other = OneHot.__new__(OneHot)
        other.logits, other.unimix = self.logits.detach(), self.unimix
        other.probs, other._log_probs = self.probs.detach(), self.log_probs.detach()
        return other

    def draw(self) -> Tensor:
        return draw_onehot(self.probs.detach())

    def sample(self, draw: Tensor | None = None) -> Tensor:
        return StraightThrough.apply(self.draw() if draw is None else draw, self.probs)

    @property
    def mode(self) -> Tensor:
        onehot = torch.zeros_like(self.probs).scatter_(-1, self.log_probs.argmax(-1, keepdim=True), 1.0)
        return StraightThrough.apply(onehot, self.log_probs)

    def log_prob(self, onehot: Tensor) -> Tensor:
        return self.log_probs.gather(-1, onehot.argmax(-1, keepdim=True)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.probs * self.log_probs).sum(-1)

    def kl(self, other: "OneHot") -> Tensor:
        return (self.probs * (self.log_probs - other.log_probs)).sum(-1)


class Normal:
    """Diagonal Gaussian over the last axis; `log_prob`, `entropy` and `kl` sum over it."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean, std

    def draw(self) -> Tensor:
        return draw_normal(self.mean)

    def sample(self, draw: Tensor | None = None) -> Tensor:
        return torch.addcmul(self.mean, self.std, self.draw() if draw is None else draw)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.std
        return (-0.5 * z**2 - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (0.5 + 0.5 * math.log(2 * math.pi) + self.std.log()).sum(-1)

    def detach(self) -> "Normal":
        return Normal(self.mean.detach(), self.std.detach())

    def kl(self, other: "Normal") -> Tensor:
        ratio = (self.std / other.std) ** 2
        return 0.5 * (ratio + ((self.mean - other.mean) / other.std) ** 2 - 1 - ratio.log()).sum(-1)


class UnitNormal:
    """Scalar regression head, Normal(mean, 1) with `mean` (..., 1)."""

    def __init__(self, mean: Tensor):
        self.mode = mean

    def log_prob(self, x: Tensor) -> Tensor:
        """`x` is (...); returns (...)."""
        return -0.5 * (x - self.mode.squeeze(-1)) ** 2 - 0.5 * math.log(2 * math.pi)


class TwoHot:
    """Scalar regression by classification on 255 symlog-spaced buckets, `logits` (..., 255) (DreamerV3)."""

    LIMIT = 20.0  # of the buckets, which are evenly spaced between -LIMIT and LIMIT

    def __init__(self, logits: Tensor, buckets: Tensor):
        self.logits, self.buckets, self._log_probs = logits, buckets, None

    @property
    def mode(self) -> Tensor:
        """The mean, symexp(sum_k p_k b_k), shape (..., 1)."""
        return symexp((torch.softmax(self.logits, -1) * self.buckets).sum(-1, keepdim=True))

    @property
    def log_probs(self) -> Tensor:
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits, -1)
        return self._log_probs

    def log_prob(self, x: Tensor) -> Tensor:
        """Two-hot log-likelihood of scalars `x` (...), or of several (n,...), without gradient, in the shape of `x`.

        Two buckets share the mass in proportion to their nearness. Out of range the last takes all.
        """
        last = len(self.buckets) - 1
        position = (symlog(x) * (0.5 * last / self.LIMIT) + 0.5 * last).clamp(0.0, last)
        # NaN makes any number here, and stays NaN below.
        low = position.long().clamp(0, last - 1)
        share = position - low
        # (..., 2)
        near = Pick.apply(self.log_probs.expand(*x.shape, -1), torch.stack([low, low + 1], -1))
        return (near * torch.stack([1.0 - share, share], -1)).sum(-1)


class Bernoulli:
    """Elementwise Bernoulli of `logits` (..., 1)."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        return x * self.logits - F.softplus(self.logits)


# --- initialisation and dense blocks --------------------------------------------------------------------------------


def init_truncated(module: nn.Module) -> None:
    """Truncated normal of variance 2 / (fan_in + fan_out); for `Module.apply`."""
    if isinstance(module, nn.Linear):
        fans = module.in_features + module.out_features
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        fans = math.prod(module.kernel_size) * (module.in_channels + module.out_channels)
    else:
        return
    std = math.sqrt(2.0 / fans) / TRUNCATED_STD
    # Upstream truncates convolutions at the absolute value 2, which is practically no truncation.
    limit = 2.0 * std if isinstance(module, nn.Linear) else 2.0
    nn.init.trunc_normal_(module.weight, std=std, a=-limit, b=limit)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def init_uniform(module: nn.Module, scale: float) -> None:
    """Uniform of variance 2 scale / (fan_in + fan_out) for an output layer; scale 0 gives zeros."""
    assert isinstance(module, nn.Linear | nn.ConvTranspose2d)
    limit = math.sqrt(6.0 * scale / sum(nn.init._calculate_fan_in_and_fan_out(module.weight)))
    nn.init.uniform_(module.weight, -limit, limit)
    nn.init.zeros_(module.bias)


def join(parts: list[Tensor]) -> Tensor:
    """Concatenate on the last axis, without a copy if there is nothing to join."""
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def split_linear(blocks: nn.Sequential, sizes: list[int]) -> tuple[Tensor, ...]:
    """The first weight (units, sum(sizes)) split by inputs: W [x; y] = W_x x + W_y y avoids joining x and y."""
    weight: Tensor = blocks[0].weight
    return weight.tensor_split(list(itertools.accumulate(sizes))[:-1], 1)


def dense_blocks(inputs: int, units: int, layers: int, act: str, norm: str) -> nn.Sequential:
    """`layers` times Linear without bias, norm, activation: (..., inputs) -> (..., units)."""
    blocks = []
    for _ in range(layers):
        blocks += [nn.Linear(inputs, units, bias=False), getattr(nn, norm)(units, eps=NORM_EPS), getattr(nn, act)()]
        inputs = units
    return nn.Sequential(*blocks).apply(init_truncated)


# --- observations ---------------------------------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """LayerNorm over the channel axis of (N, C, H, W), each pixel by itself."""

    def __init__(self, channels: int, norm: str = "LayerNorm"):
        super().__init__()
        self.norm = getattr(nn, norm)(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvSame(nn.Conv2d):
    """Stride-2 convolution without bias whose output has ceil(size / 2) pixels; odd padding goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel in zip(x.shape[-2:], self.kernel_size, strict=True):
            total = max((math.ceil(size / 2) - 1) * 2 + kernel - size, 0)
            pads.append((total // 2, total % 2))
        (height, below), (width, right) = pads
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        return F.conv2d(x, self.weight, stride=2, padding=(height, width))


class ConvEncoder(nn.Module):
    """Strided convolutions down to about `minres` pixels: (..., H, W, C) -> (..., outdim)."""

    def __init__(self, shape: tuple[int, int, int], *, depth: int, act: str, norm: str, kernel: int, minres: int):
        super().__init__()
        height, width, channels = shape
        stages = int(math.log2(min(height, width)) - math.log2(minres))
        if stages < 1:
            raise ValueError(f"size {height}x{width} is too small for minres {minres}: it takes at least {2 * minres}")
        layers = []
        for stage in range(stages):
            outputs = depth * 2**stage
            layers += [ConvSame(channels, outputs, kernel), ChannelNorm(outputs, norm), getattr(nn, act)()]
            channels, height, width = outputs, math.ceil(height / 2), math.ceil(width / 2)
        self.layers = nn.Sequential(*layers).apply(init_truncated)
        self.outdim = channels * height * width

    def forward(self, image: Tensor) -> Tensor:
        # (..., H, W, C) -> (N, C, H, W)
        x = image.reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2)
        *layers, activation = self.layers
        for layer in layers:
            x = layer(x)
        # (N, C', H', W') -> (..., C'*H'*W'); activated after the reshape, which changes the memory layout
        return activation(x.reshape(*image.shape[:-3], self.outdim))


def select_keys(shapes: dict[str, tuple], cnn_keys: str, mlp_keys: str) -> tuple[dict, dict]:
    """Image (3-D) and vector (1-D) entries of an observation whose names match the regular expressions (`re.match`)."""
    flags = ("is_first", "is_last", "is_terminal", "reward")
    shapes = {k: tuple(v) for k, v in shapes.items() if k not in flags and not k.startswith("log_")}
    images = {k: v for k, v in shapes.items() if len(v) == 3 and re.match(cnn_keys, k)}
    vectors = {k: v for k, v in shapes.items() if len(v) == 1 and re.match(mlp_keys, k)}
    return images, vectors


def joint_image(shapes: dict[str, tuple], network: str) -> tuple[tuple[int, int], int]:
    """Size and channels of images joined on the channel axis. Raises ValueError if they differ in size."""
    sizes = {shape[:2] for shape in shapes.values()}
    if len(sizes) > 1:
        raise ValueError(f"images of different sizes cannot share one {network}: {shapes}")
    return sizes.pop(), sum(shape[-1] for shape in shapes.values())


class Encoder(nn.Module):
    """Observation dict -> embedding (..., E): images through convolutions, vectors through symlog and an MLP.

    `shapes` maps each key to its shape without leading axes. Images of equal size are joined on the channel axis,
    vectors on the last axis. Raises ValueError when no key matches.
    """

    def __init__(
        self,
        shapes: dict[str, tuple],
        *,
        mlp_keys: str,
        cnn_keys: str,
        act: str,
        norm: str,
        cnn_depth: int,
        kernel_size: int,
        minres: int,
        mlp_layers: int,
        mlp_units: int,
        symlog_inputs: bool,
    ):
        super().__init__()
        self.image_shapes, self.vector_shapes = select_keys(shapes, cnn_keys, mlp_keys)
        self.shapes = shapes
        self.symlog_inputs = symlog_inputs
        self.outdim = 0
        if not self.image_shapes and not self.vector_shapes:
            raise ValueError(
                f"no observation matches --encoder.cnn_keys '{cnn_keys}' or --encoder.mlp_keys '{mlp_keys}'; "
                f"there are: {', '.join(f'{k} {tuple(v)}' for k, v in shapes.items())}"
            )
        if self.image_shapes:
            size, channels = joint_image(self.image_shapes, "encoder")
            self.cnn = ConvEncoder(
                (*size, channels), depth=cnn_depth, act=act, norm=norm, kernel=kernel_size, minres=minres
            )
            self.outdim += self.cnn.outdim
        if self.vector_shapes:
            inputs = sum(shape[0] for shape in self.vector_shapes.values())
            self.mlp = dense_blocks(inputs, mlp_units, mlp_layers, act, norm)
            self.outdim += mlp_units

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        outputs = []
        if self.image_shapes:
            outputs.append(self.cnn(join([obs[k] for k in self.image_shapes])))
        if self.vector_shapes:
            x = join([obs[k] for k in self.vector_shapes])
            outputs.append(self.mlp(symlog(x) if self.symlog_inputs else x))
        return full(join(outputs))


class ConvDecoder(nn.Module):
    """Mirror of `ConvEncoder`: (..., F) -> image (..., H, W, C), values around [-0.5, 0.5]."""

    def __init__(
        self,
        features: int,
        shape: tuple[int, int, int],
        *,
        depth: int,
        act: str,
        norm: str,
        kernel: int,
        minres: int,
        sigmoid: bool = False,
    ):
        super().__init__()
        height, width, channels = shape
        stages = int(math.log2(height) - math.log2(minres))
        if (height, width) != (minres * 2**stages,) * 2:
            raise ValueError(f"the decoder makes square images of {minres} * 2^n pixels, not {height}x{width}")
        self.shape, self.minres, self.sigmoid = shape, minres, sigmoid
        self.depth = depth * 2 ** (stages - 1)
        self.linear = nn.Linear(features, minres**2 * self.depth)
        padding = math.ceil((kernel - 2) / 2)
        layers: list[nn.Module] = []
        inputs = self.depth
        for stage in reversed(range(stages)):
            outputs = depth * 2 ** (stage - 1) if stage else channels
            extra = 2 * padding - (kernel - 2)
            layers.append(
                nn.ConvTranspose2d(
                    inputs, outputs, kernel, stride=2, padding=padding, output_padding=extra, bias=not stage
                )
            )
            if stage:
                layers += [ChannelNorm(outputs, norm), getattr(nn, act)()]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.apply(init_truncated)
        init_uniform(self.layers[-1], 1.0)

    def forward(self, feat: Tensor) -> Tensor:
        # (..., F) -> (N, C', minres, minres)
        x = self.linear(feat).reshape(-1, self.minres, self.minres, self.depth).permute(0, 3, 1, 2)
        # (N, C, H, W) -> (..., H, W, C)
        image = full(self.layers(x)).permute(0, 2, 3, 1).reshape(*feat.shape[:-1], *self.shape)
        return torch.sigmoid(image) - 0.5 if self.sigmoid else image


class Decoder(nn.Module):
    """Features (..., F) -> dict of reconstructions: all images from one `ConvDecoder`, all vectors from one MLP trunk.

    `shapes` maps each key to its shape without leading axes. Raises ValueError when images differ in size.
    `vector_dist` and `image_dist` accept the only values that work upstream: 'symlog_mse' and 'mse'.
    """

    def __init__(
        self,
        features: int,
        shapes: dict[str, tuple],
        *,
        mlp_keys: str,
        cnn_keys: str,
        act: str,
        norm: str,
        cnn_depth: int,
        kernel_size: int,
        minres: int,
        mlp_layers: int,
        mlp_units: int,
        cnn_sigmoid: bool,
        image_dist: str,
        vector_dist: str,
    ):
        super().__init__()
        if image_dist != "mse" or vector_dist != "symlog_mse":
            raise ValueError(f"decoder distributions are mse and symlog_mse, not {image_dist} and {vector_dist}")
        self.image_shapes, self.vector_shapes = select_keys(shapes, cnn_keys, mlp_keys)
        if self.image_shapes:
            size, channels = joint_image(self.image_shapes, "decoder")
            self.cnn = ConvDecoder(
                features,
                (*size, channels),
                depth=cnn_depth,
                act=act,
                norm=norm,
                kernel=kernel_size,
                minres=minres,
                sigmoid=cnn_sigmoid,
            )
        if self.vector_shapes:
            self.mlp = dense_blocks(features, mlp_units, mlp_layers, act, norm)
            inputs = mlp_units if mlp_layers else features
            self.out = nn.ModuleDict({k: nn.Linear(inputs, v[0]) for k, v in self.vector_shapes.items()})
            for layer in self.out.values():
                init_uniform(layer, 1.0)

    @property
    def keys(self) -> list[str]:
        return [*self.image_shapes, *self.vector_shapes]

    def forward(self, feat: Tensor) -> dict[str, Tensor]:
        """Images in [-0.5, 0.5] and vectors in symlog space, in full precision."""
        outputs = {}
        if self.image_shapes:
            channels = [shape[-1] for shape in self.image_shapes.values()]
            outputs |= zip(self.image_shapes, self.cnn(feat).split(channels, -1), strict=True)
        if self.vector_shapes:
            hidden = self.mlp(feat)
            outputs |= {k: full(layer(hidden)) for k, layer in self.out.items()}
        return outputs

    def losses(
        self, outputs: dict[str, Tensor], obs: dict[str, Tensor], weights: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Squared error of each key, summed over pixels or over symlog vector entries, shape (...).

        `weights` (...,H,W,1) of the pixels of a key, if there are any.
        """
        losses = {}
        for key in self.image_shapes:
            error = (outputs[key] - obs[key]) ** 2
            losses[key] = (error * weights[key] if weights else error).sum((-3, -2, -1))
        for key in self.vector_shapes:
            error = (outputs[key] - symlog(obs[key])) ** 2
            losses[key] = torch.where(error < 1e-8, 0.0, error).sum(-1)  # as dreamerv3-torch
        return losses


# --- heads ----------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Dense blocks and one linear output: (..., inputs) -> (..., outputs), in full precision."""

    def __init__(
        self, inputs: int, outputs: int, *, layers: int, units: int, act: str, norm: str, outscale: float = 1.0
    ):
        super().__init__()
        self.layers = dense_blocks(inputs, units, layers, act, norm)
        self.out = nn.Linear(units if layers else inputs, outputs)
        init_uniform(self.out, outscale)

    def forward(self, x: Tensor) -> Tensor:
        return full(self.out(self.layers(x)))

    @contextlib.contextmanager
    def record(self):
        """Gives a dict that collects, by linear layer, its outputs in each call."""
        outputs: dict[nn.Module, list[Tensor]] = {m: [] for m in self.modules() if isinstance(m, nn.Linear)}
        hooks = [layer.register_forward_hook(lambda layer, _, y: outputs[layer].append(y)) for layer in outputs]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()

    def repeat(self, x: Tensor, recorded: dict[nn.Module, list[Tensor]]) -> Tensor:
        """All recorded calls as one, with gradients, for their inputs x (calls,...,inputs); no product is repeated."""
        for layer in (*self.layers, self.out):
            if isinstance(layer, nn.Linear):
                x = KnownLinear.apply(x, layer.weight, layer.bias, torch.stack(recorded[layer]))
            else:
                x = layer(x)
        return full(x)


class KnownLinear(torch.autograd.Function):
    """`F.linear` of x (..., inputs) whose result is `known` already."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, known: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        return known.view_as(known)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, weight = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)
        rows = gradient.flatten(0, -2)
        by_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return by_x, rows.t() @ x.flatten(0, -2), rows.sum(0) if ctx.bias else None, None


class Head(MLP):
    """A network whose outputs are the parameters of a distribution."""

    def forward(self, feat: Tensor):
        return self.distribution(self.outputs(feat))

    def outputs(self, feat: Tensor) -> Tensor:
        """The network's outputs, parameters of the distribution."""
        return super().forward(feat)

    def distribution(self, out: Tensor):
        """Distribution from the network's outputs."""
        raise NotImplementedError


class ScalarHead(Head):
    """Head for rewards, values and continuation: features (..., F) -> distribution over scalars.

    `dist`: 'symlog_disc' (`TwoHot`), 'normal' (`UnitNormal`) or 'binary' (`Bernoulli`).
    """

    BUCKETS = 255
    buckets: Tensor

    def __init__(self, inputs: int, *, dist: str, layers: int, units: int, act: str, norm: str, outscale: float = 1.0):
        if dist not in ("symlog_disc", "normal", "binary"):
            raise ValueError(f"unknown head distribution {dist!r}: use symlog_disc, normal or binary")
        outputs = self.BUCKETS if dist == "symlog_disc" else 1
        super().__init__(inputs, outputs, layers=layers, units=units, act=act, norm=norm, outscale=outscale)
        self.dist = dist
        self.register_buffer("buckets", torch.linspace(-TwoHot.LIMIT, TwoHot.LIMIT, self.BUCKETS), persistent=False)

    def distribution(self, out: Tensor) -> TwoHot | UnitNormal | Bernoulli:
        if self.dist == "symlog_disc":
            return TwoHot(out, self.buckets)
        return UnitNormal(out) if self.dist == "normal" else Bernoulli(out)


class ActorHead(Head):
    """Policy: features (..., F) -> distribution over actions (..., A).

    `dist`: 'normal' (tanh mean, std between `min_std` and `max_std`), 'normal_1' (free mean, std 1), 'trunc_normal'
    (tanh mean, std from `min_std`; upstream never truncates its samples) or 'onehot' (with `unimix_ratio`).
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        *,
        dist: str,
        layers: int,
        units: int,
        act: str,
        norm: str,
        min_std: float,
        max_std: float,
        unimix_ratio: float,
    ):
        if dist not in ("normal", "normal_1", "trunc_normal", "onehot"):
            raise ValueError(f"unknown --actor_dist {dist!r}: use normal, normal_1, trunc_normal or onehot")
        outputs = actions if dist in ("normal_1", "onehot") else 2 * actions
        super().__init__(inputs, outputs, layers=layers, units=units, act=act, norm=norm)
        self.dist = dist
        self.min_std = min_std
        self.max_std = max_std
        self.unimix = unimix_ratio

    def distribution(self, out: Tensor) -> Normal | OneHot:
        if self.dist == "onehot":
            return OneHot(out, self.unimix)
        if self.dist == "normal_1":
            return Normal(out, torch.ones_like(out))
        mean, raw_std = out.chunk(2, -1)
        if self.dist == "normal":
            # min + (max - min) sigmoid(x + 2), with one operation less
            std = torch.rsub(torch.sigmoid(raw_std + 2.0), self.min_std, alpha=self.min_std - self.max_std)
        else:
            std = 2.0 * torch.sigmoid(raw_std / 2.0) + self.min_std
        return Normal(torch.tanh(mean), std)


# --- layers applied at every step of a sequence ---------------------------------------------------------------------

Layer = Callable[..., Tensor]  # of x and, if the layer has no bias, of what is added to its output


def linear_layer(weight: Tensor, bias: Tensor | None = None, norm: nn.Module | None = None) -> Layer:
    def layer(x: Tensor, plus: Tensor | None = None) -> Tensor:
        if plus is None:
            y = F.linear(x, weight, bias)
        else:
            y = torch.addmm(plus, x, weight.t()) if x.dim() == 2 else F.linear(x, weight) + plus
        return y if norm is None else norm(y)

    return layer


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which precision products with `weight` are computed here."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class SequenceLinear:
    """Linear layer applied at every time step, with a single weight-gradient product for the whole sequence.

    Same results as `linear_layer`, (B, inputs) -> (B, outputs). Step by step, the gradient of the weight would take T
    thin products and T additions of the weight's size. The weight is also transposed once, because thin products read
    it faster that way.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, norm: nn.Module | None = None):
        self.bias, self.norm, self.steps = bias, norm, []
        self.dtype = product_dtype(weight)
        self.weight = weight.detach().to(self.dtype)
        self.transposed = self.weight.t().contiguous()
        # Every step depends on this node, so its backward pass runs after theirs.
        self.anchor = _WeightGradient.apply(weight, self.steps)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        if self.bias is not None:
            plus = self.bias.expand(len(x), -1)
        y = _SequenceStep.apply(x.to(self.dtype), self.anchor, plus, self)
        return y if self.norm is None else self.norm(y)


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, steps: list) -> Tensor:
        ctx.steps = steps
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        inputs, gradients = zip(*ctx.steps, strict=True)
        ctx.steps.clear()
        # (outputs, T*B) x (T*B, inputs)
        return torch.cat(gradients).t() @ torch.cat(inputs), None


class _SequenceStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, plus: Tensor | None, layer: SequenceLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.transposed if plus is None else torch.addmm(plus.to(layer.dtype), x, layer.transposed)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        ctx.layer.steps.append((x.detach(), gradient))
        return gradient @ ctx.layer.weight, None, gradient if ctx.needs_input_grad[2] else None, None


class RecordedLinear:
    """`linear_layer` applied without gradients at T steps to B rows; keeps what a backward pass by hand needs.

    outputs: (T,B,*), before the norm. normed: per step what LayerNorm made of them, their mean and their 1 / deviation.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, norm: nn.LayerNorm | None = None, *, steps: int, rows: int
    ):
        self.dtype, self.norm = product_dtype(weight), norm
        self.normed: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weight = weight.detach().to(self.dtype)
        self.transposed = self.weight.t().contiguous()
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.outputs = self.transposed.new_empty(steps, rows, len(weight))
        self.left = iter(self.outputs)

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        x, plus, y = x.to(self.dtype), self.bias if plus is None else plus.to(self.dtype), next(self.left)
        if plus is None:
            torch.mm(x, self.transposed, out=y)
        else:
            torch.addmm(plus, x, self.transposed, out=y)
        if self.norm is None:
            return y
        norm, y = self.norm, full(y)
        self.normed.append(torch.native_layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps))
        return self.normed[-1][0]

    def kept(self, number: int) -> Tensor:
        """One of `normed`, of all steps (T,B,*)."""
        return torch.stack([normed[number] for normed in self.normed])

    def norm_backward(
        self, gradient: Tensor, t: int | None = None, rstd: Tensor | None = None, trained: bool = False
    ) -> tuple[Tensor, ...]:
        """From the gradient of what the norm gave, at step t or at all: that of its input, if `trained` of weights."""
        if t is None:
            y, mean, own = self.outputs, self.kept(1), self.kept(2)
        else:
            y, (_, mean, own) = self.outputs[t], self.normed[t]
        args = gradient, full(y), y.shape[-1:], mean, own if rstd is None else rstd, self.norm.weight, self.norm.bias
        return torch.ops.aten.native_layer_norm_backward.default(*args, [True, trained, trained])


# --- latent dynamics ------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a state of a `TSSM` attends to: keys and values of tokens, in each of L layers.

    past: (B, P, L, 2, heads, d), P tokens of each of B sequences, shared by all states on that sequence. first, last:
    (...), the state sees tokens first .. last - 1 of them. own: (..., k, L, 2, heads, d), the k tokens that imagination
    has added since. The leading axes (...) of the states are (B, n) or (B n): those of a sequence are neighbours.
    """

    past: Tensor
    first: Tensor
    last: Tensor
    own: Tensor

    def map_states(self, function) -> "Memory":
        """`function` of everything that each state has for itself."""
        return Memory(self.past, *(function(x) for x in self[1:]))


class State(NamedTuple):
    """Latent state with any leading axes.

    deter: (..., D) recurrent state. stoch: (..., S, K) one-hot sample, or (..., S) for Gaussian latents.
    logit: (..., S, K) raw logits, or (..., 2, S) mean and std for Gaussian latents. memory: of a `TSSM` only.
    """

    deter: Tensor
    stoch: Tensor
    logit: Tensor
    memory: Memory | None = None

    def map(self, function) -> "State":
        """`function` of every tensor."""
        return self._map(function, None if self.memory is None else Memory(*(function(x) for x in self.memory)))

    def detach(self) -> "State":
        return self.map(torch.Tensor.detach)

    def flatten(self) -> "State":
        """(B,T,*) -> (B T,*)."""
        memory = None if self.memory is None else self.memory.map_states(lambda x: x.flatten(0, 1))
        return self._map(lambda x: x.flatten(0, 1), memory)

    def select(self, index: Tensor) -> "State":
        """Some of N flat states (N,*), in the order of `index` (n,)."""
        memory = self.memory
        if memory is not None:
            # Each takes its sequence along: those chosen need not be equally many of each.
            past = memory.past[index // (len(self.deter) // len(memory.past))]
            memory = memory.map_states(lambda x: x[index])._replace(past=past)
        return self._map(lambda x: x[index], memory)

    def _map(self, function, memory: Memory | None) -> "State":
        return State(function(self.deter), function(self.stoch), function(self.logit), memory)

    @property
    def feat(self) -> Tensor:
        """[flatten(stoch); deter], shape (..., F); the class index runs fastest."""
        lead = self.deter.shape[:-1]
        return torch.cat([self.stoch.reshape(*lead, -1), self.deter], -1)


def stack_states(states: list[State], dim: int) -> State:
    """The states, without memory, along a new axis."""
    deter, stoch, logit = (torch.stack(parts, dim) for parts in zip(*(state[:3] for state in states), strict=True))
    return State(deter, stoch, logit)


def where_state(flag: Tensor, yes: State, no: State) -> State:
    """`yes` where `flag` (leading axes) is set, else `no`, without memory. Leading axes broadcast.

    Only for `deter` and `stoch`, all that a step reads; `logit` is that of `no`.
    """

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(flag.reshape(*flag.shape, *[1] * (b.dim() - flag.dim())), a, b)

    return State(pick(yes.deter, no.deter), pick(yes.stoch, no.stoch), no.logit)


class GRUCell(nn.Module):
    """GRU with one joint projection, optionally layer-normalised; x (..., H), h (..., D) -> (..., D).

    `forward` takes projection and norm as a function, so that `StepLayers` decides how they are computed.

    Differs from the textbook cell: gates come in the order reset, candidate, update; reset scales the candidate's
    pre-activation; the update gate has a bias of -1.
    """

    def __init__(self, inputs: int, size: int, norm: bool):
        super().__init__()
        self.linear = nn.Linear(inputs + size, 3 * size, bias=False)
        self.norm = nn.LayerNorm(3 * size, eps=NORM_EPS) if norm else nn.Identity()
        init_truncated(self.linear)

    def forward(self, x: Tensor, h: Tensor, project: Layer) -> Tensor:
        return self.gates(full(project(torch.cat([x, h], -1))), h)

    @staticmethod
    def gates(pre: Tensor, h: Tensor) -> Tensor:
        """h' from the normalised projection (..., 3D). Who changes it changes `slopes` too."""
        reset, candidate, update = pre.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1.0)
        return torch.lerp(h, candidate, update)

    @staticmethod
    def slopes(pre: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of `gates` by `pre`, (..., 3, D), and by `h`, (..., D)."""
        sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        reset, candidate, update = pre.chunk(3, -1)
        reset, update = torch.sigmoid(reset), torch.sigmoid(update - 1.0)
        new, slopes = torch.tanh(reset * candidate), pre.new_empty(*h.shape[:-1], 3, h.shape[-1])
        by_product = tanh_backward(update, new)
        sigmoid_backward(by_product * candidate, reset, grad_input=slopes[..., 0, :])
        torch.mul(by_product, reset, out=slopes[..., 1, :])
        sigmoid_backward(new - h, update, grad_input=slopes[..., 2, :])
        return slopes, 1.0 - update


class StepLayers(NamedTuple):
    """The linear layers applied at every `RSSM` step: of z, of the GRU and of h (if any), with norms, and the output's.

    The latter two are those of the posterior or, in recorded imagination, of the prior.
    """

    stoch: Layer
    gru: Layer
    deter: Layer | None
    out: Layer


class RSSM(nn.Module):
    """Recurrent state-space model with `stoch` latents, categorical over `discrete` classes or, if that is 0, Gaussian.

    Actions are bounded wherever they enter (`bound_action`). `temp_post` gives the posterior the recurrent state beside
    the embedding. `shared` replaces the posterior network by the prior network, fed with the embedding (zeros for the
    prior). `rec_depth` > 1 repeats the GRU on its own output, always from the same hidden state, and needs H = D.
    """

    def __init__(
        self,
        *,
        actions: int,
        embed: int,
        stoch: int = 32,
        discrete: int = 32,
        deter: int = 512,
        hidden: int = 512,
        input_layers: int = 1,
        output_layers: int = 1,
        rec_depth: int = 1,
        shared: bool = False,
        temp_post: bool = True,
        act: str = "SiLU",
        norm: str = "LayerNorm",
        cell: str = "gru_layer_norm",
        unimix_ratio: float = 0.01,
        initial: str = "learned",
        mean_act: str = "none",
        std_act: str = "sigmoid2",
        min_std: float = 0.1,
    ):
        super().__init__()
        if input_layers < 1 or output_layers < 1:
            raise ValueError("--dyn_input_layers and --dyn_output_layers must be at least 1")
        if rec_depth > 1 and hidden != deter:
            raise ValueError(f"--dyn_rec_depth {rec_depth} needs --dyn_hidden equal to --dyn_deter")
        self.stoch_shape = (stoch, discrete) if discrete else (stoch,)
        self.logit_shape = (stoch, discrete) if discrete else (2, stoch)
        self.embed = embed
        self.deter = deter
        self.classes = discrete
        self.unimix = unimix_ratio
        self.shared = shared
        self.temp_post = temp_post
        self.rec_depth = rec_depth
        self.mean_act = mean_act
        self.std_act = std_act
        self.min_std = min_std
        self.stoch_size = math.prod(self.stoch_shape)
        self.feat_size = self.stoch_size + deter

        # The first layers see several inputs side by side; each has its own product (see `split_linear`).
        self.input_sizes = [self.stoch_size, actions] + [embed] * shared
        self.post_sizes = [deter] * temp_post + [embed]
        self.input = dense_blocks(sum(self.input_sizes), hidden, input_layers, act, norm)
        self.cell = GRUCell(hidden, deter, norm=cell == "gru_layer_norm")
        self.prior_hidden = dense_blocks(deter, hidden, output_layers, act, norm)
        self.prior_head = nn.Linear(hidden, math.prod(self.logit_shape))
        self.post_hidden = dense_blocks(sum(self.post_sizes), hidden, output_layers, act, norm)
        self.post_head = nn.Linear(hidden, math.prod(self.logit_shape))
        init_truncated(self.prior_head)
        init_truncated(self.post_head)
        self.initial_deter = nn.Parameter(torch.zeros(1, deter)) if initial == "learned" else None
        # What `StepsGradient` is written for.
        one_layer = input_layers == output_layers == rec_depth == 1 and (act, norm) == ("SiLU", "LayerNorm")
        self.default_structure = bool(one_layer and discrete and temp_post and not shared and cell == "gru_layer_norm")

    def dist(self, logit: Tensor) -> OneHot | Normal:
        """Distribution of the stochastic part: per latent group if categorical, joint if Gaussian."""
        if self.classes:
            return OneHot(logit, self.unimix)
        mean, std = logit.unbind(-2)
        return Normal(mean, std)

    def entropy(self, dist: OneHot | Normal) -> Tensor:
        """Entropy of a `dist` in nats, summed over the latent groups, shape (...)."""
        return dist.entropy().sum(-1) if self.classes else dist.entropy()

    def kl(self, left: OneHot | Normal, right: OneHot | Normal) -> Tensor:
        """KL(left || right) of two `dist` in nats, summed over the latent groups, shape (...)."""
        kl: Tensor = left.kl(right)  # type: ignore[arg-type]  # both are of one kind
        return kl.sum(-1) if self.classes else kl

    def initial(self, lead: tuple[int, ...]) -> State:
        """The state before the first observation, of leading axes `lead`; gradients reach the learned part."""
        anchor = self.prior_head.weight
        logit = anchor.new_zeros(*lead, *self.logit_shape, dtype=torch.get_default_dtype())
        if self.initial_deter is None:
            zeros = logit.new_zeros
            return State(zeros(*lead, self.deter), zeros(*lead, *self.stoch_shape), logit)
        deter = torch.tanh(self.initial_deter[0])
        stoch = self.prior(deter, sample=False).stoch
        return State(deter.expand(*lead, -1), stoch.expand(*lead, *self.stoch_shape), logit)

    def prior(self, deter: Tensor, sample: bool = True) -> State:
        """p(z | h) for any leading axes."""
        return self._latent(deter, self.prior_head(self.prior_hidden(deter)), sample)

    def posterior(self, deter: Tensor, embed: Tensor, sample: bool = True) -> State:
        """q(z | h, e) for any leading axes. Not of `shared`, which reads e before h."""
        assert not self.shared
        return self._output(self.post_hidden, deter, self._embed_part(embed), self._step_layers(), sample)

    def img_step(self, state: State, action: Tensor, sample: bool = True, embed: Tensor | None = None) -> State:
        """One step of imagination: the prior after `action` (..., A). `embed` serves `shared` posteriors only."""
        return self.prior(self._recur(state, self._action_part(action, embed), self._step_layers()), sample)

    @torch.no_grad()
    def recorded_step(self, state: State, action: Tensor, layers: StepLayers) -> State:
        """`img_step` by `recorded_layers`; `imagined` adds the gradients of all steps."""
        return self._output(
            self.prior_hidden, self._recur(state, self._action_part(action), layers), None, layers, True
        )

    def obs_step(self, state: State, action: Tensor, embed: Tensor, is_first: Tensor, sample: bool = True) -> State:
        """The posterior after `action` (B,A) led to `embed` (B,E). Rows with `is_first` (B,) start afresh."""
        inputs = self._filter_inputs(embed, action, is_first)
        return self._filter(state, *inputs, is_first, self.initial(is_first.shape), self._step_layers(), sample)

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, sample: bool = True) -> tuple[State, State]:
        """Filter a batch: embed (B,T,E), action (B,T,A), is_first (B,T) bool -> posterior and prior (B,T,*)."""
        # Tracing with `fullgraph` cannot follow gradients that are collected or written by hand.
        tracing, (rows, steps) = torch.compiler.is_compiling(), is_first.shape
        by_hand = self.default_structure and sample and torch.is_grad_enabled() and not tracing
        initial = self.initial((rows,))
        # What does not depend on the recurrence is computed for all steps at once.
        parts = self._filter_inputs(embed, action, is_first)
        state, posts = initial, []
        with torch.no_grad() if by_hand else contextlib.nullcontext():
            linear = linear_layer if tracing else SequenceLinear
            layers = self.recorded_layers(steps, rows, prior=False) if by_hand else self._step_layers(linear)
            for action_part, embed_part, first in zip(*(x.unbind(1) for x in (*parts, is_first)), strict=True):
                state = self._filter(state, action_part, embed_part, first, initial, layers, sample)
                posts.append(state)
            post = stack_states(posts, 1)
        if by_hand:
            with torch.no_grad():
                before = self.shift(post, is_first, initial)
                goes_on = (~is_first.t()).unsqueeze(-1).to(embed.dtype)
                goes_on[0] = 0.0
                before_after = [before.deter, before.stoch.flatten(2), post.feat, post.logit]
            inputs = [x.transpose(0, 1) for x in (*before_after, *parts)]
            results = self._with_gradient(layers, False, goes_on, *inputs, initial.deter, initial.stoch)
            feat, logit = (x.transpose(0, 1) for x in results)
            stoch, deter = feat.split([self.stoch_size, self.deter], -1)
            post = State(deter, stoch.unflatten(-1, self.stoch_shape), logit)
        if self.shared:
            action = action.masked_fill(is_first.unsqueeze(-1), 0.0)
            return post, self.img_step(self.shift(post, is_first), action, sample)
        return post, self.prior(post.deter, sample)

    def _filter_inputs(self, embed: Tensor, action: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions (..., H) of action and embedding to their first layers; independent of the recurrence."""
        action = action.masked_fill(is_first.unsqueeze(-1), 0.0)
        # `shared` has no use for the second one.
        return self._action_part(action, embed), embed if self.shared else self._embed_part(embed)

    def _filter(
        self,
        state: State,
        action_part: Tensor,
        embed_part: Tensor,
        is_first: Tensor,
        initial: State,
        layers: StepLayers,
        sample: bool,
    ) -> State:
        """The posterior of one step from prepared inputs (see `_filter_inputs`)."""
        deter = self._recur(where_state(is_first, initial, state), action_part, layers)
        return (
            self.prior(deter, sample)
            if self.shared
            else self._output(self.post_hidden, deter, embed_part, layers, sample)
        )

    def _step_weights(self, prior: bool) -> tuple[Tensor, ...]:
        """The weights of `StepLayers`, in their order, and the bias of the last."""
        stoch = split_linear(self.input, self.input_sizes)[0]
        deter = (
            split_linear(self.prior_hidden, [self.deter])[0]
            if prior
            else split_linear(self.post_hidden, self.post_sizes)[0]
        )
        head = self.prior_head if prior else self.post_head
        return stoch, self.cell.linear.weight, deter, head.weight, head.bias

    def _step_layers(self, linear: Callable[..., Layer] = linear_layer, prior: bool = False) -> StepLayers:
        """The layers of one step, each made by `linear(weight, bias, norm)`."""
        stoch, gru, deter, out, bias = self._step_weights(prior)
        hidden = self.prior_hidden if prior else self.post_hidden
        return StepLayers(
            stoch=linear(stoch, None, self.input[1]),
            gru=linear(gru, None, self.cell.norm),
            deter=linear(deter, None, hidden[1]) if self.temp_post else None,
            out=linear(out, bias),
        )

    def recorded_layers(self, steps: int, rows: int, prior: bool = True) -> StepLayers:
        """The layers of `steps` steps without gradients, whose results `_with_gradient` differentiates."""
        return self._step_layers(functools.partial(RecordedLinear, steps=steps, rows=rows), prior)

    def _action_part(self, action: Tensor, embed: Tensor | None = None) -> Tensor:
        """Contribution (..., H) of the action to the input layer, and of the embedding if `shared` (else zeros)."""
        _, weight, *rest = split_linear(self.input, self.input_sizes)
        part = F.linear(bound_action(action), weight)
        return part + F.linear(embed, rest[0]) if rest and embed is not None else part

    def _embed_part(self, embed: Tensor) -> Tensor:
        """Contribution (..., H) of the embedding to the posterior's first layer."""
        return F.linear(embed, split_linear(self.post_hidden, self.post_sizes)[-1])

    def imagined(self, feat: Tensor, action: Tensor, layers: StepLayers) -> tuple[Tensor, Tensor]:
        """Features (H,N,F) of a start and the results of `recorded_step`, and logits (H-1,N,*) of the latter.

        With the gradients by `action` (H-1,N,A).
        """
        stoch, deter = feat[:-1].split([self.stoch_size, self.deter], -1)
        assert isinstance(layers.out, RecordedLinear)
        logit = full(layers.out.outputs).unflatten(-1, self.logit_shape)
        inputs = deter.new_ones(len(action), 1, 1), deter, stoch, feat, logit, self._action_part(action)
        return self._with_gradient(layers, True, *inputs, None, None, None)

    def _with_gradient(self, layers: StepLayers, prior: bool, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Results of steps on `recorded_layers`, with gradients; `inputs` are those of `StepsGradient`."""
        norms = self.input[1], self.cell.norm, (self.prior_hidden if prior else self.post_hidden)[1]
        parameters = [*self._step_weights(prior), *(p for norm in norms for p in norm.parameters())]
        return StepsGradient.apply(self, layers, *inputs, *parameters)

    # `StepsGradient` differentiates `_recur` and `_output` by hand: who changes one of them changes it too or makes
    # `default_structure` False. In tests/test_models.py test_gradient_of_the_filter_is_that_of_its_steps and
    # test_gradient_of_the_actor_is_that_of_its_steps compare them.
    def _recur(self, state: State, action_part: Tensor, layers: StepLayers) -> Tensor:
        """h' = GRU(z, h, a), shape (..., D)."""
        x = layers.stoch(state.stoch.reshape(*state.deter.shape[:-1], -1), action_part)
        for layer in list(self.input)[2:]:
            x = layer(x)
        for _ in range(self.rec_depth):
            x = self.cell(x, state.deter, layers.gru)
        return x

    def _output(
        self, hidden: nn.Sequential, deter: Tensor, part: Tensor | None, layers: StepLayers, sample: bool
    ) -> State:
        """The latent by the hidden layers of prior or posterior, from h and what is added to the first product."""
        x = hidden[1](part) if layers.deter is None else layers.deter(deter, part)
        for layer in list(hidden)[2:]:
            x = layer(x)
        return self._latent(deter, layers.out(x), sample)

    def shift(self, state: State, is_first: Tensor, initial: State | None = None) -> State:
        """The state before each step of a sequence (B,T,*): the previous entry, or the initial one where reset."""
        initial = self.initial(is_first.shape[:1]) if initial is None else initial
        deter, stoch = (torch.cat([i.unsqueeze(1), x[:, :-1]], 1) for i, x in zip(initial[:2], state[:2], strict=True))
        previous = State(deter, stoch, state.logit)
        return where_state(is_first, initial.map(lambda x: x.unsqueeze(1)), previous)

    def _latent(self, deter: Tensor, out: Tensor, sample: bool) -> State:
        logit = full(out).reshape(*deter.shape[:-1], *self.logit_shape)
        if not self.classes:
            mean, std = logit.unbind(-2)
            if self.mean_act == "tanh5":
                mean = 5.0 * torch.tanh(mean / 5.0)
            std = {
                "softplus": F.softplus,
                "abs": lambda x: torch.abs(x + 1.0),
                "sigmoid": torch.sigmoid,
                "sigmoid2": lambda x: 2.0 * torch.sigmoid(x / 2.0),
            }[self.std_act](std)
            logit = torch.stack([mean, std + self.min_std], -2)
        dist = self.dist(logit)
        return State(deter, dist.sample() if sample else dist.mode, logit)


# --- gradient of a sequence of steps --------------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """x @ weight + plus, with a product in the precision of `weight`, returned in that of `x`."""
    if plus is not None and x.dtype == weight.dtype:
        return torch.addmm(plus, x, weight)
    y = (x.to(weight.dtype) @ weight).to(x.dtype)
    return y if plus is None else plus + y


class StepsGradient(torch.autograd.Function):
    """Backward pass of T steps of the filter or of imagination at the default structure, which ran without gradients.

    Only what a step hands to the one before is computed step by step, in 13 operations where autograd takes 47. The
    gradients of parameters follow for all steps at once. No product of the steps is repeated. Tensors are (T,B,*).
    """

    @staticmethod
    def forward(ctx, rssm, layers, goes_on, h, z, feat, logit, *inputs):
        """`feat` (T,B,F) and `logit` after the steps; the former may begin with features before the first step.

        layers: `recorded_layers`. goes_on (T,B,1) or (T,1,1): 0 where a step begins afresh. h, z: what each step began
        with. `inputs` get gradients: parts of action and embedding (T,B,H), initial deter and stoch (B,*), weights of
        the layers, and weight and bias of each norm.
        """
        ctx.rssm, ctx.layers = rssm, layers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(goes_on, h, z, feat, logit)
        return feat.view_as(feat), logit.view_as(logit)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, feat_grad, logit_grad):
        rssm, layers, (goes_on, h, z, feat, logit) = ctx.rssm, ctx.layers, ctx.saved_tensors
        stoch_w, gru_w, deter_w, out_w = (layer.weight for layer in layers)
        needed, silu_backward, mixed = ctx.needs_input_grad[7:], torch.ops.aten.silu_backward, 1.0 - rssm.unimix
        probs, (slopes, kept) = softmax(logit), rssm.cell.slopes(layers.gru.kept(0), h)
        # What later losses send to each step, before products where it can be
        feat_grad = torch.zeros_like(feat) if feat_grad is None else feat_grad
        stoch_grad, deter_grad = feat_grad[-len(h) :].split([rssm.stoch_size, rssm.deter], -1)
        logit_grad = None if logit_grad is None else logit_grad.flatten(2)
        hidden_grad = [None] * len(h) if logit_grad is None else product(logit_grad, out_w)
        draw_w, rstd = out_w * mixed, layers.stoch.kept(2) * goes_on

        stoch_total, deter_total, totals = stoch_grad[-1], deter_grad[-1], []
        for t in reversed(range(len(h))):
            draw_total = softmax_backward(stoch_total.view_as(probs[t]), probs[t]).flatten(1)
            out_total = silu_backward(product(draw_total, draw_w, hidden_grad[t]), layers.deter.normed[t][0])
            deter_total = product(layers.deter.norm_backward(out_total, t)[0], deter_w, deter_total)
            gates_total = (deter_total.unsqueeze(1) * slopes[t]).flatten(1)
            joint_total = product(layers.gru.norm_backward(gates_total, t)[0], gru_w)
            x_total, h_total = joint_total.tensor_split([len(stoch_w)], -1)
            x_total = silu_backward(x_total, layers.stoch.normed[t][0])
            input_total = layers.stoch.norm_backward(x_total, t, rstd[t])[0]
            totals.append((input_total, x_total, deter_total, out_total, draw_total))
            if t:
                stoch_total = product(input_total, stoch_w, stoch_grad[t - 1])
                h_total = torch.addcmul(h_total, deter_total, kept[t])
                deter_total = torch.addcmul(deter_grad[t - 1], h_total, goes_on[t])

        input_totals, *others = zip(*reversed(totals), strict=True)
        if not any(needed[1:]):  # in imagination, where no step begins afresh
            return *[None] * 7, torch.stack(input_totals), *[None] * (len(needed) - 1)
        x_totals, deter_totals, out_totals, draw_totals = map(torch.stack, others)
        grad_x, *norm_x = layers.stoch.norm_backward(x_totals, trained=True)
        grad_gates, *norm_gates = layers.gru.norm_backward(
            (deter_totals.unsqueeze(2) * slopes).flatten(2), trained=True
        )
        grad_out, *norm_out = layers.deter.norm_backward(out_totals, trained=True)
        grad_logit = draw_totals * mixed if logit_grad is None else torch.add(logit_grad, draw_totals, alpha=mixed)
        # (B, *): of what begins afresh
        afresh = 1.0 - goes_on
        initial_deter = (afresh * deter_totals * kept).sum(0)
        initial_deter = product((afresh * grad_gates).sum(0), gru_w[:, len(stoch_w) :], initial_deter)
        initial_stoch = product((afresh * grad_x).sum(0), stoch_w).view_as(probs[0])
        joint = join([F.silu(layers.stoch.kept(0)), h])
        pairs = (
            (grad_x, z),
            (grad_gates, joint),
            (grad_out, feat[-len(h) :, :, rssm.stoch_size :]),
            (grad_logit, F.silu(layers.deter.kept(0))),
        )
        weights = (product(y.flatten(0, 1).t(), by.flatten(0, 1).to(out_w.dtype)) for y, by in pairs)
        found = grad_x, grad_out, initial_deter, initial_stoch, *weights, grad_logit.sum((0, 1))
        found = *found, *norm_x, *norm_gates, *norm_out
        return *[None] * 7, *(gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True))


# --- transformer dynamics -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention of tokens to each other, or to keys and values computed before. No biases, no dropout."""

    def __init__(self, size: int, heads: int, head_size: int):
        super().__init__()
        self.heads = heads
        self.scale = head_size**-0.5
        self.qkv = nn.Linear(size, 3 * heads * head_size, bias=False)
        self.out = nn.Linear(heads * head_size, size, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor, past: Tensor | None = None, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Q tokens x (B,Q,D) per sequence -> output (B,Q,D), and keys and values (B,Q,2,heads,d) of the tokens.

        The tokens attend to each other, or each to `past` (B,P,2,heads,d), its `own` (B,Q,k,2,heads,d) and itself.
        `mask` is added to the scores, (B,heads,Q,Q) or (B,heads,Q,P+k+1).
        """
        # (B, Q, heads, d)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, token = query * self.scale, torch.stack([key, value], 2)
        if past is None or own is None:
            scores = torch.einsum("bqhd,bphd->bhqp", query, key)
            y = torch.einsum("bhqp,bphd->bqhd", torch.softmax(full(scores) + mask, -1), value)
            return self.out(y.flatten(-2)), token
        past_key, past_value = past.unbind(2)
        own_key, own_value = own.unbind(3)
        far = torch.einsum("bqhd,bphd->bhqp", query, past_key)
        # (B, Q, k, heads), (B, Q, 1, heads)
        near, same = (query.unsqueeze(2) * own_key).sum(-1), (query * key).sum(-1).unsqueeze(2)
        scores = torch.cat([far, near.movedim(-1, 1), same.movedim(-1, 1)], -1)
        weights = torch.softmax(full(scores) + mask, -1).to(value.dtype)
        far, near, same = weights.split([past.shape[1], own.shape[2], 1], -1)
        y = torch.einsum("bhqp,bphd->bqhd", far, past_value) + same.transpose(1, 2) * value
        # (B, heads, Q, k) -> (B, Q, k, heads, 1)
        y = y + (near.movedim(1, -1).unsqueeze(-1) * own_value).sum(2)
        return self.out(y.flatten(-2)), token


class Gate(nn.Module):
    """A GRU over depth in place of the residual sum x + y (Parisotto et al., 2020), for x and y (..., D).

    r = sigmoid(W_r y + U_r x), u = sigmoid(W_u y + U_u x + b), (1 - u) x + u tanh(W_g y + r U_g x); b starts at -0.1.
    """

    def __init__(self, size: int):
        super().__init__()
        self.y = nn.Linear(size, 3 * size, bias=False)
        self.x = nn.Linear(size, 3 * size, bias=False)
        self.bias = nn.Parameter(torch.full((size,), -0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        reset_y, update_y, candidate_y = full(self.y(y)).chunk(3, -1)
        reset_x, update_x, candidate_x = full(self.x(x)).chunk(3, -1)
        candidate = torch.tanh(candidate_y + torch.sigmoid(reset_y + reset_x) * candidate_x)
        return torch.lerp(x, candidate, torch.sigmoid(update_y + update_x + self.bias))


class Block(nn.Module):
    """Pre-norm transformer block; arguments and results of `forward` are those of `Attention`."""

    def __init__(
        self, size: int, *, heads: int, head_size: int, ff: int, act: str, norm: str, gate: bool, eps: float = NORM_EPS
    ):
        super().__init__()
        self.norms = nn.ModuleList(getattr(nn, norm)(size, eps=eps) for _ in range(2))
        self.attention = Attention(size, heads, head_size)
        self.ff = nn.Sequential(nn.Linear(size, ff), getattr(nn, act)(), nn.Linear(ff, size))
        self.gates = nn.ModuleList(Gate(size) for _ in range(2)) if gate else None
        self.apply(init_truncated)

    def forward(
        self, x: Tensor, mask: Tensor, past: Tensor | None = None, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        add_attention, add_ff = self.gates or (torch.add, torch.add)
        y, token = self.attention(self.norms[0](x), mask, past, own)
        x = add_attention(x, y)
        return add_ff(x, self.ff(self.norms[1](x))), token


class TSSM(RSSM):
    """Transformer state-space model (Chen et al., 2022): a causal transformer in place of the recurrence of an `RSSM`.

    The posterior sees the embedding alone, so all steps of a batch are filtered at once. Token t is made of z_{t-1}
    (the initial one where an episode starts) and a_t; h_t is the transformer's output there, width D; the prior of z_t
    follows from h_t. A token sees those of its own episode at distances below `window`, itself included. Positions are
    a learned bias per distance and head, so that imagination can go on for any number of steps. At the start it falls
    with distance, in each head at its own slope (Press et al., 2022); from zeros, which treat all steps alike, it
    learns more slowly.

    States carry a `Memory`. `observe` gives those of a sequence one past, without gradient. `obs_step` takes states of
    `initial` or of itself; their past holds the last `window` tokens.

    `layers`, `heads` and `ff`, the width of the feed-forward layers, are those of the transformer; `gate` replaces its
    residual sums by `Gate`. `options` are those of `RSSM`.
    """

    def __init__(
        self, *, layers: int = 2, heads: int = 8, ff: int = 1024, window: int = 64, gate: bool = False, **options
    ):
        if options.get("shared") or options.get("rec_depth", 1) > 1:
            raise ValueError("--dyn_shared and --dyn_rec_depth need --dynamics rssm")
        super().__init__(**options | {"temp_post": False})
        del self.cell
        if self.deter % heads:
            raise ValueError(f"--tssm_heads must divide --dyn_deter {self.deter}; {heads} does not")
        self.window = window
        act, norm = options.get("act", "SiLU"), options.get("norm", "LayerNorm")
        # As that of the recurrence, but its last layer is linear and has the transformer's width.
        *hidden, last, _, _ = self.input
        assert isinstance(last, nn.Linear)
        last = nn.Linear(last.in_features, self.deter, bias=False)
        init_truncated(last)
        self.input = nn.Sequential(*hidden, last)
        sizes = {"heads": heads, "head_size": self.deter // heads, "ff": ff}
        self.blocks = nn.ModuleList(Block(self.deter, **sizes, act=act, norm=norm, gate=gate) for _ in range(layers))
        self.norm = getattr(nn, norm)(self.deter, eps=NORM_EPS)
        slopes = torch.pow(2.0, -8.0 * torch.arange(1, heads + 1) / heads)
        self.bias = nn.Parameter(-slopes * torch.arange(window)[:, None])
        self.token_shape = (layers, 2, heads, self.deter // heads)

    def initial(self, lead: tuple[int, ...]) -> State:
        """As in `RSSM`, with an empty memory: no token of the past is visible."""
        empty = self.bias.new_zeros(())
        end = torch.full(lead, self.window, device=empty.device)
        past = empty.expand(math.prod(lead), self.window, *self.token_shape)
        return super().initial(lead)._replace(memory=Memory(past, end, end, empty.expand(*lead, 0, *self.token_shape)))

    def posterior(self, deter: Tensor, embed: Tensor, sample: bool = True) -> State:
        """q(z | e) for any leading axes; `deter` becomes part of the state, which has no memory."""
        return self._latent(deter, self.post_head(self.post_hidden(embed)), sample)

    def img_step(self, state: State, action: Tensor, sample: bool = True, embed: Tensor | None = None) -> State:
        """One step of imagination: the prior after `action` (..., A)."""
        deter, token = self._step(state, action)
        memory, axis = state.memory, action.dim() - 1
        own = torch.cat([memory.own, token.unsqueeze(axis)], axis)
        return self.prior(deter, sample)._replace(memory=memory._replace(own=own))

    def obs_step(self, state: State, action: Tensor, embed: Tensor, is_first: Tensor, sample: bool = True) -> State:
        """The posterior after `action` (B,A) led to `embed` (B,E). Rows with `is_first` (B,) start afresh."""
        memory = state.memory
        first = torch.where(is_first, memory.last, memory.first)
        previous = where_state(is_first, super().initial(is_first.shape), state)
        action = torch.where(is_first.unsqueeze(-1), 0.0, action)
        deter, token = self._step(previous._replace(memory=memory._replace(first=first)), action)
        past = torch.cat([memory.past[:, 1:], token.unsqueeze(1)], 1)
        memory = memory._replace(past=past, first=(first - 1).clamp(min=0))
        return self.posterior(deter, embed, sample)._replace(memory=memory)

    def observe(self, embed: Tensor, action: Tensor, is_first: Tensor, sample: bool = True) -> tuple[State, State]:
        """Filter a batch: embed (B,T,E), action (B,T,A), is_first (B,T) bool -> posterior and prior (B,T,*)."""
        step = torch.arange(is_first.shape[1], device=is_first.device)
        # (B, T): where the episode of each step begins
        first = torch.where(is_first, step, 0).cummax(1).values
        # h follows below.
        post = self.posterior(embed.new_empty(*is_first.shape, self.deter), embed, sample)
        action = torch.where(is_first.unsqueeze(-1), 0.0, action)
        x = self._input(super().shift(post, is_first).stoch, action)
        mask, tokens = self._mask(step[:, None] - step, step >= first.unsqueeze(-1)), []
        for block in self.blocks:
            x, token = block(x, mask)
            tokens.append(token)
        deter = full(self.norm(x))
        past = torch.stack(tokens, 2).detach()
        own = past.new_zeros(()).expand(*is_first.shape, 0, *self.token_shape)
        post = post._replace(deter=deter, memory=Memory(past, first, (step + 1).expand_as(first), own))
        return post, self.prior(deter, sample)

    def shift(self, state: State, is_first: Tensor, initial: State | None = None) -> State:
        """The state before each step of a sequence (B,T,*) that `observe` filtered: what the token of the step sees."""
        memory = state.memory
        return super().shift(state, is_first, initial)._replace(memory=memory._replace(last=memory.last - 1))

    def _input(self, stoch: Tensor, action: Tensor) -> Tensor:
        """Tokens (..., D) before the first block."""
        return self.input(torch.cat([stoch.reshape(*action.shape[:-1], -1), bound_action(action)], -1))

    def _mask(self, distance: Tensor, visible: Tensor) -> Tensor:
        """What is added to scores: distances and flags (..., Q, P) of Q tokens and P others -> (..., heads, Q, P)."""
        bias = self.bias[distance.clamp(0, self.window - 1)].movedim(-1, -3)
        return torch.where((visible & (distance >= 0) & (distance < self.window)).unsqueeze(-3), bias, -torch.inf)

    def _step(self, state: State, action: Tensor) -> tuple[Tensor, Tensor]:
        """h (..., D) of the token that follows `state` and takes `action`, and its keys and values."""
        memory, lead = state.memory, action.shape[:-1]
        sequences, length = memory.past.shape[:2]
        queries, added = math.prod(lead) // sequences, memory.own.shape[len(lead)]

        def by_sequence(x: Tensor) -> Tensor:
            return x.reshape(sequences, queries, *x.shape[len(lead) :])

        x = by_sequence(self._input(state.stoch, action))
        first, last, own = map(by_sequence, memory[1:])
        step = torch.arange(length, device=x.device)
        # (B, Q, P), then (1, k + 1)
        visible = (step >= first.unsqueeze(-1)) & (step < last.unsqueeze(-1))
        past_mask = self._mask(last.unsqueeze(-1) + added - step, visible)
        distance = torch.arange(added, -1, -1, device=x.device).unsqueeze(0)
        own_mask = self._mask(distance, distance >= 0)
        mask = torch.cat([past_mask, own_mask.expand(*past_mask.shape[:-1], -1)], -1)
        tokens = []
        for block, *seen in zip(self.blocks, memory.past.unbind(2), own.unbind(3), strict=True):
            x, token = block(x, mask, *seen)
            tokens.append(token)
        return full(self.norm(x)).reshape(*lead, -1), torch.stack(tokens, 2).reshape(*lead, *self.token_shape)


# --- representations ------------------------------------------------------------------------------------------------


class Filtered(NamedTuple):
    """What a representation makes of a batch, all (B,T,*): embedding, posterior, prior, and features of the posterior.

    A method may return a tuple with further fields; these four and `start` are what everything else reads.
    """

    embed: Tensor
    post: State
    prior: State
    feat: Tensor

    @property
    def start(self) -> State:
        """The states from which imagination begins, without gradient."""
        return self.post.detach()


class Representation(nn.Module):
    """Encoder and latent dynamics over a batch. Alone, it learns from reward, continuation and KL; methods extend it.

    A method adds networks of its own (`predict`), losses (`losses`) with their weights (`scales`), and what follows an
    update (`after_update`). Acting, imagination, probes and figures use `encoder` and `dynamics` only. Parameters that
    require gradients are trained by the world model's optimiser.
    """

    def __init__(self, encoder: Encoder, dynamics: RSSM):
        super().__init__()
        self.encoder = encoder
        self.dynamics = dynamics
        self.scales: dict[str, float] = {}  # weight of each loss

    def forward(self, data: dict[str, Tensor], mask: Tensor | None = None) -> Filtered:
        """Filter preprocessed `data`: observations, action (B,T,A) and is_first (B,T). Only HRSSM reads `mask`."""
        embed = self.encoder(data)
        post, prior = self.dynamics.observe(embed, data["action"], data["is_first"])
        return Filtered(embed, post, prior, post.feat)

    def predict(self, filtered: Filtered) -> dict[str, Tensor]:
        """Outputs of the method's own networks, in full precision; runs under autocast."""
        return {}

    def losses(self, data: dict[str, Tensor], filtered: Filtered, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        """0-d losses before their weights, by name; outside autocast, without side effects."""
        return {}

    def after_update(self) -> None:
        """Called once after each optimiser step, for moving averages."""
