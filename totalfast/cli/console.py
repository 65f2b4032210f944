"""Log records become lines on stdout, above the progress bar."""

from __future__ import annotations

import logging
import sys


class LineHandler(logging.Handler):
    """Prints each record on stdout without delay, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stdout):
            print(self.format(record), flush=True)


def configure_output(*, quiet: bool, verbose: bool) -> None:
    """Print totalfast's log records: nothing if ``quiet``, details too if ``verbose``."""
    logger = logging.getLogger("totalfast")
    logger.handlers = [LineHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL if quiet else logging.DEBUG if verbose else logging.INFO)
