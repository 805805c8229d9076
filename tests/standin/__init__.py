"""A GPU's driver for machines without a GPU; see README.md. Only ``run`` can import this."""
