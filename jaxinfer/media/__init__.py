"""Images, audio and encoder prompts: validation, preprocessing and placement among the tokens. Needs no device."""

from jaxinfer.media.audio import read_wav as read_wav
from jaxinfer.media.cross import CrossPrompt as CrossPrompt
from jaxinfer.media.cross import CrossReader as CrossReader
from jaxinfer.media.cross import PromptForms as PromptForms
from jaxinfer.media.cross import ReaderSources as ReaderSources
from jaxinfer.media.cross import TextReader as TextReader
from jaxinfer.media.inputs import CrossInputs as CrossInputs
from jaxinfer.media.inputs import EncoderInput as EncoderInput
from jaxinfer.media.inputs import Features as Features
from jaxinfer.media.inputs import Joint as Joint
from jaxinfer.media.inputs import PlacedInputs as PlacedInputs
from jaxinfer.media.processor import ImageFormat as ImageFormat
from jaxinfer.media.processor import ImageProcessor as ImageProcessor
from jaxinfer.media.processor import Tiling as Tiling
from jaxinfer.media.reader import MediaReader as MediaReader
