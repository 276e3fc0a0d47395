"""Frozen encoders, by preset or timm name: from a recipe to features."""

from teachercache.cache_builder.teachers.teacher import Teacher
from teachercache.cache_builder.teachers.teacher_recipe import (
    TeacherRecipe,
    build_teacher,
    resolve_teacher,
    resolve_teachers,
)

__all__ = ["Teacher", "TeacherRecipe", "build_teacher", "resolve_teacher", "resolve_teachers"]
