"""nbdstore: thin-provisioned block volumes for containers, served over NBD."""

__version__ = "0.1.0"
