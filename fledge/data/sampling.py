"""What is drawn per row: a number in [0, 1) from a purpose, the run's seed and the row's id, and what follows from it.

No generator has a state here, so a row draws the same in a resumed run, on another machine and in any order.
"""

import hashlib
import math
from dataclasses import dataclass

from fledge.errors import UserError


def fraction(purpose: str, seed: int, row_id: str) -> float:
    """Uniform in [0, 1), the same for the same three arguments."""
    digest = hashlib.blake2b(f"{purpose}\0{seed}\0{row_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class TemperatureMixture:
    """Temperatures and how often each is drawn."""

    temperatures: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "TemperatureMixture":
        """`0.7`, or `0.0:0.3,0.7:0.7` (temperature:share); shares must add up to 1."""
        try:
            pairs = [part.split(":") for part in text.split(",")]
            if len(pairs) == 1 and len(pairs[0]) == 1:
                pairs = [[pairs[0][0], "1"]]
            temperatures, shares = zip(*((float(t), float(share)) for t, share in pairs), strict=True)
        except ValueError:
            raise UserError(
                f"--temperature {text!r}: not a temperature and not a mixture. Write 0.7 or 0.0:0.3,0.7:0.7."
            ) from None
        if not all(0 <= number < math.inf for number in (*temperatures, *shares)) or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"--temperature {text!r}: the shares add up to {sum(shares):g}. They must add up to 1, and every "
                "number must be finite and not negative."
            )
        return cls(temperatures, shares)

    def draw(self, seed: int, row_id: str) -> float:
        """The temperature of one row."""
        place = fraction("temperature", seed, row_id)
        for temperature, share in zip(self.temperatures, self.shares, strict=True):
            place -= share
            if place < 0:
                return temperature
        return self.temperatures[-1]
