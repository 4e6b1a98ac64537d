"""The part of `ModuleConformance` about what conversion keeps and what it can undo."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bittern.convert import revert
from bittern.errors import BitternError
from bittern.nn import QuantModule, named_quantizers, original_class
from bittern.testing.base import Conformance, check
from bittern.testing.compare import assert_bit_identical
from bittern.testing.module_cases import PATH, Bench, Holder, ModuleCase, call, floating, gradients

__all__ = ["ModuleStructure"]


class ModuleStructure(Conformance):
    """Objects, names, keys, ties, hooks and places stay; everything can be undone."""

    def bench(self, case: ModuleCase) -> Bench:
        """Return what builds and runs a case."""
        return Bench(case, self.toolkit())

    def test_a_rule_takes_the_class(self, case: ModuleCase) -> None:
        """Protects users from a plugin that is loaded and does not know its own classes."""
        bench = self.bench(case)
        rule = bench.rule()
        plan = bench.toolkit.plan(bench.holder(), bench.recipe())
        found = {entry.plugin for entry in plan.entries}
        label = self.subject().label
        check(
            found == {label},
            f"the rule of {', '.join(found)} takes it, not {label}'s ({rule.target}); a more "
            "precise target, or a higher priority, wins",
        )

    def test_conversion_keeps_the_object(self, case: ModuleCase) -> None:
        """Protects users who hold the module elsewhere, or ask ``isinstance``."""
        bench = self.bench(case)
        holder = bench.holder()
        before, cls = holder.inner, type(holder.inner)
        bench.quantize(holder)
        check(holder.inner is before, "conversion replaced the module by another object")
        check(isinstance(holder.inner, cls), f"it is no {cls.__name__} any more")
        check(isinstance(holder.inner, QuantModule), "it is no QuantModule")

    def test_conversion_keeps_parameters(self, case: ModuleCase) -> None:
        """Protects users whose optimizer holds the parameters."""
        bench = self.bench(case)
        holder = bench.holder()
        before = dict(holder.named_parameters())
        bench.quantize(holder)
        after = dict(holder.named_parameters())
        check(list(after) == list(before), f"the parameters {list(before)} became {list(after)}")
        changed = [name for name, p in after.items() if p is not before[name]]
        check(not changed, f"other objects than before: {', '.join(changed)}")

    def test_conversion_keeps_tied_weights(self, case: ModuleCase) -> None:
        """Protects users of tied embeddings from two copies that drift apart."""
        bench = self.bench(case)
        model = nn.ModuleDict({"a": bench.module(), "b": bench.module(seed=1)})
        tensors = [s.tensor or s.name for s in bench.slots() if s.kind == "weight"]
        tensors = [n for n in tensors if isinstance(getattr(model["a"], n, None), nn.Parameter)]
        if not tensors:
            pytest.skip("it has no weight parameter to tie")
        for name in tensors:
            setattr(model["b"], name, getattr(model["a"], name))
        recipe = bench.recipe("a", "b")
        bench.toolkit.convert(model, bench.toolkit.plan(model, recipe))
        for name in tensors:
            tied = getattr(model["a"], name) is getattr(model["b"], name)
            check(tied, f"{name} is no longer tied")

    def test_conversion_keeps_state_dict_keys(self, case: ModuleCase) -> None:
        """Protects users who load or save with torch, before or after."""
        bench = self.bench(case)
        holder = bench.holder()
        before = {name: (v.dtype, v.shape) for name, v in _tensors(holder).items()}
        bench.quantize(holder)
        after = {name: (v.dtype, v.shape) for name, v in _tensors(holder).items()}
        check(
            after == before,
            f"the state_dict had {list(before)} and has {list(after)}; buffers that a quantized "
            "class adds must not be persistent",
        )

    def test_the_original_state_dict_loads_strictly(self, case: ModuleCase) -> None:
        """Protects users who quantize first and load the checkpoint later."""
        bench = self.bench(case)
        holder = bench.holder()
        state = copy.deepcopy(bench.holder(seed=1).state_dict())
        bench.quantize(holder)
        try:
            holder.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise AssertionError(f"the original's state_dict does not load: {error}") from error
        wanted = {n: v for n, v in state.items() if isinstance(v, torch.Tensor)}
        assert_bit_identical(wanted, dict(_tensors(holder)), what="state_dict")

    def test_deepcopy_is_equal_and_independent(self, case: ModuleCase) -> None:
        """Protects users who keep a copy to compare with."""
        bench = self.bench(case)
        holder = bench.quantized()
        expected = bench.output(holder)
        twin = copy.deepcopy(holder)
        assert_bit_identical(expected, bench.output(twin), what="output of the copy")
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        for _, quantizer in named_quantizers(twin):
            if quantizer.amax is not None:
                quantizer.set_amax(quantizer.amax * 0 + 1e-3)
        assert_bit_identical(expected, bench.output(holder), what="output after the copy changed")

    def test_train_and_eval_propagate(self, case: ModuleCase) -> None:
        """Protects users from a quantizer that stays in the other mode."""
        bench = self.bench(case)
        holder = bench.quantized()
        for training in (True, False):
            holder.train(training)
            wrong = [n for n, m in holder.named_modules() if m.training is not training]
            check(not wrong, f"train({training}) does not reach {', '.join(wrong)}")

    def test_revert_undoes_everything(self, case: ModuleCase) -> None:
        """Protects users who want their model back."""
        bench = self.bench(case)
        holder = bench.holder()
        expected = bench.output(holder)
        before = _shape(holder)
        bench.quantize(holder)
        revert(holder)
        after = _shape(holder)
        check(after == before, f"after revert there is {after}, before there was {before}")
        assert_bit_identical(expected, bench.output(holder), what="output after revert")

    def test_hooks_from_before_conversion_fire(self, case: ModuleCase) -> None:
        """Protects users of accelerate, FSDP and profilers, all of which hang on hooks."""
        bench = self.bench(case)
        holder = bench.holder()
        fired: list[str] = []
        holder.inner.register_forward_pre_hook(lambda *_: fired.append("forward pre"))
        holder.inner.register_forward_hook(lambda *_: fired.append("forward"))
        backward = case.differentiable and bool(floating(bench.batch()))
        if backward:
            holder.inner.register_full_backward_hook(lambda *_: fired.append("backward"))
        bench.quantize(holder)
        fired.clear()
        self._forward_and_backward(bench, holder, backward=backward)
        wanted = ["forward pre", "forward", *(["backward"] if backward else [])]
        check(fired == wanted, f"of the hooks {wanted} these ran: {fired}")

    def test_conversion_inside_a_parent(self, case: ModuleCase) -> None:
        """Protects users whose model is more than one layer: paths, labels and places hold."""
        bench = self.bench(case)
        model = nn.Module()
        model.blocks = nn.ModuleList(bench.holder(seed=seed) for seed in range(2))
        paths = [f"blocks.{i}.{PATH}" for i in range(2)]
        modules = dict(model.named_modules())
        plan = bench.toolkit.plan(model, bench.recipe(*paths))
        check(list(plan.modules) == paths, f"the plan names {plan.modules} instead of {paths}")
        labels = {entry.plugin for entry in plan.entries}
        check(labels == {self.subject().label}, f"the plan names the plugins {labels}")
        bench.toolkit.convert(model, plan)
        for path, module in modules.items():
            check(model.get_submodule(path) is module, f"{path!r} is another object")
            swapped = isinstance(module, QuantModule)
            inside = any(path.startswith(f"{p}.") for p in paths)
            check(inside or swapped == (path in paths), f"{path!r}: converted is {swapped}")
        converted = [model.get_submodule(path) for path in paths]
        classes, originals = {type(m) for m in converted}, {original_class(m) for m in converted}
        check(len(classes) == len(originals), "modules of one class got several quantized classes")

    def test_a_subclass_with_its_own_forward_is_left_out(self, case: ModuleCase) -> None:
        """Protects users of a subclass whose forward the quantized class would undo in silence."""
        bench = self.bench(case)
        model = _WithLinear(bench.module())
        rule = bench.rule(model.inner)
        own: Any = type(model.inner)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return own.forward(self, *args, **kwargs)

        model.inner.__class__ = type(f"Own{own.__name__}", (own,), {"forward": forward})
        recipe = bench.recipe(PATH)
        recipe = {
            **recipe,
            "rules": [*recipe["rules"], {"match": "other", "weight": "int8"}],
            "strict": False,
        }
        try:
            plan = bench.toolkit.plan(model, recipe)
        except BitternError as error:
            raise AssertionError(f"the plan fails: {error}") from error
        if rule.subclass_forward and rule.predicate is None:
            check(PATH in plan.modules, "the rule says subclass_forward, and the plan skips it")
            return
        check(
            PATH not in plan.modules,
            f"a subclass with its own forward is taken by {plan.classes.get(PATH)}",
        )
        reason = plan.skipped.get(PATH, "")
        holds = any(True for _ in model.inner.parameters(recurse=False))
        check(reason or not holds, "it is left out and plan.skipped does not say why")

    @staticmethod
    def _forward_and_backward(bench: Bench, holder: Holder, *, backward: bool) -> None:
        if backward:
            gradients(holder, bench.batch())
        else:
            with torch.no_grad():
                call(holder, bench.batch())


class _WithLinear(Holder):
    """The module under test beside one that core quantizes, so that a plan is not empty."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.other = nn.Linear(4, 4)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: v for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def _shape(model: nn.Module) -> dict[str, tuple[str, list[str], list[str]]]:
    """Return class, attributes and children of every module."""
    return {
        name: (original_class(m).__qualname__ + type(m).__name__, sorted(vars(m)), list(m._modules))
        for name, m in model.named_modules()
    }
