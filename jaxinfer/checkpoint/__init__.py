"""Locate a Hugging Face checkpoint, read its config.json and safetensors, and load its weights."""

from jaxinfer.checkpoint.config_reader import ConfigReader as ConfigReader
from jaxinfer.checkpoint.hf import read_config as read_config
from jaxinfer.checkpoint.hf import read_generation_config as read_generation_config
from jaxinfer.checkpoint.hub import resolve_model as resolve_model
from jaxinfer.checkpoint.plain_json import read_json as read_json
from jaxinfer.checkpoint.safetensors import SafetensorsReader as SafetensorsReader
from jaxinfer.checkpoint.safetensors_header import TensorInfo as TensorInfo
from jaxinfer.checkpoint.size_limits import check_sizes as check_sizes
