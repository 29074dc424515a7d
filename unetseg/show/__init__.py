"""Trained weights for others: predictions of pictures and videos, ONNX files, a page in the browser."""
