"""The ops, one file a family: schema, checks, fake kernels, gradients, public functions. `pyprune.ops` shows them."""
