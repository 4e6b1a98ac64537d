"""Says how much of a model was analysed, and where and why the analysis stopped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from bittern.records import Coverage
from bittern.tracing.flow import Flow, OpNode, Value

__all__ = ["find_coverage", "guard_branches"]


def guard_branches(flow: Flow, model: nn.Module) -> None:
    """Fix what a module that decides by values hands from one child to another.

    Another input may take another way, which this run has not seen. A decision that no weight has
    part in (a mask, positions) and that leaves no child unvisited is only noted.
    """
    graph = flow.graph
    branches = {path: learned for path, learned in graph.branches.items() if "?" not in path}
    if not graph.fake:  # something depended on values, maybe out of sight (`tolist`)
        for idle in _unvisited(model, "", flow):
            home = idle
            while home and home not in graph.modules:
                home = home.rpartition(".")[0]
            branches.setdefault(home, False)
        for value in _dead_ends(flow):
            for axis in flow.of(value):
                axis.fix("its values are read outside of torch, or not at all", barrier=True)
    for path, learned in branches.items():
        unvisited = _unvisited(model.get_submodule(path), path, flow)
        if not unvisited and not learned:
            continue
        what = f"; {', '.join(unvisited[:3])} did not run" if unvisited else ""
        flow.barriers.setdefault(
            path,
            f"it looks at the value of a tensor, so another input may take another way{what}",
        )
        for value in _handed_over(flow, path):
            for axis in flow.of(value):
                axis.fix(f"{path or 'the model'} decides by values", barrier=True)


def _unvisited(module: nn.Module, path: str, flow: Flow) -> list[str]:
    """Return the weight-bearing modules below ``module`` that did not run."""
    found = []
    for name, child in module.named_modules(prefix=path):
        own = [n for n, _ in child.named_parameters(prefix=name, recurse=False)]
        if own and name not in flow.graph.modules and not any(map(flow.graph.read, own)):
            found.append(name)
    return found


def _dead_ends(flow: Flow) -> Iterator[Value]:
    """Yield what no operator reads: `tolist` and `numpy` take values where nobody can follow."""
    outputs = set(flow.graph.outputs)
    for node in flow.graph.nodes:
        made = [value for value in node.outputs if value is not None]
        written = node.op.split(".")[1].endswith("_")  # its output is its input
        if not written and not any(value.users or value in outputs for value in made):
            yield from (value for value in made if value.floating and value.learned)


def _handed_over(flow: Flow, path: str) -> Iterator[Value]:
    """Yield the tensors that cross the borders of a module's children."""
    for node in flow.graph.nodes:
        if not _within(node.module, path):
            continue
        for value in (*node.inputs(), *(v for v in node.outputs if v is not None)):
            if value.stored or not value.floating:
                continue
            ends: list[OpNode | None] = [value.producer, *value.users]
            homes = {None if n is None else _child(n.module, path) for n in ends}
            if len(homes) > 1 or homes == {""}:
                yield value


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _child(module: str, path: str) -> str | None:
    """Return which child of ``path`` a module belongs to, ``""`` for itself, ``None`` outside."""
    if not _within(module, path):
        return None
    rest = module[len(path) :].lstrip(".")
    return rest.partition(".")[0]


def find_coverage(flow: Flow, model: nn.Module) -> Coverage:
    """Return which weight-bearing modules were analysed in all their dimensions."""
    graph = flow.graph
    barriers = dict(flow.barriers)
    analysed: list[str] = []
    bearing = 0
    stored = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        own = [stored[id(p)] for _, p in module.named_parameters(recurse=False)]
        if not own:
            continue
        bearing += 1
        problem = ""
        for name in own:
            value = graph.stored.get(name)
            if value is None or not value.users:
                problem = problem or _unread(path, name, flow)
                continue
            for axis in flow.of(value):
                for leaf in axis.leaves():
                    if leaf.mark.barrier:
                        problem = problem or leaf.mark.fixed
        if problem:
            barriers.setdefault(path, problem)
        else:
            analysed.append(path)
    return Coverage(tuple(analysed), barriers, len(analysed) / bearing if bearing else 1.0)


def _unread(path: str, name: str, flow: Flow) -> str:
    if flow.graph.failure:
        return f"it was not reached: the run ended in {flow.graph.failed_in or 'the model'}"
    if path not in flow.graph.modules:
        return "it did not run with the example inputs"
    return f"{name} was not read with the example inputs"
