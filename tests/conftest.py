"""Fixtures of more than one folder; a session has one browser and one wheel, whoever asks for them."""

from tests.browser import browser
from tests.train_recipes import fresh_accelerate
from tests.wheel import wheel

__all__ = ["browser", "fresh_accelerate", "wheel"]
