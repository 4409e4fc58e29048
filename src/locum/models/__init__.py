"""Causal language models: loading them, and decoding with them through a session."""

from locum.models.language_model import LM, require_same_vocabulary, tiny
from locum.models.load import load
from locum.models.session import Session
from locum.models.smollm2 import cache_dir

__all__ = ["LM", "Session", "cache_dir", "load", "require_same_vocabulary", "tiny"]
