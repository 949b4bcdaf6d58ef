"""An emulator of CUDA graphs on the CPU: what is recorded is a tape of operations, and a replay runs them again.

As on a GPU nothing is executed by a recording (what it wrote is put back), the host's code does not run in a replay,
so that values from the host are frozen in, and a replay overwrites the results of the one before. A look at a tensor's
value raises while recording.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LOOKS = {
    f"aten.{name}.default"
    for name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
}


def tensors_of(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Collects the operations inside, and of each tensor from outside the value before it was first written to."""

    checking = False  # whether an argument is being checked, which happens on a CPU alone

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func) in LOOKS and not Tape.checking:
            raise RuntimeError(f"{func} looks at a value")
        schema = func._schema
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        values = (*args, *(kwargs.get(a.name) for a in schema.arguments[len(args) :]))
        for x in tensors_of([value for value, write in zip(values, written, strict=True) if write]):
            if storage_of(x) not in self.made and storage_of(x) not in self.before:
                whole = torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
                self.before[storage_of(x)] = whole, whole.clone()

        def keep(x):
            return x.detach() if isinstance(x, Tensor) else x  # later operations may change its shape

        kept_args, kept_kwargs = tree_map(keep, args), tree_map(keep, kwargs)
        out = func(*args, **kwargs)
        view = any(result.alias_info is not None for result in schema.returns)
        if not view:
            self.made |= {storage_of(x) for x in tensors_of(out)}
        if any(written):
            self.calls.append((func, kept_args, kept_kwargs, None))
        elif not view:
            self.calls.append((func, kept_args, kept_kwargs, [x.detach() for x in tensors_of(out)]))
        return out


class Graph:
    def __init__(self):
        self.tape = Tape()

    @torch.no_grad()
    def replay(self) -> None:
        assert self.tape.calls
        for func, args, kwargs, results in self.tape.calls:
            out = func(*args, **kwargs)
            for old, new in zip(results, tensors_of(out), strict=True) if results is not None else ():
                old.copy_(new)


@contextlib.contextmanager
def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    rng = torch.get_rng_state()
    with graph.tape:
        yield
    for whole, value in graph.tape.before.values():
        whole.copy_(value)
    torch.set_rng_state(rng)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


def unchecked(function: Callable) -> Callable:
    """`function` may look at its arguments' values, as on a CPU it does to check them."""

    def call(*args, **kwargs):
        before, Tape.checking = Tape.checking, True
        try:
            return function(*args, **kwargs)
        finally:
            Tape.checking = before

    return call


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch, "quantile", unchecked(torch.quantile))
    monkeypatch.setattr(torch.nn.functional, "one_hot", unchecked(torch.nn.functional.one_hot))
