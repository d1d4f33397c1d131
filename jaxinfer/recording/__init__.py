"""What an engine did, as values: events of its steps, the blocks and the timeline made of them, and pictures."""
