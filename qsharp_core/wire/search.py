"""How several samples are searched for the choices of a request: names and defaults.

The same names stand in the HTTP field `guidance.search`, in responses, in metrics and on command lines.
"""

from typing import Literal, get_args

SearchKind = Literal["stop", "best_of", "particles"]
Best = Literal["value", "majority", "weighted"]  # which of several samples are the best
Chosen = Literal["sample", "value", "majority", "weighted"]  # how choices are taken from particles
KINDS: tuple[SearchKind, ...] = get_args(SearchKind)
BEST: tuple[Best, ...] = get_args(Best)
CHOSEN: tuple[Chosen, ...] = get_args(Chosen)
DEFAULT_ROUND = 16  # tokens
DEFAULT_RESAMPLE_BELOW = 0.5
