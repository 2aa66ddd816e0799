"""The packer: turns a checkpoint into one packed file, in a process of its own (`python -m runtime.puller.pack`)."""
