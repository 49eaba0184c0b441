"""The kind of device that a function is traced for.

Several operators exist in forms that suit one kind of device, and choose by it while they are traced. As a rule that is the kind JAX computes on
here; where a program is compiled for devices that this machine does not have (`wavepath plan`), `training/parallel` names theirs.
"""

import contextlib
from collections.abc import Iterator

import jax

# Part of the key under which JAX keeps traces, so that what was traced for one kind is not taken for another.
_PLATFORM = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def traced_for(name: str | None) -> Iterator[None]:
    """Names the kind of device (`cpu`, `gpu`, `tpu`) while its block is traced; None is the one that JAX computes on here."""
    with _PLATFORM(name):
        yield


def platform() -> str:
    """`cpu`, `gpu` or `tpu`."""
    return _PLATFORM.value or jax.default_backend()
