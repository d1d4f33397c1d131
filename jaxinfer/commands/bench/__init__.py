"""`jaxinfer bench`: throughput and latency of a model on this machine, and of a server over HTTP."""
