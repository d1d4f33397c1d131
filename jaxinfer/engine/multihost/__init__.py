"""One engine in several processes: handshake, replay of steps, detection of divergence."""
