"""What an object that a person looks at has in common: a short repr, a card, a table, a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chronomoe_hf.pictures.picture import Picture
from chronomoe_hf.pictures.tables import card, frame

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Looks:
    """How an object shows itself.

    Args:
        title: of its card.
        sentence: below it.
        numbers: name and value, side by side.
        rows: makes the rows of its table.
        picture: makes its picture.
        hint: what to call next.
        level: fine, watch or act, where it judges.
    """

    title: str
    sentence: str
    numbers: Sequence[tuple[str, str]]
    rows: Callable[[], Sequence[Mapping[str, Any]]]
    picture: Callable[[], Picture]
    hint: str = ""
    level: str = ""


class Shown:
    """Base of records that show themselves in a notebook."""

    def _looks(self) -> Looks:
        raise NotImplementedError

    def figure(self) -> Picture:
        """What there is to see, as a picture that a notebook shows and ``save`` writes."""
        return self._looks().picture()

    def to_pandas(self) -> pandas.DataFrame:
        """The numbers as a table; needs pandas (``pip install "chronomoe_hf[notebook]"``).

        Raises:
            ConfigError: pandas is not installed.
        """
        return frame(self._looks().rows())

    def __repr__(self) -> str:
        looks = self._looks()
        numbers = ", ".join(f"{name} {value}" for name, value in looks.numbers)
        return f"<{type(self).__name__}: {numbers or looks.sentence}>"

    def _repr_html_(self) -> str:
        looks = self._looks()
        return card(looks.title, looks.sentence, looks.numbers, looks.hint, looks.picture(), looks.level)
