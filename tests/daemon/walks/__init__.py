"""Random walks through a storage daemon, and the model that they are checked against. See ../README.md."""
