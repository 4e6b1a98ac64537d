"""Mixed-precision search: which part of a model gets which recipe."""

from bittern.search.cost import Latency
from bittern.search.losses import LossFunction
from bittern.search.result import Decision, Point, SearchResult
from bittern.search.run import run_search
from bittern.search.solve import Option

__all__ = [
    "Decision",
    "Latency",
    "LossFunction",
    "Option",
    "Point",
    "SearchResult",
    "run_search",
]
