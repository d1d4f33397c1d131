"""HTTP server with the APIs of OpenAI and Anthropic: `jaxinfer serve MODEL` (needs the extra `serve`)."""
