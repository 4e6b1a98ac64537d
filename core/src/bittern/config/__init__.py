"""Recipes: the schema and its reader."""

from bittern.config.load import RecipeLike, load_recipe, parse_override, read_source, recipe_schema
from bittern.config.schema import MatchModel, Recipe, RuleModel, SpecModel

__all__ = [
    "MatchModel",
    "Recipe",
    "RecipeLike",
    "RuleModel",
    "SpecModel",
    "load_recipe",
    "parse_override",
    "read_source",
    "recipe_schema",
]
