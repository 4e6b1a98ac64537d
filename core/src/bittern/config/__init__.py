"""Recipes: the schema and its reader."""

from bittern.config.load import RecipeLike, load_recipe, parse_override, read_source, recipe_schema
from bittern.config.schema import MatchModel, Recipe, RuleModel, SpecModel
from bittern.config.text import parse_yaml, read_recipe_text

__all__ = [
    "MatchModel",
    "Recipe",
    "RecipeLike",
    "RuleModel",
    "SpecModel",
    "load_recipe",
    "parse_override",
    "parse_yaml",
    "read_recipe_text",
    "read_source",
    "recipe_schema",
]
