"""Corrections of the mismatch between actor and policy. Each is a separate module: settings, weights, equation.

To add one, add its module, a test, and a row to docs/method.md. The modules import without torch.
"""

import sys

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights
from jackpot.algorithm.registry import variants

CORRECTIONS = variants(sys.modules[__name__], Correction)
"""All corrections by their names in the job file, in alphabetical order."""

__all__ = ["CORRECTIONS", "Correction", "SampledTokens", "Weights"]
