"""The dimension-flow engine: records one run of a model and carries axes through it."""

from bittern.tracing.flow.axes import Axis, Kind, product, total, unify
from bittern.tracing.flow.graph import OpGraph, OpNode, Value, values_in
from bittern.tracing.flow.layout import positions
from bittern.tracing.flow.propagate import Axes, Flow, FlowRule

__all__ = [
    "Axes",
    "Axis",
    "Flow",
    "FlowRule",
    "Kind",
    "OpGraph",
    "OpNode",
    "Value",
    "positions",
    "product",
    "total",
    "unify",
    "values_in",
]
