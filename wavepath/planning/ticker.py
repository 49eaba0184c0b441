"""A line of progress for compiles, which give none: which of them runs, and for how long."""

import threading
from typing import Self

from wavepath.console import progress, say


class Ticker:
    """`with Ticker("plan") as ticker: ticker("compile 1: ...")`: each call names what begins; the seconds count until the block ends."""

    def __init__(self, description: str):
        self._description, self._note, self._stop = description, "", threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._work, name="wavepath-ticker", daemon=True)
        self._thread.start()
        return self

    def __call__(self, note: str) -> None:
        self._note = note
        say(note)

    def _work(self) -> None:
        with progress(self._description, None, "s") as bar:
            while not self._stop.wait(1.0):
                bar.advance(1.0, self._note)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
