"""Brings a recipe and a model together: one pass over the modules, nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bittern.config import MatchModel, Recipe, SpecModel
from bittern.errors import ModelError, NumericsError, PlanError, RecipeError
from bittern.nn import TensorQuantizer, original_class
from bittern.nn.computed import sources_of, weight_of
from bittern.nn.lowrank import LowRank
from bittern.nn.transforms import Transforms
from bittern.numerics.layout import check_dtype
from bittern.planning.fit import check_backend, check_shape, rotation_warnings
from bittern.planning.match import Matcher
from bittern.planning.only_read import only_read
from bittern.planning.specs import resolve_spec
from bittern.records import ModelAdapter, ModuleRule, Plan, PlanEntry, Slot
from bittern.registry import ClassTable, Match, NoMatch, Registry, nearest, resolve

__all__ = ["build_plan", "slots_of"]


UNNAMED = "no recipe rule names it"
# What has a KV cache: torch's attention, and what a plugin's rule says is like one.
ATTENTION = {"class": ["MultiheadAttention", "Attention"]}
CACHE = "kv_cache"


@dataclass
class _Rule:
    """A recipe rule, or a ``skip``, with its matcher and what it met.

    Attributes:
        matcher: Its pattern.
        specs: What it says about slots; nothing for a ``skip``.
        label: For errors.
        seen: The modules it matched.
        usable: Whether one of them has a module rule.
        leaf: Whether one of them is more than a container of others.
    """

    matcher: Matcher
    specs: Mapping[str, SpecModel | None]
    label: str
    seen: set[str] = field(default_factory=set)
    usable: bool = False
    leaf: bool = False


def build_plan(
    model: nn.Module,
    recipe: Recipe,
    registry: Registry,
    *,
    adapter: ModelAdapter | None = None,
    modules: ClassTable[ModuleRule] | None = None,
) -> Plan:
    """Decide for every module of ``model`` whether and how it is quantized.

    Args:
        model: The model; converted modules are planned as what they were.
        recipe: A whole recipe.
        registry: Formats and algorithms.
        adapter: What the model's framework knows; gives roles.
        modules: Module rules; the registry's by default.

    Raises:
        RecipeError: A pattern matches nothing (with ``strict``), or a spec is impossible.
        PlanError: Nothing would be quantized.
        ModelError: A lazy module has no weights yet.
    """
    adapter = adapter if adapter is not None else ModelAdapter()
    if adapter.quantized_by is not None:
        raise PlanError(
            f"this model is quantized already, by {adapter.quantized_by}",
            hint="load the original checkpoint",
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                "it has no shape yet, the layer is lazy",
                where=name,
                hint="run the model once, then plan",
            )
    table = modules if modules is not None else registry.modules
    rules = [
        _Rule(Matcher(rule.match), rule.specs(), f"rule {i}: {rule.match}")
        for i, rule in enumerate(recipe.rules)
    ]
    skips = [_Rule(Matcher(match), {}, f"skip {i}: {match}") for i, match in enumerate(recipe.skip)]
    if recipe.kv_cache is not None:  # first, so that a rule about k or v wins
        cache = {"k": recipe.kv_cache, "v": recipe.kv_cache}
        rules.insert(0, _Rule(Matcher(MatchModel.model_validate(ATTENTION)), cache, CACHE))
    entries: list[PlanEntry] = []
    skipped: dict[str, str] = {}
    classes: dict[str, str] = {}
    warnings: list[str] = []
    for path, module in _own_modules(model):
        cls = original_class(module)
        bearing = any(True for _ in module.parameters(recurse=False))
        match = table.find(module, cls)
        like = match.rule.like if isinstance(match, Match) else None
        by_name = isinstance(match, Match) and match.rule.by_name
        wanted = _wanted(rules, path, cls, adapter.roles, like=like, by_name=by_name)
        usable = isinstance(match, Match) and match.rule.quantized is not None
        skip = None
        for rule in skips:
            if rule.matcher(path, cls, adapter.roles, like=like):
                rule.seen.add(path)
                skip = skip if skip is not None else rule.matcher
        swept = False
        for rule in (*rules, *skips):
            passed_by = by_name and path in rule.seen and rule.matcher.sweeps(path)
            swept = swept or (passed_by and any(rule.specs.values()))
            rule.usable = rule.usable or (path in rule.seen and usable and not passed_by)
            rule.leaf = rule.leaf or (path in rule.seen and (bearing or _childless(module)))
        if not any(spec is not None for spec, _ in wanted.values()):
            if bearing and wanted:
                skipped[path] = "switched off by the recipe"
            elif bearing and swept:
                skipped[path] = f"a {cls.__qualname__} is quantized only where a recipe names it"
            elif bearing:
                lost = not usable and _matrices(module)
                why = f", and {_no_rule(match, module, cls)}" if lost else ""
                skipped[path] = f"{UNNAMED}{why}"
            continue
        if skip is not None:
            if bearing:
                skipped[path] = f"the recipe skips {skip}"
            continue
        if not isinstance(match, Match) or match.rule.quantized is None:
            if bearing:
                skipped[path] = _no_rule(match, module, cls)
            continue
        if "forward" in vars(module):
            skipped[path] = (
                "its forward was replaced on the object itself (as hooks of accelerate do), so a "
                "quantized class would not be run"
            )
            continue
        above, _, own = path.rpartition(".")
        if path and only_read(model.get_submodule(above), own):
            skipped[path] = f"{above or 'the model'} reads its weight and never calls it"
            continue
        slots = slots_of(match, module)
        made = next((slot.tensor for slot in slots if slot.tensor in vars(module)), None)
        if made is not None:
            skipped[path] = (
                f"its {made} is no parameter: a hook makes it anew before every forward, as those "
                "of torch.nn.utils.weight_norm and prune do (remove the hook, or use "
                "torch.nn.utils.parametrizations)"
            )
            continue
        found = list(_entries(path, module, match, wanted, registry, warnings=warnings))
        if found:
            entries.extend(found)
            classes[path] = match.rule.quantized
            warnings += rotation_warnings(path, found, slots)
            held = {slot.tensor for slot in slots}
            stacked = any(slot.stacked for slot in slots)
            warnings += [
                f"{_at(path, name)} stays as it is: the rule of {match.plugin} for "
                f"{match.rule.target} has no slot for it"
                for name in _matrices(module, stacked=stacked)
                if name not in held
            ]
        elif bearing:
            skipped[path] = "no slot of the recipe fits it"
    for entry in entries:
        if entry.tensor is not None:  # what a computed weight is computed from goes with it
            skipped.pop(sources_of(entry.module, entry.tensor), None)
    warnings += table.dead()
    _check_patterns([*rules, *skips], recipe, model, warnings)
    if not entries:
        raise PlanError(
            f"the recipe {recipe.name!r} quantizes nothing in this model",
            hint="; ".join(f"{path}: {skipped[path]}" for path in _telling(skipped)[:3]) or None,
        )
    algorithm = tuple((step.name, step.options) for step in recipe.algorithm)
    for name, _ in algorithm:
        registry.algorithms.get(name)  # an unknown name is an error now, not after the data
    before, after = _bytes(model, entries, adapter.dtype)
    return Plan(
        recipe=recipe.name,
        entries=tuple(entries),
        skipped=skipped,
        algorithm=algorithm,
        classes=classes,
        parameters=sum(p.numel() for p in model.parameters()),
        bytes_before=before,
        bytes_after=after,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _telling(skipped: Mapping[str, str]) -> list[str]:
    """Return the paths of skipped modules, those that a recipe named first."""
    return sorted(skipped, key=lambda path: skipped[path].startswith(UNNAMED))


def slots_of(match: Match[ModuleRule], module: nn.Module) -> tuple[Slot, ...]:
    """Return the slots that a rule gives to a live module.

    Raises:
        PluginError: The rule's ``slots_from`` does not resolve.
    """
    if match.rule.slots_from is None:
        return match.rule.slots
    found: tuple[Slot, ...] = tuple(resolve(match.rule.slots_from, plugin=match.plugin)(module))
    return found


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model's modules, without the quantizers that conversion added."""
    for path, module in model.named_modules():
        if not isinstance(module, TensorQuantizer | Transforms | LowRank):
            yield path, module


def _matrices(module: nn.Module, *, stacked: bool = False) -> list[str]:
    """Return the names of a module's own parameters that are worth quantizing: no vectors.

    Args:
        module: The module.
        stacked: Whether its parameters stack those of experts.
    """
    least = 3 if stacked else 2
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() >= least]


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _no_rule(match: Match[ModuleRule] | NoMatch, module: nn.Module, cls: type) -> str:
    """Return why no rule takes a module, and which weights that concerns."""
    reason = match.rule.reason if isinstance(match, Match) else match.reason
    if reason:
        return reason
    names = [name for name, _ in module.named_parameters(recurse=False)]
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"no plugin has a rule for {cls.__qualname__} (which holds {some})"


def _childless(module: nn.Module) -> bool:
    return next(iter(module.children()), None) is None


def _wanted(
    rules: list[_Rule],
    path: str,
    cls: type,
    roles: Mapping[str, str],
    *,
    like: str | None,
    by_name: bool,
) -> dict[str, tuple[SpecModel | None, str]]:
    wanted: dict[str, tuple[SpecModel | None, str]] = {}
    for rule in rules:
        if rule.matcher(path, cls, roles, like=like):
            rule.seen.add(path)
            swept = by_name and rule.matcher.sweeps(path)
            for slot, spec in rule.specs.items():
                if spec is None or not swept:  # what switches off may sweep
                    wanted[slot] = (spec, rule.label)
    return wanted


def _entries(
    path: str,
    module: nn.Module,
    match: Match[ModuleRule],
    wanted: Mapping[str, tuple[SpecModel | None, str]],
    registry: Registry,
    *,
    warnings: list[str],
) -> Iterator[PlanEntry]:
    slots = {slot.name: slot for slot in slots_of(match, module)}
    known = {*slots, *(slot.spoken for slot in slots.values())}
    for name, (spec, label) in wanted.items():
        if name not in known and spec is not None:
            cls = original_class(module).__qualname__
            warnings.append(
                f"{label}: {cls} has no slot {name!r} (it has {', '.join(slots)}); ignored there"
            )
    for name, slot in slots.items():
        spec, label = wanted.get(name, wanted.get(slot.spoken, (None, "")))
        if spec is None:
            continue
        tensor = weight_of(module, slot.tensor or name) if slot.kind == "weight" else None
        whole = resolve_spec(spec, slot, registry.formats, where=label)
        check_backend(whole, registry.kernels, where=label)
        if isinstance(tensor, Tensor):
            try:
                check_dtype(tensor)
                check_shape(tensor.shape, whole)
            except NumericsError as error:
                raise RecipeError(
                    f"{_at(path, name)}: {error.what}", where=label, hint=error.hint
                ) from error
        yield PlanEntry(
            module=path,
            slot=name,
            spec=whole,
            rule=match.rule.target,
            plugin=match.plugin,
            kind=slot.kind,
            slot_rule=slot,
            shape=tuple(tensor.shape) if isinstance(tensor, Tensor) else None,
            recipe_rule=label,
            like=match.rule.like,
        )


def _check_patterns(
    rules: list[_Rule], recipe: Recipe, model: nn.Module, warnings: list[str]
) -> None:
    every = [path for path, _ in _own_modules(model)]
    paths = [path for path in every if path]
    for rule in rules:
        problem = hint = ""
        skip = rule.label.startswith("skip")
        for pattern in rule.matcher.match.name:
            if not any(rule.matcher.names(pattern, path) for path in every):
                problem = f"the pattern {pattern!r} matches no module"
                close = ", ".join(nearest(pattern.removeprefix("re:"), paths, count=3))
                hint = f"the closest names are {close}"
        if rule.label == CACHE and not rule.seen:
            problem, hint = "no attention of this model is known to cache keys", "leave it out"
        if not problem and not rule.seen and not rule.matcher.by_role_only and not skip:
            problem = f"the pattern {str(rule.matcher)!r} matches no module"
            kinds = sorted({original_class(m).__name__ for _, m in _own_modules(model)})
            close = ", ".join(nearest(str(rule.matcher).removeprefix("class "), kinds, count=3))
            hint = f"the closest classes are {close}"
        if any(rule.specs.values()):
            useless = not rule.usable
        else:  # what switches off by name must name more than containers
            useless = bool(rule.matcher.match.name) and not rule.leaf
        if not problem and rule.seen and useless:
            some = sorted(rule.seen)[0]
            problem = f"the pattern {str(rule.matcher)!r} matches only modules without a rule"
            children = f"{some}.* or *" if some else "*"
            hint = f"it matches {some or 'the model itself'}; name its children with {children}"
        if not problem:
            continue
        if recipe.strict:
            raise RecipeError(problem, where=rule.label, hint=f"{hint}; or set strict: false")
        warnings.append(f"{rule.label}: {problem}; {hint}")


def _bytes(model: nn.Module, entries: list[PlanEntry], dtype: str | None) -> tuple[int, int]:
    """Return stored bytes before and after, tensors with shared storage counted once."""
    import torch

    width = getattr(torch, dtype).itemsize if dtype is not None else None
    modules = dict(model.named_modules(remove_duplicate=False))  # shared modules: every name
    quantized = {(id(modules[e.module]), e.tensor): e for e in entries if e.shape is not None}
    before: dict[int, int] = {}
    after: dict[tuple[int | str, str], int] = {}  # a tied weight: one copy per way it is stored
    computed: list[str] = []
    for entry in entries:
        if entry.tensor is not None and entry.shape is not None:
            source = sources_of(entry.module, entry.tensor)
            if source in modules:
                computed.append(f"{source}.")
                after[source, ""] = _stored(entry, entry.shape)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        item = width if width is not None and tensor.is_floating_point() else tensor.element_size()
        size = before[id(tensor)] = tensor.numel() * item
        path, _, local = name.rpartition(".")
        found = quantized.get((id(modules.get(path)), local))
        if found is not None:
            after[id(tensor), str(found.spec)] = _stored(found, tuple(tensor.shape))
        elif not name.startswith(tuple(computed)):
            after[id(tensor), ""] = size
    return sum(before.values()), sum(after.values())


def _stored(entry: PlanEntry, shape: tuple[int, ...]) -> int:
    """Return the bytes of a quantized tensor, its scales included."""
    return math.ceil(entry.spec.bits_per_element(shape) * math.prod(shape) / 8)
