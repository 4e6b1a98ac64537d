"""The recipe schema: what a YAML recipe may say. Unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = ["AlgorithmModel", "MatchModel", "Recipe", "RuleModel", "SpecModel", "as_algorithms"]

GranularityName = Literal["tensor", "channel", "token", "group", "block"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_list)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class RotationModel(_Strict):
    """A rotation of the last axis before quantization.

    Attributes:
        kind: ``hadamard``, or ``given`` for a matrix that code hands to the quantizer.
        block: Size of the blocks that are rotated.
        back: Rotate back after quantization.
    """

    kind: Literal["hadamard", "given"] = "hadamard"
    block: int | None = Field(default=None, gt=0)
    back: bool = False

    @model_validator(mode="after")
    def _power_of_two(self) -> RotationModel:
        if self.kind == "hadamard" and self.block is not None and self.block.bit_count() != 1:
            raise ValueError(f"a Hadamard rotation needs a power of two, not {self.block}")
        return self


class AffineModel(_Strict):
    """A bias that is subtracted before quantization and added after it.

    Attributes:
        axes: Axes along which the bias varies.
        method: ``mean`` or ``mid`` (half of maximum plus minimum).
        dynamic: Compute the bias from each tensor.
    """

    axes: list[int] = Field(default_factory=lambda: [-1], min_length=1)
    method: Literal["mean", "mid"] = "mean"
    dynamic: bool = False


def _as_rotation(value: Any) -> Any:
    """``true`` and ``hadamard`` are short for a Hadamard rotation; ``false`` is none."""
    if value is False:
        return None
    if value is True:
        return {}
    return {"kind": value} if isinstance(value, str) else value


class SpecModel(_Strict):
    """How one slot is quantized; ``none`` switches it off.

    A list of specs is a chain: each quantizes what the one before it made.

    Attributes:
        format: Name of a number format.
        options: Parameters of the format, as ``{narrow: true}`` or ``{scale_rounding: floor}``.
        granularity: Which elements share a scale; the format's own default when left out.
        axis: Axis of ``channel``, or several of them; axis of ``group``.
        size: Group size of ``group``.
        rows: Rows of ``block``.
        cols: Columns of ``block``.
        dynamic: Compute the scale from each tensor; the default for ``token``.
        amax: A range that is given instead of calibrated.
        rotate: A rotation before quantization.
        affine: A bias around quantization.
        backend: Name of the implementation to use.
        then: What quantizes the result again.
    """

    format: str
    options: dict[str, Any] = Field(default_factory=dict)
    granularity: GranularityName | None = None
    axis: int | list[int] | None = None
    size: int | None = Field(default=None, gt=0)
    rows: int | None = Field(default=None, gt=0)
    cols: int | None = Field(default=None, gt=0)
    dynamic: bool | None = None
    amax: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rotate: Annotated[RotationModel | None, BeforeValidator(_as_rotation)] = None
    affine: AffineModel | None = None
    backend: str | None = None
    then: Spec = None

    @model_validator(mode="after")
    def _fitting_options(self) -> SpecModel:
        if self.size is not None and self.granularity not in (None, "group"):
            raise ValueError(f"size belongs to granularity: group, not to {self.granularity}")
        if (self.rows is None) != (self.cols is None):
            raise ValueError("a block needs rows and cols")
        if self.size is not None and self.rows is not None:
            raise ValueError("size is for groups, rows and cols are for blocks; give one of them")
        if self.rows is not None and self.granularity not in (None, "block"):
            raise ValueError(f"rows and cols belong to granularity: block, not {self.granularity}")
        if self.axis is not None and self.granularity not in ("channel", "group"):
            raise ValueError("axis belongs to granularity: channel or group")
        if isinstance(self.axis, list) and self.granularity == "group":
            raise ValueError("groups lie along one axis")
        if self.axis == []:
            raise ValueError("axis is an empty list; granularity: tensor has one scale for all")
        if self.granularity == "block" and self.rows is None:
            raise ValueError("granularity: block needs rows and cols")
        if self.amax is not None and self.dynamic:
            raise ValueError("amax gives a static range; leave out dynamic: true")
        return self


def _as_spec(value: Any) -> Any:
    """``int8`` is short for ``{format: int8}``; ``none`` (and YAML's off) is None."""
    if value is False or value == "none":
        return None
    if isinstance(value, list):
        return _as_chain(value)
    return {"format": value} if isinstance(value, str) else value


def _as_chain(links: list[Any]) -> Any:
    """Return a list of specs as one spec with ``then``."""
    chain: Any = None
    for link in reversed(links):
        spec = _as_spec(link)
        if not isinstance(spec, dict):
            raise ValueError("a chain is a list of formats or specs")
        chain = spec if chain is None else {**spec, "then": chain}
    if chain is None:
        raise ValueError("a chain needs at least one format")
    return chain


Spec = Annotated[SpecModel | None, BeforeValidator(_as_spec)]
SpecModel.model_rebuild()


class MatchModel(_Strict):
    """Which modules a rule is about; every condition that is given must hold.

    Attributes:
        name: Globs on the module path, or ``re:`` and a regular expression.
        class_: Class names, looked up along the MRO.
        role: Roles that the model's adapter gives: head, router, embedding, norm, tower.
    """

    name: Names = Field(default_factory=list)
    class_: Names = Field(default_factory=list, alias="class")
    role: Names = Field(default_factory=list)

    @model_validator(mode="after")
    def _not_empty(self) -> MatchModel:
        if not (self.name or self.class_ or self.role):
            raise ValueError("a match needs one of name, class, role")
        return self

    def __str__(self) -> str:
        parts = [("", self.name), ("class ", self.class_), ("role ", self.role)]
        return " and ".join(prefix + "|".join(names) for prefix, names in parts if names)


def _as_match(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Match = Annotated[MatchModel, BeforeValidator(_as_match)]


class RuleModel(_Strict):
    """One rule; a later rule replaces what earlier ones said about the same slot."""

    match: Match
    weight: Spec = None
    input: Spec = None
    output: Spec = None
    slots: dict[str, Spec] = Field(default_factory=dict)

    def specs(self) -> dict[str, SpecModel | None]:
        """Return the slots that this rule speaks about."""
        said: dict[str, SpecModel | None] = {
            str(name): getattr(self, name)
            for name in ("weight", "input", "output")
            if name in self.model_fields_set
        }
        return {**said, **self.slots}


class AlgorithmModel(_Strict):
    """One step of the calibration pipeline."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


def as_algorithms(value: Any) -> Any:
    """Return the list of steps that any shorthand for ``algorithm`` stands for."""

    def one(step: Any) -> Any:
        if isinstance(step, str):
            return {"name": step}
        if isinstance(step, dict) and len(step) == 1 and "name" not in step:
            ((name, options),) = step.items()
            return {"name": name, "options": options or {}}
        return step

    if value is None:
        return []
    return [one(step) for step in (value if isinstance(value, list) else [value])]


class Recipe(_Strict):
    """A whole recipe, its ``extends`` resolved.

    Attributes:
        name: For reports.
        description: One line for people.
        extends: Names or files of recipes that come first.
        requires: Plugins that must be loaded.
        rules: In order; the later wins.
        skip: Modules that no rule may touch; a child recipe's list replaces its parent's.
        kv_cache: How keys and values of every attention are quantized, as the cache holds them:
            the slots ``k`` and ``v``. A rule that speaks of them wins.
        algorithm: Calibration steps, left to right.
        strict: Whether a pattern that matches nothing is an error (else a warning).
    """

    name: str = "unnamed"
    description: str = ""
    extends: Names = Field(default_factory=list)
    requires: Names = Field(default_factory=list)
    rules: list[RuleModel] = Field(default_factory=list)
    skip: list[Match] = Field(default_factory=list)
    kv_cache: Spec = None
    algorithm: Annotated[list[AlgorithmModel], BeforeValidator(as_algorithms)] = Field(
        default_factory=lambda: [AlgorithmModel(name="max")]
    )
    strict: bool = True
