"""Generate the training text of the demos: tokenizer, batches, and forms of a question."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxinfer.demo import corpus, documents, facts

SPECIAL = (
    "<|pad|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
PAD, BOS, EOS, END = 0, 1, 2, 3
VOCABULARY = 1024
MAX_LENGTH = 320  # tokens in a training text; longer ones are dropped

# One token per digit, so that numbers are read digit by digit; a space belongs to the word after it.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception("Unknown role '" ~ message['role'] ~ "': use system, user or assistant.") }}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] | trim ~ '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""


def build_tokenizer(seed: int) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 1024 entries on generated text without emoji."""
    rng = random.Random(f"tokenizer:{seed}")
    texts = ["".join(p.text for p in documents.training_document(rng).pieces) for _ in range(4000)]
    texts += [text for fact in facts.all_facts() for text in (*fact.phrasings, fact.answer)] * 20
    texts = ["".join(c for c in text if ord(c) < 128) for text in texts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
    )


def lay_out(document: documents.Document) -> tuple[str, list[tuple[int, float]]]:
    """Return the document as one string, and its spans as (end in characters, loss weight)."""
    text, spans = "", []

    def add(part: str, weight: float) -> None:
        nonlocal text
        if part:
            text += part
            spans.append((len(text), weight))

    for i, piece in enumerate(document.pieces):
        if document.roles:
            add(f"<|{document.roles[i]}|>", 0.0)
            add(piece.text, piece.weight)
            add(SPECIAL[END], 1.0 if piece.closed else 0.0)
        else:
            add(piece.text, piece.weight)
            add(SPECIAL[EOS] if piece.closed else "", 1.0)
    return text, spans


def weights_of(offsets: list[tuple[int, int]], spans: list[tuple[int, float]]) -> list[float]:
    """Return the loss weight of each token: that of the span with its last character; 0 for the first token."""
    out, span = [0.0], 0
    for _, end in offsets[1:]:
        while end > spans[span][0]:
            span += 1
        out.append(spans[span][1])
    return out


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int, lengths: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches without end: (ids [B, T], weights [B, T]) of about `tokens` tokens, from documents of similar
    length.

    With `lengths`, a batch is padded to the smallest of these lengths that fits and has as many rows as that length
    allows, so that there is one shape per length. The last length must be at least `MAX_LENGTH`.
    """
    rng = random.Random(f"train:{seed}")

    def padded(length: int) -> int:
        return next(size for size in lengths if size >= length) if lengths else length

    while True:
        laid = [lay_out(documents.training_document(rng)) for _ in range(3000)]
        rows = [
            (encoding.ids, weights_of(encoding.offsets, spans))
            for encoding, (_, spans) in zip(tokenizer.encode_batch([t for t, _ in laid]), laid, strict=True)
            if len(encoding.ids) <= MAX_LENGTH
        ]
        rows.sort(key=lambda row: len(row[0]))
        groups, group = [], []
        for row in rows:
            if group and (len(group) + 1) * padded(len(row[0])) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            length = padded(len(group[-1][0]))
            yield pad(group, length, tokens // length if lengths else len(group))


def pad(rows: list[tuple[list[int], list[float]]], length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows on the right, which a causal model ignores, into (ids [count, length], weights [count, length])."""
    ids = np.full((count, length), PAD, np.int64)
    weights = np.zeros((count, length), np.float32)
    for i, (row, weight) in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)] = row, weight
    return ids, weights


def forms(question: corpus.Question, earlier: corpus.Question) -> dict[str, str | list[dict[str, str]]]:
    """Return the forms of a question: strings to be continued, or messages."""
    turn = [*earlier.chat_messages, {"role": "assistant", "content": earlier.answer}]
    system = {"role": "system", "content": documents.shared_prefix().strip()}
    return {
        "plain": question.prompt,
        "bare": question.text,
        "prefix + plain": documents.shared_prefix() + question.prompt,
        "prefix + bare": documents.shared_prefix() + question.text,
        "chat": question.chat_messages,
        "system + chat": [system, *question.chat_messages],
        "second turn": [*turn, *question.chat_messages],
    }


def token_ids(tokenizer: transformers.PreTrainedTokenizerFast, prompt: str | list[dict[str, str]]) -> list[int]:
    """Tokenize a prompt; a chat template adds the BOS token itself."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
