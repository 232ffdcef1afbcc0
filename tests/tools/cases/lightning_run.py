"""Lightning: counts held against a hook, and a run resumed at an epoch's end against one that was not broken off."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from support import jobs
from support.models import tiny_model

from chronomoe_hf.integrations.lightning import ChronoLightningCallback

SETTINGS = {"preset": "balance", "interval": 2, "beta": {"rate": 0.3}}


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = tiny_model("mixtral")

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: str, epochs: int, precision: str = "32-true", checkpoint: str | None = None) -> Any:
    module, callback = Module(), ChronoLightningCallback(SETTINGS, directory=folder)
    counts = [torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)]
    mask: list[torch.Tensor] = []
    module.model.model.register_forward_pre_hook(
        lambda m, args, kwargs: mask.append(kwargs["attention_mask"].bool().flatten()), with_kwargs=True
    )
    for at, layer in enumerate(module.model.model.layers):

        def hook(m: Any, args: Any, output: Any, at: int = at) -> None:
            if torch.is_grad_enabled():
                counts[at] += torch.bincount(output[-1][mask[-1]].flatten(), minlength=8)

        layer.mlp.gate.register_forward_hook(hook)
    loader = torch.utils.data.DataLoader(jobs.rows(32), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], default_root_dir=folder, precision=precision,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=checkpoint, weights_only=False)
    return module, callback, trainer, [each.tolist() for each in counts]


def main() -> int:
    from support import tool_inputs

    failed = 0
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        _, _, _, counts = fit(precision, 1, precision)
        equal = tool_inputs.recorded(Path(precision)) == counts
        failed += not equal
        print(
            json.dumps(
                {"case": precision, "result": "ok" if equal else "FAILED", "counts": "EQUAL" if equal else "DIFFERENT"}
            )
        )
    whole, callback, _, _ = fit("whole", 2)
    _, _, first, _ = fit("parts", 1)
    again, resumed, _, _ = fit("parts", 2, checkpoint=first.checkpoint_callback.best_model_path)
    one, two = callback.system.state_dict()["tensors"], resumed.system.state_dict()["tensors"]
    same = all(torch.equal(one[name], two[name]) for name in one) and bool(one["beta_LE"].any())
    weights = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    same = same and all(torch.equal(a, b) for a, b in weights)
    print(json.dumps({"case": "resume at an epoch's end", "result": "ok" if same else "FAILED", "bit-equal": same}))
    return failed + (not same)


if __name__ == "__main__":
    sys.exit(main())
