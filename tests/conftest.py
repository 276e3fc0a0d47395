"""Fixtures of more than one folder; a session has one browser, whoever asks for it."""

from tests.browser import browser
from tests.train_recipes import fresh_accelerate

__all__ = ["browser", "fresh_accelerate"]
