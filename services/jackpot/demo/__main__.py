"""``python -m jackpot.demo <recipe> <cache dir>``: makes the built-in models of a recipe if they are missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jackpot.demo.recipe import RECIPES
from jackpot.errors import JackpotError


def main(arguments: Sequence[str]) -> int:
    """Run the command; prints the directory of the models on stdout and returns the exit code."""
    if len(arguments) != 2 or arguments[0] not in RECIPES:
        print(f"usage: python -m jackpot.demo {{{','.join(RECIPES)}}} CACHE_DIRECTORY", file=sys.stderr)
        return 2
    try:
        from jackpot.demo.warmup import make_models  # torch loads only once the arguments are checked

        print(make_models(RECIPES[arguments[0]], Path(arguments[1])))
    except JackpotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
