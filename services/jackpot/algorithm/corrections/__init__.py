"""Corrections of the mismatch between actor and policy, each in a module of its own: settings, weights, equation.

To add one, add its module, a test, and a row to docs/method.md. The modules load without torch.
"""

import sys

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights
from jackpot.algorithm.registry import variants

CORRECTIONS = variants(sys.modules[__name__], Correction)
"""Every correction by its name in the job file, in alphabetical order."""

__all__ = ["CORRECTIONS", "Correction", "SampledTokens", "Weights"]
