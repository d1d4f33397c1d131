"""Locate a Hugging Face checkpoint, read its config.json and safetensors, and load its weights."""

from jaxinfer.checkpoint.hf import ConfigReader as ConfigReader
from jaxinfer.checkpoint.hf import check_sizes as check_sizes
from jaxinfer.checkpoint.hf import read_config as read_config
from jaxinfer.checkpoint.hf import read_generation_config as read_generation_config
from jaxinfer.checkpoint.hf import read_json as read_json
from jaxinfer.checkpoint.hub import resolve_model as resolve_model
from jaxinfer.checkpoint.safetensors import SafetensorsReader as SafetensorsReader
from jaxinfer.checkpoint.safetensors import TensorInfo as TensorInfo
