"""Adapters to outside systems, one file each; they see only the public names of minibatch."""
