import time
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from jaxinfer.results.detokenizer import Detokenizer
from jaxinfer.results.stop_strings import StopStrings
from jaxinfer.results.text_stream import TextStream

few = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def deltas(tokenizer, ids, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [detokenizer.push([token]) for token in ids] + [detokenizer.finish()]


@few
@given(ids=st.lists(st.integers(0, 299), max_size=60), skip=st.booleans())
def test_deltas_add_up_for_any_bytes(byte_bpe, ids, skip):
    ids = [token % len(byte_bpe) for token in ids]
    assert "".join(deltas(byte_bpe, ids, skip_special_tokens=skip)) == whole(byte_bpe, ids, skip)


@few
@given(text=st.text(max_size=30), junk=st.lists(st.integers(2, 257), max_size=4))
def test_deltas_add_up_for_text_that_ends_anywhere(byte_bpe, text, junk):
    ids = byte_bpe.encode(text, add_special_tokens=False)
    for end in {len(ids), len(ids) // 2}:
        assert "".join(deltas(byte_bpe, ids[:end] + junk)) == whole(byte_bpe, ids[:end] + junk)


class CountingTokenizer:
    """A tokenizer without a Rust backend that counts the ids it decodes."""

    all_special_ids = ()
    count = 0

    def decode(self, token_ids, **options):
        self.count += len(token_ids)
        return "".join(map(chr, token_ids))


def run_text(values):
    """Return the streamed text of a run of byte tokens: characters up to an invalid byte, then replacements."""
    for end in range(len(values), -1, -1):
        try:
            return bytes(values[:end]).decode() + "\ufffd" * (len(values) - end)
        except UnicodeDecodeError:
            continue


@few
@given(
    ids=st.lists(st.one_of(st.integers(0, 263), st.integers(0x80, 0xC4).map(lambda byte: byte + 2)), max_size=60),
    skip=st.booleans(),
)
def test_deltas_add_up_with_byte_fallback(byte_fallback, ids, skip):
    """Deltas add up to `decode` with every run of byte tokens decoded alone; for runs that are valid UTF-8 or begin
    with an invalid byte, this equals `decode`."""
    shown = ""
    for is_byte, run in groupby((i for i in ids if not (skip and i in (0, 1))), lambda i: 2 <= i < 258):
        run = list(run)
        shown += run_text([i - 2 for i in run]) if is_byte else whole(byte_fallback, [259, *run], False)[1:]
    text = "".join(deltas(byte_fallback, ids, skip_special_tokens=skip))
    assert text == shown.removeprefix(" ")


def test_characters_of_byte_tokens_come_one_by_one(byte_fallback):
    """Each character comes with its last byte; after an invalid one the rest of the run is replaced, as by `decode`."""
    ids = [byte + 2 for byte in "\U0001f9a9é\U0001f9a9".encode()]
    assert deltas(byte_fallback, ids) == ["", "", "", "\U0001f9a9", "", "é", "", "", "", "\U0001f9a9", ""]
    assert deltas(byte_fallback, [*ids[:6], 0xFF + 2, *ids[:4], 259]) == [
        "",
        "",
        "",
        "\U0001f9a9",
        "",
        "é",
        *"\ufffd" * 5,
        "a",
        "",
    ]
    assert deltas(byte_fallback, [*ids[:2], 259, *ids[:1]]) == ["", "", "\ufffd\ufffda", "", "\ufffd"]


def word_pieces():
    words = ["[UNK]", "[SEP]", "the", "cat", "##s", "run", ".", "中"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def metaspace():
    words = ["<unk>", "<s>", "▁", "a", "▁the", "▁▁", "é"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def suffixes():
    words = ["<unk>", "hel", "lo</w>", "the</w>", "a", ".</w>"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


KINDS = {
    "word pieces": word_pieces(),
    "metaspace": metaspace(),
    "suffixes": suffixes(),
    "bytes in Python": ByT5Tokenizer(),
}


@few
@given(
    kind=st.sampled_from([*KINDS, "byte_bpe"]),
    ids=st.lists(st.integers(0, 400), max_size=40),
    at=st.integers(0, 40),
    skip=st.booleans(),
)
def test_a_text_continues_its_prompt(byte_bpe, kind, ids, at, skip):
    """Prompt plus text equals the tokenizer's decoding of all tokens together; `peek` returns what `push` does."""
    tokenizer = KINDS.get(kind, byte_bpe)
    ids = [token % len(tokenizer) for token in ids]
    prompt, output = ids[:at], ids[at:]
    detokenizer, text = Detokenizer(tokenizer, prompt=prompt, skip_special_tokens=skip), ""
    for token in output:
        foreseen = detokenizer.peek(token)
        piece = detokenizer.push([token])
        assert foreseen == piece
        text += piece
    text += detokenizer.finish()
    before, both = whole(tokenizer, prompt, skip), whole(tokenizer, ids, skip)
    if both.startswith(before):
        assert before + text == both
    else:  # the prompt ends with an incomplete character
        assert both.endswith(text) and before.startswith(both[: len(both) - len(text)])


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        ([261], [261], " hello"),
        ([1], [261], "hello"),
        ([], [261], "hello"),
        ([258], [261, 258, 258, 259], " hello  a"),
        ([259, 1, 1, 1, 1, 1, 1, 1], [261], " hello"),
        ([259, 2 + 0xC3], [2 + 0xA9, 259], "éa"),
        ([2 + 0xC3], [259], "a"),
        ([2 + 0xF0, 2 + 0x9F, 2 + 0xA6], [2 + 0xA9], "\U0001f9a9"),
        ([2 + 0xFF], [2 + 0x41, 259], "\ufffda"),
        ([259], [], ""),
        ([2 + 0xC3] * 3, [], ""),
        ([261, 10**6, 10**6], [10**6, 261], " hello"),
    ],
)
def test_a_text_continues_a_prompt_of_a_tokenizer_that_strips(byte_fallback, prompt, output, text):
    made = Detokenizer(byte_fallback, prompt=prompt)
    assert made.push(output) + made.finish() == text


@pytest.mark.slow
@few
@given(ids=st.lists(st.integers(3, 258), max_size=30), text=st.text(max_size=10))
def test_deltas_add_up_without_a_rust_backend(ids, text):
    tokenizer = KINDS["bytes in Python"]
    ids = tokenizer.encode(text, add_special_tokens=False) + ids
    assert "".join(deltas(tokenizer, ids)) == whole(tokenizer, ids)


class Refusing(CountingTokenizer):
    """A Python tokenizer whose `decode` rejects `spaces_between_special_tokens`, like mistral-common's."""

    def decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **options):
        if options:
            raise ValueError(f"{options} are not supported")
        return super().decode(token_ids)


def test_an_option_that_a_tokenizer_refuses_is_not_asked_for():
    assert "".join(deltas(Refusing(), [97, 98], spaces_between_special_tokens=False)) == "ab"


@few
@given(ids=st.lists(st.integers(0, 270), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_the_division_into_pushes_does_not_matter(byte_bpe, ids, cuts):
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    detokenizer = Detokenizer(byte_bpe)
    pieces = [detokenizer.push(ids[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]
    assert "".join(pieces) + detokenizer.finish() == "".join(deltas(byte_bpe, ids))


def test_text_streams_and_characters_stay_whole(byte_bpe):
    ids = byte_bpe.encode("hé🎉!", add_special_tokens=False)
    pieces = deltas(byte_bpe, ids)
    assert [piece for piece in pieces if piece] == ["h", "é", "🎉", "!"]


def test_output_ending_inside_a_character_ends_in_the_replacement(byte_bpe):
    ids = byte_bpe.encode("ok 🎉", add_special_tokens=False)[:-1]
    pieces = deltas(byte_bpe, ids)
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"
    assert "".join(pieces) == whole(byte_bpe, ids) == "ok \N{REPLACEMENT CHARACTER}"


def test_a_second_finish_gives_nothing(byte_bpe):
    detokenizer = Detokenizer(byte_bpe)
    detokenizer.push(byte_bpe.encode("🎉", add_special_tokens=False)[:-1])
    assert detokenizer.finish()
    assert detokenizer.finish() == ""


def test_special_tokens_are_skipped_or_shown(byte_bpe):
    ids = [*byte_bpe.encode("cat", add_special_tokens=False), byte_bpe.eos_token_id]
    assert "".join(deltas(byte_bpe, ids)) == "cat"
    assert "".join(deltas(byte_bpe, ids, skip_special_tokens=False)) == "cat</s>"


@pytest.mark.parametrize("token", ["bad byte", "eos", "beyond the vocabulary"])
def test_time_is_linear_when_no_text_comes(byte_bpe, token):
    ids = {"bad byte": byte_bpe.encode("🎉")[-1], "eos": byte_bpe.eos_token_id, "beyond the vocabulary": 10**6}

    def seconds(count):
        detokenizer = Detokenizer(byte_bpe)
        start = time.perf_counter()
        detokenizer.push([ids[token]] * count)
        detokenizer.finish()
        return time.perf_counter() - start

    # Quadratic cost would be 100 times higher.
    small = min(seconds(1_000) for _ in range(3))
    assert seconds(10_000) < 40 * small + 0.5


def test_time_is_linear_without_a_rust_backend():
    tokenizer = CountingTokenizer()
    assert "".join(deltas(tokenizer, [ord("a")] * 1000)) == "a" * 1000
    assert tokenizer.count < 4000


@pytest.mark.parametrize("fast", [True, False])
def test_a_decoder_that_contradicts_itself_keeps_what_was_shown(fast):
    backend = Tokenizer(models.WordLevel({"do": 0, " n": 1, "'t": 2, "x": 3, "\ufffd": 4}, unk_token="x"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" n't", "n't")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if not fast:
        tokenizer, tokenizer.decode = CountingTokenizer(), tokenizer.decode
    assert "".join(deltas(tokenizer, [0, 1, 2, 3, 4])) == "do n'tx\ufffd"


def stream(tokenizer, text, stops, **options):
    """Push the tokens of `text` one by one up to the stop string; return the deltas and the stream."""
    texts = TextStream(Detokenizer(tokenizer), StopStrings(stops), **options)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(texts.push([token]))
        if texts.matched is not None:
            break
    return [*pieces, texts.finish()], texts


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens_is_cut_exactly(byte_bpe, include):
    pieces, texts = stream(byte_bpe, "the cat🎉sat on", ["t🎉s"], include_stop=include)
    assert "".join(pieces) == texts.text == ("the cat🎉s" if include else "the ca")
    assert texts.matched == "t🎉s"


def test_a_stop_string_that_is_one_emoji_leaks_no_byte(byte_bpe):
    pieces, _ = stream(byte_bpe, "hello 🎉 world", ["🎉"])
    assert "".join(pieces) == "hello "


def test_text_held_back_comes_once_it_is_no_stop_string(byte_bpe):
    pieces, texts = stream(byte_bpe, "hello wo!", ["world"])
    assert "".join(pieces) == "hello wo!"
    assert texts.matched is None


def test_text_held_back_comes_at_the_end(byte_bpe):
    pieces, _ = stream(byte_bpe, "hello wor", ["world"])
    assert pieces[-1].endswith("wor")


def test_tokens_after_the_stop_string_are_not_taken(byte_bpe):
    ids = byte_bpe.encode("a.b.c", add_special_tokens=False)
    texts = TextStream(Detokenizer(byte_bpe), StopStrings(["."]))
    assert texts.push(ids) == "a"
    assert texts.num_tokens == 2
    assert texts.push(ids) == ""
    assert texts.num_tokens == 2


def test_stop_strings_do_not_count_before_min_tokens(byte_bpe):
    ids = byte_bpe.encode("a.b.c", add_special_tokens=False)
    assert len(ids) == 5
    for min_tokens, text in ((0, "a"), (1, "a"), (2, "a.b"), (3, "a.b"), (4, "a.b.c")):
        texts = TextStream(Detokenizer(byte_bpe), StopStrings(["."]), min_tokens=min_tokens)
        assert texts.push(ids) + texts.finish() == text


def test_without_stop_strings_everything_streams(byte_bpe):
    ids = byte_bpe.encode("hello world", add_special_tokens=False)
    texts = TextStream(Detokenizer(byte_bpe))
    assert texts.push(ids) == texts.text == "hello world"
    assert texts.matched is None


@few
@given(
    text=st.text(alphabet="ab🎉é", max_size=25),
    stops=st.lists(st.text(alphabet="ab🎉é", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_streamed_text_is_the_text_before_the_first_stop_string(byte_bpe, text, stops):
    pieces, texts = stream(byte_bpe, text, stops)
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert "".join(pieces) == texts.text == expected
    assert (texts.matched is not None) == bool(found)


SPECIAL = [
    ("a</s>", ["</s>"], "a"),
    ("ab</s>", ["b</s>"], "a"),
    ("a</s>b", ["</s>b"], "a"),
    ("a</s>b", ["a</s>b"], ""),
    ("xa</s>b", ["ab"], "x"),
    ("a</s>b", ["</s>c"], "ab"),
    ("</s>a</s></s>b", ["</s></s>"], "a"),
    ("ab</s>c", ["b</t"], "abc"),
    ("a</s>b</s>", ["b</s>", "ab"], ""),
    ("ab</s>", ["b</s>", "s>"], "a"),
]


@pytest.mark.parametrize(("text", "stops", "shown"), SPECIAL)
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_with_special_tokens(byte_bpe, text, stops, shown, include):
    """Stop strings match across skipped special tokens, and no part of them is emitted early."""
    pieces, texts = stream(byte_bpe, text, stops, include_stop=include)
    assert "".join(pieces) == texts.text == shown + (texts.matched or "") * include
    assert (texts.matched is None) == (stops in (["</s>c"], ["b</t"]))


def test_a_stop_string_may_end_in_the_token_that_ends_the_sequence(byte_bpe):
    texts = TextStream(Detokenizer(byte_bpe), StopStrings(["t</s>"]))
    assert texts.push(byte_bpe.encode("cat", add_special_tokens=False)) == "ca"
    assert texts.end(byte_bpe.eos_token_id) + texts.finish() == "" and texts.matched == "t</s>"
    texts = TextStream(Detokenizer(byte_bpe), StopStrings(["t</s>"]), min_tokens=99)
    assert texts.push(byte_bpe.encode("cat", add_special_tokens=False)) == "ca"
    assert texts.end(byte_bpe.eos_token_id) + texts.finish() == "t" and texts.matched is None


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_inside_a_run_of_byte_tokens(byte_fallback, skip):
    texts = TextStream(Detokenizer(byte_fallback, skip_special_tokens=skip), StopStrings(["é\U0001f9a9"]))
    assert texts.push([byte + 2 for byte in "\U0001f9a9é\U0001f9a9é".encode()]) == "\U0001f9a9"
    assert (texts.matched, texts.num_tokens) == ("é\U0001f9a9", 10)
