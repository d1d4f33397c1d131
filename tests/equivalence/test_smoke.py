from support.tiny import make_engine, make_request, prompt, random_runner, run
from jaxinfer.sampling_params import SamplingParams

def test_smoke():
    r = random_runner("llama")
    e = make_engine(r)
    reqs = [make_request(str(i), prompt(n, i), SamplingParams(temperature=0, max_tokens=8)) for i, n in enumerate((3, 17, 33))]
    together = run(e, reqs)
    alone = [run(make_engine(r), [make_request("a", prompt(n, i), SamplingParams(temperature=0, max_tokens=8))])[0] for i, n in enumerate((3, 17, 33))]
    assert together == alone
