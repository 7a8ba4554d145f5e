"""Pattern-exploiting training (Schick and Schütze, arXiv:2001.07676) on a causal model that sees pictures.

`read_patterns` and `read_rows` open what a user writes; `scores` and `soft_labels` label rows with one model or many;
`fit`, `label` and `distil` are the three stages, each writing a folder. `mmit pet` is the same from a YAML file.
"""

from mmit.pet.patterns import Pattern, Patterns, patterns_of, read_patterns
from mmit.pet.rows import Example, read_rows
from mmit.pet.scoring import accuracy, scores, soft_labels
from mmit.pet.stages import distil, fit, label
from mmit.pet.task import Fitted

__all__ = ["Example", "Fitted", "Pattern", "Patterns", "accuracy", "distil", "fit", "label", "patterns_of"]
__all__ += ["read_patterns", "read_rows", "scores", "soft_labels"]
