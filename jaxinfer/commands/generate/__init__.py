"""`jaxinfer generate`: texts, chats and transcripts of prompts."""
