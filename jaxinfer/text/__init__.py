"""Text in and out: prompts, chat templates, detokenisation, stop strings. Needs no device."""

from jaxinfer.text.chat import chat_images as chat_images
from jaxinfer.text.chat import render_chat as render_chat
from jaxinfer.text.detokenizer import Detokenizer as Detokenizer
from jaxinfer.text.logprobs import LogprobTable as LogprobTable
from jaxinfer.text.prompts import Prompt as Prompt
from jaxinfer.text.prompts import check_prompt_length as check_prompt_length
from jaxinfer.text.prompts import check_token_ids as check_token_ids
from jaxinfer.text.prompts import max_prompt_chars as max_prompt_chars
from jaxinfer.text.prompts import parse_prompts as parse_prompts
from jaxinfer.text.stop import StopChecker as StopChecker
from jaxinfer.text.stop import StopStrings as StopStrings
from jaxinfer.text.stream import TextStream as TextStream
