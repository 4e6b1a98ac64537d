"""The frozen records that hooks return and functions pass on. No torch, no framework."""

from bittern.records.adapters import (
    CheckpointIO,
    DataConfig,
    LoadConfig,
    ModelAdapter,
    ParallelState,
)
from bittern.records.attention import ATTENTION_SLOTS
from bittern.records.formats import Affine, NumberFormat, QuantizerSpec, Rotation
from bittern.records.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
)
from bittern.records.modes import AppliedMode, Mode
from bittern.records.modules import LeafRule, ModuleRule, OpRule, Slot, SymbolRule
from bittern.records.plans import Plan, PlanEntry
from bittern.records.results import (
    CalibrationSummary,
    Evaluation,
    ExportReport,
    Finding,
    LayerError,
    Verification,
)
from bittern.records.steps import Algorithm, Exporter, KernelRule, RecipeSource
from bittern.records.traces import Coverage, Fold, Group, Member

__all__ = [
    "ATTENTION_SLOTS",
    "Affine",
    "Algorithm",
    "AppliedMode",
    "CalibrationSummary",
    "CheckpointIO",
    "Coverage",
    "DataConfig",
    "Evaluation",
    "ExportReport",
    "Exporter",
    "Finding",
    "Fold",
    "Granularity",
    "Group",
    "KernelRule",
    "LayerError",
    "LeafRule",
    "LoadConfig",
    "Member",
    "Mode",
    "ModelAdapter",
    "ModuleRule",
    "NumberFormat",
    "OpRule",
    "ParallelState",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "PlanEntry",
    "QuantizerSpec",
    "RecipeSource",
    "Rotation",
    "Slot",
    "SymbolRule",
    "Verification",
]
