"""The whole search: what it keeps to, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import bittern as bt
from bittern.errors import BitternError, DataError, PlanError, RecipeError
from bittern.search import SearchResult
from bittern.search.sensitivity import METHODS
from bittern.toolkit import Toolkit

INT4 = {"name": "int4", "rules": [{"match": {"class": ["Linear", "Conv2d"]}, "weight": "int4"}]}
INT8 = {
    "name": "int8",
    "rules": [{"match": {"class": ["Linear", "Conv2d"]}, "weight": "int8", "input": "int8"}],
}


class Net(nn.Module):
    """A convolutional network with a residual and two heads, of which one is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head, self.idle = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.relu(self.left(x)) * self.right(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 6, 6, generator=g), torch.randint(0, 5, (4,), generator=g))
        for _ in range(3)
    ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what it keeps to -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_keeps_to_its_bits_and_its_groups(
    method: str, toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    model = make_lm(width=32)

    result = toolkit.auto_quantize(
        model, [INT4, INT8], token_batches, bits=6.5, method=method, points=5
    )

    assert 4 < result.bits <= 6.5
    assert set(result.choices.values()) > {"int4"}
    for layer in range(2):
        assert len({result.choices[f"layers.{layer}.{name}"] for name in "qkv"}) == 1
    assert result.quantized is not None
    assert result.quantized.plan.bytes_after == result.bytes
    assert result.quantized.plan.effective_bits == pytest.approx(
        result.bits
        if "none" not in result.choices.values()
        else result.quantized.plan.effective_bits
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_convolutional_model_is_searched_too(
    method: str, toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    result = toolkit.auto_quantize(net, [INT4, INT8], images, bits=14, method=method, points=3)
    assert result.bits <= 14
    assert set(result.choices) == {"stem.0", "left", "right", "head", "idle"}
    assert result.choices["left"] == result.choices["right"], "they read one tensor"
    assert result.unreached == ("idle",)
    assert result.choices["idle"] == "none"
    assert all(
        score > 0 for row in result.scores.values() for c, score in row.items() if c != "none"
    )


def test_the_recipe_gives_a_fresh_model_the_same_bits(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor], same_bits: Any, tmp_path: Any
) -> None:
    model, fresh = make_lm(width=32), make_lm(width=32)
    result = toolkit.auto_quantize(model, [INT4, INT8, "mxfp8"], token_batches, bits=9, points=3)
    file = tmp_path / "mixed.yaml"
    result.to_yaml(file)

    toolkit.quantize(fresh, file, token_batches)

    assert same_bits(fresh(token_batches[0]), model(token_batches[0]))
    assert yaml.safe_load(file.read_text()) == result.recipe()


def test_the_result_is_saved_and_restored_bit_for_bit(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor], same_bits: Any, tmp_path: Any
) -> None:
    model, fresh = make_lm(width=32), make_lm(width=32)
    toolkit.auto_quantize(model, [INT4, INT8], token_batches, bits=7, points=2)

    toolkit.save(model, tmp_path / "state")
    toolkit.restore(fresh, tmp_path / "state")

    assert same_bits(fresh(token_batches[0]), model(token_batches[0]))


def test_any_point_of_the_front_is_a_recipe(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    model = make_lm(width=32)
    result = toolkit.auto_quantize(
        model, [INT4, INT8], token_batches, bits=7, points=6, apply=False
    )
    assert len(result.front) > 3
    for point in result.front[:-1]:
        assert toolkit.plan(model, result.recipe(point)).bytes_after == point.bytes


def test_better_choices_leave_a_better_model(
    toolkit: Toolkit, make_lm: Any, token_batches: list[Tensor]
) -> None:
    """The choice that the scores call best has less divergence than the one they call worst."""
    model = make_lm(width=32, depth=3)
    result = toolkit.auto_quantize(
        model, [INT4, INT8], token_batches, bits=6, method="kl", points=3, apply=False
    )
    groups = {d.name: d for d in result.decisions}
    gain = {n: d.options[1].score - d.options[2].score for n, d in groups.items()}
    size = {n: d.elements for n, d in groups.items()}
    spent = sum(size[n] for n, d in groups.items() if d.choice != "int4")
    worst: list[str] = []
    for name in sorted(gain, key=lambda n: gain[n] / size[n]):
        if sum(size[n] for n in (*worst, name)) <= spent:
            worst.append(name)
    names = [p for n in worst for p in groups[n].members]
    by_hand = {"rules": [*INT4["rules"], {**INT8["rules"][0], "match": {"name": names}}]}

    def divergence(recipe: Any) -> float:
        found = toolkit.quantize(copy.deepcopy(model), recipe, token_batches).model
        kl = toolkit.evaluate(found, token_batches, layers=False).kl
        assert kl is not None
        return kl

    assert divergence(result.recipe()) < divergence(by_hand)


def test_bytes_are_a_limit(toolkit: Toolkit, net: Net, images: list[Any]) -> None:
    low = toolkit.plan(net, INT4).bytes_after
    result = toolkit.auto_quantize(net, [INT4, INT8], images, max_bytes=low + 700, points=3)
    assert result.quantized is not None
    assert result.quantized.plan.bytes_after == result.bytes <= low + 700


def test_latency_is_a_limit(toolkit: Toolkit, net: Net, images: list[Any]) -> None:
    seconds = {"int4": 1.0, "int8": 2.0, "none": 4.0}
    result = toolkit.auto_quantize(
        net,
        [INT4, INT8],
        images,
        max_seconds=11.0,
        exclude=["idle"],
        latency=lambda path, choice: seconds[choice],
        points=3,
    )
    assert result.chosen.seconds <= 11.0
    assert result.chosen.seconds == sum(seconds[choice] for choice in result.choices.values())


def test_excluded_modules_do_not_count_and_kept_ones_do(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    options: Any = {"bits": 24, "points": 3, "apply": False}
    plain = toolkit.auto_quantize(net, [INT4], images, **options)
    without = toolkit.auto_quantize(net, [INT4], images, exclude=["stem.*"], **options)
    kept = toolkit.auto_quantize(net, [INT4], images, keep=["stem.*"], **options)

    elements = {d.name: d.elements for d in plain.decisions}
    assert "stem.0" in plain.choices
    assert "stem.0" not in without.choices
    assert sum(d.elements for d in without.decisions) == sum(elements.values()) - elements["stem.0"]
    assert kept.choices["stem.0"] == "none"
    assert sum(d.elements for d in kept.decisions) == sum(elements.values())
    assert all(
        "stem" not in str(r["match"]) for r in (*without.recipe()["rules"], *kept.recipe()["rules"])
    )


def test_a_loose_limit_leaves_everything_as_it_is(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    before = tensors(net)
    result = toolkit.auto_quantize(net, [INT4], images, bits=32, points=2)
    assert set(result.choices.values()) == {"none"}
    assert result.quantized is None
    assert same(before, tensors(net))
    assert not bt.modes_of(net)


def test_a_candidate_may_be_about_a_part_of_the_model_only(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    only = {"name": "head", "rules": [{"match": "head", "weight": "int4"}]}
    result = toolkit.auto_quantize(net, [only, INT8], images, bits=16, points=2, apply=False)
    options = {d.name: [o.choice for o in d.options] for d in result.decisions}
    assert options["head"] == ["none", "head", "int8"]
    assert options["stem.0"] == ["none", "int8"]


def test_what_all_candidates_say_of_modules_without_weights_is_kept(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    def with_norm(recipe: Any, spec: str) -> Any:
        norm = {"match": {"class": "LayerNorm"}, "output": spec}
        return {**recipe, "rules": [*recipe["rules"], norm], "strict": False}

    alike = [with_norm(INT4, "int8"), with_norm(INT8, "int8")]
    result = toolkit.auto_quantize(make_mlp(), alike, batches, bits=8, points=2)
    assert result.quantized is not None
    assert "norm" in result.quantized.plan.modules
    assert not result.notes

    apart = [with_norm(INT4, "int8"), with_norm(INT8, "int4")]
    result = toolkit.auto_quantize(make_mlp(), apart, batches, bits=8, points=2)
    assert result.quantized is not None
    assert "norm" not in result.quantized.plan.modules
    assert "norm stays as it is" in result.notes[0]


# --- pipelines ------------------------------------------------------------------------------------


def test_the_longer_pipeline_calibrates_all_candidates(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor], same_bits: Any
) -> None:
    smooth = {**INT8, "name": "smooth", "algorithm": ["smooth", "max"]}
    model, fresh = make_mlp(), make_mlp()

    result = toolkit.auto_quantize(model, [INT4, smooth], batches, bits=8, points=2)

    assert [name for name, _ in result.algorithm] == ["smooth", "max"]
    toolkit.quantize(fresh, result.recipe(), batches)
    assert same_bits(fresh(batches[0]), model(batches[0]))


def test_weights_that_steps_changed_are_given_back(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    model = make_mlp()
    before = tensors(model)
    smooth = {**INT8, "algorithm": ["smooth", "max"]}
    toolkit.auto_quantize(model, [smooth], batches, bits=14, points=2, apply=False)
    assert same(before, tensors(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not bt.modes_of(model)


def test_pipelines_that_do_not_go_together_have_to_be_decided(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    apart = [{**INT4, "algorithm": "mse"}, {**INT8, "algorithm": "max"}]
    with pytest.raises(PlanError, match=r"int4: mse; int8: max") as caught:
        toolkit.auto_quantize(make_mlp(), apart, batches, bits=8)
    assert "algorithm" in str(caught.value.hint)
    result = toolkit.auto_quantize(make_mlp(), apart, batches, bits=8, algorithm="max", points=2)
    assert result.algorithm == (("max", {}),)


# --- what it refuses ------------------------------------------------------------------------------


class Once:
    """Data that may be asked for once."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        found, self.batches = self.batches, []
        assert found
        return iter(found)


def refused(
    toolkit: Toolkit, net: Net, data: Any, *, match: str, kind: Any = PlanError, **options: Any
) -> Any:
    before = tensors(net)
    with pytest.raises(kind, match=match) as caught:
        toolkit.auto_quantize(net, options.pop("candidates", [INT4, INT8]), data, **options)
    assert same(before, tensors(net))
    assert not bt.modes_of(net)
    return caught.value


def test_a_limit_that_cannot_be_kept_names_what_can(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    error = refused(toolkit, net, images, match=r"bits <= 2", bits=2, candidates=[INT4])
    lowest = toolkit.plan(net, INT4).effective_bits
    assert f"bits between {lowest:.4g} and 32" in str(error.hint)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ("no limit", PlanError)),
        ({"bits": -1}, ("the limit on bits is -1", PlanError)),
        ({"bits": float("nan")}, ("the limit on bits", PlanError)),
        ({"max_seconds": 1.0}, ("needs latencies", PlanError)),
        ({"bits": 8, "method": "gradeint"}, ("no way to search called 'gradeint'", RecipeError)),
        ({"bits": 8, "candidates": []}, ("no candidates", RecipeError)),
        ({"bits": 8, "candidates": [INT4, INT4]}, ("two of the name 'int4'", RecipeError)),
        ({"bits": 8, "candidates": {"none": INT4}}, ("'none' is the choice", RecipeError)),
        ({"bits": 8, "candidates": ["int5"]}, ("int5", RecipeError)),
        ({"bits": 8, "exclude": ["nothing.*"]}, ("matches no module", PlanError)),
        ({"bits": 8, "exclude": ["*"]}, ("no module left", PlanError)),
        ({"bits": 8, "score_batches": 0}, ("one batch", DataError)),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: Any, wanted: tuple[str, Any], toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    refused(toolkit, net, images, match=wanted[0], kind=wanted[1], **options)


@pytest.mark.parametrize(
    ("data", "match"),
    [([], "no batch"), (lambda model: None, "needs batches"), (None, "no data")],
)
def test_what_holds_no_batches_is_refused(
    data: Any, match: str, toolkit: Toolkit, net: Net
) -> None:
    refused(toolkit, net, data, match=match, kind=DataError, bits=8)


def test_data_is_read_once_so_that_all_candidates_see_the_same(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    """A loader that shuffles gives other batches every time."""
    options: Any = {"bits": 14, "points": 2, "apply": False}
    once = toolkit.auto_quantize(net, [INT4, INT8], Once(images), **options)
    assert once.scores == toolkit.auto_quantize(net, [INT4, INT8], images, **options).scores


def test_a_quantized_model_is_refused(toolkit: Toolkit, net: Net, images: list[Any]) -> None:
    toolkit.quantize(net, INT4)
    with pytest.raises(PlanError, match="quantized already"):
        toolkit.auto_quantize(net, [INT4], images, bits=8)


def test_a_loss_that_fails_leaves_the_model_as_it_was(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        raise BitternError("no loss today")

    refused(toolkit, net, images, match="no loss today", kind=BitternError, bits=14, loss=loss)


def test_a_choice_without_a_finite_score_is_never_taken(
    toolkit: Toolkit, make_mlp: Any, batches: list[Tensor]
) -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output * 1e30).square().sum()

    with pytest.raises(PlanError, match="bits <= 8"):
        toolkit.auto_quantize(make_mlp(), [INT4], batches, bits=8, loss=loss)


# --- what it returns ------------------------------------------------------------------------------


def test_the_function_does_what_the_method_does(
    toolkit: Toolkit, net: Net, images: list[Any]
) -> None:
    options: Any = {"bits": 14, "points": 2, "apply": False}
    ours = bt.auto_quantize(net, [INT4, INT8], images, toolkit=toolkit, **options)
    assert isinstance(ours, SearchResult)
    assert ours == toolkit.auto_quantize(net, [INT4, INT8], images, **options)


def test_fewer_batches_can_be_looked_at(toolkit: Toolkit, net: Net, images: list[Any]) -> None:
    seen: list[int] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(batch.rows)
        return output.square().sum()

    options: Any = {"bits": 14, "points": 2, "apply": False, "loss": loss}
    toolkit.auto_quantize(net, [INT8], images, score_batches=2, **options)
    assert len(seen) == 2
