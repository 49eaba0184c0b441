"""Slides to tiles to batches. The only room that imports TensorFlow."""
