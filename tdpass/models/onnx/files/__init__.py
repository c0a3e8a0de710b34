"""ONNX files: read, checked, bounded and stored."""
