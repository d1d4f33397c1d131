"""Convert prompts, chat messages and media to validated requests; runs on the host only."""

from jaxinfer.inputs.chat import chat_images as chat_images
from jaxinfer.inputs.chat import render_chat as render_chat
from jaxinfer.inputs.prompts import Prompt as Prompt
from jaxinfer.inputs.prompts import check_prompt_length as check_prompt_length
from jaxinfer.inputs.prompts import check_token_ids as check_token_ids
from jaxinfer.inputs.prompts import max_prompt_chars as max_prompt_chars
from jaxinfer.inputs.prompts import parse_prompts as parse_prompts
