"""Convert sampled tokens to request outputs: text, stop strings, log-probabilities; runs on the host only."""

from jaxinfer.results.detokenizer import Detokenizer as Detokenizer
from jaxinfer.results.logprobs import LogprobTable as LogprobTable
from jaxinfer.results.stop_strings import StopChecker as StopChecker
from jaxinfer.results.stop_strings import StopStrings as StopStrings
from jaxinfer.results.text_stream import TextStream as TextStream
