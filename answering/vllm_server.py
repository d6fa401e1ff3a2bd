"""vLLM in a process of its own, which answering/vllm_engine.py starts under the Python that has it.

Nothing of this kit is imported here: that Python need not have it. The argument is the number of a socket, over which
each line is a request in JSON, answered by one line:

    {"start": {arguments of vllm.LLM}}           -> {}
    {"load": folder of a checkpoint}             -> {}    the same model with these weights
    {"prompts": [[id, ...], ...], "room": [tokens, ...], "stops": [id, ...], "temperature": 0 or more,
     "seeds": [number, ...] | null}
                                                 -> {"ids": [[id, ...], ...], "log_probabilities": [[nats, ...], ...]}
    what fails                                   -> {"error": "TypeError: ..."}
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from typing import Any


class Server:
    """Answers requests one after another."""

    def __init__(self) -> None:
        self.llm: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "start" in request:
            from vllm import LLM

            self.llm = LLM(**request["start"])
            return {}
        if "load" in request:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": request["load"]})
            self.llm.reset_prefix_cache()
            return {}
        return self.write(**request)

    def write(
        self,
        *,
        prompts: list[list[int]],
        room: list[int],
        stops: list[int],
        temperature: float,
        seeds: list[int] | None,
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=room[place],
                seed=seeds[place] if seeds else None,
                stop_token_ids=stops,
                logprobs=0,
                detokenize=False,
            )
            for place in range(len(prompts))
        ]
        written = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        answers = [one.outputs[0] for one in written]
        return {
            "ids": [list(answer.token_ids) for answer in answers],
            "log_probabilities": [
                [found[number].logprob for number, found in zip(answer.token_ids, answer.logprobs)]  # noqa: B905
                for answer in answers
            ],
        }


def main() -> None:
    # Slurm's warnings reach every process of a job; this one ends when whoever asks it has gone.
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    server = Server()
    with socket.socket(fileno=int(sys.argv[1])).makefile("rw") as lines:
        for line in lines:
            try:
                reply = server.answer(json.loads(line))
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(reply) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
