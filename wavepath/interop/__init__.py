"""Formats of other tools, in and out: pyramidal TIFF, QuPath GeoJSON, TRIDENT HDF5."""
