"""wavepath: texture-aware learning for histopathology in JAX.

Importing the package is cheap on purpose: JAX, TensorFlow and the slide libraries are imported by the rooms that use
them (`wavepath.ops`, `wavepath.data`, ...), so that `wavepath --help` answers at once.
"""

__version__ = "0.1.0"
