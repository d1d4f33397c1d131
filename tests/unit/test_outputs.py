import math
import re

from jaxinfer.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def sample(**fields):
    return CompletionOutput(**{"index": 0, "text": "a <b>", "token_ids": [5, 6], **fields})


def request(**fields):
    return RequestOutput(
        **{
            "request_id": "7",
            "prompt": "x" * 100,
            "prompt_token_ids": [1, 2, 3],
            "outputs": [sample()],
            "finished": False,
            **fields,
        }
    )


def test_finished_follows_the_reason():
    assert not sample().finished
    assert sample(finish_reason="length").finished


def test_reprs_are_short():
    output = request(prompt_token_ids=list(range(10_000)), num_cached_tokens=4096)
    assert len(repr(output)) < 400
    assert "10000 prompt tokens, 4096 cached" in repr(output)
    assert "(100 characters)" in repr(output)
    assert "stop_reason='END'" in repr(sample(finish_reason="stop", stop_reason="END"))


def test_defaults():
    assert request().num_cached_tokens == 0
    assert request().prompt_logprobs is request().metrics is None
    assert RequestMetrics(arrival_time=1.0).first_token_time is None


def test_html_is_escaped():
    html = request(prompt="<script>", request_id="<i>")._repr_html_()
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert "<script>" not in html
    assert "<i>" not in html
    assert "stop: &#x27;&lt;s&gt;&#x27;" in sample(finish_reason="stop", stop_reason="<s>")._repr_html_()


def test_html_of_a_prompt_of_tokens_shows_them():
    assert "1 2 3" in request(prompt=None)._repr_html_()


def test_tokens_are_coloured_by_probability():
    logprobs = [{5: Logprob(0.0, 1, "a'"), 9: Logprob(-9.0, 2, "\"'<z>")}, {6: Logprob(-math.inf, 3, None)}]
    html = sample(logprobs=logprobs)._repr_html_()
    assert re.findall(r"hsl\((\d+),", html) == ["120", "0"]
    assert "a&#x27;" in html
    assert "[6]" in html
    # The candidates stand in an attribute in single quotes: no quote of theirs may end it.
    titles = re.findall(r"title='([^']*)'>", html)
    assert len(titles) == 2
    assert "&lt;z&gt;" in titles[0]


def test_prompts_are_coloured_and_the_first_token_has_no_colour():
    html = request(prompt_logprobs=[None, {2: Logprob(-0.7, 1, "b")}, {9: Logprob(-0.7)}])._repr_html_()
    assert html.count("hsl(") == 1
    assert "[1]" in html
    assert "[3]" in html


def test_nan_logprobs_can_be_shown():
    assert "hsl(0," in sample(logprobs=[{5: Logprob(math.nan)}, {6: Logprob(-1.0)}])._repr_html_()
