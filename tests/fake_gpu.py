"""Updates and acting on a made-up device 'gpu' whose tensors hold no data: what a GPU would need, without one.

    python tests/fake_gpu.py check 'OPTIONS' ...     at a small size; fails at a CPU tensor, a look at a value, or an
                                                     operation without deterministic CUDA code
    python tests/fake_gpu.py mutants 'OPTIONS' ...   the same with each of `MUTANTS`; prints how it fails
    python tests/fake_gpu.py count 'OPTIONS' ...     at the size of OPTIONS; prints kernel launches per update by part

A process of its own, since it renames torch's spare backend.
"""

import os
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer
import models
import networks
import tools
from exploration import Carry
from tests import helpers

# What calls at::Context::alertNotDeterministic in libtorch_cuda of this version. Its documentation also lists cumsum,
# which has a deterministic kernel by now.
TORCH = "2.13.0"
NOT_DETERMINISTIC = re.compile(
    r"aten\.(grid_sampler_\dd_backward|reflection_pad\dd_backward|replication_pad\dd_backward|_?upsample_\w+_backward|"
    r"adaptive_\w+_backward|avg_pool3d_backward|max_pool3d\w*_backward|fractional_\w+|max_unpool\w+|nll_loss\w*|"
    r"_ctc_loss_backward|put_?|histc|bincount|index_reduce\w*|scatter_reduce\w*|kthvalue|median)\b"
)
LIBRARY = torch.library.Library("aten", "IMPL")
NO_LAUNCH = re.compile(
    r"prim\.|profiler\.|aten\.(empty|new_empty|empty_like|empty_strided|new_empty_strided|detach|_unsafe_view|"
    r"squeeze_|unsqueeze_|transpose_)\b"
)


class Backend(_DummyBackendModule):
    def is_available(self):
        return False  # or constants would be made on it for real

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]  # autocast asks, though it is off


class Watch(TorchDispatchMode):
    """Counts kernel launches and collects what a GPU would object to."""

    def __init__(self):
        super().__init__()
        self.launches, self.problems = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        view = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
        self.launches += not view and not NO_LAUNCH.match(str(func))
        # Not raised here: what the backward pass raises from its thread loses its message.
        if NOT_DETERMINISTIC.match(str(func)):
            self.problems.append(f"{func} has no deterministic CUDA code")
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        self.problems += [f"{func} met a tensor on {x.device}" for x in tensors if x.device.type != "gpu"]
        return found

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        assert kind or not self.problems, self.problems[:3]


def prepare() -> None:
    """Make the device. Parameters are made where they belong and keep no values."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    # CUDA has a kernel for it; other devices need not, and would take many operations.
    LIBRARY.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "PrivateUse1")
    torch.nn.init.trunc_normal_ = lambda tensor, **_: tensor  # looks at values
    _foreach_utils._foreach_supported_types.append(FakeTensor)  # as on a GPU, one operation for many tensors
    dreamer.Agent.to = lambda self, device: self  # fake parameters cannot move
    FakeTensorMode.__deepcopy__ = lambda self, memo: self


def make_agent(config, **spaces) -> dreamer.Agent:
    discrete = config.actor_dist == "onehot"
    box = gymnasium.spaces.Box
    keys = {"image": box(0, 255, (*config.size, 3), np.uint8), "position": box(-np.inf, np.inf, (4,))}
    action = gymnasium.spaces.Discrete(3) if discrete else box(-1, 1, (6,))
    with torch.device("gpu"):
        agent = dreamer.make_agent(config, gymnasium.spaces.Dict(keys), action)
    for optimizer in agent.optimizers.values():
        optimizer.make_capturable()
    return agent


def make_batch(config, actions: int) -> dict[str, torch.Tensor]:
    lead = (config.batch_size, config.batch_length)
    flags = {key: torch.empty(lead, dtype=torch.bool, device="gpu") for key in ("is_first", "is_terminal")}
    shapes = {"position": (4,), "action": (actions,), "reward": ()}
    batch = {key: torch.empty((*lead, *shape), device="gpu") for key, shape in shapes.items()}
    return flags | batch | {"image": torch.empty((*lead, *config.size, 3), dtype=torch.uint8, device="gpu")}


def act(agent: dreamer.Agent, batch: dict[str, torch.Tensor]) -> None:
    obs = {key: value[:, 0] for key, value in batch.items() if key not in ("action", "reward")}
    n = len(obs["is_first"])
    with torch.no_grad():
        data = agent.world_model.preprocess(obs)
        carry = Carry(agent.world_model.dynamics.initial((n,)), torch.zeros(n, agent.actions, device="gpu"))
        for training, explore in ((False, False), (True, False), (True, agent.explorer is not None)):
            with Watch():
                agent.act(data, carry, training=training, explore=explore)


def check(argv: list[str]) -> None:
    config = helpers.make_config(*argv)
    agent = make_agent(config)
    batch = make_batch(config, agent.actions)
    tools.CudaGraphs.recording = True  # asserts that optimisers have their state
    for behavior in (False, True):
        with Watch() as watch:
            agent.update(batch, behavior=behavior)
    tools.CudaGraphs.recording = False
    act(agent, batch)
    print(f"checked {' '.join(argv)}: {watch.launches} launches", flush=True)


def count(argv: list[str]) -> None:
    def launches(length: int, horizon: int) -> int:
        config = tools.load_config(argv)
        config.batch_length, config.imag_horizon = length, horizon
        agent = make_agent(config)
        with Watch() as watch:
            agent.update(make_batch(config, agent.actions))
        return watch.launches

    # The number of operations is linear in both lengths.
    config, few = tools.load_config(argv), launches(4, 3)
    step, imagined = launches(5, 3) - few, launches(4, 4) - few
    rest = few - 4 * step - 3 * imagined
    total = rest + config.batch_length * step + config.imag_horizon * imagined
    print(f"update={total} recurrence step={step} imagination step={imagined} rest={rest}", flush=True)


# --- mutants --------------------------------------------------------------------------------------------------------


def look_at_a_value() -> None:
    loss = models.WorldModel.loss

    def mutant(self, batch, mask=None):
        total, *rest = loss(self, batch, mask)
        return total * (1.0 if total.item() > 0.0 else 2.0), *rest

    models.WorldModel.loss = mutant


def index_by_a_mask() -> None:
    symlog = networks.symlog
    networks.symlog = lambda x: symlog(x) + x[x > 0.0].sum()


def make_a_tensor_on_the_cpu() -> None:
    symlog = networks.symlog
    networks.symlog = lambda x: symlog(x) * torch.ones(1).to(x)


def make_a_tensor_of_a_number() -> None:
    bound = networks.bound_action
    networks.bound_action = lambda action: bound(action) * torch.tensor(1.0).to(action.device)


def pad_by_reflection() -> None:
    encode = networks.Encoder.forward

    def mutant(self, data):
        embed = encode(self, data)
        return torch.nn.functional.pad(embed, (1, 0), "reflect")[..., 1:]

    networks.Encoder.forward = mutant


def make_state_while_recording() -> None:
    tools.Optimizer._make_state = lambda self: None


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        look_at_a_value,
        index_by_a_mask,
        make_a_tensor_on_the_cpu,
        make_a_tensor_of_a_number,
        pad_by_reflection,
        make_state_while_recording,
    )
}


def check_mutants(argv: list[str]) -> None:
    for name, mutant in MUTANTS.items():
        if not (child := os.fork()):
            mutant()
            outcome = "not caught"
            try:
                check(argv)
            except Exception as error:
                outcome = " ".join(str(error).split())
            print(f"{name}: {outcome}", flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def main() -> None:
    command, *lines = sys.argv[1:]
    found = torch.__version__.split("+")[0]
    assert found == TORCH, f"torch is {found}: look in it for callers of alertNotDeterministic, then raise TORCH"
    prepare()
    for line in lines:
        with FakeTensorMode():
            {"check": check, "mutants": check_mutants, "count": count}[command](line.split())


if __name__ == "__main__":
    main()
