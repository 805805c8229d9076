"""What the kernels compile to: the parts of ``codegen.py``."""
