"""Instruction templates: a bank of wordings per task, and the one renderer that building and evaluation share.

`load(spec)` opens a bank: the path of a YAML file, `promptsource:PATH` (PromptSource's YAML) or `flan:PATH#KEY` (FLAN's
literal PATTERNS). Templates are text from strangers: they are rendered in a bounded sandbox (`mmit.templates.sandbox`).
"""

from mmit.templates.bank import Bank, Template
from mmit.templates.load import load, open_banks
from mmit.templates.render import Rendered, ask, render

__all__ = ["Bank", "Rendered", "Template", "ask", "load", "open_banks", "render"]
