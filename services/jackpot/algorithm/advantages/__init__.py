"""Advantages of completions, for policy and actor alike (paper §4.2), each estimator in a module of its own.

To add one, add its module, a test, and a row to docs/method.md. The modules load without torch.
"""

import sys

from jackpot.algorithm.advantages.base import Advantage
from jackpot.algorithm.registry import variants

ADVANTAGES = variants(sys.modules[__name__], Advantage)
"""Every estimator by its name in the job file, in alphabetical order."""

__all__ = ["ADVANTAGES", "Advantage"]
