"""A drawing for the page."""

import base64
from dataclasses import dataclass

PANEL_INCHES = (3.6, 2.3)
"""The width of a phone's screen, so that the text of a drawing keeps its size there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An SVG document, and a description of its content."""

    svg: str
    alt: str

    @property
    def uri(self) -> str:
        """The SVG as a data URI: drawn as an image, it can neither run scripts nor load anything."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()
