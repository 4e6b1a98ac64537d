"""Rule tables with provenance, precedence and conflict errors."""

from bittern.registry.kernels import KernelTable
from bittern.registry.modules import ANY, ClassTable, Match, NoMatch
from bittern.registry.ops import OpMatch, OpTable, op_names
from bittern.registry.registry import Registry
from bittern.registry.tables import NamedTable, nearest
from bittern.registry.targets import bound, resolve, target_of, why_dead

__all__ = [
    "ANY",
    "ClassTable",
    "KernelTable",
    "Match",
    "NamedTable",
    "NoMatch",
    "OpMatch",
    "OpTable",
    "Registry",
    "bound",
    "nearest",
    "op_names",
    "resolve",
    "target_of",
    "why_dead",
]
