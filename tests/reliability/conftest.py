"""A saved state of a small model, and what may become of a model that a damaged one is given."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bittern.errors import BitternError
from bittern.toolkit import Toolkit

WAIT = 30  # seconds after which one case counts as hanging


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    tied = nn.Linear(32, 32, bias=False)
    last = nn.Linear(32, 32, bias=False)
    last.weight = tied.weight
    return nn.Sequential(tied, nn.BatchNorm1d(32), last, nn.ReLU(), nn.Linear(32, 4)).eval()


def picture(model: nn.Module) -> list[tuple[object, ...]]:
    """Return everything that restoring may change, with the bytes of every tensor."""
    found: list[tuple[object, ...]] = [
        (name, type(module), sorted(vars(module))) for name, module in model.named_modules()
    ]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found += [
        (name, id(t), t.dtype, bytes(t.detach().reshape(-1).view(torch.uint8).numpy()))
        for name, t in tensors.items()
    ]
    return found


@dataclass(frozen=True)
class State:
    """A saved state.

    Attributes:
        path: Where it is.
        files: The bytes of its files.
        x: An input.
        y: What the saved model makes of it.
    """

    path: Path
    files: dict[str, bytes]
    x: Tensor
    y: Tensor

    def copy(self, to: Path) -> Path:
        """Write it whole to another place."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        for name, data in self.files.items():
            (to / name).write_bytes(data)
        return to


@pytest.fixture(scope="session")
def make_state(tmp_path_factory: pytest.TempPathFactory, toolkit: Toolkit) -> Callable[..., State]:
    """Saves the small model, quantized by a recipe."""

    def make(recipe: str, seed: int = 0) -> State:
        path = tmp_path_factory.mktemp("state") / recipe
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
        model = build(seed)
        toolkit.quantize(model, recipe, data=[x])
        toolkit.save(model, path)
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        return State(path, files, x, model(x).detach())

    return make


@pytest.fixture(scope="session")
def state(make_state: Callable[..., State]) -> State:
    """A saved state with ranges of weights and inputs."""
    return make_state("int8")


@pytest.fixture
def no_hang() -> Iterator[Callable[[], None]]:
    """Give what is called before every case: the one before it did not hang."""

    def ring(*_: object) -> None:
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.alarm(WAIT) and None
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


Outcome = tuple[str, str]


@pytest.fixture
def survive(
    toolkit: Toolkit, state: State, no_hang: Callable[[], None]
) -> Callable[[Iterable[tuple[str, Callable[[], Path]]]], dict[str, str]]:
    """Restores from damaged directories; returns what became of each.

    ``"refused"`` with the model bit for bit what it was, ``"same"`` where it computes what the
    saved one did, ``"other"`` where it was restored and computes something else. Everything else
    fails the test.
    """

    def run(cases: Iterable[tuple[str, Callable[[], Path]]]) -> dict[str, str]:
        outcomes: dict[str, str] = {}
        model = build(7)
        before = picture(model)
        for label, damage in cases:
            path = damage()
            no_hang()
            try:
                toolkit.restore(model, path)
            except BitternError:
                assert picture(model) == before, f"{label}: the model changed"
                outcomes[label] = "refused"
                continue
            except BaseException as error:
                raise AssertionError(f"{label}: {error!r}") from error
            try:
                same = torch.equal(model(state.x), state.y)
            except Exception:  # of the damage that was asked for
                same = False
            outcomes[label] = "same" if same else "other"
            model = build(7)
            before = picture(model)
        return outcomes

    return run
