"""Compiled steps: their programs, batches and buckets."""
