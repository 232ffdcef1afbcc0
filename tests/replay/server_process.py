"""A process that answers as ``vllm serve --enable-return-routed-experts`` does: ``server_process.py checkpoint``.

It samples with a bf16 copy of a checkpoint, hands out what its routers chose (base64 of ``.npy``, all decoder layers,
all tokens but the last), and takes named tensors over a gloo group as vLLM's workers take them over NCCL: a name that
is not in the checkpoint fails the request. Prints its port.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import chronomoe_hf
from chronomoe_hf import ChronoConfig

EOS = 1


class Served:
    """The engine behind the requests."""

    def __init__(self, checkpoint: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        chronomoe_hf.wrap(self.model, ChronoConfig.observe(replay__mode="measure"))
        self.replay = chronomoe_hf.system_of(self.model).replay
        self.group: Any = None
        self.silent = False
        self.updates = 0
        self.received: list[str] = []

    def completions(self, asked: dict[str, Any]) -> dict[str, Any]:
        """``/v1/completions`` with token ids."""
        return {"choices": [choice for prompt in asked["prompt"] for choice in self._sample(prompt, asked)]}

    def _sample(self, prompt: list[int], asked: dict[str, Any]) -> list[dict[str, Any]]:
        ids, num = torch.tensor([prompt]), asked["max_tokens"]
        with self.replay.rollout(pad_token_id=0) as tape, torch.no_grad():
            fields = {"do_sample": True, "max_new_tokens": num, "num_return_sequences": asked["n"], "pad_token_id": 0}
            tape.end(self.model.generate(ids, attention_mask=torch.ones_like(ids), **fields))
        return [self._choice(prompt, record) for record in tape.records(self.replay.passes.dtype)]

    def _choice(self, prompt: list[int], record: Any) -> dict[str, Any]:
        completion = record.tokens_N[len(prompt) :].tolist()
        if EOS in completion:
            completion = completion[: completion.index(EOS) + 1]
        num = len(prompt) + len(completion)
        logps = record.logps_N[len(prompt) : num].tolist()
        layers = [layer.decoder for layer in self.replay.axis.layers]
        routes = np.zeros((num - 1, self.model.config.num_hidden_layers, record.routes_NLK.shape[-1]), dtype=np.uint8)
        routes[:, layers] = record.routes_NLK[: num - 1]
        buffer = io.BytesIO()
        np.save(buffer, routes)
        return {
            "prompt_token_ids": prompt,
            "token_ids": completion,
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in completion],
                "token_logprobs": logps,
                "top_logprobs": [None] * len(completion),
            },
            "routed_experts": None if self.silent else base64.b64encode(buffer.getvalue()).decode(),
        }

    def join(self, port: int) -> dict[str, Any]:
        """The trainer is rank 0 of the group, this process rank 1."""
        store = dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=60))
        self.group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
        return {}

    def update(self, info: dict[str, Any]) -> dict[str, Any]:
        """Take what was announced, in that order."""
        held = self.model.state_dict()
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            held[name].copy_(tensor)
        self.updates += 1
        self.received = info["names"]
        return {}

    def biases(self) -> dict[str, Any]:
        """What the routers of this process add to their scores now."""
        held = self.model.state_dict()
        values = {name: held[name].float().tolist() for name in held if name.endswith("e_score_correction_bias")}
        return {"biases": values, "updates": self.updates, "received": self.received}


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    """The endpoints that TRL's client asks."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: Any, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer({"data": [{"id": "served"}]})
            elif self.path.startswith("/server_info"):
                self._answer({"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}})
            else:
                self._answer(served.biases() if self.path == "/biases" else {})

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked = json.loads(raw) if raw else {}
            if self.path == "/v1/completions":
                self._answer(served.completions(asked))
            elif self.path == "/init_weight_transfer_engine":
                self._answer(served.join(asked["port"]))
            elif self.path == "/update_weights":
                self._answer(served.update(asked["update_info"]))
            else:
                served.silent = served.silent or self.path == "/silent"
                self._answer({"success": True})

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


def main(checkpoint: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    server = HTTPServer(("127.0.0.1", 0), handler_of(Served(checkpoint)))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
