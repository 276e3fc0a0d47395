"""Frozen encoders, by preset or timm name: from a recipe to features."""

from teachercache.cache_builder.teachers.flops import teacher_gmacs
from teachercache.cache_builder.teachers.registry import presets
from teachercache.cache_builder.teachers.teacher import Teacher, TeacherFeatures
from teachercache.cache_builder.teachers.teacher_recipe import (
    TeacherRecipe,
    build_teacher,
    resolve_teacher,
    resolve_teachers,
)

__all__ = [
    "Teacher",
    "TeacherFeatures",
    "TeacherRecipe",
    "build_teacher",
    "presets",
    "resolve_teacher",
    "resolve_teachers",
    "teacher_gmacs",
]
