"""The model of lm-evaluation-harness. Needs the package lm_eval; the comparison with its `hf` model needs torch."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = pytest.mark.xdist_group("demo")

QUESTIONS = (
    ("What is 17 plus 25?", ["42.", "43."]),
    ("What is the capital of France?", ["Rome.", "Paris."]),
    ("What is 2 plus 2?", ["4.", "a very long answer that nobody expects.", "5."]),
)
TASKS = {
    "choices": (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: 0\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    ),
    "texts": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}]\n"
    ),
    "answers": (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[0]}}'\n"
        "generation_kwargs: {until: ['.'], do_sample: false, max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Any:
    """Tasks of local files."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "text": f"{q} {c[0]} " * 4}) for q, c in QUESTIONS]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}", encoding="utf-8")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder))


@pytest.fixture(scope="module")
def llm():
    from jaxinfer import LLM, demo

    with LLM(demo.path(), dtype="float32", max_model_len=64, max_num_seqs=4, use_tqdm=False) as made:
        yield made


def evaluate(model: Any, tasks: Any, **more: Any) -> dict[str, list[Any]]:
    """Return the responses of each task in order."""
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, log_samples=True, **more
    )
    return {
        name: [one["resps"] for one in sorted(found["samples"][name], key=lambda one: one["doc_id"])] for name in TASKS
    }


@pytest.mark.slow
def test_scores_and_texts_are_those_of_the_hf_model(llm, tasks):
    pytest.importorskip("torch")
    from jaxinfer import demo
    from jaxinfer.integrations.lm_eval import JaxInferLM

    ours = evaluate(JaxInferLM(llm, max_length=24, batch_size=2), tasks)
    args = {"pretrained": str(demo.path()), "dtype": "float32", "max_length": 24}
    theirs = evaluate("hf", tasks, model_args=args, device="cpu", batch_size=2)
    assert ours["answers"] == theirs["answers"] and any(text for [[text]] in ours["answers"])
    for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
        for [(logprob, greedy)], [(expected, most_likely)] in zip(mine, other, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-3) and greedy == most_likely
    for [[mine]], [[other]] in zip(ours["texts"], theirs["texts"], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_what_cannot_be_evaluated_is_refused(llm):
    from jaxinfer.integrations.lm_eval import JaxInferLM

    with pytest.raises(ValueError, match=r"from 1 to 63 \(max_model_len - 1\), got 64"):
        JaxInferLM(llm, max_length=64)
    with pytest.raises(ValueError, match="batch_size"):
        JaxInferLM(llm, batch_size=0)
    model = JaxInferLM(llm, max_gen_toks=63)
    with pytest.raises(ValueError, match="max_gen_toks is 63"):
        model._asked("hello", {})
    assert llm.get_tokenizer() is model.tokenizer  # an LLM that was passed stays open
