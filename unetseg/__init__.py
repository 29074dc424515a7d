"""Street-scene segmentation with a U-Net: the thin library under the three notebooks."""

__version__ = "0.1.0"
