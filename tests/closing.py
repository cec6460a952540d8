"""What is used with ``with``, and closed at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A base for what has a `close`: leaving the ``with`` statement calls it."""

    @abstractmethod
    def close(self) -> None:
        """Give up all that it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
