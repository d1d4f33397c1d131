"""Base class of `LLM` that transcribes recordings of any length, window by window."""

from typing import Any

from tqdm.auto import tqdm

from jaxinfer.engine.divided_call import DividedCall
from jaxinfer.inputs.input_processor import Params
from jaxinfer.llm_base.replicas import Replica, divide
from jaxinfer.llm_base.requests import RequestCalls
from jaxinfer.models.whisper.transcription import Transcribing, Transcript, begin
from jaxinfer.results.output_processor import Handle
from jaxinfer.results.progress import Running
from jaxinfer.sampling_params import SamplingParams


class TranscriptionCalls(RequestCalls):
    """Method of `LLM` for speech models."""

    def transcribe(
        self,
        audio: Any,
        sampling_params: Params = None,
        *,
        language: str | None = None,
        task: str | None = None,
        use_tqdm: bool = True,
    ) -> list[Transcript]:
        """Transcribe audio of any length, with timestamps, using a speech model (Whisper).

        The windows of a recording are transcribed one after the other (`jaxinfer.models.whisper.transcription`); all
        recordings run concurrently. `generate` transcribes a single window.

        Args:
            audio: `(array, sampling_rate)` or a list of these (`media.audio.as_audio`).
            sampling_params: parameters of each window; by default greedy without `max_tokens`. n must be 1.
            language: language code, name or token of all audio; by default detected from the first window of each
                recording.
            task: "transcribe" (the default) or "translate" (into English).
            use_tqdm: whether to show a progress bar, in seconds of audio.

        Returns:
            One transcript per recording, in order.

        Raises:
            TypeError, ValueError: audio or an option is invalid, or the model is not a speech model; no request of the
                call was queued.
        """
        self._check_open()
        params = SamplingParams(temperature=0, max_tokens=None) if sampling_params is None else sampling_params
        options = {name: value for name, value in (("language", language), ("task", task)) if value is not None}
        jobs = begin(self._opened.cross, audio, params, options)
        handles = self._prepare([job.prompt() for job in jobs], params)
        jobs_of = dict(zip(handles, jobs, strict=True))
        shares = divide(self._replicas, handles)
        with tqdm(total=sum(job.total for job in jobs), unit="s", desc="Transcribed", disable=not use_tqdm) as bar:
            left = {replica: Running(own) for replica, own in shares.items()}
            call = DividedCall([replica.thread for replica in left])
            release = call.release
            try:
                self._queue(call, shares)
                for replica, running in left.items():
                    call.drive(replica.thread, running.undisturbed)
                while any(left.values()):
                    thread = call.wait()
                    [replica] = [one for one in left if one.thread is thread]
                    self._next_windows(call, replica, left[replica], jobs_of, params)
                    bar.update(sum(job.seconds for job in jobs) - bar.n)
                    if left[replica]:
                        call.drive(thread, left[replica].undisturbed)
            finally:
                list(release)
        return [job.transcript(self._tokenizer) for job in jobs]

    def _next_windows(
        self, call: DividedCall, replica: Replica, running: Running, jobs: dict[Handle, Transcribing], params: Params
    ) -> None:
        """Collect the results of a replica's finished windows and queue the next window of each recording there."""
        for handle in running.take_ended():
            job = jobs.pop(handle)
            job.take(handle.output(), handle.request.rule)
            if job.left:
                [following] = self._prepare([job.prompt()], params)
                jobs[following] = job
                running.add(following)
                self._queue(call, {replica: [following]})
