"""Models and their forward passes: loading, packing, attention by lengths."""
