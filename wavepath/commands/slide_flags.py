"""Values of the flags that the commands which write slides share."""

import argparse


def region(text: str) -> tuple[int, int, int, int]:
    """x,y,width,height in level-0 pixels."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,width,height in whole level-0 pixels")
    return tuple(int(part) for part in parts)


def quality(text: str) -> int:
    """Of JPEG, 1 to 100."""
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def positive(text: str) -> float:
    """Micrometres per pixel."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of micrometres per pixel")
    return value
