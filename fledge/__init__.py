"""fledge: EAGLE-3 draft heads, from conversations to an honest speed-up."""

__version__ = "0.1.0"
