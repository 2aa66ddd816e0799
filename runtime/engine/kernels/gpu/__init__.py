"""The Triton kernels and how they are launched. Importing a module here needs triton; each has a torch twin one folder up."""
