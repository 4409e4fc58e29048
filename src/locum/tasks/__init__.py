"""Data that ships with Locum or is made offline: prompts, small language models trained on the spot, and problems whose
answers are known.

Only what needs no torch is imported here; the rest is a module each, e.g. `locum.tasks.charlm`.
"""

from locum.tasks.prompts import Prompt, prompts, read_prompts

__all__ = ["Prompt", "prompts", "read_prompts"]
