"""Whisper model family."""
