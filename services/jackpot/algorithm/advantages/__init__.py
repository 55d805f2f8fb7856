"""Advantages of completions, for both policy and actor (paper §4.2). Each estimator is a separate module.

To add one, add its module, a test, and a row to docs/method.md. The modules import without torch.
"""

import sys

from jackpot.algorithm.advantages.base import Advantage
from jackpot.algorithm.registry import variants

ADVANTAGES = variants(sys.modules[__name__], Advantage)
"""All estimators by their names in the job file, in alphabetical order."""

__all__ = ["ADVANTAGES", "Advantage"]
