"""What each request has spent of its budget of KL divergence, kept on the device, so that no step waits for it.

A request that is preempted leaves the batch and comes back, and its tokens do not tell what they have cost. So accounts
are found by the request's id, and are kept when it leaves; of those that have left the oldest are given up when there
are too many. Steps may run again for a token that was thrown away, so an account knows its level before each of the
last few tokens.

Shapes: A accounts, P the last positions, R rows.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor

from qsharp_core.transfer import column

KEPT = 8192  # accounts of requests that have left: 64 bytes each
POSITIONS = 8  # a token that is thrown away is at most this far behind


class Spending:
    """The accounts of one engine. The first one is of all rows without a budget: what it says does not matter.

    Args:
        most_open: most requests in the batch.
        device: of the logits.
    """

    def __init__(self, most_open: int, device: torch.device, kept: int = KEPT) -> None:
        self._device = device
        # Nats spent before the token at each position, by the position's remainder.
        self._spent_AP = torch.zeros(1 + most_open + kept, POSITIONS, dtype=torch.float64, device=device)
        self._accounts: OrderedDict[int, int] = OrderedDict()  # by request, those that left earliest first
        self._open: set[int] = set()
        self._free = list(range(len(self._spent_AP) - 1, 0, -1))

    def open(self, request_id: int, *, resumed: bool) -> int:
        """The account of a request that enters the batch.

        Args:
            request_id: unlike any other's.
            resumed: whether it has sampled before. If its account is gone nobody knows what it has spent, and it has
                nothing left.
        """
        account = self._accounts.get(request_id)
        if account is None:
            account = self._free.pop() if self._free else self._take_back()
            self._accounts[request_id] = account
            self._spent_AP[account] = math.inf if resumed else 0.0
        self._open.add(request_id)
        return account

    def close(self, request_id: int) -> None:
        """The request leaves the batch; it may come back."""
        self._open.discard(request_id)
        self._accounts.move_to_end(request_id)

    def spent(self, account_R: Tensor, lengths: list[int]) -> Tensor:
        """Nats that were spent on the tokens so far, float64, `[R]`.

        Args:
            account_R: of each row, int64; 0 in rows without one.
            lengths: number of tokens in each row's history.
        """
        return self._spent_AP[account_R, self._places(lengths)]

    def note(self, account_R: Tensor, lengths: list[int], spent_R: Tensor) -> None:
        """Notes what will be spent when each row has one token more.

        Args:
            account_R, lengths: as in `spent`.
            spent_R: nats, float64.
        """
        self._spent_AP[account_R, self._places([length + 1 for length in lengths])] = spent_R

    def _places(self, lengths: list[int]) -> Tensor:
        return column([length % POSITIONS for length in lengths], self._device, torch.int64)

    def _take_back(self) -> int:
        oldest = next(request_id for request_id in self._accounts if request_id not in self._open)
        return self._accounts.pop(oldest)
