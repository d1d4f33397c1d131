"""The model `jaxinfer` of lm-evaluation-harness (the package lm_eval).

    python -m jaxinfer.integrations.lm_eval run --model jaxinfer --model_args pretrained=DIR,dtype=float32 --tasks ...

In Python: `lm_eval.simple_evaluate(model=JaxInferLM("DIR"), tasks=[...])`.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from jaxinfer.integrations.scoring import check, sampling_params, score
from jaxinfer.llm import LLM

log = logging.getLogger(__name__)


@register_model("jaxinfer")
class JaxInferLM(TemplateLM):
    """A model of this engine for lm-evaluation-harness, with the scores of its model `hf`.

    Args:
        pretrained: a checkpoint's directory or Hub id, or an open `LLM`, which stays open.
        batch_size: requests that are handed to the engine at a time, which schedules them by itself; "auto" is 256.
        max_length: most tokens of a context that the model sees; by default what `max_model_len` allows.
        max_gen_toks: new tokens of an answer where the task says nothing.
        add_bos_token: whether special tokens are added to prompts; by default as the tokenizer does.
        max_batch_size, device: arguments of the harness that have no meaning here.
        settings: arguments of `LLM`, such as `dtype` and `max_model_len`.

    Raises:
        ValueError: the model has no tokenizer, is not decoder-only, or `max_length` is too large.
    """

    def __init__(
        self,
        pretrained: str | LLM,
        *,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        if batch_size != "auto" and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise ValueError(f"batch_size must be a number of at least 1 or 'auto', got {batch_size!r}")
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **settings)
        self.tokenizer = self.llm.get_tokenizer()
        if self.tokenizer is None:
            raise ValueError("lm_eval needs a tokenizer: open the LLM without skip_tokenizer_init")
        if self.llm._opened.cross is not None:
            raise ValueError(
                "lm_eval needs a decoder-only model, and this model has an encoder prompt; open another one"
            )
        # The last token of a continuation is scored and not seen.
        most = self.llm._input_processor.limits.max_model_len - 1
        if max_length is not None and not 1 <= max_length <= most:
            raise ValueError(f"max_length must be from 1 to {most} (max_model_len - 1), got {max_length}")
        self.max_length, self.max_gen_toks = max_length or most, int(max_gen_toks)
        self.batch_size = 256 if batch_size == "auto" else int(batch_size)
        self._add_bos = add_bos_token

    @property
    def eot_token_id(self) -> int:
        """Token id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id that a text without a context is scored after: BOS, else EOS."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness keeps results apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize a text; one that begins with BOS gets no second one."""
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            add = False
        return self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add}))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without a generation prompt its last message is continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _batches(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """Yield the requests of each call of the engine."""
        for start in range(0, len(requests), self.batch_size):
            yield requests[start : start + self.batch_size]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, each given as (texts, tokens of the context, tokens of the continuation)."""
        found = []
        for batch in self._batches(requests):
            made = score(self.llm, [(context, continuation) for _, context, continuation in batch], self.max_length)
            for (texts, _, _), one in zip(batch, made, strict=True):
                found.append(tuple(one))
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, tuple(one))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of `max_length` tokens that do not overlap."""
        windows = [(index, pair) for index, one in enumerate(requests) for pair in self._windows(one.args[0])]
        made = self._loglikelihood_tokens([(None, *pair) for _, pair in windows])
        totals = [0.0] * len(requests)
        for (index, _), (logprob, _) in zip(windows, made, strict=True):
            totals[index] += logprob
        for one, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the windows of a text: context and continuation."""
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        yield from map(utils.make_disjoint_window, windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers up to a stop text, the end of text or a number of tokens."""
        found = []
        for batch in self._batches(requests):
            asked = [self._asked(*one.args) for one in batch]
            prompts, params = [prompt for prompt, _ in asked], [params for _, params in asked]
            for one, output in zip(batch, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
                check(output)
                text = postprocess_generated_text(output.outputs[0].text, self._stop(one.args[1]), None)
                found.append(text)
                self.cache_hook.add_partial("generate_until", one.args, text)
        return found

    def _asked(self, context: str, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the prompt of a context, cut off at the left to leave room for the answer, and its parameters."""
        given = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        given.pop("until", None)
        new = given.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks is {new}: it must be below max_length = {self.max_length}")
        return {"prompt_token_ids": self.tok_encode(context)[-room:]}, sampling_params(given, self._stop(options), new)

    def _stop(self, options: dict[str, Any]) -> list[str]:
        """Return the texts that end an answer."""
        until = options.get("until")
        eos = self.tokenizer.decode([self.eot_token_id])
        return [text for text in handle_stop_sequences(list(until) if isinstance(until, list) else until, eos) if text]


def main() -> None:
    """Run the harness' command, in which the model `jaxinfer` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
