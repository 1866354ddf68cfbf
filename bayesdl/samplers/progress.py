"""A progress bar on standard error that shows the step size, the acceptance rate and the divergences."""

from __future__ import annotations

import sys

from torch import Tensor


class Progress:
    """Counts transitions; silent, and free of any wait for the device, unless `enabled`."""

    def __init__(self, total: int, description: str, enabled: bool) -> None:
        self._bar = None
        self._done = 0
        self._divergences = 0
        self._every = max(1, total // 100)
        if enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=description, file=sys.stderr, dynamic_ncols=True)

    def skip(self, num: int) -> None:
        """Count transitions of an earlier, interrupted run."""
        self._done += num
        if self._bar is not None and num:
            self._bar.update(num)

    def update(self, step_size: Tensor, acceptance_rate: Tensor, diverging: Tensor, *, warmup: bool) -> None:
        """Record one transition; the figures refresh about a hundred times a run."""
        if self._bar is None:
            return
        self._done += 1
        self._divergences = 0 if warmup else self._divergences + int(diverging.sum())
        self._bar.update(1)
        if self._done % self._every == 0:
            self._bar.set_postfix_str(
                f"{'warm-up' if warmup else 'sampling'}, step {float(step_size.median()):.2g}, "
                f"accept {float(acceptance_rate.mean()):.2f}, divergences {self._divergences}",
                refresh=False,
            )

    def close(self) -> None:
        """Leave the finished bar on its line."""
        if self._bar is not None:
            self._bar.close()
