"""How much one request, and all of them together, may take."""

from dataclasses import dataclass

from locvlm.errors import DataError, LocVLMError


@dataclass(frozen=True, slots=True)
class Limits:
    """The defaults bound the memory of a server: `open_requests` bodies, two whole images, one batch."""

    image_bytes: int = 10_000_000  # of the file, before base64
    pixels: int = 50_000_000
    side: int = 10_000  # pixels; a letterbox makes a square of it
    aspect: int = 20  # longer side over shorter; a crop enlarges the longer one by it
    text: int = 500  # characters of a question
    open_requests: int = 32  # being read, waiting or being answered; one more is turned away
    batch: int = 8  # answered together
    seconds: float = 60.0  # from the first byte of a request to its answer

    @property
    def body_bytes(self) -> int:
        """Of a request: the largest image in base64, and room for the rest."""
        return self.image_bytes * 4 // 3 + 8192


class TooLarge(DataError):
    """An image or a request beyond the limits."""


class Busy(LocVLMError):
    """No room or no time left for a request; it may be sent again."""
