"""Tests' data of each family: a file has the name of the family's in `jaxinfer/models` and one `DATA`."""
