"""Which recipe rule decides, what a pattern means, and what is an error."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bittern.config import MatchModel
from bittern.errors import CalibrationError, ModelError, PlanError, RecipeError
from bittern.planning import build_plan
from bittern.planning.match import Matcher
from bittern.records import ModelAdapter, ModuleRule, Plan
from bittern.registry import target_of
from bittern.report import Report
from bittern.report.console import show_plan
from bittern.toolkit import Toolkit

Make = Callable[..., nn.Module]


@pytest.fixture
def plan_of(toolkit: Toolkit) -> Callable[..., Plan]:
    """Plans a model by rules and other keys of a recipe."""

    def make(
        model: nn.Module, *rules: dict[str, Any], adapter: ModelAdapter | None = None, **keys: Any
    ) -> Plan:
        recipe = toolkit.recipe({"name": "mine", "rules": list(rules), **keys})
        return build_plan(model, recipe, toolkit.registry, adapter=adapter)

    return make


def formats(plan: Plan) -> dict[str, str]:
    return {entry.path: entry.format for entry in plan.entries}


ALL = {"match": {"class": "Linear"}, "weight": "int8", "input": "int8"}


# --- precedence -----------------------------------------------------------------------------------


def test_a_later_rule_replaces_what_an_earlier_one_said_about_the_same_slot(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "down", "weight": "int4"})

    assert formats(plan) == {
        "up.weight": "int8",
        "up.input": "int8",
        "down.weight": "int4",
        "down.input": "int8",
    }
    by_path = {entry.path: entry.recipe_rule for entry in plan.entries}
    assert by_path["down.weight"] == "rule 1: down"
    assert by_path["down.input"] == "rule 0: class Linear"


def test_the_order_of_rules_decides_not_their_closeness(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), {"match": "down", "weight": "int4"}, ALL)

    assert set(formats(plan).values()) == {"int8"}


@pytest.mark.parametrize("off", ["none", False, None])
def test_none_switches_a_slot_off(
    off: object, make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "down", "weight": off})

    assert set(formats(plan)) == {"up.weight", "up.input", "down.input"}


def test_a_module_whose_slots_are_all_off_is_reported(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "down", "weight": "none", "input": "none"})

    assert plan.skipped == {"norm": "no recipe rule names it", "down": "switched off by the recipe"}


def test_skip_beats_every_rule(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "down", "weight": "int4"}, skip=["down"])

    assert plan.modules == ("up",)
    assert plan.skipped["down"] == "the recipe skips down"


def test_entries_come_in_the_order_of_the_model(
    make_lm: Make, plan_of: Callable[..., Plan]
) -> None:
    model = make_lm()
    plan = plan_of(model, {"match": "head", "weight": "int8"}, ALL)

    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert list(plan.modules) == order
    assert [e.slot for e in plan.entries][:2] == ["weight", "input"]


# --- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("layers.0.q", ["layers.0.q"]),
        ("*.q", ["layers.0.q", "layers.1.q"]),
        ("layers.[01].[qk]", ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k"]),
        ({"name": ["*.o", "head"]}, ["layers.0.o", "layers.1.o", "head"]),
        (r"re:layers\.\d+\.(q|o)", ["layers.0.q", "layers.0.o", "layers.1.q", "layers.1.o"]),
        ({"class": "Linear", "name": "layers.1.*"}, [f"layers.1.{n}" for n in "qkvo"]),
        ({"class": "Embedding"}, ["embed"]),
        ({"role": "head"}, ["head"]),
        ({"role": ["head", "embedding"]}, ["embed", "head"]),
        ({"role": "head", "class": "Linear"}, ["head"]),
    ],
    ids=str,
)
def test_a_pattern_means(
    match: Any,
    expected: list[str],
    make_lm: Make,
    plan_of: Callable[..., Plan],
    lm_adapter: ModelAdapter,
) -> None:
    plan = plan_of(make_lm(), {"match": match, "weight": "int8"}, adapter=lm_adapter)

    assert list(plan.modules) == expected


@pytest.mark.parametrize("pattern", ["layers.0", "ayers.0.q", "re:layers", "re:q", "LAYERS.0.q"])
def test_a_name_pattern_means_whole_names(pattern: str) -> None:
    matcher = Matcher(MatchModel(name=pattern))

    assert not matcher("layers.0.q", nn.Linear, {})


def test_every_condition_has_to_hold() -> None:
    matcher = Matcher(MatchModel.model_validate({"name": "*", "class": "Linear", "role": "head"}))

    assert matcher("a", nn.Linear, {"a": "head"})
    assert not matcher("a", nn.Conv1d, {"a": "head"})
    assert not matcher("a", nn.Linear, {"a": "norm"})
    assert not matcher("a", nn.Linear, {})


class Mine(nn.Linear):
    pass


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_classes_are_found_along_the_mro(plan_of: Callable[..., Plan]) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Mine(4, 4), "c": nn.Conv1d(4, 4, 1)})

    every = plan_of(model, {"match": {"class": "Linear"}, "weight": "int8"})
    assert every.modules == ("a", "b")
    only = plan_of(model, {"match": {"class": "Mine"}, "weight": "int8"})
    assert only.modules == ("b",)


# --- what is like a class of torch ----------------------------------------------------------------


class Dense(nn.Module):
    """A framework's linear layer; no nn.Linear, and not called so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.fixture
def dense_plan(toolkit: Toolkit) -> Callable[..., Plan]:
    """Plans a Dense and a Linear, with a plugin's rule for Dense."""
    from bittern.builtin.modules import INPUT, WEIGHT

    def make(recipe: Any, **options: Any) -> Plan:
        rule = ModuleRule(
            target=target_of(Dense),
            quantized="bittern.nn.linear:QuantLinear",
            slots=(WEIGHT, INPUT),
            **options,
        )
        model = nn.ModuleDict({"dense": Dense(), "linear": nn.Linear(4, 4)})
        table = toolkit.registry.modules.extended([(rule, "bittern-dense 1.0", False)])
        return build_plan(model, toolkit.recipe(recipe), toolkit.registry, modules=table)

    return make


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only", "int8-smoothquant", "fp8"])
def test_a_shipped_recipe_takes_what_a_plugin_says_is_like_linear(
    recipe: str, dense_plan: Callable[..., Plan]
) -> None:
    plan = dense_plan(recipe, like="Linear")

    assert plan.modules == ("dense", "linear")
    assert {entry.module: entry.like for entry in plan.entries} == {
        "dense": "Linear",
        "linear": None,
    }
    entries = plan.by_module()
    assert [e.spec for e in entries["dense"].values()] == [
        e.spec for e in entries["linear"].values()
    ]


def test_without_likeness_a_class_is_known_by_its_own_name_only(
    dense_plan: Callable[..., Plan],
) -> None:
    assert dense_plan("int8").modules == ("linear",)
    assert dense_plan("int8", like="Conv2d").modules == ("dense", "linear")


def test_what_is_like_linear_still_has_its_own_name(dense_plan: Callable[..., Plan]) -> None:
    off = {"match": {"class": "Dense"}, "weight": "none", "input": "none"}
    plan = dense_plan({"extends": "int8", "rules": [off]}, like="Linear")

    assert plan.modules == ("linear",)
    assert plan.skipped["dense"] == "switched off by the recipe"


def test_a_skip_by_class_holds_for_what_is_like_it(dense_plan: Callable[..., Plan]) -> None:
    everything = {"match": "*", "weight": "int8"}
    recipe = {"rules": [everything], "skip": [{"class": "Linear"}], "strict": False}
    with pytest.raises(PlanError, match="quantizes nothing"):
        dense_plan(recipe, like="Linear")


def test_likeness_is_shown_in_the_plan(dense_plan: Callable[..., Plan]) -> None:
    plan = dense_plan("int8", like="Linear")
    console = Console(width=120, file=io.StringIO())
    show_plan(plan, console)

    assert "bittern-dense 1.0, like Linear" in console.file.getvalue()
    rows = Report(plan=plan).to_dict()["entries"]
    assert {row["module"]: row["like"] for row in rows} == {"dense": "Linear", "linear": None}


def test_the_model_itself_matches_a_star(plan_of: Callable[..., Plan]) -> None:
    assert plan_of(nn.Linear(4, 4), {"match": "*", "weight": "int8"}).modules == ("",)


def test_a_converted_model_is_planned_as_what_it_was(
    make_mlp: Make, plan_of: Callable[..., Plan], toolkit: Toolkit, batches: list[Tensor]
) -> None:
    model = make_mlp()
    before = plan_of(model, ALL)
    toolkit.quantize(model, "int8", batches)

    assert plan_of(model, ALL) == before


# --- errors of patterns ---------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_names_the_three_closest_modules(
    make_lm: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match=r"'layer\.0\.q' matches no module") as caught:
        plan_of(make_lm(), {"match": "layer.0.q", "weight": "int8"})

    assert caught.value.where == "rule 0: layer.0.q"
    hint = caught.value.hint or ""
    closest = hint.removeprefix("the closest names are ").split("; or set strict: false")[0]
    assert closest.split(", ")[0] == "layers.0.q"
    assert len(closest.split(", ")) == 3


def test_one_bad_pattern_of_several_is_found(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="'dwon' matches no module"):
        plan_of(make_mlp(), {"match": {"name": ["up", "dwon"]}, "weight": "int8"})


def test_a_class_that_does_not_occur_names_the_closest(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match="class Liner") as caught:
        plan_of(make_mlp(), {"match": {"class": "Liner"}, "weight": "int8"})

    assert "Linear" in (caught.value.hint or "")


def test_strict_false_makes_a_warning_of_it(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "dwon", "weight": "int4"}, strict=False)

    assert len(plan.warnings) == 1
    assert "'dwon' matches no module" in plan.warnings[0]
    assert "down" in plan.warnings[0]
    assert plan.modules == ("up", "down")


@pytest.mark.parametrize("spec", ["int8", "none"])
def test_a_pattern_that_names_only_a_container_is_an_error(
    spec: str, make_lm: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match="matches only modules without a rule") as caught:
        plan_of(make_lm(), ALL, {"match": "layers.0", "weight": spec})

    assert "name its children with layers.0.*" in (caught.value.hint or "")


def test_a_pattern_that_names_only_modules_nobody_can_quantize_is_an_error(
    plan_of: Callable[..., Plan],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(RecipeError, match="matches only modules without a rule"):
        plan_of(model, ALL, {"match": "1", "weight": "int8"})


@pytest.mark.parametrize(
    "named",
    ["norm", "*orm", "re:n.*m", {"class": "LayerNorm"}, {"name": "*", "class": "LayerNorm"}],
)
def test_a_layer_without_a_matrix_is_quantized_where_a_recipe_names_it(
    named: Any, make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), {"match": named, "input": "int8"})

    assert [entry.path for entry in plan.entries] == ["norm.input"]


@pytest.mark.parametrize("sweeping", ["*", "re:.*"])
def test_a_pattern_for_everything_passes_layers_without_a_matrix_by(
    sweeping: str, make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), {"match": sweeping, "input": "int8"})

    assert plan.modules == ("up", "down")
    assert plan.skipped["norm"] == "a LayerNorm is quantized only where a recipe names it"


def test_a_pattern_that_meets_only_layers_it_passes_by_is_an_error(
    plan_of: Callable[..., Plan],
) -> None:
    model = nn.ModuleDict({"acts": nn.Sequential(nn.ReLU()), "fine": nn.Linear(4, 4)})
    with pytest.raises(RecipeError, match=r"'acts\.\*' matches only modules without a rule"):
        plan_of(model, {"match": "fine", "weight": "int8"}, {"match": "acts.*", "input": "int8"})


def test_what_switches_off_reaches_every_layer(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    named = {"match": {"class": ["LayerNorm", "Linear"]}, "input": "int8"}
    off = {"match": "*", "input": "none"}
    plan = plan_of(make_mlp(), named, off, {"match": "up", "weight": "int8"})

    assert [entry.path for entry in plan.entries] == ["up.weight"]


def test_what_cannot_be_quantized_may_be_switched_off(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(make_mlp(), ALL, {"match": "norm", "weight": "none"}, skip=["norm"])

    assert plan.modules == ("up", "down")


@pytest.mark.parametrize("pattern", ["dwon", "layers.0", {"name": "haed", "class": "Linear"}])
def test_a_skip_that_skips_nothing_is_an_error(
    pattern: Any, make_lm: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match=r"matches (no module|only modules without a rule)"):
        plan_of(make_lm(), ALL, skip=[pattern])


def test_roles_need_not_occur(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        make_mlp(), ALL, {"match": {"role": "router"}, "weight": "none"}, skip=[{"role": "head"}]
    )

    assert plan.modules == ("up", "down")
    assert plan.warnings == ()


def test_a_skipped_role_may_be_a_container(make_lm: Make, plan_of: Callable[..., Plan]) -> None:
    adapter = ModelAdapter(roles={"layers.0": "tower"})
    plan = plan_of(make_lm(), ALL, skip=[{"role": "tower"}], adapter=adapter)

    assert "layers.0.q" in plan.modules


def test_a_malformed_regular_expression_is_a_recipe_error(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match="is not a regular expression"):
        plan_of(make_mlp(), {"match": "re:(up", "weight": "int8"})


def test_a_slot_that_a_class_does_not_have_is_a_warning(
    make_lm: Make, plan_of: Callable[..., Plan]
) -> None:
    both = {"match": {"class": ["Linear", "Embedding"]}, "weight": "int8", "input": "int8"}
    plan = plan_of(make_lm(), both)

    assert plan.warnings == (
        "rule 0: class Linear|Embedding: Embedding has no slot 'input' (it has weight, output); "
        "ignored there",
    )
    assert "embed.weight" in formats(plan)


# --- errors of recipe and model -------------------------------------------------------------------


def test_a_recipe_that_quantizes_nothing_is_an_error(
    make_mlp: Make, plan_of: Callable[..., Plan], toolkit: Toolkit
) -> None:
    with pytest.raises(PlanError, match="'mine' quantizes nothing") as caught:
        plan_of(make_mlp(), ALL, skip=["up", "down"])
    assert "up: the recipe skips up" in (caught.value.hint or "")
    with pytest.raises(PlanError, match="'base' quantizes nothing"):
        toolkit.plan(make_mlp(), "base")


def test_an_unknown_algorithm_is_found_while_planning(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(CalibrationError, match="unknown algorithm 'maxx'") as caught:
        plan_of(make_mlp(), ALL, algorithm=["max", "maxx"])
    assert "did you mean 'max'" in (caught.value.hint or "")


def test_an_unknown_format_names_the_nearest(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="unknown format 'nvpf4'") as caught:
        plan_of(make_mlp(), {"match": "up", "weight": "nvpf4"})
    assert "did you mean 'nvfp4'" in (caught.value.hint or "")


def test_a_kv_cache_needs_an_attention(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(RecipeError, match="no attention of this model is known") as caught:
        plan_of(make_mlp(), ALL, kv_cache="fp8")
    assert "leave it out" in (caught.value.hint or "")


def test_a_model_that_is_quantized_already_is_refused(
    make_mlp: Make, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(PlanError, match="quantized already, by gptq"):
        plan_of(make_mlp(), ALL, adapter=ModelAdapter(quantized_by="gptq"))


def test_a_lazy_module_without_weights_is_refused_by_name(plan_of: Callable[..., Plan]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"1\.weight: it has no shape yet, the layer is lazy"):
        plan_of(model, ALL)

    model(torch.randn(2, 4))
    assert plan_of(model, ALL).modules == ("0", "1")


def test_planning_changes_nothing(make_mlp: Make, plan_of: Callable[..., Plan]) -> None:
    model = make_mlp()
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    plan_of(model, ALL)

    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == before
